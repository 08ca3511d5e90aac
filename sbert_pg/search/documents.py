"""Whose passages: the documents that a search over passages, and its criteria, may speak of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from sbert_pg.errors import DeclarationError
from sbert_pg.passages.declaring import Declared
from sbert_pg.search.criteria import Call
from sbert_pg.search.statement import Nearest, Search, statement_of
from sbert_pg.search.target import columns_of, table_behind


def of_entity(declared: Declared, attribute: Any) -> Declared:
    """The declaration, about the class or alias that an attribute of passages was taken from."""
    entity = attribute.parent.entity
    return declared if entity is declared.document else replace(declared, document=entity)


def require_no_document(declared: Declared, query: Any) -> None:
    """Refuse a document as the query, which has as many vectors as passages."""
    class_ = sa.inspect(declared.document).mapper.class_
    if isinstance(query, class_):
        name = class_.__name__
        raise DeclarationError(
            f"nearest({name}.{declared.name}, ...) was given an object of {name}, which has many "
            f"passages. Documents like it are nearest({name}.{declared.whole}, ...), by their "
            "wholes; or give one of its passages."
        )


def join_of(declared: Declared) -> Call:
    """The call that joins passages to their documents."""
    relation, document = declared.passage.document, declared.document
    if document is not relation.property.mapper.class_:
        relation = relation.of_type(document)
    return ("join", (relation,), {})


def narrows(declared: Declared) -> bool:
    """Whether there may be passages of other documents: of a superclass, or out of a subquery."""
    document: Any = sa.inspect(declared.document)
    own = document.mapper is declared.passage.document.property.mapper
    whole = document.is_mapper or isinstance(table_behind(document.selectable), sa.Table)
    return document.mapper.single or not (own and whole)


def named_criteria(first: Any, second: Any, options: dict[str, Any]) -> Call:
    """The call with criteria by their names, which are the first entity's, or else the second's."""
    own = sa.inspect(first).mapper.attrs
    criteria = (
        getattr(first if key in own else second, key) == value for key, value in options.items()
    )
    return ("where", tuple(criteria), {})


@dataclass(frozen=True, slots=True, eq=False)
class PassageSearch(Search):
    """A search for passages; its criteria may be on their documents, which it joins for these.

    The rows found are joined to their documents always, so that criteria of a statement around it,
    as ``with_loader_criteria`` has for tenants, meet the documents there.
    """

    declared: Any = None

    def statement(self) -> Nearest:
        """The statement of the search."""
        return statement_of(self._joined())

    @property
    def single(self) -> bool:
        """See ``Search.single``: a passage has one document."""
        if not self._joins_first or any(name != "where" for name, _, _ in self.narrowing[1:]):
            return False
        tables = {self.target.table, *self._tables}
        columns = [column for criterion in self.criteria for column in columns_of(criterion)]
        return all(column.table in tables for column in columns)

    @property
    def finishing(self) -> tuple[Call, ...]:
        """See ``Search.finishing``."""
        return self.shaping if self._outside else (join_of(self.declared), *self.shaping)

    @property
    def _joins_first(self) -> bool:
        return bool(self.narrowing) and _reaches(self.narrowing[0], self.declared)

    @property
    def _tables(self) -> list[Any]:
        """The tables of documents, or what an alias has in their place."""
        document: Any = sa.inspect(self.declared.document)
        return list(document.mapper.tables) if document.is_mapper else [document.selectable]

    @property
    def _outside(self) -> bool:
        """Whether the query's vector is a document's of an enclosing statement: no own ones."""
        return any(table in self._tables for table in self.outer())

    def _joined(self) -> PassageSearch:
        """The search, with its documents where criteria may be on these."""
        if self._outside or any(_reaches(call, self.declared) for call in self.narrowing):
            return self
        calls, table = self.narrowing, self.target.table
        others = any(self.target.about(table, one) is None for one in self.criteria)  # type: ignore[arg-type]
        if self.joins or others or self.loader_criteria or narrows(self.declared):
            calls = (join_of(self.declared), *calls)
        return replace(self, narrowing=calls)

    def said(self, call: Call) -> Call:
        """See ``Changeable.said``: names are the passage's, or else its document's."""
        name, _, options = call
        if name != "filter_by" or any(not _reaches(one, self.declared) for one in self.joining):
            return Search.said(self, call)
        return named_criteria(self.declared.passage, self.declared.document, options)


def _reaches(call: Call, declared: Declared) -> bool:
    """Whether a call joins documents."""
    name, arguments, options = call
    if name not in ("join", "join_from"):
        return False
    to = [*arguments, options.get("target")][name == "join_from"]
    document: Any = sa.inspect(declared.document)
    tables = (declared.document, document.selectable)
    relation = declared.passage.document.property
    return any(to is one for one in tables) or getattr(to, "property", None) is relation
