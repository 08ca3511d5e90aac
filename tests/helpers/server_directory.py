"""Where the tests' server keeps its files, and what runs that were killed left there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

MEMORY = Path("/dev/shm")
PREFIX = "sbert-pg-tests-"


def roomy() -> Path:
    """Memory, where it has room, else the usual place.

    A database is some three hundred files, and each test makes one: on a disk that takes ten times
    the CPU.
    """
    enough = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30
    return MEMORY if enough else Path(tempfile.gettempdir())


@contextmanager
def server_directory(place: Path) -> Iterator[Path]:
    """A new directory; those of runs that were killed are removed first, and their servers end.

    A run holds a lock on its directory for as long as it lives. A server that loses its directory
    notices within a minute.
    """
    with ExitStack() as stack:
        with _locked(place):  # others look only at directories whose locks are held
            for left in place.glob(f"{PREFIX}*"):
                with suppress(OSError), _locked(left, fcntl.LOCK_NB):
                    shutil.rmtree(left)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=place))
            stack.enter_context(_locked(Path(folder)))
        yield Path(folder)


@contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[None]:
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(held)
