"""Compare the code's encoder with the column's binding, on every read and every write.

A process compares itself at its first use of a column, with the probe vectors, and remembers the
binding for each engine. What it remembers is never trusted for long:

- every later statement that compares a vector with the column asks the catalog again, inside itself
  (``fenced``): once a query, by a filter that PostgreSQL evaluates once;
- every transaction that writes asks for the column's binding (``binding_for_write``), and what is
  written is made with its identity, so that a vector for another binding proves nothing.

The listeners are put on an engine's dialect when a type first prepares a parameter for it; no
engine that compares or stores no vector is touched.
"""

from __future__ import annotations

import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Dialect, Transaction
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine, UserDefinedType

from sbert_pg.catalog.holding import Held, fingerprint_of, hold
from sbert_pg.catalog.record import Binding, binding_id_of, installed, mapped
from sbert_pg.errors import CatalogError, EncoderMismatchError, SbertPgError
from sbert_pg.process import ProcessLock
from sbert_pg.registry import find_encoder
from sbert_pg.source import NIL, PROVEN_DIMENSIONS
from sbert_pg.spec import EncoderSpec
from sbert_pg.sqlstates import (
    FEATURE_NOT_SUPPORTED,
    INSUFFICIENT_PRIVILEGE,
    UNDEFINED_OBJECT,
    as_error,
    sqlstate_of,
    words_of,
)
from sbert_pg.system import ColumnIdentity, identity_behind
from sbert_pg.types.drivers import unwrapped

#: Seconds after which a column that was found unbound is looked at again.
UNBOUND_RECHECK = 30.0
#: Seconds between two traces that a process leaves of its use of a column.
TRACE_EVERY = 10.0
_MISMATCH = "SB001"
_FENCE = "sbert.fence_v1("
#: What every search by words begins with: its language.
_LANGUAGE = "words_search AS MATERIALIZED"
#: The schema in a message of the server, in whatever language, and no longer name.
_OURS = re.compile(r"(?<![\w.-])sbert(?![\w.-])", re.ASCII)
#: Dollar quote around a table's name; a name cannot hold it, since it cannot be guessed.
_QUOTE = f"$q{secrets.token_hex(8)}$"

_Key = tuple[ColumnIdentity, EncoderSpec]
_Value = TypeVar("_Value")


class _Memory:
    """What a process has learned on one dialect, that is, on one engine."""

    def __init__(self) -> None:
        #: Whether the catalog is there, where known.
        self.installed: bool | None = None
        self.held: dict[_Key, Held] = {}
        #: What this process was last accepted with, by the name that a statement has for a column.
        self.accepted: dict[_Key, _Accepted] = {}
        self.bindings: dict[tuple[uuid.UUID, EncoderSpec], Held] = {}
        self.unbound: dict[_Key, float] = {}
        self.traced: dict[tuple[uuid.UUID, bool], float] = {}
        self.uses: WeakKeyDictionary[Any, tuple[_Use, ...]] = WeakKeyDictionary()
        #: Statements that are compiled once more, and the cursors that they are to be executed on.
        self.again: WeakKeyDictionary[Connection, tuple[Any, Any]] = WeakKeyDictionary()
        #: What holds until a transaction or savepoint ends.
        self.answers: WeakKeyDictionary[Transaction, dict[Any, Any]] = WeakKeyDictionary()


class _Accepted(NamedTuple):
    """With what a statement asks the catalog whether it may compare vectors with a column."""

    #: Of a column that was not bound what the process has; ``None`` where no answer holds for long.
    fingerprint: str | None = None
    #: The binding that the process was compared with, where that holds.
    known: uuid.UUID | None = None


class _Use(NamedTuple):
    """That a statement compares a vector with a column, or stores one there."""

    identity: ColumnIdentity
    spec: EncoderSpec
    #: Names of the parameters that are stored, none where the column is only compared with.
    stored: tuple[str, ...] = ()
    #: Whether the statement asks by itself, once it is compiled with a fence.
    fenced: bool = False


_lock = ProcessLock()
#: Whether a statement was compiled for a database with a catalog: it asks, and fails without one.
_assumed: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_memories: WeakKeyDictionary[Dialect, _Memory] = WeakKeyDictionary()


def watch(dialect: Dialect) -> None:
    """Look at the statements of this dialect from now on."""
    if dialect in _memories or dialect.name != "postgresql":
        return
    with _lock:
        if dialect in _memories:
            return
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(dialect, name, partial(_before_execute, name))
        event.listen(dialect, "handle_error", _on_error)
        # Last: a thread that sees it continues to execute, and must not find half of the listeners.
        _memories[dialect] = _Memory()


def forget(dialect: Dialect) -> None:
    """Ask about every column again at its next use, as after a change of bindings."""
    memory = _memories.get(dialect)
    if memory is not None:
        known = (memory.held, memory.accepted, memory.bindings, memory.unbound, memory.answers)
        for each in known:
            each.clear()


def binding_for_write(
    connection: Connection, identity: ColumnIdentity, spec: EncoderSpec
) -> Binding | None:
    """The binding that a vector of this encoder may be written for; compares and seals it first.

    Costs one round trip in each transaction, since one name may mean another table in the next (a
    search path), or the same table under another binding. ``None`` where the column is not bound.
    """
    if connection.dialect.name != "postgresql":
        return None
    watch(connection.dialect)
    memory = _memories[connection.dialect]
    key = (mapped(connection, identity), spec)

    def look() -> Binding | None:
        held = None
        if memory.installed:
            known = binding_id_of(connection, identity)
            held = None if known is None else memory.bindings.get((known, spec))
        if held is None:
            held = _compare(memory, connection, identity, key)
        if held is None:
            return None
        _leave_trace(memory, connection, held.binding.id, wrote=True)
        return held.binding

    return _once(memory, connection, ("write", key), look)


def fenced(
    value: sa.BindParameter[Any],
    column: ColumnIdentity | None,
    spec: EncoderSpec,
    type_: TypeEngine[Any],
) -> sa.ColumnElement[Any]:
    """A vector that is compared with a column, or an error where the column has changed hands."""
    return value if column is None else _Fenced(value, column, spec, type_)


class Fence(NamedTuple):
    """How a statement asks once for what it needs of a column's binding, and not each parameter.

    ``rows`` is one row with ``id``, never ``NULL``, or an error where the column has changed hands;
    ``id`` is the binding's, ``NULL`` without one; ``type`` that of parameters that do not ask.
    """

    rows: sa.Subquery
    id: sa.ColumnElement[Any]
    type: TypeEngine[Any]


def fence_of(column: sa.ColumnElement[Any]) -> Fence | None:
    """The fence of an embedding column, of a table or alias; ``None`` of any other."""
    identity, type_ = identity_behind(column), getattr(column.type, "query_type", None)
    if identity is None or type_ is None:
        return None
    query: Any = type_(column)
    asked = sa.select(_Asked(*_question(identity, query.encoder)).label("id"))
    rows = asked.offset(sa.literal_column("0")).subquery("nearest_fence")
    bound = sa.func.nullif(rows.c.id, sa.literal_column(f"'{NIL}'::uuid"))
    return Fence(rows, bound, query.unfenced())


def proven(
    column: sa.ColumnElement[Any],
    companion: sa.ColumnElement[Any],
    binding_id: sa.ColumnElement[Any] | None = None,
) -> sa.ColumnElement[bool]:
    """Whether a row's companion proves its vector: true where the column is not bound.

    For the few rows that a search is about to answer. A vector that came where no trigger ran, by
    replication or with an attached partition, is not proven until a worker has seen it.
    """
    if identity_behind(column) is None:
        return sa.true()
    return _Proven(column, companion, bound(column) if binding_id is None else binding_id)


def claimed(
    column: sa.ColumnElement[Any], companion: sa.ColumnElement[Any]
) -> sa.ColumnElement[bool]:
    """Whether a row's companion holds a proof at all: true where the column is not bound.

    Costs nothing to speak of, so that it can be asked of every row that a search looks at.
    """
    return sa.true() if identity_behind(column) is None else _Claimed(companion, bound(column))


def bound(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """Identity of a column's binding, asked once a statement; ``NULL`` where it has none."""
    identity = identity_behind(column)
    if identity is None:
        return sa.null()
    name = sa.literal(identity.column, sa.Text)
    return _Bound(relation(identity.schema, identity.table), name)


def relation(schema: str | None, table: str) -> sa.ColumnElement[Any]:
    """A table as ``regclass``, by the name that the statement has for it."""
    return sa.bindparam(None, None, _RelationName(schema, table), unique=True)


# ---------------------------------------------------------------- what statements hold


class _Fenced(sa.ColumnElement[Any]):
    """Exists while a statement is compiled, so it is part of no cache key."""

    inherit_cache = False

    def __init__(
        self,
        value: sa.BindParameter[Any],
        column: ColumnIdentity,
        spec: EncoderSpec,
        type_: TypeEngine[Any],
    ) -> None:
        self.value, self.column, self.spec, self.type = value, column, spec, type_


class _Asked(FunctionElement[uuid.UUID]):
    name = "asked"
    inherit_cache = True
    type = sa.Uuid()


class _Bound(FunctionElement[uuid.UUID]):
    name = "bound"
    inherit_cache = True
    type = sa.Uuid()


class _Proven(FunctionElement[bool]):
    name = "proven"
    inherit_cache = True
    type = sa.Boolean()


class _Claimed(FunctionElement[bool]):
    name = "claimed"
    inherit_cache = True
    type = sa.Boolean()


class _With(UserDefinedType[str]):
    """A parameter without a value: with what this process was compared, a field of _Accepted."""

    cache_ok = True

    def __init__(self, column: ColumnIdentity, spec: EncoderSpec, field: str) -> None:
        self.column, self.spec, self.field = column, spec, field

    def get_col_spec(self, **_: object) -> str:
        return "UUID" if self.field == "known" else "TEXT"

    def bind_expression(self, bindvalue: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(bindvalue, self)

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], str | None]:
        key = (self.column, self.spec)

        def process(_: Any) -> str | None:
            memory = _memories.get(dialect)
            accepted = _Accepted() if memory is None else memory.accepted.get(key, _Accepted())
            value = getattr(accepted, self.field)
            return None if value is None else str(value)

        return process

    def literal_processor(self, dialect: Dialect) -> Callable[[Any], str]:
        value = self.bind_processor(dialect)
        return lambda _: "NULL" if value(None) is None else f"'{value(None)}'"


class _RelationName(UserDefinedType[object]):
    """A parameter that is written out as a table's OID, by the name that the statement knows."""

    cache_ok = True

    def __init__(self, schema: str | None, table: str) -> None:
        self.schema, self.table = schema, table

    def bind_expression(self, bindvalue: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        return _Relation(self.schema, self.table)


class _Relation(sa.ColumnElement[Any]):
    inherit_cache = False
    type = sa.types.NullType()

    def __init__(self, schema: str | None, table: str) -> None:
        # Not sa.table(), whose schema no schema_translate_map changes.
        self.table = sa.Table(table, sa.MetaData(), schema=schema)


@compiles(_Relation)
def _write_relation(element: _Relation, compiler: SQLCompiler, **_: Any) -> str:
    watch(compiler.dialect)
    # By the preparer, so that a schema_translate_map is followed here as in the statement itself.
    return f"{_QUOTE}{compiler.preparer.format_table(element.table)}{_QUOTE}::regclass"


def _aware(compiler: SQLCompiler) -> bool:
    """Whether the catalog may be there; before it is executed, that is asked."""
    watch(compiler.dialect)
    memory = _memories.get(compiler.dialect)
    _assumed[compiler] = memory is not None and memory.installed is not False
    return _assumed[compiler]


def _question(column: ColumnIdentity, spec: EncoderSpec) -> list[sa.ColumnElement[Any]]:
    """The arguments with which a statement asks for a column's binding."""
    types = [sa.Text(), *(_With(column, spec, field) for field in _Accepted._fields)]
    named = [sa.bindparam(None, column.column, type_, unique=True) for type_ in types]
    return [relation(column.schema, column.table), *named]


@compiles(_Fenced)
def _write_fenced(element: _Fenced, compiler: SQLCompiler, **options: Any) -> str:
    if not _aware(compiler):
        return compiler.process(element.value, **options)
    # Some drivers do not say of which type a parameter is, and CASE would make text of it.
    value = compiler.process(sa.cast(element.value, element.type), **options)
    options.pop("skip_bind_expression", None)
    asked = compiler.process(_Asked(*_question(element.column, element.spec)), **options)
    return f"(SELECT CASE WHEN {asked} IS NOT NULL THEN {value} END)"


@compiles(_Asked)
def _write_asked(element: _Asked, compiler: SQLCompiler, **options: Any) -> str:
    if not _aware(compiler):
        return f"'{NIL}'::uuid"
    clauses = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{_FENCE}{', '.join(clauses)})"


@compiles(_Bound)
def _write_bound(element: _Bound, compiler: SQLCompiler, **options: Any) -> str:
    if not _aware(compiler):
        return "NULL::uuid"
    clauses = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(SELECT sbert.binding_id_v1({', '.join(clauses)}))"


@compiles(_Proven)
def _write_proven(element: _Proven, compiler: SQLCompiler, **options: Any) -> str:
    if not _aware(compiler):
        return "true"
    vector, companion, known = (compiler.process(clause, **options) for clause in element.clauses)
    storage = getattr(element.clauses.clauses[0].type, "storage", "vector")
    return (
        f"sbert.proven_v1({storage}_send(subvector({vector}, 1, {PROVEN_DIMENSIONS})), "
        f"{companion}, {known})"
    )


@compiles(_Claimed)
def _write_claimed(element: _Claimed, compiler: SQLCompiler, **options: Any) -> str:
    if not _aware(compiler):
        return "true"
    companion, known = (compiler.process(clause, **options) for clause in element.clauses)
    # The first half is the proof. The catalog is asked at the first row without one, if ever.
    return f"({companion} > '00000000-0000-0000-ffff-ffffffffffff' OR {known} IS NULL)"


# ---------------------------------------------------------------- what is executed


def _before_execute(name: str, cursor: Any, statement: str, *rest: Any) -> bool:
    """Compare and prove what a statement uses; true where it was executed here."""
    context = rest[-1]
    compiled = getattr(context, "compiled", None)
    if compiled is None or context.isddl:
        return False
    memory = _memories[context.dialect]
    again, first_cursor = memory.again.get(context.root_connection, (None, None))
    if again is context.invoked_statement:
        getattr(context.dialect, name)(first_cursor, statement, *rest)
        return True
    uses = memory.uses.get(compiled)
    if uses is None:
        uses = memory.uses[compiled] = tuple(dict.fromkeys(_uses(compiled)))
    try:
        compared = list(_compared(memory, context, statement, uses))
    except SbertPgError as error:
        raise unwrapped(error) from error.__cause__
    if _is_otherwise(memory, context, compiled):
        _execute_again(memory, cursor, context, _values_of(context))
        return True
    if compared:
        getattr(context.dialect, name)(cursor, statement, *rest)
        _require_still_theirs(context, compared)
    return bool(compared)


def _is_otherwise(memory: _Memory, context: Any, compiled: Any) -> bool:
    """Whether the catalog that a statement was compiled for is not there, or the reverse."""
    assumed = _assumed.get(compiled)
    if assumed is None:
        return False
    if memory.installed is None:
        memory.installed = installed(context.root_connection)
        if not memory.installed:
            context.root_connection.engine.clear_compiled_cache()
    return assumed is not memory.installed


def _may_be_repeated(context: Any) -> bool:
    compiled = context.compiled
    writes = compiled.isinsert or compiled.isupdate or compiled.isdelete
    # Of a statement that came compiled there is nothing to compile once more.
    return not (writes or context.executemany or context.invoked_statement is None)


def _require_still_theirs(context: Any, compared: list[tuple[_Use, uuid.UUID]]) -> None:
    """Refuse what was answered by a statement that cannot ask, where a column changed hands.

    An identity never returns: what it is before and after, it was meanwhile.
    """
    for use, binding_id in compared:
        if binding_id_of(context.root_connection, use.identity) != binding_id:
            forget(context.dialect)
            raise unwrapped(
                EncoderMismatchError(
                    f"Column {use.identity} changed hands while this search began. Try once more."
                )
            )


def _values_of(context: Any) -> dict[str, Any]:
    """Values of the caller's own parameters for a statement that only reads."""
    if not _may_be_repeated(context):
        raise unwrapped(_not_repeated())
    (row,), values = context.compiled_parameters, {}
    for bind, name in context.compiled.bind_names.items():
        if name != bind.key:
            continue  # the statement has its value
        parts = context._expanded_parameters.get(name, ())
        if name in row:
            values[name] = row[name]
        elif isinstance(bind.type, sa.types.TupleType) or bind.literal_execute:
            raise unwrapped(_not_repeated())
        else:
            values[name] = [row[part] for part in parts]
    return values


def _not_repeated() -> CatalogError:
    return CatalogError(
        "This statement was made before it was known whether its database has the schema sbert, "
        "and that is otherwise. Nothing was sent; execute it once more."
    )


def _execute_again(memory: _Memory, cursor: Any, context: Any, values: dict[str, Any]) -> None:
    """Execute a statement as it reads now that this is known, on the cursor that it has."""
    connection = context.root_connection
    options = {**context.execution_options, "compiled_cache": None, "stream_results": False}
    options.pop("yield_per", None)
    memory.again[connection] = (context.invoked_statement, cursor)
    try:
        connection.execute(context.invoked_statement, values, execution_options=options).close()
    finally:
        del memory.again[connection]


def _compared(
    memory: _Memory, context: Any, statement: str, uses: tuple[_Use, ...]
) -> Iterator[tuple[_Use, uuid.UUID]]:
    """Compare what a statement uses; what it compares with and does not ask about by itself."""
    connection = context.root_connection
    for use in uses:
        if not use.stored:
            held = _check(memory, connection, use, use.fenced and _FENCE in statement)
            if held is not None:
                yield use, held.binding.id
        elif any(
            row.get(name) is not None for row in context.compiled_parameters for name in use.stored
        ):
            binding_for_write(connection, use.identity, use.spec)


def _uses(compiled: Any) -> Iterator[_Use]:
    """Columns that the parameters of a statement are compared with, or stored in."""
    writes = compiled.isinsert or compiled.isupdate
    for bind in compiled.binds.values():
        spec = getattr(bind.type, "encoder", None)
        column = getattr(bind.type, "column", None)
        if spec is not None and column is not None:
            yield _Use(column, spec, fenced=True)
        elif spec is not None and not writes:
            # A vector of the column's own type, in a function or operator of the caller's choice.
            for column in getattr(bind.type, "attached", ()):
                yield _Use(column, spec)
    if writes:
        yield from _stored(compiled)


def _stored(compiled: Any) -> Iterator[_Use]:
    table = compiled.compile_state.dml_table
    for column in getattr(table, "columns", ()):
        spec = getattr(column.type, "encoder", None)
        if spec is None:
            continue
        stored = tuple(name for name, bind in compiled.binds.items() if bind.type is column.type)
        if stored:
            yield _Use(ColumnIdentity(table.schema, table.name, column.name), spec, stored)


def _check(memory: _Memory, connection: Connection, use: _Use, fence: bool) -> Held | None:
    """Compare this process with a column, unless that was done; with what, if the statement does
    not ask.
    """
    key = (mapped(connection, use.identity), use.spec)
    name = (use.identity, use.spec)
    held = memory.held.get(key)
    if held is not None and fence and memory.accepted.get(name) == _accepted(held):
        _leave_trace(memory, connection, held.binding.id, wrote=False)
        return None

    def look() -> Held | None:
        if held is None and time.monotonic() - memory.unbound.get(key, -1e9) < UNBOUND_RECHECK:
            return None
        return _compare(memory, connection, use.identity, key)

    held = _once(memory, connection, ("read", key), look)
    if held is not None:
        _leave_trace(memory, connection, held.binding.id, wrote=False)
        memory.accepted[name] = _accepted(held) if held.final else _Accepted()
    elif not memory.accepted.get(name, _Accepted()).fingerprint:
        # It may be bound the next moment, so the statement asks with what this process has.
        encoder = find_encoder(use.spec)
        memory.accepted[name] = _Accepted("" if encoder is None else fingerprint_of(encoder))
    return held


def _accepted(held: Held) -> _Accepted:
    """With what a statement asks for what this process was compared with."""
    return _Accepted(held.fingerprint or held.binding.fingerprint, held.binding.id)


def _compare(
    memory: _Memory, connection: Connection, identity: ColumnIdentity, key: _Key
) -> Held | None:
    # By the statement's own name: a map may translate that of the key once more.
    held = hold(connection, identity, key[1])
    if not memory.installed and (held is not None or installed(connection)):
        if memory.installed is False:
            # What was compiled since then has no fence.
            connection.engine.clear_compiled_cache()
        memory.installed = True
    if held is None:
        memory.unbound[key] = time.monotonic()
        return None
    memory.unbound.pop(key, None)
    if held.final:
        memory.held[key] = held
        memory.bindings[held.binding.id, key[1]] = held
    return held


def _once(
    memory: _Memory, connection: Connection, key: object, look: Callable[[], _Value]
) -> _Value:
    """An answer that holds for one transaction, or for the innermost savepoint."""
    both = (connection.get_transaction(), connection.get_nested_transaction())
    scopes = [scope for scope in both if scope is not None]
    for scope in scopes:
        answers: dict[object, _Value] = memory.answers.get(scope, {})
        if key in answers:
            return answers[key]
    answer = look()
    if scopes:
        memory.answers.setdefault(scopes[-1], {})[key] = answer
    return answer


def _leave_trace(
    memory: _Memory, connection: Connection, binding_id: uuid.UUID, *, wrote: bool
) -> None:
    """Leave word of a use, so that a column that is being replaced is not taken from under it."""
    now = time.monotonic()
    if now - memory.traced.get((binding_id, wrote), -1e9) < TRACE_EVERY:
        return
    memory.traced[binding_id, wrote] = now
    connection.execute(sa.select(sa.func.sbert.saw_v1(binding_id, wrote)))


def _on_error(context: Any) -> None:
    """Forget what has changed, and raise the library's own error where it has one."""
    error, statement = context.original_exception, context.statement or ""
    ours = {
        _MISMATCH: True,
        # Not of an application's table whose name has the word in it: no grant of ours helps there.
        INSUFFICIENT_PRIVILEGE: _FENCE in statement and _OURS.search(words_of(error)) is not None,
        # A search tried rows of what is no table.
        FEATURE_NOT_SUPPORTED: "TABLESAMPLE" in statement,
        UNDEFINED_OBJECT: _LANGUAGE in statement,
    }
    if not ours.get(sqlstate_of(error) or ""):
        return
    forget(context.dialect)
    error = as_error(context.sqlalchemy_exception)
    if error is not None:
        raise error from context.original_exception
