"""The demo's change of encoder: old and new version of a program ask questions all the while.

Each answer is compared with the exact answer in the space of the version that asked.
"""

from __future__ import annotations

import datetime as dt
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg import reembed
from sbert_pg.cli import common
from sbert_pg.distance import unit
from sbert_pg.progress import bar
from sbert_pg.registry import get_encoder
from sbert_pg.search import nearest

#: Rows that a question asks for.
K = 5
#: Seconds between two questions of one version, which leave the processor to the backfill.
_PAUSE = 0.1
#: Seconds that both versions run side by side.
_SIDE_BY_SIDE = 2.0
#: Similarities differ by rounding below this, and by far more in another space.
_ROUNDING = 1e-3


class Answered(NamedTuple):
    """What one version asked in one phase of the change: ``wrong`` are answers with a similarity
    that is not that of its row in the version's own space; ``median`` is in milliseconds, encoding
    included.
    """

    questions: int
    wrong: int
    recall: float
    median: float

    def cells(self, phase: str, version: str) -> list[str]:
        """A line of the table that is printed."""
        recall, median = f"{self.recall:.3f}", f"{self.median:.1f}"
        return [phase, version, f"{self.questions:,}", f"{self.wrong:,}", recall, median]


class Asker:
    """Asks the questions of one version of the program, over and over, in its own thread."""

    def __init__(self, engine: sa.Engine, column: Any, questions: Sequence[str]) -> None:
        self.engine = engine
        self.column = column
        self.questions = questions
        #: For each question the true similarity of every row, by its key.
        self.truth = _similarities(engine, column, questions)
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asker", daemon=True)
        self._begin()

    def _begin(self) -> None:
        self._wrong = 0
        self._recalls: list[float] = []
        self._times: list[float] = []

    def phase(self) -> Answered:
        """What was asked since the last phase ended."""
        recalls, times, wrong = self._recalls, self._times, self._wrong
        self._begin()
        return Answered(
            len(times),
            wrong,
            statistics.fmean(recalls) if recalls else 1.0,
            statistics.median(times) * 1000 if times else 0.0,
        )

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.error is not None and error is None:
            raise self.error

    def _run(self) -> None:
        try:
            number = 0
            while not self._stop.wait(_PAUSE):
                self._ask(self.questions[number % len(self.questions)], number)
                number += 1
        # It is raised where the thread is joined.
        except BaseException as error:
            self.error = error

    def _ask(self, question: str, number: int) -> None:
        started = time.perf_counter()
        # Blanks at the end are none to the encoder, and make it encode the question once more.
        statement = nearest(self.column, question + " " * (number % 97), limit=K)
        with Session(self.engine) as session:
            rows: Any = session.execute(statement).all()
            answers = [(row[0].id, row[1]) for row in rows]
        self._times.append(time.perf_counter() - started)
        truth = self.truth[question]
        least = sorted(truth.values())[-K]
        self._wrong += any(abs(truth[key] - similarity) > _ROUNDING for key, similarity in answers)
        self._recalls.append(sum(truth[key] >= least - _ROUNDING for key, _ in answers) / K)


def _similarities(
    engine: sa.Engine, column: Any, questions: Sequence[str]
) -> dict[str, dict[int, float]]:
    """Cosine of each question with each row, computed here and not by the database."""
    encoder = get_encoder(column.type.encoder)
    key = column.class_.id
    with Session(engine) as session:
        rows: Any = session.execute(sa.select(key, column)).all()
    keys = [row[0] for row in rows]
    vectors = unit(np.stack([row[1] for row in rows]))
    truth = {}
    for question in questions:
        similarities = vectors @ unit(encoder.encode_query([question]))[0]
        truth[question] = dict(zip(keys, map(float, similarities), strict=True))
    return truth


def change_encoder(engine: sa.Engine, old: Any, new: Any, questions: Sequence[str]) -> None:
    """Begin, backfill, verify, switch and finish, with what was measured on the way."""
    request = reembed.request_of(embedding_of(new))
    lines = []
    first = _firsts(engine, embedding_of(old), questions)
    with Asker(engine, embedding_of(old), questions) as before:
        column = reembed.begin(engine, request).identity
        lines.append(before.phase().cells("begin", "old"))
        started = time.perf_counter()
        with bar() as advance:
            filled = reembed.backfill(engine, column, on_progress=advance)
        seconds = time.perf_counter() - started
        lines.append(before.phase().cells("backfill", "old"))
        with bar("verifying"):
            report = reembed.verify(engine, column, sample_size=100, texts=32)
        lines.append(before.phase().cells("verify", "old"))
        report.require()
        # The switch is a deployment: for a while both versions run.
        reembed.require_ready(engine, new.metadata)
        with Asker(engine, embedding_of(new), questions) as after:
            time.sleep(_SIDE_BY_SIDE)
            lines.append(before.phase().cells("switch", "old"))
            lines.append(after.phase().cells("switch", "new"))
    # The old version is stopped.
    with Asker(engine, embedding_of(new), questions) as last:
        reembed.finish(engine, column, quiet=dt.timedelta(0))
        time.sleep(_SIDE_BY_SIDE / 4)
        lines.append(last.phase().cells("finish", "new"))
    columns = ["step", "version", "questions", "wrong answers", f"recall@{K}", "median ms"]
    common.print_table(columns, lines)
    recall = report.recalls[0].mean if report.recalls else float("nan")
    overlap = "" if report.overlap is None else f", overlap@{report.k} {report.overlap:.2f}"
    common.say(
        f"{filled.encoded.rows:,} rows embedded and indexed in {seconds:.1f} s. The new column: "
        f"{report.coverage.share:.0%} of the rows, recall@{report.k} {recall:.3f} against "
        f"exact search{overlap} with the old one's neighbours."
    )
    second = _firsts(engine, embedding_of(new), questions)
    common.print_table(
        ["question", "before", "after"],
        [[question, first[question], second[question]] for question in questions],
    )


def _firsts(engine: sa.Engine, column: Any, questions: Sequence[str]) -> dict[str, str]:
    with Session(engine) as session:
        nearest_of = {q: session.execute(nearest(column, q, limit=1)).one()[0] for q in questions}
        return {question: f"{row.module}.{row.name}" for question, row in nearest_of.items()}


def embedding_of(mapped: Any) -> Any:
    """The embedding column of a class of the demo, as its attribute."""
    named = [c for c in mapped.__table__.c if hasattr(c.type, "encoder")]
    return getattr(mapped, named[0].key)
