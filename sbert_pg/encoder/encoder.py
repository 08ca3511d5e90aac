"""``Encoder``: texts to vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from sbert_pg.distance import similarity_matrix, unit
from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.conversion import prepare
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.engines import ONNXRUNTIME, Provider
from sbert_pg.encoder.loaded import Converted
from sbert_pg.encoder.pipeline import Statistics
from sbert_pg.encoder.runner import OUTPUT, QUERY_OUTPUT
from sbert_pg.encoder.tokenizing import clean, clean_chunks
from sbert_pg.errors import DeclarationError, EncoderMismatchError, EncodingError
from sbert_pg.probes import PRECISION_MIN_COSINE, PROBES, agreement_of
from sbert_pg.spec import DOCUMENT, QUERY, EncoderSpec, Vectors, known_encoder

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sbert_pg.encoder.loaded import Running

Vector = npt.NDArray[np.float32]

#: Texts that are tokenized and sorted by length together; more gives no better batches.
CHUNK = 2048


class Encoder(Converted):
    """A converted sentence-transformers model, run by onnxruntime or OpenVINO.

    Made by ``Encoder.load``. Safe to share between threads. After a fork the child opens its
    own sessions at its first call, since the threads of the parent's do not survive it. Pickled, it
    is its directory and the arguments with which it was loaded.
    """

    #: ``probe_vectors`` are those that were measured at conversion, and verified by their digest.
    measures_its_probes: ClassVar[bool] = True

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        dimensions: int | None = None,
        **options: Unpack[Running],
    ) -> None:
        super().__init__(directory, manifest, **options)
        self._spec = manifest.truncated(dimensions)
        probes = converted.read_probes(directory, manifest.full_dimensions)
        self._probes = np.ascontiguousarray(probes[:, : self._spec.dimensions])
        if self.engine != ONNXRUNTIME:
            few = slice(1, 8)
            prompt = self._prompt(DOCUMENT, None)
            vectors = self._pipeline.get().run_any(clean(PROBES[few]), prompt)
            agreement = agreement_of(self._cut(vectors), self._probes[few])
            self._require_same(agreement, PRECISION_MIN_COSINE)

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
        engine: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Encoder:
        """Load an encoder, converting it at the first time.

        Args:
            name_or_path: a directory that this project converted, a sentence-transformers
                directory, or a name on the hub. A name is converted once and then taken from the
                cache of conversions without asking the hub.
            precision: ``"int8"`` (the default on the CPU), ``"fp32"``, ``"bf16"`` (by OpenVINO),
                ``"fp16"`` (the default on CUDA) or ``"fp32-plain"`` (the default on other execution
                providers);
                docs/encoder.md says what each costs and gives.
            dimensions: keep this many dimensions of each vector (Matryoshka models); all by
                default.
            revision: revision of the hub repository.
            threads: threads of inference; by default as many as the process may use.
            providers: onnxruntime execution providers in order of preference, each a name or a
                name with onnxruntime's options for it; those of ``$SBERT_PG_PROVIDERS`` or the CPU
                by default.
            engine: ``"onnxruntime"`` or ``"openvino"`` (extra ``openvino``), what runs it on the
                CPU; by default ``$SBERT_PG_ENGINE``, or what was measured to be fastest in this
                precision on this kind of processor.
            cache_dir: where conversions are kept; ``$SBERT_PG_CACHE`` or the user's cache directory
                by default.

        Raises:
            EncoderNotFoundError: there is no such directory or repository.
            UnsupportedEncoderError: the model asks for something that is not implemented.
            DamagedEncoderError: files are missing or do not match their digests.
            ConversionError: the precision disagrees with fp32 by more than its floor.
            ProviderError: an execution provider is missing, or the engine does not run this form.
            MissingExtraError: the engine is not installed; the message names the extra.
            DeclarationError: the model does not have so many dimensions.
            EncoderError: the cache cannot be written; see ``$SBERT_PG_CACHE``.
        """
        place = prepare(
            name_or_path,
            precision=precision,
            revision=revision,
            cache_dir=cache_dir,
            providers=providers,
        )
        encoder = cls.open(
            place, dimensions=dimensions, threads=threads, providers=providers, engine=engine
        )
        # One conversion serves every name that means the same model.
        return encoder if place == Path(name_or_path) else encoder._named(str(name_or_path))

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        dimensions: int | None = None,
        **options: Unpack[Running],
    ) -> Encoder:
        """Open a converted directory, verified against its digests; options as for ``load``.

        Raises:
            DamagedEncoderError: files are missing or do not match their digests.
            ProviderError: an execution provider is missing, or not made for this form.
            DeclarationError: the model does not have so many dimensions.
        """
        return cls._opened(directory, "encoder", dimensions=dimensions, **options)

    @property
    def spec(self) -> EncoderSpec:
        """What decides the encoder's vector space."""
        return self._spec

    @property
    def probe_vectors(self) -> Vectors:
        """Vectors of the probes as measured at conversion, ``(len(PROBES), dimensions)``."""
        return self._probes

    @property
    def dimensions(self) -> int:
        """Width of a vector."""
        return self._spec.dimensions

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by name; ``query`` and ``document`` are empty where the model has none."""
        return {QUERY: "", DOCUMENT: "", **dict(self._spec.prompts)}

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool = False,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Vectors:
        """Vectors of texts.

        Equal texts are encoded once. The vector of a text does not depend on the others beyond
        rounding. Empty texts and white space have vectors too, those of the special tokens alone,
        unless the model's tokenizer adds none; lone surrogates are read as U+FFFD. Texts longer
        than ``max_seq_length`` are cut, counted in ``statistics`` and reported by a warning in the
        log ``sbert_pg.encoder``.

        Args:
            texts: one text or a sequence of them.
            prompt_name: name of a prompt to put before each text; the model's default prompt
                where neither this nor ``prompt`` is given. ``"query"`` also sends the texts through
                the layers that an encoder has for queries alone.
            prompt: text to put before each text.
            normalize: divide each vector by its length.
            progress: called with ``(done, total)`` as chunks are finished.

        Returns:
            float32 of shape ``(len(texts), dimensions)``, or ``(dimensions,)`` for one text.

        Raises:
            EncodingError: something is not a text or has no tokens (``index`` says which), or the
                prompt is unknown.
        """
        if isinstance(texts, str):
            single = self.encode(
                [texts], prompt_name=prompt_name, prompt=prompt, normalize=normalize
            )
            return np.asarray(single[0])
        cleaned = clean(texts)
        chosen = self._prompt(prompt_name, prompt)
        pipeline = self._pipeline.get()
        positions: dict[str, int] = {}
        inverse = [positions.setdefault(text, len(positions)) for text in cleaned]
        unique = list(positions)
        blocks, done = [], 0
        chunks = (unique[i : i + CHUNK] for i in range(0, len(unique), CHUNK))
        output = self._output(prompt_name)
        for vectors in pipeline.blocks(
            chunks, chosen, lambda at: cleaned.index(unique[at]), output
        ):
            blocks.append(self._cut(vectors))
            done += len(vectors)
            if progress is not None:
                progress(len(cleaned) if done == len(unique) else done, len(cleaned))
        matrix = np.concatenate(blocks) if blocks else np.empty((0, self.dimensions), np.float32)
        if len(unique) != len(cleaned):
            matrix = matrix[inverse]
        duplicates = len(cleaned) - len(unique)
        pipeline.counter.add(Statistics(texts=duplicates, duplicates=duplicates))
        return unit(matrix) if normalize else matrix

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
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Iterator[Vector]:
        """Vectors one after the other, in the order of the texts, in bounded memory.

        At most three chunks are held at a time: one being read, one being encoded, one being
        consumed. The texts are read in the caller's thread.

        Args:
            texts: any iterable; it may be endless. Prompts are those of ``encode``.
            chunk_size: texts that are sorted by length together.
            progress: called with ``(done, None)``.
        """
        chosen = self._prompt(prompt_name, prompt)
        done, output = 0, self._output(prompt_name)
        chunks = clean_chunks(texts, chunk_size)
        for vectors in self._pipeline.get().blocks(chunks, chosen, output=output):
            yield from self._cut(vectors)
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
        """``encode`` in a thread, so that an event loop keeps running."""
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
        return self._pipeline.get().tokenizer.count(clean(texts))

    def recomputed_probes(self) -> Vectors:
        """What ``probe_vectors`` are on this machine now; texts without a token have zeros."""
        # Past the counts: one of them is cut on purpose, which needs no warning.
        return self._cut(self._pipeline.get().run_any(clean(PROBES), self._prompt(DOCUMENT, None)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Under the name that it had, which need not be the directory's.
        reopen = partial(type(self).open, dimensions=self.dimensions, **self._arguments)
        return reopen, (self.directory,), {"_spec": self._spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        spec: EncoderSpec = state["_spec"]
        if spec.fingerprint != self._spec.fingerprint:
            raise EncoderMismatchError(
                f"{self.directory} holds another encoder (fingerprint {self._spec.fingerprint}) "
                f"than the one that was pickled, {spec.name!r} (fingerprint {spec.fingerprint}). "
                "Give every machine the same directory."
            )
        self._spec = spec

    def __repr__(self) -> str:
        precision = self.manifest.precision
        return f"<Encoder {self._spec.name!r}, {precision}, {self.dimensions} dimensions>"

    def _cut(self, vectors: Vectors) -> Vectors:
        if vectors.shape[1] == self.dimensions:
            return vectors
        return np.ascontiguousarray(vectors[:, : self.dimensions])

    def _named(self, name: str) -> Encoder:
        self._spec = replace(self._spec, name=name)
        return self

    def _output(self, prompt_name: str | None) -> str:
        return QUERY_OUTPUT if prompt_name == QUERY and self._spec.query_layers else OUTPUT

    def _prompt(self, prompt_name: str | None, prompt: str | None) -> str:
        """The text before every text of a call, decided as sentence-transformers 6.2 decides it."""
        if prompt is None:
            prompts = self.prompts
            if prompt_name is not None and prompt_name not in prompts:
                raise EncodingError(
                    f"There is no prompt named {prompt_name!r}; this encoder has "
                    f"{', '.join(sorted(prompts))}. Pass the text itself as prompt=."
                )
            name = self._spec.default_prompt_name if prompt_name is None else prompt_name
            prompt = prompts.get(name or "", "")
        return clean([prompt])[0]


def load_declared(encoder: EncoderSpec | str) -> Encoder:
    """Load the encoder of a declaration, held against what the declaration says.

    Fewer dimensions than the model has are a statement that its vectors are truncated, and only
    some models bear that. So they are taken where truncation was asked for: of a model known to be
    made for it, or by a spec that comes from a truncated encoder. In any other declaration they are
    a mistake.
    """
    if isinstance(encoder, str):
        return Encoder.load(encoder)
    spec, known = encoder, known_encoder(encoder.name)
    asked = spec.weights_digest is not None or (known is not None and known.matryoshka)
    loaded = Encoder.load(
        spec.name,
        precision=spec.precision,
        dimensions=spec.dimensions if asked else None,
        revision=spec.revision,
    )
    if loaded.dimensions != spec.dimensions:
        raise DeclarationError(
            f"The declaration says that encoder {spec.name!r} has {spec.dimensions} dimensions; it "
            f"has {loaded.dimensions}. Declare dimensions={loaded.dimensions}. Where the model "
            "was trained to be truncated (Matryoshka), ask for that once at startup: "
            f"sbert_pg.use_encoder(Encoder.load({spec.name!r}, dimensions={spec.dimensions}))."
        )
    # A directory may have been made under another name; columns know it by the declared one.
    return loaded._named(spec.name)
