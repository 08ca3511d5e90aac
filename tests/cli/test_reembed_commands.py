"""``sbert-pg reembed``, ``backfill`` and ``adopt``: reports, exit codes, interruption, resuming."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
from command_line import process, sbert_pg

from sbert_pg import catalog
from sbert_pg.cli.target import change_or_column, resolve
from sbert_pg.errors import DeclarationError
from sbert_pg.source import Source, digest
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.wire import from_text, to_text, to_wire

OLD = DeterministicEncoder("old", 32)
NEW = DeterministicEncoder("new", 32, salt="new")
ROWS = 400
#: Every command that may encode has to know the encoders.
KNOWN = ("--app", "child_spaces")
CHANGE = ("--to", "embedding_new", "--encoder", "new")


#: How a command is ended in the middle.
HOW = pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGKILL, id="SIGKILL", marks=pytest.mark.slow),
    ],
)


@pytest.fixture(autouse=True)
def application(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The application's modules can be imported, as from its own directory, and are not yet."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    for name in ("child_spaces", "shop_models"):
        sys.modules.pop(name, None)


def command(*arguments: str, url: sa.URL, rc: int = 0) -> str:
    """Run a command to its end; its output."""
    sys.modules.pop("child_spaces", None)
    result = sbert_pg(*arguments, url=url)
    assert result.returncode == rc, result.stderr
    assert "\x1b" not in result.stdout + result.stderr, "bars and colours are for terminals"
    return result.stdout if rc == 0 else result.stdout + result.stderr


@pytest.fixture
def plain(database_url: sa.URL) -> Iterator[psycopg.Connection]:
    dsn = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def note(engine: sa.Engine, plain: psycopg.Connection) -> str:
    """A table whose column is complete, with an index, as the old version has it."""
    plain.execute("CREATE TABLE note (id bigint PRIMARY KEY, lang text, body text, "
                  "embedding vector(32))")  # fmt: skip
    with engine.begin() as connection:
        declared = EncoderSpec(name="old", dimensions=32)
        binding = catalog.bind(
            connection, ColumnIdentity("public", "note", "embedding"), declared, Source.of("body")
        )
        catalog.hold_encoder(connection, binding, OLD)
    with plain.cursor() as cursor:
        bodies = [f"stone {i % 17} river {i}" for i in range(ROWS)]
        vectors = OLD.encode_document(bodies)
        cursor.executemany(
            "INSERT INTO note (id, lang, body, embedding, embedding_of) "
            "VALUES (%s, %s, %s, %s::text::vector, %s)",
            [
                (
                    i, "de" if i % 4 else "en", body, to_text(vector),
                    digest(binding.id, body, to_wire(vector, "vector"), "vector"),
                )
                for i, (body, vector) in enumerate(zip(bodies, vectors, strict=True))
            ],
        )  # fmt: skip
    plain.execute("CREATE INDEX ix_note_embedding ON note USING hnsw (embedding vector_cosine_ops)")
    return "note"


def filled(plain: psycopg.Connection) -> int:
    return int(plain.execute("SELECT count(embedding_new) FROM note").fetchone()[0])  # type: ignore[index]


def wait_for(condition: Callable[[], bool], seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def exists(plain: psycopg.Connection, column: str) -> bool:
    found = plain.execute(
        "SELECT 1 FROM pg_attribute WHERE attrelid = 'note'::regclass AND attname = %s "
        "AND NOT attisdropped",
        [column],
    ).fetchone()
    return found is not None


def assert_right(plain: psycopg.Connection) -> None:
    """Each row's new vector is that of its text, and nothing is pending for it."""
    rows = plain.execute("SELECT body, embedding_new::text FROM note").fetchall()
    vectors = NEW.encode_document([row[0] for row in rows])
    for (body, stored), vector in zip(rows, vectors, strict=True):
        assert stored is not None, body
        assert np.allclose(from_text(stored), vector, atol=1e-5), body


def index_state(plain: psycopg.Connection) -> Any:
    return plain.execute(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('ix_note_embedding_new')"
    ).fetchone()


def test_step_by_step(note, plain, engine, database_url, tmp_path):
    url = database_url
    planned = json.loads(
        command("reembed", "begin", "note", *CHANGE, *KNOWN, "--dry-run", "--json", url=url)
    )
    assert (planned["need"], planned["rows"]) == ("re-embedding", ROWS)
    assert not exists(plain, "embedding_new")
    for _ in range(2):  # again, as after an interruption
        command("reembed", "begin", "note", *CHANGE, *KNOWN, url=url)
    assert exists(plain, "embedding_new")
    other = ("--to", "third", "--encoder", "new", *KNOWN)
    said = command("reembed", "begin", "note", *other, url=url, rc=1)
    assert "note.embedding is being replaced by column 'embedding_new'" in " ".join(said.split())
    said = command("reembed", "begin", "note.embedding_new", *other, url=url, rc=1)
    assert "is itself the new column of a change" in " ".join(said.split())
    said = command("reembed", "status", "--check", url=url, rc=1)
    assert f"{ROWS} of {ROWS} rows to go" in said
    assert "400 rows have no vector yet" in command("reembed", "finish", "note", url=url, rc=1)
    # The table's name means what it meant: the new column would find nothing yet.
    with engine.connect() as connection:
        assert resolve(connection, "note").binding.column == "embedding"
    first = json.loads(command("backfill", "note.embedding_new", *KNOWN, "--json", url=url))
    assert (first["rows"], first["complete"]) == (ROWS, True)
    again = json.loads(command("backfill", "note", *KNOWN, "--json", url=url))
    assert (again["rows"], again["indexes"]) == (0, ["ix_note_embedding_new"])
    queries = tmp_path / "labelled.jsonl"
    queries.write_text(
        json.dumps({"query": "stone 7 river 24", "id": "24"})
        + "\n\n"
        + json.dumps({"query": "stone 0 river 17", "id": "17", "gain": 2})
    )
    measured = json.loads(
        command(
            "reembed", "verify", "note.embedding_new", *KNOWN, "--filter", "lang = 'en'",
            "--pairs", str(queries), "--json", url=url,
        )
    )  # fmt: skip
    assert measured["passed"] is True
    assert [r["filter"] for r in measured["recalls"]] == [None, "lang = 'en'"]
    assert measured["recalls"][1]["selectivity"] == 0.25
    assert [q["queries"] for q in measured["quality"]] == [2, 2]
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text(json.dumps({"overlap": 1}))
    missed = command(
        "reembed", "verify", "note.embedding", *KNOWN, "--thresholds", str(thresholds),
        url=url, rc=1,
    )  # fmt: skip
    assert "FAILED     overlap@10" in missed
    (state,) = json.loads(command("reembed", "status", "--json", "--check", url=url))
    assert state["state"] == "ready"
    assert state["coverage"]["share"] == 1
    command("reembed", "finish", "note.embedding_new", "--force", url=url)
    assert not exists(plain, "embedding")
    assert_right(plain)


def test_a_table_with_two_changes_means_neither(note, plain, engine):
    """Which of two would be dropped nobody may leave to chance; nor that of another schema."""
    plain.execute("CREATE SCHEMA tenant")
    for table in ("note", "tenant.note"):
        plain.execute(f"CREATE TABLE IF NOT EXISTS {table} (id bigint PRIMARY KEY, body text)")
        plain.execute(f"ALTER TABLE {table} ADD e1 vector(32), ADD e2 vector(32)")

    def bound(schema: str, new: str, old: str | None = None) -> Any:
        column, spec = ColumnIdentity(schema, "note", new), EncoderSpec(name="new", dimensions=32)
        with engine.begin() as connection:
            return catalog.bind(connection, column, spec, Source.of("body"), replaces=old)

    bound("tenant", "e1")
    bound("tenant", "e2", "e1")
    assert change_or_column(engine, "note").column == "embedding"
    assert change_or_column(engine, "tenant.note").column == "e2"
    bound("public", "e1", "embedding")
    assert change_or_column(engine, "note").column == "e1"
    plain.execute("ALTER TABLE note ADD e3 vector(32)")
    bound("public", "e2")
    bound("public", "e3", "e2")
    with pytest.raises(DeclarationError, match=r"several.*: public.note.e1, public.note.e3\."):
        change_or_column(engine, "note")


@pytest.mark.slow
def test_abort(note, plain, database_url):
    command("reembed", "begin", "note.embedding", *CHANGE, *KNOWN, url=database_url)
    command("reembed", "abort", "note.embedding_new", url=database_url)
    assert not exists(plain, "embedding_new")
    command("reembed", "abort", "note.embedding_new", url=database_url)


def test_what_is_wrong_is_said(note, plain, database_url, tmp_path):
    said = command("reembed", "begin", "note.embedding", url=database_url, rc=1)
    assert "--to NEW_COLUMN" in said
    nothing = sbert_pg("reembed", "finish", "note", url=database_url)
    assert "finished before, or none has begun" in " ".join(nothing.stderr.split())
    said = command("worker", "--once", "--set", "lease", url=database_url, rc=1)
    assert "a value is missing, as in --set lease=60" in " ".join(said.split())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "x"}\n')
    verify = ("reembed", "verify", "note.embedding", "--pairs")
    assert "line 1" in command(*verify, str(bad), url=database_url, rc=1)
    assert "cannot be read" in command(*verify, "nowhere.csv", url=database_url, rc=1)


class TestBackfill:
    """Vectors and index in one command, and again."""

    FILL = ("backfill", "note", *KNOWN)

    @pytest.fixture(autouse=True)
    def begun(self, note, database_url):
        command("reembed", "begin", "note", *CHANGE, *KNOWN, url=database_url)

    def test_once_and_again(self, note, plain, database_url):
        plain.execute("UPDATE note SET body = 'written as psql does' WHERE id = 5")
        first = json.loads(command(*self.FILL, "--json", url=database_url))
        assert (first["rows"], first["computed"], first["complete"]) == (ROWS, 0, True)
        assert first["indexes"] == ["ix_note_embedding_new"]
        command("reembed", "verify", "note", *KNOWN, url=database_url)
        assert exists(plain, "embedding")
        again = json.loads(command(*self.FILL, "--json", url=database_url))
        assert again["rows"] == 0
        command("reembed", "finish", "note", "--force", url=database_url)
        assert not exists(plain, "embedding")
        assert_right(plain)
        # The old column's row, and nothing else, was pending all along; the new one is as alone.
        over = json.loads(command(*self.FILL, "--json", url=database_url))
        assert (over["rows"], over["complete"]) == (0, True)
        command("reembed", "finish", "note", url=database_url)

    @HOW
    def test_ended_while_it_encodes(self, note, plain, database_url, how):
        running = process(
            *self.FILL, "--set", "batch_size=16", url=database_url, SBERT_PG_TEST_DELAY="0.02"
        )
        wait_for(lambda: exists(plain, "embedding_new") and filled(plain) > 0)
        running.send_signal(how)
        _, stderr = running.communicate(timeout=60)
        if how is signal.SIGINT:
            assert running.returncode == 130, stderr
            assert "run the same command again" in " ".join(stderr.split())
            assert "Traceback" not in stderr
        assert 0 < filled(plain) < ROWS
        assert json.loads(command(*self.FILL, "--json", url=database_url))["complete"]
        assert_right(plain)

    @HOW
    def test_ended_while_it_builds_the_index(self, note, plain, database_url, how):
        """An older snapshot holds the build up, so that there is time to end it."""
        dsn = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(dsn) as other:
            other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            other.execute("SELECT count(*) FROM pg_class")
            running = process(*self.FILL, url=database_url)
            wait_for(lambda: index_state(plain) is not None)
            running.send_signal(how)
            _, stderr = running.communicate(timeout=60)
            assert running.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL), stderr
            assert "Traceback" not in stderr
            assert filled(plain) == ROWS
            # Nothing is left of a build that was called off; one whose client was killed goes on.
            assert (index_state(plain) is None) == (how is signal.SIGINT)
            other.rollback()
        done = json.loads(command(*self.FILL, "--json", url=database_url))
        assert done["indexes"] == ["ix_note_embedding_new"]
        assert index_state(plain) == (True,)


def test_the_same_space_is_refused_with_the_way_out(note, plain, database_url):
    asked = ("reembed", "begin", "note", "--to", "other", "-e", "old-twin", *KNOWN)
    assert "Leave --to out" in command(*asked, url=database_url, rc=1)
    assert not exists(plain, "other")
    said = command("reembed", "begin", "note", "-e", "old-twin", *KNOWN, "--json", url=database_url)
    assert json.loads(said)["mean_cosine"] > 0.99
    assert plain.execute("SELECT count(*) FROM sbert.compatible_encoder").fetchone() == (1,)
    refused = command("reembed", "begin", "note", "-e", "new", *KNOWN, url=database_url, rc=1)
    assert "EncoderMismatchError" in refused


@pytest.mark.slow
def test_halfvec_is_computed(note, plain, database_url):
    command(
        "reembed", "begin", "note", "--to", "half", "--storage", "halfvec", *KNOWN, url=database_url
    )
    done = json.loads(command("backfill", "note", *KNOWN, "--json", url=database_url))
    assert (done["computed"], done["rows"]) == (ROWS, 0)
    command("reembed", "verify", "note", *KNOWN, url=database_url)


def test_adopt(note, plain, engine, database_url):
    with engine.begin() as connection:
        catalog.unbind(connection, ColumnIdentity("public", "note", "embedding"))
    wrong = command("adopt", "note.embedding", "-e", "new", *KNOWN, url=database_url, rc=1)
    assert "not proven" in wrong
    plain.execute("UPDATE note SET body = 'changed behind its back' WHERE id = 3")
    asked = ("adopt", "note.embedding", "-e", "new", "-e", "old", *KNOWN)
    proof = json.loads(command(*asked, "--dry-run", "--json", url=database_url))
    assert (proof["proven"], proof["adopted"]) == (True, False)
    assert proof["best"]["doubtful"] in ([], ["3"])
    said = command(*asked, url=database_url)
    assert (
        "embedding = embedding_column('old', dimensions=32, source='body', nullable=True)" in said
    )
    status = json.loads(command("status", "--json", url=database_url))
    assert "note" in json.dumps(status)
    assert "already" in command(*asked, url=database_url, rc=1)


def test_the_check_before_the_switch(note, plain, engine, database_url, tmp_path, monkeypatch):
    """The start-up check, as the entry point of a container would make it."""
    module = tmp_path / "shop_models.py"
    module.write_text(
        "import child_spaces\n"
        "from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column\n"
        "from sbert_pg import embedding_column, hnsw_index\n"
        "class Base(DeclarativeBase):\n    pass\n"
        "class Note(Base):\n"
        "    __tablename__ = 'note'\n"
        "    __table_args__ = (hnsw_index('ix_note_embedding_new', 'embedding_new'),)\n"
        "    id: Mapped[int] = mapped_column(primary_key=True)\n"
        "    lang: Mapped[str]\n"
        "    body: Mapped[str]\n"
        "    embedding_new = embedding_column('new', dimensions=32, source='body',\n"
        "                                     nullable=True, replaces='embedding')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    app = ("--app", "shop_models:Base")
    check = ("reembed", "status", *app, "--check")
    assert "not bound" in command(*check, url=database_url, rc=1)
    command("reembed", "begin", "note.embedding_new", *app, url=database_url)
    assert "400 rows have no vector yet" in command(*check, url=database_url, rc=1)
    command("backfill", "note.embedding_new", *app, url=database_url)
    command(*check, url=database_url)
