"""Activations as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable

from sbert_pg.encoder.convert.writer import MICROSOFT, Writer


def _gelu(writer: Writer, x: str) -> str:
    return writer.node("Gelu", [x], "gelu", domain=MICROSOFT)


def _gelu_tanh(writer: Writer, x: str) -> str:
    return writer.node("FastGelu", [x], "gelu", domain=MICROSOFT)


def _silu(writer: Writer, x: str) -> str:
    return writer.node("QuickGelu", [x], "silu", domain=MICROSOFT, alpha=1.0)


def _quick_gelu(writer: Writer, x: str) -> str:
    return writer.node("QuickGelu", [x], "quick_gelu", domain=MICROSOFT, alpha=1.702)


def _mish(writer: Writer, x: str) -> str:
    softplus = writer.node("Softplus", [x])
    return writer.node("Mul", [x, writer.node("Tanh", [softplus])], "mish")


def _plain(op: str) -> Callable[[Writer, str], str]:
    def apply(writer: Writer, x: str) -> str:
        return writer.node(op, [x])

    return apply


def _elu(writer: Writer, x: str) -> str:
    return writer.node("Elu", [x], alpha=1.0)


def _leaky_relu(writer: Writer, x: str) -> str:
    # ONNX has the same default as torch; said here since it decides the vectors.
    return writer.node("LeakyRelu", [x], alpha=0.01)


def _identity(writer: Writer, x: str) -> str:
    return x


#: By transformers' name (in lower case) and by torch's class (of Dense layers).
_ACTIVATIONS: dict[str, Callable[[Writer, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _plain("Relu"),
    "silu": _silu,
    "swish": _silu,
    "tanh": _plain("Tanh"),
    "sigmoid": _plain("Sigmoid"),
    "Identity": _identity,
    "Tanh": _plain("Tanh"),
    "ReLU": _plain("Relu"),
    "GELU": _gelu,
    "Sigmoid": _plain("Sigmoid"),
    "SiLU": _silu,
    "Mish": _mish,
    "Softplus": _plain("Softplus"),
    "ELU": _elu,
    "LeakyReLU": _leaky_relu,
}


def activate(writer: Writer, x: str, name: str) -> str:
    """``name`` applied to ``x``; the names are those of transformers and of torch's classes."""
    return _ACTIVATIONS[name](writer, x)
