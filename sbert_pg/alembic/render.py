"""How operations and types are written into a migration: plain, importable, and complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import render_op
from sqlalchemy.sql.elements import conv

from sbert_pg.alembic import index_ops, ops
from sbert_pg.alembic.declaration import Declaration, IndexDefinition
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.vector import VectorType

_IMPORT_SPEC = "from sbert_pg.spec import EncoderSpec"
_IMPORT_SOURCE = "from sbert_pg.source import Source"
_IMPORT_TYPES = "from sbert_pg.types import {}"

#: Fields whose default a migration writes out nevertheless.
_ALWAYS = frozenset({"similarity"})


def render_type(type_: VectorType, context: AutogenContext) -> str:
    """A vector type, an embedding column's included, as what the database stores."""
    name = "Vector" if type_.storage == "vector" else "HalfVector"
    context.imports.add(_IMPORT_TYPES.format(name))
    return f"{name}({'' if type_.dimensions is None else type_.dimensions})"


def with_vector_types(
    render_item: Callable[..., Any] | None,
) -> Callable[[str, Any, AutogenContext], Any]:
    """An ``env.py``'s ``render_item``, or none, that knows vector types as well."""

    def render(kind: str, item: Any, context: AutogenContext) -> Any:
        if render_item is not None:
            rendered = render_item(kind, item, context)
            if rendered is not False:
                return rendered
        if kind == "type" and isinstance(item, VectorType):
            return render_type(item, context)
        return False

    return render


class Call:
    """A call of an operation, argument by argument."""

    def __init__(self, context: AutogenContext, name: str) -> None:
        self.context = context
        self.name = f"{context.opts.get('alembic_module_prefix') or ''}{name}"
        self.arguments: list[str] = []

    def add(self, *values: Any) -> Call:
        """Positional arguments."""
        self.arguments += [repr(_plain(value)) for value in values]
        return self

    def code(self, code: str) -> Call:
        """A positional argument that is code."""
        self.arguments.append(code)
        return self

    def keyword(self, name: str, value: Any, default: Any = None) -> Call:
        """A keyword argument, left out where it is the default."""
        if value != default:
            self.arguments.append(f"{name}={_plain(value)!r}")
        return self

    def __str__(self) -> str:
        line = f"{self.name}({', '.join(self.arguments)})"
        if len(line) <= 88:
            return line
        inner = "".join(f"    {argument},\n" for argument in self.arguments)
        return f"{self.name}(\n{inner})"


def _plain(value: Any) -> Any:
    """Names are subclasses of ``str`` with a representation of their own."""
    return str(value) if isinstance(value, str) else value


def declaration(call: Call, declared: Declaration) -> None:
    """Encoder, source and storage as keyword arguments."""
    spec, source = declared.encoder, declared.source
    short = _short(spec)
    if short:
        call.keyword("encoder", spec.name)
        call.keyword("dimensions", spec.dimensions)
        call.keyword("similarity", spec.similarity)
    else:
        call.context.imports.add(_IMPORT_SPEC)
        call.arguments.append(f"encoder={_spec(spec)}")
    if source.pattern is not None:
        call.context.imports.add(_IMPORT_SOURCE)
        call.arguments.append(f"source=Source.template({source.pattern!r})")
        return
    names = list(source.columns)
    call.keyword("source", names[0] if len(names) == 1 else names)
    call.keyword("separator", source.separator, "\n\n")


def _short(spec: EncoderSpec) -> bool:
    """Whether name, dimensions and similarity say all that is known."""
    return spec == EncoderSpec.of(spec.name, dimensions=spec.dimensions, similarity=spec.similarity)


def _spec(spec: EncoderSpec) -> str:
    given = [
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in fields(spec)
        if field.name in _ALWAYS
        or field.default is MISSING
        or getattr(spec, field.name) != field.default
    ]
    return f"EncoderSpec({', '.join(given)})"


def _add(context: AutogenContext, op: ops.AddEmbeddingColumnOp) -> str:
    call = Call(context, op.name).add(op.table_name, op.column_name)
    call.keyword("replaces", op.declaration.replaces)
    declaration(call, op.declaration)
    call.keyword("storage", op.declaration.storage, "vector")
    call.keyword("mark_pending", op.mark_pending, False)
    return str(call.keyword("schema", op.schema))


def _bind(context: AutogenContext, op: ops.BindEmbeddingColumnOp) -> str:
    call = Call(context, op.name).add(op.table_name, op.column_name)
    declaration(call, op.declaration)
    call.keyword("replaces", op.declaration.replaces)
    call.keyword("mark_pending", op.mark_pending, False)
    call.keyword("trust_vectors", op.trust_vectors, False)
    call.keyword("concurrently", op.concurrently, False)
    return str(call.keyword("schema", op.schema))


def _on_column(name: str) -> Callable[[AutogenContext, ops.ColumnOperation], str]:
    def render(context: AutogenContext, op: ops.ColumnOperation) -> str:
        call = Call(context, name).add(op.table_name, op.column_name)
        return str(call.keyword("schema", op.schema))

    return render


def _finish(context: AutogenContext, op: ops.FinishReplacementOp) -> str:
    call = Call(context, "finish_replacement").add(op.table_name, op.column_name)
    call.keyword("force", op.force, False).keyword("quiet", op.quiet, 300.0)
    return str(call.keyword("schema", op.schema))


def _resume(context: AutogenContext, op: ops.ResumeReplacementOp) -> str:
    call = Call(context, "resume_replacement").add(op.table_name, op.column_name)
    return str(call.keyword("replaces", op.replaces).keyword("schema", op.schema))


def _rebind(context: AutogenContext, op: ops.RebindEmbeddingColumnOp) -> str:
    call = Call(context, "rebind_embedding_column").add(op.table_name, op.column_name)
    call.keyword("encoder", op.encoder.name).keyword("dimensions", op.encoder.dimensions)
    return str(call.keyword("schema", op.schema))


def _require(context: AutogenContext, op: ops.RequireBackfillOp) -> str:
    call = Call(context, "require_backfill").add(op.table_name, op.column_name)
    call.keyword("max_missing", op.max_missing, 0)
    return str(call.keyword("schema", op.schema))


def _create_index(context: AutogenContext, op: index_ops.CreateVectorIndexOp) -> str:
    definition = op.definition
    call = _index_call(context, "create_vector_index", op)
    if definition.expression is None:
        call.add(definition.column)
    else:
        prefix = context.opts.get("sqlalchemy_module_prefix") or ""
        call.code(f"{prefix}text({definition.expression!r})")
    call.keyword("using", definition.using)
    call.keyword("opclass", definition.opclass)
    options = {key: _number(value) for key, value in definition.options.items()}
    call.keyword("options", options, {})
    call.keyword("where", definition.where)
    call.keyword("tablespace", definition.tablespace)
    call.keyword("replace", op.replace_existing, False)
    call.keyword("maintenance_work_mem", op.maintenance_work_mem)
    call.keyword("concurrently", op.concurrently, True)
    call.keyword("lock_timeout", op.lock_timeout, index_ops.INDEX_LOCK_TIMEOUT)
    return str(call.keyword("schema", definition.schema))


def _drop_index(context: AutogenContext, op: index_ops.DropVectorIndexOp) -> str:
    call = _index_call(context, "drop_vector_index", op)
    call.keyword("concurrently", op.concurrently, True)
    call.keyword("lock_timeout", op.lock_timeout, index_ops.INDEX_LOCK_TIMEOUT)
    return str(call.keyword("schema", op.definition.schema))


def _index_call(context: AutogenContext, name: str, op: index_ops.IndexOperation) -> Call:
    definition: IndexDefinition = op.definition
    call = Call(context, name)
    prefix = context.opts.get("alembic_module_prefix") or ""
    if isinstance(op.name, conv):
        call.code(f"{prefix}f({str(op.name)!r})")
    else:
        call.add(definition.name)
    return call.add(definition.table)


def _number(value: str) -> Any:
    return int(value) if value.isdigit() else value


def _schema(name: str) -> Callable[[AutogenContext, Any], str]:
    def render(context: AutogenContext, op: Any) -> str:
        return str(Call(context, name).add(op.revision))

    return render


def _sequence(context: AutogenContext, op: ops.SequenceOp) -> list[str]:
    return [line for inner in op.ops for line in render_op(context, inner)]


def _rename(context: AutogenContext, op: ops.FollowRenameOp) -> str:
    call = Call(context, "follow_rename").add(op.table_name, op.column_name, op.new_name)
    return str(call.keyword("schema", op.schema))


def _unbind(context: AutogenContext, op: ops.UnbindEmbeddingColumnOp) -> str:
    call = Call(context, "unbind_embedding_column").add(op.table_name, op.column_name)
    call.keyword("concurrently", op.concurrently, False)
    return str(call.keyword("schema", op.schema))


def _nothing(context: AutogenContext, op: ops.NothingOp) -> list[str]:
    return []


#: Operation and how it is written.
RENDERERS: tuple[tuple[type[ops.SbertOperation], Callable[..., Any]], ...] = (
    (ops.NothingOp, _nothing),
    (ops.SequenceOp, _sequence),
    (ops.UpgradeSchemaOp, _schema("upgrade_sbert_schema")),
    (ops.DowngradeSchemaOp, _schema("downgrade_sbert_schema")),
    (ops.AddEmbeddingColumnOp, _add),
    (ops.BeginReplacementOp, _add),
    (ops.DropEmbeddingColumnOp, _on_column("drop_embedding_column")),
    (ops.FinishReplacementOp, _finish),
    (ops.ResumeReplacementOp, _resume),
    (ops.BindEmbeddingColumnOp, _bind),
    (ops.UnbindEmbeddingColumnOp, _unbind),
    (ops.FollowRenameOp, _rename),
    (ops.RebindEmbeddingColumnOp, _rebind),
    (ops.RequireBackfillOp, _require),
    (ops.BackfillEmbeddingsOp, _on_column("backfill_embeddings")),
    (index_ops.CreateVectorIndexOp, _create_index),
    (index_ops.DropVectorIndexOp, _drop_index),
)

__all__ = ["RENDERERS", "render_type", "with_vector_types"]
