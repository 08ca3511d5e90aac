"""What long work tells as it proceeds, and the bar that shows it on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with a step of the work, what is done of it, and of how much, where that is known.
Advance = Callable[[str, int, "int | None"], None]


def duration(seconds: float) -> str:
    """A span of time in its two largest units, as in ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    parts = (
        ((hours, "h"), (minutes, "min")) if hours < 48 else ((hours // 24, "d"), (hours % 24, "h"))
    )
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


@contextmanager
def bar(step: str = "") -> Iterator[Callable[..., None]]:
    """A bar on standard error while the block runs; nothing where that is not a terminal.

    ``step`` is shown before the work tells anything. Results are to be printed after the block.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    # A console also takes variables such as FORCE_COLOR for a terminal, as CI sets them.
    on_terminal = console.is_terminal and console.file.isatty()
    shown, began = step, time.perf_counter()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        Elapsed(),
        Remaining(),
        console=console,
        disable=not on_terminal,
        redirect_stdout=False,
        transient=True,
    ) as drawn:
        task = drawn.add_task(step, total=None, count="")

        def advance(step: str, done: int = 0, total: int | None = None) -> None:
            nonlocal shown, began, task
            if step != shown:
                shown, began = step, time.perf_counter()
                # A task keeps its total where the next step has none.
                drawn.remove_task(task)
                task = drawn.add_task(step, total=total, count="")
            speed = done / max(time.perf_counter() - began, 1e-6)
            of = "" if total is None else f"/{total:,}"
            count = f"{done:,}{of} {speed:,.0f}/s" if done else ""
            drawn.update(task, description=step, completed=done, total=total, count=count)

        yield advance
