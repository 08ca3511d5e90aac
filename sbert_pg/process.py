"""What belongs to one process: the cores it may use, and values that a fork must not hand down."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

T = TypeVar("T")

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores(cgroup: Path = _CGROUP, own: Path = _OWN_CGROUP) -> int:
    """Cores by affinity, no more than the container's share of CPU time, at least 1.

    ``OMP_NUM_THREADS`` limits them as it limits other numerical libraries; Ray and batch systems
    set it to what a process was given.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        cores = min(cores, int(limit))
    shares = [share for group in _groups(cgroup, own) if (share := _share(group)) is not None]
    return max(1, min(cores, math.ceil(min(shares, default=cores))))


def _groups(cgroup: Path, own: Path) -> list[Path]:
    """Directories of this process's groups and of all above them; each of them may set a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    groups = [cgroup, cgroup / "cpu"]
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        # Version 2 has one hierarchy and names no controllers; version 1 has one for the CPU.
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:
            continue  # outside of what is mounted here
        for root in (cgroup, cgroup / controllers, cgroup / "cpu"):
            groups += [root / group, *(root / parent for parent in group.parents)]
    return list(dict.fromkeys(groups))


def _share(group: Path) -> float | None:
    """CPU time over real time that one group grants, or ``None`` where it sets no limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):
        try:  # version 1
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None


class ProcessLock:
    """A lock that a forked child finds open, whoever held it in the parent.

    A lock that another thread of the parent holds at the fork is never released in the child. So
    each process has its own; what it protects has to be made again after a fork, or be
    harmless where it is half done.
    """

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}

    def __enter__(self) -> None:
        self._own().acquire()

    def __exit__(self, *_: object) -> None:
        self._own().release()

    def _own(self) -> threading.RLock:
        # Setting a default is one step for all threads.
        return self._locks.setdefault(os.getpid(), threading.RLock())


class PerProcess(Generic[T]):
    """A value that each process makes for itself, once, at its first use."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = ProcessLock()
        self._made: tuple[int, T] | None = None

    def get(self) -> T:
        """The value of this process."""
        current = self._made
        if current is not None and current[0] == os.getpid():
            return current[1]
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), self._make()
            return self._made[1]
