"""Searching by words: BM25 against a reference, phrases, filters, pages, odd questions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from standard_docstrings import documented

from sbert_pg.cli.demo_data import standard_library
from sbert_pg.errors import DeclarationError
from sbert_pg.search.bm25 import K1, B, length_of
from sbert_pg.search.words import Question, matching
from sbert_pg.types.text import TextSearch, text_column, text_index


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Note(Base):
    __tablename__ = "note"
    __table_args__ = (text_index("note_search", "search"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    body: Mapped[str | None] = mapped_column(sa.Text)
    kind: Mapped[str] = mapped_column(default="")
    author_id: Mapped[int | None] = mapped_column(sa.ForeignKey("author.id"))
    search = text_column("title", "body")


class Weighed(Base):
    __tablename__ = "weighed"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    search = text_column("title", "body", weights={"title": 3})


class Spoken(Base):
    __tablename__ = "spoken"
    __table_args__ = tuple(
        text_index(f"spoken_{name}", "search", where=sa.text(f"language = '{name}'::regconfig"))
        for name in ("english", "german")
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    language: Mapped[Any] = mapped_column(sa.dialects.postgresql.REGCONFIG)
    body: Mapped[str]
    search = text_column("body", language_column="language")


class Rated(Base):
    __tablename__ = "rated"
    __table_args__ = (text_index("rated_search", "search", where=sa.text("stars > 3")),)
    id: Mapped[int] = mapped_column(primary_key=True)
    stars: Mapped[int | None]
    body: Mapped[str]
    search = text_column("body")


class Odd(Base):
    __tablename__ = 'a "$x$ %table:1'
    id: Mapped[int] = mapped_column("key", primary_key=True)
    body: Mapped[str] = mapped_column('the "body" %s :x')
    search = text_column('the "body" %s :x', language="simple", name='se"arch')


_ALONE = TextSearch(("body",), "german")


@pytest.fixture
def session(bare_database_url: sa.URL) -> Any:
    engine = sa.create_engine(bare_database_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
def library(session: Session) -> Session:
    """Docstrings of the standard library; a third are of one kind."""
    session.execute(
        sa.insert(Note),
        [
            {"id": n, "title": entry.name, "body": entry.docstring, "kind": "abc"[n % 3]}
            for n, entry in enumerate(documented(1000), start=1)
        ],
    )
    session.commit()
    return session


def answers(session: Session, statement: Any) -> list[tuple[int, float]]:
    return [(row[0].id, row.score) for row in session.execute(statement)]


def reference(session: Session, question: str) -> dict[int, float]:
    """BM25 of every note that has a word of the question, computed here from the lexemes."""
    bags = {
        row.id: dict(zip(row.lexemes, row.counts, strict=True))
        for row in session.execute(
            sa.text(
                "SELECT id, array_agg(lexeme) AS lexemes, "
                "array_agg(cardinality(positions)) AS counts FROM note, unnest(search) GROUP BY id"
            )
        )
    }
    every = session.scalars(sa.text("SELECT id FROM note")).all()
    lengths = {id_: sum(bags.get(id_, {}).values()) for id_ in every}
    mean = sum(lengths.values()) / len(lengths)
    asked = session.scalars(
        sa.text("SELECT lexeme FROM unnest(to_tsvector('english', :question))"),
        {"question": question},
    ).all()
    scores: dict[int, float] = {}
    for lexeme in asked:
        df = sum(lexeme in bag for bag in bags.values())
        idf = math.log(1 + (len(every) - df + 0.5) / (df + 0.5))
        for id_, bag in bags.items():
            tf = bag.get(lexeme, 0)
            if tf:
                norm = K1 * (1 - B + B * lengths[id_] / mean)
                scores[id_] = scores.get(id_, 0) + idf * tf * (K1 + 1) / (tf + norm)
    return scores


QUESTIONS = [
    "return a new list of the sorted items",
    "parse the date and time from a string",
    "raise ValueError if the argument is not an integer",
    "deque rotate",
    "the file object",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_scores_are_bm25(library: Session, question: str) -> None:
    """Before the first ANALYZE everything is counted, so scores are exact."""
    expected = sorted(reference(library, question).items(), key=lambda pair: (-pair[1], pair[0]))
    found = answers(library, matching(Note.search, question, limit=50))
    assert [id_ for id_, _ in found] == [id_ for id_, _ in expected[:50]]
    for (_, score), (_, right) in zip(found, expected, strict=False):
        assert score == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("question", QUESTIONS)
def test_scores_are_those_of_bm25s(library: Session, question: str) -> None:
    """The same lexemes to another implementation; it leaves out the constant ``k1 + 1``."""
    bm25s = pytest.importorskip("bm25s")
    lexemes = sa.text(
        "SELECT ARRAY(SELECT lexeme FROM unnest(search) AS s, unnest(s.positions) AS p) "
        "FROM note ORDER BY id"
    )
    corpus = [list(words) for words in library.scalars(lexemes)]
    asked = library.scalars(
        sa.text("SELECT lexeme FROM unnest(to_tsvector('english', :question))"),
        {"question": question},
    ).all()
    other = bm25s.BM25(method="lucene", k1=K1, b=B, dtype="float64")
    other.index(corpus, show_progress=False)
    expected = (K1 + 1) * other.get_scores(list(asked))
    found = answers(library, matching(Note.search, question, limit=None))
    assert len(found) == (expected > 0).sum()
    for id_, score in found:
        assert score == pytest.approx(expected[id_ - 1], rel=1e-6)


@pytest.mark.parametrize("question", QUESTIONS)
def test_statistics_change_no_order_that_matters(library: Session, question: str) -> None:
    counted = answers(library, matching(Note.search, question))
    library.execute(sa.text("ALTER TABLE note ALTER search SET STATISTICS 1000"))
    library.execute(sa.text("ANALYZE note"))
    estimated = answers(library, matching(Note.search, question))
    every = answers(library, matching(Note.search, question, exhaustive=True))
    assert estimated == every, "leaving common words for the end changes nothing"
    both = {id_ for id_, _ in counted} & {id_ for id_, _ in estimated}
    assert len(both) >= min(6, len(counted))
    for (_, a), (_, b) in zip(counted, estimated, strict=True):
        assert a == pytest.approx(b, rel=0.03)


@pytest.mark.parametrize("table", ["analysed", "emptied", "of another role"])
def test_rows_left_out_change_nothing(session: Session, table: str) -> None:
    """Equal texts, a giant one, words of every frequency; pages, and tables with few rows left."""
    random = np.random.default_rng(5)

    def text(length: int) -> str:
        return " ".join(f"w{min(int(n), 999)}" for n in random.pareto(0.6, length))

    bodies = [text(length) for length in random.choice([5, 30, 120], 2_000)]
    bodies += ["w1 w2 w3 equal text"] * 200
    bodies.append(" ".join(f"w{n} w{n % 50} giant" for n in range(20_000)))
    # Long texts, whose only rare word weighs less than a common one in a short text.
    bodies += ["scarce " + " ".join(f"f{n}" for n in range(3_000))] * 15
    # The best have common words alone, of which two do not make a row as good as the rare one does.
    bodies += ["seldom " + " ".join(f"g{n}" for n in range(25))] * 15
    bodies += [common := " ".join(f"w{n}" for n in range(4, 20, 2))] * 12
    rows = [{"id": n, "body": body, "kind": "abc"[n % 3]} for n, body in enumerate(bodies)]
    session.execute(sa.insert(Note), rows)
    session.commit()
    if table == "emptied":
        session.execute(sa.delete(Note).where(Note.id < 1_900))
    session.execute(sa.text("ANALYZE note"))
    if table == "of another role":
        role = f"reader_{id(session)}"
        for statement in (
            f"CREATE ROLE {role}", f"GRANT SELECT ON note TO {role}", f"SET LOCAL ROLE {role}",
        ):  # fmt: skip
            session.execute(sa.text(statement))
    for question in (
        f"seldom {common}", "scarce w5", "w0", "w7 w0", "w0 w1 w2 w3", "w999 w1", "equal text w0",
        "giant w5 w0", "w1 -w2 w5", '"w1 w2" w9', "unknown", "w0 " * 300,
        " ".join(f"w{n}" for n in range(0, 999, 20)),
        *(" ".join(f"w{n}" for n in drawn) for drawn in random.integers(0, 50, (12, 5))),
    ):  # fmt: skip
        for options in ({}, {"limit": 3, "offset": 7}, {"where": Note.kind == "b"}):
            found = answers(session, matching(Note.search, question, **options))
            every = matching(Note.search, question, exhaustive=True, **options)
            assert found == answers(session, every), question
    session.rollback()


@pytest.mark.slow
def test_a_hundred_thousand_rows_with_and_without_pruning(session: Session) -> None:
    """The ten best are the same rows with the same scores."""
    texts = [entry.docstring for entry in standard_library()]
    random = np.random.default_rng(4)
    for first in range(0, 100_000, 10_000):
        picked = random.integers(0, len(texts), size=(10_000, 2))
        rows = [
            {"id": first + n, "title": texts[a][:40], "body": texts[a][:300] + texts[b][-300:]}
            for n, (a, b) in enumerate(picked)
        ]
        session.execute(sa.insert(Note), rows)
    session.execute(sa.text("ALTER TABLE note ALTER search SET STATISTICS 1000"))
    session.execute(sa.text("ANALYZE note"))
    questions = [*QUESTIONS, *(" ".join(text.split()[:8]) for text in texts[::400])]
    for question in questions:
        pruned = answers(session, matching(Note.search, question))
        assert pruned == answers(session, matching(Note.search, question, exhaustive=True))


def test_a_rare_word_does_not_make_the_answer_short(library: Session) -> None:
    """Three rows have the rare word and hundreds the common one; ten are asked for."""
    for id_ in (5, 6, 7):
        library.execute(sa.update(Note).where(Note.id == id_).values(title="quokka"))
    library.execute(sa.text("ANALYZE note"))
    found = answers(library, matching(Note.search, "quokka return", limit=10))
    assert len(found) == 10
    assert {id_ for id_, _ in found[:3]} == {5, 6, 7}
    narrowed = matching(Note.search, "quokka return", limit=10).where(Note.kind == "a")
    found = answers(library, narrowed)
    assert len(found) == 10
    assert all(id_ % 3 == 0 for id_, _ in found)


def test_filters_joins_and_pages(library: Session) -> None:
    library.add(Author(id=1, name="Ann"))
    library.flush()
    library.execute(sa.update(Note).where(Note.id <= 700).values(author_id=1))
    library.execute(sa.text("ANALYZE note"))
    joined = (
        matching(Note.search, "return the list", limit=7)
        .join(Author, Author.id == Note.author_id)
        .where(Author.name == "Ann")
    )
    direct = matching(Note.search, "return the list", limit=7, where=Note.author_id == 1)
    assert answers(library, joined) == answers(library, direct)
    assert len(answers(library, joined)) == 7
    pages = [
        id_
        for offset in range(0, 40, 8)
        for id_, _ in answers(
            library, matching(Note.search, "return the list", limit=8, offset=offset)
        )
    ]
    whole = answers(library, matching(Note.search, "return the list", limit=40))
    assert pages == [id_ for id_, _ in whole]
    assert (
        answers(library, matching(Note.search, "return").limit(3).offset(2))
        == answers(library, matching(Note.search, "return", limit=5))[2:]
    )
    everything = answers(library, matching(Note.search, "deque", limit=None))
    assert {id_ for id_, _ in everything} == set(reference(library, "deque"))


def test_many_questions_are_answered_as_one_by_one(library: Session) -> None:
    library.execute(sa.text("ANALYZE note"))
    questions = [*QUESTIONS, "", '"a list" -sorted', "the of and"]
    together = library.execute(matching(Note.search, questions, limit=7).where(Note.kind == "a"))
    found = [(row.query, row[0].id, row.score) for row in together]
    assert found == [
        (number, id_, score)
        for number, question in enumerate(questions)
        for id_, score in answers(
            library, matching(Note.search, question, limit=7).where(Note.kind == "a")
        )
    ]
    assert {query for query, _, _ in found} == {0, 1, 2, 3, 4, 6}


def test_equal_rows_are_in_the_order_of_their_keys(session: Session) -> None:
    session.execute(sa.insert(Note), [{"id": n, "title": "same words"} for n in range(40, 0, -1)])
    assert [id_ for id_, _ in answers(session, matching(Note.search, "words"))] == list(
        range(1, 11)
    )


def test_phrases_and_exclusions(session: Session) -> None:
    texts = ["New York is large", "York is not new", "A new day in old York", "New York state"]
    session.execute(
        sa.insert(Note), [{"id": n, "body": text} for n, text in enumerate(texts, start=1)]
    )
    found = answers(session, matching(Note.search, '"new york"'))
    assert {id_ for id_, _ in found} == {1, 4}
    found = answers(session, matching(Note.search, '"new york" -state'))
    assert {id_ for id_, _ in found} == {1}
    found = answers(session, matching(Note.search, 'york -"new york"'))
    assert {id_ for id_, _ in found} == {2, 3}
    for dashes in ("--new", "----new", '--"new"'):
        found = answers(session, matching(Note.search, f"york {dashes}"))
        assert {id_ for id_, _ in found} == {1, 2, 3, 4}, "two dashes exclude nothing"
    assert answers(session, matching(Note.search, "york ---new")) == []
    assert Question.read('a "b c" -d -"e f" g') == Question("a g b c", '"b c" -"e f" -"d"')


@pytest.mark.parametrize("question", ["", "   ", "the of and", "qwertzuiop", '""', "-", '"', "-x"])
def test_questions_without_a_known_word_find_nothing(session: Session, question: str) -> None:
    session.execute(sa.insert(Note), [{"id": 1, "body": "x marks the spot"}])
    assert session.execute(matching(Note.search, question)).all() == []
    for broken in ("\0", "\ud83d", "\ud83d \udc00"):
        assert len(session.execute(matching(Note.search, f"{question}{broken}spot")).all()) < 2
        assert session.execute(matching(Note.search, f"{broken} spot")).one()[0].id == 1


@given(question=st.text(max_size=60) | st.text("'\"\\:*&|!()<-> aé", max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_question_is_an_error(session: Session, question: str) -> None:
    question = question.encode("utf-8", "ignore").decode()
    session.execute(matching(Note.search, question)).all()


def test_odd_lexemes_are_found(session: Session) -> None:
    """Quotes and backslashes inside of a lexeme, which a query has to quote."""
    texts = [r"C:\path\to\file.txt", "it's o'clock", "http://example.org/a?b=c&d", "100% sure"]
    session.execute(
        sa.insert(Odd), [{"id": n, "body": text} for n, text in enumerate(texts, start=1)]
    )
    for id_, text in enumerate(texts, start=1):
        rows = session.execute(matching(Odd.search, text)).all()
        assert rows, text
        assert rows[0][0].id == id_


def test_a_column_can_weigh_more(session: Session) -> None:
    session.execute(
        sa.insert(Weighed),
        [
            {"id": 1, "title": "pears", "body": "apples and more"},
            {"id": 2, "title": "apples", "body": "pears and more"},
        ],
    )
    assert [row[0].id for row in session.execute(matching(Weighed.search, "apples"))] == [2, 1]


def test_a_language_for_each_row(session: Session) -> None:
    session.execute(
        sa.insert(Spoken),
        [
            {"id": 1, "language": "english", "body": "the houses"},
            {"id": 2, "language": "german", "body": "die Häuser und Gärten"},
        ],
    )
    english = session.execute(matching(Spoken.search, "house")).all()
    german = session.execute(matching(Spoken.search, "Garten", language="german")).all()
    assert [row[0].id for row in english] == [1]
    assert [row[0].id for row in german] == [2]


def test_a_language_that_the_database_has_not(session: Session) -> None:
    with pytest.raises(DeclarationError, match=r'"klingon" does not exist.*pg_ts_config'):
        session.execute(matching(Note.search, "nuqneH", language="klingon"))


def test_words_of_a_language_are_counted_in_its_rows(library: Session) -> None:
    """A language of few rows, whose words the other rows have too; its own partial index."""
    texts = [entry.docstring for entry in documented(1000)]
    rows = [
        {"id": n, "language": "english" if n % 20 else "german", "body": text}
        for n, text in enumerate(texts, start=1)
    ]
    library.execute(sa.insert(Spoken), rows)
    library.execute(sa.delete(Note).where(Note.id % 20 != 0))
    library.execute(sa.update(Note).values(title=None))
    german = "to_tsvector('german', body)"
    library.execute(sa.text(f"CREATE TABLE alone AS SELECT id, {german} AS search FROM note"))
    columns = (sa.Column("id", sa.Integer, primary_key=True), sa.Column("search", _ALONE))
    alone = sa.Table("alone", sa.MetaData(), *columns)
    for analysed in (False, True):
        if analysed:
            library.execute(sa.text("ANALYZE spoken"))
        for question in QUESTIONS:
            expected = library.execute(matching(alone.c.search, question)).all()
            found = answers(library, matching(Spoken.search, question, language="german"))
            assert [id_ for id_, _ in found] == [row.id for row in expected]
            assert [s for _, s in found] == pytest.approx([r.score for r in expected], rel=1e-6)
    library.execute(sa.text("SET LOCAL enable_seqscan = off"))
    plans: list[str] = []
    sa.event.listen(
        library.connection(),
        "before_cursor_execute",
        lambda _, cursor, text, values, *__: plans.extend(
            row[0] for row in cursor.connection.execute("EXPLAIN " + text, values)
        ),
    )
    library.execute(matching(Spoken.search, "deque", language="german")).all()
    assert any("Index Scan on spoken_german" in line for line in plans)


def test_rows_of_which_nothing_is_known_are_rows(session: Session) -> None:
    """The index holds a quarter, and of a half nobody can say whether it does."""
    rows = [
        {"id": n, "stars": (None, None, 3, 5)[n % 4], "body": f"word {'fox ' * (n % 5)}"}
        for n in range(1, 401)
    ]
    session.execute(sa.insert(Rated), rows)
    search = matching(Rated.search, "word fox", where=Rated.stars > 3)
    counted = answers(session, search)
    session.execute(sa.text("ANALYZE rated"))
    by_sample = answers(session, search)
    assert [id_ for id_, _ in by_sample] == [id_ for id_, _ in counted]
    assert [s for _, s in by_sample] == pytest.approx([s for _, s in counted], rel=1e-6)


def test_the_predicate_of_an_index_may_be_a_string(session: Session) -> None:
    metadata = sa.MetaData()
    columns = (sa.Column("id", sa.Integer, primary_key=True), sa.Column("stars", sa.Integer))
    words = (sa.Column("body", sa.Text), sa.Column("search", TextSearch(("body",))))
    index = sa.Index("i", "search", postgresql_using="gin", postgresql_where="stars > 3")
    rated = sa.Table("rated", metadata, *columns, *words, index)
    session.add(Rated(id=1, stars=5, body="a fox"))
    session.flush()
    assert [row.id for row in session.execute(matching(rated.c.search, "fox"))] == [1]


def test_lengths_are_positions(session: Session) -> None:
    bodies = [
        "word word",
        "http://host:80/a,b:c and 'quoted:1,5A' c:\\dir,x",
        "'' ' : , ''' 5A:1 a''b:2,3",
        "x" * 300 + " 1,2:3 user@host.example:25,26",
        None,
    ]
    rows = [
        {"id": n, "title": "it's a 'quoted' , word:word", "body": b} for n, b in enumerate(bodies)
    ]
    rows.append({"id": 9, "title": None, "body": None})
    rows.append({"id": 10, "title": "one", "body": " ".join(f"w{n}" for n in range(60_000))})
    session.execute(sa.insert(Note), rows)
    lengths = session.execute(
        sa.text(
            f"SELECT {length_of('search')}, "
            "(SELECT coalesce(sum(cardinality(positions)), 0) FROM unnest(search)) FROM note"
        )
    ).all()
    assert len(lengths) == len(rows)
    assert all(length == positions for length, positions in lengths), lengths


def test_a_core_table_and_no_rows(session: Session) -> None:
    table: Any = Note.__table__
    assert session.execute(matching(table.c.search, "word")).all() == []
    session.execute(sa.insert(Note), [{"id": 1, "title": "a word"}])
    row = session.execute(matching(table.c.search, "word")).one()
    assert row.title == "a word"
    assert row.score > 0
    assert "search" not in row._mapping


def test_row_security_counts_what_the_role_sees(session: Session) -> None:
    session.execute(
        sa.insert(Note), [{"id": n, "body": "word", "kind": "ab"[n % 2]} for n in range(50)]
    )
    session.commit()
    session.execute(sa.text("ANALYZE note"))
    role = f"reader_{id(session)}"
    for statement in (
        f"CREATE ROLE {role}",
        f"GRANT SELECT ON note TO {role}",
        "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY only_a ON note TO {role} USING (kind = 'a')",
        f"SET LOCAL ROLE {role}",
    ):
        session.execute(sa.text(statement))
    found = session.execute(matching(Note.search, "word", limit=None)).all()
    assert len(found) == 25
    assert {row[0].kind for row in found} == {"a"}
    session.rollback()


def test_views_and_partitioned_tables(library: Session) -> None:
    """The same rows as of the table, whether anything was analysed or not."""

    def declared(name: str) -> sa.Table:
        columns = [sa.Column(c.name, c.type, primary_key=c.primary_key) for c in Note.__table__.c]
        return sa.Table(name, sa.MetaData(), *columns)

    def found(table: sa.Table) -> list[int]:
        statement = matching(table.c.search, QUESTIONS[0], where=table.c.kind == "a")
        return [row.id for row in library.execute(statement)]

    some = matching(Note.search, QUESTIONS[0], where=Note.kind == "a")
    expected = [id_ for id_, _ in answers(library, some)]
    for statement in (
        "CREATE VIEW seen AS SELECT * FROM note",
        "CREATE TABLE parted (LIKE note INCLUDING GENERATED) PARTITION BY LIST (kind)",
        "CREATE TABLE parted_a PARTITION OF parted FOR VALUES IN ('a')",
        "CREATE TABLE parted_rest PARTITION OF parted DEFAULT",
        "INSERT INTO parted (id, title, body, kind) SELECT id, title, body, kind FROM note",
    ):
        library.execute(sa.text(statement))
    assert found(declared("seen")) == expected
    assert found(declared("parted")) == expected
    library.execute(sa.text("ANALYZE parted"))
    assert found(declared("parted")) == expected
    for statement in (
        "CREATE MATERIALIZED VIEW kept AS SELECT * FROM note",
        "CREATE TABLE heir (LIKE note INCLUDING GENERATED)",
        "INSERT INTO heir (id, title, body, kind) SELECT id, title, body, kind FROM note",
        "ANALYZE heir",
    ):
        library.execute(sa.text(statement))
    assert found(declared("kept")) == expected
    library.execute(sa.text("ANALYZE kept"))
    assert found(declared("kept")) == expected
    # The statistics of a table say nothing of those that inherit from it.
    library.execute(sa.text("CREATE TABLE late () INHERITS (heir)"))
    rows = "SELECT n, '', 'return' FROM generate_series(9001, 9900) AS n"
    many = f"INSERT INTO late (id, kind, title) {rows}"
    library.execute(sa.text(many))
    library.execute(sa.text("CREATE TABLE flat AS SELECT * FROM heir"))
    both = [
        [(row.id, row.score) for row in library.execute(matching(table.c.search, "return deque"))]
        for table in (declared("heir"), declared("flat"))
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("schema", [None, "tenants"])
def test_a_schema_map(library: Session, schema: str | None) -> None:
    """Scored by the statistics of the table that the map means."""
    columns = [sa.Column(c.name, c.type, primary_key=c.primary_key) for c in Note.__table__.c]
    mapped = sa.Table("note", sa.MetaData(), *columns, schema=schema)
    for statement in (
        "CREATE SCHEMA real",
        "CREATE TABLE real.note (LIKE note INCLUDING GENERATED)",
        "INSERT INTO real.note (id, kind, body) SELECT id, kind, body FROM note WHERE id < 900",
        "ANALYZE real.note",
        "ANALYZE note",
    ):
        library.execute(sa.text(statement))
    real = mapped.to_metadata(sa.MetaData(), schema="real")
    expected = library.execute(matching(real.c.search, QUESTIONS[0])).all()
    connection = library.connection().execution_options(schema_translate_map={schema: "real"})
    assert connection.execute(matching(mapped.c.search, QUESTIONS[0])).all() == expected


def test_what_is_asked_wrongly() -> None:
    with pytest.raises(DeclarationError, match="no text column"):
        matching(Note.title, "word")
    with pytest.raises(DeclarationError, match="whole number"):
        matching(Note.search, "word", limit=-1)
    with pytest.raises(DeclarationError, match="words"):
        matching(Note.search, 5)  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match=r"matching\(...\)\.order_by\(\).*subquery"):
        matching(Note.search, "word").order_by(Note.id)
    assert matching(Note.search, "word").order_by(None) is not None
    with pytest.raises(DeclarationError, match="weights"):
        text_column("a", "b", "c", "d", "e", weights={"a": 1, "b": 2, "c": 3, "d": 4, "e": 5})
    with pytest.raises(DeclarationError, match="weighs"):
        text_column("a", weights={"b": 2})


def test_questions_of_xquad(session: Session, data_dir: Path) -> None:
    """BM25 in SQL is as good as it is elsewhere: .965 on these questions in English."""
    articles = json.loads((data_dir / "xquad" / "xquad.en.json").read_text())["data"]
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    session.execute(
        sa.insert(Note), [{"id": n, "body": p["context"]} for n, p in enumerate(paragraphs)]
    )
    session.execute(sa.text("ANALYZE note"))
    pairs = [(q["question"], n) for n, p in enumerate(paragraphs) for q in p["qas"]][::8]
    total = 0.0
    for question, right in pairs:
        ids = [id_ for id_, _ in answers(session, matching(Note.search, question))]
        total += 1 / math.log2(ids.index(right) + 2) if right in ids else 0
    assert total / len(pairs) >= 0.955
