"""The encoders of this process, by name.

The database side never imports the encoder wing: it asks here for the encoder that a column names,
and an encoder is loaded, and its wing imported, at the first text that needs one. Within a
statement it encodes beside the event loop, and a query once, however often it comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from sbert_pg.distance import Similarity
from sbert_pg.errors import DeclarationError, EncoderNotFoundError, SbertPgError
from sbert_pg.probes import PROBES
from sbert_pg.process import ProcessLock
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors, canonical_name, vectors_of

T = TypeVar("T")
#: Loads the encoder of a declaration, or of a name alone.
Loader = Callable[["EncoderSpec | str"], TextEncoder]

# A process that forks while one of its threads loads an encoder must not hand the lock down.
_lock = ProcessLock()
#: Put into use by the application, by name and dimensions: for every column that names one.
_used: dict[tuple[str, int], TextEncoder] = {}
#: Loaded for declarations, by their precision too, ``None`` for what suits the machine.
_loaded: dict[tuple[str, int, str | None], TextEncoder] = {}

#: Queries kept for each encoder; at 384 dimensions they take about 2 MB.
RECENT = 1024

# Not the lock of loading, which may be held for minutes.
_recent_lock = ProcessLock()
_recent: WeakKeyDictionary[TextEncoder, OrderedDict[str, Vectors]] = WeakKeyDictionary()


def _load_declared(encoder: EncoderSpec | str) -> TextEncoder:
    """Load an encoder; ``load_declared`` imports onnxruntime when a session is opened."""
    from sbert_pg.encoder import load_declared

    return load_declared(encoder)


#: ``None`` in tests, for a process that can load nothing.
_loader: Loader | None = _load_declared


def use_encoder(encoder: TextEncoder, *, name: str | None = None) -> TextEncoder:
    """Use this encoder, in this process, for every column that names it, in whatever precision.

    Args:
        name: the name under which columns declare it; its own name by default.

    Returns:
        The encoder, for chaining.
    """
    if isinstance(encoder, str):
        raise DeclarationError(
            f"use_encoder() takes an encoder, and got the text {encoder!r}. A column's encoder is "
            f"loaded by its name; to load it now: use_encoder(Encoder.load({encoder!r}))."
        )
    key = canonical_name(name or encoder.spec.name), encoder.spec.dimensions
    with _lock:
        _used[key] = encoder
    return encoder


def forget_encoders() -> None:
    """Forget every encoder of this process, registered or loaded."""
    with _lock:
        _used.clear()
        _loaded.clear()


def find_encoder(spec: EncoderSpec) -> TextEncoder | None:
    """The encoder that a declaration names, if it is registered or loaded already."""
    key = canonical_name(spec.name), spec.dimensions
    return _used.get(key) or _loaded.get((*key, spec.precision))


def find_named(name: str) -> TextEncoder | None:
    """An encoder registered or loaded under a name, whatever its dimensions; the first one."""
    own = canonical_name(name)
    both = [*_used.items(), *_loaded.items()]
    return next((encoder for key, encoder in both if key[0] == own), None)


def token_counter(name: str) -> Any | None:
    """What counts tokens as the encoder of a name does (``count_tokens``, ``spec``), if at hand.

    The encoder itself where this process has it; else the tokenizer of one that was converted on
    this machine. Nothing is fetched or converted, and one that is damaged counts as none: whoever
    loads it gets that error.
    """
    encoder = find_named(name)
    if encoder is not None or _loader is not _load_declared:
        return encoder
    from sbert_pg.encoder import TokenCounter, converted_here

    try:
        place = converted_here(name)
        return None if place is None else TokenCounter(place)
    except (SbertPgError, OSError, ValueError):
        return None


def get_encoder(encoder: str | EncoderSpec) -> TextEncoder:
    """The encoder of a name or declaration: registered, or loaded now and kept.

    Args:
        encoder: a name as ``Encoder.load`` takes it, or the spec of a declaration.

    Raises:
        EncoderNotFoundError: nothing is registered under the name and nothing can be loaded.
        EncoderError: it cannot be loaded; the message says why.
    """
    known = _find(encoder)
    if known is not None:
        return known
    name = encoder if isinstance(encoder, str) else encoder.name
    with _lock:
        known = _find(encoder)
        if known is not None:
            return known
        if _loader is None:
            raise EncoderNotFoundError(
                f"No encoder {name!r} is registered in this process. Register one with "
                "sbert_pg.use_encoder(encoder)."
            )
        loaded = _loader(encoder)
        precision = None if isinstance(encoder, str) else encoder.precision
        _loaded[canonical_name(name), loaded.spec.dimensions, precision] = loaded
        return loaded


def _find(encoder: str | EncoderSpec) -> TextEncoder | None:
    return find_named(encoder) if isinstance(encoder, str) else find_encoder(encoder)


class _FunctionEncoder:
    """What ``encoder_of`` returns."""

    def __init__(
        self, spec: EncoderSpec, document: Callable[..., Any], query: Callable[..., Any]
    ) -> None:
        self.spec = spec
        self._document, self._query = document, query

    @cached_property
    def probe_vectors(self) -> Vectors:
        return self.encode_document(PROBES)

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        return self._vectors(self._query, texts)

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        return self._vectors(self._document, texts)

    def _vectors(self, function: Callable[..., Any], texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.empty((0, self.spec.dimensions), dtype=np.float32)
        # Services refuse a text that is empty.
        return vectors_of(self.spec, function([text or " " for text in texts]), len(texts))


def encoder_of(
    function: Callable[[list[str]], Any],
    *,
    name: str,
    dimensions: int,
    query: Callable[[list[str]], Any] | None = None,
    similarity: Similarity = "cosine",
    version: str = "",
) -> TextEncoder:
    """An encoder from any function, such as a client of a service; for ``use_encoder``.

    Columns that name it are bound to what the function computes: another function under the same
    name is refused where its vectors differ.

    Args:
        function: takes a list of texts and returns their vectors, an array of shape
            ``(len(texts), dimensions)`` or lists; safe to call from several threads. It never gets
            an empty text, but a blank in its place. What it raises is passed on.
        name: the name under which columns declare it.
        dimensions: width of its vectors.
        query: the same for search queries, where they are encoded in another way.
        similarity: the similarity function that its vectors are made for.
        version: what else decides the vectors, such as the version of the service's model.

    Raises:
        DeclarationError: the function is a coroutine function, or a declaration makes no sense.
    """
    for each in (function, query):
        if each is not None and (not callable(each) or inspect.iscoroutinefunction(each)):
            raise DeclarationError(
                f"encoder_of() takes a function that returns vectors, and {each!r} is none. Give "
                "one that is not asynchronous: it is called in a thread where the application is."
            )

    def digest(part: str) -> str:
        return hashlib.sha256(f"{part}\0{name}\0{version}".encode()).hexdigest()

    spec = EncoderSpec(
        name=name,
        dimensions=dimensions,
        similarity=similarity,
        precision="function",
        weights_digest=digest("weights"),
        tokenizer_digest=digest("tokenizer"),
    )
    return _FunctionEncoder(spec, function, query or function)


def query_vector(spec: EncoderSpec, text: str) -> Vectors:
    """The vector of one query, float32 of shape ``(dimensions,)``; see ``query_vectors``."""
    return query_vectors(spec, [text])[0]


def _encoded(spec: EncoderSpec, encoder: TextEncoder, texts: list[str]) -> dict[str, Vectors]:
    vectors: dict[str, Vectors] = {}
    output = off_loop(lambda: encoder.encode_query(texts))
    for text, vector in zip(texts, vectors_of(spec, output, len(texts)), strict=True):
        # A copy each, so that one that is kept does not keep its whole batch.
        vectors[text] = vector.copy()
        vectors[text].setflags(write=False)
    return vectors


def query_vectors(spec: EncoderSpec, texts: Sequence[str]) -> list[Vectors]:
    """The vectors of queries, read-only float32, from the cache or encoded now in one batch."""
    encoder = find_encoder(spec) or off_loop(lambda: get_encoder(spec))
    vectors: dict[str, Vectors] = {}
    with _recent_lock:
        recent = _recent.setdefault(encoder, OrderedDict())
        for text in texts:
            vector = recent.get(text)
            if vector is not None:
                vectors[text] = vector
                recent.move_to_end(text)
    missing = [text for text in dict.fromkeys(texts) if text not in vectors]
    if missing:
        # Outside the lock: two threads may encode the same text, and neither waits for the other.
        vectors |= _encoded(spec, encoder, missing)
        with _recent_lock:
            recent.update((text, vectors[text]) for text in missing)
            while len(recent) > RECENT:
                recent.popitem(last=False)
    return [vectors[text] for text in texts]


def off_loop(work: Callable[[], T]) -> T:
    """Call ``work`` here; from a statement of an ``AsyncSession``, in a thread, beside its loop."""
    if not _in_coroutine():
        return work()
    from sqlalchemy.util import await_only

    result: T = await_only(asyncio.to_thread(work))
    return result


def wait_for(future: Future[T]) -> T:
    """The result of a future, without stopping an event loop meanwhile."""
    if not _in_coroutine():
        return future.result()
    from sqlalchemy.util import await_only

    result: T = await_only(asyncio.wrap_future(future))
    return result


def _in_coroutine() -> bool:
    # Without greenlet nothing asynchronous of SQLAlchemy's can be under way.
    if "greenlet" not in sys.modules:
        return False
    from sqlalchemy.util.concurrency import in_greenlet

    return in_greenlet()
