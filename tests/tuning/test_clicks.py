"""Click logs: what is clicked more, or less, than its place explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg.errors import LoadError
from sbert_pg.tuning import pairs_of, read_pairs

#: How often people look at each place, whatever stands there; and how often they click on a row
#: that they look at.
LOOKS = (1.0, 0.6, 0.4, 0.25, 0.15)
ROWS = {"answer": 0.9, "wrong": 0.0, "a": 0.3, "b": 0.3, "c": 0.3}
#: Where each of them stood, 300 times.
PLACES = {"answer": (4, 5), "wrong": (1, 2), "a": (1, 3), "b": (2, 4), "c": (3, 5)}


def log() -> list[dict[str, Any]]:
    """The answer stands low, so that counts alone say that another row is better."""
    return [
        {
            "question": f"Question {n}",
            "id": f"{n}-{row}",
            "position": place,
            "clicked": round(300 * LOOKS[place - 1] * ROWS[row]),
            "shown": 300,
            "day": f"2024-01-{1 + n:02}",
        }
        for n in range(3)
        for row, places in PLACES.items()
        for place in places
    ]


def test_places_are_taken_out_of_clicks() -> None:
    counts: dict[str, int] = {}
    for event in log():
        counts[event["id"]] = counts.get(event["id"], 0) + event["clicked"]
    assert counts["0-a"] > counts["0-answer"]
    queries = pairs_of(sa.create_engine("postgresql://"), log())
    assert [dict(q.gains) for q in queries] == [
        {f"{n}-answer": 1.0, f"{n}-wrong": 0.0} for n in range(3)
    ]
    assert queries[2].attributes == {"day": "2024-01-03"}


def test_logs_in_files_and_summed_up(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    lines = ["query,id,position,clicked,shown"]
    # Spelled in two ways; shown 40 times; clicked once, which may be a mistake.
    lines += ["what is it,1,1,20,40", "What  is it,2,2,0,40", "what is it,3,3,1,40"]
    lines += ["else,5,1,1,40", "else,6,2,12,40", "else,7,3,0,4"]
    file.write_text("\n".join(lines))
    what, other = read_pairs(file)
    assert what.gains == {"1": 1.0, "2": 0.0}, "of one click nothing is said"
    assert other.gains == {"6": 1.0}, "none of 4 is too few to say"


def test_pairs_by_other_names_are_told_which_are_read() -> None:
    with pytest.raises(LoadError, match="nothing in it is called 'question' or 'query'"):
        pairs_of(sa.create_engine("postgresql://"), [{"title": "a title", "id": 1}])


@pytest.mark.parametrize(
    ("line", "message"),
    [("q,1,0,1", "begin with 1"), ("q,1,first,1", "numbers"), ("q,1,1,2", "more often than shown"),
     ("q,1,1,inf", "numbers"), (f"q,1,{10**20},1", "numbers"), ("q,1,1,1", "names no answer")],
)  # fmt: skip
def test_logs_that_say_nothing(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(f"question,id,position,clicked\n{line}\n")
    with pytest.raises(LoadError, match=message):
        read_pairs(file)


def test_rows_that_were_not_shown_and_a_first_place_without_a_click() -> None:
    """An advertisement may stand at the first place; a log that is summed up has zeros."""
    engine = sa.create_engine("postgresql://")
    line = ("question", "id", "position", "clicked", "shown")
    events = [("q", "ad", 1, 0, 40), ("q", "right", 2, 20, 40), ("q", "other", 3, 2, 40)]
    unseen = [("q", "unseen", 3, 0, 0), ("q", "never", 9, 0, 0)]
    expected = pairs_of(engine, [dict(zip(line, event, strict=True)) for event in events])
    assert dict(expected[0].gains) == {"right": 1.0}
    with_zeros = [dict(zip(line, event, strict=True)) for event in events + unseen]
    assert pairs_of(engine, with_zeros) == expected
