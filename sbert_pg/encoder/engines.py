"""What runs a converted graph: engines, and the execution providers of onnxruntime.

onnxruntime runs every form but ``bf16``. Of its providers only the CPU's has the operators of int8;
CUDA's has onnxruntime's attention, and multiplies fastest in half precision; the others are given
plain operators. OpenVINO (extra ``openvino``) reads the same file, runs ``fp32`` and ``int8`` too,
and multiplies in bfloat16 where the processor does.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbert_pg.errors import (
    DamagedEncoderError,
    DeclarationError,
    ProviderError,
    UnsupportedEncoderError,
    needing,
)

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger("sbert_pg.encoder")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
#: Names of providers, where none are given in code; separated by commas.
PROVIDERS_VARIABLE = "SBERT_PG_PROVIDERS"

#: A provider's name, or its name and onnxruntime's options for it (``device_id``...).
Provider = str | tuple[str, Mapping[str, Any]]

#: fp32 means fp32: by default onnxruntime multiplies with the ten bits of TF32.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {CUDA: {"use_tf32": "0"}}


@dataclass(frozen=True, slots=True)
class Providers:
    """Execution providers in order of preference: name and options of each, at least one."""

    chosen: tuple[tuple[str, Mapping[str, Any]], ...]

    @classmethod
    def of(cls, providers: Sequence[Provider] | None) -> Providers:
        """Those that are passed; else those of ``$SBERT_PG_PROVIDERS``; else the CPU's."""
        if not providers:
            listed = os.environ.get(PROVIDERS_VARIABLE, "").split(",")
            providers = [name.strip() for name in listed if name.strip()] or [CPU]
        pairs = [(one, {}) if isinstance(one, str) else (one[0], one[1]) for one in providers]
        return cls(tuple((name, {**_OPTIONS.get(name, {}), **set_}) for name, set_ in pairs))

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [name for name, _ in self.chosen]

    @property
    def on_gpu(self) -> bool:
        """Whether batches are to be large and run one at a time."""
        return self.names[0] == CUDA

    @property
    def precision(self) -> str:
        """The form that is fastest on the first of them, its vectors within noise of fp32's."""
        return {CPU: "int8", CUDA: "fp16"}.get(self.names[0], "fp32-plain")

    def require_suited(self, path: Path, precision: str) -> None:
        """Refuse a form that would run on the CPU after all, and slowly."""
        if precision.startswith(("int8", "bf16")) and self.names[0] != CPU:
            raise ProviderError(
                f"{path} holds an encoder in {precision}, which is made for the CPU alone. For "
                f"{self.names[0]} load the model from its own directory or name, with "
                f"precision={self.precision!r} or none."
            )

    def open(self, path: Path) -> onnxruntime.InferenceSession:
        """A session of a model, each of its operators on one thread."""
        onnxruntime = load_onnxruntime()
        self._require_available(onnxruntime.get_available_providers())
        if CUDA in self.names:
            _find_cuda()
        try:
            session = onnxruntime.InferenceSession(
                os.fspath(path),
                sess_options=_options(),
                providers=[(name, dict(options)) for name, options in self.chosen],
            )
        # onnxruntime's exceptions have no common base below Exception.
        except Exception as error:
            if set(self.names) != {CPU}:
                raise ProviderError(
                    f"{', '.join(self.names)} cannot run {path}: {error}. Its driver or libraries "
                    "may be missing or of another version, or it may lack an operator of this "
                    "form: precision='fp32-plain' has only those that every provider knows."
                ) from error
            raise DamagedEncoderError(
                f"onnxruntime cannot open {path}: {error}. Convert the encoder again."
            ) from error
        lost = [name for name in self.names if name not in session.get_providers()]
        if lost:
            raise ProviderError(
                f"{', '.join(lost)} is part of this onnxruntime but does not start here; its "
                "driver or its libraries are missing or of another version. Those of CUDA come "
                "with pip install 'onnxruntime-gpu[cuda,cudnn]'."
            )
        return session

    def _require_available(self, available: Sequence[str]) -> None:
        missing = [name for name in self.names if name not in available]
        if missing:
            raise ProviderError(
                f"This onnxruntime has no {', '.join(missing)}; it has {', '.join(available)}. "
                f"{CUDA} comes with the package onnxruntime-gpu[cuda,cudnn], "
                "OpenVINOExecutionProvider with onnxruntime-openvino, each in place of "
                "onnxruntime, which has to be uninstalled first."
            )


def load_onnxruntime() -> Any:
    """onnxruntime, with its telemetry off; every session of this library is opened through here.

    It takes a fifth of a second to import, and not every process encodes.
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


#: Flags of a processor by which one engine may be faster than another.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def _facts(cpuinfo: Path) -> dict[str, str]:
    """What the system says of the first core; nothing where it is not Linux."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in reversed(lines)}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The kind of processor: its name and what it multiplies with, as far as the system says."""
    facts = _facts(cpuinfo)
    flags = facts.get("flags", "").split()
    name = facts.get("model name") or f"{platform.machine()} {facts.get('CPU part', '')}".strip()
    return " ".join([name, *(flag for flag in _FLAGS if flag in flags)])


def lacks_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is an x86 processor without exact 8-bit products (VNNI).

    Where the flags cannot be read (not on Linux), x86 is taken to lack them: right and slower.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(_facts(cpuinfo).get("flags", "").split())


def _options() -> onnxruntime.SessionOptions:
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if lacks_vnni():
        # Products of uint8 and int8 overflow 16 bits there; onnxruntime has a form that does not.
        # With VNNI it must not be asked for: it halves the speed.
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Errors are raised; warnings about the graph do not help a user.
    options.log_severity_level = 3
    return options


def _find_cuda() -> None:
    """Load CUDA's libraries from where pip put them, where the linker does not look."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):  # From 1.21 on.
        said = io.StringIO()
        # It prints what it does not find, which the linker may find all the same.
        with contextlib.redirect_stdout(said):
            onnxruntime.preload_dlls()
        if said.getvalue():
            logger.debug("Looking for CUDA's libraries: %s", said.getvalue().strip())


ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
#: The engine, where none is named in code.
ENGINE_VARIABLE = "SBERT_PG_ENGINE"

#: Forms that each engine runs; the first engine of a form makes its probes.
_FORMS: Mapping[str, frozenset[str]] = {
    ONNXRUNTIME: frozenset({"fp32", "int8", "fp16", "fp32-plain"}),
    OPENVINO: frozenset({"fp32", "int8", "bf16", "fp32-plain"}),
}


def able(precision: str, providers: Providers) -> list[str]:
    """Engines that run a form, installed or not, the first of them the usual one.

    Execution providers are onnxruntime's, so on any but the CPU it is the only one.
    """
    engines = [name for name, forms in _FORMS.items() if precision in forms]
    return engines if providers.names == [CPU] else [ONNXRUNTIME]


def installed(engine: str) -> bool:
    """Whether an engine can be imported."""
    return find_spec(engine) is not None


def versions() -> dict[str, str]:
    """The engines that are installed and their versions: another one may have another speed."""
    # onnxruntime is in several packages, and imported in any case.
    found = {ONNXRUNTIME: str(load_onnxruntime().__version__)}
    if installed(OPENVINO):
        with contextlib.suppress(PackageNotFoundError):  # A build of one's own.
            found[OPENVINO] = version(OPENVINO)
    return found


def asked_for(engine: str | None, precision: str, providers: Providers) -> str | None:
    """The engine that a caller names, else ``$SBERT_PG_ENGINE``, else ``None``."""
    engine = engine or os.environ.get(ENGINE_VARIABLE) or None
    if engine is None:
        return None
    if engine not in _FORMS:
        raise DeclarationError(f"There is no engine {engine!r}; there are {', '.join(_FORMS)}.")
    engines = able(precision, providers)
    if engine not in engines:
        raise ProviderError(
            f"{engine} does not run an encoder in {precision} on {', '.join(providers.names)}; "
            f"{' and '.join(engines)} can. Leave engine= (or {ENGINE_VARIABLE}) out, or ask for "
            "another precision."
        )
    return engine


def compile_graph(
    engine: str, path: Path, precision: str, threads: int, providers: Providers
) -> tuple[Compiled | onnxruntime.InferenceSession, set[str], dict[str, Any]]:
    """A graph made ready by an engine for so many calls at a time, each in its caller's thread.

    With the names of its inputs, and of its outputs with their widths, which are no numbers where
    they are not fixed.
    """
    if engine == OPENVINO:
        compiled = Compiled(path, precision, threads)
        return compiled, compiled.inputs, compiled.outputs
    session = providers.open(path)
    outputs = {value.name: value.shape[-1] for value in session.get_outputs()}
    return session, {value.name for value in session.get_inputs()}, outputs


def load_openvino() -> Any:
    """OpenVINO, which takes a third of a second to import."""
    with needing("openvino", OPENVINO, "run an encoder with OpenVINO"):
        import openvino
    return openvino


class Compiled:
    """A graph in OpenVINO, which is run as onnxruntime's session is.

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
        self.inputs = {port.get_any_name() for port in self._graph.inputs}
        widths = {p.get_any_name(): p.get_partial_shape()[-1] for p in self._graph.outputs}
        self.outputs = {name: w.get_length() if w.is_static else w for name, w in widths.items()}
        # The last one first: a shape that it has just run costs it less.
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        self._idle.put(first)
        self._left = threads - 1
        self._lock = threading.Lock()

    def run(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """As of onnxruntime's session."""
        request = self._take()
        try:
            request.infer(dict(feeds), share_inputs=True, share_outputs=True)
            return [request.get_tensor(name).data.copy() for name in names]
        finally:
            self._idle.put(request)

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
