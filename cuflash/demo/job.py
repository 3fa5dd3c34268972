"""The main job: exactness, memory and training, shown as they go and written down at the end, however it ends."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cuflash.demo import exactness, machine, memory, text, training
from cuflash.demo.model import Config, Model
from cuflash.demo.progress import shown
from cuflash.demo.text import Text
from cuflash.errors import UnsupportedError

if TYPE_CHECKING:
    from rich.status import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for."""

    quick: bool = False
    text: str | None = None  # path; None is the text that ships with Python
    context: int | None = None  # tokens; None is 2,048 on a CPU and 65,536 on a GPU
    steps: int | None = None  # of training; None trains for a fixed time
    output: str = "cuflash_demo"  # folder
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is done: chosen so that the whole job ends in time on two slow cores, or on one GPU."""

    context: int
    model: Config
    schedule: training.Schedule
    sweep: memory.Sweep


def size(settings: Settings, xp: Any) -> Size:
    """The size of the job for a device, smaller when it is to be quick."""
    return (_size_on_cpu if xp is np else _size_on_gpu)(settings)


def _size_on_cpu(settings: Settings) -> Size:
    """Ends within 90 seconds on two slow cores, quick within 20."""
    quick = settings.quick
    return Size(
        context=settings.context or 2_048,
        model=Config(),
        schedule=training.Schedule(
            seconds=5 if quick else 46,
            minimum_steps=8 if quick else 16,
            steps=settings.steps,
            evaluations=2 if quick else 6,
            windows=2 if quick else 8,
        ),
        sweep=memory.Sweep(
            heads=2,
            head_dim=64,
            dtype="float32",
            first_length=512 if quick else 1_024,
            last_length=65_536,
            cuflash_seconds=2 if quick else 14,
            standard_seconds=1 if quick else 8,
        ),
    )


def _size_on_gpu(settings: Settings) -> Size:
    """Ends within two minutes on a data centre's GPU. The held-out text is one window there, of its whole length."""
    quick = settings.quick
    return Size(
        context=settings.context or 65_536,
        model=Config(dim=256, heads=4, hidden=1_024, reach=16_384, attention_dtype="float16"),
        schedule=training.Schedule(
            seconds=5 if quick else 50,
            minimum_steps=12 if quick else 16,
            steps=settings.steps,
            evaluations=2 if quick else 8,
            windows=8,
        ),
        sweep=memory.Sweep(
            heads=16,
            head_dim=128,
            dtype="float16",
            first_length=1_024,
            last_length=1_048_576,
            cuflash_seconds=3 if quick else 24,
            standard_seconds=2 if quick else 8,
        ),
    )


def run(settings: Settings) -> int:
    """Run the demo; 0 when every check passed, 1 when one failed, 130 after Ctrl-C. A report is written in any case.

    Raises UnsupportedError without the extra `demo`, ValueError and OSError for settings that cannot be used, all
    before anything is computed.
    """
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"the demo needs rich and matplotlib ({error}): pip install 'cuflash[demo]'") from error
    xp = machine.array_module(settings.device)
    machine.require_products(xp)
    corpus = text.load(settings.text)
    scale = size(settings, xp)
    text.check_length(corpus, scale.context)
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    return _Job(settings, xp, corpus, scale, folder).run()


class _Job:
    """One run: each part shows its results and puts them into `report` as they come."""

    def __init__(self, settings: Settings, xp: Any, corpus: Text, scale: Size, folder: Path) -> None:
        from rich.console import Console

        self.xp, self.corpus, self.scale, self.folder = xp, corpus, scale, folder
        self.console = Console(highlight=False)
        self.checks: dict[str, bool] = {}
        self.report: dict[str, Any] = {
            "status": "failed",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": asdict(settings),
            "versions": machine.versions(),
            "machine": machine.describe(xp),
            "checks": self.checks,
        }

    def run(self) -> int:
        begin = time.perf_counter()
        self.show_device()
        try:
            with machine.one_blas_thread() as one_thread:
                self.report["machine"]["one_blas_thread"] = one_thread
                self.check_exactness()
                self.measure_memory()
                self.train()
            self.report["status"] = "complete"
        except KeyboardInterrupt:
            self.report["status"] = "interrupted"
            self.console.print("\n[yellow]interrupted[/]: the report holds what was measured so far")
        finally:
            self.report["seconds"] = round(time.perf_counter() - begin, 2)
            self.write()
        if self.report["status"] == "interrupted":
            return 130
        return 0 if all(self.checks.values()) else 1

    def spinner(self, label: str) -> AbstractContextManager[Status]:
        """A spinner, which is taken away also where an interrupt comes."""
        return shown(self.console.status(label))

    def show_device(self) -> None:
        """Name what computes; also why it is not a GPU, where none was forbidden."""
        device = self.report["machine"]["processor" if self.xp is np else "device"]
        reason = machine.gpu_obstacle() if self.report["settings"]["device"] == "auto" and self.xp is np else ""
        self.console.print(f"on {device}" + (f" ({reason})" if reason else ""), markup=False)

    def check_exactness(self) -> None:
        self.heading("Exactness", "largest error against float64")
        with self.spinner("computing"):
            dtypes = exactness.DTYPES if self.xp is np else exactness.GPU_DTYPES
            rows, unsupported = exactness.check_served(self.xp, dtypes)
        self.report["exactness"] = [{**asdict(row), "passed": row.passed} for row in rows]
        self.checks["exact"] = bool(rows) and all(row.passed for row in rows)
        table = self.table("dtype", "out", "dq", "dk", "dv", "naive in that dtype", "")
        for dtype in dict.fromkeys(row.dtype for row in rows):
            mine = [row for row in rows if row.dtype == dtype]
            errors = [f"{row.error:.1e}" for row in mine]
            naive = f"{min(row.naive_error for row in mine):.0e} to {max(row.naive_error for row in mine):.0e}"
            table.add_row(dtype, *errors, naive, self.verdict(all(row.passed for row in mine)))
        self.console.print(table)
        for dtype, reason in unsupported.items():
            self.console.print(f"no {dtype}: {reason}", markup=False)

    def measure_memory(self) -> None:
        from cuflash.demo.report import format_bytes

        sweep = self.scale.sweep
        self.heading(
            "Memory",
            f"forward + backward, {sweep.heads} heads of {sweep.head_dim}, {sweep.dtype}, causal",
        )
        points: list[memory.Point] = []
        self.report["memory"] = {**asdict(sweep), "budget_bytes": memory.memory_budget(self.xp), "points": []}
        try:
            with self.spinner("measuring") as status:
                for point in memory.sweep(sweep, self.xp):
                    points.append(point)
                    self.report["memory"]["points"].append(asdict(point))
                    status.update(f"measured {point.name} at {point.length:,} tokens")
        finally:
            table = self.table("tokens", "memory\nstandard", "\ncuflash", "\nratio", "time\nstandard", "\ncuflash")
            for length in sorted({point.length for point in points}):
                found = {point.name: point for point in points if point.length == length}
                cells = {name: _memory_cells(found.get(name), format_bytes) for name in ("standard", "cuflash")}
                peaks = [found[name].peak_bytes if name in found else None for name in ("standard", "cuflash")]
                ratio = f"{peaks[0] / peaks[1]:.0f}x" if peaks[0] and peaks[1] else ""
                (standard, standard_time), (mine, mine_time) = cells["standard"], cells["cuflash"]
                table.add_row(f"{length:,}", standard, mine, ratio, standard_time, mine_time)
            self.console.print(table)

    def train(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        model = Model(self.scale.model, xp=self.xp)
        order_0, order_1 = text.order_0_entropy(self.corpus.data), text.order_1_entropy(self.corpus.data)
        parameters = sum(value.size for value in model.parameters.values())
        context = self.scale.context
        self.heading("Training", f"{parameters:,} parameters, {context:,} tokens at a time")
        self.console.print(f"{self.corpus.name}, {len(self.corpus.data):,} bytes")
        result = self.report["training"] = {
            "text": self.corpus.name,
            "bytes": len(self.corpus.data),
            "held_out_bytes": len(self.corpus.held_out),
            "order_0_bits": order_0,
            "order_1_bits": order_1,
            "context": context,
            "model": asdict(self.scale.model),
            "parameters": parameters,
            "steps": 0,
            "seconds": 0.0,
            "train": [],
            "held_out": [],
        }
        columns = (
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f}%  bits per byte {task.fields[loss]}, held-out {task.fields[held_out]}"),
            TimeElapsedColumn(),
        )
        with shown(Progress(*columns, console=self.console)) as progress:
            task = progress.add_task("training", total=1.0, step=0, loss="-", held_out="-")
            for step in training.train(model, self.corpus, context=context, schedule=self.scale.schedule):
                result["steps"], result["seconds"] = step.step, round(step.seconds, 2)
                if step.train_bits is not None:
                    result["train"].append({"step": step.step, "bits_per_byte": step.train_bits})
                    progress.update(task, loss=f"{step.train_bits:.2f}")
                if step.held_out_bits is not None:
                    result["held_out"].append({"step": step.step, "bits_per_byte": step.held_out_bits})
                    progress.update(task, held_out=f"{step.held_out_bits:.2f}")
                progress.update(task, completed=step.progress, step=step.step)
        before, after = (result["held_out"][i]["bits_per_byte"] for i in (0, -1))
        result.update(bits_before=before, bits_after=after, below_order_1=after < order_1)
        self.checks["below_order_0"] = after < order_0
        table = self.table("bits per byte of held-out text", "")
        table.add_row("before training", f"{before:.2f}")
        table.add_row("order-0 entropy of the text (frequencies of bytes)", f"{order_0:.2f}")
        table.add_row("order-1 entropy of the text (given the byte before)", f"{order_1:.2f}")
        table.add_row("after training", f"[bold]{after:.2f}[/] {self.verdict(after < order_0)}")
        self.console.print(table)

    def write(self) -> None:
        from cuflash.demo import report

        for path in report.write(self.report, self.folder):
            self.console.print(f"wrote {path}", soft_wrap=True)

    def heading(self, title: str, text: str) -> None:
        self.console.print(f"\n[bold]{title}[/]  {text}")

    def table(self, *columns: str) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        return table

    def verdict(self, passed: bool) -> str:
        return "[green]ok[/]" if passed else "[red]failed[/]"


def _memory_cells(point: memory.Point | None, format_bytes: Any) -> tuple[str, str]:
    """Memory and time of a measurement; for one that is missing the estimate and the reason."""
    if point is None:
        return "", ""
    if point.peak_bytes is not None and point.seconds is not None:
        return format_bytes(point.peak_bytes), f"{point.seconds:.2f} s"
    estimate = "-" if point.estimated_bytes is None else f"(about {format_bytes(point.estimated_bytes)})"
    return estimate, point.missing or ""
