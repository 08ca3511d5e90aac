"""What a graph is written from: the layers of a transformer, pooling, and the layers after it.

Sources of the latter: sentence-transformers ``base/modules`` and
``sentence_transformer/modules/pooling.py``; of the transformers see ``tensors``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder.files import (
    Array,
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
DENSE_ACTIVATIONS: dict[str, Activation] = {
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
#: Activations of the feed-forward part by transformers' name.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": DENSE_ACTIVATIONS["GELU"],
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), ("FastGelu", MICROSOFT, {})),
    "quick_gelu": ("QuickGelu", MICROSOFT, {"alpha": 1.702}),
    "relu": DENSE_ACTIVATIONS["ReLU"],
    **dict.fromkeys(("silu", "swish"), DENSE_ACTIVATIONS["SiLU"]),
    "tanh": DENSE_ACTIVATIONS["Tanh"],
    "sigmoid": DENSE_ACTIVATIONS["Sigmoid"],
}


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A fully connected layer on the pooled vector, its weight ``(out_features, in_features)``."""

    in_features: int
    out_features: int
    activation: str
    weight: npt.NDArray[np.float32] = field(repr=False)
    bias: npt.NDArray[np.float32] | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Normalize:
    """Division by the Euclidean length, at least 1e-12 (``torch.nn.functional.normalize``)."""


def _pooling_modes(settings: Settings) -> list[Any]:
    modes = settings.get("pooling_mode")
    if modes is None:
        return [m for key, m in _POOLING_KEYS.items() if settings.flag(key, False)] or ["mean"]
    return modes if isinstance(modes, list) else [modes]


def read_pooling(settings: Settings, width: int | None) -> tuple[PoolingMode, ...]:
    """Pooling modes in the order of concatenation, for tokens of this width."""
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
    """The layers that follow pooling, from class name and path of each."""
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


def layer_text(layer: Layer) -> str:
    """A layer as text, with a digest of its weights."""
    if isinstance(layer, Normalize):
        return "Normalize"
    weight = layer.scale if isinstance(layer, Norm) else layer.weight
    arrays = [weight] if layer.bias is None else [weight, layer.bias]
    content = b"".join(np.ascontiguousarray(array, dtype="<f4").tobytes() for array in arrays)
    digest = hashlib.sha256(content).hexdigest()[:16]
    if isinstance(layer, Norm):
        return f"LayerNorm({layer.epsilon}, {digest})"
    return f"Dense({layer.in_features}->{layer.out_features}, {layer.activation}, {digest})"


def _sentence_level(settings: Settings) -> None:
    for key in ("module_input_name", "module_output_name"):
        settings.only(key, ["sentence_embedding"], "sentence_embedding")


def torch_class(settings: Settings, key: str, path: str, known: Collection[str]) -> str:
    """The name of a class of torch's, one of those known, from its path in an entry."""
    package, _, name = path.rpartition(".")
    if not package.startswith("torch.") or name not in known:
        settings.only(key, [f"torch.nn.{one}" for one in known])
    return name


def _dense(where: Path, width: int) -> Dense:
    settings = read_json(where / "config.json")
    _sentence_level(settings)
    settings.only("use_residual", [False], False)
    # sentence-transformers falls back to Tanh where the configuration names no activation.
    path = settings.text("activation_function", "torch.nn.modules.activation.Tanh")
    name = torch_class(settings, "activation_function", path, DENSE_ACTIVATIONS)
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


@dataclass(slots=True)
class Linear:
    """``x @ weight + bias``, the weight ``(in, out)``; safetensors have it the other way round."""

    weight: Array
    bias: Array


@dataclass(slots=True)
class Norm:
    """A layer normalisation, RMS where not ``centred``; ``smoothing`` has been divided out, for
    int8.
    """

    scale: Array
    bias: Array
    epsilon: float
    smoothing: Array | None = None
    centred: bool = True


#: What may follow pooling; ``Norm`` in the head of a cross-encoder.
Layer = Dense | Normalize | Norm


@dataclass(slots=True)
class Block:
    """One layer of the transformer.

    Attributes:
        attention_norm: before attention, or after it and its addition; ``None`` for none.
        up: the wide layer of the feed-forward part, activated where there is no ``gate``.
        norm: before the feed-forward part, or after it and its addition.
        window: tokens to each side that a token sees, or ``None`` for all.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    up: Linear
    down: Linear
    norm: Norm
    attention_norm: Norm | None = None
    gate: Linear | None = None
    theta: float | None = None
    window: int | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_end: Norm | None = None
    end: Norm | None = None


@dataclass(slots=True)
class Transformer:
    """What the graph is written from.

    Attributes:
        positions: position embeddings, ``(positions, width)``, or ``None``. Row 0 belongs to the
            first position.
        padding_id: token that is not counted as a position (RoBERTa and MPNet), or ``None`` where
            every token has the position it stands at.
        types: embeddings of the token types, ``(types, width)``; row 0 is in ``words`` where there
            are no ``positions``.
        bias: added to the scores by head and distance, ``(heads, 2 * most + 1)``, the middle being
            distance 0; what is farther away than ``most`` counts as that. Or ``None``.
        blocked: whether attention without a window goes through the queries in blocks, and not
            through onnxruntime's operator, which has no form of these that holds no square.
    """

    words: Array = field(repr=False)
    blocks: list[Block]
    heads: int
    activation: str
    norm: Norm | None = None
    positions: Array | None = field(default=None, repr=False)
    padding_id: int | None = None
    types: Array | None = field(default=None, repr=False)
    projection: Linear | None = None
    bias: Array | None = field(default=None, repr=False)
    norm_first: bool = False
    final_norm: Norm | None = None
    causal: bool = False
    blocked: bool = False
    slower: float = 1.0

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return len(self.blocks[0].output.bias)

    @property
    def head(self) -> int:
        """Width of a head."""
        return len(self.blocks[0].query.bias) // self.heads

    @property
    def shared(self) -> int:
        """Heads that share a key and a value."""
        return len(self.blocks[0].query.bias) // len(self.blocks[0].key.bias)
