"""A server of a benchmark's own, and the CPU time of its processes (Linux)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sbert_pg.embedded import EmbeddedServer, embedded_server


@contextmanager
def fresh_server(
    settings: Mapping[str, str] | None = None,
    *,
    directory: str | None = None,
    postgres_version: int = 18,
) -> Iterator[EmbeddedServer]:
    """A server with nothing in it, whose files go with it.

    Args:
        settings: as in ``postgresql.conf``.
        directory: where its files are, beside others'; the system's for such files by default.
    """
    with tempfile.TemporaryDirectory(prefix="sbert-pg-bench-", dir=directory) as name:
        # The server may run as another user.
        Path(name).chmod(0o755)
        with embedded_server(
            Path(name) / "data", postgres_version=postgres_version, settings=settings
        ) as server:
            yield server


def cpu_seconds(backend: int) -> float:
    """Seconds that a process has run so far, exact to a few microseconds."""
    return int(Path(f"/proc/{backend}/schedstat").read_text().split()[0]) / 1e9
