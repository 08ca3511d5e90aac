"""Embedding columns on mapped classes, kept in step with their text by the flush."""

from sbert_pg.orm.declaring import embedding_column
from sbert_pg.orm.flush import embed_on_flush

__all__ = ["embed_on_flush", "embedding_column"]
