"""``nearest`` over the passages of documents: each document once, by its best passages.

The nearest passages are looked up as in any search, twice as deep or further where they belong to
too few documents, and at last all that pass. Whether that is needed is decided inside the
statement. The documents found are ranked, and each gets its best passages by comparing its own.
Criteria may speak of documents in any search over their passages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from sbert_pg.errors import DeclarationError
from sbert_pg.passages.declaring import Declared
from sbert_pg.search.criteria import Call
from sbert_pg.search.statement import Changeable, Nearest, Search, replayed, statement_of
from sbert_pg.search.target import (
    Target,
    columns_of,
    name_beside,
    table_behind,
    tables_of,
    target_of,
)
from sbert_pg.types.comparator import attributes_of

Score = Literal["best", "sum", "auto"]

#: Passages looked at first for each document that is wanted, and at least; then as many as an index
#: is asked for at most, without a filter and under one.
_EACH, _LEAST, _FURTHER, _FILTERED = 8, 100, 500, 250
#: Passages looked at where the document as a whole counts too, by the documents that are wanted.
_DEPTHS = ((31, 250), (62, 500))
#: Documents that are found by the index, where the whole counts too, without a further look.
MOST_BY_INDEX = _DEPTHS[0][0]
#: Weight of the whole document in ``"sum"``, and at most in ``"auto"``. There it follows the
#: question: by how far the whole of the best documents comes to the best passage, from none at this
#: share of its similarity on. On long documents each about many things wholes stay far behind.
_WHOLE, _NONE, _JUDGED = 0.5, 0.8, 20
_F = sa.Float(53)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a search is asked, but for its page; ``overrides`` as of ``Search``."""

    query: Any
    many: bool
    furthest: float | None
    overrides: tuple[int | None, int | None, int | None]
    exact: bool
    per_document: int
    score: Score


@dataclass(frozen=True, slots=True, eq=False)
class DocumentSearch(Changeable):
    """What is searched for; the counterpart of ``statement.Search``."""

    declared: Declared
    asked: Asked
    limit: int | None
    offset: int
    narrowing: tuple[Call, ...] = ()
    shaping: tuple[Call, ...] = ()

    def statement(self) -> Nearest:
        """The statement of the search."""
        return _statement(self)

    @property
    def target(self) -> Target:
        """What the passages are found by."""
        return target_of(self.declared.passage.embedding)

    @property
    def names(self) -> list[str]:
        """What the parts of a document's key are called within the statement."""
        return [f"passages_key_{n}" for n in range(len(self.declared.keys))]

    def called(self, name: str) -> str:
        """See ``Changeable.called``: rows are of documents and passages."""
        beside = name_beside(self.declared.document, self.function, name)
        return name_beside(self.declared.passage, self.function, beside)

    def said(self, call: Call) -> Call:
        """See ``Changeable.said``: names are the document's, or else its passage's."""
        if call[0] != "filter_by" or self.joins:
            return call
        return named_criteria(self.declared.document, self.declared.passage, call[2])


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
        first = self.narrowing[:1]
        if not any(_reaches(call, self.declared) for call in first) or any(
            name != "where" for name, _, _ in self.narrowing[1:]
        ):
            return False
        tables = {self.target.table, *self._tables}
        columns = [column for criterion in self.criteria for column in columns_of(criterion)]
        return all(column.table in tables for column in columns)

    @property
    def finishing(self) -> tuple[Call, ...]:
        """See ``Search.finishing``."""
        return self.shaping if self._outside else (join_of(self.declared), *self.shaping)

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


def nearest_documents(
    declared: Declared, asked: Asked, limit: int | None, offset: int, where: tuple[Any, ...]
) -> Nearest:
    """A select of documents, their best passages, the passages' similarities and the scores."""
    if asked.per_document < 1 or asked.score not in ("best", "sum", "auto"):
        raise DeclarationError(
            f"nearest() was given per_document={asked.per_document!r} and score={asked.score!r}; "
            'it takes a number from 1 on, and "best", "sum" or "auto".'
        )
    return DocumentSearch(declared, asked, limit, offset).narrowed("where", where, {})


def nearest_passages(
    declared: Declared, asked: Asked, limit: int | None, offset: int, where: tuple[Any, ...]
) -> Nearest:
    """A select of passages, each with its similarity; its criteria may be on documents too."""
    target, query = target_of(declared.passage.embedding), asked.query
    itself = target.identity(query) if target.is_row(query) else ()
    return PassageSearch(
        target, _operand(target, asked), limit, offset, asked.furthest, itself, asked.overrides,
        asked.exact, declared=declared,
    ).narrowed("where", where, {})  # fmt: skip


def _operand(target: Target, asked: Asked) -> Any:
    """The query's vector as an expression; a list of them where there are several."""
    if asked.many:
        return [target.operand(one) for one in asked.query]
    return target.operand(asked.query)


def _narrowing(search: DocumentSearch) -> tuple[Call, ...]:
    """Calls that choose passages by what the caller says of them and their documents."""
    if search.narrowing or search.loader_criteria or narrows(search.declared):
        return (join_of(search.declared), *search.narrowing)
    return ()


def _statement(search: DocumentSearch) -> Nearest:
    declared, asked, names = search.declared, search.asked, search.names
    right = _operand(search.target, asked)
    document, passage = declared.document, declared.passage
    if asked.many:
        queries = (
            sa.func.unnest(postgresql.array(right))
            .table_valued("vector", with_ordinality="number", name="passages_queries")
            .render_derived()
        )
        rows: Any = _answer(search, queries.c.vector).lateral("passages_answer")
        number = [queries.c.number]
        query = [(queries.c.number - sa.literal_column("1")).label(search.called("query"))]
    else:
        rows = _answer(search, right).subquery("passages_answer")
        number, query = [], []
    own = [rows.c[name].label(search.called(name)) for name in ("similarity", "score")]
    statement: Any = Nearest(document, passage, *own, *query)
    if asked.many:
        statement = statement.select_from(queries).join_from(queries, rows, sa.true())
    same = [key == rows.c[name] for key, name in zip(_document_keys(declared), names, strict=True)]
    statement = statement.join_from(rows, document, sa.and_(*same))
    statement = statement.join_from(rows, passage, passage.id == rows.c.id)
    statement = statement.order_by(
        *number, rows.c.score.desc(), *(rows.c[n] for n in names), rows.c.similarity.desc(),
        rows.c.id,
    )  # fmt: skip
    shaped: Nearest = replayed(statement, search.shaping)
    shaped.search = search
    return shaped


def _answer(search: DocumentSearch, right: Any) -> sa.Select[Any]:
    """Of one query: keys and scores of the page's documents, and their best passages."""
    stages, looks = _looks(search, right)
    page = _page(search, looks, right)
    best = _best(search, right, page)
    rows = sa.select(
        *(page.c[name] for name in search.names), page.c.score, best.c.id, best.c.similarity
    ).join_from(page, best, sa.true())
    return rows.add_cte(*stages, page, nest_here=True)


def _document_keys(declared: Declared) -> list[Any]:
    return attributes_of(declared.document, (theirs for _, theirs in declared.keys))


def _looks(search: DocumentSearch, right: Any) -> tuple[list[sa.CTE], Any]:
    """Keys of documents and similarities of passages: the near ones, or as many as it takes.

    Each with the number of its look (``stage``): documents of a later one come behind those of the
    first, on whatever page. So pages of one limit are parts of one order.
    """
    if search.limit is None:
        return [], _near(search, right, None, 0)
    needed, depth = search.limit + search.offset, _depth(search)
    stages: list[sa.CTE] = []
    further = _FILTERED if _narrowing(search) else _FURTHER
    for number, size in enumerate((depth, *([further] if further > depth else []), None)):
        rows = _near(search, right, size, number)
        if stages:
            before = stages[-1].alias(f"passages_before_{number}")
            documents = sa.select(*(before.c[n] for n in search.names)).distinct().subquery()
            few = sa.select(sa.func.count()).select_from(documents).scalar_subquery() < needed
            full = sa.select(sa.func.count()).select_from(before).scalar_subquery() >= depth
            rows = rows.where(few, full)
            depth = size or depth
        stages.append(rows.cte(f"passages_found_{number}").prefix_with("MATERIALIZED"))
    return stages, sa.union_all(*(sa.select(*stage.c) for stage in stages))


def _depth(search: DocumentSearch) -> int:
    """Passages that are looked at first."""
    if search.asked.score == "best":
        return max(_LEAST, _EACH * ((search.limit or 0) + search.offset))
    # By the limit alone: which documents are ranked is the same on each page.
    most = search.limit or 0
    return next((size for few, size in _DEPTHS if most <= few), max(_EACH * most, 1_001))


def first_look(search: DocumentSearch) -> Nearest:
    """The search for the nearest passages, which a search for documents begins with."""
    depth = None if search.limit is None else _depth(search)
    return _passages(search, _operand(search.target, search.asked), depth)


def _passages(search: DocumentSearch, right: Any, size: int | None) -> Nearest:
    asked = search.asked
    options = (asked.furthest, (), asked.overrides, asked.exact, _narrowing(search))
    return statement_of(Search(search.target, right, size, 0, *options))


def _near(search: DocumentSearch, right: Any, size: int | None, stage: int) -> sa.Select[Any]:
    """The nearest passages that pass: key of the document, similarity, and the given stage."""
    # As a subquery, of which the planner leaves out the columns that nobody asks for.
    rows = _passages(search, right, size).subquery()
    own = zip(search.declared.keys, search.names, strict=True)
    keys = [rows.c[ours.key].label(name) for (ours, _), name in own]
    number = sa.literal_column(str(stage), sa.Integer()).label("stage")
    return sa.select(*keys, rows.c[search.target.label].label("similarity"), number)


def _page(search: DocumentSearch, looks: Any, right: Any) -> sa.CTE:
    """Keys and scores of the page's documents."""
    rows, names = looks.subquery("passages_found"), search.names
    keys = [rows.c[name] for name in names]
    best = sa.func.max(rows.c.similarity).label("score")
    # The best passage ranks documents as it finds them, so a later look only adds worse ones.
    stage = sa.func.min(rows.c.stage).label("stage")
    documents: Any = sa.select(*keys, best, stage).group_by(*keys).subquery("passages_documents")
    if search.asked.score != "best":
        documents = _with_whole(search, documents, right).subquery("passages_scored")
    page: Any = sa.select(*(documents.c[n] for n in names), documents.c.score)
    order = [documents.c.score.desc(), *(documents.c[n] for n in names)]
    page = page.order_by(*([] if search.asked.score == "best" else [documents.c.stage]), *order)
    if search.limit is not None:
        page = page.limit(search.limit)
    if search.offset:
        page = page.offset(search.offset)
    parts: sa.CTE = page.cte("passages_page").prefix_with("MATERIALIZED")
    return parts


def _with_whole(search: DocumentSearch, documents: Any, right: Any) -> sa.Select[Any]:
    """Scores of the best passage's similarity and the whole document's, as a weighted mean."""
    declared, names = search.declared, search.names
    whole = target_of(getattr(declared.document, declared.whole))
    distance = whole.distance(whole.column, right)
    offset = sa.literal_column(str(int(whole.metric.offset)), _F)
    usable = sa.and_(*whole.comparable(), *whole.proven(whole.column))
    best = documents.c.score
    # A document that is being embedded again has its passages, and perhaps not yet its whole.
    similarity = sa.case((usable, offset - distance), else_=best).label("whole")
    order = [documents.c.stage, best.desc(), *(documents.c[n] for n in names)]
    place = sa.func.row_number().over(order_by=order)
    keys = [documents.c[name] for name in names]
    on = zip(_document_keys(declared), keys, strict=True)
    rows = (
        sa.select(*keys, best, documents.c.stage, similarity, place.label("place"))
        .join_from(documents, declared.document, sa.and_(*(own == key for own, key in on)))
        .correlate(*tables_of(right))
        .subquery("passages_wholes")
    )
    weight: Any = sa.literal(_WHOLE, _F)
    if search.asked.score == "auto":
        # Of the first look alone, or a page that takes a further one would be weighted otherwise.
        judged = sa.and_(rows.c.place <= _JUDGED, rows.c.stage == 0)
        first = sa.func.max(rows.c.whole).filter(judged).over()
        share = first / sa.func.nullif(sa.func.max(rows.c.score).over(), 0)
        part = sa.func.greatest(0.0, sa.func.least(1.0, (share - _NONE) / (1 - _NONE)))
        positive = sa.func.max(rows.c.score).over() > 0
        weight = sa.case((positive, _WHOLE * part), else_=0.0)
    weight = sa.cast(weight, _F)
    score = (1 - weight) * rows.c.score + weight * rows.c.whole
    return sa.select(*(rows.c[name] for name in names), score.label("score"), rows.c.stage)


def _best(search: DocumentSearch, right: Any, page: sa.CTE) -> sa.Lateral:
    """The best passages of each document of the page."""
    declared, target = search.declared, search.target
    passage = declared.passage
    distance = target.distance(passage.embedding, right)
    similarity = target.similarity_from(distance).label("similarity")
    rows: Any = sa.select(passage.id.label("id"), similarity).where(
        *target.comparable(), *target.proven(target.column),
        *(getattr(passage, ours.key) == page.c[name]
          for (ours, _), name in zip(declared.keys, search.names, strict=True)),
    )  # fmt: skip
    if search.asked.furthest is not None:
        rows = rows.where(distance <= search.asked.furthest)
    if search.narrowing:
        rows = replayed(rows, _narrowing(search)).distinct()
    rows = rows.order_by(sa.desc("similarity"), passage.id).limit(search.asked.per_document)
    lateral: sa.Lateral = rows.correlate(page, *tables_of(right)).lateral("passages_best")
    return lateral
