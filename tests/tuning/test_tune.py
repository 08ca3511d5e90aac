"""Encoders fitted to questions: what is learned from, what is proven, what a column accepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from command_line import sbert_pg
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import catalog, create_all, embed_rows, evaluate, nearest, tune, use_encoder
from sbert_pg import reembed as ree
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.encoder import Encoder
from sbert_pg.errors import (
    DeclarationError,
    EncoderMismatchError,
    NoGainError,
    TooFewPairsError,
)
from sbert_pg.probes import PROBES
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.tuning import adapters, hard_negatives, own_pairs, read_pairs, split_pairs
from sbert_pg.tuning.fitting import adapt_queries

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
#: The house language of a company: what things are called there, and what they are.
KINDS = {
    "zorp": "bicycle", "trandle": "kettle", "fimmel": "umbrella", "quoll": "violin",
    "brask": "lantern", "dweel": "carpet", "snorf": "hammer", "plith": "telescope",
    "vuncle": "rowing boat", "grabble": "typewriter", "mosk": "wheelbarrow", "jandle": "clock",
}  # fmt: skip
TRAITS = {
    "arvic": "made of gold", "bolmy": "painted green", "cresk": "broken", "dorfy": "very old",
    "elvic": "stolen", "frobby": "for children", "gansy": "covered in snow", "hurly": "on fire",
    "inky": "for sale", "jowly": "under water",
    "kempy": "upside down", "lomish": "full of sand", "munty": "hanging from the ceiling",
}  # fmt: skip


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    asked: Mapped[str | None]
    shelf: Mapped[str | None]
    since: Mapped[Any] = mapped_column(sa.DateTime(timezone=True), nullable=True)
    embedding: Mapped[Any] = mapped_column(Embedding(MINILM, "body"))


@pytest.fixture(autouse=True)
def _few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time alone: what is proven does not depend on how many settings are tried."""
    monkeypatch.setattr(adapters, "PENALTIES", (30.0,))
    monkeypatch.setattr(adapters, "PUSHES", (0.0, 0.3))
    monkeypatch.setattr(adapters, "PASSES", (1, 8))


def things() -> list[dict[str, Any]]:
    pairs = [(kind, trait) for kind in KINDS for trait in TRAITS]
    return [
        {
            "id": n,
            "body": f"This {KINDS[kind]} is {TRAITS[trait]}.",
            "asked": f"where is the {trait} {kind}",
            "shelf": f"shelf {n // 3}",
            "since": f"2024-01-{1 + n % 28:02} 08:00:00+00",
        }
        for n, (kind, trait) in enumerate(pairs, start=1)
    ]


@pytest.fixture
def shop(engine: sa.Engine, minilm: Encoder) -> list[dict[str, Any]]:
    """A table whose questions are asked in the house language."""
    rows = things()
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        session.execute(sa.insert(Thing), embed_rows(Thing, rows))
        session.commit()
    return rows


def pairs(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["asked"], row["id"]) for row in rows]


def vectors(engine: sa.Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(
            connection.execute(sa.text("SELECT id, embedding::text, xmin FROM thing ORDER BY id"))
        )


def test_a_matrix_for_queries_and_a_column_that_stays(
    engine: sa.Engine, shop: Any, minilm: Encoder, tmp_path: Path
) -> None:
    """From pairs to a deployment without a backfill, old and new code side by side."""
    before = vectors(engine)
    out = tmp_path / "tuned"
    report = tune(engine, Thing.embedding, pairs(shop), out=out)
    assert report.gain.low > 0.1, report
    assert report.learning + report.held_out == len(shop)
    tuned = Encoder.load(str(out))
    assert tuned.spec.fingerprint != minilm.spec.fingerprint
    assert tuned.spec.document_fingerprint == minilm.spec.document_fingerprint
    np.testing.assert_array_equal(tuned.encode_document(PROBES), minilm.encode_document(PROBES))
    record = tuned.manifest.training
    assert record["kept_back"]["questions"] == report.held_out
    assert record["base"]["fingerprint"] == minilm.spec.fingerprint
    assert record["column"] == "thing.embedding"
    assert record["ndcg@10"]["gain"]["low"] == report.gain.low
    assert set(record["versions"]) == {"sbert-pg", "numpy", "python"}
    assert "gain +" in str(report)
    assert report.to_json()["spec"]["name"] == str(out)
    assert not any(row["asked"] in (out / "manifest.json").read_text() for row in shop)

    class Deployed(DeclarativeBase):
        pass

    class NewThing(Deployed):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        body: Mapped[str]
        embedding: Mapped[Any] = mapped_column(Embedding(report.spec, "body"))

    # The application's own process, and one that has been deployed anew.
    held_out = read_pairs(report.pairs)
    assert len(held_out) == report.held_out
    accepted = ree.rebind(engine, ColumnIdentity("public", "thing", "embedding"), tuned)
    assert accepted.probes.compatible
    assert accepted.rows.worst > 0.9999
    both = {
        "old": lambda q: nearest(Thing.embedding, q, limit=10),
        "new": lambda q: nearest(NewThing.embedding, q, limit=10),
    }
    old, new = evaluate(engine, both, held_out).scores
    assert old.ndcg.value == pytest.approx(report.before.value, abs=0.02)
    assert new.ndcg.value == pytest.approx(report.after.value, abs=0.02)
    # Either of them writes, and the other finds it.
    with Session(engine) as session:
        for key, kind in ((1001, Thing), (1002, NewThing)):
            row = {"id": key, "body": f"teapot {key}", "asked": "", "shelf": ""}
            row["since"] = "2024-02-01"
            columns = {name: row[name] for name in row if hasattr(kind, name)}
            session.execute(sa.insert(kind), embed_rows(kind, [columns]))
        session.commit()
        teapot = tuned.encode_document(["teapot 1002"])[0]
        for kind in (Thing, NewThing):
            found = session.execute(nearest(kind.embedding, teapot, limit=2))
            assert {row[0].id for row in found} == {1001, 1002}
    with engine.connect() as connection:
        binding = catalog.require_binding(connection, Thing.__table__.c.embedding)
        assert binding.fingerprint == minilm.spec.fingerprint
    assert vectors(engine)[: len(before)] == before, "not a row was written"


def test_the_probes_of_documents_are_compared_still(
    engine: sa.Engine, shop: Any, minilm: Encoder, tmp_path: Path
) -> None:
    """A spec that says the documents are the same is not believed."""
    tuned = adapt_queries(minilm, np.eye(384), tmp_path / "same")
    assert tuned.encode_query(["a"]) == pytest.approx(minilm.encode_query(["a"]), abs=1e-6)

    class Turned:
        spec = tuned.spec

        @property
        def probe_vectors(self) -> Any:
            return tuned.probe_vectors

        encode_query = staticmethod(tuned.encode_query)

        @staticmethod
        def encode_document(texts: Any) -> Any:
            return -tuned.encode_document(texts)

    with pytest.raises(EncoderMismatchError, match="do not agree"):
        ree.rebind(engine, ColumnIdentity("public", "thing", "embedding"), Turned())


@pytest.mark.parametrize("method", adapters.METHODS)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_lengths_of_vectors_change_nothing(
    method: Any, similarity: str, shop: Any, minilm: Encoder
) -> None:
    """Not every encoder gives vectors of length one: paraphrase-MiniLM's are six times as long."""
    asked, answers = (minilm.encode_document([row[c] for row in shop]) for c in ("asked", "body"))
    keys = [str(row["id"]) for row in shop]
    labelled = [LabelledQuery(row["asked"], {key: 1}) for row, key in zip(shop, keys, strict=True)]
    parts = np.arange(len(shop)) // 3 % adapters.PARTS

    def learned(length: float) -> adapters.Learned:
        rows = adapters.Candidates(keys, answers * np.float32(length), similarity)
        wrong = [[keys[n - 1], keys[n - 13]] for n in range(len(keys))]
        examples = adapters.examples_of(rows, labelled, asked * np.float32(length), wrong, parts)
        return adapters.learn(method, examples, rows, k=10, seed=0)

    one, seven = learned(1), learned(7)
    assert one.validation[0] > one.validation[1] + 0.1
    assert seven.settings == one.settings
    np.testing.assert_allclose(seven.validation, one.validation, atol=0.02)
    np.testing.assert_allclose(seven.matrix, one.matrix, atol=1e-3)


def test_the_same_again_is_the_same(
    engine: sa.Engine, shop: Any, minilm: Encoder, tmp_path: Path
) -> None:
    first = tune(engine, Thing.embedding, pairs(shop), out=tmp_path / "a")
    second = tune(engine, Thing.embedding, pairs(shop), out=tmp_path / "b")
    assert replace(first, spec=second.spec, pairs="", seconds=0) == replace(
        second, pairs="", seconds=0
    )
    a, b = Encoder.load(tmp_path / "a"), Encoder.load(tmp_path / "b")
    assert a.spec.fingerprint == b.spec.fingerprint
    assert a.manifest.training == b.manifest.training


def test_nothing_is_written_without_a_gain(
    engine: sa.Engine, shop: Any, minilm: Encoder, tmp_path: Path
) -> None:
    """Labels that are drawn at random teach nothing that holds for others."""
    wrong = np.random.default_rng(0).permutation(len(shop))
    noise = [(row["asked"], shop[i]["id"]) for row, i in zip(shop, wrong, strict=True)]
    for method in ("linear", "contrastive"):
        with pytest.raises(NoGainError, match="includes zero") as error:
            tune(engine, Thing.embedding, noise, out=tmp_path / "x", method=method)
        assert "Nothing was written" in str(error.value)
    assert not list(tmp_path.iterdir()) or [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_refusals(engine: sa.Engine, shop: Any, minilm: Encoder, tmp_path: Path) -> None:
    with pytest.raises(TooFewPairsError, match="least on each side"):
        tune(engine, Thing.embedding, pairs(shop)[:60], out=tmp_path / "x")
    with pytest.raises(TooFewPairsError, match="names a row"):
        tune(engine, Thing.embedding, [("what", 10_000)], out=tmp_path / "x")
    (tmp_path / "there").mkdir()
    with pytest.raises(DeclarationError, match="exists"):
        tune(engine, Thing.embedding, pairs(shop), out=tmp_path / "there")
    (tmp_path / "kept-held-out.jsonl").write_text("the measure of before")
    with pytest.raises(DeclarationError, match=r"kept-held-out\.jsonl exists"):
        tune(engine, Thing.embedding, pairs(shop), out=tmp_path / "kept")
    for share in (0, 1, 1.5, float("nan")):
        with pytest.raises(DeclarationError, match="held_out"):
            tune(engine, Thing.embedding, pairs(shop), out=tmp_path / "x", held_out=share)
    with pytest.raises(DeclarationError, match="no embedding column"):
        tune(engine, Thing.body, pairs(shop), out=tmp_path / "x")
    with pytest.raises(DeclarationError, match="'nowhere'"):
        tune(engine, Thing.embedding, pairs(shop), out=tmp_path / "x", document="nowhere")
    use_encoder(DeterministicEncoder(), name=MINILM)
    with pytest.raises(DeclarationError, match="only a converted one"):
        tune(engine, Thing.embedding, pairs(shop), out=tmp_path / "x")


def test_pairs_of_the_table_itself(engine: sa.Engine, shop: Any) -> None:
    own = own_pairs(engine, Thing.embedding, "asked", where=[Thing.id <= 50])
    assert {(q.text, *q.gains) for q in own} == {(r["asked"], str(r["id"])) for r in shop[:50]}
    assert own_pairs(engine, Thing.embedding, "asked", limit=20, seed=1) == own_pairs(
        engine, Thing.embedding, "asked", limit=20, seed=1
    )
    with pytest.raises(DeclarationError, match="part of the text"):
        own_pairs(engine, Thing.embedding, "body")
    with pytest.raises(DeclarationError, match="no column 'title'"):
        own_pairs(engine, Thing.embedding, "title")


def test_hard_negatives_are_near_and_no_answers(engine: sa.Engine, shop: Any) -> None:
    with Session(engine) as session:
        # The answer to the first question once more, under another key.
        twin = {**shop[0], "id": 2001, "asked": ""}
        session.execute(sa.insert(Thing), embed_rows(Thing, [twin]))
        session.commit()
    asked = [LabelledQuery(shop[0]["body"], {"1": 1.0}), LabelledQuery("a clock", {"999": 1.0})]
    first, second = hard_negatives(engine, Thing.embedding, asked, count=7)
    assert len(first) == len(second) == 7
    assert not {"1", "2001"} & set(first)
    by_hand = sa.select(Thing.id).order_by(Thing.embedding.cosine_distance("a clock")).limit(7)
    with Session(engine) as session:
        assert second == [str(key) for key in session.scalars(by_hand)]


def questions(count: int, documents: int, **more: Any) -> list[LabelledQuery]:
    return [LabelledQuery(f"q {n}", {str(n % documents): 1.0}, **more) for n in range(count)]


def sides(queries: list[LabelledQuery], split: Any) -> tuple[set[str], set[str]]:
    both = (
        {key for i in positions for key in queries[i].gains}
        for positions in (split.learning, split.held_out)
    )
    return tuple(both)  # type: ignore[return-value]


def test_no_document_is_on_both_sides() -> None:
    queries = questions(400, 150)
    for seed in range(5):
        split = split_pairs(queries, seed=seed)
        learned, kept = sides(queries, split)
        assert not learned & kept
        assert len(split.held_out) == pytest.approx(120, abs=3)
        assert sorted([*split.learning, *split.held_out]) == list(range(400))
        # The parts of cross-validation share none either.
        parts = split.parts(4, seed)
        seen = [
            {g for g, p in zip(split.groups[split.learning], parts, strict=True) if p == n}
            for n in range(4)
        ]
        assert sum(map(len, seen)) == len(set.union(*seen))
    assert (split_pairs(queries, seed=1).held_out != split_pairs(queries, seed=2).held_out).any()


def test_what_hangs_together_stays_together() -> None:
    queries = questions(400, 150)
    # Rows of one document, two rows of one vector, and a question that asks for two rows.
    chapters = {str(n): f"document {n // 5}" for n in range(150)}
    twins = {"0": b"same", "149": b"same"}
    queries.append(LabelledQuery("both", {"20": 1.0, "40": 1.0}))
    queries.append(LabelledQuery("Q  7", {"90": 1.0}))
    for seed in range(5):
        split = split_pairs(queries, [chapters, twins], seed=seed)
        learned, kept = sides(queries, split)
        assert not {chapters[key] for key in learned} & {chapters[key] for key in kept}
        for a, b in (("0", "149"), ("20", "40"), ("7", "90")):
            assert {a, b} <= learned or {a, b} <= kept
    with pytest.raises(TooFewPairsError, match="401 hang together"):
        split_pairs(queries[:401], [dict.fromkeys(map(str, range(150)), "one book")])


def test_by_time_the_latest_are_kept_back() -> None:
    queries = questions(300, 100)
    days = [f"2024-{1 + n % 100 // 10:02}-{1 + n % 10:02}" for n in range(300)]
    split = split_pairs(queries, times=days)
    assert split.by == "document and time"
    latest = [max(days[i] for i in side) for side in (split.learning, split.held_out)]
    assert latest[0] < min(days[i] for i in split.held_out)
    numbers = [str(n % 100) for n in range(300)]
    as_numbers = split_pairs(queries, times=numbers)
    assert max(int(numbers[i]) for i in as_numbers.learning) == 69, "by value and not as text"
    with pytest.raises(DeclarationError, match="cannot be read"):
        split_pairs(queries, times=["yesterday"] * 300)


def test_split_by_columns_of_the_table(
    engine: sa.Engine, shop: Any, minilm: Encoder, tmp_path: Path
) -> None:
    report = tune(
        engine, Thing.embedding, pairs(shop), out=tmp_path / "x", document="shelf", time="since"
    )
    kept = {next(iter(q.gains)) for q in read_pairs(report.pairs)}
    shelves = {str(row["id"]): row["shelf"] for row in shop}
    other = {shelf for key, shelf in shelves.items() if key not in kept}
    assert not {shelves[key] for key in kept} & other


def test_the_command(engine: sa.Engine, shop: Any, minilm: Encoder, tmp_path: Path) -> None:
    """Pairs from a column, the next step as text, and 1 where nothing is gained."""
    url = engine.url
    out = tmp_path / "tuned"
    done = sbert_pg("tune", "thing", "--pairs", "asked", "--out", str(out), url=url)
    assert done.returncode == 0, done.stderr
    assert "gain +" in done.stdout
    accepted = f"reembed begin thing.embedding --encoder {out}".split()
    assert " ".join(accepted[1:]) in done.stdout.replace("public.", "")
    begun = sbert_pg(*accepted, url=url)
    assert begun.returncode == 0, begun.stderr
    line = next(text for text in done.stdout.splitlines() if "embedding = " in text)
    assert f"embedding_column('{out}', dimensions=384, source='body'" in line
    few = "SELECT asked AS question, id FROM thing WHERE id < 50"
    refused = sbert_pg("tune", "thing", "--pairs", few, "--out", str(tmp_path / "x"), url=url)
    assert refused.returncode == 1
    assert "TooFewPairsError" in refused.stderr
