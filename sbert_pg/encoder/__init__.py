"""Texts to vectors with onnxruntime: sentence-transformers models without torch.

From a name to a converted directory, once on a machine (``conversion``): ``hub`` finds the files;
``description`` and ``kinds`` read what they say, ``tokenizer_files`` the tokenizer;
``architectures`` and ``tensors`` make a ``layers.Transformer`` of the weights; ``graph``,
``transformer`` and ``products`` write it as ONNX with a ``writer``, or torch does (``export``);
``directory`` keeps it.

From there to vectors: ``encoder`` and ``loaded`` open the directory; in each process a ``pipeline``
has the texts cut into tokens (``tokenizing``) and run in batches (``runner``) by an engine
(``engines``).
"""

from sbert_pg.encoder.conversion import converted_here, prepare
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.encoder import Encoder, load_declared
from sbert_pg.encoder.loaded import Reranker, TokenCounter
from sbert_pg.encoder.pipeline import Statistics

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
