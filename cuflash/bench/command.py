"""What `cuflash bench` runs: the suites that were asked for, their files, pictures and README's section."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuflash.bench import readme, results
from cuflash.bench.device import Cpu, Gpu, find
from cuflash.bench.measure import Meter
from cuflash.bench.peers import OURS, PEERS
from cuflash.bench.workloads import SUITES, UNITS
from cuflash.demo import machine
from cuflash.demo.progress import progress
from cuflash.errors import UnsupportedError

README = Path("README.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for."""

    suites: tuple[str, ...] = ()  # of SUITES; none: all, or no measurement where plots or update_readme are asked for
    json: str = "benchmarks/results"  # folder of the files of results
    plots: bool = False
    update_readme: bool = False
    device: str = "auto"


def run(settings: Settings) -> int:
    """Measure and write; 0, or 1 where a contestant's result was wrong.

    Raises UnsupportedError where matplotlib is needed and missing; ValueError and OSError for a folder or README.md
    that cannot be used, before anything is measured.
    """
    folder = Path(settings.json)
    if (settings.plots or settings.update_readme) and importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("the plots need matplotlib: pip install 'cuflash[demo]'")
    if settings.update_readme:
        readme.check(README.read_text("utf-8"))
    suites = settings.suites or (() if settings.plots or settings.update_readme else tuple(SUITES))
    wrong = 0
    if suites:
        device = find(settings.device)
        folder.mkdir(parents=True, exist_ok=True)
        if not device.on_gpu:
            reason = "asked for" if settings.device == "cpu" else machine.gpu_obstacle()
            print(f"On the CPU ({reason}): the NumPy backend in a reduced form, NumPy and torch on one thread.")
            print("These numbers say nothing of a GPU.")
        wrong = _measure(suites, folder, device)
    if settings.plots or settings.update_readme:
        _draw(folder, gpu_only=not settings.plots)
    if settings.update_readme:
        README.write_text(readme.regenerate(README.read_text("utf-8"), folder, README.parent), encoding="utf-8")
        print(f"wrote {README}")
    return 1 if wrong else 0


def _measure(suites: tuple[str, ...], folder: Path, device: Cpu | Gpu) -> int:
    """Measure the suites, write each table's file after every row; the number of wrong results."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would leave the others no memory
    print(f"{device.name}, {device.dtype}")
    meter = Meter(device, PEERS)
    for name, reason in meter.missing.items():
        print(f"left out: {name}: {reason}")
    tables = [table for suite in suites for table in SUITES[suite](not device.on_gpu)]
    reasons: set[tuple[str, str]] = set()
    total, done, wrong = sum(len(table.workloads) for table in tables), 0, 0
    begin = time.monotonic()
    with device.settled(), progress(total, "measuring the ceilings") as show:
        ceiling = device.ceiling()
        print(", ".join(f"{name}: {value}" for name, value in ceiling.items()), flush=True)
        for table in tables:
            record = results.new(table, device, meter.missing, ceiling)
            print(f"\n{table.name}, {UNITS[table.quantity]}")
            for workload in table.workloads:
                row = meter.row(table, workload)
                record["rows"].append(row)
                results.write(record, folder)
                print(_line(row, table.quantity, ceiling), flush=True)
                for missing in row["missing"].items():
                    if missing not in reasons:
                        reasons.add(missing)
                        print(f"    left out: {missing[0]}: {missing[1]}")
                    if missing[1].startswith(results.WRONG):
                        wrong += 1
                        print(f"{results.problem(row)}: {missing[0]}: {missing[1]}", file=sys.stderr)
                done += 1
                show(done, table.name)
            print(f"wrote {results.path_of(folder, record)}")
    print(f"measured in {time.monotonic() - begin:.0f} s", flush=True)
    return wrong


def _line(row: dict[str, Any], quantity: str, ceiling: dict[str, float]) -> str:
    """A row for the terminal: each number, cuflash's with its share of the device's ceiling."""
    limit = {"speed": "gemm_tflop_per_s", "bandwidth": "copy_gb_per_s"}.get(quantity, "")
    numbers = []
    for name in results.contestants(row):
        share = f" ({row[name] / ceiling[limit]:.0%} of the ceiling)" if name == OURS and limit in ceiling else ""
        numbers.append(f"{name} {row[name]:,.4g}{share}")
    worst = f"; error against float64 {max(row['errors'].values()):.1e} at most" if row["errors"] else ""
    return f"  {results.problem(row)}: {', '.join(numbers)}{worst}"


def _draw(folder: Path, gpu_only: bool) -> None:
    """The pictures of the files of results in `folder`."""
    from cuflash.bench import plots

    for path, record in results.stored(folder):
        if results.drawable(record) and not (gpu_only and record["gpu"] is None):
            picture = results.picture_of(path)
            plots.draw(record).savefig(picture)
            print(f"wrote {picture}")
