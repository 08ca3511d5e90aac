"""Safeguards are taken out in turn, and the soak has to notice, by the harm that each prevents."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


#: What the soak says of each safeguard that is missing.
NOTICED = {
    "text": r"has \[",
    "vector": r"has \[",
    "seed": r"has \[",
    "check": r"has \[",
    "lease": "leased twice",
    "fence": "a reader with encoder",
    "sweep": r"quiet \d+ has been pending for",
    "refusal": "a foreign vector was accepted",
}


@pytest.mark.parametrize("safeguard", NOTICED)
def test_the_soak_notices_what_is_missing(safeguard: str) -> None:
    # Some need a coincidence, which a busy machine is slow to bring about.
    options = ["--seconds=600", "--unseen=40", f"--until={NOTICED[safeguard]}"]
    command = [sys.executable, str(BENCHMARKS / "soak.py"), *options]
    environment = {**os.environ, "SBERT_PG_SOAK_SABOTAGE": safeguard}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 1, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert any(re.search(NOTICED[safeguard], each) for each in report["of each kind"]), report
