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
    assert "of the nearest 50 rows pass" in plain.reason
    filtered = nearest(article.embedding, "gift now").where(article.lang == "de")
    found = explain_search(session, filtered)
    assert found.way == "exact"
    assert found.sql.startswith("WITH nearest_query AS")
    asked = explain_search(session, nearest(article.embedding, "gift now", exact=True))
    assert "exact=True" in asked.reason
    every = explain_search(session.connection(), nearest(article.embedding, "gift", limit=None))
    assert "all rows" in str(every)


def test_what_cannot_be_explained(shop: Shop, session: Session) -> None:
    with pytest.raises(DeclarationError, match="nearest"):
        explain_search(session, sa.select(shop.Article))  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="one query"):
        explain_search(session, nearest(shop.Article.embedding, ["a", "b"]))
