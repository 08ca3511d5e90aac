"""Texts to vectors with onnxruntime: sentence-transformers models without torch."""

from sbert_pg.encoder.counting import Statistics
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.encoder import Encoder
from sbert_pg.encoder.preparing import DEFAULT_PRECISION, prepare

__all__ = ["DEFAULT_PRECISION", "Encoder", "Manifest", "Statistics", "prepare"]
