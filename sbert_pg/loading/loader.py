"""``load``: encode and write at the same time, block by block."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from sbert_pg.errors import DeclarationError, LoadError, VectorError
from sbert_pg.filling import Filling, encode_documents
from sbert_pg.loading.copying import Writer
from sbert_pg.loading.rows import Plan, columns_by_name
from sbert_pg.spec import Vectors
from sbert_pg.types import guard, wire
from sbert_pg.types.embedding import Embedding
from sbert_pg.types.offload import wait_for

#: Rows encoded and written together. Enough to sort texts by length and to make the cost of a
#: statement small; few enough that two blocks of vectors are a few megabytes.
BLOCK_ROWS = 2048
#: Rows that are read and taken apart at once.
READ_ROWS = 256
#: A block of long texts ends sooner.
BLOCK_CHARACTERS = 4_000_000
#: Blocks that are being encoded while one is being written.
AHEAD = 2

Row = Mapping[str, Any]


@dataclass(slots=True)
class _Block:
    """Rows on their way, by column."""

    first: int
    columns: list[list[Any]]
    #: For each embedding column, what each row brings: a vector, a text to encode, or nothing.
    given: list[list[Any]]
    texts: list[list[str | None]]
    rows: int = 0
    characters: int = 0


def load(
    connection: Connection | Session,
    table: Any,
    rows: Iterable[Row] | Iterable[Sequence[Any]],
    *,
    columns: Sequence[str] | None = None,
    commit_every: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Load rows of any number with their embeddings, in bounded memory.

    The texts of the next rows are encoded while the vectors of the last ones are written through
    binary COPY. A vector that a row brings is stored as it is. A row whose source is ``NULL``
    altogether gets no vector. Where a ``BEFORE INSERT`` row trigger may change a text on its way,
    nothing is encoded and the rows are pending, for a worker to follow.

    All rows or none: after an error the transaction is as it was before the call, and can go on.
    With ``commit_every`` the rows are committed as they come; ``LoadError.committed``, or the last
    number that ``progress`` was given, says with which row a second call is to begin.

    Args:
        connection: a connection or session; for an asynchronous one
            ``await connection.run_sync(load, Article, rows)``.
        table: a mapped class, whose rows are given by attribute names, or a ``Table``.
        rows: mappings from name to value. The first decides which columns are written; all have the
            same. Columns it lacks take the default of the database, or of their ``Column``. A text
            in a column of numbers, dates or the like is converted, for the sake of CSV files.
        columns: names of the values, where rows are tuples instead of mappings.
        commit_every: rows after which the transaction is committed; never by default. Needs a
            connection that this call may commit, as from ``engine.connect()``.
        progress: is called with the number of rows written so far, after each block.

    Returns:
        The number of rows.

    Raises:
        LoadError: a row cannot be loaded; the message and ``LoadError.row`` say which.
        EncodingError: a text cannot be encoded; the message says which.
        EncoderMismatchError: the column belongs to another encoder.
        DeclarationError: ``table`` is none, or ``commit_every`` cannot be had here.
    """
    target, names = _target(table)
    if commit_every is not None:
        _require_committable(connection, commit_every)
    if isinstance(connection, Session):
        connection = connection.connection(bind_arguments=_bind_arguments(table, target))
    loading = _Loading(connection, target, names, commit_every, progress)
    with loading.all_or_nothing():
        loading.run(cast("Iterable[Row]", rows) if columns is None else _named(rows, columns))
    return loading.written


def _require_committable(connection: Connection | Session, commit_every: int) -> None:
    if commit_every < 1:
        raise DeclarationError(f"load: commit_every is {commit_every}; it starts at 1.")
    if isinstance(connection, Session) or getattr(connection, "_trans_context_manager", None):
        raise DeclarationError(
            "load: commit_every commits again and again, and this transaction is a session's or a "
            "'with' block's to commit. Give a connection of its own, as from engine.connect()."
        )


def _bind_arguments(table: Any, target: sa.Table) -> dict[str, Any]:
    """What lets a session with several engines find the table's."""
    return {"clause": target} if table is target else {"mapper": sa.inspect(table)}


def _named(rows: Iterable[Any], columns: Sequence[str]) -> Iterator[Row]:
    """Tuples as mappings."""
    width = len(columns)
    for number, row in enumerate(rows):
        if isinstance(row, (str, bytes, Mapping)) or len(row) != width:
            raise LoadError(
                f"Row {number} is {str(row)[:60]!r}; a sequence of {width} values is expected, in "
                f"the order {', '.join(columns)}.",
                row=number,
            )
        yield dict(zip(columns, row, strict=True))


class _Loading:
    """One call of ``load``."""

    def __init__(
        self,
        connection: Connection,
        table: sa.Table,
        names: dict[str, sa.Column[Any]],
        commit_every: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.connection = connection
        self.table = table
        self.names = names
        self.commit_every = commit_every
        self.progress = progress
        self.written = 0
        self.committed = 0

    def all_or_nothing(self) -> AbstractContextManager[Any]:
        """What is undone if the load fails."""
        if self.commit_every is not None:
            return self._rolled_back()
        driver: Any = self.connection.connection.dbapi_connection
        if getattr(driver, "autocommit", False):
            return _own_transaction(self.connection)
        return self.connection.begin_nested()

    @contextmanager
    def _rolled_back(self) -> Iterator[None]:
        """Undo what was written since the last commit, so that ``committed`` is the truth."""
        try:
            yield
        except BaseException as error:
            self.connection.rollback()
            if isinstance(error, LoadError):
                error.committed = self.committed
            raise

    def run(self, rows: Iterable[Row]) -> None:
        """Read, encode and write, the latter two at the same time."""
        iterator = iter(rows)
        first = next(iterator, None)
        if first is None:
            return
        plan = Plan(self.table, self.names, first)
        writer = Writer(self.connection, self.table, plan.columns, inserts=plan.inserts)
        plan.convert_for(self.connection.dialect, writer.copies)
        self._vouch(plan)
        waiting: deque[tuple[_Block, Future[list[list[Any]]]]] = deque()
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sbert-pg-load")
        try:
            for block in _blocks(plan, itertools.chain([first], iterator)):
                waiting.append((block, _begun(executor, plan, block, writer.copies)))
                if len(waiting) > AHEAD:
                    self._write(plan, writer, *waiting.popleft())
            while waiting:
                self._write(plan, writer, *waiting.popleft())
            if self.commit_every is not None:
                self._commit()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _write(
        self, plan: Plan, writer: Writer, block: _Block, future: Future[list[list[Any]]]
    ) -> None:
        vectors = wait_for(future)
        self._vouch(plan)
        for position in plan.left:
            # Blocks that were encoded before a trigger was made, between two commits.
            texts = block.texts[position]
            vectors[position] = [
                vector if text is None else None
                for vector, text in zip(vectors[position], texts, strict=True)
            ]
        rows = list(zip(*block.columns, *vectors, strict=True))
        writer.write(rows, block.first)
        self.written += len(rows)
        if self.commit_every is not None and self.written - self.committed >= self.commit_every:
            self._commit()
        if self.progress is not None:
            self.progress(self.written)

    def _vouch(self, plan: Plan) -> None:
        """Vouch for the encoders, and see which columns have to be left to a worker.

        A ``BEFORE`` trigger may give a row another text than was encoded, and COPY does not tell
        what became of a row. So rows are written without vectors there, and are pending.
        """
        for position, filling in enumerate(plan.fillings):
            identity = guard.identity_of(filling.column)
            if identity is None:
                continue
            guard.ensure_writable(self.connection, identity, filling.spec)
            if not guard.may_rewrite(self.connection, self.table, guard.INSERTING):
                continue
            if not filling.column.nullable:
                raise DeclarationError(
                    f"load: a BEFORE trigger of {self.table.fullname!r} may change the source of "
                    f"{filling.column.name!r}, so its rows would have to wait for their vectors, "
                    "and the column takes no NULL. Use session.add_all(), or disable the trigger "
                    "while loading."
                )
            plan.left.add(position)

    def _commit(self) -> None:
        self.connection.commit()
        self.committed = self.written


@contextmanager
def _own_transaction(connection: Connection) -> Iterator[None]:
    """A transaction on a connection that commits by itself otherwise."""
    cursor = connection.connection.cursor()
    cursor.execute("BEGIN")
    try:
        yield
    except BaseException:
        cursor.execute("ROLLBACK")
        raise
    cursor.execute("COMMIT")


def _target(table: Any) -> tuple[sa.Table, dict[str, sa.Column[Any]]]:
    """The table, and its columns by the names that rows use."""
    if isinstance(table, sa.Table):
        return table, columns_by_name(table)
    mapper = sa.inspect(table, raiseerr=False)
    local = getattr(mapper, "local_table", None)
    if mapper is None or not isinstance(local, sa.Table):
        raise DeclarationError(f"load: {table!r} is no table and no mapped class.")
    if mapper.inherits is not None and mapper.local_table is not mapper.inherits.local_table:
        raise DeclarationError(
            f"load: {mapper.class_.__name__} is stored in several tables. Load the rows of each "
            "table, the parent's first, or use session.execute(insert(...), rows)."
        )
    names = {}
    for attribute in mapper.column_attrs:
        column = attribute.columns[0]
        if isinstance(column, sa.Column) and column.table is local:
            names[attribute.key] = column
    return local, names


def _blocks(plan: Plan, rows: Iterator[Row]) -> Iterator[_Block]:
    number = 0
    block: _Block | None = None
    while some := list(itertools.islice(rows, READ_ROWS)):
        columns, given = plan.columns_of(some, number)
        # From the values as they are given, before they are converted for the driver.
        texts = [plan.texts(i, columns, vectors, number) for i, vectors in enumerate(given)]
        columns = plan.converted(columns, number)
        if block is None:
            block = _Block(number, columns, given, texts)
        else:
            for whole, part in zip(
                [*block.columns, *block.given, *block.texts],
                [*columns, *given, *texts],
                strict=True,
            ):
                whole.extend(part)
        number += len(some)
        block.rows += len(some)
        block.characters += sum(len(text) for column in texts for text in column if text)
        if block.rows >= BLOCK_ROWS or block.characters >= BLOCK_CHARACTERS:
            yield block
            block = None
    if block is not None:
        yield block


def _begun(
    executor: ThreadPoolExecutor, plan: Plan, block: _Block, copies: bool
) -> Future[list[list[Any]]]:
    """The vectors of a block, encoded in a thread, or at once where nothing is to be encoded.

    An encoder leaves the interpreter to others while it computes. Turning arrays into bytes does
    not, and a second thread would only take turns with the one that writes.
    """
    if any(text is not None for texts in block.texts for text in texts):
        return executor.submit(_vectors, plan, block, copies)
    ready: Future[list[list[Any]]] = Future()
    ready.set_result(_vectors(plan, block, copies))
    return ready


def _vectors(plan: Plan, block: _Block, copies: bool) -> list[list[Any]]:
    """For each embedding column the vectors of a block, as the writer takes them; in a thread."""
    return [
        _column_vectors(plan, position, block, copies) for position in range(len(plan.fillings))
    ]


def _column_vectors(plan: Plan, position: int, block: _Block, copies: bool) -> list[Any]:
    filling = plan.fillings[position]
    given, texts = block.given[position], block.texts[position]
    made: list[Any] = [None] * block.rows
    ready = [i for i, vector in enumerate(given) if vector is not None]
    wanted = [i for i, text in enumerate(texts) if text is not None]

    def label(number: int) -> str:
        return plan.label(position, block.first + number)

    if len(ready) == len(given):
        made.clear()
        for start in range(0, len(given), READ_ROWS):
            part = given[start : start + READ_ROWS]
            numbers = range(block.first + start, block.first + start + len(part))
            made.extend(_sendable(filling, _checked(filling, part, numbers), copies))
        return made
    if ready:
        matrix = _checked(filling, [given[i] for i in ready], [block.first + i for i in ready])
        for i, vector in zip(ready, _sendable(filling, matrix, copies), strict=True):
            made[i] = vector
    if wanted:
        matrix = encode_documents(
            filling.spec, [str(texts[i]) for i in wanted], lambda i: label(wanted[i])
        )
        matrix = _checked(filling, matrix, [block.first + i for i in wanted])
        for i, vector in zip(wanted, _sendable(filling, matrix, copies), strict=True):
            made[i] = vector
    return made


def _checked(filling: Filling, vectors: Any, numbers: Sequence[int]) -> Vectors:
    """Vectors as one matrix; checked at once, and one by one only to say which is wrong."""
    type_: Embedding = filling.column.type  # type: ignore[assignment]
    try:
        matrix = np.asarray(vectors, dtype=np.float32)
    except (ValueError, TypeError):
        matrix = np.empty((0, 0), dtype=np.float32)
    good = matrix.shape == (len(numbers), type_.dimensions) and bool(np.isfinite(matrix).all())
    if good and type_.storage == "halfvec":
        good = float(np.abs(matrix).max()) <= wire.HALF_MAX
    if good and type_.similarity == "cosine":
        good = bool(matrix.any(axis=1).all())
    if good:
        return matrix
    for number, vector in zip(numbers, vectors, strict=True):
        try:
            type_.checked(vector)
        except VectorError as error:
            raise LoadError(f"Row {number}: {error}", row=number) from error
    raise AssertionError("a matrix was refused and each of its rows accepted")


def _sendable(filling: Filling, matrix: Vectors, copies: bool) -> Iterable[Any]:
    """The rows of a matrix as the writer takes them."""
    type_: Embedding = filling.column.type  # type: ignore[assignment]
    return wire.to_wire_rows(matrix, type_.storage) if copies else matrix
