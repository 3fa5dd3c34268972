"""A progress bar for jobs that are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as bar:
        task = bar.add_task(beginning, total=total)
        yield lambda done, label: bar.update(task, completed=done, description=label)
