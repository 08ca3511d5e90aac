"""Texts to vectors with onnxruntime: sentence-transformers models without torch."""

from sbert_pg.encoder.counting import Statistics
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.encoder import Encoder
from sbert_pg.encoder.preparing import prepare

__all__ = ["Encoder", "Manifest", "Statistics", "prepare"]
