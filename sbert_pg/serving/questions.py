"""A worker's answers to ``CALL sbert.embed``: questions that plain SQL asks.

Beside the worker, in a thread with its own connection that listens. A question is a row of
``sbert.question``; what is answered is written there, a transaction a batch. Several workers share
them by ``SKIP LOCKED``. The connection holds a shared lock as long as it lives, by which callers
know at once that nobody answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import sqlalchemy as sa
from psycopg import sql

from sbert_pg import catalog
from sbert_pg.catalog.tables import QUESTION_CHANNEL
from sbert_pg.errors import EncodingError
from sbert_pg.freshness.encoding import held_encoder
from sbert_pg.freshness.queue import driver_connection
from sbert_pg.freshness.settings import LOGGER, Background, Database, say
from sbert_pg.serving.inside import text_of
from sbert_pg.spec import TextEncoder
from sbert_pg.sqlstates import words_of
from sbert_pg.system import Pause

logger = logging.getLogger(LOGGER)

#: The lock of whoever answers, as two numbers; ``ask_v1`` looks for it. "sbqt" and "quest".
LOCK = (1_935_827_316, 1_902_467_956)
#: Questions of a batch.
BATCH = 64
#: Seconds between looks whether to stop; between removals of what is old; after which a column
#: whose encoder is not here is tried again.
_LOOK, _TIDY, _BLOCKED = 0.5, 60.0, 60.0
#: Seconds that a question waits for an answer, and that an answer is kept; answers kept at most.
_UNANSWERED, _KEPT, _MOST = 60, 86_400, 10_000

_ASKED = (
    "SELECT binding_id, role, digest, question FROM sbert.question WHERE vector IS NULL "
    "AND error IS NULL AND binding_id <> ALL(%s::uuid[]) ORDER BY asked_at LIMIT %s "
    "FOR UPDATE SKIP LOCKED"
)
_ANSWER = (
    "UPDATE sbert.question SET vector = %s, error = %s "
    "WHERE binding_id = %s AND role = %s AND digest = %s"
)


class Answers(Background):
    """Answers questions beside a worker; one of its companions.

    One connection, outside the pool, listens and answers; another is used when a column's encoder
    is loaded.
    """

    thread_name = "sbert-pg-answers"
    patience = 30.0

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__()
        self._database = Database(engine)
        self._encoders: dict[UUID, TextEncoder] = {}
        self._blocked: dict[UUID, float] = {}
        self._tidy_at = 0.0

    def look(self) -> None:
        """Answer what is asked now."""
        with self._opened() as driver:
            self._answer_all(driver)

    def _run(self) -> None:
        pause = Pause()
        while not self._stop.is_set():
            try:
                self._listen(pause)
            except Exception as error:  # Whatever it is, the worker goes on, and this tries again.
                wait = pause.next()
                fields = {"error": words_of(error), "retry_in": round(wait, 2)}
                say(logger, logging.WARNING, "Cannot answer questions; trying again", fields)
                self._stop.wait(wait)

    @contextmanager
    def _opened(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection of psycopg's outside the pool; what runs in no transaction commits."""
        with self._database.engine.connect() as opened:
            connection = opened.execution_options(isolation_level="AUTOCOMMIT")
            driver = driver_connection(connection)
            connection.detach()
            driver.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            yield driver

    def _listen(self, pause: Pause) -> None:
        with self._opened() as driver:
            driver.execute(sql.SQL("LISTEN {}").format(sql.Identifier(QUESTION_CHANNEL)))
            driver.execute("SELECT pg_advisory_lock_shared(%s, %s)", LOCK)
            self._answer_all(driver)
            pause.reset()
            while not self._stop.is_set():
                # What comes while questions are answered is kept, by psycopg from 3.2.4 on. The
                # generator holds the connection's lock until it is exhausted.
                if list(driver.notifies(timeout=_LOOK, stop_after=1)):
                    self._answer_all(driver)
                self._tidy(driver)

    def _tidy(self, driver: psycopg.Connection[Any]) -> None:
        """Remove what nobody fetches; also finds out whether the connection is alive."""
        if time.monotonic() < self._tidy_at:
            return
        self._tidy_at = time.monotonic() + _TIDY
        driver.execute(
            "DELETE FROM sbert.question WHERE asked_at < now() - make_interval(secs => CASE "
            "WHEN vector IS NULL THEN %s ELSE %s END)",
            (_UNANSWERED, _KEPT),
        )
        driver.execute(
            "DELETE FROM sbert.question WHERE asked_at < "
            "(SELECT asked_at FROM sbert.question ORDER BY asked_at DESC OFFSET %s LIMIT 1)",
            (_MOST,),
        )

    def _answer_all(self, driver: psycopg.Connection[Any]) -> None:
        # By the driver itself: a caller waits for these few statements, and they are the same ones.
        while self._answer(driver):
            pass

    def _answer(self, driver: psycopg.Connection[Any]) -> bool:
        """Answer a batch; returns whether there may be more."""
        blocked = [i for i, until in self._blocked.items() if until > time.monotonic()]
        with driver.transaction():
            asked = driver.execute(_ASKED, (blocked, BATCH)).fetchall()
            for binding_id in {row[0] for row in asked}:
                rows = [row for row in asked if row[0] == binding_id]
                self._answer_for(driver, binding_id, rows)
        return len(asked) == BATCH

    def _answer_for(
        self, driver: psycopg.Connection[Any], binding_id: UUID, rows: Sequence[Any]
    ) -> None:
        try:
            encoder = self._encoder(binding_id)
        except sa.exc.SQLAlchemyError:
            raise
        except Exception as error:  # Another worker may have the encoder.
            self._blocked[binding_id] = time.monotonic() + _BLOCKED
            fields = {"binding": str(binding_id), "reason": words_of(error)}
            say(logger, logging.ERROR, "Cannot answer questions about a column", fields)
            return
        for *key, text in rows:
            vector = reason = None
            try:
                vector = text_of(encoder.encode_query([text])[0])
            except EncodingError as refusal:
                reason = words_of(refusal)
            driver.execute(_ANSWER, (vector, reason, *key))

    def _encoder(self, binding_id: UUID) -> TextEncoder:
        """The encoder of a column, proven to be its own."""
        known = self._encoders.get(binding_id)
        if known is None:
            with self._database.begin() as connection:
                binding = {b.id: b for b in catalog.all_bindings(connection)}[binding_id]
            known = self._encoders[binding_id] = held_encoder(self._database, binding)
        return known
