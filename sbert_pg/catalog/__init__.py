"""The library's own schema ``sbert``: its history, its tables, and the bindings in them."""

from sbert_pg.catalog.binding import (
    Binding,
    all_bindings,
    attest,
    bind,
    bind_all,
    binding_by_id,
    binding_of,
    check,
    hold,
    rebind,
    require_binding,
    seal,
    unbind,
)
from sbert_pg.catalog.migrate import (
    current,
    downgrade,
    head,
    require_current,
    script_location,
    upgrade,
    upgrade_sql,
)
from sbert_pg.catalog.tables import PENDING_CHANNEL, SCHEMA

__all__ = [
    "PENDING_CHANNEL",
    "SCHEMA",
    "Binding",
    "all_bindings",
    "attest",
    "bind",
    "bind_all",
    "binding_by_id",
    "binding_of",
    "check",
    "current",
    "downgrade",
    "head",
    "hold",
    "rebind",
    "require_binding",
    "require_current",
    "script_location",
    "seal",
    "unbind",
    "upgrade",
    "upgrade_sql",
]
