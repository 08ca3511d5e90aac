"""Texts to vectors with onnxruntime: sentence-transformers models without torch."""

from sbert_pg.encoder.conversion import converted_here, prepare
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.encoder import Encoder, TokenCounter, load_declared
from sbert_pg.encoder.pipeline import Statistics
from sbert_pg.encoder.reranker import Reranker

__all__ = [
    "Encoder",
    "Manifest",
    "Reranker",
    "Statistics",
    "TokenCounter",
    "converted_here",
    "load_declared",
    "prepare",
]
