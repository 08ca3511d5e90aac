"""The library's own tables, as SQLAlchemy Core sees them.

The history in ``migrations/`` makes them; a test holds the two against each other. They live in a
``MetaData`` of their own, so an application's autogenerate does not see them.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from sbert_pg.system import stored_table

SCHEMA = "sbert"

#: Channel on which a binding's identity is sent when rows of its column may have become pending.
PENDING_CHANNEL = "sbert_pending"
#: The channel that sbert.embed notifies.
QUESTION_CHANNEL = "sbert_question"

metadata = sa.MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
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
    sa.Column("fingerprint", sa.Text, nullable=False),
    # Digest of what decides how documents are encoded, where the encoder knows it.
    sa.Column("document_fingerprint", sa.Text),
    sa.Column("dimensions", sa.Integer, nullable=False),
    sa.Column("similarity", sa.Text, nullable=False),
    # EncoderSpec.to_json()
    sa.Column("spec", pg.JSONB, nullable=False),
    # float32, little endian, one row of `dimensions` values for each text of PROBES
    sa.Column("probes", sa.LargeBinary, nullable=False),
    # One fingerprint with other probes is another encoder.
    sa.Column("probes_digest", sa.LargeBinary, sa.Computed("sha256(probes)", persisted=True)),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.UniqueConstraint("fingerprint", "probes_digest"),
)

#: Bindings: a vector column with its encoder and source, for life.
binding = sa.Table(
    "binding",
    metadata,
    # Never used again; what rows say of their vectors is made with it.
    sa.Column("id", sa.Uuid, primary_key=True, server_default=sa.func.gen_random_uuid()),
    sa.Column("relation", pg.REGCLASS, nullable=False),
    # The table's name when it was last bound: another table of that name is not the bound one.
    sa.Column("bound_name", sa.Text, nullable=False),
    sa.Column("column_name", sa.Text, nullable=False),
    # The column beside it, which says what its vector was made from.
    sa.Column("companion", sa.Text, nullable=False),
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
    # Whether a row of which every source column is NULL has no text; else its text is ''.
    sa.Column("null_text", sa.Boolean, nullable=False),
    sa.Column("storage", sa.Text, nullable=False),
    sa.Column("replaces_id", sa.Uuid, sa.ForeignKey("sbert.binding.id")),
    sa.Column("state", sa.Text, nullable=False),
    # Every text that was committed before this moment has its vector, or has failed.
    sa.Column("caught_up_at", sa.DateTime(timezone=True)),
    # What the last audit found.
    sa.Column("last_audit", pg.JSONB),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("sealed_at", sa.DateTime(timezone=True)),
    sa.UniqueConstraint("relation", "column_name"),
    sa.CheckConstraint("storage IN ('vector', 'halfvec')", name="storage"),
    sa.CheckConstraint("state IN ('filling', 'active', 'replaced')", name="state"),
)


def _of_binding() -> sa.Column[Any]:
    """The column that refers to a binding; its rows go with the binding."""
    return sa.Column(
        "binding_id",
        sa.Uuid,
        sa.ForeignKey(binding.c.id, ondelete="CASCADE"),
        primary_key=True,
        nullable=False,
    )


#: Further encoders that have been shown, by their probes, to share a column's space.
compatible_encoder = sa.Table(
    "compatible_encoder",
    metadata,
    _of_binding(),
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("spec", pg.JSONB, nullable=False),
    sa.Column("agreement", pg.JSONB, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

#: Leases: the rows that a worker is working on, one row here for each batch in hand.
claim = sa.Table(
    "claim",
    metadata,
    _of_binding(),
    # The worker and the number of its batch.
    sa.Column("worker", sa.Text, primary_key=True),
    # Labels of keys: they name rows in leases, failures and messages, and decide nothing.
    sa.Column("keys", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("until", sa.DateTime(timezone=True), nullable=False),
)

#: Rows that could not be embedded: those to be tried again, and, where the vector column is NOT
#: NULL and the row itself cannot say so, those that failed for good.
failure = sa.Table(
    "failure",
    metadata,
    _of_binding(),
    # A label, as in `claim`.
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("attempts", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("error", sa.Text),
    sa.Column("failed", sa.Boolean, nullable=False, server_default=sa.false()),
    # A failed row that an operator has decided to leave without a vector; `failed` stays true.
    sa.Column("skipped", sa.Boolean, nullable=False, server_default=sa.false()),
    # The half of the digest that names the text that failed.
    sa.Column("of_text", sa.Text),
    sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Index("failure_next_attempt_at_idx", "binding_id", "next_attempt_at"),
)

#: Sessions that used a column which another is replacing, as the library's own readers and writers
#: leave word of themselves.
reader = sa.Table(
    "reader",
    metadata,
    _of_binding(),
    sa.Column("pid", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("wrote", sa.Boolean, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("application", sa.Text, nullable=False),
    sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

#: Questions that callers without Python ask workers to embed, and the answers, by the role that
#: asked. Those without an answer, and answers that are not asked for again, are removed by workers.
question = sa.Table(
    "question",
    metadata,
    _of_binding(),
    sa.Column("role", sa.Text, primary_key=True),
    # SHA-256 of the question in UTF-8.
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("question", sa.Text, nullable=False),
    sa.Column("vector", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Index("question_asked_at_idx", "asked_at"),
    prefixes=["UNLOGGED"],
)

#: Vectors of texts by encoder and digest of the text; optional and bounded. Each role has its own,
#: since whoever writes a vector here decides what others take for the text's.
vector_cache = sa.Table(
    "vector_cache",
    metadata,
    sa.Column("role", sa.Text, primary_key=True, server_default=sa.text("CURRENT_USER")),
    sa.Column("fingerprint", sa.Text, primary_key=True),
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Column("used_at", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Index("vector_cache_used_at_idx", "used_at"),
)

#: The view, for selecting from; not part of ``metadata``, which describes tables.
status = stored_table(
    SCHEMA, "status", id=sa.Uuid,
    **dict.fromkeys(("schema_name", "table_name", "column_name", "companion"), sa.Text),
    encoder_name=sa.Text, fingerprint=sa.Text, dimensions=sa.Integer, state=sa.Text,
    estimated_rows=sa.BigInteger, estimated_embedded=sa.BigInteger,
    caught_up_at=sa.DateTime(timezone=True), retrying=sa.BigInteger, problems=pg.ARRAY(sa.Text),
    noticing=sa.Boolean, last_audit=pg.JSONB, index_ready=sa.Boolean,
    index_names=pg.ARRAY(sa.Text),
)  # fmt: skip
