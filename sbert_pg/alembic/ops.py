"""The operations, as a migration calls them: ``op.add_embedding_column(...)`` and the others."""

from __future__ import annotations

from sbert_pg.alembic.base import (
    ColumnOperation,
    DowngradeSchemaOp,
    NothingOp,
    SbertOperation,
    SequenceOp,
    UpgradeSchemaOp,
)
from sbert_pg.alembic.binding_ops import (
    BackfillEmbeddingsOp,
    BindEmbeddingColumnOp,
    FollowRenameOp,
    RebindEmbeddingColumnOp,
    RequireBackfillOp,
    UnbindEmbeddingColumnOp,
)
from sbert_pg.alembic.column_ops import (
    AddEmbeddingColumnOp,
    BeginReplacementOp,
    DeclaringOperation,
    DropEmbeddingColumnOp,
    FinishReplacementOp,
    ResumeReplacementOp,
)
from sbert_pg.alembic.index_ops import CreateVectorIndexOp, DropVectorIndexOp

#: Name of the method, and the class that has it.
OPERATIONS: tuple[tuple[str, type[SbertOperation]], ...] = (
    ("upgrade_sbert_schema", UpgradeSchemaOp),
    ("downgrade_sbert_schema", DowngradeSchemaOp),
    ("add_embedding_column", AddEmbeddingColumnOp),
    ("begin_replacement", BeginReplacementOp),
    ("drop_embedding_column", DropEmbeddingColumnOp),
    ("finish_replacement", FinishReplacementOp),
    ("resume_replacement", ResumeReplacementOp),
    ("bind_embedding_column", BindEmbeddingColumnOp),
    ("unbind_embedding_column", UnbindEmbeddingColumnOp),
    ("rebind_embedding_column", RebindEmbeddingColumnOp),
    ("follow_rename", FollowRenameOp),
    ("require_backfill", RequireBackfillOp),
    ("backfill_embeddings", BackfillEmbeddingsOp),
    ("create_vector_index", CreateVectorIndexOp),
    ("drop_vector_index", DropVectorIndexOp),
)

__all__ = [
    "OPERATIONS",
    "AddEmbeddingColumnOp",
    "BackfillEmbeddingsOp",
    "BeginReplacementOp",
    "BindEmbeddingColumnOp",
    "ColumnOperation",
    "CreateVectorIndexOp",
    "DeclaringOperation",
    "DowngradeSchemaOp",
    "DropEmbeddingColumnOp",
    "DropVectorIndexOp",
    "FinishReplacementOp",
    "FollowRenameOp",
    "NothingOp",
    "RebindEmbeddingColumnOp",
    "RequireBackfillOp",
    "ResumeReplacementOp",
    "SbertOperation",
    "SequenceOp",
    "UnbindEmbeddingColumnOp",
    "UpgradeSchemaOp",
]
