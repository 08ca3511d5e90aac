"""Questions embedded by the database server itself: what a function of PL/Python calls.

An opt-in for servers of one's own, see docs/serve.md. An encoder is chosen by what the catalog
recorded of the column's, never by a name that a role could have written there.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.directory import Manifest, is_converted
from sbert_pg.errors import EncoderNotFoundError, EncodingError, SbertPgError
from sbert_pg.probes import compatible_specs, from_bytes, measured
from sbert_pg.spec import EncoderSpec, TextEncoder
from sbert_pg.types.wire import to_text

_COLUMN = (
    "SELECT e.id, e.spec, e.probes FROM sbert.binding b "
    "LEFT JOIN sbert.encoder e ON e.id = b.encoder_id WHERE b.id = sbert.asked_v1($1)"
)


def embed_here(
    plpy: Any, memory: MutableMapping[str, Any], encoders: str, target: str, question: str
) -> str:
    """The vector of a question in the space of a column, as pgvector reads it.

    Args:
        plpy: PL/Python's module.
        memory: its ``GD``: an encoder is opened once in each session, and takes its memory there.
        encoders: a directory of converted encoders (``sbert-pg encoder convert --out``), which
            the server's user may read.
        target: ``table.column`` or ``schema.table.column``, as for ``sbert.embed``.
    """
    plan = memory.get("sbert_pg.column")
    if plan is None:
        plan = memory["sbert_pg.column"] = plpy.prepare(_COLUMN, ["text"])
    (row,) = plpy.execute(plan, [target])
    if row["id"] is None:
        raise EncoderNotFoundError(
            f"Column {target} has no encoder yet: the first worker, load or search in Python that "
            "uses it says which it is."
        )
    # Rows of sbert.encoder are never changed.
    known = memory.setdefault("sbert_pg.encoders", {})
    encoder = known.get((encoders, row["id"]))
    if encoder is None:
        spec = EncoderSpec.from_json(json.loads(row["spec"]))
        encoder = known[encoders, row["id"]] = _encoder(Path(encoders), spec, row["probes"])
    return text_of(encoder.encode_query([question])[0])


def text_of(vector: Any) -> str:
    """A vector as pgvector reads it; ``EncodingError`` where it holds what is not a number."""
    numbers = np.asarray(vector, dtype=np.float32)
    if not np.isfinite(numbers).all():
        raise EncodingError("the encoder gave numbers that are not finite")
    return to_text(numbers)


def _encoder(directory: Path, spec: EncoderSpec, probes: bytes) -> TextEncoder:
    """The encoder of a directory whose vectors are those that were recorded."""
    recorded = from_bytes(probes, spec.dimensions)
    reasons = []
    for place in sorted(p for p in directory.glob("*") if is_converted(p)):
        try:
            manifest = Manifest.read(place)
            if manifest.kind != "encoder" or manifest.spec.weights_digest != spec.weights_digest:
                continue
            # A backend is one of many; its threads would be theirs.
            encoder = Encoder.open(place, dimensions=spec.dimensions, threads=1)
        except SbertPgError as error:  # another one may do
            reasons.append(f"{place.name}: {error}")
            continue
        verdict = compatible_specs(spec, recorded, encoder.spec, measured(encoder))
        if verdict:
            return encoder
        reasons.append(f"{place.name}: {verdict.reason}")
    raise EncoderNotFoundError(
        f"No encoder in {directory} gives the vectors of {spec.name!r}"
        f"{' (' + '; '.join(reasons) + ')' if reasons else ''}. Convert it there: sbert-pg encoder "
        f"convert {spec.name} --out {directory}/NAME"
    )
