"""A whole change of encoder in one call, for applications that are small enough for it.

Each step is one that can be run again, so the whole can be: it finds out how far it has come.
"""

from __future__ import annotations

import datetime as dt
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.errors import ReembeddingError, StepStoppedError
from sbert_pg.pending.backfill import BackfillSettings, backfill
from sbert_pg.pending.progress import Progress
from sbert_pg.reembedding.contract import finish
from sbert_pg.reembedding.expand import Request, build_indexes, start
from sbert_pg.reembedding.plan import need_of
from sbert_pg.reembedding.report import Thresholds, Verification
from sbert_pg.reembedding.retype import retype
from sbert_pg.reembedding.usage import QUIET
from sbert_pg.reembedding.verify import LabelledQuery, verify
from sbert_pg.registry import get_encoder
from sbert_pg.types.guard import ColumnIdentity

Step = Literal["expand", "backfill", "index", "verify", "contract"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a whole change is made.

    Attributes:
        backfill: settings of the backfill.
        encode: encode every text, even where the vectors could be computed from the old ones or
            kept.
        indexes: indexes to build, as declared; by default one like each of the old column's.
        maintenance_work_mem: memory for the build of the index, as in ``"2GB"``.
        thresholds: what the verification has to reach.
        filters: the application's usual criteria, by name.
        queries: labelled queries.
        finish: drop the old column at the end.
        force: drop it although it is still in use.
        quiet: how long the old column must not have been used before it is dropped.
    """

    backfill: BackfillSettings = field(default_factory=BackfillSettings)
    encode: bool = False
    indexes: Sequence[sa.Index] | None = None
    maintenance_work_mem: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    filters: Mapping[str, sa.ColumnElement[bool]] = field(default_factory=dict)
    queries: Sequence[LabelledQuery] = ()
    finish: bool = False
    force: bool = False
    quiet: dt.timedelta = QUIET


@dataclass(frozen=True, slots=True)
class Told:
    """A word on how far a step has come.

    Attributes:
        step: the step.
        words: what it is doing.
        done: rows, blocks or tuples done.
        total: of how many, where that is known.
        rate: rows a second, where there is a rate.
    """

    step: Step
    words: str
    done: int = 0
    total: int | None = None
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Changed:
    """What became of a change.

    Attributes:
        binding: the new column.
        way: whether its vectors were encoded, or computed from the old ones.
        rows: rows that this call filled.
        indexes: the new column's indexes.
        verification: the report.
        finished: whether the old column is gone.
    """

    binding: Binding
    way: Literal["encoded", "computed"]
    rows: int
    indexes: tuple[str, ...]
    verification: Verification
    finished: bool


Tell = Callable[[Told], None]
#: Embeds what is pending of a column, as a worker does; this floor has no worker.
Drain = Callable[[Binding], object]


def run(
    engine: sa.Engine,
    request: Request,
    settings: Settings | None = None,
    *,
    drain: Drain | None = None,
    tell: Tell | None = None,
    stop: threading.Event | None = None,
) -> Changed:
    """Expand, backfill, build the index, verify, and contract if the settings ask for it.

    Killed at any moment it is called again and goes on. Where the new vectors can be computed from
    the old ones (``halfvec``, truncated dimensions) nothing is encoded.

    Args:
        engine: an engine with the driver psycopg 3.
        request: the change.
        settings: see ``Settings``.
        drain: embeds the rows that changed meanwhile, as in ``lambda b: refresh(engine,
            WorkerSettings(columns=(str(b),)))``; without it they are left to running workers.
        tell: told how far it has come, in several threads.
        stop: once it is set, what is in hand is finished or cancelled.

    Raises:
        NotBoundError: the old column is not bound.
        ReembeddingError: the new encoder is of the same space as the old one.
        StepStoppedError: ``stop`` was set.
        EncoderError: the new encoder cannot be loaded; nothing was touched.
        VerificationError: a threshold was missed, and ``finish`` was asked for.
        StillInUseError: the old column is still in use, and ``finish`` was asked for.
        TableBusyError: a lock could not be had.
    """
    work = _Run(engine, request, settings or Settings(), tell, stop or threading.Event())
    return work.whole(drain)


class _Run:
    def __init__(
        self,
        engine: sa.Engine,
        request: Request,
        settings: Settings,
        tell: Tell | None,
        stop: threading.Event,
    ) -> None:
        self.engine = engine
        self.request = request
        self.settings = settings
        self.stop = stop
        self.step: Step = "expand"
        self._tell = tell

    def say(
        self, words: str, done: int = 0, total: int | None = None, rate: float | None = None
    ) -> None:
        """Tell, if somebody listens."""
        if self._tell is not None:
            self._tell(Told(self.step, words, done, total, rate))

    def enter(self, step: Step, words: str) -> None:
        """Begin a step, unless the whole is to stop."""
        self.check()
        self.step = step
        self.say(words)

    def check(self) -> None:
        """Raise where the whole is to stop."""
        if self.stop.is_set():
            raise StepStoppedError(
                f"Stopped in the step {self.step!r}. What was done stays; run the same command "
                "again to go on from there."
            )

    def whole(self, drain: Drain | None) -> Changed:
        settings, old = self.settings, self.request.old
        # Before anything is touched: an encoder that cannot be loaded leaves no column behind.
        self.say(f"loading encoder {self.request.encoder.name}")
        get_encoder(self.request.encoder)
        over = self.over()
        if over is not None:
            indexes = build_indexes(self.engine, over.identity, indexes=settings.indexes)
            report = self.verified(over.identity)
            return Changed(over, "encoded", 0, tuple(indexes), report, True)
        need = self.need()
        self.enter("expand", f"adding column {self.request.new}")
        binding = start(self.engine, self.request)
        column = binding.identity
        self.enter("backfill", f"filling {binding}")
        rows = self.compute() if need == "retype" else self.encode(binding)
        self.check()
        if drain is not None:
            self.say(f"embedding what changed meanwhile in {binding}")
            drain(binding)
        self.enter("index", f"building the index of {binding}")
        indexes = build_indexes(
            self.engine,
            column,
            indexes=settings.indexes,
            maintenance_work_mem=settings.maintenance_work_mem,
            wait=math.inf,
            on_progress=lambda phase, done, total: self.say(phase, done, total or None),
            stop=self.stop,
        )
        if drain is not None:
            drain(binding)
        report = self.verified(column)
        finished = self.contract(column, old)
        return Changed(
            binding,
            "computed" if need == "retype" else "encoded",
            rows,
            tuple(indexes),
            report,
            finished,
        )

    def over(self) -> Binding | None:
        """The new column where the change was finished before: the old column is gone."""
        new = ColumnIdentity(self.request.old.schema, self.request.old.table, self.request.new)
        with self.engine.connect() as connection:
            old_is_bound = catalog.binding_of(connection, self.request.old) is not None
            found = catalog.binding_of(connection, new)
            connection.rollback()
        over = not old_is_bound and found is not None and found.replaces is None
        return found if over else None

    def need(self) -> str:
        """What the change needs; one that needs nothing is refused."""
        if self.settings.encode:
            return "re-embedding"
        need, reason = need_of(self.engine, self.request)
        if need == "rebind":
            raise ReembeddingError(
                f"{self.request.old} needs no new vectors for encoder "
                f"{self.request.encoder.name!r}: {reason}. Let the column accept it with "
                "'sbert-pg reembed rebind', or encode everything anew with --encode "
                "(Settings(encode=True))."
            )
        return need

    def encode(self, binding: Binding) -> int:
        """Backfill, together with whoever else does it."""

        def show(progress: Progress) -> None:
            paused = f" (paused: {progress.paused})" if progress.paused else ""
            self.say(
                f"filling {binding}{paused}",
                progress.rows,
                progress.total,
                progress.rows_per_second,
            )

        done = backfill(
            self.engine, binding, self.settings.backfill, on_progress=show, stop=self.stop
        )
        return done.rows

    def compute(self) -> int:
        """Fill from the old column, without encoding."""

        def show(rows: int) -> None:
            # Between two transactions, so leaving here leaves nothing half done.
            self.check()
            self.say(f"computing {self.request.new} from {self.request.old.column}", rows)

        encoder = get_encoder(self.request.encoder)
        return retype(self.engine, self.request, encoder, progress=show).copied

    def verified(self, column: ColumnIdentity) -> Verification:
        self.enter("verify", f"verifying {column}")
        settings = self.settings
        report = verify(
            self.engine,
            column,
            filters=settings.filters,
            queries=settings.queries,
            thresholds=settings.thresholds,
        )
        self.say("passed" if report.passed else "not passed")
        if settings.finish:
            # With nothing to drop a missed threshold is a finding, and the report says it.
            report.require()
        return report

    def contract(self, column: ColumnIdentity, old: ColumnIdentity) -> bool:
        if not self.settings.finish:
            return False
        self.enter("contract", f"dropping {old}")
        finish(self.engine, column, force=self.settings.force, quiet=self.settings.quiet)
        return True
