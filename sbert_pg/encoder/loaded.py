"""A converted directory in use: what encoder and reranker share, ``Reranker``, ``TokenCounter``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.conversion import prepare
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.engines import ONNXRUNTIME, Provider, Providers
from sbert_pg.encoder.kinds import SAMPLE_PAIRS
from sbert_pg.encoder.pipeline import (
    SAME_SCORES,
    Pipeline,
    Statistics,
    agreement_of_scores,
    engine_for,
)
from sbert_pg.encoder.tokenizing import TextTokenizer, clean
from sbert_pg.errors import DamagedEncoderError, ProviderError, UnsupportedEncoderError
from sbert_pg.probes import Agreement
from sbert_pg.process import PerProcess

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class Running(TypedDict, total=False):
        """How a converted model is run; see ``Encoder.load``."""

        threads: int | None
        providers: Sequence[Provider] | None
        engine: str | None


T = TypeVar("T", bound="Converted")
Scores = npt.NDArray[np.float32]


class Converted:
    """A converted directory in use: what an encoder and a reranker have in common.

    Attributes:
        directory: the converted directory.
        manifest: what it says about itself.
        engine: what runs it, ``"onnxruntime"`` or ``"openvino"``.
    """

    def __init__(self, directory: Path, manifest: Manifest, **options: Unpack[Running]) -> None:
        self.directory, self.manifest, self._arguments = directory, manifest, options
        providers = options.get("providers")
        self.engine = engine_for(directory, manifest, options.get("engine"), providers)
        self._loaded_by = os.getpid()
        self._pipeline = PerProcess(self._new_pipeline)
        # Whatever is wrong with the directory is said now and not at the first text.
        self._pipeline.get()

    def _new_pipeline(self) -> Pipeline:
        """Of this process; a forked child finds what is in the directory by then."""
        if os.getpid() != self._loaded_by and Manifest.read(self.directory) != self.manifest:
            raise DamagedEncoderError(
                f"{self.directory} holds something else than when it was loaded, before this "
                "process was forked. Load it again."
            )
        threads, providers = self._arguments.get("threads"), self._arguments.get("providers")
        return Pipeline(self.directory, self.manifest, threads, providers, self.engine)

    def _require_same(self, agreement: Agreement, least: float) -> None:
        """Refuse an engine that computes something else than conversion did."""
        if agreement.min_cosine < least:
            raise ProviderError(
                f"{self.engine} computes something else of {self.directory} than it was converted "
                f"with ({agreement}). Load it with engine={ONNXRUNTIME!r}, and please report this."
            )

    @classmethod
    def _opened(cls: type[T], directory: str | Path, kind: str, **options: Any) -> T:
        """As ``open``, of a directory of this kind."""
        path = Path(directory)
        manifest = Manifest.read(path)
        if manifest.kind != kind:
            loader = {"encoder": "Encoder.load", "reranker": "Reranker.load"}.get(manifest.kind, "")
            raise UnsupportedEncoderError(
                f"{path} holds a converted {manifest.kind} and no {kind}; load it with {loader}."
            )
        Providers.of(options.get("providers")).require_suited(path, manifest.precision)
        return converted.verified(path, manifest, lambda: cls(path, manifest, **options))

    @property
    def megabytes(self) -> float:
        """Size of its files, in millions of bytes."""
        files = (self.directory / name for name in self.manifest.files)
        return sum(file.stat().st_size for file in files) / 1e6

    @property
    def max_seq_length(self) -> int | None:
        """Tokens that are read of a text or pair, special tokens included."""
        return self.manifest.spec.max_seq_length

    @property
    def statistics(self) -> Statistics:
        """Counts since it was loaded or the process forked, truncated texts among them."""
        return self._pipeline.get().counter.statistics


class Reranker(Converted):
    """A converted cross-encoder, run by onnxruntime.

    It reads question and text together, which ranks better than comparing their vectors and costs a
    run of the transformer for each text. Made by ``Reranker.load``. Safe to share between threads,
    to fork and to pickle, as ``Encoder`` is. In ``statistics`` a pair counts as one text.
    """

    def __init__(self, directory: Path, manifest: Manifest, **options: Unpack[Running]) -> None:
        super().__init__(directory, manifest, **options)
        if self.engine != ONNXRUNTIME:
            stored = converted.read_probes(directory, manifest.full_dimensions)
            scores, _ = self._pipeline.get().scores_any(SAMPLE_PAIRS[: len(stored)])
            self._require_same(agreement_of_scores(scores, stored), SAME_SCORES)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        precision: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **options: Unpack[Running],
    ) -> Reranker:
        """Load a cross-encoder, converting it at the first time; all else as ``Encoder.load``.

        Args:
            name_or_path: a directory that this project converted, one of a cross-encoder, or a name
                on the hub, such as ``"cross-encoder/ms-marco-MiniLM-L6-v2"``.
        """
        path = prepare(
            name_or_path,
            precision=precision,
            revision=revision,
            cache_dir=cache_dir,
            providers=options.get("providers"),
            kind="reranker",
        )
        return cls.open(path, **options)

    @classmethod
    def open(cls, directory: str | Path, **options: Unpack[Running]) -> Reranker:
        """Open a converted directory, as ``Encoder.open`` does."""
        return cls._opened(directory, "reranker", **options)

    @property
    def name(self) -> str:
        """The name that it was converted under."""
        return self.manifest.spec.name

    @property
    def labels(self) -> int:
        """Scores of a pair; rerankers have one, classifiers of pairs several."""
        return self.manifest.full_dimensions

    def score(self, question: str, texts: Sequence[str]) -> Scores:
        """How well each text answers the question, larger for better.

        As ``CrossEncoder.predict`` of sentence-transformers, with the model's own activation. Of a
        pair longer than ``max_seq_length`` the longer text is cut, which is counted in
        ``statistics``.

        Returns:
            float32 of shape ``(len(texts),)``, or ``(len(texts), labels)`` where there are several.

        Raises:
            EncodingError: something is not a text (``index`` says which).
        """
        return self.score_pairs([(question, text) for text in texts])

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> Scores:
        """As ``score``, for pairs of a question and a text each."""
        firsts, seconds = (clean([pair[part] for pair in pairs]) for part in (0, 1))
        scores = self._pipeline.get().scores(list(zip(firsts, seconds, strict=True)))
        return scores[:, 0] if self.labels == 1 else scores

    async def score_async(self, question: str, texts: Sequence[str]) -> Scores:
        """``score`` in a thread, so that an event loop keeps running."""
        return await asyncio.to_thread(self.score, question, texts)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self).open, **self._arguments), (self.directory,)

    def __repr__(self) -> str:
        return f"<Reranker {self.name!r}, {self.manifest.precision}>"


class TokenCounter:
    """Counts tokens as a converted encoder does, without a session: made in ten milliseconds."""

    def __init__(self, directory: Path) -> None:
        manifest = Manifest.read(directory)
        content = (directory / converted.TOKENIZER).read_text(encoding="utf-8")
        self.spec = manifest.spec
        self._tokenizer = TextTokenizer(content, self.spec.max_seq_length)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As ``Encoder.count_tokens``."""
        return self._tokenizer.count(clean(texts))
