"""What shows on the terminal that a job goes on: a bar for jobs that are counted, and displays of rich in general."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar


class Display(Protocol):
    """What rich draws again and again: a spinner, a bar."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


D = TypeVar("D", bound=Display)


@contextmanager
def shown(display: D) -> Iterator[D]:
    """A display while it is needed. Interrupts wait until rich has put it up or taken it away: in between its console
    would be left with half of it, unable to print."""
    try:
        with _interrupts_wait():
            display.start()
        yield display
    finally:
        with _interrupts_wait():
            display.stop()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A SIGINT in here is handled at the end, as it would have been."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[-1])


@contextmanager
def progress(total: int, beginning: str) -> Iterator[Callable[[int, str], None]]:
    """What to call after each of `total` jobs, with how many are done and a label: a bar where rich is installed, else
    lines, both on stderr. `beginning` is the label until the first is done."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda done, label: print(f"{done}/{total} {label}", file=sys.stderr, flush=True)
        return
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with shown(Progress(*columns, console=Console(stderr=True, highlight=False))) as bar:
        task = bar.add_task(beginning, total=total)
        yield lambda done, label: bar.update(task, completed=done, description=label)
