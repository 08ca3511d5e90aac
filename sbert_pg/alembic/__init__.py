"""Alembic operations for embedding columns, and autogenerate that writes them.

``env.py`` registers them with :func:`autogenerate_plugins`; importing this package does nothing.
"""

from sbert_pg.alembic.plugin import autogenerate_plugins, register, setup

__all__ = ["autogenerate_plugins", "register", "setup"]
