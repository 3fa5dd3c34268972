"""What this machine offers: the array module to compute with, versions, names, memory."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import cuflash
from cuflash.errors import UnsupportedError

DEVICES = ("auto", "cpu", "gpu")
_DISTRIBUTIONS = ("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "cupy", "rich", "matplotlib")


def array_module(device: str) -> Any:
    """numpy or cupy: "auto" is the GPU wherever cuflash runs on it. UnsupportedError when "gpu" cannot be had."""
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}; allowed: one of {DEVICES}")
    obstacle = "" if device == "cpu" else gpu_obstacle()
    if device == "cpu" or (device == "auto" and obstacle):
        return np
    if obstacle:
        raise UnsupportedError(f"device: got 'gpu', but {obstacle}; use --device cpu")
    return importlib.import_module("cupy")


def gpu_obstacle() -> str:
    """Why cuflash cannot run on a GPU here; empty when it can, which one small call has shown.

    That call is one of those that `cuflash compile` prepares: it also runs where there is no compiler.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError:
        return "CuPy is not installed (pip install 'cuflash[cuda13]', or cuda12 for an older driver)"
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    try:
        available = cupy.cuda.is_available()
    except RuntimeError:  # CuPy before 14, without a driver
        available = False
    if not available:
        return "CuPy finds no GPU or no driver"
    try:
        x = cupy.zeros((1, 16, 1, 64), dtype=cupy.float16)
        cuflash.flash_attention(x, x, x)
    except RuntimeError as error:  # UnsupportedError, a kernel that does not compile, an error of CUDA
        return f"cuflash does not run on it ({error})"
    return ""


def require_products(xp: Any) -> None:
    """Raise UnsupportedError where `xp` cannot multiply matrices: CuPy needs cuBLAS for it, which cuflash does not."""
    if xp is np:
        return
    x = xp.zeros((16, 16), dtype=xp.float32)
    try:
        xp.matmul(x, x)
    except (ImportError, RuntimeError) as error:
        raise UnsupportedError(
            "CuPy cannot multiply matrices, which the model of the demo and standard attention need "
            f"({str(error).partition(':')[0]}): install cuBLAS (pip install nvidia-cublas, for CUDA 12 "
            "nvidia-cublas-cu12), or use --device cpu"
        ) from error


def synchronize(xp: Any) -> None:
    """Wait until everything asked of the device is done."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def versions() -> dict[str, str]:
    """Versions of Python, cuflash and the distributions it works with, as far as they are installed."""
    installed = {name: version for name in _DISTRIBUTIONS if (version := version_of(name)) is not None}
    return {"python": platform.python_version(), "cuflash": cuflash.__version__, **installed}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None when there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(xp: Any) -> dict[str, Any]:
    """The machine in a report: platform, processor, cores, available memory, and the device that computes."""
    memory = available_memory(xp)
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "device": "cpu" if xp is np else gpu_name(xp),
        "available_gib": None if memory is None else round(memory / 2**30, 1),
        "blas": blas(),
    }


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def gpu_name(cupy: Any) -> str:
    """The current GPU as its driver names it."""
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def available_memory(xp: Any) -> int | None:
    """Bytes that can be allocated on the device of `xp` without swapping; None where the system does not say."""
    if xp is not np:
        return int(xp.cuda.runtime.memGetInfo()[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container may be allowed less than the machine has
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


def blas() -> str:
    """The BLAS that NumPy was built with."""
    try:
        found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index]
    except (TypeError, KeyError):  # NumPy before 1.26 only prints it
        return "unknown"
    return f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()


@contextmanager
def one_blas_thread() -> Iterator[bool]:
    """Keep NumPy's BLAS to one thread for a while; yields whether that was possible (it is for OpenBLAS).

    The products of tiles are too small to split. Two threads gain little on an idle machine and, waiting for each
    other, cost several times the work on a busy one.
    """
    functions = _openblas_threads()
    if functions is None:
        yield False
        return
    get, set_ = functions
    before = get()
    set_(1)
    try:
        yield True
    finally:
        set_(before)


def _openblas_threads() -> tuple[Any, Any] | None:
    """OpenBLAS's functions (get, set) for its number of threads, through the NumPy module that is linked to it."""
    module = importlib.import_module("numpy.linalg._umath_linalg")
    try:
        library = ctypes.CDLL(str(module.__file__))
    except OSError:
        return None
    for name in ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads"):
        if hasattr(library, name.format("set")):
            return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
