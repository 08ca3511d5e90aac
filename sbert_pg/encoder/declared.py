"""The encoder that a declaration names, held against what the declaration says."""

from __future__ import annotations

from sbert_pg.encoder.encoder import Encoder
from sbert_pg.errors import DeclarationError
from sbert_pg.known import known_encoder
from sbert_pg.spec import EncoderSpec


def load_declared(spec: EncoderSpec) -> Encoder:
    """Load the encoder of a declaration.

    Fewer dimensions than the model has are a statement that its vectors are truncated, and only
    some models bear that. So they are taken where truncation was asked for: of a model known to be
    made for it, or by a spec that comes from a truncated encoder. In any other declaration they are
    a mistake.

    Raises:
        DeclarationError: the declaration names another width than the model has.
        EncoderError: it cannot be loaded; the message says why.
    """
    known = known_encoder(spec.name)
    asked = spec.weights_digest is not None or (known is not None and known.matryoshka)
    encoder = Encoder.load(
        spec.name,
        precision=spec.precision,
        dimensions=spec.dimensions if asked else None,
        revision=spec.revision,
    )
    if encoder.dimensions != spec.dimensions:
        raise DeclarationError(
            f"The declaration says that encoder {spec.name!r} has {spec.dimensions} dimensions; it "
            f"has {encoder.dimensions}. Declare dimensions={encoder.dimensions}. Where the model "
            "was trained to be truncated (Matryoshka), ask for that once at startup: "
            f"sbert_pg.use_encoder(Encoder.load({spec.name!r}, dimensions={spec.dimensions}))."
        )
    return encoder
