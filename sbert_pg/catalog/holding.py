"""Compare the code's encoder with a column's, and seal the binding at its first use."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.catalog import tables
from sbert_pg.catalog.record import Binding, binding_of, called, installed, relation_of
from sbert_pg.errors import BindingError, EncoderMismatchError, EncoderNotFoundError
from sbert_pg.probes import Compatibility, compatible_specs, from_bytes, measured, to_bytes
from sbert_pg.registry import find_encoder, get_encoder
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors, same_encoder_name
from sbert_pg.system import ColumnIdentity


class Held(NamedTuple):
    """The answer of ``hold``: the binding that a reader or writer has been compared with.

    Attributes:
        binding: the binding.
        fingerprint: of the process's own encoder; ``None`` where it cannot be loaded here.
        final: whether it holds for the life of the process. It does not where this transaction,
            which may still be rolled back, has just sealed the binding, or nothing is sealed yet.
    """

    binding: Binding
    fingerprint: str | None
    final: bool


def hold(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> Held | None:
    """Compare the encoder that a declaration names with the column's, sealing it at first use.

    Probe vectors are compared always, also where fingerprints are equal. Where this process cannot
    load the encoder, as where vectors come ready-made from elsewhere, only the declared names can
    be compared.

    Args:
        connection: a connection; the seal is part of its transaction.
        identity: the column.
        spec: the encoder as the code declares it.

    Returns:
        ``None`` where the column is not bound.

    Raises:
        EncoderMismatchError: they are different spaces, or the table is not the bound one; the
            message names both.
        EncoderError: the encoder is there and cannot be loaded.
        CatalogError: this role may not use the catalog.
    """
    binding = binding_of(connection, identity)
    if binding is None:
        _require_unswapped(connection, identity)
        return None
    try:
        encoder = get_encoder(spec)
    except EncoderNotFoundError:
        _require_same_declaration(binding, spec)
        final = binding.sealed is not None and not binding.sealed_here
        return Held(binding, None, final)
    final = hold_encoder(connection, binding, encoder)
    return Held(binding, fingerprint_of(encoder), final)


def hold_encoder(connection: Connection, binding: Binding, encoder: TextEncoder) -> bool:
    """As ``hold``, for a binding and an encoder at hand; returns whether the answer is final.

    Called before the first use of a column, it gives the binding its encoder then.

    Raises:
        EncoderMismatchError: they are different spaces, or the column was declared for another one.
    """
    fingerprint = fingerprint_of(encoder)
    if binding.fingerprint is None:
        # One that was put into use under the declared name may call itself anything.
        if find_encoder(binding.declared) is not encoder:
            _require_same_declaration(binding, encoder.spec)
        if _read_only(connection):
            return False
        _seal(connection, binding, encoder)
        final = False
    else:
        final = not binding.sealed_here
    # Of several processes that seal at once the first wins, and its encoder is the one that counts.
    sealed, verdict = _agreeing(connection, binding, encoder)
    if sealed != fingerprint and not _is_recorded(connection, binding, fingerprint):
        if _read_only(connection):
            return False
        _record(connection, binding, encoder, verdict)
        final = False
    return final


def rebind(
    connection: Connection,
    binding: Binding,
    encoder: TextEncoder,
    stored: Mapping[str, Any] | None = None,
) -> Compatibility:
    """Accept a further encoder for a column, as int8 beside fp32, if its space is the same.

    Happens by itself at the first use; this is for doing it beforehand and seeing the figures.

    Args:
        connection: a connection; what is recorded is part of its transaction.
        binding: the binding.
        encoder: the further encoder.
        stored: what was measured on stored vectors, to be recorded beside the probes' agreement.

    Raises:
        EncoderMismatchError: the spaces differ; such a change is a new column.
    """
    if binding.fingerprint is None:
        hold_encoder(connection, binding, encoder)
    sealed, verdict = _agreeing(connection, binding, encoder)
    if sealed != fingerprint_of(encoder):
        _record(connection, binding, encoder, verdict, stored)
    return verdict


def compatibility(connection: Connection, binding: Binding, encoder: TextEncoder) -> Compatibility:
    """Compare an encoder with the one that a column is sealed with, by spec and probe vectors."""
    return _compared(connection, binding, encoder)[1]


def recorded_encoder(connection: Connection, binding: Binding) -> tuple[str, EncoderSpec, Vectors]:
    """Fingerprint, spec and probe vectors ``(probes, dimensions)`` of a column's encoder."""
    encoder, c = tables.encoder.c, tables.binding.c
    row = connection.execute(
        sa.select(encoder.fingerprint, encoder.spec, encoder.probes)
        .join_from(tables.binding, tables.encoder, encoder.id == c.encoder_id)
        .where(c.id == binding.id)
    ).first()
    if row is None:
        raise EncoderMismatchError(
            f"Column {binding} has no encoder: it was not used yet, or it was unbound or bound "
            "again just before this process could compare itself with it. Try once more."
        )
    spec = EncoderSpec.from_json(row.spec)
    return row.fingerprint, spec, from_bytes(row.probes, spec.dimensions)


def fingerprint_of(encoder: TextEncoder) -> str:
    """The fingerprint of an encoder; of its probe vectors where its spec is not complete.

    An encoder of the application's own may not know its digests. Its probe vectors identify it as
    well, if to the bit, and another machine's are then found to be compatible.
    """
    known = encoder.spec.fingerprint
    if known is not None:
        return known
    return "probes-" + hashlib.sha256(to_bytes(measured(encoder))).hexdigest()[:32]


def _compared(
    connection: Connection, binding: Binding, encoder: TextEncoder
) -> tuple[str, Compatibility]:
    """Fingerprint of a column's encoder, and the verdict on another one."""
    fingerprint, spec, probes = recorded_encoder(connection, binding)
    return fingerprint, compatible_specs(spec, probes, encoder.spec, measured(encoder))


def _read_only(connection: Connection) -> bool:
    setting = sa.func.current_setting("transaction_read_only")
    return bool(connection.execute(sa.select(setting)).scalar_one() == "on")


def _require_unswapped(connection: Connection, identity: ColumnIdentity) -> None:
    """Refuse a table that stands in the place of the bound one."""
    if not installed(connection):
        return
    relation = relation_of(connection, identity)
    called(connection, sa.func.sbert.require_unswapped_v1(relation, identity.column))


def _seal(connection: Connection, binding: Binding, encoder: TextEncoder) -> None:
    function = sa.func.sbert.seal_v1(
        binding.id,
        fingerprint_of(encoder),
        sa.cast(encoder.spec.document_fingerprint, sa.Text),
        sa.cast(encoder.spec.to_json(), pg.JSONB),
        sa.cast(to_bytes(measured(encoder)), sa.LargeBinary),
    )
    called(connection, function)


def _is_recorded(connection: Connection, binding: Binding, fingerprint: str) -> bool:
    c = tables.compatible_encoder.c
    row = sa.select(c.fingerprint).where(c.binding_id == binding.id, c.fingerprint == fingerprint)
    return connection.execute(row).first() is not None


def _record(
    connection: Connection,
    binding: Binding,
    encoder: TextEncoder,
    verdict: Compatibility,
    stored: Mapping[str, Any] | None = None,
) -> None:
    agreement: dict[str, Any] = {"reason": verdict.reason}
    if stored is not None:
        agreement["stored"] = dict(stored)
    if verdict.agreement is not None:
        agreement |= asdict(verdict.agreement)
    function = sa.func.sbert.add_compatible_v1(
        binding.id,
        fingerprint_of(encoder),
        sa.cast(encoder.spec.to_json(), pg.JSONB),
        sa.cast(agreement, pg.JSONB),
    )
    called(connection, function)


def _require_same_declaration(binding: Binding, spec: EncoderSpec) -> None:
    """Compare what was declared, where nothing else can be compared yet."""
    declared = binding.declared
    different = []
    if not same_encoder_name(declared.name, spec.name):
        different.append(f"the names {declared.name!r} and {spec.name!r}")
    if declared.dimensions != spec.dimensions:
        different.append(f"{declared.dimensions} dimensions against {spec.dimensions}")
    for field in ("weights_digest", "tokenizer_digest", "pooling"):
        left, right = getattr(declared, field), getattr(spec, field)
        if left is not None and right is not None and left != right:
            different.append(f"another {field.replace('_', ' ')}")
    if different:
        raise EncoderMismatchError(
            f"Column {binding} is bound to encoder {declared.name!r}, and this code declares "
            f"{spec.name!r}: {'; '.join(different)}. Declare the encoder that the column was bound "
            "to, or add a column for the other one (replaces=...) and let Alembic write its "
            "migration."
        )


def _agreeing(
    connection: Connection, binding: Binding, encoder: TextEncoder
) -> tuple[str, Compatibility]:
    """As ``_compared``; refused where the spaces differ."""
    sealed, verdict = _compared(connection, binding, encoder)
    if verdict:
        return sealed, verdict
    name = binding.sealed.name if binding.sealed is not None else binding.declared.name
    raise EncoderMismatchError(
        f"Column {binding} belongs to encoder {name!r} (fingerprint {sealed}), and this process "
        f"uses {encoder.spec.name!r} (fingerprint {fingerprint_of(encoder)}): {verdict.reason}. "
        "Vectors of the two must not be mixed or compared. Use the column's own encoder, or add a "
        "column for the new one beside it (replaces=...) and re-embed."
    )


def missing_columns(connection: Connection, binding: Binding) -> list[str]:
    """Columns that a binding names and its table lacks: renamed without rename_v1, or dropped."""
    named = (binding.column, binding.companion, *binding.source.columns, *binding.key_columns)
    there = system.stored_types(connection, binding.relation)
    return [name for name in dict.fromkeys(named) if name not in there]


def require_columns(connection: Connection, binding: Binding) -> Binding:
    """The same binding, where its table has the columns that it names.

    Raises:
        BindingError: it lacks one.
    """
    if missing := missing_columns(connection, binding):
        raise BindingError(
            f"The table of {binding} has no column {', '.join(missing)}, which the binding names. "
            "Where it was renamed call sbert.rename_v1(table, old name, new name); where it was "
            "dropped the binding is of no use: unbind it, or abort the change."
        )
    return binding
