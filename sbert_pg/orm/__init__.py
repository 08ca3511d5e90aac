"""Embedding columns on mapped classes, kept in step with their text by the flush."""

from sbert_pg.orm.declaring import embedding_column, plain_attributes
from sbert_pg.orm.flush import embed_on_flush, leave_to_workers

__all__ = ["embed_on_flush", "embedding_column", "leave_to_workers", "plain_attributes"]
