from __future__ import annotations

import sqlalchemy as sa

from sbert_pg import catalog


def test_a_fresh_database_is_brought_to_the_newest_revision(bare_database_url: sa.URL) -> None:
    engine = sa.create_engine(bare_database_url)
    with engine.begin() as connection:
        assert catalog.current(connection) is None
        catalog.upgrade(connection)
        assert catalog.current(connection) == catalog.head()
        catalog.require_current(connection)
    engine.dispose()
