"""Run the tests marked `racy` several times and print how often each failed; none decides anything.

A test belongs here only while nobody knows how to make it deterministic.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

#: pytest's exit code where no test was selected.
NOTHING_SELECTED = 5


def failures(report: Path) -> tuple[set[str], set[str]]:
    """Names of the tests that ran, and of those that failed, by a JUnit report."""
    ran, failed = set(), set()
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        if case.find("skipped") is None:
            ran.add(name)
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
    return ran, failed


def main() -> int:
    """Run them and print the rates; fails only where pytest itself does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    ran: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        for _ in range(runs):
            command = [sys.executable, "-m", "pytest", "-q", "-m", "racy", f"--junit-xml={report}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == NOTHING_SELECTED:
                print("No test is marked racy.")
                return 0
            if done.returncode not in (0, 1):
                print(done.stdout, done.stderr, file=sys.stderr)
                return done.returncode
            of_run = failures(report)
            ran.update(of_run[0])
            failed.update(of_run[1])
    for name, times in sorted(ran.items()):
        print(f"{failed[name]} of {times} failed  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
