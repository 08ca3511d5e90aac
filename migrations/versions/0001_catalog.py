"""The catalog: encoders, bindings, marks, and the functions that triggers and migrations call."""

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql as pg

from sbert_pg.sql import load

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "sbert"

#: In the order of their use of one another; each with its signature.
FUNCTIONS = {
    "key_expression_v1": "regclass, text[], text",
    "key_columns_v1": "regclass",
    "refuse_v1": "integer",
    "remove_triggers_v1": "integer",
    "install_triggers_v1": "integer",
    "mark_pending_v1": "integer, boolean",
    "mark_all_pending_v1": "integer",
    "forget_v1": "integer",
    "prune_v1": "",
    "require_bindable_v1": "regclass, text, jsonb, text[]",
    "bind_v1": "regclass, text, jsonb, jsonb, text, boolean",
    "unbind_v1": "regclass, text",
    "rename_v1": "regclass, text, text",
    "seal_v1": "integer, text, jsonb, bytea",
    "add_compatible_v1": "integer, text, jsonb, jsonb",
    "attest_v1": "regclass, text, text",
    "keep_binding_v1": "",
    "keep_encoder_v1": "",
    "grant_v1": "text, text",
}


def upgrade(op: Operations) -> None:
    create_tables(op)
    create_pending(op)
    for name, signature in FUNCTIONS.items():
        op.execute(statement(load(name)))
        op.execute(f"REVOKE ALL ON FUNCTION {SCHEMA}.{name}({signature}) FROM PUBLIC")
    op.execute(
        "CREATE TRIGGER keep BEFORE UPDATE OR DELETE ON sbert.embedding_column "
        "FOR EACH ROW EXECUTE FUNCTION sbert.keep_binding_v1()"
    )
    op.execute(
        "CREATE TRIGGER keep BEFORE UPDATE ON sbert.encoder "
        "FOR EACH ROW EXECUTE FUNCTION sbert.keep_encoder_v1()"
    )
    op.execute(statement(load("status")))


def downgrade(op: Operations) -> None:
    # The triggers on the application's tables go first; the columns and their vectors stay.
    op.execute(
        "DO $body$ DECLARE v_id integer; BEGIN "
        "FOR v_id IN SELECT id FROM sbert.embedding_column LOOP "
        "PERFORM sbert.forget_v1(v_id); END LOOP; END $body$"
    )
    op.execute("DROP VIEW sbert.status")
    op.execute("DROP TRIGGER keep ON sbert.encoder")
    op.execute("DROP TRIGGER keep ON sbert.embedding_column")
    for name, signature in reversed(FUNCTIONS.items()):
        op.execute(f"DROP FUNCTION {SCHEMA}.{name}({signature})")
    for table in (
        "vector_cache",
        "backfill",
        "pending",
        "compatible_encoder",
        "embedding_column",
        "encoder",
    ):
        op.drop_table(table, schema=SCHEMA)
    op.execute("DROP SEQUENCE sbert.pending_version")


def statement(sql: str) -> sa.TextClause:
    """A statement in which a colon is a colon."""
    return sa.text(sql.strip().replace(":", r"\:"))


def now() -> sa.TextClause:
    return sa.text("now()")


def create_tables(op: Operations) -> None:
    op.create_table(
        "encoder",
        sa.Column("id", sa.Integer, sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("revision", sa.Text),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("dimensions", sa.Integer, nullable=False),
        sa.Column("similarity", sa.Text, nullable=False),
        sa.Column("spec", pg.JSONB, nullable=False),
        sa.Column("probes", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=now()),
        sa.PrimaryKeyConstraint("id", name="encoder_pkey"),
        sa.UniqueConstraint("fingerprint", name="encoder_fingerprint_key"),
        schema=SCHEMA,
    )
    op.create_table(
        "embedding_column",
        sa.Column("id", sa.Integer, sa.Identity(always=True), nullable=False),
        sa.Column("relation", pg.REGCLASS, nullable=False),
        sa.Column("column_name", sa.Text, nullable=False),
        sa.Column("encoder_name", sa.Text, nullable=False),
        sa.Column("dimensions", sa.Integer, nullable=False),
        sa.Column("declared", pg.JSONB, nullable=False),
        sa.Column("encoder_id", sa.Integer),
        sa.Column("source", pg.JSONB, nullable=False),
        sa.Column("source_columns", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("key_columns", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("storage", sa.Text, nullable=False),
        sa.Column("replaces_id", sa.Integer),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=now()),
        sa.Column("sealed_at", sa.DateTime(timezone=True)),
        sa.Column("last_audit", pg.JSONB),
        sa.PrimaryKeyConstraint("id", name="embedding_column_pkey"),
        sa.UniqueConstraint(
            "relation", "column_name", name="embedding_column_relation_column_name_key"
        ),
        sa.ForeignKeyConstraint(
            ["encoder_id"], ["sbert.encoder.id"], name="embedding_column_encoder_id_fkey"
        ),
        sa.ForeignKeyConstraint(
            ["replaces_id"], ["sbert.embedding_column.id"], name="embedding_column_replaces_id_fkey"
        ),
        sa.CheckConstraint(
            "storage IN ('vector', 'halfvec')", name="embedding_column_storage_check"
        ),
        sa.CheckConstraint(
            "state IN ('filling', 'active', 'replaced')", name="embedding_column_state_check"
        ),
        schema=SCHEMA,
    )
    op.create_table(
        "compatible_encoder",
        sa.Column("column_id", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("spec", pg.JSONB, nullable=False),
        sa.Column("agreement", pg.JSONB, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=now()),
        sa.PrimaryKeyConstraint("column_id", "fingerprint", name="compatible_encoder_pkey"),
        sa.ForeignKeyConstraint(
            ["column_id"],
            ["sbert.embedding_column.id"],
            name="compatible_encoder_column_id_fkey",
            ondelete="CASCADE",
        ),
        schema=SCHEMA,
    )
    op.create_table(
        "vector_cache",
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=False, server_default=now()),
        sa.PrimaryKeyConstraint("fingerprint", "digest", name="vector_cache_pkey"),
        schema=SCHEMA,
    )
    op.create_index("vector_cache_used_at_idx", "vector_cache", ["used_at"], schema=SCHEMA)


def create_pending(op: Operations) -> None:
    op.execute("CREATE SEQUENCE sbert.pending_version AS bigint")
    op.create_table(
        "pending",
        sa.Column("column_id", sa.Integer, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column(
            "version",
            sa.BigInteger,
            nullable=False,
            server_default=statement("nextval('sbert.pending_version'::regclass)"),
        ),
        sa.Column("marked_at", sa.DateTime(timezone=True), nullable=False, server_default=now()),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.Column("claimed_by", sa.Text),
        sa.Column("attempts", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("failed", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("skipped", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("column_id", "key", name="pending_pkey"),
        schema=SCHEMA,
    )
    # A queue: rows come, are leased in place and go. Room on the page for the lease, and frequent
    # vacuuming, keep its scans short.
    op.execute(
        "ALTER TABLE sbert.pending SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, "
        "autovacuum_vacuum_threshold = 1000)"
    )
    op.create_index(
        "pending_order_idx",
        "pending",
        ["column_id", "marked_at"],
        schema=SCHEMA,
        postgresql_where=sa.text("NOT failed"),
    )
    op.create_index(
        "pending_failed_idx",
        "pending",
        ["column_id", "key"],
        schema=SCHEMA,
        postgresql_where=sa.text("failed"),
    )
    op.create_table(
        "backfill",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("column_id", sa.Integer, nullable=False),
        sa.Column("lower", sa.Text),
        sa.Column("upper", sa.Text),
        sa.Column("position", sa.Text),
        sa.Column("state", sa.Text, nullable=False, server_default=sa.text("'open'")),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.Column("claimed_by", sa.Text),
        sa.Column("rows", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=now()),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="backfill_pkey"),
        sa.ForeignKeyConstraint(
            ["column_id"],
            ["sbert.embedding_column.id"],
            name="backfill_column_id_fkey",
            ondelete="CASCADE",
        ),
        sa.CheckConstraint("state IN ('open', 'done')", name="backfill_state_check"),
        schema=SCHEMA,
    )
    op.create_index("backfill_column_id_idx", "backfill", ["column_id"], schema=SCHEMA)
