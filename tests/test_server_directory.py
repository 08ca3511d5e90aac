"""What a run of the tests leaves behind where it is killed, and a server that root cannot start."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_directory import server_directory

from sbert_pg.embedded import start_server
from sbert_pg.errors import ServerError

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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another user")
def test_root_without_useradd_hears_of_it(tmp_path: Path, monkeypatch: Any) -> None:
    """As in a container that has few packages, or whose PATH lacks /usr/sbin."""

    def nobody(name: str) -> Any:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", nobody)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServerError, match="install useradd"):
        start_server(tmp_path / "data")
