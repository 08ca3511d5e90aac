"""Engines: what runs a converted graph.

onnxruntime runs every form but ``bf16``. OpenVINO (extra ``openvino``) reads the same file, runs
``fp32`` and ``int8`` too, and multiplies in bfloat16 where the processor does.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sbert_pg.encoder.providers import CPU, Providers
from sbert_pg.errors import DeclarationError, ProviderError, UnsupportedEncoderError, needing

ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
#: The engine, where none is named in code.
VARIABLE = "SBERT_PG_ENGINE"

#: Forms that each engine runs; the first engine of a form makes its probes.
_FORMS: Mapping[str, frozenset[str]] = {
    ONNXRUNTIME: frozenset({"fp32", "int8", "fp16", "fp32-plain"}),
    OPENVINO: frozenset({"fp32", "int8", "bf16", "fp32-plain"}),
}


class Session(Protocol):
    """A graph that is ready to run; onnxruntime's own class has this shape."""

    def run(self, names: Sequence[str], feeds: Mapping[str, Any]) -> Sequence[Any]:
        """The outputs of these names; any number of threads may call it."""

    def get_inputs(self) -> Sequence[Any]:
        """Inputs of the graph, each with a ``name``."""

    def get_outputs(self) -> Sequence[Any]:
        """Outputs of the graph, each with a ``name`` and a ``shape``."""


def able(precision: str, providers: Providers) -> list[str]:
    """Engines that run a form, installed or not, the first of them the usual one.

    Execution providers are onnxruntime's, so on any but the CPU it is the only one.
    """
    engines = [name for name, forms in _FORMS.items() if precision in forms]
    return engines if providers.names == [CPU] else [ONNXRUNTIME]


def installed(engine: str) -> bool:
    """Whether an engine can be imported."""
    return find_spec(engine) is not None


def asked_for(engine: str | None, precision: str, providers: Providers) -> str | None:
    """The engine that a caller names, else ``$SBERT_PG_ENGINE``, else ``None``.

    Raises:
        DeclarationError: there is no such engine.
        ProviderError: it does not run this form, or not with these execution providers.
    """
    engine = engine or os.environ.get(VARIABLE) or None
    if engine is None:
        return None
    if engine not in _FORMS:
        raise DeclarationError(f"There is no engine {engine!r}; there are {', '.join(_FORMS)}.")
    engines = able(precision, providers)
    if engine not in engines:
        raise ProviderError(
            f"{engine} does not run an encoder in {precision} on {', '.join(providers.names)}; "
            f"{' and '.join(engines)} can. Leave engine= (or {VARIABLE}) out, or ask for another "
            "precision."
        )
    return engine


def compile_graph(
    engine: str, path: Path, precision: str, threads: int, providers: Providers
) -> Session:
    """A graph made ready by one engine.

    Args:
        threads: how many calls run at the same time; each of them runs in its caller's thread.
        providers: onnxruntime's execution providers.

    Raises:
        MissingExtraError: the engine is not installed.
        ProviderError: an execution provider is missing or does not start.
        DamagedEncoderError: the file cannot be read as a model.
        UnsupportedEncoderError: OpenVINO does not know an operator of it.
    """
    if engine == OPENVINO:
        return Compiled(path, precision, threads)
    session: Session = providers.open(path)
    return session


def load_openvino() -> Any:
    """OpenVINO, which takes a third of a second to import.

    Raises:
        MissingExtraError: it is not installed.
    """
    with needing("openvino", OPENVINO, "run an encoder with OpenVINO"):
        import openvino
    return openvino


class Value(NamedTuple):
    """An input or output: its name and its shape, ``None`` for what is not fixed."""

    name: str
    shape: list[int | None]


class Compiled:
    """A graph in OpenVINO, with the shape of onnxruntime's session.

    OpenVINO's own threads (its streams) would not survive a fork: a child hangs when it drops what
    it inherited, or aborts at its end. Without streams a graph runs in the thread that calls it,
    one call at a time. So there are as many compiled copies as calls may run at once, each made
    when it is first needed. A child makes its own.
    """

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        openvino = load_openvino()
        hint = "bf16" if precision == "bf16" else "f32"
        self._options = {
            "INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 0, "INFERENCE_NUM_THREADS": 1,
        }  # fmt: skip
        self._core = openvino.Core()
        try:
            self._graph = self._core.read_model(os.fspath(path))
            first = self._compile()
        except RuntimeError as error:
            # A damaged file is recognised by its digest, so this is one that it does not know.
            raise UnsupportedEncoderError(
                f"OpenVINO cannot run {path}: {error}. Use engine={ONNXRUNTIME!r}, which runs it "
                "in any precision but bf16."
            ) from error
        # The last one first: a shape that it has just run costs it less.
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        self._idle.put(first)
        self._left = threads - 1
        self._lock = threading.Lock()

    def run(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """See ``Session``."""
        request = self._take()
        try:
            request.infer(dict(feeds), share_inputs=True, share_outputs=True)
            return [request.get_tensor(name).data.copy() for name in names]
        finally:
            self._idle.put(request)

    def get_inputs(self) -> list[Value]:
        """See ``Session``."""
        return [_value(port) for port in self._graph.inputs]

    def get_outputs(self) -> list[Value]:
        """See ``Session``."""
        return [_value(port) for port in self._graph.outputs]

    def _take(self) -> Any:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            if more := self._left > 0:
                self._left -= 1
        return self._compile() if more else self._idle.get()

    def _compile(self) -> Any:
        return self._core.compile_model(self._graph, "CPU", self._options).create_infer_request()


def _value(port: Any) -> Value:
    sizes = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
    return Value(port.get_any_name(), sizes)
