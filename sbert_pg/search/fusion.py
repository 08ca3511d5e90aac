"""``hybrid``: one answer from meaning and words.

Both arms search with the caller's filters; their best rows are fused. *Relative* fusion brings the
scores of each arm to 0 to 1 by its best and worst row (min-max), and adds them with a weight. *RRF*
(reciprocal rank fusion; Cormack, Clarke and Buettcher, 2009) adds 1 / (60 + rank).

The default weight follows the question: meaning weighs ``.7 - .5 * more * clear``. *more* rises
from 0 to 1 as the best row by words holds 0 to 45 % more of the question's idf than the nearest
row, *clear* as its score leads the second by 0 to 40 %, or the tenth by 25 to 60 %. Where words
know one row from the others, and meaning does not find it, they decide; so names, numbers and
identifiers become a search by words, sentences one by both. docs/words.md has the figures; the
constants are those whose losses against the better arm were least over the sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import sqlalchemy as sa
from sqlalchemy.orm import LoaderCriteriaOption

from sbert_pg.errors import DeclarationError
from sbert_pg.search.criteria import Call
from sbert_pg.search.entry import nearest
from sbert_pg.search.passages import MOST_BY_INDEX, DocumentSearch
from sbert_pg.search.statement import Changeable, Nearest, is_number, require_page
from sbert_pg.search.words import WordSearch, is_text_column, rows_of, word_search, words_page
from sbert_pg.types.vector import shown

Fusion = Literal["relative", "rrf"]

#: Rows of each arm that are fused. Ten in place of a hundred cost 3 % of nDCG@10.
DEPTH = 100
#: Weight of meaning where words say nothing special, and how much of it they can take.
MEANING, TAKEN = 0.7, 0.5
#: Share of the idf that the best row holds beyond the nearest one, and shares of its score by which
#: it leads the second, and the tenth (from, and beyond that), where words take all they can.
MORE, LEAD, LEAD_OF_TEN = 0.45, 0.4, (0.25, 0.35)
#: The constant of reciprocal rank fusion, as its authors chose it.
RRF_K = 60

_F = sa.Float(53)


@dataclass(frozen=True, slots=True, eq=False)
class HybridSearch(Changeable):
    """What ``hybrid`` was asked; the counterpart of ``statement.Search``."""

    function: ClassVar[str] = "hybrid"
    meaning: Nearest
    words: WordSearch
    limit: int
    offset: int
    fusion: Fusion
    weight: float | None
    depth: int | None
    shaping: tuple[Call, ...] = ()

    def narrowed(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Nearest:
        """The search, with one more call that chooses rows, in both arms."""
        name, arguments, options = call = self.words.said((name, arguments, options))
        words = replace(self.words, narrowing=(*self.words.narrowing, call))
        meaning = getattr(self.meaning, name)(*arguments, **options)
        return replace(self, meaning=meaning, words=words).statement()

    def shaped(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Nearest:
        """See ``Changeable.shaped``; criteria of the whole statement's choose rows by meaning."""
        criteria = [one for one in arguments if isinstance(one, LoaderCriteriaOption)]
        meaning = self.meaning.options(*criteria) if criteria else self.meaning
        return Changeable.shaped(replace(self, meaning=meaning), name, arguments, options)

    def statement(self) -> Nearest:
        """The statement of the search."""
        values = ["score", "similarity", "meaning_rank", "words_score", "words_rank"]
        page = _fused(self).subquery("hybrid_page")
        return rows_of(self, self.words, page, self.names, values, _first(page))

    @property
    def names(self) -> list[str]:
        """What the parts of a key are called within the statement."""
        return [f"hybrid_key_{n}" for n in range(len(self.key))]

    @property
    def origin(self) -> Any:
        """See ``Changeable.origin``."""
        return self.words.origin

    @property
    def column(self) -> Any:
        """The text column."""
        return self.words.column

    @property
    def key(self) -> list[Any]:
        """Primary key of a row, in the caller's expressions."""
        return self.words.key

    @property
    def fused(self) -> tuple[int, int]:
        """Rows of the arms of meaning and words that are fused: the same on each page."""
        usual = self.depth or max(DEPTH, 2 * self.limit)
        if isinstance(self.meaning.search, DocumentSearch):
            # As many as their passages are looked up by the index for.
            return max(self.limit, MOST_BY_INDEX), usual
        return usual, usual

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of the arms that are read: those of later pages score nothing, and come behind."""
        if self.depth:
            return self.fused
        needed, pages = self.limit + self.offset, 1
        while pages * min(self.fused) < needed:
            pages *= 2
        return self.fused[0] * pages, self.fused[1] * pages


def hybrid(
    column: Any,
    words: Any,
    question: str | Sequence[str],
    *,
    limit: int = 10,
    offset: int = 0,
    where: sa.ColumnElement[bool] | Sequence[sa.ColumnElement[bool]] = (),
    fusion: Fusion = "relative",
    weight: float | None = None,
    depth: int | None = None,
    language: str | None = None,
) -> sa.Select[Any]:
    """A select of the rows nearest in meaning or matching in words, best first.

    An arm that finds nothing takes nothing away from the other. Rows are the entity and ``score``,
    with ``similarity``, ``meaning_rank``, ``words_score`` and ``words_rank`` for what each arm said
    (``NULL`` where it did not find the row). Where the class or table has a column of such a name,
    the search's is behind ``hybrid_``, as in ``hybrid_score``.

    Args:
        column: an embedding column.
        words: a column of the same class or table made with ``text_column``.
        question: the question, in words; or a list of them, as for ``nearest``: then each has its
            ``limit`` rows, and a last column ``query`` has its number, from 0.
        limit, offset, where: as for ``nearest``; a limit is needed.
        fusion: ``"relative"`` or ``"rrf"``.
        weight: weight of meaning, from 0 to 1, as ``fit_weight`` finds it; by default it follows
            the question.
        depth: rows of each arm that are fused; 100, or twice those wanted where that is more.
        language: text search configuration of the question; the column's by default.

    Raises:
        DeclarationError: a column is not of its kind, or a number is out of its range.
    """
    if fusion not in ("relative", "rrf"):
        raise DeclarationError(f"hybrid() fuses 'relative' or by 'rrf', not {fusion!r}.")
    _check_weight(weight)
    if depth is not None and (not isinstance(depth, int) or depth < 1):
        raise DeclarationError(f"hybrid() was given depth={depth!r}; it is 1 or more rows.")
    require_page("hybrid", limit, offset)
    if not is_text_column(words):
        swapped = " They stand the other way round here." if is_text_column(column) else ""
        raise DeclarationError(
            f"hybrid() takes an embedding column and then an attribute made with text_column(), "
            f"and was given {shown(column)} and {shown(words)}.{swapped}"
        )
    by_words = word_search(words, question, where, language)
    if by_words.entity is not getattr(getattr(column, "parent", None), "entity", None):
        raise DeclarationError(
            f"hybrid() was given {column!r} and {words!r}; both are of one class or table."
        )
    by_meaning: Any = nearest(column, question, limit=DEPTH, where=where)
    search = HybridSearch(by_meaning, by_words, limit, offset, fusion, weight, depth)
    return search.statement()


def _check_weight(weight: Any) -> None:
    if weight is not None and not (is_number(weight) and 0 <= weight <= 1):
        raise DeclarationError(f"hybrid() was given weight={weight!r}; it is 0 to 1.")


def _fused(search: HybridSearch) -> sa.Select[Any]:
    """Keys, scores and ranks of the rows of each question's page."""
    meaning, by_words = _arms(search)
    weight, names = _weight(search, by_words, meaning), search.names
    same = [meaning.c[n] == by_words.c[n] for n in ("query", *names)]
    query = sa.func.coalesce(meaning.c.query, by_words.c.query)
    if search.fusion == "rrf":
        share: Any = sa.literal(0.5 if search.weight is None else search.weight, _F)
        parts = [
            sa.case((arm.c.rank <= fused, 1.0 / (RRF_K + arm.c.rank)))
            for arm, fused in zip((meaning, by_words), search.fused, strict=True)
        ]
        score = 2 * (share * _or_none(parts[0]) + (1 - share) * _or_none(parts[1]))
    else:
        share = weight.c.weight
        score = share * _or_none(meaning.c.part) + (1 - share) * _or_none(by_words.c.part)
    either = (
        sa.select(
            query.label("query"),
            *(sa.func.coalesce(meaning.c[n], by_words.c[n]).label(n) for n in names),
            score.label("score"),
            meaning.c.similarity,
            meaning.c.rank.label("meaning_rank"),
            by_words.c.score.label("words_score"),
            by_words.c.rank.label("words_rank"),
        )
        .select_from(sa.join(meaning, by_words, sa.and_(*same), full=True))
        .join(weight, weight.c.query == query)
        .subquery("hybrid_either")
    )
    order = [either.c.score.desc(), _first(either), *(either.c[n] for n in names)]
    place = sa.func.row_number().over(partition_by=either.c.query, order_by=order)
    placed = sa.select(*either.c, place.label("place")).subquery("hybrid_placed")
    page = sa.select(*placed.c).where(
        placed.c.place > search.offset, placed.c.place <= search.limit + search.offset
    )
    # Parts of the page, so that two searches of one statement each have their own.
    return page.add_cte(meaning, by_words, weight, nest_here=True)


def weight_of(search: HybridSearch) -> sa.Select[Any]:
    """The weight of meaning that a search of one question takes; no row where nothing is found."""
    meaning, words = _arms(search)
    return sa.select(_weight(search, words, meaning).c.weight)


def _arms(search: HybridSearch) -> tuple[sa.CTE, sa.CTE]:
    """What is found by meaning, and by words."""
    (near, far), names = search.fused, search.names
    page = words_page(search.words, search.rows[1])
    keys = [page.c[f"key_{n}"].label(name) for n, name in enumerate(names)]
    rows = sa.select(page.c.query, *keys, page.c.score, page.c.held).subquery("words_rows")
    meaning = _arm(_meaning_rows(search), "hybrid_meaning", names, near, "similarity")
    words = _arm(rows, "hybrid_words", names, far, "score", "held")
    return meaning, words


def _first(rows: Any) -> sa.ColumnElement[int]:
    """The better rank of a row in the two arms, which tells rows of one score apart."""
    return sa.func.least(rows.c.meaning_rank, rows.c.words_rank)


def _meaning_rows(search: HybridSearch) -> sa.Subquery:
    """Questions, keys and similarities of the nearest rows."""
    statement: Any = search.meaning.limit(search.rows[0])
    # Taken by their places: a class may have columns of these names.
    columns = list(statement.selected_columns)
    query = sa.literal_column("0", sa.BigInteger())
    if search.words.many:
        query = columns.pop()
    similarity = columns[-1].label("similarity")
    keys = [key.label(name) for key, name in zip(search.words.key, search.names, strict=True)]
    # Of this very statement: the method of a search would make another, with columns of its own.
    rows = sa.Select.with_only_columns(statement, query.label("query"), *keys, similarity)
    return rows.subquery("meaning_rows")


def _arm(rows: sa.Subquery, name: str, names: list[str], fused: int, by: str, *more: str) -> sa.CTE:
    """The rows of an arm with their rank, and the scores of those that are fused as parts of 1."""
    order = [rows.c[by].desc(), *(rows.c[n] for n in names)]
    place = sa.func.row_number().over(partition_by=rows.c.query, order_by=order)
    ranked = sa.select(*rows.c, place.label("rank")).subquery(f"{name}_ranked")
    value, query = ranked.c[by], ranked.c.query
    least, most = (
        value_of(value).filter(ranked.c.rank <= fused).over(partition_by=query)
        for value_of in (sa.func.min, sa.func.max)
    )
    part = sa.case(
        (ranked.c.rank > fused, 0.0),
        (most > least, (value - least) / sa.func.nullif(most - least, 0)),
        # Equal scores, or a single row: nothing tells them apart, and each counts as the best.
        else_=1.0,
    )
    columns = [query, *(ranked.c[n] for n in names), sa.cast(value, _F).label(by)]
    columns += [ranked.c[n] for n in more]
    select = sa.select(*columns, sa.cast(part, _F).label("part"), ranked.c.rank)
    return select.cte(name).prefix_with("MATERIALIZED")


def _weight(search: HybridSearch, words: sa.CTE, meaning: sa.CTE) -> sa.CTE:
    """Weight of meaning for each question: all where words find nothing, none where it does."""
    score, rank = words.c.score, words.c.rank
    matched = (
        sa.select(
            words.c.query,
            sa.func.max(score).label("first"),
            sa.func.coalesce(sa.func.max(score).filter(rank == 2), 0.0).label("second"),
            sa.func.min(score).filter(rank <= 10).label("tenth"),
            sa.func.max(words.c.held).filter(rank == 1).label("held"),
        )
        .group_by(words.c.query)
        .subquery("words_matched")
    )
    same = [words.c[n] == meaning.c[n] for n in ("query", *search.names)]
    # Rows behind those that are fused are read on later pages only, and weigh nothing.
    joined = sa.join(meaning, words, sa.and_(*same, rank <= search.fused[1]), isouter=True)
    nearest_ = (
        sa.select(meaning.c.query, sa.func.coalesce(words.c.held, 0.0).label("held"))
        .select_from(joined)
        .where(meaning.c.rank == 1)
        .subquery("meaning_first")
    )
    usual: Any = sa.literal(search.weight, _F)
    if search.weight is None:
        best = sa.func.nullif(matched.c.first, 0.0)
        lead, of_ten = (1 - matched.c[name] / best for name in ("second", "tenth"))
        low, high = LEAD_OF_TEN
        clear = sa.func.greatest(lead / LEAD, (of_ten - low) / high, 0.0)
        more = sa.func.greatest((matched.c.held - nearest_.c.held) / MORE, 0.0)
        usual = MEANING - TAKEN * _at_most_1(more) * _at_most_1(clear)
    weight = sa.case(
        (matched.c.query.is_(None), 1.0), (nearest_.c.query.is_(None), 0.0), else_=usual
    )
    both = sa.join(matched, nearest_, nearest_.c.query == matched.c.query, full=True)
    query = sa.func.coalesce(matched.c.query, nearest_.c.query).label("query")
    select = sa.select(query, sa.cast(weight, _F).label("weight")).select_from(both)
    return select.cte("hybrid_weight").prefix_with("MATERIALIZED")


def _at_most_1(value: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.least(1.0, value, type_=_F)


def _or_none(value: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.coalesce(value, 0.0, type_=_F)
