"""What a run shows and leaves behind: a progress bar, a table, a JSON report and a picture; for PyTorch and JAX."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cuflash.demo.report import format_bytes, write_json


class Step(NamedTuple):
    """A step of training: its number from 1, its loss in bits per byte, and its duration."""

    number: int
    bits: float
    seconds: float


def process_peak_memory() -> int | None:
    """Bytes that this process held at its peak; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def recorded(
    report: dict[str, Any],
    folder: Path,
    others: Sequence[dict[str, Any]],
    console: Console,
    *,
    peak: Callable[[], int | None],
    failures: tuple[type[Exception], ...],
) -> Iterator[None]:
    """Whatever happens inside, show how it ended, and write the report into `folder`; its "status" becomes "complete",
    "interrupted", or "failed" after FloatingPointError and `failures`, which end here, and after any other error."""
    report |= {"status": "failed", "losses": report.get("losses", []), "step_seconds": []}
    report |= {"held_out_bits": None, "tokens_per_second": None}
    try:
        yield
        report["status"] = "complete"
    except KeyboardInterrupt:
        report["status"] = "interrupted"
        console.print("interrupted")
    except (FloatingPointError, *failures) as error:
        report["error"] = str(error)
        console.print(f"failed: {error}", markup=False)
    finally:
        report["peak_bytes"] = peak()
        console.print(summary(report))
        for other in others:
            difference = largest_difference(report, other)
            console.print(f"largest difference from the losses of {other['attention']}: {difference:.1e}", markup=False)
        for path in write(report, folder, others):
            console.print(f"wrote {path}", markup=False)


def exit_code(report: dict[str, Any]) -> int:
    """Of the program: 0 complete, 1 failed, 130 interrupted."""
    return {"complete": 0, "interrupted": 130}.get(report["status"], 1)


def followed(steps: Iterable[Step], report: dict[str, Any], console: Console) -> Iterator[Step]:
    """The steps, with a progress bar beside them, put into the report as they come."""
    columns = (
        TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[loss]} bits per byte, {task.fields[speed]} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=report["steps"], completed=len(report["losses"]), loss="-", speed="-")
        for step in steps:
            report["losses"].append(step.bits)
            report["step_seconds"].append(step.seconds)
            report["tokens_per_second"] = speed(report["step_seconds"], report["length"])
            last = speed([step.seconds], report["length"])
            bar.update(task, completed=step.number, loss=f"{step.bits:.3f}", speed=f"{last:,.0f}")
            yield step


def speed(seconds: Sequence[float], length: int) -> float:
    """Tokens a second of the median step, the first left out where there are others: it compiles."""
    return length / statistics.median(seconds[1:] or seconds)


def summary(report: dict[str, Any]) -> Table:
    """The end of a run beside the entropies of its text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("bits per byte")
    table.add_column("", justify="right")
    for order, bits in enumerate(report["entropies"]):
        table.add_row(f"order-{order} entropy of the text", f"{bits:.3f}")
    losses = report["losses"]
    if losses:
        last = losses[-10:]
        table.add_row("first step", f"{losses[0]:.3f}")
        table.add_row(f"mean of the last {len(last)} steps", f"[bold]{statistics.fmean(last):.3f}[/]")
    if report["held_out_bits"] is not None:
        table.add_row("held-out text", f"{report['held_out_bits']:.3f}")
    if report["tokens_per_second"] is not None:
        table.add_row("tokens a second", f"{report['tokens_per_second']:,.0f}")
    if report["peak_bytes"] is not None:
        table.add_row(f"peak memory of {report['peak_of']}", format_bytes(report["peak_bytes"]))
    return table


def write(report: dict[str, Any], folder: Path, others: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write report.json, and where there are losses report.png with those of other runs beside them; their paths."""
    paths = [folder / "report.json"]
    write_json(report, paths[0])
    if report["losses"]:
        paths.append(folder / "report.png")
        picture(report, others).savefig(paths[1])
    return paths


def read(path: str) -> dict[str, Any]:
    """The attention and the losses of another run's report; ValueError when the file is none."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: report[name] for name in ("attention", "losses")}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"compare: got {path}; allowed: the report.json of another run ({error!r})") from error


def largest_difference(report: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the losses of the steps that both runs took, in bits per byte."""
    pairs = zip(report["losses"], other["losses"], strict=False)
    return max((abs(mine - theirs) for mine, theirs in pairs), default=0.0)


def picture(report: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> Figure:
    """Loss against steps, over the entropies of the text. 960 x 600 pixels."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e9ecef", linewidth=0.8)
    for colour, other in zip(("#d1495b", "#edae49", "#6a4c93") * len(others), others, strict=False):
        steps = range(1, len(other["losses"]) + 1)
        axes.plot(steps, other["losses"], color=colour, linewidth=3, alpha=0.5, label=other["attention"])
    steps = range(1, len(report["losses"]) + 1)
    axes.plot(steps, report["losses"], color="#00798c", linewidth=1.2, label=report["attention"])
    for order, (bits, style) in enumerate(zip(report["entropies"], ("--", "-.", ":"), strict=True)):
        label = f"order-{order} entropy of the text, {bits:.2f}"
        axes.axhline(bits, color="#6c757d", linestyle=style, linewidth=1.2, label=label)
    axes.set_title(f"{report['length']:,} tokens a step on {report['device']}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
