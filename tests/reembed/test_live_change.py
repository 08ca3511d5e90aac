"""The live change of ``benchmarks/live_change.py``, short and with a fixed seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "live_change.py"


@pytest.mark.slow
def test_changes_under_load() -> None:
    """Readers and writers of both versions, an abort, a rollback, and processes killed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seconds", "25", "--seed", "3", "--rows", "800"],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["first wrong answers"] == []
    assert report["first errors"] == []
    assert report["wrong-space answers"] == report["errors"] == 0
    assert report["stale vectors at the end"] == report["still pending"] == 0
    assert report["queries answered"] > 50
    assert report["counts"]["changes finished"] >= 1
    assert report["counts"]["finishes refused while the old version ran"] >= 2
    assert report["recall against exact search"]["mean"] > 0.9
    assert done.returncode == 0
