"""For the tests of applications: an encoder that needs no model and always gives the same vectors.

It hashes words, so texts that share words are near and the ranking of a small test is meaningful
without a download. It knows nothing of meaning.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np

from sbert_pg.errors import EncodingError
from sbert_pg.probes import PROBES
from sbert_pg.spec import EncoderSpec, Vectors

_WORD = re.compile(r"\w+")


class DeterministicEncoder:
    """Sum of one pseudo-random unit vector a word, at length one.

    Args:
        name: name under which columns declare it.
        dimensions: width of the vectors.
        salt: another salt is another vector space.
        refuse: a text that contains this is refused with ``EncodingError``, for tests of failures.
    """

    #: Its probe vectors are computed and not passed on, see ``sbert_pg.probes.measured``; so tests
    #: find in ``encoded`` what they had encoded and no probes.
    measures_its_probes: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        cls.measures_its_probes = True

    def __init__(
        self,
        name: str = "deterministic",
        dimensions: int = 384,
        *,
        salt: str = "",
        refuse: str | None = None,
    ) -> None:
        self._salt = salt
        self._refuse = refuse
        #: Texts encoded so far, in order, for assertions on what was encoded and what was not.
        self.encoded: list[str] = []
        self._spec = EncoderSpec(
            name=name,
            dimensions=dimensions,
            similarity="cosine",
            normalized=True,
            pooling="sum of word hashes",
            precision="fp32",
            weights_digest=hashlib.sha256(f"words {salt}".encode()).hexdigest(),
            tokenizer_digest=hashlib.sha256(_WORD.pattern.encode()).hexdigest(),
        )
        self._word = lru_cache(maxsize=65_536)(self._word_vector)

    @property
    def spec(self) -> EncoderSpec:
        """What decides the vector space: the salt and the dimensions."""
        return self._spec

    @cached_property
    def probe_vectors(self) -> Vectors:
        """Vectors of the probes, shape ``(len(PROBES), dimensions)``."""
        return np.stack([self._vector(text) for text in PROBES])

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        """Vectors of queries; the same as of documents."""
        return self.encode_document(texts)

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, float32 of shape ``(len(texts), dimensions)``.

        Raises:
            EncodingError: a text contains what this encoder refuses.
        """
        for position, text in enumerate(texts):
            if self._refuse is not None and self._refuse in text:
                raise EncodingError(f"the text contains {self._refuse!r}", index=position)
        self.encoded.extend(texts)
        if not texts:
            return np.empty((0, self._spec.dimensions), dtype=np.float32)
        return np.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> Vectors:
        # One word at a time, since a text may be a document of many megabytes.
        total = np.zeros(self._spec.dimensions, np.float32)
        for match in _WORD.finditer(text.lower()):
            total += self._word(match[0])
        if not total.any():
            total = self._word("")
        vector: Vectors = (total / np.linalg.norm(total)).astype(np.float32)
        return vector

    def _word_vector(self, word: str) -> Vectors:
        digest = hashlib.sha256(f"{self._salt}\0{word}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        vector = random.standard_normal(self._spec.dimensions, dtype=np.float32)
        unit: Vectors = vector / np.linalg.norm(vector)
        return unit


__all__ = ["DeterministicEncoder"]
