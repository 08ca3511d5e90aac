"""Pooling, and the layers after it.

Sources: sentence-transformers ``base/modules`` and ``sentence_transformer/modules/pooling.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder.files import (
    Settings,
    Weights,
    find_weights,
    inside,
    read_if_there,
    read_json,
)
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

#: Older keys of a pooling configuration, in the order in which their vectors are concatenated.
_POOLING_KEYS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLING_MODES: tuple[PoolingMode, ...] = tuple(_POOLING_KEYS.values())

#: Domain of the operators that only onnxruntime has.
MICROSOFT = "com.microsoft"

#: An ONNX operator, its domain, and its attributes.
Activation = tuple[str, str, Mapping[str, Any]]
#: Activations of a Dense layer by the name of torch's class, with its default arguments.
ACTIVATIONS: dict[str, Activation] = {
    "Identity": ("Identity", "", {}),
    "Tanh": ("Tanh", "", {}),
    "ReLU": ("Relu", "", {}),
    "GELU": ("Gelu", MICROSOFT, {}),
    "Sigmoid": ("Sigmoid", "", {}),
    "SiLU": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "Mish": ("Mish", "", {}),
    "Softplus": ("Softplus", "", {}),
    "ELU": ("Elu", "", {"alpha": 1.0}),
    "LeakyReLU": ("LeakyRelu", "", {"alpha": 0.01}),
}


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A fully connected layer on the pooled vector.

    Attributes:
        activation: name of torch's class, one of ``ACTIVATIONS``, with its default arguments.
        weight: float32 of shape ``(out_features, in_features)``.
        bias: float32 of shape ``(out_features,)``, or ``None``.
    """

    in_features: int
    out_features: int
    activation: str
    weight: npt.NDArray[np.float32] = field(repr=False)
    bias: npt.NDArray[np.float32] | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Normalize:
    """Division by the Euclidean length, at least 1e-12 (``torch.nn.functional.normalize``)."""


Layer = Dense | Normalize


def _pooling_modes(settings: Settings) -> list[Any]:
    modes = settings.get("pooling_mode")
    if modes is None:
        return [m for key, m in _POOLING_KEYS.items() if settings.flag(key, False)] or ["mean"]
    return modes if isinstance(modes, list) else [modes]


def read_pooling(settings: Settings, width: int | None) -> tuple[PoolingMode, ...]:
    """Pooling modes, in the order in which their vectors are concatenated.

    Args:
        settings: the module's configuration.
        width: of the token vectors, which the configuration may name; ``None`` leaves that out.

    Raises:
        DamagedEncoderError: it names another width.
        UnsupportedEncoderError: it names no mode, or one that is not implemented.
    """
    modes = _pooling_modes(settings)
    unknown = any(mode not in POOLING_MODES for mode in modes)
    if not modes or unknown or len(modes) > len(POOLING_MODES):
        raise UnsupportedEncoderError(
            f"{settings.path}: 'pooling_mode' is {str(modes)[:80]}; supported are one or "
            f"several of {', '.join(POOLING_MODES)}."
        )
    for key in ("embedding_dimension", "word_embedding_dimension"):
        if width is not None and settings.integer(key, width) != width:
            raise DamagedEncoderError(
                f"{settings.path} pools vectors of width {settings[key]} ({key!r}); the "
                f"transformer gives {width}."
            )
    return tuple(modes)


def read_layers(root: Path, modules: Sequence[tuple[str, str]], width: int) -> tuple[Layer, ...]:
    """The layers that follow pooling.

    Args:
        root: the model's directory.
        modules: class name and path of each.

    Raises:
        DamagedEncoderError: files are missing or contradict each other.
        UnsupportedEncoderError: a layer asks for something that is not implemented.
    """
    layers: list[Layer] = []
    for name, path in modules:
        where = inside(root, path)
        if name == "Dense":
            dense = _dense(where, width)
            layers.append(dense)
            width = dense.out_features
        elif name == "Normalize":
            _sentence_level(read_if_there(where / "config.json"))
            layers.append(Normalize())
        else:
            raise UnsupportedEncoderError(
                f"{root / 'modules.json'} names a module {name!r} after pooling; supported are "
                "Dense and Normalize."
            )
    return tuple(layers)


def layer_settings(root: Path, modules: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """All that the layers' own configuration files say, what is ignored on purpose included."""
    return [dict(read_if_there(inside(root, path) / "config.json")) for _, path in modules]


def layer_text(layer: Layer) -> str:
    """A layer as text, with a digest of its weights."""
    if not isinstance(layer, Dense):
        return "Normalize"
    digest = hashlib.sha256(np.ascontiguousarray(layer.weight, dtype="<f4").tobytes())
    if layer.bias is not None:
        digest.update(np.ascontiguousarray(layer.bias, dtype="<f4").tobytes())
    size = f"{layer.in_features}->{layer.out_features}"
    return f"Dense({size}, {layer.activation}, {digest.hexdigest()[:16]})"


def _sentence_level(settings: Settings) -> None:
    for key in ("module_input_name", "module_output_name"):
        settings.only(key, ["sentence_embedding"], "sentence_embedding")


def _dense(where: Path, width: int) -> Dense:
    settings = read_json(where / "config.json")
    _sentence_level(settings)
    settings.only("use_residual", [False], False)
    # sentence-transformers falls back to Tanh where the configuration names no activation.
    activation = settings.text("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, name = activation.rpartition(".")
    if not package.startswith("torch.") or name not in ACTIVATIONS:
        settings.only("activation_function", [f"torch.nn.{known}" for known in ACTIVATIONS])
    inputs, outputs = settings.integer("in_features"), settings.integer("out_features")
    if inputs != width:
        settings.refuse("in_features", f"{width}, the width of what comes before")
    weights = Weights(find_weights(where))
    has_bias = settings.flag("bias", True)
    if has_bias != ("linear.bias" in weights):
        raise DamagedEncoderError(f"{where} and its weights disagree on whether there is a bias.")
    weight = weights.get("linear.weight", (outputs, inputs))
    bias = weights.get("linear.bias", (outputs,)) if has_bias else None
    return Dense(inputs, outputs, name, weight, bias)
