"""The library's own tables, as SQLAlchemy Core sees them.

The history in ``migrations/`` makes them; a test holds the two against each other. They live in a
``MetaData`` of their own, so an application's autogenerate does not see them.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

SCHEMA = "sbert"

#: Channel on which a binding's number is sent when rows of its column become pending.
PENDING_CHANNEL = "sbert_pending"

#: Settings of a transaction: bindings that its writer has been held against, and those whose rows
#: it holds locked while it writes vectors for the text they have.
ATTESTED = "sbert.attested"
VERIFIED = "sbert.verified"

metadata = sa.MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    },
)

_now = sa.func.now()

#: Encoders that columns belong to. Rows are never changed.
encoder = sa.Table(
    "encoder",
    metadata,
    sa.Column("id", sa.Integer, sa.Identity(always=True), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("revision", sa.Text),
    sa.Column("fingerprint", sa.Text, nullable=False, unique=True),
    sa.Column("dimensions", sa.Integer, nullable=False),
    sa.Column("similarity", sa.Text, nullable=False),
    # EncoderSpec.to_json()
    sa.Column("spec", pg.JSONB, nullable=False),
    # float32, little endian, one row of `dimensions` values for each text of PROBES
    sa.Column("probes", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

#: Bindings: a vector column with its encoder and source, for life.
embedding_column = sa.Table(
    "embedding_column",
    metadata,
    sa.Column("id", sa.Integer, sa.Identity(always=True), primary_key=True),
    sa.Column("relation", pg.REGCLASS, nullable=False),
    sa.Column("column_name", sa.Text, nullable=False),
    # As declared by the migration that bound the column.
    sa.Column("encoder_name", sa.Text, nullable=False),
    sa.Column("dimensions", sa.Integer, nullable=False),
    sa.Column("declared", pg.JSONB, nullable=False),
    # NULL until the first process with a loaded encoder uses the column; then for life.
    sa.Column("encoder_id", sa.Integer, sa.ForeignKey(encoder.c.id)),
    # Source.to_json()
    sa.Column("source", pg.JSONB, nullable=False),
    sa.Column("source_columns", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("key_columns", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("storage", sa.Text, nullable=False),
    sa.Column("replaces_id", sa.Integer, sa.ForeignKey("sbert.embedding_column.id")),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("sealed_at", sa.DateTime(timezone=True)),
    # What the last audit found, as pending.audit.Audit.to_json() writes it.
    sa.Column("last_audit", pg.JSONB),
    sa.UniqueConstraint("relation", "column_name"),
    sa.CheckConstraint("storage IN ('vector', 'halfvec')", name="storage"),
    sa.CheckConstraint("state IN ('filling', 'active', 'replaced')", name="state"),
)

#: Further encoders that have been shown, by their probes, to share a column's space.
compatible_encoder = sa.Table(
    "compatible_encoder",
    metadata,
    sa.Column(
        "column_id",
        sa.Integer,
        sa.ForeignKey(embedding_column.c.id, ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("spec", pg.JSONB, nullable=False),
    sa.Column("agreement", pg.JSONB, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

pending_version = sa.Sequence("pending_version", metadata=metadata, data_type=sa.BigInteger)

#: Rows whose vector does not belong to their text. No foreign key to the binding: its check would
#: double the cost of a mark.
pending = sa.Table(
    "pending",
    metadata,
    sa.Column("column_id", sa.Integer, primary_key=True, autoincrement=False),
    # The row's key as text, or a JSON array of the texts of its parts; see catalog.keys.
    sa.Column("key", sa.Text, primary_key=True),
    # From a sequence, hence never used twice: a mark that was removed and made again is another.
    sa.Column(
        "version", sa.BigInteger, nullable=False, server_default=pending_version.next_value()
    ),
    # When the row became stale; a further change does not move it.
    sa.Column("marked_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("lease_until", sa.DateTime(timezone=True)),
    sa.Column("claimed_by", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
    sa.Column("failed", sa.Boolean, nullable=False, server_default=sa.false()),
    # A failed row that an operator has decided to leave without a vector; `failed` stays true.
    sa.Column("skipped", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("error", sa.Text),
)
sa.Index(
    "pending_order_idx",
    pending.c.column_id,
    pending.c.marked_at,
    postgresql_where=sa.text("NOT failed"),
)
sa.Index(
    "pending_failed_idx", pending.c.column_id, pending.c.key, postgresql_where=sa.text("failed")
)

#: Key ranges of a backfill: each is filled by one process at a time.
backfill = sa.Table(
    "backfill",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column(
        "column_id",
        sa.Integer,
        sa.ForeignKey(embedding_column.c.id, ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    # Keys as in `pending`; the range is (lower, upper], NULL where it is open.
    sa.Column("lower", sa.Text),
    sa.Column("upper", sa.Text),
    # Last key that is done, within the range.
    sa.Column("position", sa.Text),
    sa.Column("state", sa.Text, nullable=False, server_default=sa.text("'open'")),
    sa.Column("lease_until", sa.DateTime(timezone=True)),
    sa.Column("claimed_by", sa.Text),
    sa.Column("rows", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("started_at", sa.DateTime(timezone=True)),
    sa.Column("finished_at", sa.DateTime(timezone=True)),
    sa.CheckConstraint("state IN ('open', 'done')", name="state"),
)

#: Vectors of texts by encoder and digest of the text; optional and bounded.
vector_cache = sa.Table(
    "vector_cache",
    metadata,
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Column("used_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Index("vector_cache_used_at_idx", "used_at"),
)

#: Sessions that wrote a column which another is replacing, together with its text.
old_writer = sa.Table(
    "old_writer",
    metadata,
    # The replacing column, which stands for the change.
    sa.Column(
        "column_id",
        sa.Integer,
        sa.ForeignKey(embedding_column.c.id, ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("pid", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("application", sa.Text, nullable=False),
    sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

#: The view, for selecting from; not part of ``metadata``, which describes tables.
status = sa.table(
    "status",
    sa.column("id", sa.Integer),
    sa.column("schema_name", sa.Text),
    sa.column("table_name", sa.Text),
    sa.column("column_name", sa.Text),
    sa.column("encoder_name", sa.Text),
    sa.column("fingerprint", sa.Text),
    sa.column("dimensions", sa.Integer),
    sa.column("state", sa.Text),
    sa.column("estimated_rows", sa.BigInteger),
    sa.column("estimated_embedded", sa.BigInteger),
    sa.column("pending", sa.BigInteger),
    sa.column("pending_is_capped", sa.Boolean),
    sa.column("oldest_pending", sa.DateTime(timezone=True)),
    sa.column("failed", sa.BigInteger),
    sa.column("skipped", sa.BigInteger),
    sa.column("noticing", sa.Boolean),
    sa.column("last_audit", pg.JSONB),
    sa.column("index_ready", sa.Boolean),
    sa.column("index_names", pg.ARRAY(sa.Text)),
    schema=SCHEMA,
)
