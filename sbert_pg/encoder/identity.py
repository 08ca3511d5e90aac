"""Digests of what decides a vector space, independent of how files are laid out.

The digest of the weights is taken over the tensors that the computation uses, as float32 and under
names without the wrapper's prefix, so that a repository saved twice, sharded or with its unused
heads has one digest. That of the tokenizer is taken over its content without truncation and
padding, which are settings of a call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder.description import Dense, Description, Layer

#: Parts of a checkpoint that the token embeddings do not depend on.
_UNUSED = ("pooler.", "position_ids", "lm_head", "cls.", "vocab_projector", "vocab_transform",
           "vocab_layer_norm", "qa_outputs", "classifier")  # fmt: skip
#: Names under which a checkpoint of a task model holds its transformer.
_PREFIXES = ("bert.", "roberta.", "distilbert.", "mpnet.", "camembert.", "electra.", "model.")


def plain_name(name: str) -> str:
    """A tensor's name without the prefix of a wrapping model."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def is_used(name: str) -> bool:
    """Whether the token embeddings depend on the tensor of this (plain) name."""
    return not any(part in name for part in _UNUSED)


def weights_digest(description: Description) -> str:
    """SHA-256 of the transformer's weights, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    located = {}
    for file in description.weights:
        for name in _tensor_names(file):
            if is_used(plain_name(name)):
                located[plain_name(name)] = (file, name)
    for name, (file, stored) in sorted(located.items()):
        tensor = _read(file, stored)
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
    return digest.hexdigest()[:32]


def tokenizer_digest(tokenizer: Mapping[str, Any]) -> str:
    """SHA-256 of a tokenizer, given as the content of its ``tokenizer.json``; 32 digits."""
    content = {key: value for key, value in tokenizer.items() if key not in _CALL_SETTINGS}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


_CALL_SETTINGS = frozenset({"truncation", "padding", "version", "decoder"})


def layer_text(layer: Layer) -> str:
    """A layer after pooling as text, with a digest of its weights."""
    if not isinstance(layer, Dense):
        return "Normalize"
    digest = hashlib.sha256(np.ascontiguousarray(layer.weight, dtype="<f4").tobytes())
    if layer.bias is not None:
        digest.update(np.ascontiguousarray(layer.bias, dtype="<f4").tobytes())
    size = f"{layer.in_features}->{layer.out_features}"
    return f"Dense({size}, {layer.activation}, {digest.hexdigest()[:16]})"


def _tensor_names(file: Path) -> Iterator[str]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        yield from tensors.keys()


def _read(file: Path, name: str) -> npt.NDArray[np.float32]:
    """One tensor as float32; bfloat16, which numpy lacks, is widened by hand."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        part = tensors.get_slice(name)
        if part.get_dtype() == "BF16":
            shape: list[int] = part.get_shape()
            return _bfloat16(file, name).reshape(shape)
        return np.asarray(tensors.get_tensor(name), dtype=np.float32)


def _bfloat16(file: Path, name: str) -> npt.NDArray[np.float32]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(size))[name]["data_offsets"]
        stream.seek(8 + size + begin)
        half = np.frombuffer(stream.read(end - begin), dtype="<u2")
    return (half.astype(np.uint32) << 16).view(np.float32)
