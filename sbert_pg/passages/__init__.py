"""Passages: long texts cut into parts that an encoder reads whole; see docs/passages.md."""

from sbert_pg.passages.cutting import (
    Chunker,
    FixedChunker,
    LangChainChunker,
    Part,
    SentenceChunker,
    use_chunker,
)
from sbert_pg.passages.declaring import (
    Passage,
    PassageView,
    add_passages,
    declared_passages,
    passages_of,
)

__all__ = [
    "Chunker",
    "FixedChunker",
    "LangChainChunker",
    "Part",
    "Passage",
    "PassageView",
    "SentenceChunker",
    "add_passages",
    "declared_passages",
    "passages_of",
    "use_chunker",
]
