"""Writers, workers, kills and restarts at once, and every row keeps the promise."""

from __future__ import annotations

import pytest
import soak

#: What comes upon what is up to the threads, so a soak searches for faults and decides nothing of a
#: change; what it found has tests of its own.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("seconds", "seed"), [(8, 1), (75, 2)])
def test_no_text_is_lost_and_none_is_stale(seconds: int, seed: int) -> None:
    options = [f"--seconds={seconds}", f"--seed={seed}", "--workers=2", "--restart-every=5"]
    options.append("--least-harms=3")
    report = soak.soak(soak.parser().parse_args(options))
    assert report["violations"] == 0, report
    assert report["still pending"] == 0, report
    assert soak.good(report), report
    assert report["writes"] > 20, "it was put to the test"
    assert report["harms"] > 2, "it was put to the test"
