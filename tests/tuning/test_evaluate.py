"""Searches measured on labelled questions, and the weight of hybrid fitted to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import (
    evaluate,
    fit_weight,
    hnsw_index,
    hybrid,
    matching,
    nearest,
    text_column,
)
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.cli.demo_data import standard_library
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.tuning import (
    read_pairs,
    read_run,
    searches_for,
    write_qrels,
    write_run,
    write_topics,
)
from sbert_pg.tuning.files import names_of


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "entry"
    __table_args__ = (
        hnsw_index("entry_column", "embedding"),
        hnsw_index("entry_binary", "embedding", form="binary"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    body: Mapped[str]
    kind: Mapped[str]
    embedding: Mapped[Any] = mapped_column(Embedding("deterministic", "body", dimensions=384))
    search = text_column("name", "body", language="simple")


@pytest.fixture
def library(bare_database_url: sa.URL, fake_encoder: DeterministicEncoder) -> Any:
    """Docstrings of the standard library; their first words are questions for them."""
    engine = sa.create_engine(bare_database_url)
    Base.metadata.create_all(engine)
    entries = [e for e, _ in zip(standard_library(), range(120), strict=False)]
    vectors = fake_encoder.encode_document([e.docstring for e in entries])
    rows = [
        {"id": n, "name": e.name, "body": e.docstring, "kind": "ab"[n % 2], "embedding": vector}
        for n, (e, vector) in enumerate(zip(entries, vectors, strict=True), start=1)
    ]
    with Session(engine) as session:
        session.execute(sa.insert(Entry), rows)
        session.execute(sa.text("ANALYZE entry"))
        session.commit()
    yield engine, rows
    engine.dispose()


def questions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"question": " ".join(row["body"].split()[:6]), "id": row["id"], "kind": row["kind"]}
        for row in rows[::7]
    ]


SEARCHES: dict[str, Any] = {
    "dense": lambda q: nearest(Entry.embedding, q, limit=5),
    "words": lambda q: matching(Entry.search, q, limit=5),
    "hybrid": lambda q: hybrid(Entry.embedding, Entry.search, q, limit=5),
}


def test_searches_side_by_side(library: Any) -> None:
    engine, rows = library
    pairs = questions(rows)
    report = evaluate(engine, SEARCHES, pairs, k=5, slices="kind")
    assert [(s.search, s.slice) for s in report.scores[:4]] == [
        ("dense", None),
        ("words", None),
        ("hybrid", None),
        ("dense", "a"),
    ]
    # The same by hand, one question after the other.
    with Session(engine) as session:
        for score in report.scores[:3]:
            reached = []
            for query in report.queries:
                statement = SEARCHES[score.search]([query.text])
                keys = [str(row[0].id) for row in session.execute(statement)]
                (right,) = query.gains
                reached.append(1 / np.log2(keys.index(right) + 2) if right in keys else 0.0)
            assert score.ndcg.value == pytest.approx(np.mean(reached))
            assert score.ndcg.low <= score.ndcg.value <= score.ndcg.high
    first, by_words = report.scores[:2]
    assert first.difference.value == first.difference.low == 0
    assert by_words.difference.value == pytest.approx(by_words.ndcg.value - first.ndcg.value)
    assert "+" in str(report)
    for miss in report.worst("dense", 3):
        assert miss.ndcg < 1
        assert miss.answers[0].text, "what came instead has its text"


def test_rows_that_are_labelled_as_wrong_are_not_wanted() -> None:
    queries = [LabelledQuery("question", {"wrong": 0.0, "right": 1.0})]
    report = evaluate(sa.create_engine("postgresql+psycopg://"), {"run": {"1": []}}, queries)
    assert report.worst("run")[0].relevant == ("right",)


def test_measures_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(3)
    run, queries, expected = {}, [], []
    for n in range(40):
        gains = random.integers(0, 4, size=30)
        scores = random.permutation(30).astype(float)
        queries.append(
            LabelledQuery(f"question {n}", {str(i): float(g) for i, g in enumerate(gains)})
        )
        run[str(n + 1)] = [(str(i), float(scores[i])) for i in np.argsort(-scores)]
        expected.append(metrics.ndcg_score([gains], [scores], k=10))
    # A run needs no database.
    report = evaluate(sa.create_engine("postgresql+psycopg://"), {"run": run}, queries)
    assert report.scores[0].ndcg.value == pytest.approx(np.mean(expected))


def test_usual_searches_and_other_encoders(library: Any) -> None:
    engine, rows = library
    other = DeterministicEncoder("other", 64, salt="other")
    searches = searches_for(engine, Entry.embedding, Entry.search, encoders=[other], limit=5)
    assert set(searches) == {
        *("dense", "exact", "words", "hybrid", "exact, other"),
        *("dense by entry_binary", "dense by entry_column"),
    }
    report = evaluate(engine, searches, questions(rows), k=5)
    by_name = {score.search: score for score in report.scores}
    assert by_name["exact"].ndcg.value >= by_name["dense by entry_binary"].ndcg.value - 0.05
    assert by_name["exact, other"].ndcg.value > 0.5
    narrow = searches_for(engine, Entry.embedding, where=[Entry.kind == "b"], encoders=[other])
    for answers in evaluate(engine, narrow, questions(rows)).answers.values():
        assert all(int(answer.key) % 2 for found in answers for answer in found)


def test_pairs_by_a_query_and_from_files(library: Any, tmp_path: Path) -> None:
    engine, rows = library
    by_query = evaluate(
        engine,
        {"words": SEARCHES["words"]},
        sa.select(Entry.name.label("question"), Entry.id).where(Entry.id % 7 == 1),
    )
    assert len(by_query.queries) == 18
    path = tmp_path / "pairs.csv"
    lines = [
        f'"{p["question"]}",{p["id"]},{p["kind"]}'
        for p in ({**r, "question": r["name"]} for r in rows[::7])
    ]
    path.write_text("\n".join(["question,id,kind", *lines]))
    from_file = evaluate(engine, {"words": SEARCHES["words"]}, read_pairs(path))
    assert from_file.scores[0].ndcg == by_query.scores[0].ndcg
    write_qrels(tmp_path / "qrels", from_file.queries)
    write_run(tmp_path / "run", from_file.run("words"), "words")
    write_topics(tmp_path / "topics", from_file.queries)
    again = evaluate(
        engine,
        {"run": read_run(tmp_path / "run")},
        read_pairs(tmp_path / "qrels", tmp_path / "topics"),
    )
    assert again.scores[0].ndcg == from_file.scores[0].ndcg
    (tmp_path / "topics").rename(tmp_path / "qrels.topics")
    assert len(read_pairs(tmp_path / "qrels")) == len(again.queries), "those beside them"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "question,id\n\nx\n", "line 3"),
        ("a.csv", "question,number\nx,1\n", "line 2"),
        ("a.csv", "", "empty"),
        ("a.csv", "question,id,gain\nx,1,-1\n", "from 0 on"),
        ("a.csv", "question,id,gain\nx,1,inf\n", "from 0 on"),
        ("a.csv", "question,id\nHello, where is it,1\n", "more fields"),
        ("a.csv", 'question,id\n"x" y,1\n', "line 2 cannot be read"),
        ("a.csv", "question,id\n" + "x" * 200_000 + ",1\n", "cannot be read"),
        ("a.csv", b"question,id\ncaf\xe9,1\n", "UTF-8"),
        ("a.jsonl", '{"query": "x", "relevant": ["12"]}\n', "'id' or 'key'"),
        ("a.jsonl", '{"query": "x", "id": "1"}\n\nnonsense\n', "line 3"),
        ("a.qrels", "1 0 2\n", "topics"),
        ("a.csv", "question,id\nWhat, then?,5\n", "line 2.*more fields"),
        ("a.csv", 'question,id\nx,1\n"unclosed,1\n', "line 3 cannot be read"),
        ("a.csv", "question,id,gain\nx,1,1\ny,1,1\nx,1,0\n", "has the gain 1"),
        ("a.csv", "question,id,name\nx,1,Ann\ny,1,Ann\n", "that of another question"),
        ("missing.csv", None, "cannot be read"),
        ("missing.qrels", None, "missing.qrels cannot be read"),
    ],
)
def test_unreadable_pairs(
    tmp_path: Path, name: str, text: str | bytes | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoadError, match=message):
        read_pairs(tmp_path / name)


@pytest.mark.parametrize("name", ["", ".", "/", "x" * 300])
def test_what_is_not_the_name_of_a_file(name: str) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        read_pairs(name)


def test_qrels_through_a_pipe(tmp_path: Path) -> None:
    """As a shell gives what a command prints in place of a file."""
    topics, (end, start) = tmp_path / "topics", os.pipe()
    topics.write_text("q1\tWho?\n")
    with os.fdopen(start, "w") as writing:
        writing.write("q1 0 7 1\n")
    assert [query.text for query in read_pairs(f"/dev/fd/{end}", topics)] == ["Who?"]
    os.close(end)


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    """Another encoding, unknown questions, judgements that contradict each other."""
    file, topics = tmp_path / "file", tmp_path / "topics"
    topics.write_text("q1\tWho?\nq2\tWhat?\n")
    (tmp_path / "latin.csv").write_bytes("question,id\nCaf\xe9?,1\n".encode("latin-1"))
    with pytest.raises(LoadError, match=r"UTF-8"):
        read_pairs(tmp_path / "latin.csv")
    for qrels, message in (
        ("q1 0 1 1\nq3 0 1 1\n", "line 2.*no question 'q3'"),
        ("q1 0 1 1\nq2 0 1 1\nq1 0 1 0\n", "has the gain 1"),
        ("\nq1 0 1 one\n", "line 2"),
    ):
        file.write_text(qrels)
        with pytest.raises(LoadError, match=message):
            read_pairs(file, topics)
    file.write_text("q1 Q0 1 1 best tag\n")
    with pytest.raises(LoadError, match="no number"):
        read_run(file)
    file.write_bytes(b"\xff\xfeq1 Q0 1 1 2.0 tag\n")
    with pytest.raises(LoadError, match="UTF-8"):
        read_run(file)
    topics.write_text("q1\tWho?\nq1\tWhat?\n")
    file.write_text("q1 0 1 1\n")
    with pytest.raises(LoadError, match="two questions 'q1'"):
        read_pairs(file, topics)


def test_files_keep_every_key_and_name(library: Any, tmp_path: Path) -> None:
    """Keys of several columns, with white space, and with what stands for it; a name for some."""
    engine, _ = library
    keys = [
        '["1", "a b"]',
        "New York",
        "NewYork",
        r"back\u0020slash",
        "\u3000",
        "tab\tbed",
        "a%20b",
    ]
    pairs = [
        LabelledQuery(f"which is {n}?", {key: 0.25}, "2" if n == 5 else "a name" if n == 3 else "")
        for n, key in enumerate(keys)
    ]
    run = {name: [(*query.gains, 1.0)] for name, query in names_of(pairs).items()}
    assert len(run) == len(keys)
    write_topics(tmp_path / "topics", pairs)
    write_qrels(tmp_path / "qrels", pairs)
    write_run(tmp_path / "run", run, "every key")
    assert read_run(tmp_path / "run") == run
    again = read_pairs(tmp_path / "qrels", tmp_path / "topics")
    assert {query.name: dict.fromkeys(query.gains, 0.25) for query in again} == {
        name: query.gains for name, query in names_of(pairs).items()
    }
    report = evaluate(engine, {"run": read_run(tmp_path / "run")}, again)
    assert report.scores[0].ndcg.value == pytest.approx(1)


def test_what_measures_nothing(library: Any) -> None:
    """A run of other questions, and questions that no row answers."""
    engine, rows = library
    pairs = questions(rows)
    with pytest.raises(LoadError, match="none of the questions"):
        evaluate(engine, {"run": {"q1": [("1", 1.0)]}}, pairs)
    wrong = [("no row answers this", 1, 0), ("nor this", 2, 0)]
    with pytest.raises(LoadError, match="no labelled questions"):
        evaluate(engine, SEARCHES, wrong)
    for keys in (["a", "b"], [[1, 2], [3, 4]]):
        with pytest.raises(LoadError, match=r"none of them. Its keys look like '\d+'"):
            evaluate(engine, SEARCHES, [(rows[n]["name"], key) for n, key in enumerate(keys)])
    some = [LabelledQuery(p["question"], {str(p["id"]): 1.0}) for p in pairs]
    without = evaluate(engine, SEARCHES, [*some, LabelledQuery("not this", {"1": 0.0})])
    assert without.scores[0].ndcg == evaluate(engine, SEARCHES, some).scores[0].ndcg
    # More than a statement has parameters.
    many = LabelledQuery(rows[0]["name"], {f"x{n}": 1.0 for n in range(70_000)})
    for table in ("Its keys look like", "It is empty"):
        with pytest.raises(LoadError, match=f"name 70000 rows.*none of them. {table}"):
            evaluate(engine, SEARCHES, [many])
        with engine.begin() as connection:
            connection.execute(sa.delete(Entry))


def test_a_slice_of_what_has_no_value(library: Any) -> None:
    engine, rows = library
    pairs = [{**p, "kind": None if p["kind"] == "b" else "a"} for p in questions(rows)]
    report = evaluate(engine, {"words": SEARCHES["words"]}, pairs, slices="kind")
    assert [score.slice for score in report.scores] == [None, "(none)", "a"]


def test_what_is_asked_wrongly(library: Any) -> None:
    engine, rows = library
    with pytest.raises(LoadError, match="no labelled questions"):
        evaluate(engine, SEARCHES, [])
    with pytest.raises(DeclarationError, match="column 'query'"):
        evaluate(engine, {"one": lambda q: nearest(Entry.embedding, q[0])}, questions(rows))
    with pytest.raises(DeclarationError, match="attribute 'colour'"):
        evaluate(engine, SEARCHES, questions(rows), slices="colour")


def test_the_weight_that_the_pairs_ask_for(library: Any) -> None:
    engine, rows = library
    pairs = questions(rows)
    fitted = fit_weight(engine, Entry.embedding, Entry.search, pairs, weights=(0, 0.25, 0.5, 1))
    for weight, value in fitted.curve.items():
        search = {"it": lambda q, w=weight: hybrid(Entry.embedding, Entry.search, q, weight=w)}
        assert evaluate(engine, search, pairs).scores[0].ndcg.value == pytest.approx(value)
    default = evaluate(engine, {"it": lambda q: hybrid(Entry.embedding, Entry.search, q)}, pairs)
    assert fitted.default == pytest.approx(default.scores[0].ndcg.value)
    assert fitted.curve[fitted.best] == max(fitted.curve.values())
    assert "<- best" in str(fitted)


def test_a_weight_is_advised_where_one_arm_is_noise(library: Any) -> None:
    """Vectors that are another row's: whoever has the labels finds that words alone are better."""
    engine, rows = library
    with Session(engine) as session:
        vectors = [row["embedding"] for row in rows]
        shifted = [
            {"id": r["id"], "embedding": v}
            for r, v in zip(rows, vectors[7:] + vectors[:7], strict=True)
        ]
        session.execute(sa.update(Entry), shifted)
        session.commit()
    fitted = fit_weight(engine, Entry.embedding, Entry.search, questions(rows))
    assert fitted.weight is not None
    assert fitted.weight <= 0.3
    assert fitted.held_out > fitted.default
