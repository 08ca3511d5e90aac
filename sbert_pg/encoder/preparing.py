"""A name becomes a converted directory, once on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.hub import find, is_path, repository_of
from sbert_pg.encoder.providers import Provider, Providers
from sbert_pg.errors import DeclarationError, EncoderNotFoundError


def prepare(
    name_or_path: str | Path,
    *,
    precision: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    providers: Sequence[Provider] | None = None,
    output: Path | None = None,
    again: bool = False,
) -> Path:
    """The converted directory of a name or path, made now where it is not there yet.

    Processes that ask for the same one at the same time convert it once.

    Args:
        name_or_path: as for ``Encoder.load``.
        precision: as for ``Encoder.load``.
        revision: as for ``Encoder.load``.
        cache_dir: as for ``Encoder.load``.
        providers: as for ``Encoder.load``; they decide which precision is the default.
        output: put it here and not into the cache.
        again: convert anew even where it is there.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if converted.is_converted(path):
        _require_precision(path, precision)
        return path
    wanted = precision or Providers.of(providers).precision
    local = is_path(name)
    if local and not path.is_dir():
        raise EncoderNotFoundError(
            f"There is no directory {name!r}. Give the path of a sentence-transformers directory "
            "or of a converted encoder, or a hub name such as 'all-MiniLM-L6-v2'."
        )
    if output is not None:
        _convert_to(output, name, revision, wanted)
        return output
    if local:
        place = converted.slot(
            converted.cache_root(cache_dir), path.resolve().name, converted.state_of(path), wanted
        )
    else:
        place = converted.slot(
            converted.cache_root(cache_dir), repository_of(name), revision, wanted
        )
    if not again and converted.is_converted(place):
        return place
    with converted.locked(place):
        if again or not converted.is_converted(place):
            _convert_to(place, name, revision, wanted)
    return place


def _convert_to(place: Path, name: str, revision: str | None, precision: str) -> None:
    from sbert_pg.encoder.conversion import convert

    found = find(name, revision=revision)

    def write(made: Path) -> None:
        convert(made, found, name, precision)

    converted.publish(place, write)


def _require_precision(path: Path, precision: str | None) -> None:
    if precision is None:
        return
    made = Manifest.read(path).precision
    if made != precision:
        raise DeclarationError(
            f"{path} holds an encoder in {made} and cannot be loaded in {precision}. Leave the "
            "precision out, or convert the model anew from its own directory or name."
        )
