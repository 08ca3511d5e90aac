"""``load``: encode and write at the same time, block by block."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from sbert_pg.catalog.embedding import digests_for
from sbert_pg.catalog.record import Binding
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.indexes import vector_indexes
from sbert_pg.loading.copying import Existing, Writer
from sbert_pg.loading.rows import Loaded, Plan, checked
from sbert_pg.registry import get_encoder, wait_for
from sbert_pg.row_vectors import EmbeddingColumn, count_cut, cut_so_far, encode_documents, target_of
from sbert_pg.source import Text
from sbert_pg.spec import Vectors
from sbert_pg.system import require_connection
from sbert_pg.types import wire

#: Rows encoded and written together. Enough to sort texts by length and to make the cost of a
#: statement small; few enough that two blocks of vectors are a few megabytes.
BLOCK_ROWS = 2048
#: Rows that are read and taken apart at once.
READ_ROWS = 256
#: A block of long texts ends sooner.
BLOCK_CHARACTERS = 4_000_000
#: Blocks that are being encoded while one is being written.
AHEAD = 2
#: Rows from which building an index afterwards is worth its trouble.
MANY = 20_000

log = logging.getLogger("sbert_pg.loading")
_SLOW = (
    "More than %d rows are put into %s of %s one by one. To have it dropped before such a load and "
    "built after it, which is several times faster, load within sbert_pg.loading.indexes_aside()."
)

Row = Mapping[str, Any]


@dataclass(slots=True)
class _Block:
    """Rows on their way, by column."""

    first: int
    columns: list[list[Any]]
    #: For each embedding column the vector that each row brings, and the text of the row.
    given: list[list[Any]]
    texts: list[list[Text]]
    rows: int = 0
    characters: int = 0

    def extend(self, parts: list[list[Any]]) -> None:
        """Append further rows, given by column as the block has them."""
        for whole, part in zip([*self.columns, *self.given, *self.texts], parts, strict=True):
            whole.extend(part)


def load(
    connection: Connection | Session,
    table: Any,
    rows: Iterable[Row] | Iterable[Sequence[Any]],
    *,
    columns: Sequence[str] | None = None,
    existing: Existing = "refuse",
    progress: Callable[[int], None] | None = None,
) -> Loaded:
    """Load rows of any number with their embeddings, in bounded memory.

    The texts of the next rows are encoded while the vectors of the last ones are written through
    binary COPY, where the driver is psycopg 3. A vector that a row brings is stored as it is, as
    that of the row's text. A row whose source is ``NULL`` altogether gets no vector. A row whose
    text a ``BEFORE INSERT`` trigger changes on its way is pending, for a worker to follow.

    All rows or none: after an error the transaction is as it was before the call, and can go on.

    Args:
        connection: a connection or session; for an asynchronous one
            ``await connection.run_sync(load, Article, rows)``.
        table: a mapped class, whose rows are given by attribute names, or a ``Table``.
        rows: mappings from name to value. The first decides which columns are written; all have the
            same. Columns it lacks take the default of the database, or of their ``Column``. A text
            in a column of numbers, dates or the like is converted, for the sake of CSV files.
        columns: names of the values, where rows are tuples instead of mappings.
        existing: what becomes of a row whose primary key is in the table: by default an error;
            ``"keep"`` leaves the table's as it is, ``"replace"`` writes the columns of the new one
            where they differ; those it lacks stay as they are. With either the same rows can be
            loaded again, as after a failure; a block may not have one key twice.
        progress: is called with the number of rows written so far, after each block.

    Returns:
        The number of rows, a whole number with the attribute ``cut``: how many texts were longer
        than the encoder reads, by column.

    Raises:
        LoadError: a row cannot be loaded; the message and ``LoadError.row`` say which.
        EncodingError: a text cannot be encoded; the message says which.
        EncoderMismatchError: the column belongs to another encoder.
        DeclarationError: no table or connection, or there is no such ``existing``.
    """
    require_connection("load", connection)
    if existing not in get_args(Existing):
        raise DeclarationError(
            f"load: existing is {existing!r}; it is 'refuse', 'keep' or 'replace'."
        )
    target, names = target_of(table)
    if isinstance(connection, Session):
        # What lets a session with several engines find the table's.
        clause = {"clause": target} if table is target else {"mapper": sa.inspect(table)}
        connection = connection.connection(bind_arguments=clause)
    loading = _Loading(connection, target, names, existing, progress)
    with loading.all_or_nothing():
        loading.run(cast("Iterable[Row]", rows) if columns is None else _named(rows, columns))
    return Loaded(loading.written, loading.cut)


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


@dataclass
class _Loading:
    """One call of ``load``."""

    connection: Connection
    table: sa.Table
    names: dict[str, sa.Column[Any]]
    existing: Existing
    progress: Callable[[int], None] | None
    written: int = 0
    cut: dict[str, int] = field(default_factory=dict)

    def all_or_nothing(self) -> AbstractContextManager[Any]:
        """What is undone if the load fails."""
        driver: Any = self.connection.connection.dbapi_connection
        # Not merely true: sqlite3 has -1 there for its own way, from Python 3.12 on.
        if getattr(driver, "autocommit", False) is True:
            return _own_transaction(self.connection)
        return self.connection.begin_nested()

    def run(self, rows: Iterable[Row]) -> None:
        """Read, encode and write, the latter two at the same time."""
        iterator = iter(rows)
        first = list(itertools.islice(iterator, 1))
        if not first:
            return
        plan = Plan(self.table, self.names, first[0])
        bindings = [embedded.binding(self.connection) for embedded in plan.embedded]
        companions = (
            embedded.companion
            for embedded, binding in zip(plan.embedded, bindings, strict=True)
            if binding is not None and embedded.companion is not None
        )
        columns = [*plan.columns, *(each.column for each in plan.embedded), *companions]
        replaced, existing = plan.replaced(), self.existing
        writer = Writer(
            self.connection, self.table, columns, replaced, inserts=plan.inserts, existing=existing
        )
        plan.convert_for(self.connection.dialect, writer.copies)
        encoding = _Encoding(plan, bindings, writer.copies)
        self.cut = encoding.cut
        waiting: deque[tuple[_Block, Future[list[list[Any]]]]] = deque()
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sbert-pg-load")
        try:
            for block in _blocks(plan, bindings, itertools.chain(first, iterator)):
                waiting.append((block, encoding.begin(executor, block)))
                if len(waiting) > AHEAD:
                    self._write(writer, *waiting.popleft())
            while waiting:
                self._write(writer, *waiting.popleft())
            writer.close()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _write(self, writer: Writer, block: _Block, future: Future[list[list[Any]]]) -> None:
        rows = list(zip(*block.columns, *wait_for(future), strict=True))
        writer.write(rows, block.first)
        if self.written < MANY <= self.written + len(rows):
            for index in vector_indexes(self.connection, self.table.name, schema=self.table.schema):
                log.warning(_SLOW, MANY, index.name, self.table.fullname)
        self.written += len(rows)
        if self.progress is not None:
            self.progress(self.written)


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


def _blocks(plan: Plan, bindings: list[Binding | None], rows: Iterator[Row]) -> Iterator[_Block]:
    number = 0
    block: _Block | None = None
    while some := list(itertools.islice(rows, READ_ROWS)):
        columns, brought = plan.columns_of(some, number)
        # From the values as they are given, before they are converted for the driver.
        texts = [
            plan.texts(i, columns, vectors, number, bound=bindings[i] is not None)
            for i, vectors in enumerate(brought)
        ]
        columns = plan.converted(columns, number)
        if block is None:
            block = _Block(number, columns, brought, texts)
        else:
            block.extend([*columns, *brought, *texts])
        number += len(some)
        block.rows += len(some)
        block.characters += sum(
            len(text) for column in texts for text in column if isinstance(text, str)
        )
        if block.rows >= BLOCK_ROWS or block.characters >= BLOCK_CHARACTERS:
            yield block
            block = None
    if block is not None:
        yield block


@dataclass
class _Encoding:
    """From blocks to vectors, and to what is written beside them, as the writer takes them."""

    plan: Plan
    bindings: list[Binding | None]
    copies: bool
    cut: dict[str, int] = field(default_factory=dict)

    def begin(self, executor: ThreadPoolExecutor, block: _Block) -> Future[list[list[Any]]]:
        """Encode a block in a thread, or at once where nothing is to be encoded.

        An encoder leaves the interpreter to others while it computes. Turning arrays into bytes
        does not, and a second thread would only take turns with the one that writes.
        """
        if any(
            vector is None and isinstance(text, str)
            for texts, given in zip(block.texts, block.given, strict=True)
            for text, vector in zip(texts, given, strict=True)
        ):
            return executor.submit(self._columns, block)
        ready: Future[list[list[Any]]] = Future()
        ready.set_result(self._columns(block))
        return ready

    def _columns(self, block: _Block) -> list[list[Any]]:
        """The vectors of a block by embedding column, then the companions of the bound ones."""
        columns, companions = [], []
        for position, binding in enumerate(self.bindings):
            vectors = self._vectors(position, block)
            columns.append(vectors)
            if binding is not None:
                companions.append(list(digests_for(binding, block.texts[position], vectors)))
        return [*columns, *companions]

    def _vectors(self, position: int, block: _Block) -> list[Any]:
        """The vectors of a block for one embedding column; ``None`` where a row has none."""
        embedded, vectors = self.plan.embedded[position], block.given[position]
        brought = [i for i, vector in enumerate(vectors) if vector is not None]
        rows: list[Any] = [None] * block.rows
        for start in range(0, len(brought), READ_ROWS):
            part = brought[start : start + READ_ROWS]
            self._put(rows, embedded, [vectors[i] for i in part], block.first, part)
        texts = block.texts[position]
        missing = [
            i for i, text in enumerate(texts) if isinstance(text, str) and vectors[i] is None
        ]
        if missing:
            encoded = self._encoded(position, block.first, missing, texts)
            self._put(rows, embedded, encoded, block.first, missing)
        return rows

    def _encoded(self, position: int, first: int, missing: list[int], texts: list[Text]) -> Vectors:
        """The vectors of the texts that have none; counts those of which a part was cut off."""
        embedded = self.plan.embedded[position]
        some = [str(texts[i]) for i in missing]
        encoder = get_encoder(embedded.spec)
        before = cut_so_far(encoder)
        encoded = encode_documents(
            embedded.spec, some, lambda i: self.plan.label(position, first + missing[i])
        )
        # Other threads may use the encoder too, so its own count says only whether to look.
        none = before is not None and cut_so_far(encoder) == before
        cut = 0 if none else count_cut(encoder, some)
        if cut is not None:
            self.cut[embedded.column.name] = self.cut.get(embedded.column.name, 0) + cut
        return encoded

    def _put(
        self, rows: list[Any], embedded: EmbeddingColumn, vectors: Any, first: int, at: list[int]
    ) -> None:
        """Check vectors, and put them into their rows as the writer takes them."""
        matrix = checked(embedded, vectors, first, at)
        sent = wire.to_wire_rows(matrix, embedded.type.storage) if self.copies else matrix
        for i, vector in zip(at, sent, strict=True):
            rows[i] = vector
