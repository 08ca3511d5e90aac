"""What a run of the tests leaves behind where it is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from server_directory import server_directory

RUN = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent / "helpers")!r})
from server_directory import server_directory
with server_directory(Path(sys.argv[1])) as folder:
    (folder / "data").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        folder = Path(run.stdout.readline().strip())
        with server_directory(tmp_path) as own:
            assert {own, folder} == set(tmp_path.iterdir()), "it is still at work"
        run.kill()
    assert list(tmp_path.iterdir()) == [folder]
    with server_directory(tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]
    assert not list(tmp_path.iterdir())
