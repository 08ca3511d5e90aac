"""Each operation: its inverse, its difference, what is written of it, and its script."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import render_op_text
from alembic.migration import MigrationContext
from alembic.operations import BatchOperations, Operations
from alembic.operations.ops import MigrateOperation
from alembic.util import CommandError
from sqlalchemy.sql.elements import conv

from sbert_pg import alembic as plugin
from sbert_pg.alembic import ops
from sbert_pg.alembic.indexes import CreateVectorIndexOp, DropVectorIndexOp
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import DeclarationError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.indexed import VectorIndex

plugin.register()

PLAIN = Embedding("deterministic", ["title", "body"], dimensions=64, separator=" - ")
KNOWN = Embedding("all-MiniLM-L6-v2", "title")
FULL = Embedding(
    EncoderSpec(
        name='it\'s "special"',
        dimensions=64,
        pooling="cls",
        similarity="dot",
        prompts=(("document", "100% "),),
    ),
    Source.template("Title: {title}\n{body}"),
    storage="halfvec",
    replaces="old",
)
INDEX = VectorIndex(
    name="ix_e",
    table="article",
    schema="shop",
    column="e",
    opclass="vector_cosine_ops",
    options={"m": 8, "ef_construction": 32},
    predicate="lang LIKE 'e%'",
)
EXPRESSION = VectorIndex(
    name="ix_e",
    table="article",
    column="",
    element="(e::halfvec(64))",
    form="halfvec",
    opclass="halfvec_cosine_ops",
)
IVF = VectorIndex(name="ix_e", table="article", column="e", method="ivfflat", options={"lists": 10})
ADDED = ops.AddEmbeddingColumnOp.of("article", "e", PLAIN, schema="shop")

OPERATIONS: dict[str, Any] = {
    "upgrade schema": ops.UpgradeSchemaOp("0001"),
    "downgrade schema": ops.DowngradeSchemaOp("base", following="0001"),
    "add": ADDED,
    "add known": ops.AddEmbeddingColumnOp.of("article", "e", KNOWN),
    "add in full": ops.BeginReembeddingOp.of("Article", "E e", FULL),
    "abort": ops.AbortReembeddingOp("article", "e", schema="shop"),
    "drop": ops.DropEmbeddingColumnOp("article", "e", schema="shop", added=ADDED),
    "finish": ops.FinishReembeddingOp(
        "article", "e", force=True, quiet=5.0, added=ADDED, replacement="f"
    ),
    "resume": ops.ResumeReembeddingOp("article", "f", replaces="e", schema="shop"),
    "bind": ops.BindEmbeddingColumnOp.of("article", "e", PLAIN, schema="shop", concurrently=True),
    "bind discarding": ops.BindEmbeddingColumnOp.of("article", "e", KNOWN, discard_vectors=True),
    "unbind": ops.UnbindEmbeddingColumnOp(
        "article", "e", bound=ops.BindEmbeddingColumnOp.of("article", "e", PLAIN), concurrently=True
    ),
    "rebind": ops.RebindEmbeddingColumnOp(
        "article", "e", encoder=EncoderSpec(name="alike", dimensions=64), schema="shop"
    ),
    "rename": ops.RenameBoundColumnOp("article", "title", "head line", schema="shop"),
    "require": ops.RequireBackfillOp("article", "e", max_missing=10, schema="shop"),
    "backfill": ops.BackfillEmbeddingsOp("article", "e", schema="shop"),
    "create index": CreateVectorIndexOp.of(INDEX, name=conv("ix_e"), lock_timeout=5.0),
    "create expression": CreateVectorIndexOp.of(EXPRESSION, concurrently=False),
    "replace index": CreateVectorIndexOp.of(IVF, existing=EXPRESSION, maintenance_work_mem="1GB"),
    "drop index": DropVectorIndexOp.of(INDEX, concurrently=False),
}


def test_there_is_one_of_every_kind() -> None:
    kinds = {type(operation) for operation in OPERATIONS.values()}
    assert kinds == set(ops.OPERATIONS.values())


def autogen() -> AutogenContext:
    context = MigrationContext.configure(dialect_name="postgresql")
    options = {
        "sqlalchemy_module_prefix": "sa.",
        "alembic_module_prefix": "op.",
        "render_as_batch": False,
        "user_module_prefix": None,
    }
    return AutogenContext(context, sa.MetaData(), opts=options)


def written_and_read(operation: MigrateOperation) -> list[Any]:
    """The operations that a migration calls in which this one was written."""
    context = autogen()
    text = render_op_text(context, operation)
    read: list[Any] = []
    operations = Operations(MigrationContext.configure(dialect_name="postgresql"))
    operations.invoke = read.append  # type: ignore[method-assign]
    namespace: dict[str, Any] = {"op": operations, "sa": sa}
    exec("\n".join(context.imports), namespace)
    exec(text, namespace)
    assert max((len(line) for line in text.splitlines()), default=0) < 250
    return read


def facts(operation: Any) -> dict[str, Any]:
    """What an operation does, without what only its inverse needs."""
    arguments = ops.arguments_of(type(operation))
    said = {key: value for key, value in vars(operation).items() if key in arguments}
    if isinstance(operation, CreateVectorIndexOp):
        # Expressions are equal by what they say.
        said["element"] = operation.definition
    return said


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_written_does_the_same(name: str) -> None:
    operation = OPERATIONS[name]
    (read,) = written_and_read(operation)
    assert type(read) is type(operation)
    assert facts(read) == facts(operation)


#: The kind of the inverse, where that inverts to the operation again.
INVERSES: dict[str, type[MigrateOperation]] = {
    "upgrade schema": ops.DowngradeSchemaOp,
    "downgrade schema": ops.UpgradeSchemaOp,
    "add": ops.DropEmbeddingColumnOp,
    "add known": ops.DropEmbeddingColumnOp,
    "add in full": ops.AbortReembeddingOp,
    "drop": ops.AddEmbeddingColumnOp,
    "bind": ops.UnbindEmbeddingColumnOp,
    "bind discarding": ops.UnbindEmbeddingColumnOp,
    "unbind": ops.BindEmbeddingColumnOp,
    "rename": ops.RenameBoundColumnOp,
    "create index": DropVectorIndexOp,
    "create expression": DropVectorIndexOp,
    "replace index": CreateVectorIndexOp,
    "drop index": CreateVectorIndexOp,
}


@pytest.mark.parametrize("name", INVERSES)
def test_inverse(name: str) -> None:
    operation = OPERATIONS[name]
    inverse = operation.reverse()
    assert type(inverse) is INVERSES[name]
    again = inverse.reverse()
    assert type(again) is type(operation)
    if name not in ("drop", "unbind", "replace index", "drop index"):
        assert facts(again) == facts(operation)
    assert again.to_diff_tuple() == operation.to_diff_tuple()


def test_inverse_of_a_replaced_index_is_the_one_before() -> None:
    inverse = OPERATIONS["replace index"].reverse()
    assert inverse.definition == EXPRESSION
    assert inverse.replace


def test_inverse_of_contract_goes_on_with_the_change() -> None:
    inverse = OPERATIONS["finish"].reverse()
    assert [type(op) for op in written_and_read(inverse)] == [
        ops.AddEmbeddingColumnOp,
        ops.ResumeReembeddingOp,
    ]


@pytest.mark.parametrize("name", ["rebind", "require", "backfill", "resume"])
def test_nothing_to_invert(name: str) -> None:
    inverse = OPERATIONS[name].reverse()
    assert isinstance(inverse, ops.NothingOp)
    assert written_and_read(inverse) == []
    assert inverse.reverse() is inverse


@pytest.mark.parametrize(
    "operation",
    [
        ops.AbortReembeddingOp("article", "e"),
        ops.DropEmbeddingColumnOp("article", "e"),
        ops.UnbindEmbeddingColumnOp("article", "e"),
        DropVectorIndexOp("ix_e", "article"),
    ],
    ids=lambda operation: type(operation).__name__,
)
def test_what_was_forgotten_cannot_be_brought_back(operation: Any) -> None:
    with pytest.raises(DeclarationError, match="by hand"):
        operation.reverse()


@pytest.mark.parametrize("name", OPERATIONS)
def test_difference_names_the_operation_and_its_place(name: str) -> None:
    difference = OPERATIONS[name].to_diff_tuple()
    assert isinstance(difference, tuple)
    known = set(ops.OPERATIONS) | {"replace_vector_index"}
    assert difference[0] in known
    assert hash(difference) is not None
    if "schema" not in name:
        assert "article" in difference or "Article" in difference


def script(operation: Any) -> str:
    """As in an environment that says nothing of parameters, like Flask-Migrate's."""
    buffer = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": buffer}
    )
    with context.begin_transaction(), Operations.context(context) as operations:
        operations.invoke(operation)
    return buffer.getvalue()


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"rebind"}))
def test_script(name: str) -> None:
    text = script(OPERATIONS[name])
    assert "%%" not in text
    assert ";" in text or text.strip().splitlines()[1].startswith("--")
    if getattr(OPERATIONS[name], "online", False) and name != "backfill":
        # What came before is committed first.
        assert text.index("COMMIT;") < text.rindex("BEGIN;")


def test_script_of_a_partial_index_runs(engine: sa.Engine) -> None:
    """A percent sign is one, in a script and online."""
    raw = engine.raw_connection()
    connection: Any = raw.driver_connection
    connection.autocommit = True
    connection.execute("CREATE SCHEMA shop")
    connection.execute("CREATE TABLE shop.article (id int PRIMARY KEY, e vector(64), lang text)")
    text = script(OPERATIONS["create index"])
    for statement in text.split(";\n\n"):
        connection.execute(statement.encode(), prepare=False)
    shown = connection.execute("SELECT pg_get_indexdef('shop.ix_e'::regclass)").fetchone()[0]
    assert "'e%'" in shown
    connection.execute("DROP INDEX shop.ix_e")
    raw.close()
    with engine.connect() as made:
        context = MigrationContext.configure(made)
        with context.begin_transaction(), Operations.context(context) as operations:
            operations.invoke(OPERATIONS["create index"])
    with engine.connect() as made:
        online = made.exec_driver_sql("SELECT pg_get_indexdef('shop.ix_e'::regclass)").scalar()
    assert online == shown


def test_rebinding_needs_the_database() -> None:
    with pytest.raises(CommandError, match="database"):
        script(OPERATIONS["rebind"])


def test_wrong_arguments_are_refused_by_name() -> None:
    operations: Any = Operations(MigrationContext.configure(dialect_name="postgresql"))
    with pytest.raises(DeclarationError, match=r"op.bind_embedding_column\(\).*'trust_vectors'"):
        operations.bind_embedding_column(
            "article", "e", encoder="m", source="title", dimensions=3, trust_vectors=True
        )


def test_batch_is_left_alone() -> None:
    assert not [name for name in ops.OPERATIONS if hasattr(BatchOperations, name)]


def test_page_names_every_operation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migrations.md").read_text()
    section = page.split("## The operations")[1].split("\n## ")[0]
    assert [name for name in ops.OPERATIONS if name not in section] == []
