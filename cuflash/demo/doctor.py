"""`cuflash doctor`: what is installed, which backend each kind of array gets, and one exactness check.

A check is a function that returns a Finding; adding one is writing it and naming it in CHECKS.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import cuflash
from cuflash.demo import exactness, machine


class Finding(NamedTuple):
    """What a check found; an unhealthy one makes `cuflash doctor` fail."""

    text: str
    healthy: bool = True


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


def cupy() -> Finding:
    module = _optional("cupy")
    return Finding(f"{module.__version__}") if module else _not_installed("cuda13")


def gpu() -> Finding:
    module = _optional("cupy")
    if not module:
        return _not_installed("cuda13")
    if not module.cuda.is_available():
        return Finding("no GPU, or no driver for it")
    runtime = module.cuda.runtime
    names = []
    for device in range(runtime.getDeviceCount()):
        found = runtime.getDeviceProperties(device)
        names.append(f"{found['name'].decode()} (sm_{found['major']}{found['minor']})")
    return Finding(f"{', '.join(names)}; driver for CUDA {_cuda_version(runtime.driverGetVersion())}")


def nvrtc() -> Finding:
    module = _optional("cupy")
    if not module:
        return _not_installed("cuda13")
    try:
        major, minor = module.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError):
        # Without a GPU nothing would call it.
        return Finding("not installed (pip install 'cuflash[cuda13]')", healthy=not module.cuda.is_available())
    return Finding(f"{major}.{minor}")


def numpy_arrays() -> Finding:
    return Finding("numpy backend")


def cupy_arrays() -> Finding:
    obstacle = machine.gpu_obstacle()
    return Finding(f"none: {obstacle}" if obstacle else "cuda backend")


def torch_tensors() -> Finding:
    return _through_dlpack("torch")


def jax_arrays() -> Finding:
    return _through_dlpack("jax")


def exact_on_cpu() -> Finding:
    return _exact(np)


def exact_on_gpu() -> Finding:
    obstacle = machine.gpu_obstacle()
    return Finding("not run: no GPU backend here") if obstacle else _exact(machine.array_module("gpu"))


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": python,
    "NumPy": numpy,
    "ml_dtypes": ml_dtypes,
    "processor": processor,
    "CuPy": cupy,
    "GPU": gpu,
    "NVRTC": nvrtc,
    "NumPy arrays": numpy_arrays,
    "CuPy arrays": cupy_arrays,
    "PyTorch tensors": torch_tensors,
    "JAX arrays": jax_arrays,
    "exactness, CPU": exact_on_cpu,
    "exactness, GPU": exact_on_gpu,
}


def run() -> int:
    """Print what every check finds; 0 when all are healthy, else 1. A check that raises is a finding too."""
    print(f"cuflash {cuflash.__version__}")
    width = max(map(len, CHECKS))
    sick = []
    for name, check in CHECKS.items():
        try:
            finding = check()
        except Exception as error:  # whatever is broken on this machine, the other checks still have their say
            finding = Finding(f"{type(error).__name__}: {error}", healthy=False)
        if not finding.healthy:
            sick.append(name)
        mark = "  " if finding.healthy else "! "
        print(f"{mark}{name:<{width}}  {' '.join(finding.text.split())}", flush=True)
    print(f"not healthy: {', '.join(sick)}" if sick else "healthy")
    return 1 if sick else 0


def _optional(name: str) -> Any:
    """An optional module, or None when it is not installed; what else goes wrong is for `run` to report."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _not_installed(extra: str) -> Finding:
    return Finding(f"not installed (optional: pip install 'cuflash[{extra}]')")


def _through_dlpack(name: str) -> Finding:
    """Torch and JAX take seconds to import, so they are only looked for."""
    if importlib.util.find_spec(name) is None:
        return Finding("not installed (optional)")
    version = importlib.metadata.version(name)
    return Finding(f"numpy backend through DLPack, in the CPU's memory ({name} {version})")


def _exact(xp: Any) -> Finding:
    rows = exactness.check(xp, dtypes=exactness.GPU_DTYPES, length=160)
    worst = max(rows, key=lambda row: row.error / row.allowed)
    text = f"largest error is {worst.error:.1e} of {worst.allowed:.1e} allowed ({worst.result}, {worst.dtype})"
    return Finding(text, healthy=all(row.passed for row in rows))


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
