"""Lets ``alembic -c`` be used on this history while developing it; the library does not need it.

Give the database in ``SBERT_PG_DATABASE_URL``.
"""

import os

import sqlalchemy as sa
from alembic import context
from alembic.operations import Operations

from sbert_pg.catalog.tables import SCHEMA, metadata


def configure(**options: object) -> None:
    context.configure(
        target_metadata=metadata,
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=lambda name, kind, parents: kind != "schema" or name == SCHEMA,
        **options,
    )
    with context.begin_transaction():
        context.run_migrations(op=Operations(context.get_context()))


if context.is_offline_mode():
    configure(dialect_name="postgresql", dialect_opts={"paramstyle": "named"})
else:
    engine = sa.create_engine(os.environ["SBERT_PG_DATABASE_URL"])
    with engine.connect() as connection:
        configure(connection=connection)
    engine.dispose()
