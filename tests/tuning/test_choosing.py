"""Which encoder to use: what is chosen, what a budget does, what the command says."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from command_line import sbert_pg
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, embed_rows
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.encoder import Encoder
from sbert_pg.encoder.directory import BUILD, FORMAT
from sbert_pg.errors import DeclarationError, TooFewPairsError
from sbert_pg.progress import duration
from sbert_pg.tuning import Choice, choose_encoder
from sbert_pg.tuning.choosing import _decide, local_encoders
from sbert_pg.tuning.evaluation import Figure
from sbert_pg.tuning.fitting import adapt_queries

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
THINGS = ("bicycle", "kettle", "umbrella", "violin", "lantern", "carpet", "hammer", "telescope")
PLACES = ("kitchen", "garden", "attic", "cellar", "garage", "hall")


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding: Mapped[Any] = mapped_column(Embedding(MINILM, "body"))


@pytest.fixture
def items(engine: sa.Engine, minilm: Encoder) -> list[tuple[str, int]]:
    """A table, and questions with the row that answers each."""
    both = [(thing, place) for thing in THINGS for place in PLACES]
    rows = [{"id": n, "body": f"The {t} is in the {p}."} for n, (t, p) in enumerate(both, 1)]
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        session.execute(sa.insert(Item), embed_rows(Item, rows))
        session.commit()
    return [(f"Is there a {t} in our {p}?", n) for n, (t, p) in enumerate(both, 1)]


def test_the_better_one_is_chosen(
    engine: sa.Engine, items: Any, minilm: Encoder, tmp_path: Path
) -> None:
    """An encoder with shuffled queries finds nothing: beside it either stays, or is replaced."""
    shuffled = np.eye(384)[np.random.default_rng(0).permutation(384)]
    blind = adapt_queries(minilm, shuffled, tmp_path / "blind")
    choice = choose_encoder(engine, Item.embedding, items, [blind, minilm])
    assert len(choice.encoders) == 2, "each encoder once"
    own, other = choice.encoders
    assert own.current
    assert not other.current
    assert choice.chosen == own.encoder == f"{MINILM}:int8"
    assert "Stay with" in choice.reason
    assert own.ndcg.value > 0.9 > 0.5 > other.ndcg.value
    assert other.difference.high < 0
    assert own.languages == "en"
    assert other.languages == "not known"
    assert own.seconds == other.seconds == 0, "the rows' vectors stay with both"
    assert own.limits.value == other.limits.value or own.limits.value > 0
    assert choice.rows == choice.total == len(items)
    assert str(choice).splitlines()[2].startswith("* ")
    json.dumps(choice.to_json())


def test_the_command(engine: sa.Engine, items: Any, minilm: Encoder, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "id"), *items])
    given = ("encoder", "choose", "item", "-e", MINILM, "--pairs", str(pairs))
    done = sbert_pg(*given, "--budget", "60s", url=engine.url)
    assert done.returncode == 0, done.stderr
    assert "Stay with" in done.stdout
    none = sbert_pg(*given, "--budget", "0.0001ms", "--json", url=engine.url)
    assert none.returncode == 1, "none keeps to it"
    assert json.loads(none.stdout)["chosen"] is None
    wrong = sbert_pg(*given, "--budget", "soon", url=engine.url)
    assert wrong.returncode != 0
    assert "2ms" in wrong.stderr


def test_what_is_chosen(engine: sa.Engine, items: Any, minilm: Encoder) -> None:
    """Of measured encoders the best within the budget, but no change that proves nothing."""
    choice: Choice = choose_encoder(engine, Item.embedding, items, [])
    own = choice.encoders[0]
    better = replace(
        own, encoder="better", current=False, difference=Figure(0.1, 0.05, 0.15), seconds=7200.0
    )
    perhaps = replace(better, encoder="perhaps", difference=Figure(0.1, -0.05, 0.15))
    chosen, reason = _decide([better, own], None)
    assert chosen == "better"
    assert f"+0.100 [+0.050, +0.150] against {own.encoder}. The change takes 2 h." in reason
    chosen, reason = _decide([perhaps, own], None)
    assert chosen == own.encoder
    assert "includes zero" in reason
    assert _decide([perhaps, better, own], None)[0] == "better", "the first is not for certain"
    slow = replace(own, within=False)
    chosen, reason = _decide([perhaps, slow], 2.0)
    assert chosen == "perhaps"
    assert "best within 2 ms" in reason
    assert _decide([slow], 2.0)[0] is None
    assert [duration(s) for s in (5, 150, 7200, 200_000)] == ["5 s", "2 min", "2 h", "2 d 7 h"]


@pytest.fixture
def plain(engine: sa.Engine) -> sa.Table:
    """The same texts in a table that knows nothing of the library."""
    both = [(thing, place) for thing in THINGS for place in PLACES]
    table = sa.Table(
        "thing", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("body", sa.Text), sa.Column("place", sa.Text),
    )  # fmt: skip
    with engine.begin() as connection:
        table.create(connection)
        rows = [
            {"id": n, "body": f"The {thing} is here.", "place": f"It is the {place}."}
            for n, (thing, place) in enumerate(both, 1)
        ]
        connection.execute(sa.insert(table), [*rows, {"id": 99, "body": None, "place": ""}])
    return table


def test_before_there_is_a_column(
    engine: sa.Engine, plain: sa.Table, minilm: Encoder, tmp_path: Path
) -> None:
    """Asked first of all, of texts alone: nothing of the library is in the database."""
    questions = [
        (f"Is there a {thing} in our {place}?", n)
        for n, (thing, place) in enumerate(((t, p) for t in THINGS for p in PLACES), 1)
    ]
    shuffled = np.eye(384)[np.random.default_rng(0).permutation(384)]
    blind = adapt_queries(minilm, shuffled, tmp_path / "blind")
    columns = [plain.c.body, plain.c.place]
    choice = choose_encoder(engine, columns, questions, [blind, minilm])
    assert choice.chosen == f"{MINILM}:int8"
    best, other = choice.encoders
    assert not best.current
    assert best.ndcg.value > 0.9
    assert best.difference.value == 0 > other.difference.high
    assert best.seconds > 0
    assert choice.total == choice.rows == len(questions), "a row without a text is none"
    assert "vs the best" in str(choice)
    assert "Encoding every row takes" in choice.reason
    half = choose_encoder(engine, plain.c.body, questions, [minilm]).encoders[0]
    assert half.ndcg.value < best.ndcg.value, "the place is not in what is embedded"
    with pytest.raises(TooFewPairsError, match=r"public\.thing\.body|thing\.body"):
        choose_encoder(engine, plain.c.body, [("Who?", 99)], [minilm])
    with pytest.raises(DeclarationError, match="no encoder to compare"):
        choose_encoder(engine, plain.c.body, questions, [])
    keyless = sa.Table("keyless", sa.MetaData(), sa.Column("body", sa.Text))
    with pytest.raises(DeclarationError, match="no primary key"):
        choose_encoder(engine, keyless.c.body, questions, [minilm])
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "id"), *questions])
    given = ("encoder", "choose", "-e", MINILM, "--pairs", str(pairs))
    done = sbert_pg(*given, "thing.body, place", url=engine.url)
    assert done.returncode == 0, done.stderr
    assert f"Use {MINILM}:int8" in done.stdout
    for unknown in ("thing", "thing.nothing", "nothing.body"):
        failed = sbert_pg(*given, unknown, url=engine.url)
        assert failed.returncode == 1
        assert "no column of texts" in failed.stderr


def test_what_is_chosen_first(engine: sa.Engine, plain: sa.Table, minilm: Encoder) -> None:
    """The fastest of those that may be the best."""
    question = [("Where is the violin in the attic?", 21)]
    best = choose_encoder(engine, plain.c.body, question, [minilm]).encoders[0]
    best = replace(best, encoder="best", milliseconds=5.0, difference=Figure(0.0, 0.0, 0.0))
    alike = replace(best, encoder="alike", milliseconds=1.0, difference=Figure(-0.01, -0.03, 0.01))
    worse = replace(best, encoder="worse", milliseconds=0.1, difference=Figure(-0.2, -0.3, -0.1))
    chosen, reason = _decide([best, alike, worse], None)
    assert chosen == "alike"
    assert "may be as good as best" in reason
    assert _decide([best, worse], None)[0] == "best"
    # The best of all takes too long; the next one is compared with what is left.
    slow = replace(best, within=False)
    assert _decide([alike, worse, slow], 2.0)[0] == "alike"
    assert _decide([worse, slow], 2.0)[0] == "worse"


def test_conversions_that_cannot_be_opened_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("int8-2.1", f"int8-{FORMAT}.{BUILD}"):
        old = tmp_path / "org--name" / "default" / name
        old.mkdir(parents=True)
        (old / "manifest.json").write_text('{"format": 2}')
    monkeypatch.setenv("SBERT_PG_CACHE", str(tmp_path))
    assert local_encoders() == []
    (message,) = caplog.messages
    assert f"int8-{FORMAT}.{BUILD} is not compared" in message
