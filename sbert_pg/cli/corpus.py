"""A corpus that every machine with Python has: the docstrings of the standard library.

The files are parsed, never imported, so collecting them runs nothing.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Parts of the library that nobody asks questions about.
_LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "idle_test",
     "__pycache__", "ensurepip", "encodings", "distutils"}
)  # fmt: skip
#: Shorter docstrings ("See base class.") say nothing that could be searched.
_LEAST_CHARACTERS = 20


@dataclass(frozen=True, slots=True)
class Documented:
    """A function, method or class of the standard library.

    Attributes:
        module: dotted name of its module.
        name: qualified name inside the module.
        signature: its parameters as written, empty for a class without ``__init__``.
        docstring: its documentation, unindented.
    """

    module: str
    name: str
    signature: str
    docstring: str


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
