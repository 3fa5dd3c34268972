"""What tests with CuPy share: a busy stream, and a count of the memory that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np


def keep_busy(cp: Any, seconds: float = 0.2) -> None:
    """Keep the current stream busy."""
    spin = cp.RawKernel(
        'extern "C" __global__ void spin(long long cycles) '
        "{ const long long start = clock64(); while (clock64() - start < cycles) {} }",
        "spin",
    )
    spin((1,), (1,), (np.int64(seconds * 1.5e9),))


class Allocations:
    """Bytes asked of CuPy's pool while it is entered."""

    def __init__(self, cp: Any) -> None:
        class Hook(cp.cuda.MemoryHook):
            name = "allocations"
            live = 0
            peak = 0

            def malloc_postprocess(self, *, size: int, **_: Any) -> None:
                Hook.live += size
                Hook.peak = max(Hook.peak, Hook.live)

            def free_preprocess(self, *, mem_size: int, **_: Any) -> None:
                Hook.live -= mem_size

        self.hook = Hook()

    def __enter__(self) -> Any:
        return self.hook.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hook.__exit__(*error)
