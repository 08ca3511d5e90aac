"""How a declared column differs from the one in the database, and what to write instead.

An embedding column is bound again, or replaced. A text column is made again, since a generated
column has no ALTER.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import sqlalchemy as sa
from alembic.operations import ops
from alembic.util import CommandError
from sqlalchemy.dialects.postgresql import TSVECTOR

from sbert_pg.catalog import Binding, tables
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import EncoderMismatchError
from sbert_pg.source import Source
from sbert_pg.spec import PRECISIONS, EncoderSpec, known_encoder, same_encoder_name
from sbert_pg.types.text import TextSearch

#: Fields that make a vector space, where a declaration spells them out.
_DECIDING = (
    "pooling",
    "layers",
    "normalized",
    "max_seq_length",
    "prompts",
    "default_prompt_name",
    "include_prompt",
)
#: Of these, what ``sbert_pg.spec`` says of a name; it may learn better from release to release.
_FROM_NAME = frozenset({"normalized", "max_seq_length"})


class ChangedColumnError(EncoderMismatchError, CommandError):
    """A bound column's encoder, source or storage was changed under its name."""


@dataclass(frozen=True, slots=True)
class RefusedChange:
    """One change that is refused; of the ``same_width`` the encoders may be compatible."""

    binding: Binding
    column: sa.Column[Any]
    what: str
    same_width: bool


def compatible_names(connection: sa.Connection) -> dict[uuid.UUID, set[str]]:
    """Names of the encoders that were proven compatible, by binding."""
    known = tables.compatible_encoder
    names: dict[uuid.UUID, set[str]] = {}
    for number, name in connection.execute(
        sa.select(known.c.binding_id, known.c.spec["name"].astext)
    ):
        names.setdefault(number, set()).add(name)
    return names


def refused_change(
    binding: Binding, column: sa.Column[Any], names: set[str]
) -> RefusedChange | None:
    """The first difference that makes another vector space or another column, if there is one."""
    type_ = column.type
    assert isinstance(type_, Embedding)
    spec, declared = type_.encoder, binding.declared
    same_width = spec.dimensions == declared.dimensions
    what = _difference(binding, type_, names)
    return None if what is None else RefusedChange(binding, column, what, same_width)


def _difference(binding: Binding, type_: Embedding, names: set[str]) -> str | None:
    spec, declared, sealed = type_.encoder, binding.declared, binding.sealed
    known = {declared.name, *names} | ({sealed.name} if sealed is not None else set())
    if not any(same_encoder_name(spec.name, name) for name in known):
        return f"encoder {declared.name!r} became {spec.name!r}"
    if spec.dimensions != declared.dimensions:
        return f"{declared.dimensions} dimensions became {spec.dimensions}"
    for field in _DECIDING:
        if _changed(field, spec, declared, sealed):
            before = getattr(sealed or declared, field)
            return f"{field} of the encoder, {before!r}, became {getattr(spec, field)!r}"
    if not same_source(type_.source, binding.source):
        return f"source {binding.source} became {type_.source}" + _joined(binding, type_)
    if type_.storage != binding.storage:
        return f"storage {binding.storage!r} became {type_.storage!r}"
    return None


def _joined(binding: Binding, type_: Embedding) -> str:
    old, new = binding.source.separator, type_.source.separator
    return "" if old == new else f" (separator {old!r} became {new!r})"


def _changed(
    field: str, spec: EncoderSpec, declared: EncoderSpec, sealed: EncoderSpec | None
) -> bool:
    value, before = getattr(spec, field), getattr(declared, field)
    if value is None or value == before or (sealed is not None and value == getattr(sealed, field)):
        return False
    if field in _FROM_NAME:
        by_name = EncoderSpec.of(spec.name, dimensions=spec.dimensions)
        if value == getattr(by_name, field):
            return False
    return before is not None or sealed is not None


def same_source(a: Source, b: Source) -> bool:
    """Whether two sources give the same text; one column needs no separator."""
    if a.pattern is None and b.pattern is None and len(a.columns) == 1:
        b = replace(b, separator=a.separator)
    return a == b


def refuse(changes: list[RefusedChange]) -> None:
    """Refuse changed columns, with the lines to write instead."""
    if changes:
        raise ChangedColumnError("\n\n".join(_message(change) for change in changes))


def refuse_two(table: sa.Table, replaced: Mapping[str, str | None]) -> None:
    """Refuse two columns that replace the same one: which of them is to be complete at its end?"""
    seen: dict[str, str] = {}
    for name, old in replaced.items():
        if old is not None and seen.setdefault(old, name) != name:
            raise ChangedColumnError(
                f"{seen[old]!r} and {name!r} are both to replace {old!r} of table "
                f"{table.fullname}. A column has one replacement: declare replaces={old!r} for one "
                "of them, and the other without it, as a column of its own."
            )


def refuse_width(place: tuple[str | None, str, str], old: Any, new: Any) -> NoReturn:
    """Refuse to change the type of a vector column to another width."""
    name = ".".join(part for part in place if part is not None)
    raise ChangedColumnError(
        f"{name} has type {old!r} and is declared as {new!r}. Vectors of one width cannot become "
        "vectors of another, so no ALTER is written. Leave its declaration as it was and declare a "
        f"column {next_name(place[2])!r} of the new width beside it."
    )


def _message(change: RefusedChange) -> str:
    binding, type_ = change.binding, change.column.type
    assert isinstance(type_, Embedding)
    text = (
        f"{binding} is bound, and {change.what}. A column belongs to one encoder, source and "
        "storage for life, so that old and new vectors never mix. Leave its declaration as it was, "
        "and write beside it:\n\n"
        f"    {next_name(binding.column)} = {declaration_line(type_, binding.column)}\n\n"
        "Then run this command again; it writes the first step of the change."
    )
    if change.same_width and change.what.startswith("encoder"):
        text += (
            " If both encoders share one vector space (another precision or export of one model), "
            "write a migration with\n\n"
            f"    op.rebind_embedding_column({binding.table!r}, {binding.column!r}, "
            f"encoder={type_.encoder.name!r}, dimensions={type_.encoder.dimensions})\n\n"
            "which proves it, and leave the vectors as they are."
        )
    if change.what.startswith("storage"):
        text += " 'sbert-pg backfill' fills it from the vectors there, without encoding."
    return text


def declaration_line(type_: Embedding, replaces: str | None = None) -> str:
    """The declaration of a column, which may replace another one."""
    spec, source = type_.encoder, type_.source
    if source.passages is not None:
        return (
            f"passages_of({spec.name!r}, source={source.columns[-1]!r}, "
            f"replaces={str(replaces).removesuffix('_embedding')!r}, ...)"
        )
    arguments = [repr(spec.name), *_encoder_arguments(spec), *_source_arguments(source)]
    if type_.storage != "vector":
        arguments.append(f"storage={type_.storage!r}")
    if replaces is not None:
        arguments.append(f"replaces={replaces!r}")
    return f"embedding_column({', '.join(arguments)}, nullable=True)"


def _encoder_arguments(spec: EncoderSpec) -> Iterator[str]:
    usual = None if known_encoder(spec.name) is None else EncoderSpec.of(spec.name)
    if usual is None or replace(spec, precision=None) != usual:
        yield f"dimensions={spec.dimensions}"
    if spec.precision in PRECISIONS:
        yield f"precision={spec.precision!r}"


def _source_arguments(source: Source) -> Iterator[str]:
    if source.pattern is not None:
        yield f"source=Source.template({source.pattern!r})"
        return
    names = list(source.columns)
    yield f"source={(names[0] if len(names) == 1 else names)!r}"
    if len(names) > 1 and source.separator != "\n\n":
        yield f"separator={source.separator!r}"


def next_name(column: str) -> str:
    """A name for the column that replaces one: ``embedding``, ``embedding_v2`` and so on."""
    match = re.fullmatch(r"(.+)_v(\d+)", column)
    if match is None:
        return f"{column}_v2"
    return f"{match[1]}_v{int(match[2]) + 1}"


def changed_texts(connection: sa.Connection, table: sa.Table) -> list[ops.MigrateOperation]:
    """What makes the text columns of a table again whose sources, language or weights differ.

    The column and its indexes are dropped and made; PostgreSQL rewrites the table.
    """
    declared = [c for c in table.columns if isinstance(c.type, TextSearch)]
    if not declared:
        return []
    inspector = sa.inspect(connection)
    stored = {
        column["name"]: str(column["computed"]["sqltext"])
        for column in inspector.get_columns(table.name, schema=table.schema)
        if column.get("computed")
    }
    present = {index["name"] for index in inspector.get_indexes(table.name, schema=table.schema)}
    changed: list[ops.MigrateOperation] = []
    for column in declared:
        if column.name in stored and not _same(stored[column.name], column):
            changed.append(_remade(table, column, stored[column.name], present))
    return changed


def _remade(
    table: sa.Table, column: sa.Column[Any], stored: str, present: Set[str | None]
) -> ops.ModifyTableOps:
    """What drops a text column with its indexes, and makes them again."""
    indexes = [i for i in table.indexes if column.name in i.columns and i.name in present]
    computed = sa.Computed(stored.replace(":", r"\:"), persisted=True)
    old = sa.Column(column.name, TSVECTOR(), computed)
    operations: list[Any] = [ops.DropIndexOp.from_index(index) for index in indexes]
    for step, one in ((ops.DropColumnOp, old), (ops.AddColumnOp, column)):
        operations.append(step.from_column_and_tablename(table.schema, table.name, one))
    operations += [ops.CreateIndexOp.from_index(index) for index in indexes]
    return ops.ModifyTableOps(table.name, operations, schema=table.schema)


def _same(stored: str, column: sa.Column[Any]) -> bool:
    """Whether two expressions are the same but for blanks, brackets, quotes and casts to text.

    Every column is cast, and PostgreSQL leaves out the cast of one that is ``text`` already.
    """
    assert column.computed is not None
    texts = (stored, str(column.computed.sqltext))
    one, other = (re.sub(r"::text\b|[\s()\\\"']", "", text).lower() for text in texts)
    return one == other
