"""CPU time of one of the server's processes, for benchmarks beside other programs (Linux)."""

from __future__ import annotations

from pathlib import Path


def cpu_seconds(backend: int) -> float:
    """Seconds that a process has run so far, exact to a few microseconds."""
    return int(Path(f"/proc/{backend}/schedstat").read_text().split()[0]) / 1e9
