"""Layers after pooling, and the files of one module.

Sources: ``Dense`` and ``Normalize`` in sentence-transformers ``base/modules``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError

#: Activations of a Dense layer, by the name of torch's class.
ACTIVATIONS = (
    "Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU", "Mish", "Softplus", "ELU", "LeakyReLU",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A fully connected layer on the pooled vector.

    Attributes:
        in_features: width of its input.
        out_features: width of its output.
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DamagedEncoderError: the file is missing or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedEncoderError(f"{path} is missing; the directory is incomplete.") from error
    except (OSError, ValueError) as error:
        raise DamagedEncoderError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(data, dict):
        raise DamagedEncoderError(f"{path} holds no JSON object.")
    return data


def find_weights(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a module, one or a sharded set.

    Raises:
        UnsupportedEncoderError: the weights are there as pickle only.
        DamagedEncoderError: there are none, or a shard is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = tuple(inside(directory, name) for name in names)
    else:
        files = (directory / "model.safetensors",)
    missing = [file.name for file in files if not file.is_file()]
    if not missing and files:
        return files
    pickled = directory / "pytorch_model.bin"
    if not index.is_file() and pickled.is_file():
        raise UnsupportedEncoderError(
            f"{directory} holds its weights as {pickled.name}, a pickle file, which can run code "
            "when it is read. Take a revision of the model that has model.safetensors, or save it "
            "anew with SentenceTransformer(...).save_pretrained(...) where you trust it."
        )
    raise DamagedEncoderError(
        f"{directory} lacks {', '.join(missing) or 'its weights'}; the directory is incomplete."
    )


def inside(root: Path, name: str) -> Path:
    """A path below ``root``; a model must not point elsewhere.

    Raises:
        UnsupportedEncoderError: it does.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UnsupportedEncoderError(f"{root} names the path {name!r}, which lies outside it.")
    return root / relative


def read_layers(root: Path, modules: Sequence[tuple[str, str]], width: int) -> tuple[Layer, ...]:
    """The layers that follow pooling.

    Args:
        root: the model's directory.
        modules: class name and path of each.
        width: width of the pooled vector.

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
            data = read_json(where / "config.json") if (where / "config.json").is_file() else {}
            _sentence_level(where, data)
            layers.append(Normalize())
        else:
            raise UnsupportedEncoderError(
                f"{root / 'modules.json'} names a module {name!r} after pooling; supported are "
                "Dense and Normalize."
            )
    return tuple(layers)


def _sentence_level(where: Path, data: Mapping[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if data.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedEncoderError(
                f"{where} works on {data[key]!r}; supported are layers on the pooled vector."
            )


def _dense(where: Path, width: int) -> Dense:
    from safetensors.numpy import load_file

    data = read_json(where / "config.json")
    _sentence_level(where, data)
    if data.get("use_residual"):
        raise UnsupportedEncoderError(f"{where} is a Dense layer with a residual connection.")
    # sentence-transformers falls back to Tanh where the configuration names no activation.
    activation = str(data.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, name = activation.rpartition(".")
    if not package.startswith("torch.") or name not in ACTIVATIONS:
        raise UnsupportedEncoderError(
            f"{where} has the activation {activation!r}; supported are torch's "
            f"{', '.join(ACTIVATIONS)}."
        )
    tensors = {
        key: np.asarray(value, dtype=np.float32)
        for file in find_weights(where)
        for key, value in load_file(file).items()
    }
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    shape = (int(data["out_features"]), int(data["in_features"]))
    if weight is None or weight.shape != shape or shape[1] != width:
        raise DamagedEncoderError(
            f"{where} should hold a weight of shape {shape} for vectors of width {width}."
        )
    if bool(data.get("bias", True)) != (bias is not None):
        raise DamagedEncoderError(f"{where} and its weights disagree on whether there is a bias.")
    return Dense(shape[1], shape[0], name, weight, bias)
