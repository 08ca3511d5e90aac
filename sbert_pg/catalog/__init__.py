"""The library's own schema ``sbert``: its history, its tables, and the bindings in them."""

from sbert_pg.catalog.binding import (
    bind,
    build_queue,
    create_all,
    queue_indexes,
    unbind,
)
from sbert_pg.catalog.holding import (
    hold,
    hold_encoder,
    missing_columns,
    rebind,
    require_columns,
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
from sbert_pg.catalog.record import (
    Binding,
    all_bindings,
    binding_by_id,
    binding_of,
    health,
    installed,
    require_binding,
)
from sbert_pg.catalog.tables import PENDING_CHANNEL, SCHEMA

__all__ = [
    "PENDING_CHANNEL",
    "SCHEMA",
    "Binding",
    "all_bindings",
    "bind",
    "binding_by_id",
    "binding_of",
    "build_queue",
    "create_all",
    "current",
    "downgrade",
    "head",
    "health",
    "hold",
    "hold_encoder",
    "installed",
    "missing_columns",
    "queue_indexes",
    "rebind",
    "require_binding",
    "require_columns",
    "require_current",
    "script_location",
    "unbind",
    "upgrade",
    "upgrade_sql",
]
