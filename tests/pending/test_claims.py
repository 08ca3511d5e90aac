"""Claims on a real server: who gets what, what is written, and what is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog.tables import pending
from sbert_pg.errors import EncoderError
from sbert_pg.pending import claims
from sbert_pg.pending.rows import Rows, rows_of
from sbert_pg.pending.texts import embed, encode_each
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types import Vector
from sbert_pg.types.guard import ColumnIdentity

LEASE = timedelta(seconds=60)
IDENTITY = ColumnIdentity(None, "note", "embedding")


@pytest.fixture
def note(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> sa.Table:
    table = sa.Table(
        "note",
        sa.MetaData(),
        sa.Column("id", sa.BigInteger, sa.Identity(always=False), primary_key=True),
        sa.Column("body", sa.Text),
        sa.Column("views", sa.Integer, server_default="0"),
        sa.Column("embedding", Vector(384)),
    )
    with engine.begin() as connection:
        table.create(connection)
        declared = EncoderSpec(name="deterministic", dimensions=384)
        binding = catalog.bind(connection, IDENTITY, declared, Source.of("body"))
        catalog.seal(connection, binding, fake_encoder)
    return table


@pytest.fixture
def rows(engine: sa.Engine, note: sa.Table) -> Rows:
    with engine.begin() as connection:
        return rows_of(connection, catalog.require_binding(connection, IDENTITY))


@pytest.fixture
def plain(engine: sa.Engine) -> Iterator[psycopg.Connection]:
    """A writer that knows nothing of this library."""
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


def take(
    engine: sa.Engine, rows: Rows, token: str, *, limit: int = 100, alone: bool = False
) -> claims.Claimed:
    with engine.begin() as connection:
        taken = claims.claim(
            connection, rows.binding.id, token=token, limit=limit, lease=LEASE, alone=alone
        )
    with engine.begin() as connection:
        return claims.read(connection, rows, token, taken)


def put(
    engine: sa.Engine, rows: Rows, claimed: claims.Claimed, encoder: DeterministicEncoder
) -> claims.Written:
    embedded = embed(rows, encoder, claimed.rows)
    with engine.begin() as connection:
        return claims.write(connection, rows, claimed, embedded.vectors)


def marks(engine: sa.Engine) -> dict[str, sa.Row]:
    with engine.begin() as connection:
        return {row.key: row for row in connection.execute(sa.select(pending))}


def stored(engine: sa.Engine, note: sa.Table) -> dict[int, tuple[str | None, np.ndarray | None]]:
    with engine.begin() as connection:
        found = connection.execute(sa.select(note.c.id, note.c.body, note.c.embedding))
        return {id_: (body, vector) for id_, body, vector in found}


def test_a_claimed_row_gets_the_vector_of_its_text(engine, rows, note, plain, fake_encoder):
    plain.execute("INSERT INTO note (body) VALUES ('red apple'), ('green pear'), ('red apple')")
    claimed = take(engine, rows, "t1")
    assert [row.text for row in claimed.rows] == ["red apple", "green pear", "red apple"]
    assert put(engine, rows, claimed, fake_encoder) == claims.Written(3, (), ())
    assert fake_encoder.encoded[-2:] == ["red apple", "green pear"], "each text is encoded once"
    assert marks(engine) == {}
    for body, vector in stored(engine, note).values():
        np.testing.assert_array_equal(vector, fake_encoder.encode_document([body])[0])


def test_two_workers_never_claim_the_same_row(engine, rows, plain):
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 500) AS i")
    taken: list[str] = []
    lock = threading.Lock()

    def work(name: str) -> None:
        number = 0
        while claimed := take(engine, rows, f"{name}/{(number := number + 1)}", limit=7).claims:
            with lock:
                taken.extend(claim.key for claim in claimed)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken, key=int) == [str(i) for i in range(1, 501)]


def test_oldest_first(engine, rows, plain):
    for word in ("first", "second", "third"):
        plain.execute("INSERT INTO note (body) VALUES (%s)", [word])
    assert [row.text for row in take(engine, rows, "t", limit=2).rows] == ["first", "second"]


def test_a_text_that_changed_meanwhile_is_not_overwritten(engine, rows, note, plain, fake_encoder):
    plain.execute("INSERT INTO note (body) VALUES ('old')")
    claimed = take(engine, rows, "t1")
    plain.execute("UPDATE note SET body = 'new'")
    assert put(engine, rows, claimed, fake_encoder) == claims.Written(0, ("1",), ())
    assert stored(engine, note)[1] == ("new", None)
    again = take(engine, rows, "t2")
    assert [row.text for row in again.rows] == ["new"]
    assert put(engine, rows, again, fake_encoder).rows == 1


def test_a_change_of_something_else_does_not_matter(engine, rows, note, plain, fake_encoder):
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    claimed = take(engine, rows, "t1")
    plain.execute("UPDATE note SET views = views + 1")
    assert put(engine, rows, claimed, fake_encoder).rows == 1


def test_a_mark_that_was_removed_and_made_again_is_another(engine, rows, note, plain, fake_encoder):
    """A, then B with its vector, then A again by plain SQL: the first claim is void each time."""
    plain.execute("INSERT INTO note (body) VALUES ('A')")
    claimed = take(engine, rows, "t1")
    vector = fake_encoder.encode_document(["B"])[0]
    with engine.begin() as connection:
        catalog.attest(connection, rows.binding)
        connection.execute(sa.update(note).values(body="B", embedding=vector))
    assert marks(engine) == {}
    assert put(engine, rows, claimed, fake_encoder).rows == 0
    plain.execute("UPDATE note SET body = 'C'")
    assert put(engine, rows, claimed, fake_encoder).rows == 0
    assert list(marks(engine)) == ["1"]
    np.testing.assert_array_equal(stored(engine, note)[1][1], vector)


def test_a_change_that_commits_during_the_write_wins(engine, rows, note, plain, fake_encoder):
    """A writer's transaction is open while the worker writes: the row is skipped, not awaited."""
    plain.execute("INSERT INTO note (body) VALUES ('old'), ('other')")
    claimed = take(engine, rows, "t1")
    with plain.transaction():
        plain.execute("UPDATE note SET body = 'new' WHERE id = 1")
        started = time.monotonic()
        written = put(engine, rows, claimed, fake_encoder)
        assert time.monotonic() - started < 5
    assert written == claims.Written(1, (), ("1",))
    assert list(marks(engine)) == ["1"]
    assert stored(engine, note)[1] == ("new", None)


def test_a_row_that_lost_its_text_loses_its_vector(engine, rows, note, plain, fake_encoder):
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    put(engine, rows, take(engine, rows, "t1"), fake_encoder)
    plain.execute("UPDATE note SET body = NULL")
    claimed = take(engine, rows, "t2")
    assert [row.text for row in claimed.rows] == [None]
    assert put(engine, rows, claimed, fake_encoder).rows == 1
    assert stored(engine, note)[1] == (None, None)
    assert marks(engine) == {}


def test_an_empty_text_is_a_text(engine, rows, note, plain, fake_encoder):
    plain.execute("INSERT INTO note (body) VALUES ('')")
    put(engine, rows, take(engine, rows, "t1"), fake_encoder)
    vector = stored(engine, note)[1][1]
    np.testing.assert_array_equal(vector, fake_encoder.encode_document([""])[0])


def test_deleted_rows_and_orphaned_marks(engine, rows, plain, fake_encoder):
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b')")
    plain.execute(
        "INSERT INTO sbert.pending (column_id, key) VALUES (%s, '999')", [rows.binding.id]
    )
    claimed = take(engine, rows, "t1")
    assert [claim.key for claim in claimed.orphans] == ["999"]
    plain.execute("DELETE FROM note WHERE id = 1")
    assert put(engine, rows, claimed, fake_encoder).rows == 1
    assert marks(engine) == {}


def test_an_expired_lease_is_taken_over_and_the_late_worker_loses(
    engine, rows, note, plain, fake_encoder
):
    plain.execute("INSERT INTO note (body) VALUES ('text')")
    late = take(engine, rows, "late")
    assert take(engine, rows, "early").claims == ()
    plain.execute("UPDATE sbert.pending SET lease_until = now() - interval '1 second'")
    second = take(engine, rows, "second")
    assert second.claims[0].abandoned
    assert second.claims[0].attempts == 2
    assert put(engine, rows, late, fake_encoder).rows == 0
    assert put(engine, rows, second, fake_encoder).rows == 1


def test_rows_that_ended_a_worker_twice_are_claimed_alone(engine, rows, plain):
    plain.execute("INSERT INTO note (body) SELECT 'n' || i FROM generate_series(1, 5) AS i")
    for token in ("crash1", "crash2"):
        take(engine, rows, token)
        plain.execute("UPDATE sbert.pending SET lease_until = now() - interval '1 second'")
    assert take(engine, rows, "t").claims == ()
    assert len(take(engine, rows, "t", alone=True).claims) == 1


def test_release_does_not_count_as_an_attempt(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('a'), ('b')")
    claimed = take(engine, rows, "t1")
    with engine.begin() as connection:
        claims.release(connection, rows.binding.id, "t1", ["1"])
        claims.release(connection, rows.binding.id, "t1", ["2"], after=timedelta(hours=1))
        claims.release(connection, rows.binding.id, "other", ["1"], after=timedelta(hours=1))
    assert len(claimed.claims) == 2
    again = take(engine, rows, "t2").claims
    assert [(claim.key, claim.attempts) for claim in again] == [("1", 1)]


def test_failures_back_off_and_end(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('poison')")
    waits = []
    for attempt in range(1, 4):
        claimed = take(engine, rows, f"t{attempt}", alone=attempt > claims.ALONE_FROM)
        assert [claim.attempts for claim in claimed.claims] == [attempt]
        with engine.begin() as connection:
            ended = claims.fail(
                connection, rows.binding.id, f"t{attempt}", {"1": "no\0 good"},
                max_attempts=3, backoff=timedelta(seconds=10),
            )  # fmt: skip
        assert ended == (attempt == 3)
        found = plain.execute("SELECT next_attempt_at - now(), failed, error FROM sbert.pending")
        wait, failed, error = found.fetchone()
        waits.append(round(wait.total_seconds()))
        assert failed == (attempt == 3)
        assert error == "no� good"
        assert take(engine, rows, "x").claims == (), "it is not tried before its time"
        plain.execute("UPDATE sbert.pending SET next_attempt_at = now()")
    assert waits == [10, 20, 40]
    assert take(engine, rows, "x", alone=True).claims == (), "a failed row is left alone"
    plain.execute("UPDATE note SET body = 'cured'")
    assert [claim.attempts for claim in take(engine, rows, "y").claims] == [1]


def test_renew_keeps_others_away(engine, rows, plain):
    plain.execute("INSERT INTO note (body) VALUES ('a')")
    take(engine, rows, "t1")
    plain.execute("UPDATE sbert.pending SET lease_until = now() - interval '1 second'")
    with engine.begin() as connection:
        claims.renew(connection, rows.binding.id, "t1", ["1"], LEASE)
        due = claims.next_due(connection, [rows.binding.id])
    assert take(engine, rows, "t2").claims == ()
    assert 55 < due <= 60


def test_nothing_due(engine, rows):
    with engine.begin() as connection:
        assert claims.next_due(connection, [rows.binding.id]) is None


@pytest.mark.parametrize(
    ("columns", "values", "storage"),
    [
        ("a uuid, primary key (a)", "gen_random_uuid()", "vector"),
        ('"Weird ""name" text, primary key ("Weird ""name")', "'it''s [\"x\"]'", "halfvec"),
        ("a int, b timestamptz, c text, primary key (b, a, c)", "1, now(), '\"\\'", "vector"),
        ("a bytea, b date, primary key (a, b)", "'\\x00ff', '2024-02-29'", "halfvec"),
        ("a numeric(20, 5), primary key (a)", "1.50", "vector"),
        ("a varchar(10) collate \"C\", b bool, primary key (a, b)", "'ä', true", "vector"),
    ],
)  # fmt: skip
def test_keys_of_every_kind(engine, plain, fake_encoder, columns, values, storage):
    """Also under a session with unusual formats: the key must not depend on it."""
    plain.execute(f"CREATE TABLE odd ({columns}, body text, embedding {storage}(384))")
    identity = ColumnIdentity(None, "odd", "embedding")
    with engine.begin() as connection:
        declared = EncoderSpec(name="deterministic", dimensions=384)
        binding = catalog.bind(connection, identity, declared, Source.of("body"))
        catalog.seal(connection, binding, fake_encoder)
        rows = rows_of(connection, catalog.require_binding(connection, identity))
    plain.execute("SET DateStyle = 'German'; SET TimeZone = 'Asia/Tokyo'; SET bytea_output=escape")
    plain.execute(f"INSERT INTO odd SELECT {values}, 'some text'")
    assert put(engine, rows, take(engine, rows, "t"), fake_encoder).rows == 1
    assert marks(engine) == {}
    assert plain.execute("SELECT embedding IS NOT NULL FROM odd").fetchall() == [(True,)]


def test_a_partitioned_table(engine, plain, fake_encoder):
    plain.execute(
        "CREATE TABLE parted (id int, body text, embedding vector(384), primary key (id)) "
        "PARTITION BY RANGE (id)"
    )
    plain.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    plain.execute("CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20)")
    identity = ColumnIdentity(None, "parted", "embedding")
    with engine.begin() as connection:
        declared = EncoderSpec(name="deterministic", dimensions=384)
        binding = catalog.bind(connection, identity, declared, Source.of("body"))
        catalog.seal(connection, binding, fake_encoder)
        rows = rows_of(connection, catalog.require_binding(connection, identity))
    plain.execute("INSERT INTO parted SELECT i, 'n' || i FROM generate_series(1, 19) AS i")
    assert put(engine, rows, take(engine, rows, "t"), fake_encoder).rows == 19
    assert marks(engine) == {}


class Moody(DeterministicEncoder):
    """Raises for some texts without saying which."""

    def encode_document(self, texts):
        if any("bad" in text for text in texts):
            raise RuntimeError("something in here")
        return super().encode_document(texts)


@pytest.mark.parametrize("encoder", [Moody(), DeterministicEncoder(refuse="bad")])
def test_bad_texts_are_isolated(encoder):
    texts = [f"text {i}" for i in range(40)]
    for position in (3, 17, 39):
        texts[position] = f"bad {position}"
    vectors, faults = encode_each(encoder, texts)
    assert sorted(faults) == [3, 17, 39]
    for i, text in enumerate(texts):
        if i not in faults:
            np.testing.assert_array_equal(vectors[i], encoder.encode_document([text])[0])


def test_an_encoder_that_fails_for_everything_is_to_blame_itself():
    with pytest.raises(EncoderError, match="fails for every text: RuntimeError: something"):
        encode_each(Moody(), [f"bad {i}" for i in range(5)])
    _, faults = encode_each(Moody(), ["bad"])
    assert faults == {0: "RuntimeError: something in here"}
    _, faults = encode_each(DeterministicEncoder(refuse="bad"), ["bad 1", "bad 2"])
    assert len(faults) == 2
