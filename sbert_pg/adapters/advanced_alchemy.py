"""``nearest`` for the repositories of advanced-alchemy, as Litestar applications use them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from sbert_pg.errors import DeclarationError
from sbert_pg.orm.declaring import attributes_of
from sbert_pg.search import nearest


class SbertRepository:
    """Stands before a repository class of advanced-alchemy, asynchronous or not.

    ::

        class ArticleRepository(SbertRepository, SQLAlchemyAsyncRepository[Article]):
            model_type = Article

        rows = (await articles.nearest("late trains", LimitOffset(10, 0))).all()
    """

    model_type: Any
    session: Any

    def nearest(
        self, query: Any, *filters: Any, limit: int = 10, column: str | None = None, **how: Any
    ) -> Any:
        """The rows nearest to a text, a vector or a row, with their similarities, nearest first.

        Args:
            query: as ``sbert_pg.nearest`` takes it.
            filters: what the repository's own functions take: conditions of SQLAlchemy's, and
                filters such as ``CollectionFilter`` and ``LimitOffset``.
            limit: how many rows; ``LimitOffset`` says so too.
            column: attribute of the embedding; needed where the class has several.
            **how: further arguments of ``sbert_pg.nearest``.

        Returns:
            What ``execute`` of the repository's session gives: a result of rows ``(entity,
            similarity)``, to be awaited where the session is asynchronous.

        Raises:
            DeclarationError: which embedding is meant is not clear, or there is none.
        """
        statement = nearest(self._embedding(column), query, limit=limit, **how)
        for each in filters:
            if hasattr(each, "append_to_statement"):
                statement = each.append_to_statement(statement, self.model_type)
            else:
                statement = statement.where(each)
        return self.session.execute(statement)

    def _embedding(self, name: str | None) -> Any:
        names = [attribute.key for attribute in attributes_of(sa.inspect(self.model_type))]
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            raise DeclarationError(
                f"{self.model_type.__name__} has the embeddings {', '.join(names) or 'none'}; give "
                "one of them as column=."
            )
        return getattr(self.model_type, name)


__all__ = ["SbertRepository"]
