"""``sbert-pg reembed`` and ``adopt`` as processes: reports, exit codes, interruption, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.wire import from_text

from .test_commands import environment

OLD = DeterministicEncoder("old", 32)
NEW = DeterministicEncoder("new", 32, salt="new")
ROWS = 400
#: Every command that may encode has to know the encoders.
KNOWN = ("--import", "child_spaces")
CHANGE = ("--to", "embedding_new", "--encoder", "new")


#: How a command is ended in the middle.
HOW = pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, id="SIGINT"),
        pytest.param(signal.SIGKILL, id="SIGKILL", marks=pytest.mark.slow),
    ],
)


def start_command(*arguments: str, url: sa.URL, delay: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sbert_pg.cli.app", *arguments],
        env={
            **environment(url),
            "PYTHONPATH": str(Path(__file__).parent),
            "SBERT_PG_TEST_DELAY": str(delay),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments: str, url: sa.URL, rc: int = 0) -> str:
    """Run a command to its end; its output."""
    process = start_command(*arguments, url=url)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == rc, stderr
    assert "Traceback" not in stderr
    assert "\x1b" not in stdout + stderr, "bars and colours are for terminals"
    return stdout if rc == 0 else stdout + stderr


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
        catalog.seal(connection, binding, OLD)
    with plain.cursor() as cursor:
        bodies = [f"stone {i % 17} river {i}" for i in range(ROWS)]
        vectors = OLD.encode_document(bodies)
        plain.execute("SET session_replication_role = replica")
        cursor.executemany(
            "INSERT INTO note VALUES (%s, %s, %s, %s::text::vector)",
            [
                (i, "de" if i % 4 else "en", body, str([float(x) for x in vector]))
                for i, (body, vector) in enumerate(zip(bodies, vectors, strict=True))
            ],
        )
        plain.execute("SET session_replication_role = origin")
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


def test_step_by_step(note, plain, database_url, tmp_path):
    url = database_url
    planned = json.loads(
        command("reembed", "plan", "note.embedding", *CHANGE, *KNOWN, "--json", url=url)
    )
    assert (planned["need"], planned["rows"]) == ("re-embedding", ROWS)
    assert not exists(plain, "embedding_new")
    command("reembed", "start", "note.embedding", *CHANGE, *KNOWN, url=url)
    assert exists(plain, "embedding_new")
    said = command("reembed", "status", "--check", url=url, rc=1)
    assert f"{ROWS} rows to go" in said
    assert "400 of 400" in command("reembed", "finish", "note.embedding_new", url=url, rc=1)
    command("backfill", "note.embedding_new", *KNOWN, url=url)
    command("reembed", "index", "note.embedding_new", url=url)
    queries = tmp_path / "labelled.jsonl"
    queries.write_text(
        json.dumps({"query": "stone 7 river 24", "relevant": ["24"]})
        + "\n\n"
        + json.dumps({"query": "stone 0 river 17", "gains": {"17": 2}})
    )
    measured = json.loads(
        command(
            "reembed", "verify", "note.embedding_new", *KNOWN, "--where", "lang = 'en'",
            "--queries", str(queries), "--sample", "40", "--json", url=url,
        )
    )  # fmt: skip
    assert measured["passed"] is True
    assert [r["filter"] for r in measured["recalls"]] == [None, "lang = 'en'"]
    assert measured["recalls"][1]["selectivity"] == 0.25
    assert [q["queries"] for q in measured["quality"]] == [2, 2]
    missed = command(
        "reembed", "verify", "note.embedding", *KNOWN, "--min-overlap", "1", "--sample", "20",
        url=url, rc=1,
    )  # fmt: skip
    assert "FAILED     overlap@10" in missed
    (state,) = json.loads(command("reembed", "status", "--json", "--check", url=url))
    assert state["state"] == "ready"
    assert state["facts"]["coverage"]["share"] == 1
    command("reembed", "finish", "note.embedding_new", "--quiet", "0", url=url)
    assert not exists(plain, "embedding")
    assert_right(plain)


@pytest.mark.slow
def test_abort(note, plain, database_url):
    command("reembed", "start", "note.embedding", *CHANGE, *KNOWN, url=database_url)
    command("reembed", "abort", "note.embedding_new", url=database_url)
    assert not exists(plain, "embedding_new")
    again = command("reembed", "abort", "note.embedding_new", "--json", url=database_url)
    assert json.loads(again)["done"] is False


def test_what_is_wrong_is_said(note, plain, database_url, tmp_path):
    said = command("reembed", "start", "note.embedding", url=database_url, rc=1)
    assert "--to NEW_COLUMN" in said
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "x"}\n')
    said = command(
        "reembed", "verify", "note.embedding", "--queries", str(bad), url=database_url, rc=1
    )
    assert "line 1" in said
    command("reembed", "verify", "note.embedding", "--queries", "nowhere", url=database_url, rc=2)


class TestRun:
    """All in one command."""

    RUN = ("reembed", "run", "note.embedding", *CHANGE, *KNOWN, "--lease", "1")

    def test_once_and_again(self, note, plain, database_url):
        plain.execute("UPDATE note SET body = 'written as psql does' WHERE id = 5")
        first = json.loads(command(*self.RUN, "--json", url=database_url))
        assert (first["way"], first["rows"], first["finished"]) == ("encoded", ROWS, False)
        assert first["indexes"] == ["ix_note_embedding_new"]
        assert first["verification"]["passed"] is True
        assert exists(plain, "embedding")
        again = json.loads(
            command(
                "reembed", "run", "note.embedding_new", *KNOWN, "--finish", "--quiet", "0",
                "--json", url=database_url,
            )
        )  # fmt: skip
        assert (again["rows"], again["finished"]) == (0, True)
        assert not exists(plain, "embedding")
        assert_right(plain)
        over = json.loads(command(*self.RUN, "--finish", "--json", url=database_url))
        assert (over["rows"], over["finished"]) == (0, True)

    @HOW
    def test_ended_while_it_encodes(self, note, plain, database_url, how):
        process = start_command(*self.RUN, "--batch-size", "16", url=database_url, delay=0.005)
        wait_for(lambda: exists(plain, "embedding_new") and filled(plain) > 0)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=60)
        if how is signal.SIGINT:
            assert process.returncode == 130, stderr
            assert "run the same command again" in " ".join(stderr.split())
            assert "Traceback" not in stderr
        assert 0 < filled(plain) < ROWS
        assert json.loads(command(*self.RUN, "--json", url=database_url))["verification"]["passed"]
        assert_right(plain)

    @HOW
    def test_ended_while_it_builds_the_index(self, note, plain, database_url, how):
        """An older snapshot holds the build up, so that there is time to end it."""
        dsn = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(dsn) as other:
            other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            other.execute("SELECT count(*) FROM pg_class")
            process = start_command(*self.RUN, url=database_url)
            wait_for(lambda: index_state(plain) is not None)
            process.send_signal(how)
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL), stderr
            assert "Traceback" not in stderr
            assert filled(plain) == ROWS
            # Nothing is left of a build that was called off; one whose client was killed goes on.
            assert (index_state(plain) is None) == (how is signal.SIGINT)
            other.rollback()
        done = json.loads(command(*self.RUN, "--json", url=database_url))
        assert done["indexes"] == ["ix_note_embedding_new"]
        assert index_state(plain) == (True,)

    def test_the_same_space_is_refused_with_the_way_out(self, note, plain, database_url):
        asked = ("reembed", "run", "note.embedding", "--to", "other", "-e", "old-twin", *KNOWN)
        assert "sbert-pg reembed rebind" in command(*asked, url=database_url, rc=1)
        assert not exists(plain, "other")
        said = command(
            "reembed", "rebind", "note.embedding", "-e", "old-twin", *KNOWN, "--json",
            url=database_url,
        )  # fmt: skip
        assert json.loads(said)["mean"] > 0.99
        assert plain.execute("SELECT count(*) FROM sbert.compatible_encoder").fetchone() == (1,)

    @pytest.mark.slow
    def test_halfvec_is_computed(self, note, plain, database_url):
        asked = ("note.embedding", "--to", "half", "--storage", "halfvec", *KNOWN, "--json")
        copied = json.loads(command("reembed", "retype", *asked, url=database_url))
        assert (copied["copied"], copied["left"]) == (ROWS, 0)
        done = json.loads(command("reembed", "run", *asked, url=database_url))
        assert (done["way"], done["rows"]) == ("computed", 0)
        assert done["verification"]["passed"] is True


def test_adopt(note, plain, engine, database_url):
    with engine.begin() as connection:
        catalog.unbind(connection, ColumnIdentity("public", "note", "embedding"))
    wrong = command("adopt", "note.embedding", "-e", "new", *KNOWN, url=database_url, rc=1)
    assert "not proven" in wrong
    plain.execute("UPDATE note SET body = 'changed behind its back' WHERE id = 3")
    asked = ("adopt", "note.embedding", "-e", "new", "-e", "old", *KNOWN, "--sample", str(ROWS))
    proof = json.loads(command(*asked, "--check", "--json", url=database_url))
    assert (proof["proven"], proof["adopted"]) == (True, False)
    assert proof["best"]["doubtful"] == ["3"]
    said = command(*asked, url=database_url)
    assert "embedding = embedding_column('old', source='body', nullable=True)" in said
    assert plain.execute("SELECT key FROM sbert.pending").fetchall() == [("3",)]
    assert "already" in command(*asked, url=database_url, rc=1)


def test_ready(note, plain, engine, database_url, tmp_path, monkeypatch):
    """The start-up check, as the entry point of a container would make it."""
    module = tmp_path / "shop_models.py"
    module.write_text(
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
    monkeypatch.chdir(tmp_path)
    app = ("--app", "shop_models:Base")
    assert "not bound" in command("reembed", "ready", *app, url=database_url, rc=1)
    command("reembed", "start", "note.embedding_new", *app, url=database_url)
    assert "lacks the vectors of 400" in command("reembed", "ready", *app, url=database_url, rc=1)
    command("reembed", "run", "note.embedding_new", *app, *KNOWN, url=database_url)
    command("reembed", "ready", *app, url=database_url)
