"""Many kernels compiled ahead of time, in parallel: into the user's cache, or into a folder for another machine.

No GPU is needed, also for architectures that are not here. Threads do the work: CuPy releases the interpreter's lock
while NVRTC compiles, so they are as fast as processes and start at once.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TypeAlias

from cuflash import tuning
from cuflash.cuda import cache, jit
from cuflash.cuda.toolchain import Target, options, toolchain
from cuflash.spec import Spec, Tile

Job: TypeAlias = tuple[str, Spec, Tile, Target]  # the kernel's name and what its variant depends on


# How a backward on Hopper may come by dQ.
WAYS: tuple[dict[str, bool], ...] = ({}, {"deterministic": True}, {"lean": True})


def jobs_of(spec: Spec, target: Target, vector: int = 16, ways: Iterable[dict[str, bool]] = WAYS) -> list[Job]:
    """The jobs of one Spec, forward and backward, for rows aligned to `vector` bytes: every kernel a call may get.

    Raises UnsupportedError where the target's kernels cannot do it.
    """
    tuning.check_supported(spec, target.path)
    jobs: dict[Job, None] = {}  # each once, in order
    for backward in (False, True):
        families = [(spec, False)]  # strides decide whether a call gets the Hopper kernels
        if backward:  # or the GPU, which of the portable ones
            families = [(tuning.served(spec, target.path), False), (replace(spec, lean=True), False)]
        if target == Target.named("sm_90a") and tuning.has_hopper(spec, backward=backward):
            families += [(replace(spec, **way), True) for way in ways]
        for wanted, hopper in families:
            names = tuning.kernels_of(wanted, backward=backward, hopper=hopper)
            for name, tile in tuning.tiles_of(names, wanted, target.path, vector).items():
                jobs[name, tuning.kernel_spec(name, wanted), tile, target] = None
    if tuning.has_parts(spec):  # lengths decide whether a call gets these
        spec = replace(spec, parts=True)
        for name, rows in product(tuning.kernels_of(spec, backward=False), (tuning.FEW_ROWS, tuning.FEW_ROWS + 1)):
            known = tuning.kernel_spec(name, spec)
            jobs[name, known, tuning.tile_of(name, known, target.path, vector, rows=rows), target] = None
    return list(jobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precompiled:
    """What came of the jobs; those with the same text and options count once."""

    compiled: int
    present: int  # in the folder already
    failed: tuple[tuple[Job, str], ...]  # with the reason
    seconds: float


def precompile(
    jobs: Iterable[Job],
    output: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, Job], None] | None = None,
) -> Precompiled:
    """Compile every job that the folder lacks.

    `output` is the folder, by default the user's cache; `workers` the number of threads, by default one a core;
    `progress(done, total, job)` is called in this thread after each job. A job that fails does not stop the others, an
    interrupt stops all but those in the compiler, and what was compiled stays.

    Raises UnsupportedError without a toolchain, OSError where the folder cannot be written and ValueError for a kernel
    that does not exist, before anything is compiled.
    """
    start = time.perf_counter()
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; allowed are 1 and more")
    version = toolchain().version
    distinct = {cache.key(jit.source(*job[:3]), options(job[3])): job for job in jobs}
    folder = Path(output) if output is not None else cache.user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder for compiled kernels cannot be written", str(folder))

    def make(key: str, job: Job) -> bool:
        if cache.load(folder, key, version) is not None:
            return False
        cache.store(folder, key, version, jit.compile_variant(*job).cubin)
        return True

    made: list[bool] = []
    failed: list[tuple[Job, str]] = []
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(make, key, job): job for key, job in distinct.items()}
        for done, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            try:
                made.append(future.result())
            except (RuntimeError, OSError) as error:  # rejected by the compiler, not known to it, or a full disk
                failed.append((job, str(error)))
            if progress:
                progress(done, len(distinct), job)
    finally:
        pool.shutdown(cancel_futures=True)
    if output is None:
        cache.trim(folder, cache.user_limit())
    return Precompiled(
        compiled=sum(made),
        present=len(made) - sum(made),
        failed=tuple(failed),
        seconds=time.perf_counter() - start,
    )
