"""Alembic operations for embedding columns, and autogenerate that writes them.

``env.py`` registers them with :func:`autogenerate_plugins`; importing this package does nothing.
"""

from __future__ import annotations

import threading
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations import Operations
from alembic.operations.ops import UpgradeOps

from sbert_pg.alembic.compare import rewrite
from sbert_pg.alembic.ops import OPERATIONS, SbertOperation
from sbert_pg.alembic.render import render_operation, separating, with_vector_types
from sbert_pg.alembic.toimpl import implement, refusing
from sbert_pg.catalog import SCHEMA
from sbert_pg.types import HalfVector, Vector, register_reflection
from sbert_pg.types.text import TextSearch

NAME = "sbert_pg"
#: Alembic's own plugins, as its default has them.
DEFAULT_PLUGINS = "alembic.autogenerate.*"

_lock = threading.Lock()
_registered: set[str] = set()


def autogenerate_plugins(*others: str) -> list[str]:
    """Register this library with Alembic, and name the plugins for ``context.configure``.

    To be called in ``env.py``::

        context.configure(..., autogenerate_plugins=autogenerate_plugins())

    From then on migrations have the operations of this library, and autogenerate notices embedding
    columns and vector indexes. Calling it again changes nothing.

    Args:
        others: further plugins to use, by name.

    Returns:
        Alembic's own plugins, this one, and the others.
    """
    register()
    return [DEFAULT_PLUGINS, NAME, *others]


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """An ``include_name`` for environments of other histories in a database with embedding columns.

    Those know nothing of this library, and would drop its schema and the queues of its bindings::

        context.configure(..., include_name=include_name)

    Args:
        name: name of a schema, table, index and so on.
        type_: what it is.
        parent_names: names of what it is in.
    """
    if type_ == "schema":
        return name != SCHEMA
    return not (type_ == "index" and (name or "").startswith(f"{SCHEMA}_"))


def register() -> None:
    """Register operations, renderers and the comparison, once in a process."""
    register_operations()
    with _lock:
        if "plugin" in _registered:
            return
        _registered.add("plugin")
    try:
        from alembic.runtime.plugins import Plugin
    except ImportError:
        # Alembic before 1.18 has one list of comparisons for all environments.
        from alembic.autogenerate import comparators

        comparators.dispatch_for("schema")(compare_where_asked)
        # Nothing of a plugin comes before its reflection, so all dialects are taught.
        register_reflection()
        return
    setup(Plugin(NAME))


def register_operations() -> None:
    """Register operations and renderers alone, once in a process."""
    with _lock:
        if "operations" in _registered:
            return
        _registered.add("operations")
    for name, operation in OPERATIONS.items():
        Operations.register_operation(name)(operation)
    # For all its subclasses, as Alembic looks along their bases.
    Operations.implementation_for(SbertOperation)(implement)
    renderers.dispatch_for(SbertOperation)(render_operation)


def setup(plugin: Any) -> None:
    """Set a plugin up, as ``Plugin.setup_plugin_from_module(sbert_pg.alembic, "sbert_pg")`` does.

    Args:
        plugin: an ``alembic.runtime.plugins.Plugin``.
    """
    from alembic.util import DispatchPriority

    register_operations()
    _registered.add("plugin")
    plugin.add_autogenerate_comparator(
        prepare, "schema", f"{NAME}_types", priority=DispatchPriority.FIRST
    )
    plugin.add_autogenerate_comparator(
        leave_text, "column", "server_default", priority=DispatchPriority.FIRST
    )
    # After all others, whose result is rewritten.
    plugin.add_autogenerate_comparator(
        compare_embeddings, "schema", NAME, priority=DispatchPriority.LAST
    )


def prepare(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Any) -> None:
    """Have this environment's dialect, and no other, reflect vector columns as what they are."""
    if context.connection is not None:
        dialect: Any = context.connection.dialect
        vectors = {"vector": Vector, "halfvec": HalfVector}
        dialect.ischema_names = {**dialect.ischema_names, **vectors}


def leave_text(
    context: AutogenContext,
    op: Any,
    schema: Any,
    table: Any,
    name: Any,
    stored: Any,
    column: sa.Column[Any],
) -> Any:
    """Keep Alembic from warning that a text column cannot be changed, which is made again here."""
    from alembic.util import PriorityDispatchResult

    ours = isinstance(column.type, TextSearch)
    return PriorityDispatchResult.STOP if ours else PriorityDispatchResult.CONTINUE


def compare_where_asked(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Any) -> None:
    """As ``compare_embeddings``, in environments that ask for it."""
    if NAME in (context.migration_context.opts.get("autogenerate_plugins") or ()):
        compare_embeddings(context, upgrade_ops, schemas)


def compare_embeddings(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Any) -> None:
    """Rewrite what Alembic found, and have it rendered."""
    options = context.migration_context.opts
    context.opts = {
        **context.opts,
        "render_item": with_vector_types(context.opts.get("render_item") or None),
    }
    hook = options.get("process_revision_directives")
    options["process_revision_directives"] = separating(hook)
    with refusing():
        rewrite(context, upgrade_ops)


__all__ = ["autogenerate_plugins", "include_name", "register", "setup"]
