"""Peak memory and time of attention, forward and backward, at doubling lengths: cuflash against standard attention."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import cuflash
from cuflash.demo import standard
from cuflash.demo.machine import available_memory, synchronize

LARGEST_BUDGET = 4 * 2**30  # bytes that standard attention may take on a CPU, if half the available memory is not less


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is measured: one sequence of `heads` heads, causal, at first_length, 2 * first_length, ..."""

    heads: int
    head_dim: int
    dtype: str
    first_length: int
    last_length: int
    cuflash_seconds: float  # for all lengths together
    standard_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement, or why there is none."""

    name: str  # cuflash or standard
    length: int
    peak_bytes: int | None = None  # over q, k, v and dout
    seconds: float | None = None
    missing: str | None = None
    estimated_bytes: int | None = None  # of a missing point of standard attention


def sweep(plan: Sweep, xp: Any = np, budget_bytes: int | None = None) -> Iterator[Point]:
    """Measure both at doubling lengths, each while its time and memory last; it ends with cuflash's.

    A length that is out of reach for standard attention gives a Point that says why. Time is foreseen: it is
    quadratic in the length.
    """
    budget_bytes = memory_budget(xp) if budget_bytes is None else budget_bytes
    itemsize = np.dtype(plan.dtype).itemsize
    left = {"cuflash": plan.cuflash_seconds, "standard": plan.standard_seconds}
    foreseen = dict.fromkeys(left, 0.0)  # seconds of the next length
    out_of_memory: set[str] = set()
    length = plan.first_length
    while length <= plan.last_length and "cuflash" not in out_of_memory and foreseen["cuflash"] <= left["cuflash"]:
        for name, run in (("cuflash", _run_cuflash), ("standard", _run_standard)):
            estimate, missing = None, None
            if name == "standard":
                estimate = standard.peak_bytes(1, plan.heads, length, plan.head_dim, itemsize)
                if estimate > budget_bytes:
                    missing = f"does not fit in {budget_bytes / 2**30:.1f} GiB"
                elif name in out_of_memory:
                    missing = "does not fit"
                elif foreseen[name] > left[name]:
                    missing = f"too long, about {foreseen[name]:.0f} s"
            if missing is None:
                try:
                    peak, seconds = _measure(plan, length, run, xp)
                except MemoryError:  # CuPy's OutOfMemoryError is one
                    out_of_memory.add(name)
                    missing = "does not fit"
                else:
                    foreseen[name] = seconds * (1 if xp is np else 2)
                    left[name] -= foreseen[name]
                    yield Point(name=name, length=length, peak_bytes=peak, seconds=seconds)
            if missing is not None:
                yield Point(name=name, length=length, missing=missing, estimated_bytes=estimate)
            foreseen[name] *= 4
        length *= 2


def memory_budget(xp: Any) -> int:
    """Bytes that standard attention may allocate: what a GPU has left; on a CPU half of that, 4 GiB at the most."""
    available = available_memory(xp)
    if xp is not np:
        return available or 0
    return LARGEST_BUDGET if available is None else min(LARGEST_BUDGET, available // 2)


def peak_memory(xp: Any, function: Callable[[], object]) -> tuple[int, float]:
    """(bytes, seconds): the most that `function` held at once beyond what was there before, and the time it took.

    NumPy: tracemalloc, which counts the buffers of arrays; its cost is small beside that of the arrays' contents. CuPy:
    the size a fresh memory pool grows to, and the time of a second call, which compiles and allocates nothing anew.
    """
    if xp is np:
        return _peak_of_host(function)
    pool = xp.cuda.MemoryPool()
    with xp.cuda.using_allocator(pool.malloc):
        function()
        synchronize(xp)
        begin = time.perf_counter()
        function()
        synchronize(xp)
        seconds = time.perf_counter() - begin
    peak = int(pool.total_bytes())
    pool.free_all_blocks()
    return peak, seconds


def _peak_of_host(function: Callable[[], object]) -> tuple[int, float]:
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        begin = time.perf_counter()
        function()
        seconds = time.perf_counter() - begin
        return tracemalloc.get_traced_memory()[1] - before, seconds
    finally:
        if not already:
            tracemalloc.stop()


def _measure(plan: Sweep, length: int, run: Callable[[list[Any], Any], object], xp: Any) -> tuple[int, float]:
    if xp is not np:
        xp.get_default_memory_pool().free_all_blocks()  # inputs of the measurement before
    return peak_memory(xp, partial(run, _inputs(plan, length, xp), xp))


def _inputs(plan: Sweep, length: int, xp: Any) -> list[Any]:
    """q, k, v and dout [1, length, heads, head_dim]: the first tokens are drawn, and repeated on the device."""
    random = np.random.default_rng(0)
    shape = (1, plan.first_length, plan.heads, plan.head_dim)
    drawn = [random.standard_normal(shape, dtype=np.float32).astype(plan.dtype) for _ in range(4)]
    return [xp.tile(xp.asarray(x), (1, length // plan.first_length, 1, 1)) for x in drawn]


def _run_cuflash(inputs: list[Any], _: Any) -> tuple[Any, ...]:
    q, k, v, dout = inputs
    out, lse = cuflash.flash_attention(q, k, v, causal=True, return_lse=True)
    return (out, *cuflash.flash_attention_backward(dout, q, k, v, out, lse, causal=True))


def _run_standard(inputs: list[Any], xp: Any) -> tuple[Any, ...]:
    q, k, v, dout = inputs
    out, probabilities = standard.attention(q, k, v, causal=True, xp=xp)
    return (out, *standard.attention_backward(dout, q, k, v, out, probabilities, xp=xp))
