"""PL/Python: a question embedded by the server, on Debian's PostgreSQL with the real extension.

That server has no pgvector here. The function needs none, since a vector is text to it: the tables
that it reads are the catalog's own, and the column is named in them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

import sbert_pg
from sbert_pg.catalog import tables
from sbert_pg.encoder import Encoder
from sbert_pg.errors import EncoderNotFoundError
from sbert_pg.probes import measured
from sbert_pg.serving.inside import _encoder
from sbert_pg.sql import load
from sbert_pg.types.wire import to_text

DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
QUESTION = "How do I get my money back?"


def _linked_with() -> Path | None:
    """The programs of a PostgreSQL whose PL/Python is of this Python's version."""
    for library in sorted(Path("/usr/lib/postgresql").glob("*/lib/plpython3.so")):
        linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True)
        if f"libpython{sys.version_info[0]}.{sys.version_info[1]}." in linked.stdout:
            return library.parents[1] / "bin"
    return None


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[sa.Engine, Path]]:
    """A server that has the extension, and a directory that its user may read."""
    programs = _linked_with()
    if programs is None:
        pytest.skip("no PL/Python of this Python (Debian: apt-get install postgresql-plpython3-15)")
    user = "postgres" if os.getuid() == 0 else None
    if subprocess.run(["test", "-r", sbert_pg.__file__], user=user, check=False).returncode:
        pytest.skip("the server's user may not read the packages of this environment")
    folder = Path(tempfile.mkdtemp(prefix="plpython"))
    if user is not None:
        shutil.chown(folder, user)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(folder)}
    # What a person installs for the server's Python is this test's environment for this one.
    places = [str(Path(sbert_pg.__file__).parents[1]), *(p for p in sys.path if "packages" in p)]

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, "-D", folder / "data", *arguments], user=user, check=True,
            env=environment | {"PYTHONPATH": ":".join(places)}, stdout=subprocess.DEVNULL,
            cwd=folder,
        )  # fmt: skip

    run("initdb", "-A", "trust", "-U", "postgres", "-N", "-E", "UTF8")
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
    run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
    engine = sa.create_engine(f"postgresql+psycopg://postgres@/postgres?host={folder}")
    try:
        yield engine, folder / "encoders"
    finally:
        engine.dispose()
        run("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def asked(server: tuple[sa.Engine, Path], _minilm: Encoder) -> Callable[..., str]:
    """Asks with the function of the docs, of a column that belongs to the encoder."""
    engine, encoders = server
    minilm = _minilm
    shutil.copytree(minilm.directory, encoders / "some name")
    (function,) = re.findall(
        r"```sql\n(CREATE EXTENSION IF NOT EXISTS plpython3u.*?)```", DOCS.read_text(), re.DOTALL
    )
    spec = minilm.spec
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA sbert"))
        tables.metadata.create_all(connection, [tables.encoder, tables.binding])
        for name in ("caller_v1", "asked_v1"):
            connection.exec_driver_sql(load(name), execution_options={"no_parameters": True})
        connection.exec_driver_sql(function.replace("/srv/encoders", str(encoders)))
        connection.execute(sa.text("CREATE ROLE reader"))
        connection.execute(sa.text("GRANT USAGE ON SCHEMA sbert TO reader"))
        connection.execute(sa.text("GRANT SELECT ON ALL TABLES IN SCHEMA sbert TO reader"))
        connection.execute(
            sa.insert(tables.encoder).values(
                name=spec.name, fingerprint=spec.fingerprint, dimensions=spec.dimensions,
                similarity="cosine", spec=spec.to_json(), probes=measured(minilm).tobytes(),
            )
        )  # fmt: skip
        for table, encoder_id in (("article", 1), ("unused", None)):
            connection.execute(sa.text(f"CREATE TABLE {table} (id int, embedding real[])"))
            connection.execute(
                sa.insert(tables.binding).values(
                    relation=table, bound_name=table, column_name="embedding", companion="c",
                    # A name says nothing, and must open nothing.
                    encoder_name="/etc", dimensions=spec.dimensions, declared={},
                    encoder_id=encoder_id, source={}, source_columns=[], key_columns=["id"],
                    null_text=True, storage="vector", state="active",
                )
            )  # fmt: skip

    def ask(target: str, question: str | None = QUESTION, role: str = "postgres") -> Any:
        with engine.connect() as connection:
            connection.execute(sa.text(f"SET ROLE {role}"))
            statement = sa.text("SELECT embed_question(:target, :question)")
            return connection.scalar(statement, {"target": target, "question": question})

    return ask


def test_vector_is_the_one_that_python_gives(asked: Callable[..., Any], minilm: Encoder) -> None:
    expected = np.asarray(minilm.encode_query([QUESTION])[0], np.float32)
    vector = np.array(asked("article.embedding")[1:-1].split(","), np.float32)
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert asked("public.article.embedding") == to_text(vector)
    assert asked("article.embedding", None) is None


def test_no_column_of_the_callers(asked: Callable[..., Any]) -> None:
    with pytest.raises(sa.exc.DBAPIError, match="no embedding column that reader may read"):
        asked("article.embedding", role="reader")
    with pytest.raises(sa.exc.DBAPIError, match=r"unused\.embedding has no encoder yet"):
        asked("unused.embedding")


def test_other_vectors_under_the_same_weights_are_refused(
    server: tuple[sa.Engine, Path], asked: Callable[..., Any]
) -> None:
    """The catalog's probes are of another encoder than any in the directory."""
    engine, _ = server
    with engine.begin() as connection:
        probes = connection.scalar(sa.select(tables.encoder.c.probes))
        other = (-np.frombuffer(probes, "<f4")).tobytes()
        connection.execute(sa.update(tables.encoder).values(probes=other))
    # A session keeps the encoder that it has opened.
    engine.dispose()
    try:
        with pytest.raises(sa.exc.DBAPIError, match=r"some name: .*the probes do not agree") as hit:
            asked("article.embedding")
        assert isinstance(hit.value.orig, psycopg.Error)
        assert "sbert-pg encoder convert" in str(hit.value)
    finally:
        with engine.begin() as connection:
            connection.execute(sa.update(tables.encoder).values(probes=probes))


def test_what_cannot_be_opened_is_passed_over(minilm: Encoder, tmp_path: Path) -> None:
    """Another version's conversion, one whose engine is not installed: the next may do."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(EncoderNotFoundError, match=r"a: .*has format 2"):
        _encoder(tmp_path, minilm.spec, measured(minilm).tobytes())
    (tmp_path / "b").symlink_to(minilm.directory)
    other = _encoder(tmp_path, minilm.spec, measured(minilm).tobytes())
    assert other.spec.fingerprint == minilm.spec.fingerprint
