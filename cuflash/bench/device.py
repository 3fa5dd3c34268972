"""The device that is measured: random inputs, clocks, and what it can do at most.

`Cpu` and `Gpu` have the same methods; `find` chooses.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cuflash.arrays import dtype_of
from cuflash.bench.contestant import Contestant, Inputs
from cuflash.bench.workloads import Workload
from cuflash.demo import machine

_GEMM = 8_192  # rows and columns of the product whose speed is the ceiling; an eighth on a CPU
_COPY = 2**30  # bytes of the copy whose speed is the bandwidth; a sixteenth on a CPU


def find(device: str) -> Cpu | Gpu:
    """By "auto", "cpu" or "gpu"; raises as `cuflash.demo.machine.array_module`."""
    xp = machine.array_module(device)
    return Cpu() if xp is np else Gpu(xp)


class Cpu:
    """NumPy's arrays in float32, one thread for NumPy and for torch."""

    xp, on_gpu, dtype = np, False, "float32"
    lead, burst, rounds, warm_up = 0.0, 0.02, 5, 1  # seconds of calls before a timing and behind it, and how often

    def __init__(self) -> None:
        self.name = machine.describe(np)["processor"]
        self._random = np.random.default_rng()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The state in which everything is measured."""
        with machine.one_blas_thread():
            if importlib.util.find_spec("torch") is None:
                yield
                return
            import torch

            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def draw(self, workload: Workload) -> Inputs:
        """Fresh normal inputs."""
        return Inputs(np, *(self._random.standard_normal(shape, np.float32) for shape in _shapes(workload)))

    def seconds(self, contestant: Contestant, repeats: int, before: int = 0) -> float:
        """Time of one call: the mean of `repeats` after `before` that are not timed."""
        with contestant.scope():
            for _ in range(before):
                contestant.call()
            return _wall_seconds(contestant, repeats, self.synchronize)

    def synchronize(self) -> None:
        """Nothing runs on its own here."""

    def release(self) -> None:
        """Nothing is kept here."""

    def ceiling(self) -> dict[str, float]:
        """Measured: TFLOP/s of a matrix product, GB/s of a copy, reads and writes counted."""
        size, count = _GEMM // 8, _COPY // 16
        a, b = (self._random.standard_normal((size, size), np.float32) for _ in range(2))
        source = np.ones(count, np.uint8)
        target = np.empty_like(source)
        copy = _median(self, lambda: np.copyto(target, source), 1)
        return _ceiling(_median(self, lambda: a @ b, 1), size, copy, count)


class Gpu:
    """CuPy's arrays in bfloat16, float16 before CuPy 14 or Ampere; timed by events, the L2 cache flushed before each
    call."""

    on_gpu = True
    # A GPU takes a while to find the clock that its power allows under what it does: of each contestant by itself.
    lead, burst, rounds, warm_up = 0.03, 0.01, 5, 1

    def __init__(self, cupy: Any) -> None:
        self.xp = cupy
        recent = int(cupy.__version__.partition(".")[0]) >= 14 and int(cupy.cuda.Device().compute_capability) >= 80
        self.dtype = "bfloat16" if recent else "float16"
        self.name = machine.gpu_name(cupy)
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self._flush = cupy.empty(2 * properties["l2CacheSize"], cupy.uint8)
        self._has_torch = _torch_has_gpu()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The state in which everything is measured."""
        yield

    def draw(self, workload: Workload) -> Inputs:
        """Fresh normal inputs: drawn on the GPU by torch where it has one, else on the host."""
        return Inputs(self.xp, *(self._normal(shape, workload.dtype or self.dtype) for shape in _shapes(workload)))

    def seconds(self, contestant: Contestant, repeats: int, before: int = 0) -> float:
        """Time of one call on the GPU, without the flush: the mean of `repeats` after `before` that are not timed; of a
        peer with streams of its own, of a call in a burst that is waited for at its end, unflushed."""
        with contestant.scope():
            if contestant.wait is not None:
                for _ in range(before):
                    contestant.call()
                return _wall_seconds(contestant, repeats, self.synchronize)
            events = [(self.xp.cuda.Event(), self.xp.cuda.Event()) for _ in range(before + repeats)]
            for start, stop in events:
                self._flush.fill(0)
                start.record()
                contestant.call()
                stop.record()
            self.synchronize()
            return statistics.mean(self.xp.cuda.get_elapsed_time(*pair) for pair in events[before:]) * 1e-3

    def synchronize(self) -> None:
        """Wait for the device, all streams."""
        self.xp.cuda.Device().synchronize()

    def release(self) -> None:
        """Give memory that allocators keep back, so that one's cache is not another's shortage."""
        self.xp.get_default_memory_pool().free_all_blocks()
        if self._has_torch:
            import torch

            torch.cuda.empty_cache()

    def ceiling(self) -> dict[str, float]:
        """Measured: TFLOP/s of a matrix product (by torch, where it has a GPU), GB/s of a copy, reads and writes
        counted."""
        source = self.xp.ones(_COPY, self.xp.uint8)
        target = self.xp.empty_like(source)
        copy = _median(self, lambda: self.xp.copyto(target, source), 10)
        if not self._has_torch:
            return _ceiling(None, _GEMM, copy, _COPY)
        import torch

        a, b = (torch.randn(_GEMM, _GEMM, device="cuda", dtype=getattr(torch, self.dtype)) for _ in range(2))
        return _ceiling(_median(self, lambda: a @ b, 10), _GEMM, copy, _COPY)

    def _normal(self, shape: tuple[int, ...], dtype: str) -> Any:
        if self._has_torch:
            import torch

            return self.xp.from_dlpack(torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)))
        return self.xp.asarray(np.random.default_rng().standard_normal(shape, np.float32)).astype(dtype_of(dtype))


def _torch_has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _shapes(workload: Workload) -> tuple[tuple[int, ...], ...]:
    """Of q, k, v and dout."""
    q, kv = workload.shapes
    return q, kv, kv, q


def _wall_seconds(contestant: Contestant, repeats: int, synchronize: Callable[[], None]) -> float:
    """Time of one call in a burst, by the host's clock."""
    synchronize()
    results = None
    start = time.perf_counter()
    for _ in range(repeats):
        results = contestant.call()
    if contestant.wait is None:
        synchronize()
    else:
        contestant.wait(results)
    return (time.perf_counter() - start) / repeats


def _only(call: Callable[[], Any]) -> Contestant:
    """A call that is only timed."""
    return Contestant(call=lambda: (call(),), native=lambda x: x, peak=None)


def _median(device: Cpu | Gpu, call: Callable[[], Any], repeats: int) -> float:
    found = [device.seconds(_only(call), repeats) for _ in range(device.warm_up + device.rounds)]
    return statistics.median(found[device.warm_up :])


def _ceiling(gemm: float | None, size: int, copy: float, count: int) -> dict[str, float]:
    found = {"copy_gb_per_s": round(2 * count / copy / 1e9, 1)}
    return found if gemm is None else {"gemm_tflop_per_s": round(2 * size**3 / gemm / 1e12, 3), **found}
