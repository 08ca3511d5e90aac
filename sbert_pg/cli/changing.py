"""What the commands of a change of encoder share: the request, interruption, progress, files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
import typer

from sbert_pg import registry
from sbert_pg.catalog import Binding
from sbert_pg.cli import common
from sbert_pg.cli.encoder import split_name
from sbert_pg.cli.upkeep import find
from sbert_pg.errors import DeclarationError, NotBoundError
from sbert_pg.reembedding import LabelledQuery, Request, request_of
from sbert_pg.reembedding.pair import pair_of
from sbert_pg.reembedding.run import Told
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec, TextEncoder
from sbert_pg.types import Embedding
from sbert_pg.types.guard import ColumnIdentity

ColumnArgument = Annotated[
    str, typer.Argument(help="The old column or the new one, as table.column.")
]
ToOption = Annotated[
    str | None, typer.Option("--to", help="Name of the new column.", show_default=False)
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        "-e",
        help="The new encoder; ':fp32' after it asks for a precision.",
        show_default=False,
    ),
]
DimensionsOption = Annotated[
    int | None,
    typer.Option(help="Dimensions, where fewer are wanted than the encoder has.", min=1),
]
SourceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        "-s",
        help="A column that the text is made of; the old column's by default. May be repeated.",
        show_default=False,
    ),
]
SeparatorOption = Annotated[
    str, typer.Option(help="What stands between two columns of --source.", show_default=False)
]
TemplateOption = Annotated[
    str | None,
    typer.Option(help="The text as a template, as in 'Title: {title}'.", show_default=False),
]
StorageOption = Annotated[
    Literal["vector", "halfvec"] | None,
    typer.Option(help="Type of the new column; the old one's by default.", show_default=False),
]
AppOption = Annotated[
    str | None,
    typer.Option(
        "--app",
        help="Take the change from the class that declares the new column with replaces=: "
        "'package.module:Base'.",
        show_default=False,
    ),
]

SEPARATOR = "\n\n"


def source_of(columns: Sequence[str] | None, separator: str, template: str | None) -> Source | None:
    """The source that options give, ``None`` where they give none.

    Raises:
        DeclarationError: columns and a template are given.
    """
    if template is not None:
        if columns:
            raise DeclarationError("Give --source or --template, not both.")
        return Source.template(template)
    return Source.of(list(columns), separator) if columns else None


def spec_of(name: str, dimensions: int | None = None) -> EncoderSpec:
    """What a class would declare for an encoder given by name; it is loaded where need be.

    Raises:
        EncoderError: it is no known name, not registered, and cannot be loaded.
    """
    name, precision = split_name(name)
    try:
        spec = EncoderSpec.of(name, dimensions=dimensions)
    except DeclarationError:
        loaded = registry.find_named(name) or _load(name, precision)
        spec = EncoderSpec(
            name=name,
            dimensions=dimensions or loaded.spec.dimensions,
            similarity=loaded.spec.similarity,
        )
    return replace(spec, precision=precision) if precision else spec


def _load(name: str, precision: str | None) -> TextEncoder:
    from sbert_pg.encoder import Encoder

    return registry.use_encoder(Encoder.load(name, precision=precision), name=name)


@dataclass(frozen=True)
class Asked:
    """A change as the command line asks for it.

    Attributes:
        request: the change.
        indexes: the new column's indexes as the application declares them, where it was given.
    """

    request: Request
    indexes: list[sa.Index] | None = None


def asked(
    engine: sa.Engine,
    column: str,
    *,
    to: str | None,
    encoder: str | None,
    dimensions: int | None = None,
    source: Source | None = None,
    storage: Literal["vector", "halfvec"] | None = None,
    app: str | None = None,
    same_encoder: bool = False,
) -> Asked:
    """The change that options describe: a declaration's, one under way, or a new one.

    Raises:
        NotBoundError: the column is not bound.
        DeclarationError: too little is said, or the application declares no such change.
    """
    if app is not None:
        return _declared(column, app)
    try:
        binding = find(engine, column)
    except NotBoundError:
        over = None if to is None else _finished(engine, unbound(column), to)
        if over is None:
            raise
        return Asked(over)
    with engine.connect() as connection:
        pair = pair_of(connection, binding.identity)
        connection.rollback()
    if pair.old is not None:
        # A change is under way: what is not said anew is as it was begun.
        new = pair.new.binding
        return Asked(
            Request(
                old=pair.old.binding.identity,
                new=to or new.column,
                encoder=new.declared if encoder is None else spec_of(encoder, dimensions),
                source=source or new.source,
                storage=storage or new.storage,
            )
        )
    if to is None or (encoder is None and not same_encoder):
        raise DeclarationError(
            f"{binding} is not being replaced yet. Say what is to replace it: --to NEW_COLUMN "
            "--encoder NAME, or --app package.module:Base with a class that declares it."
        )
    spec = binding.declared
    if encoder is not None:
        spec = spec_of(encoder, dimensions)
    elif dimensions is not None:
        spec = replace(spec, dimensions=dimensions)
    return Asked(
        Request(old=binding.identity, new=to, encoder=spec, source=source, storage=storage)
    )


def _finished(engine: sa.Engine, old: ColumnIdentity, to: str) -> Request | None:
    """The change where it is over: the old column is gone, and the new one is bound."""
    from sbert_pg import catalog

    with engine.connect() as connection:
        new = catalog.binding_of(connection, ColumnIdentity(old.schema, old.table, to))
        connection.rollback()
    if new is None or new.replaces is not None:
        return None
    gone = ColumnIdentity(new.schema, new.table, old.column)
    return Request(old=gone, new=to, encoder=new.declared, source=new.source, storage=new.storage)


def _declared(column: str, app: str) -> Asked:
    metadata = common.load_metadata(app)
    table_name, _, name = column.rpartition(".")
    found = [
        table.c[name]
        for table in metadata.tables.values()
        if table_name in (table.name, table.fullname) and name in table.c
    ]
    if len(found) != 1 or not isinstance(found[0].type, Embedding):
        raise DeclarationError(
            f"--app {app!r} declares no embedding column {column!r}; name the new column, as "
            "table.column."
        )
    from sbert_pg.reembedding.ready import declared_indexes

    return Asked(request_of(found[0]), declared_indexes(found[0]))


def unbound(name: str) -> ColumnIdentity:
    """A column that need not be bound, by its name on the command line.

    Raises:
        DeclarationError: it is not of the form table.column.
    """
    parts = name.split(".")
    if len(parts) not in (2, 3):
        raise DeclarationError(f"{name!r} has to be table.column or schema.table.column.")
    return ColumnIdentity(parts[0] if len(parts) == 3 else None, *parts[-2:])


def changes(engine: sa.Engine) -> list[Binding]:
    """The new columns of all changes under way."""
    from sbert_pg import catalog

    with engine.begin() as connection:
        catalog.require_current(connection)
        return [b for b in catalog.all_bindings(connection) if b.replaces is not None]


def change_named(engine: sa.Engine, column: str | None) -> ColumnIdentity:
    """The change that is meant: by its old or new column, or the only one there is.

    Raises:
        NotBoundError: no column is called so, or there is no single change.
    """
    if column is not None:
        return find(engine, column).identity
    under_way = changes(engine)
    if len(under_way) != 1:
        names = ", ".join(str(b) for b in under_way) or "none"
        raise NotBoundError(f"Name the column of the change; under way: {names}.")
    return under_way[0].identity


def labelled(path: Path | None) -> list[LabelledQuery]:
    """Labelled queries from a file of JSON lines.

    A line has ``query``, and either ``relevant``, a list of keys, or ``gains``, an object of key
    and gain.

    Raises:
        DeclarationError: a line is not of this form; the message says which.
    """
    if path is None:
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            gains = data.get("gains") or dict.fromkeys(data["relevant"], 1.0)
            found.append(
                LabelledQuery(str(data["query"]), {str(k): float(v) for k, v in gains.items()})
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DeclarationError(
                f"{path}, line {number}: expected a JSON object with 'query' and 'relevant' (a "
                f"list of keys) or 'gains' (key and gain): {error!r}"
            ) from error
    return found


def filters_of(where: Sequence[str] | None) -> dict[str, sa.ColumnElement[bool]]:
    """Criteria given as SQL, named by themselves."""
    made: dict[str, Any] = {each: sa.text(f"({each})") for each in where or ()}
    return made


class Interrupts:
    """The first SIGTERM or Ctrl-C lets the step in hand come to its end; the second does not.

    Attributes:
        stop: set by the first one.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._also: list[Callable[[], None]] = []

    @contextmanager
    def caught(self) -> Iterator[Interrupts]:
        """Catch signals while the block runs."""

        def interrupt(number: int, frame: object) -> None:
            if self.stop.is_set():
                raise KeyboardInterrupt
            self.stop.set()
            common.note("Stopping: finishing what is in hand (again to leave at once).")
            for each in self._also:
                each()

        with common.on_stop(interrupt):
            yield self

    @contextmanager
    def also(self, do: Callable[[], None]) -> Iterator[None]:
        """Call this as well when interrupted in the block."""
        self._also.append(do)
        try:
            yield
        finally:
            self._also.remove(do)


@contextmanager
def telling() -> Iterator[Callable[[Told], None]]:
    """A bar on terminals, and one line a step elsewhere."""
    steps: list[str] = []
    with common.progress_bar() as bar:
        task = bar.add_task("", total=None, rate="")

        def tell(told: Told) -> None:
            if not steps or steps[-1] != told.step:
                steps.append(told.step)
                if bar.disable:
                    common.note(f"{told.step}: {told.words}")
            rate = "" if told.rate is None else f"{told.rate:,.0f}/s"
            bar.update(
                task,
                description=f"{told.step}: {told.words}",
                completed=told.done,
                total=told.total,
                rate=rate,
            )

        yield tell
