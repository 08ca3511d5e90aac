"""The encoders of this process, by name.

The database side never imports the encoder wing: it asks here for the encoder that a column names,
and an encoder is loaded at the first text that needs one. ``sbert_pg/__init__.py`` joins the two by
setting the loader.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sbert_pg.errors import EncoderNotFoundError
from sbert_pg.spec import EncoderSpec, TextEncoder

Loader = Callable[[EncoderSpec], TextEncoder]

_lock = threading.RLock()
_encoders: dict[tuple[str, int], TextEncoder] = {}
_loader: Loader | None = None
_guards: tuple[Callable[..., Any] | None, Callable[..., Any] | None] = (None, None)


def set_loader(loader: Loader | None) -> None:
    """Set how an encoder that was not registered is loaded."""
    global _loader
    _loader = loader


def set_guards(check: Callable[..., Any] | None, attest: Callable[..., Any] | None) -> None:
    """Set what ``types.guard`` starts with when it is imported; see ``guard.Check`` and ``Attest``.

    It stands here because importing the guard, and SQLAlchemy with it, is not for a process that
    only encodes.
    """
    global _guards
    _guards = (check, attest)


def guards() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """What ``set_guards`` was given."""
    return _guards


def use_encoder(encoder: TextEncoder, *, name: str | None = None) -> TextEncoder:
    """Use this encoder, in this process, for every column that names it.

    Args:
        encoder: the encoder.
        name: the name under which columns declare it; its own name by default.

    Returns:
        The encoder, for chaining.
    """
    with _lock:
        _encoders[name or encoder.spec.name, encoder.spec.dimensions] = encoder
    return encoder


def forget_encoders() -> None:
    """Forget every encoder of this process, registered or loaded."""
    with _lock:
        _encoders.clear()


def find_encoder(spec: EncoderSpec) -> TextEncoder | None:
    """The encoder that a declaration names, if it is registered or loaded already."""
    return _encoders.get((spec.name, spec.dimensions))


def find_named(name: str) -> TextEncoder | None:
    """An encoder registered or loaded under a name, whatever its dimensions; the first one."""
    return next((found for (known, _), found in _encoders.items() if known == name), None)


def get_encoder(spec: EncoderSpec) -> TextEncoder:
    """The encoder that a declaration names: registered, or loaded now and kept.

    Raises:
        EncoderNotFoundError: nothing is registered under the name and nothing can be loaded.
        EncoderError: it cannot be loaded; the message says why.
    """
    key = (spec.name, spec.dimensions)
    found = _encoders.get(key)
    if found is not None:
        return found
    with _lock:
        found = _encoders.get(key)
        if found is not None:
            return found
        if _loader is None:
            raise EncoderNotFoundError(
                f"No encoder {spec.name!r} is registered in this process. Register one with "
                "sbert_pg.use_encoder(encoder)."
            )
        encoder = _encoders[key] = _loader(spec)
        return encoder
