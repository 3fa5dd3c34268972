"""Kernels compiled in the background while the GPU tests run."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from cuflash.cuda import jit
from cuflash.cuda.precompile import Job


def in_background(jobs: Iterable[Job], workers: int | None = None) -> ProcessPoolExecutor:
    """Start to compile these kernels, in this order, into the cache on disk; a test that comes to one earlier compiles
    it itself.

    Processes, of low priority, so that neither the interpreter's lock nor a processor is taken from the tests.
    `shutdown(cancel_futures=True)` of what is returned stops all but those in the compiler.
    """
    workers = workers or max(1, (os.cpu_count() or 1) - 1)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(10,))
    for job in dict.fromkeys(jobs):
        pool.submit(_compile, job)
    return pool


def _compile(job: Job) -> None:
    jit.cubin(*job)
