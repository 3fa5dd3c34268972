"""`cuflash bench`: forward and backward time of cuflash against standard attention, outputs verified first."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cuflash
from cuflash.demo import machine, standard

# Two exact computations in one dtype differ by roundings only; this many of them, of the largest value, are allowed.
_ROUNDINGS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure: causal attention of one sequence."""

    lengths: tuple[int, ...] = (512, 1_024, 2_048)
    heads: int = 4
    head_dim: int = 64
    repeats: int = 5
    device: str = "auto"
    json: str | None = None  # path of the results


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Median seconds at one length."""

    length: int
    cuflash_forward: float
    standard_forward: float
    cuflash_backward: float
    standard_backward: float


def run(settings: Settings) -> int:
    """Print a table and write the JSON; 1 when the outputs differ, and then nothing is timed at that length."""
    xp = machine.array_module(settings.device)
    machine.require_products(xp)
    dtype = "float32" if xp is np else "float16"
    rows = []
    with machine.one_blas_thread() as one_thread:
        device = machine.describe(xp)["device"] + (", BLAS on one thread" if one_thread and xp is np else "")
        print(f"causal, {settings.heads} heads of {settings.head_dim}, {dtype}, {device}: medians in ms")
        print(f"{'':>8}{'forward':>22}{'backward':>22}")
        print(f"{'tokens':>8}{'cuflash':>11}{'standard':>11}{'cuflash':>11}{'standard':>11}")
        for length in settings.lengths:
            functions = _functions(settings, length, dtype, xp)
            difference = _verify(functions, dtype)
            if difference:
                print(f"{length:>8}  {difference}")
                return 1
            row = _measure(functions, length, settings.repeats, xp)
            rows.append(row)
            times = (row.cuflash_forward, row.standard_forward, row.cuflash_backward, row.standard_backward)
            print(f"{length:>8}" + "".join(f"{seconds * 1e3:>11.2f}" for seconds in times), flush=True)
    if settings.json is not None:
        results = {
            "settings": asdict(settings),
            "dtype": dtype,
            "versions": machine.versions(),
            "machine": {**machine.describe(xp), "one_blas_thread": one_thread},
            "rows": [asdict(row) for row in rows],
        }
        Path(settings.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _functions(settings: Settings, length: int, dtype: str, xp: Any) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """What is timed, by the names of Row's fields; the backwards start from forwards done here."""
    random = np.random.default_rng(0)
    shape = (1, length, settings.heads, settings.head_dim)
    q, k, v, dout = (xp.asarray(random.standard_normal(shape, dtype=np.float32).astype(dtype)) for _ in range(4))
    out, lse = cuflash.flash_attention(q, k, v, causal=True, return_lse=True)
    standard_out, probabilities = standard.attention(q, k, v, causal=True, xp=xp)
    return {
        "cuflash_forward": lambda: (cuflash.flash_attention(q, k, v, causal=True),),
        "standard_forward": lambda: standard.attention(q, k, v, causal=True, xp=xp)[:1],
        "cuflash_backward": lambda: cuflash.flash_attention_backward(dout, q, k, v, out, lse, causal=True),
        "standard_backward": lambda: standard.attention_backward(dout, q, k, v, standard_out, probabilities, xp=xp),
    }


def _verify(functions: dict[str, Callable[[], tuple[Any, ...]]], dtype: str) -> str:
    """What differs between cuflash and standard attention; empty when nothing does. Also warms everything up."""
    names = ("out", "dq", "dk", "dv")
    mine = (*functions["cuflash_forward"](), *functions["cuflash_backward"]())
    theirs = (*functions["standard_forward"](), *functions["standard_backward"]())
    for name, value, expected in zip(names, mine, theirs, strict=True):
        difference = float(abs(value.astype("float64") - expected.astype("float64")).max())
        allowed = _ROUNDINGS * float(np.finfo(dtype).eps) * float(abs(expected).max())
        if not difference <= allowed:
            return f"{name} differs from standard attention by {difference:.1e}; allowed: {allowed:.1e}"
    return ""


def _measure(functions: dict[str, Callable[[], tuple[Any, ...]]], length: int, repeats: int, xp: Any) -> Row:
    """Medians over rounds in which every function runs once, so that a disturbance meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            machine.synchronize(xp)
            begin = time.perf_counter()
            function()
            machine.synchronize(xp)
            seconds[name].append(time.perf_counter() - begin)
    return Row(length=length, **{name: statistics.median(values) for name, values in seconds.items()})
