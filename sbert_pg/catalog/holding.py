"""Hold the code's encoder against a column's, seal the binding at first use, vouch for vectors."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import tables
from sbert_pg.catalog.reading import binding_of
from sbert_pg.catalog.record import Binding
from sbert_pg.catalog.sqlstates import translated
from sbert_pg.catalog.tables import ATTESTED, VERIFIED
from sbert_pg.errors import EncoderMismatchError, EncoderNotFoundError
from sbert_pg.known import known_encoder
from sbert_pg.probes import Compatibility, compatible_specs
from sbert_pg.registry import find_encoder, get_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors
from sbert_pg.types.guard import ColumnIdentity

#: Stored order of the bytes of probe vectors.
_STORED = np.dtype("<f4")


class Held(NamedTuple):
    """The answer of ``hold``: which binding a writer may vouch for.

    Attributes:
        binding_id: number of the binding.
        final: whether it holds for the life of the process. It does not where this transaction,
            which may still be rolled back, has just sealed the binding, or nothing is sealed yet.
    """

    binding_id: int
    final: bool


def check(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> bool:
    """Hold the encoder that a declaration names against the column's; see ``hold``.

    Returns:
        Whether the answer is final, so that it need not be asked again in this process.

    Raises:
        EncoderMismatchError: they are different spaces.
    """
    held = hold(connection, identity, spec)
    return held is not None and held.final


def hold(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> Held | None:
    """Hold the encoder that a declaration names against the column's, sealing it at first use.

    The same fingerprint, a fingerprint known to be compatible, or probe vectors that agree are
    accepted. Where this process cannot load the encoder, as where vectors come ready-made from
    elsewhere, only the declared names can be compared.

    Args:
        connection: a connection; the seal is part of its transaction.
        identity: the column.
        spec: the encoder as the code declares it.

    Returns:
        ``None`` where the column is not bound.

    Raises:
        EncoderMismatchError: they are different spaces; the message names both.
        EncoderError: the encoder is there and cannot be loaded.
        CatalogError: this role may not use the catalog.
    """
    binding = binding_of(connection, identity)
    if binding is None:
        return None
    try:
        encoder = get_encoder(spec)
    except EncoderNotFoundError:
        _require_same_declaration(binding, spec)
        return Held(binding.id, binding.sealed is not None and not binding.sealed_here)
    final = hold_encoder(connection, binding, encoder)
    return Held(binding.id, final)


def hold_encoder(connection: Connection, binding: Binding, encoder: TextEncoder) -> bool:
    """As ``hold``, for a binding and an encoder at hand; returns whether the answer is final.

    Raises:
        EncoderMismatchError: they are different spaces.
    """
    fingerprint = fingerprint_of(encoder)
    if binding.fingerprint is None:
        # One that was put into use under the declared name may call itself anything.
        if find_encoder(binding.declared) is not encoder:
            _require_same_declaration(binding, encoder.spec)
        if _read_only(connection):
            return False
        sealed = _seal(connection, binding, encoder)
        if sealed == fingerprint:
            return False
        # Another process was faster, with another encoder: that one counts.
        final = False
    else:
        sealed, final = binding.fingerprint, not binding.sealed_here
    if sealed == fingerprint or _is_recorded(connection, binding, fingerprint):
        return final
    verdict = compatibility(connection, sealed, encoder)
    if not verdict:
        raise _mismatch(binding, sealed, encoder, verdict)
    if not _read_only(connection):
        _record(connection, binding, encoder, verdict)
    return final


def seal(connection: Connection, binding: Binding, encoder: TextEncoder) -> None:
    """Give a binding its encoder now, instead of at its first use.

    Raises:
        EncoderMismatchError: it has another one already, or was declared for another one.
    """
    hold_encoder(connection, binding, encoder)


def rebind(connection: Connection, binding: Binding, encoder: TextEncoder) -> Compatibility:
    """Accept a further encoder for a column, as int8 beside fp32, if its space is the same.

    Happens by itself at the first use; this is for doing it beforehand and seeing the figures.

    Raises:
        EncoderMismatchError: the spaces differ; such a change is a new column.
    """
    if binding.fingerprint is None:
        hold_encoder(connection, binding, encoder)
        return Compatibility(True, "the column had no encoder yet")
    verdict = compatibility(connection, binding.fingerprint, encoder)
    if not verdict:
        raise _mismatch(binding, binding.fingerprint, encoder, verdict)
    if fingerprint_of(encoder) != binding.fingerprint:
        _record(connection, binding, encoder, verdict)
    return verdict


def compatibility(connection: Connection, fingerprint: str, encoder: TextEncoder) -> Compatibility:
    """Compare an encoder with a recorded one, by spec and probe vectors."""
    spec, probes = recorded_encoder(connection, fingerprint)
    return compatible_specs(spec, probes, encoder.spec, encoder.probe_vectors)


def recorded_encoder(connection: Connection, fingerprint: str) -> tuple[EncoderSpec, Vectors]:
    """Spec and probe vectors of a recorded encoder, the latter of shape ``(probes, dimensions)``.

    Raises:
        sqlalchemy.exc.NoResultFound: none is recorded under this fingerprint.
    """
    c = tables.encoder.c
    row = connection.execute(sa.select(c.spec, c.probes).where(c.fingerprint == fingerprint)).one()
    spec = EncoderSpec.from_json(row.spec)
    probes = np.frombuffer(row.probes, dtype=_STORED).reshape(-1, spec.dimensions)
    return spec, probes.astype(np.float32)


def attest(
    connection: Connection, binding: Binding | int, *, verified: bool = False, local: bool = True
) -> None:
    """Vouch for the vectors that are about to be written, which the triggers refuse otherwise.

    To be called only after ``hold``, or for vectors known to be the column's own.

    Args:
        connection: the connection that will write.
        binding: the binding, or its number.
        verified: vouch as well that each row is held locked while its vector is written, and that
            the vector belongs to the text the row has. The triggers then make no mark.
        local: until the end of the transaction; else until the end of the session, which is for
            connections in autocommit mode.
    """
    number = binding if isinstance(binding, int) else binding.id
    settings = (ATTESTED, VERIFIED) if verified else (ATTESTED,)
    text = sa.literal(str(number), sa.Text)
    connection.execute(sa.select(*(including(name, text, local) for name in settings)))


def fingerprint_of(encoder: TextEncoder) -> str:
    """The fingerprint of an encoder; of its probe vectors where its spec is not complete.

    An encoder of the application's own may not know its digests. Its probe vectors identify it as
    well, if to the bit, and another machine's are then found to be compatible.
    """
    known = encoder.spec.fingerprint
    if known is not None:
        return known
    return "probes-" + hashlib.sha256(_probe_bytes(encoder)).hexdigest()[:32]


def _probe_bytes(encoder: TextEncoder) -> bytes:
    return np.ascontiguousarray(encoder.probe_vectors, dtype=_STORED).tobytes()


def including(
    setting: str, number: sa.ColumnElement[str], local: bool = True
) -> sa.ColumnElement[Any]:
    """An expression that adds a number to a setting that lists numbers, as in ``,3,17,``."""
    now = sa.func.coalesce(
        sa.func.nullif(sa.func.current_setting(setting, True), ""), ",", type_=sa.Text
    )
    there = sa.func.strpos(now, sa.literal(",").concat(number).concat(",")) > 0
    value = sa.case((there, now), else_=now.concat(number).concat(","))
    return sa.func.set_config(setting, value, local)


def _read_only(connection: Connection) -> bool:
    setting = sa.func.current_setting("transaction_read_only")
    return bool(connection.execute(sa.select(setting)).scalar_one() == "on")


def _seal(connection: Connection, binding: Binding, encoder: TextEncoder) -> str:
    statement = sa.select(
        sa.func.sbert.seal_v1(
            binding.id,
            fingerprint_of(encoder),
            sa.cast(encoder.spec.to_json(), pg.JSONB),
            sa.cast(_probe_bytes(encoder), sa.LargeBinary),
        )
    )
    with translated():
        return str(connection.execute(statement).scalar_one())


def _is_recorded(connection: Connection, binding: Binding, fingerprint: str) -> bool:
    c = tables.compatible_encoder.c
    wanted = sa.select(c.fingerprint).where(c.column_id == binding.id, c.fingerprint == fingerprint)
    return connection.execute(wanted).first() is not None


def _record(
    connection: Connection, binding: Binding, encoder: TextEncoder, verdict: Compatibility
) -> None:
    agreement = {"reason": verdict.reason}
    if verdict.agreement is not None:
        agreement |= asdict(verdict.agreement)
    statement = sa.select(
        sa.func.sbert.add_compatible_v1(
            binding.id,
            fingerprint_of(encoder),
            sa.cast(encoder.spec.to_json(), pg.JSONB),
            sa.cast(agreement, pg.JSONB),
        )
    )
    with translated():
        connection.execute(statement)


def _require_same_declaration(binding: Binding, spec: EncoderSpec) -> None:
    """Compare what was declared, where nothing else can be compared yet."""
    declared = binding.declared
    different = []
    if not _same_name(declared.name, spec.name):
        different.append(f"the names {declared.name!r} and {spec.name!r}")
    if declared.dimensions != spec.dimensions:
        different.append(f"{declared.dimensions} dimensions against {spec.dimensions}")
    for field in ("weights_digest", "tokenizer_digest", "pooling", "precision"):
        left, right = getattr(declared, field), getattr(spec, field)
        if left is not None and right is not None and left != right and field != "precision":
            different.append(f"another {field.replace('_', ' ')}")
    if different:
        raise EncoderMismatchError(
            f"Column {binding} is bound to encoder {declared.name!r}, and this code declares "
            f"{spec.name!r}: {'; '.join(different)}. Declare the encoder that the column was bound "
            "to, or add a column for the other one (replaces=...) and let Alembic write its "
            "migration."
        )


def _same_name(a: str, b: str) -> bool:
    """Whether two names mean one encoder: organisation, letter case and folder apart."""
    known_a, known_b = known_encoder(a), known_encoder(b)
    if known_a is not None and known_b is not None:
        return known_a == known_b
    return (
        a == b
        or a.rstrip("/").rpartition("/")[2].lower() == b.rstrip("/").rpartition("/")[2].lower()
    )


def _mismatch(
    binding: Binding, sealed: str, encoder: TextEncoder, verdict: Compatibility
) -> EncoderMismatchError:
    name = binding.sealed.name if binding.sealed is not None else binding.declared.name
    return EncoderMismatchError(
        f"Column {binding} belongs to encoder {name!r} (fingerprint {sealed}), and this process "
        f"uses {encoder.spec.name!r} (fingerprint {fingerprint_of(encoder)}): {verdict.reason}. "
        "Vectors of the two must not be mixed or compared. Use the column's own encoder, or add a "
        "column for the new one beside it (replaces=...) and re-embed."
    )


__all__ = [
    "Held",
    "attest",
    "check",
    "compatibility",
    "fingerprint_of",
    "hold",
    "hold_encoder",
    "rebind",
    "recorded_encoder",
    "seal",
]
