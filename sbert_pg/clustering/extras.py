"""What the extra ``clustering`` brings, imported at its first use."""

from __future__ import annotations

import importlib
from typing import Any

from sbert_pg.errors import MissingExtraError

_PACKAGES = {"sklearn": "scikit-learn", "umap": "umap-learn"}


def need(module: str, purpose: str, extra: str = "clustering") -> Any:
    """Import a module of an optional dependency.

    Raises:
        MissingExtraError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        raise MissingExtraError(_PACKAGES.get(root, root), extra, purpose) from error
