"""The catalog: encoders, bindings, leases, failures, and the functions that migrations call."""

from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql as pg

from sbert_pg.sql import load

revision = "0001_6b0705a0"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "sbert"

#: In the order of their use of one another.
FUNCTIONS = (
    "base_type_v1",
    "companion_v1",
    "caller_v1",
    "name_v1",
    "may_v1",
    "vector_type_v1",
    "is_of_v1",
    "require_owner_v1",
    "require_seen_v1",
    "require_writer_v1",
    "key_columns_v1",
    "text_sql_v1",
    "proof_of_sql_v1",
    "proof_sql_v1",
    "proven_sql_v1",
    "of_sql_v1",
    "passage_sql_v1",
    "expressions_v1",
    "queue_name_v1",
    "queue_ddl_v1",
    "queue_columns_v1",
    "refuse_v1",
    "disown_v1",
    "wake_v1",
    "triggers_v1",
    "drop_strays_v1",
    "lacks_default_v1",
    "set_companion_v1",
    "set_triggers_v1",
    "require_bindable_v1",
    "require_same_v1",
    "require_free_name_v1",
    "renamed_source_v1",
    "rename_v1",
    "follow_rename_v1",
    "prune_v1",
    "forget_v1",
    "record_v1",
    "bind_v1",
    "unbind_v1",
    "binding_id_v1",
    "require_unswapped_v1",
    "fence_v1",
    "proof_v1",
    "proven_v1",
    "seal_v1",
    "add_compatible_v1",
    "note_v1",
    "set_state_v1",
    "end_replacement_v1",
    "resume_v1",
    "require_filled_v1",
    "saw_v1",
    "is_another_v1",
    "trigger_problems_v1",
    "faults_v1",
    "health_v1",
    "keep_binding_v1",
    "keep_trace_v1",
    "last_read_v1",
    "keep_encoder_v1",
    "bm25_v1",
    "asked_v1",
    "known_v1",
    "ask_v1",
    "embed",
    "grant_v1",
)
TABLES = (
    "vector_cache",
    "question",
    "reader",
    "failure",
    "claim",
    "compatible_encoder",
    "binding",
    "encoder",
)
#: Which rows of a table a role sees and, where it may write the table at all, writes: those of
#: bindings of tables that it may read, and write. The owner of the schema sees all.
READABLE = "binding_id IN (SELECT id FROM sbert.binding)"
#: Keys, texts in messages and questions are rows of the table: for who may read them all.
ROWS = (
    "binding_id IN (SELECT id FROM sbert.binding WHERE NOT row_security_active(relation) "
    "AND sbert.may_v1(current_user, relation, key_columns || source_columns, 'SELECT'))"
)
WORKED = (
    "binding_id IN (SELECT id FROM sbert.binding WHERE NOT row_security_active(relation) "
    "AND sbert.may_v1(current_user, relation, key_columns || source_columns, 'SELECT') "
    "AND sbert.may_v1(current_user, relation, ARRAY[column_name], 'UPDATE'))"
)
POLICIES = {
    "encoder": ("SELECT", "id IN (SELECT encoder_id FROM sbert.binding)"),
    "binding": ("SELECT", "has_any_column_privilege(relation, 'SELECT, INSERT, UPDATE')"),
    "compatible_encoder": ("SELECT", READABLE),
    "reader": ("SELECT", READABLE),
    "claim": ("SELECT", ROWS, "ALL", WORKED),
    "failure": ("SELECT", ROWS, "ALL", WORKED),
    "vector_cache": ("ALL", "role = CURRENT_USER"),
    "question": ("ALL", WORKED),
}


def upgrade(op: Operations) -> None:
    create_bindings(op)
    create_upkeep(op)
    for name in FUNCTIONS:
        op.execute(statement(load(name)))
    for table, function in (("binding", "keep_binding_v1"), ("encoder", "keep_encoder_v1")):
        op.execute(
            f"CREATE TRIGGER keep BEFORE UPDATE ON {SCHEMA}.{table} "
            f"FOR EACH ROW EXECUTE FUNCTION {SCHEMA}.{function}()"
        )
    op.execute(
        f"CREATE TRIGGER trace AFTER INSERT OR DELETE ON {SCHEMA}.binding "
        f"FOR EACH ROW EXECUTE FUNCTION {SCHEMA}.keep_trace_v1()"
    )
    op.execute(statement(load("status")))
    op.execute(f"REVOKE ALL ON ALL ROUTINES IN SCHEMA {SCHEMA} FROM PUBLIC")
    for table, policies in POLICIES.items():
        op.execute(f"ALTER TABLE {SCHEMA}.{table} ENABLE ROW LEVEL SECURITY")
        for command, condition in zip(policies[::2], policies[1::2], strict=True):
            op.execute(
                f"CREATE POLICY own_{command.lower()} ON {SCHEMA}.{table} "
                f"FOR {command} USING ({condition})"
            )


def downgrade(op: Operations) -> None:
    # The triggers and indexes on the application's tables go first; columns and vectors stay.
    op.execute(
        "DO $body$ DECLARE v record; BEGIN "
        "FOR v IN SELECT b.relation, b.column_name FROM sbert.binding b "
        "JOIN pg_class k ON k.oid = b.relation LOOP "
        "PERFORM sbert.unbind_v1(v.relation, v.column_name); END LOOP; END $body$"
    )
    op.execute(f"DROP VIEW {SCHEMA}.status")
    for table in ("binding", "encoder"):
        op.execute(f"DROP TRIGGER keep ON {SCHEMA}.{table}")
    op.execute("DELETE FROM sbert.binding")  # of tables that were dropped, with their traces
    op.execute(f"DROP TRIGGER trace ON {SCHEMA}.binding")
    for table, policies in POLICIES.items():
        for command in policies[::2]:
            op.execute(f"DROP POLICY own_{command.lower()} ON {SCHEMA}.{table}")
    for name in reversed(FUNCTIONS):
        op.execute(f"DROP ROUTINE {SCHEMA}.{name}")
    for table in TABLES:
        op.drop_table(table, schema=SCHEMA)


def create_bindings(op: Operations) -> None:
    op.create_table(
        "encoder",
        sa.Column("id", sa.Integer, sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("revision", sa.Text),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("document_fingerprint", sa.Text),
        sa.Column("dimensions", sa.Integer, nullable=False),
        sa.Column("similarity", sa.Text, nullable=False),
        sa.Column("spec", pg.JSONB, nullable=False),
        sa.Column("probes", sa.LargeBinary, nullable=False),
        sa.Column("probes_digest", sa.LargeBinary, sa.Computed("sha256(probes)", persisted=True)),
        now("created_at"),
        sa.PrimaryKeyConstraint("id", name="encoder_pkey"),
        sa.UniqueConstraint("fingerprint", "probes_digest", name="encoder_fingerprint_key"),
        schema=SCHEMA,
    )
    op.create_table(
        "binding",
        sa.Column("id", sa.Uuid, nullable=False, server_default=sa.text("gen_random_uuid()")),
        sa.Column("relation", pg.REGCLASS, nullable=False),
        sa.Column("bound_name", sa.Text, nullable=False),
        sa.Column("column_name", sa.Text, nullable=False),
        sa.Column("companion", sa.Text, nullable=False),
        sa.Column("encoder_name", sa.Text, nullable=False),
        sa.Column("dimensions", sa.Integer, nullable=False),
        sa.Column("declared", pg.JSONB, nullable=False),
        sa.Column("encoder_id", sa.Integer),
        sa.Column("source", pg.JSONB, nullable=False),
        sa.Column("source_columns", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("key_columns", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("null_text", sa.Boolean, nullable=False),
        sa.Column("storage", sa.Text, nullable=False),
        sa.Column("replaces_id", sa.Uuid),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("caught_up_at", sa.DateTime(timezone=True)),
        sa.Column("last_audit", pg.JSONB),
        now("created_at"),
        sa.Column("sealed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="binding_pkey"),
        sa.UniqueConstraint("relation", "column_name", name="binding_relation_key"),
        sa.ForeignKeyConstraint(
            ["encoder_id"], ["sbert.encoder.id"], name="binding_encoder_id_fkey"
        ),
        sa.ForeignKeyConstraint(
            ["replaces_id"], ["sbert.binding.id"], name="binding_replaces_id_fkey"
        ),
        sa.CheckConstraint("storage IN ('vector', 'halfvec')", name="binding_storage_check"),
        sa.CheckConstraint(
            "state IN ('filling', 'active', 'replaced')", name="binding_state_check"
        ),
        schema=SCHEMA,
    )
    of_binding(
        op,
        "compatible_encoder",
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("spec", pg.JSONB, nullable=False),
        sa.Column("agreement", pg.JSONB, nullable=False),
        now("created_at"),
        key=("fingerprint",),
    )


def create_upkeep(op: Operations) -> None:
    of_binding(
        op,
        "claim",
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("keys", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        key=("worker",),
    )
    of_binding(
        op,
        "failure",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default=sa.text("0")),
        now("next_attempt_at"),
        sa.Column("error", sa.Text),
        sa.Column("failed", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("skipped", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("of_text", sa.Text),
        now("at"),
        key=("key",),
    )
    op.create_index(
        "failure_next_attempt_at_idx", "failure", ["binding_id", "next_attempt_at"], schema=SCHEMA
    )
    of_binding(
        op,
        "reader",
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("wrote", sa.Boolean, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("application", sa.Text, nullable=False),
        now("seen_at"),
        key=("pid", "wrote"),
    )
    of_binding(
        op,
        "question",
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("vector", sa.Text),
        sa.Column("error", sa.Text),
        now("asked_at"),
        key=("role", "digest"),
        # Asking again costs less than a flush of the log, for each question and each answer.
        prefixes=("UNLOGGED",),
    )
    op.create_index("question_asked_at_idx", "question", ["asked_at"], schema=SCHEMA)
    op.create_table(
        "vector_cache",
        sa.Column("role", sa.Text, nullable=False, server_default=sa.text("CURRENT_USER")),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        now("used_at"),
        sa.PrimaryKeyConstraint("role", "fingerprint", "digest", name="vector_cache_pkey"),
        schema=SCHEMA,
    )
    op.create_index("vector_cache_used_at_idx", "vector_cache", ["used_at"], schema=SCHEMA)


def of_binding(
    op: Operations,
    name: str,
    *columns: sa.Column[Any],
    key: tuple[str, ...],
    prefixes: tuple[str, ...] = (),
) -> None:
    """A table whose rows belong to a binding and go with it."""
    op.create_table(
        name,
        sa.Column("binding_id", sa.Uuid, nullable=False),
        *columns,
        sa.PrimaryKeyConstraint("binding_id", *key, name=f"{name}_pkey"),
        sa.ForeignKeyConstraint(
            ["binding_id"],
            ["sbert.binding.id"],
            name=f"{name}_binding_id_fkey",
            ondelete="CASCADE",
        ),
        schema=SCHEMA,
        prefixes=prefixes,
    )


def now(name: str) -> sa.Column[Any]:
    return sa.Column(
        name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")
    )


def statement(text: str) -> sa.TextClause:
    """A statement as it stands: a colon in it begins no parameter."""
    return sa.text(text.strip().rstrip(";").replace(":", r"\:"))
