"""``explain_search``: which way a search went, and why."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg import explain_search, nearest
from sbert_pg.errors import DeclarationError
from tests.search.conftest import Shop


def test_each_way_says_why(shop: Shop, session: Session) -> None:
    article = shop.Article
    plain = explain_search(session, nearest(article.embedding, "gift now"))
    # Forty rows are fewer than the index is looked at for.
    assert (plain.way, plain.certain) == ("exact", True)
    assert "gave 39 of the 50 rows looked for" in plain.reason
    filtered = nearest(article.embedding, "gift now").where(article.lang == "de")
    found = explain_search(session, filtered)
    assert found.way == "exact"
    assert found.sql.startswith("WITH RECURSIVE nearest_query AS")
    asked = explain_search(session, nearest(article.embedding, "gift now", exact=True))
    assert "exact=True" in asked.reason
    every = explain_search(session.connection(), nearest(article.embedding, "gift", limit=None))
    assert "all rows" in str(every)


def test_what_cannot_be_explained(shop: Shop, session: Session) -> None:
    with pytest.raises(DeclarationError, match="nearest"):
        explain_search(session, sa.select(shop.Article))  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="one query"):
        explain_search(session, nearest(shop.Article.embedding, ["a", "b"]))


def test_rows_that_are_not_proven_are_said(shop: Shop, session: Session) -> None:
    """Their proofs are asked last, so that the looks alone would say that the index answered."""
    article = shop.Article
    copies = sa.text(
        "INSERT INTO article (id, title, lang, embedding, embedding_of) "
        "SELECT 1000 + 10 * id + n, '', 'en', embedding, CAST(:foreign AS uuid) "
        "FROM article, generate_series(1, 8) AS n"
    )
    session.execute(sa.text("SET LOCAL session_replication_role = replica"))
    session.execute(copies, {"foreign": "11111111-1111-1111-ffff-fffffffffff1"})
    statement = nearest(article.embedding, "gift now")
    titles = [row.title for row in session.scalars(statement)]
    assert len(titles) == 10
    assert all(titles)
    how = explain_search(session, statement)
    assert (how.way, how.certain) == ("exact", True)
    assert "fewer than 10 of them are proven" in how.reason
