"""One question to several kinds of search, side by side, with the reason and the code of each."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from starlette.datastructures import QueryParams

from sbert_pg import system
from sbert_pg.errors import SbertPgError
from sbert_pg.reranking import Scorer, rerank
from sbert_pg.search import explain_search, explain_words
from sbert_pg.search.explain import WordsExplanation
from sbert_pg.serving.exposed import By, Exposed, Hit, Question, Shown
from sbert_pg.serving.html import Html, h
from sbert_pg.serving.http import refusal_of
from sbert_pg.types.comparator import metric_for

OPERATORS = ("=", "!=", "<", "<=", ">", ">=")
#: Characters of a value that are shown.
SHOWN = 400
#: Rows of an answer, and rows that a reranker is given to choose them from.
ROWS, CANDIDATES = 10, 50
#: Kinds of search by their title: what is compared, and whether with every row.
KINDS: dict[str, tuple[By, bool]] = {
    "meaning": ("meaning", False),
    "words": ("words", False),
    "both": ("both", False),
    "reranked": ("both", False),
    "exact": ("meaning", True),
}
Where = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one kind of search has given: rows, best first, the time that they took, the words of
    the question as PostgreSQL knows them, or what went wrong instead.
    """

    kind: str
    hits: Sequence[Hit] = ()
    milliseconds: float = 0.0
    why: str = ""
    sql: str = ""
    lexemes: tuple[str, ...] = ()
    error: str = ""


def filters_of(query: QueryParams) -> dict[str, dict[str, str]]:
    """The filters of a form, as ``Question.where`` has them; those without a column are none."""
    where: dict[str, dict[str, str]] = {}
    parts = (query.getlist(name) for name in ("c", "o", "v"))
    for column, operator, value in zip(*parts, strict=False):
        if column:
            where.setdefault(column, {})[operator] = value
    return where


def compared(
    shown: Shown,
    exposed: Exposed,
    question: str,
    where: Where,
    only: Sequence[str] = (),
    title: str | None = None,
    reranker: Scorer | None = None,
) -> Iterator[Html]:
    """A column for each kind of search that the table has, or of ``only``.

    A reranker chooses its own column, of the first rows by both, or by meaning.
    """
    kinds = only or [kind for kind in KINDS if _is_had(kind, exposed, reranker)]
    answers = [_asked(shown, exposed.name, kind, question, where, reranker) for kind in kinds]
    lexemes = {lexeme for answer in answers for lexeme in answer.lexemes}
    marked = shown.within(exposed.name, lambda c, t: _marks(c, t, answers, lexemes))
    for answer in answers:
        yield h(
            "section",
            h("h2", title or answer.kind, h("small", f" {answer.milliseconds:.0f} ms")),
            None if title else _agreement(answer, answers),
            _body(exposed, answer, answers, marked),
            _reasons(exposed, answer, question, where),
            data_kind=answer.kind,
        )


def _body(
    exposed: Exposed, answer: _Answer, answers: Sequence[_Answer], marked: Mapping[str, Html]
) -> Iterator[Html]:
    if answer.error:
        yield h("p", answer.error, class_="fault", role="alert")
    yield h("ol", [_row(exposed, hit, answer, answers, marked) for hit in answer.hits])
    if not answer.hits and not answer.error:
        yield h("p", "Nothing is found.", class_="faint")


def _is_had(kind: str, exposed: Exposed, reranker: Scorer | None) -> bool:
    if kind == "reranked":
        return reranker is not None
    return KINDS[kind][0] == "meaning" or exposed.text is not None


def _asked(
    shown: Shown, name: str, kind: str, question: str, where: Where, reranker: Scorer | None
) -> _Answer:
    def work(connection: sa.Connection, table: Exposed) -> _Answer:
        by, exact = KINDS[kind]
        by = by if table.text is not None else "meaning"
        limit = CANDIDATES if kind == "reranked" else ROWS
        statement = table.statement(
            connection, Question(question, by, limit, dict(where), exact=exact)
        )
        started = time.perf_counter()
        hits = table.read(connection, statement)
        if kind == "reranked" and reranker is not None:
            hits = _reranked(table, hits, question, reranker)
        milliseconds = (time.perf_counter() - started) * 1000
        explain: Any = explain_search if by == "meaning" else explain_words
        why = explain(connection, statement)
        words = why.words if isinstance(why, WordsExplanation) else ()
        lexemes = tuple(word.lexeme for word in words)
        return _Answer(kind, hits, milliseconds, str(why), why.sql, lexemes)

    try:
        return shown.within(name, work)
    except (SbertPgError, sa.exc.SQLAlchemyError) as error:
        return _Answer(kind, error=str(refusal_of(error)))


def _reranked(table: Exposed, hits: Sequence[Hit], question: str, reranker: Scorer) -> list[Hit]:
    """The best of some rows by what a reranker says of the text that is shown."""

    def text(row: Hit) -> str | None:
        texts = [str(row.row[c]) for c in table.text_columns if row.row.get(c) is not None]
        return "\n".join(texts) or None

    best = rerank(hits, question, reranker, text=text, limit=ROWS)
    return [replace(one.row, scores={"reranker": one.score}) for one in best]


def _agreement(answer: _Answer, answers: Sequence[_Answer]) -> Html | None:
    """How much of the exact answer the one by the index has."""
    meaning = next((a for a in answers if a.kind == "meaning"), None)
    if answer.kind != "exact" or meaning is None or answer.error or meaning.error:
        return None
    keys = {hit.key for hit in answer.hits}
    same = len(keys & {hit.key for hit in meaning.hits})
    return h("p", f"{same} of these {len(keys)} are in the answer by meaning.", class_="faint")


def _row(
    exposed: Exposed,
    hit: Hit,
    answer: _Answer,
    answers: Sequence[_Answer],
    marked: Mapping[str, Html],
) -> Html:
    scores = [
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in hit.scores.items()
        if value is not None and not name.endswith("_rank")
    ]
    places = [
        h("span", f"{other.kind} {rank}", class_="rank")
        for other in answers
        if other is not answer
        for rank, one in enumerate(other.hits, 1)
        if one.key == hit.key
    ]
    return h(
        "li",
        h("p", excerpt(exposed, hit, marked), dir="auto", class_="text"),
        h("p", _others(exposed, hit), dir="auto", class_="faint"),
        h("p", h("span", " · ".join(scores), class_="score"), places),
    )


def excerpt(exposed: Exposed, hit: Hit, marked: Mapping[str, Html] | None = None) -> list[Any]:
    """The text of a row as far as its columns are shown, words of the question marked."""
    texts = [cut(hit.row[c]) for c in exposed.text_columns if hit.row.get(c) is not None]
    if not texts:
        return [cut(hit.key)]
    parts: list[Any] = []
    for number, text in enumerate(texts):
        shown = (marked or {}).get(text, text)
        parts += [h("b", shown) if number == 0 and len(texts) > 1 else shown, " "]
    return parts


def _others(exposed: Exposed, hit: Hit) -> str:
    texts = exposed.text_columns
    values = {c: v for c, v in hit.row.items() if c not in texts and v is not None}
    return " · ".join(f"{name} {cut(value, 60)}" for name, value in values.items())


def cut(value: Any, width: int = SHOWN) -> str:
    """The beginning of a value as it is shown."""
    text = str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _marks(
    connection: sa.Connection, exposed: Exposed, answers: Sequence[_Answer], lexemes: set[str]
) -> dict[str, Html]:
    """The texts that are shown, with the words of the question marked by PostgreSQL itself."""
    rows = [hit.row for answer in answers for hit in answer.hits]
    texts = sorted({cut(row[column]) for column in exposed.text_columns for row in rows
                    if row.get(column) is not None})  # fmt: skip
    if exposed.text is None or not lexemes or not texts:
        return {}
    language = exposed.text.type.language  # type: ignore[attr-defined]
    begin, end = secrets.token_hex(8), secrets.token_hex(8)
    quoted = ("'" + one.replace("\\", "\\\\").replace("'", "''") + "'" for one in sorted(lexemes))
    cells = system.unnested("shown", text=system.array(texts))
    marked = sa.func.ts_headline(
        sa.cast(language, postgresql.REGCONFIG),
        cells.c.text,
        sa.cast(" | ".join(quoted), postgresql.TSQUERY),
        f"HighlightAll=true, StartSel={begin}, StopSel={end}",
    )
    pattern = re.compile(f"{begin}(.*?){end}", re.DOTALL)
    shown = {}
    for text, with_marks in connection.execute(sa.select(cells.c.text, marked).select_from(cells)):
        parts = pattern.split(with_marks)
        shown[text] = Html(
            "".join(h("mark", part) if i % 2 else h("span", part) for i, part in enumerate(parts))
        )
    return shown


def _reasons(exposed: Exposed, answer: _Answer, question: str, where: Where) -> Html | None:
    if answer.error:
        return None
    blocks = [("SQLAlchemy", _orm(exposed, answer.kind, question, where))]
    if answer.kind in ("meaning", "exact"):
        blocks.append(("psql", _psql(exposed, question, where)))
    blocks.append(("The statement that ran", answer.sql))
    return h(
        "details",
        h("summary", "Why, and the code"),
        h("p", [[line, h("br")] for line in answer.why.splitlines()], class_="why", dir="auto"),
        [
            [h("h3", name, h("button", "Copy", type="button", class_="copy")), h("pre", code)]
            for name, code in blocks
        ],
    )


def _orm(exposed: Exposed, kind: str, question: str, where: Where) -> str:
    """The search as an application writes it."""
    table = exposed.embedding.table
    entity = "".join(part.capitalize() for part in table.name.split("_"))
    column = f"{entity}.{exposed.embedding.name}"
    words = f"{entity}.{exposed.text.name}" if exposed.text is not None else ""
    call = {
        "meaning": f"nearest({column}, {question!r}, limit={ROWS})",
        "exact": f"nearest({column}, {question!r}, limit={ROWS}, exact=True)",
        "words": f"matching({words}, {question!r}, limit={ROWS})",
        "both": f"hybrid({column}, {words}, {question!r}, limit={ROWS})",
        "reranked": f"hybrid({column}, {words}, {question!r}, limit={CANDIDATES})"
        if words
        else f"nearest({column}, {question!r}, limit={CANDIDATES})",
    }[kind]
    filters = "".join(
        f"\n    .where({entity}.{name} {'==' if op == '=' else op} {_python(table.c[name], value)})"
        for name, values in where.items()
        for op, value in values.items()
    )
    code = f"session.execute(\n    {call}{filters}\n).all()"
    if kind != "reranked":
        return code
    source = ", ".join(f"row.{entity}.{name}" for name in exposed.text_columns)
    text = f'lambda row: "\\n".join([{source}])'
    return f"rerank({code}, {question!r}, reranker, text={text}, limit={ROWS})"


def _python(column: sa.Column[Any], value: str) -> str:
    number = isinstance(column.type, (sa.Integer, sa.Numeric)) and re.fullmatch(
        r"-?\d+(\.\d+)?", value
    )
    return value if number else repr(value)


def _psql(exposed: Exposed, question: str, where: Where) -> str:
    """The ranking in plain SQL, for psql: docs/serve.md."""
    table, column = exposed.embedding.table, exposed.embedding
    literal: Any = sa.String().literal_processor(system.PLAIN)  # type: ignore[no-untyped-call]
    storage = column.type.storage  # type: ignore[attr-defined]
    vector: sa.ColumnElement[Any] = sa.literal_column(f":'embedding'::{storage}")
    ranked = (
        sa.select(*(table.c[name] for name in exposed.columns))
        .where(
            *(
                table.c[name].op("<>" if op == "!=" else op)(sa.literal_column(literal(value)))
                for name, values in where.items()
                for op, value in values.items()
            )
        )
        .order_by(column.op(metric_for(column).operator)(vector))
        .limit(sa.literal_column("10"))
    )
    call = f"CALL sbert.embed({literal(exposed.bound)}, {literal(question)}, NULL) \\gset"
    return f"{call}\n{ranked.compile(dialect=system.PLAIN)};"
