"""Writers of the old version, while one column replaces another."""

import sqlalchemy as sa
from alembic.operations import Operations

from sbert_pg.sql import load

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SCHEMA = "sbert"


def upgrade(op: Operations) -> None:
    op.create_table(
        "old_writer",
        sa.Column("column_id", sa.Integer, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("application", sa.Text, nullable=False),
        sa.Column(
            "seen_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")
        ),
        sa.PrimaryKeyConstraint("column_id", "pid", name="old_writer_pkey"),
        sa.ForeignKeyConstraint(
            ["column_id"],
            ["sbert.embedding_column.id"],
            name="old_writer_column_id_fkey",
            ondelete="CASCADE",
        ),
        schema=SCHEMA,
    )
    for name in ("saw_writer_v1", "watch_writers_v1"):
        op.execute(sa.text(load(name).strip().replace(":", r"\:")))
        op.execute(f"REVOKE ALL ON FUNCTION {SCHEMA}.{name}() FROM PUBLIC")
    op.execute(
        "CREATE TRIGGER watch AFTER INSERT OR DELETE OR UPDATE OF replaces_id "
        "ON sbert.embedding_column "
        "FOR EACH ROW EXECUTE FUNCTION sbert.watch_writers_v1()"
    )


def downgrade(op: Operations) -> None:
    op.execute(
        "DO $body$ DECLARE v record; BEGIN "
        "FOR v IN SELECT t.tgname, t.tgrelid::regclass AS relation FROM pg_trigger t "
        "WHERE NOT t.tgisinternal AND t.tgparentid = 0 "
        "AND t.tgfoid = 'sbert.saw_writer_v1'::regproc LOOP "
        "EXECUTE format('DROP TRIGGER %I ON %s', v.tgname, v.relation); END LOOP; END $body$"
    )
    op.execute("DROP TRIGGER watch ON sbert.embedding_column")
    op.execute("DROP FUNCTION sbert.watch_writers_v1()")
    op.execute("DROP FUNCTION sbert.saw_writer_v1()")
    op.drop_table("old_writer", schema=SCHEMA)
