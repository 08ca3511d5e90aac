"""What a search did: which way it took, why, and how sure its answer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg.errors import DeclarationError
from sbert_pg.search.fusion import HybridSearch, weight_of
from sbert_pg.search.looks import Look
from sbert_pg.search.passages import DocumentSearch, first_look
from sbert_pg.search.statement import Nearest, Search, parts_of
from sbert_pg.search.ways import HEAD, LOCAL, Ways
from sbert_pg.search.words import WordSearch, words_of
from sbert_pg.system import require_connection

Way = Literal["index", "exact"]


@dataclass(frozen=True, slots=True)
class SearchExplanation:
    """How a search finds its rows.

    Attributes:
        way: ``"index"`` where the index's own rows are the answer, else ``"exact"``.
        certain: whether the answer is exact. An index is approximate: with the defaults recall@10
            is .98 or more on average.
        share: estimated part of the table's rows that pass the criteria, where it was estimated.
        looked: nearest rows of the index that were looked at, 0 where it was not asked.
    """

    way: Way
    reason: str
    certain: bool
    share: float | None
    looked: int
    passed: int
    sql: str

    def __str__(self) -> str:
        sure = "exact" if self.certain else "approximate"
        return f"{self.way} ({sure}): {self.reason}"


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a question and rows that have it; a ``common`` one brings no rows by itself."""

    lexeme: str
    rows: float
    idf: float
    common: bool

    def __str__(self) -> str:
        return f"{self.lexeme} ({self.rows:,.0f} rows, idf {self.idf:.2f})"


@dataclass(frozen=True, slots=True)
class WordsExplanation:
    """What a search by words, or by both (with weight and meaning), makes of its question."""

    words: tuple[Word, ...]
    weight: float | None
    meaning: SearchExplanation | None
    sql: str

    def __str__(self) -> str:
        lines = [f"words: {', '.join(map(str, self.words)) or 'none that is known or asked for'}"]
        if self.meaning is not None:
            lines += [f"meaning: {self.meaning}", f"weight of meaning: {self.weight:.2f}"]
        return "\n".join(lines)


def _written_out(statement: Nearest, connection: sa.Connection) -> str:
    """A statement as it is sent, with values that are part of its text."""
    return str(statement.compile(connection, compile_kwargs={"render_postcompile": True}))


def explain_words(session: Session | sa.Connection, statement: Nearest) -> WordsExplanation:
    """Say what a search by ``matching`` or ``hybrid`` makes of its question.

    The rows of ``hybrid`` say what each arm found: ranks, similarity and score.

    Args:
        session: a session or connection of the database; its transaction continues.
        statement: what ``matching`` or ``hybrid`` has given.

    Raises:
        DeclarationError: it is neither, or is of several questions.
    """
    require_connection("explain_words", session)
    search = getattr(statement, "search", None)
    words = search.words if isinstance(search, HybridSearch) else search
    if not isinstance(words, WordSearch) or words.many:
        raise DeclarationError(
            "explain_words() explains one question of matching() or hybrid(); give it one."
        )
    connection = session.connection() if isinstance(session, Session) else session
    words_found = session.execute(words_of(words)).all()
    weight, meaning = None, None
    if isinstance(search, HybridSearch):
        weight = session.execute(weight_of(search)).scalar()
        meaning = explain_search(session, search.meaning)
    sql = _written_out(statement, connection)
    return WordsExplanation(tuple(Word(*row) for row in words_found), weight, meaning, sql)


def explain_search(session: Session | sa.Connection, statement: Nearest) -> SearchExplanation:
    """Run the part of a search that decides how rows are found, and say what it decided.

    With an ``AsyncSession`` or an asynchronous connection use its ``run_sync``.

    Args:
        session: a session or connection of the database; its transaction continues.
        statement: what ``nearest`` has given, with all that was added to it. Of documents by their
            passages it is the first look at these.

    Raises:
        DeclarationError: the statement is not a search, or is one of several queries or of each row
            of another table.
    """
    require_connection("explain_search", session)
    search = getattr(statement, "search", None)
    if isinstance(search, DocumentSearch):
        search = first_look(search).search
    if not isinstance(search, Search):
        raise DeclarationError(
            "explain_search() takes what nearest() has given; explain_words() the others."
        )
    if search.many or search.outer():
        raise DeclarationError(
            "explain_search() explains one query; give nearest() one of them as a text or vector."
        )
    connection = session.connection() if isinstance(session, Session) else session
    sql = _written_out(statement, connection)
    parted, reason = parts_of(search), _without(search)
    if search.itself and session.execute(sa.select(search.right.is_(None))).scalar_one():
        parted = None
        reason = "the object that others are to be like has no vector yet: nothing is found"
    if parted is None:
        return SearchExplanation("exact", reason, True, None, 0, 0, sql)
    ways, parts = parted
    verdict = sa.select(ways.verdict.subquery("verdict")).add_cte(*parts, nest_here=True)
    return _explained(session.execute(verdict).mappings().one(), ways, sql)


def _explained(row: Any, ways: Ways, sql: str) -> SearchExplanation:
    """What the deciding part has decided, in words."""
    looked, share, passed = ways.first.least, None, row["passed"]
    if ways.plan is not None:
        looked, share = row["looked"], None if row["share"] is None else float(row["share"])
    if ways.plan is not None and not row["by_index"]:
        reason = "a sample of the table has no rows, so those that pass are compared"
        if share is not None:
            reason = f"about {share:.2%} of the rows pass, and comparing them is sooner than a look"
        return SearchExplanation("exact", reason, True, share, 0, 0, sql)
    counts = f"{passed} of the nearest {looked} rows pass"
    if row["far"] and ways.second is not None:
        reason, most = _told_apart(row, counts, ways, ways.second)
        return SearchExplanation("index", reason, False, share, most, passed, sql)
    if row["taken"]:
        return SearchExplanation("index", counts, False, share, looked, passed, sql)
    reason = _refused(row, counts, looked, ways)
    return SearchExplanation("exact", reason, True, share, looked, passed, sql)


def _without(search: Any) -> str:
    if search.exact:
        return "exact=True was asked for"
    if search.target.index is None:
        return "no vector index is declared on the table"
    if not search.limit:
        return "all rows are asked for"
    if search.named:
        return "the criteria name the rows one by one"
    return f"limit {search.limit} is more than an index finds reliably, or it holds other rows"


def _refused(row: Any, counts: str, looked: int, ways: Ways) -> str:
    """Why the rows of the looks are no answer."""
    if row["accepted"]:
        return f"{counts}, but fewer than {ways.shape.size} of them are proven to be the encoder's"
    if row["passed"] < ways.shape.size:
        return f"{counts}, fewer than the {ways.shape.size} that are needed"
    if not row["spread"]:
        return f"{counts}, and are equally far: an island of equal vectors"
    if row["seen"] < (ways.whole(ways.first) if ways.index.quantized else looked):
        return (
            f"the index gave {row['seen']} of the {looked} rows looked for: there are no more, or "
            "deleted ones stand in their way"
        )
    doubt = _doubt(row, looked, ways)
    if ways.plan is None:
        return doubt
    if row["head"] > HEAD * looked or row["passed"] < LOCAL * row["share"] * looked:
        return f"{counts}, the first at place {row['head']}: fewer or later than in the whole table"
    missed = (
        f"{counts}, but a row of the sample is nearer, which the index has not found, or all are "
        "nearly as far: nothing is near the question"
    )
    return f"{missed}, or {doubt}" if ways.coarse else missed


def _told_apart(row: Any, counts: str, ways: Ways, second: Look) -> tuple[str, int]:
    """Why the second look is an answer, and how many rows it looked at."""
    if not ways.same:
        return f"{counts}, enough of the nearest {second.most}", second.most
    if row["accepted"]:
        return f"{counts}, and the page goes on behind them: more were looked for", second.most
    reason = (
        "a first look gave too few rows, or such that are nearly equally far; with "
        f"{second.ef_search} candidates they are told apart"
    )
    return reason, ways.first.least


def _doubt(row: Any, looked: int, ways: Ways) -> str:
    """Why there are likely nearer rows than those of the looks, whether they pass or not."""
    if not ways.coarse:
        return f"the nearest {looked} rows are nearly equally far: nothing is near the question"
    return (
        f"some of the nearest come late among the {row['seen']:.0f} rows that the "
        f"{ways.index.form} index gave by its coarse order: nearer ones may lie behind its end"
    )
