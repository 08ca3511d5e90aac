"""Where encoders break: scores of a perfect one, of a blind one, and of one's own texts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from command_line import sbert_pg

from sbert_pg.distance import similarity_matrix
from sbert_pg.errors import DeclarationError
from sbert_pg.tuning import limits_of
from sbert_pg.tuning.limits import ADVICE, AT_THE_END, TRIPLES, beside, share


class Oracle:
    """Knows of every triple which of its texts mean the same; or nothing at all."""

    spec = SimpleNamespace(name="oracle")
    max_seq_length = None

    def __init__(self, blind: bool = False) -> None:
        self.meaning: dict[str, int] = {}
        self.blind = blind
        triples = [t for some in TRIPLES.values() for t in some] + list(AT_THE_END)
        for number, triple in enumerate(triples):
            self.meaning[triple.text] = self.meaning[triple.same] = 2 * number
            self.meaning[triple.other] = 2 * number + 1

    def encode_document(self, texts: Any) -> Any:
        vectors = np.zeros((len(texts), 2 * len(self.meaning)), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            known = (m for t, m in self.meaning.items() if text == t or text.endswith(f" {t}"))
            row[0 if self.blind else next(known)] = 1
        return vectors

    encode_query = encode_document

    def similarity(self, a: Any, b: Any) -> Any:
        return similarity_matrix(np.atleast_2d(a), np.atleast_2d(b), "cosine")

    def count_tokens(self, texts: Any) -> list[int]:
        return [len(text.split()) for text in texts]


def test_a_perfect_encoder_and_a_blind_one() -> None:
    perfect: Any = limits_of(Oracle())  # type: ignore[arg-type]
    assert {limit.name for limit in perfect.limits} == set(ADVICE)
    assert all(limit.score.value == 1 and not limit.failed for limit in perfect.limits)
    blind: Any = limits_of(Oracle(blind=True))  # type: ignore[arg-type]
    assert all(limit.score.value == 0 for limit in blind.limits), "equal is not nearer"
    assert blind.limits[0].failed == TRIPLES["word order"][:3]


def test_no_triple_gives_itself_away() -> None:
    for triples in TRIPLES.values():
        assert len(triples) == 12
        assert all(len({*map(str.casefold, triple)}) == 3 for triple in triples)


def test_side_by_side() -> None:
    """A row for each kind, a column for each encoder."""
    reports: list[Any] = []
    for name, blind in (("seeing", False), ("blind", True)):
        oracle = Oracle(blind)
        oracle.spec = SimpleNamespace(name=name)
        reports.append(limits_of(oracle))  # type: ignore[arg-type]
    header, *rows = beside(reports).splitlines()
    assert header.split() == ["limit", "texts", "seeing", "blind"]
    assert len(rows) == len(ADVICE)
    assert all("1.000 [" in row and "0.000 [" in row for row in rows)


def test_intervals_of_shares() -> None:
    """Wilson's: never outside of 0 to 1, and never empty."""
    assert share(0, 12).low == 0
    assert share(12, 12).high == pytest.approx(1)
    half = share(6, 12)
    assert (half.low, half.high) == pytest.approx((0.2538, 0.7462), abs=1e-3)


def test_ones_own_texts(minilm: Any, database_url: sa.URL, tmp_path: Path) -> None:
    texts = [
        f"The lamp number {n} is on the table in the hall. It has a switch." for n in range(15)
    ]
    texts += ["word " * 400, "𓀀 𓀁 𓀂 is a strange line"]
    report = limits_of(minilm, texts)
    mine = {limit.name: limit for limit in report.limits if limit.of == "yours"}
    assert set(mine) == {"negation", "word order", "numbers and units"}
    assert mine["negation"].triples == 15
    own = report.own
    assert own is not None
    assert own.texts == 17
    assert own.unknown > 0
    assert own.cut == pytest.approx(1 / 17)
    assert 0 <= own.separated.low <= own.separated.value <= own.separated.high <= 1
    assert "of your texts" in str(report)
    long = next(limit for limit in report.limits if limit.name == "long texts")
    assert long.score.value == 0, "what is cut off cannot be found"
    with pytest.raises(DeclarationError, match="empty"):
        limits_of(minilm, [" "])
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    measure = ("encoder", "show", minilm.spec.name, "--limits", "--texts")
    shown = sbert_pg(*measure, str(file), "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["own"]["texts"] == 17
    missing = sbert_pg(*measure, str(tmp_path / "none"))
    assert missing.returncode == 1
    assert "cannot be read" in missing.stderr
    articles = '{"title": "Hours", "body": "The shop is open from nine."}\n'
    loaded = sbert_pg(
        "load", "article", "-", "--create", "-s", "body", url=database_url, stdin=articles
    )
    assert loaded.returncode == 0, loaded.stderr
    asked = (*measure, "article", "--json")
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO article (body) VALUES (NULL), (''), (E'\\n\\t')"))
    table = sbert_pg(*asked, url=database_url)
    assert json.loads(table.stdout)["own"]["texts"] == 1, table.stderr
    assert "too few to say" in sbert_pg(*asked[:-1], url=database_url).stdout
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM article WHERE length(body) > 2"))
    engine.dispose()
    empty = sbert_pg(*asked, url=database_url)
    assert empty.returncode == 1
    assert "empty" in empty.stderr
    with_text = sbert_pg(*measure, "/dev/null")
    assert "There is no text in /dev/null" in with_text.stderr
