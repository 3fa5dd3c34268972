"""The files of results: one JSON a device and table, in which a row is a problem with a number for each contestant."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cuflash.bench.device import Cpu, Gpu
from cuflash.bench.workloads import SUITES, UNITS, Table
from cuflash.demo import machine

# What a row says besides the contestants' numbers. The first four are in every row.
CELL = ("pass", "head_dim", "length", "causal", "batch", "heads", "kv_heads", "q_len", "sequences")
NOTES = ("missing", "errors")
_ALWAYS = 4
WRONG, OUT_OF_MEMORY = "wrong result", "out of memory"  # how such a reason for a missing number begins
_LIBRARIES = ("numpy", "torch", "jax", "flash_attn", "xformers")


def new(table: Table, device: Cpu | Gpu, missing: dict[str, str], ceiling: dict[str, float]) -> dict[str, Any]:
    """A record without rows. `missing` names the peers that this machine does not have, and why."""
    record: dict[str, Any] = {
        "table": table.name,
        "gpu": device.name if device.on_gpu else None,
        **({} if device.on_gpu else {"cpu": device.name}),
        **({"path": forced} if device.on_gpu and (forced := os.environ.get("CUFLASH_FORCE_ARCH")) else {}),
        "date": datetime.now(timezone.utc).date().isoformat(),
        **{name: version for name in _LIBRARIES if (version := machine.version_of(name)) is not None},
        **_gpu_libraries(device),
        "cuflash": machine.versions()["cuflash"],
        "dtype": next((x.dtype for x in table.workloads if x.dtype), device.dtype),
        "unit": UNITS[table.quantity],
        "ceiling": ceiling,
        "missing": missing,
        "rows": [],
    }
    return record


def device_of(record: dict[str, Any]) -> str:
    """The device for people: NVIDIA H200, or NVIDIA H200 as sm_80 where an older GPU's kernels were measured on it."""
    forced = f" as {record['path']}" if "path" in record else ""
    return (record["gpu"] or record.get("cpu", "a CPU")) + forced


def path_of(folder: Path, record: dict[str, Any]) -> Path:
    """Where the record belongs: h200_forward.json, h200_as_sm_80_forward.json, cpu_forward.json."""
    name = device_of(record) if record["gpu"] else "cpu"
    device = re.sub(r"\W+", "_", re.sub(r"^((nvidia|tesla|geforce) )+", "", name.lower())).strip("_")
    return folder / f"{device}_{record['table']}.json"


def picture_of(path: Path) -> Path:
    """Where the picture of a file of results belongs: beside it."""
    return path.with_suffix(".png")


def drawable(record: dict[str, Any]) -> bool:
    """Whether the rows differ in length: a table of one length makes no line."""
    return len({row["length"] for row in record["rows"]}) > 1


def write(record: dict[str, Any], folder: Path) -> Path:
    """Write the record, at once whole, in place of an earlier one of the same device; the path.

    Raises ValueError, and leaves the file alone, where it holds another device's results.
    """
    path = path_of(folder, record)
    if path.exists():
        there = read(path)["gpu"]
        if there != record["gpu"]:
            raise ValueError(f"json: {path} holds results of {there or 'a CPU'}, not of {record['gpu'] or 'a CPU'}")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read(path: Path) -> dict[str, Any]:
    """The record of a file. Raises ValueError where it is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check(record)
    except ValueError as error:
        raise ValueError(f"json: {path} holds no results ({error})") from error
    return record


def check(record: Any) -> None:
    """Raise ValueError unless `record` has the form of a record: gpu, date, unit, and rows of problems and numbers."""
    if not isinstance(record, dict) or not {"gpu", "date", "unit", "rows"} <= record.keys():
        raise ValueError("a record has gpu, date, unit and rows")
    if record["unit"] not in UNITS.values():
        raise ValueError(f"unit: got {record['unit']!r}; allowed: one of {', '.join(UNITS.values())}")
    for row in record["rows"]:
        absent = [name for name in CELL[:_ALWAYS] if name not in row]
        if absent:
            raise ValueError(f"a row lacks {', '.join(absent)}")
        for name in NOTES:
            if not isinstance(row.get(name, {}), dict):
                raise ValueError(f"{name}: got {row[name]!r}; allowed: names and what is noted of them")
        for name in contestants(row):
            if type(row[name]) not in (int, float) or not row[name] > 0:
                raise ValueError(f"{name}: got {row[name]!r}; allowed: a positive number")


def contestants(row: dict[str, Any]) -> list[str]:
    """The names of those that have a number."""
    return [name for name in row if name not in CELL and name not in NOTES]


def problem(row: dict[str, Any]) -> str:
    """A row's problem for people: backward, 4 x 4,096, 16/4 heads of 128, causal."""
    mask = "causal" if row["causal"] else "full"
    heads = f"{row['heads']}" if row["heads"] == row["kv_heads"] else f"{row['heads']}/{row['kv_heads']}"
    if row["sequences"] != row["batch"]:
        size = f"{row['sequences']} packed, longest {row['length']:,}"
    elif row["q_len"] != row["length"]:
        size = f"{row['batch']} x {row['q_len']:,} over {row['length']:,}"
    else:
        size = f"{row['batch']} x {row['length']:,}"
    return f"{row['pass']}, {size}, {heads} heads of {row['head_dim']}, {mask}"


def stored(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every file of results in `folder` and its record, device by device, the tables in the order of the suites.

    A file is one of results if its name is the one that `path_of` gives.
    """
    tables = [table.name for suite in SUITES.values() for table in suite(True)]
    found = []
    for order, table in enumerate(tables):
        for path in folder.glob(f"*_{table}.json"):
            record = {**read(path), "table": table}  # the oldest files do not say it
            if path_of(folder, record) == path:
                found.append((device_of(record) if record["gpu"] else "", order, path, record))
    for _, _, path, record in sorted(found, key=lambda entry: entry[:2]):
        yield path, record


def _gpu_libraries(device: Cpu | Gpu) -> dict[str, Any]:
    """CuPy's version, and that of torch's cuDNN."""
    if not device.on_gpu:
        return {}
    found: dict[str, Any] = {"cupy": device.xp.__version__}
    if machine.version_of("torch") is not None:
        import torch

        found["cudnn"] = torch.backends.cudnn.version()
    return found
