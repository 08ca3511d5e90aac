"""Documents with passages, bound and unbound."""

from __future__ import annotations

from passage_documents import documents, encoder, plain, session

__all__ = ["documents", "encoder", "plain", "session"]
