"""``Encoder``: texts to vectors."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from sbert_pg.distance import similarity_matrix
from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.counting import Counter, Statistics
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.engine import Engine
from sbert_pg.encoder.preparing import prepare
from sbert_pg.encoder.prompts import DOCUMENT, QUERY, resolve_prompt
from sbert_pg.encoder.providers import Provider, Providers
from sbert_pg.encoder.tokenizing import Tokens, clean, clean_chunks
from sbert_pg.spec import EncoderSpec, Vectors

Vector = npt.NDArray[np.float32]
#: Called with the number of texts done and the number in all (``None`` where it is not known).
Progress = Callable[[int, "int | None"], None]

#: Texts that are tokenized and sorted by length together; more gives no better batches.
CHUNK = 2048


class Encoder:
    """A converted sentence-transformers model, run by onnxruntime.

    Made by ``Encoder.load``. Safe to share between threads. After a fork the child opens sessions
    of its own at its first call, since the threads of the parent's do not survive it.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        dimensions: int | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._threads = threads
        self._providers = providers
        self._spec = manifest.truncated(dimensions)
        probes = converted.read_probes(directory, manifest.full_dimensions)
        self._probes = np.ascontiguousarray(probes[:, : self._spec.dimensions])
        self._lock = threading.Lock()
        self._counter = Counter(manifest.spec.name, manifest.spec.max_seq_length)
        self._engine: Engine | None = Engine(directory, manifest, threads, providers)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        precision: str | None = None,
        dimensions: int | None = None,
        revision: str | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        cache_dir: str | Path | None = None,
    ) -> Encoder:
        """Load an encoder, converting it at the first time.

        Args:
            name_or_path: a directory that this project converted, a sentence-transformers
                directory, or a name on the hub. A name is converted once and then taken from the
                cache of conversions without asking the hub.
            precision: ``"int8"`` (the default on the CPU), ``"int8-blocks"``, ``"fp32"``,
                ``"fp16"`` (the default on CUDA) or ``"fp32-plain"`` (the default on other
                execution providers); docs/encoder.md says what each costs and gives.
            dimensions: keep this many dimensions of each vector (Matryoshka models); all by
                default.
            revision: revision of the hub repository.
            threads: threads of inference; by default as many as the process may use.
            providers: onnxruntime execution providers in order of preference, each a name or a
                name with onnxruntime's options for it; those of ``$SBERT_PG_PROVIDERS`` or the CPU
                by default.
            cache_dir: where conversions are kept; ``$SBERT_PG_CACHE`` or the user's cache directory
                by default.

        Raises:
            EncoderNotFoundError: there is no such directory or repository.
            UnsupportedEncoderError: the model asks for something that is not implemented.
            DamagedEncoderError: files are missing or do not match their digests.
            ConversionError: the precision disagrees with fp32 by more than its floor.
            ProviderError: an execution provider is missing.
            DeclarationError: the model does not have so many dimensions.
        """
        place = prepare(
            name_or_path,
            precision=precision,
            revision=revision,
            cache_dir=cache_dir,
            providers=providers,
        )
        encoder = cls.open(place, dimensions=dimensions, threads=threads, providers=providers)
        if place != Path(name_or_path).expanduser():
            # One conversion serves every name that means the same model.
            encoder._spec = replace(encoder._spec, name=str(name_or_path))
        return encoder

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        dimensions: int | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> Encoder:
        """Open a converted directory, verified against its digests.

        Args:
            directory: the directory.
            dimensions: as for ``load``.
            threads: as for ``load``.
            providers: as for ``load``.

        Raises:
            DamagedEncoderError: files are missing or do not match their digests.
            ProviderError: an execution provider is missing, or not made for this form.
            DeclarationError: the model does not have so many dimensions.
        """
        path = Path(directory)
        manifest = Manifest.read(path)
        Providers.of(providers).require_suited(path, manifest.precision)
        with ThreadPoolExecutor(1, thread_name_prefix="sbert-pg-verify") as pool:
            # Hashing and making the session both leave the interpreter to others.
            verified = pool.submit(converted.verify_files, path, manifest)
            try:
                encoder = cls(
                    path, manifest, dimensions=dimensions, threads=threads, providers=providers
                )
            except Exception:
                # Damage explains whatever else went wrong.
                verified.result()
                raise
            verified.result()
        return encoder

    @property
    def spec(self) -> EncoderSpec:
        """What decides the encoder's vector space."""
        return self._spec

    @property
    def probe_vectors(self) -> Vectors:
        """Vectors of the probes as measured at conversion, ``(len(PROBES), dimensions)``."""
        return self._probes

    @property
    def manifest(self) -> Manifest:
        """What the converted directory says about itself."""
        return self._manifest

    @property
    def directory(self) -> Path:
        """The converted directory."""
        return self._directory

    @property
    def dimensions(self) -> int:
        """Width of a vector."""
        return self._spec.dimensions

    @property
    def max_seq_length(self) -> int | None:
        """Tokens that are read of a text, special tokens included."""
        return self._spec.max_seq_length

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by name; ``query`` and ``document`` are empty where the model has none."""
        return {QUERY: "", DOCUMENT: "", **dict(self._spec.prompts)}

    @property
    def statistics(self) -> Statistics:
        """Counts since the encoder was loaded, truncated texts among them."""
        return self._counter.statistics

    @overload
    def encode(
        self,
        texts: str,
        *,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        normalize: bool = ...,
        progress: Progress | None = ...,
    ) -> Vector: ...

    @overload
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        normalize: bool = ...,
        progress: Progress | None = ...,
    ) -> Vectors: ...

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool = False,
        progress: Progress | None = None,
    ) -> Vectors:
        """Vectors of texts.

        Equal texts are encoded once. The vector of a text does not depend on the others beyond
        rounding. Empty texts and white space have vectors too (those of the special tokens alone);
        lone surrogates are read as U+FFFD. Texts longer than ``max_seq_length`` are cut, counted in
        ``statistics`` and reported by a warning in the log ``sbert_pg.encoder``.

        Args:
            texts: one text or a sequence of them.
            prompt_name: name of a prompt to put before each text; the model's default prompt
                where neither this nor ``prompt`` is given.
            prompt: text to put before each text.
            normalize: divide each vector by its length.
            progress: called with ``(done, total)`` as chunks are finished.

        Returns:
            float32 of shape ``(len(texts), dimensions)``, or ``(dimensions,)`` for one text.

        Raises:
            EncodingError: something is no text (``index`` says which), or the prompt is unknown.
        """
        if isinstance(texts, str):
            single = self.encode(
                [texts], prompt_name=prompt_name, prompt=prompt, normalize=normalize
            )
            vector: Vector = single[0]
            return vector
        cleaned = clean(texts)
        chosen = self._prompt(prompt_name, prompt)
        positions: dict[str, int] = {}
        inverse = [positions.setdefault(text, len(positions)) for text in cleaned]
        unique = list(positions)
        blocks = []
        for vectors in self._blocks(
            (unique[i : i + CHUNK] for i in range(0, len(unique), CHUNK)), chosen
        ):
            blocks.append(vectors)
            if progress is not None:
                done = sum(len(block) for block in blocks)
                progress(len(cleaned) if done == len(unique) else done, len(cleaned))
        matrix = np.concatenate(blocks) if blocks else np.empty((0, self.dimensions), np.float32)
        if len(unique) != len(cleaned):
            matrix = matrix[inverse]
        self._counter.add(duplicates=len(cleaned) - len(unique), texts=len(cleaned) - len(unique))
        return _normalized(matrix) if normalize else matrix

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        """Vectors of search queries: with the prompt ``query``, where the model has one."""
        return self.encode(texts, prompt_name=QUERY)

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts to be found: with the prompt ``document``, where the model has one."""
        return self.encode(texts, prompt_name=DOCUMENT)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        chunk_size: int = CHUNK,
        progress: Progress | None = None,
    ) -> Iterator[Vector]:
        """Vectors one after the other, in the order of the texts, in bounded memory.

        At most three chunks are held at a time: one being read, one being encoded, one being
        consumed. The texts are read in the caller's thread.

        Args:
            texts: any iterable; it may be endless.
            prompt_name: as for ``encode``.
            prompt: as for ``encode``.
            chunk_size: texts that are sorted by length together.
            progress: called with ``(done, None)``.
        """
        chosen = self._prompt(prompt_name, prompt)
        done = 0
        for vectors in self._blocks(clean_chunks(texts, chunk_size), chosen):
            yield from vectors
            done += len(vectors)
            if progress is not None:
                progress(done, None)

    async def encode_async(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool = False,
    ) -> Vectors:
        """``encode`` in a thread, so that an event loop goes on meanwhile."""
        return await asyncio.to_thread(
            self.encode, texts, prompt_name=prompt_name, prompt=prompt, normalize=normalize
        )

    async def encode_query_async(self, texts: Sequence[str]) -> Vectors:
        """``encode_query`` in a thread."""
        return await asyncio.to_thread(self.encode_query, texts)

    async def encode_document_async(self, texts: Sequence[str]) -> Vectors:
        """``encode_document`` in a thread."""
        return await asyncio.to_thread(self.encode_document, texts)

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """Similarity of every row of ``a`` with every row of ``b``, larger for nearer.

        By the model's own similarity function; float32 of shape ``(len(a), len(b))``.
        """
        return similarity_matrix(np.atleast_2d(a), np.atleast_2d(b), self._spec.similarity)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text if nothing were cut, special tokens included."""
        return self._ready().tokenizer.count(clean(texts))

    def recomputed_probes(self) -> Vectors:
        """Vectors of the probes as this machine computes them now."""
        from sbert_pg.probes import PROBES

        # Past the counts: one of them is cut on purpose, which nobody has to be warned of.
        engine = self._ready()
        vectors: Vectors = engine.runner.run(engine.tokenizer.encode(clean(PROBES)).ids)
        return np.ascontiguousarray(vectors[:, : self.dimensions])

    def __repr__(self) -> str:
        return (
            f"<Encoder {self._spec.name!r}, {self._manifest.precision}, "
            f"{self.dimensions} dimensions>"
        )

    def _prompt(self, prompt_name: str | None, prompt: str | None) -> str:
        spec = self._spec
        chosen = resolve_prompt(dict(spec.prompts), spec.default_prompt_name, prompt_name, prompt)
        return clean([chosen])[0]

    def _ready(self) -> Engine:
        """The engine of this process."""
        engine = self._engine
        if engine is not None and engine.pid == os.getpid():
            return engine
        with self._lock:
            if self._engine is None or self._engine.pid != os.getpid():
                self._engine = Engine(
                    self._directory, self._manifest, self._threads, self._providers
                )
            return self._engine

    def _tokenize(self, texts: Sequence[str], prompt: str) -> Tokens:
        tokenizer = self._ready().tokenizer
        return tokenizer.encode([prompt + text for text in texts] if prompt else texts)

    def _blocks(self, chunks: Iterator[list[str]], prompt: str) -> Iterator[Vectors]:
        """Vectors of each chunk; while one is encoded, the next is read and tokenized."""
        engine = self._ready()
        first = next(chunks, None)
        if first is None:
            return
        tokens = self._tokenize(first, prompt)
        second = next(chunks, None)
        if second is None:
            yield self._run(engine, tokens, prompt)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="sbert-pg-encode") as pool:
            running: Future[Vectors] = pool.submit(self._run, engine, tokens, prompt)
            following: list[str] | None = second
            while following is not None:
                tokens = self._tokenize(following, prompt)
                following = next(chunks, None)
                vectors = running.result()
                running = pool.submit(self._run, engine, tokens, prompt)
                yield vectors
            yield running.result()

    def _run(self, engine: Engine, tokens: Tokens, prompt: str) -> Vectors:
        lengths = None
        if prompt and not self._spec.include_prompt:
            prompt_length = engine.tokenizer.prompt_length(prompt)
            lengths = [min(prompt_length, len(ids)) for ids in tokens.ids]
        vectors: Vectors = engine.runner.run(tokens.ids, lengths)
        self._counter.add(
            texts=len(tokens.ids),
            tokens=sum(map(len, tokens.ids)),
            truncated=len(tokens.truncated),
        )
        if vectors.shape[1] != self.dimensions:
            vectors = np.ascontiguousarray(vectors[:, : self.dimensions])
        return vectors


def _normalized(matrix: Vectors) -> Vectors:
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix / np.maximum(lengths, 1e-12), dtype=np.float32)
