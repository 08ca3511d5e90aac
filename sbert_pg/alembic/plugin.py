"""Register with Alembic, when ``env.py`` says so and not before."""

from __future__ import annotations

import threading
from typing import Any

from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations import Operations
from alembic.operations.ops import UpgradeOps

from sbert_pg.alembic.compare import rewrite
from sbert_pg.alembic.index_impl import INDEX_IMPLEMENTATIONS
from sbert_pg.alembic.ops import OPERATIONS
from sbert_pg.alembic.refusing import refusing
from sbert_pg.alembic.render import RENDERERS, with_vector_types
from sbert_pg.alembic.separate import separating
from sbert_pg.alembic.toimpl import IMPLEMENTATIONS

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
        return
    setup(Plugin(NAME))


def register_operations() -> None:
    """Register operations and renderers alone, once in a process."""
    with _lock:
        if "operations" in _registered:
            return
        _registered.add("operations")
    for name, operation in OPERATIONS:
        Operations.register_operation(name)(operation)
    for kind, implementation in (*IMPLEMENTATIONS, *INDEX_IMPLEMENTATIONS):
        Operations.implementation_for(kind)(refusing(implementation))
    for kind, renderer in RENDERERS:
        renderers.dispatch_for(kind)(renderer)


def setup(plugin: Any) -> None:
    """Set a plugin up, as ``Plugin.setup_plugin_from_module(sbert_pg.alembic, "sbert_pg")`` does.

    Args:
        plugin: an ``alembic.runtime.plugins.Plugin``.
    """
    from alembic.util import DispatchPriority

    register_operations()
    _registered.add("plugin")
    # After all others, whose result is rewritten.
    plugin.add_autogenerate_comparator(compare, "schema", NAME, priority=DispatchPriority.LAST)


def compare_where_asked(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Any) -> None:
    """As ``compare``, in environments that ask for it."""
    if NAME in (context.migration_context.opts.get("autogenerate_plugins") or ()):
        compare(context, upgrade_ops, schemas)


def compare(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Any) -> None:
    """Rewrite what Alembic found, and have it rendered."""
    options = context.migration_context.opts
    context.opts = {
        **context.opts,
        "render_item": with_vector_types(context.opts.get("render_item") or None),
    }
    hook = options.get("process_revision_directives")
    options["process_revision_directives"] = separating(hook)
    refusing(rewrite)(context, upgrade_ops)
