"""`cuflash doctor`: what is installed, which backend and kernels arrays get here, and one exactness check.

A check is a function that returns a Finding; adding one is writing it and naming it in CHECKS. Those about CUDA are in
cuflash.demo.gpu.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import cuflash
from cuflash.demo import exactness, gpu, machine
from cuflash.demo.finding import Finding


def python() -> Finding:
    return Finding(f"{platform.python_version()} ({sys.executable})")


def numpy() -> Finding:
    return Finding(f"{np.__version__}, BLAS: {machine.blas()}")


def ml_dtypes() -> Finding:
    return Finding(importlib.metadata.version("ml_dtypes"))


def processor() -> Finding:
    found = machine.describe(np)
    memory = "unknown" if found["available_gib"] is None else f"{found['available_gib']} GiB"
    return Finding(f"{found['processor']}, {found['cores']} cores, {memory} of memory available")


def numpy_arrays() -> Finding:
    return Finding("numpy backend")


def cupy_arrays() -> Finding:
    obstacle = machine.gpu_obstacle()
    return Finding(f"none: {obstacle}", healthy=not gpu.wanted()) if obstacle else Finding("cuda backend")


def torch_tensors() -> Finding:
    found = _framework("torch", "cuflash.adapters.torch")
    if importlib.util.find_spec("torch") is None or machine.gpu_obstacle():
        return found
    # Whether the extension is there depends on the installed torch: only the adapter can tell.
    loaded = importlib.import_module("cuflash.adapters.torch._extension").attend is not None
    more = "" if loaded else ", which cuflash.adapters.torch.build_extension() makes"
    how = "with" if loaded else "without"
    return Finding(f"{found.text}; eager calls on a GPU go {how} the C++ extension{more}")


def jax_arrays() -> Finding:
    found = _framework("jax", "cuflash.adapters.jax")
    if importlib.util.find_spec("jax") is None or machine.gpu_obstacle():
        return found
    # Which way calls go on a GPU depends on the installed jaxlib and on JAX's devices: only the adapter can tell.
    route = importlib.import_module("cuflash.adapters.jax._route").route()
    return Finding(f"{found.text}; on a GPU by the {route.name} route: {route.reason}")


def exact_on_cpu() -> Finding:
    return _exact(np)


def exact_on_gpu() -> Finding:
    if machine.gpu_obstacle():
        return Finding("not run: no GPU backend here")
    return _exact(machine.array_module("gpu"))


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": python,
    "NumPy": numpy,
    "ml_dtypes": ml_dtypes,
    "processor": processor,
    "GPU": gpu.gpus,
    "driver": gpu.driver_version,
    "CuPy": gpu.cupy,
    "NVRTC": gpu.nvrtc,
    "cuda-bindings": gpu.cuda_bindings,
    "cuBLAS": gpu.cublas,
    "code path": gpu.code_path,
    "kernel cache": gpu.kernel_cache,
    "precompiled": gpu.precompiled,
    "NumPy arrays": numpy_arrays,
    "CuPy arrays": cupy_arrays,
    "PyTorch tensors": torch_tensors,
    "JAX arrays": jax_arrays,
    "exactness, CPU": exact_on_cpu,
    "exactness, GPU": exact_on_gpu,
}


def run() -> int:
    """Print what every check finds and the kernels of this machine; 0 when all is healthy, else 1.

    A check that raises is a finding too.
    """
    print(f"cuflash {cuflash.__version__}")
    width = max(map(len, CHECKS))
    sick = []
    for name, check in CHECKS.items():
        finding = _guarded(check)
        if not finding.healthy:
            sick.append(name)
        mark = "  " if finding.healthy else "! "
        print(f"{mark}{name:<{width}}  {' '.join(finding.text.split())}", flush=True)
    table = _guarded(lambda: Finding("\n".join(gpu.kernel_table())))
    if table.text:
        print(table.text)
    if not table.healthy:
        sick.append("kernels")
    print(f"not healthy: {', '.join(sick)}" if sick else "healthy")
    return 1 if sick else 0


def _guarded(check: Callable[[], Finding]) -> Finding:
    """What a check finds; whatever is broken on this machine, the other checks still have their say."""
    try:
        return check()
    except Exception as error:
        return Finding(f"{type(error).__name__}: {error}", healthy=False)


def _framework(name: str, way: str) -> Finding:
    """Torch and JAX take seconds to import, so they are only looked for."""
    if importlib.util.find_spec(name) is None:
        return Finding("not installed (optional)")
    backends = "numpy backend" if machine.gpu_obstacle() else "numpy backend on the CPU, cuda backend on a GPU"
    return Finding(f"{backends}, through {way} ({name} {importlib.metadata.version(name)})")


def _exact(xp: Any) -> Finding:
    rows, unsupported = exactness.check_served(xp, exactness.GPU_DTYPES, length=160)
    without = "".join(f"; {dtype} not: {reason}" for dtype, reason in unsupported.items())
    if not rows:
        return Finding(f"no dtype could be checked{without}", healthy=False)
    worst = max(rows, key=lambda row: row.error / row.allowed)
    text = f"largest error is {worst.error:.1e} of {worst.allowed:.1e} allowed ({worst.result}, {worst.dtype})"
    return Finding(text + without, healthy=all(row.passed for row in rows))
