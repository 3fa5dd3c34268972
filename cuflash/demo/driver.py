"""The GPUs and the NVIDIA driver, asked of the driver itself: a GPU is found also where CuPy is not installed."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

_NONE_HERE = (34, 100)  # CUDA_ERROR_STUB_LIBRARY (a build machine without a driver), CUDA_ERROR_NO_DEVICE
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class Gpu(NamedTuple):
    """One GPU, in the order of CUDA's device numbers."""

    name: str
    capability: tuple[int, int]


class Driver(NamedTuple):
    """The driver of this machine and the GPUs it shows to this process."""

    version: str  # e.g. "580.65.06"; empty where the system does not tell
    cuda: tuple[int, int]  # the newest CUDA it can run
    gpus: tuple[Gpu, ...]


def driver() -> Driver | None:
    """The driver and at least one GPU, None where there is none. RuntimeError where the driver itself fails."""
    cuda = _library("libcuda.so.1", "nvcuda.dll")
    if cuda is None:
        return None
    code = cuda.cuInit(0)
    if code in _NONE_HERE:
        return None
    if code:
        raise RuntimeError(f"the NVIDIA driver cannot be used: cuInit gives error {code}")
    number = _integer(cuda.cuDriverGetVersion)
    gpus = tuple(_gpu(cuda, ordinal) for ordinal in range(_integer(cuda.cuDeviceGetCount)))
    return Driver(_version(), (number // 1000, number % 1000 // 10), gpus) if gpus else None


def _gpu(cuda: Any, ordinal: int) -> Gpu:
    name = ctypes.create_string_buffer(256)
    device = _integer(cuda.cuDeviceGet, ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    major, minor = (_integer(cuda.cuDeviceGetAttribute, attribute, device) for attribute in _CAPABILITY)
    return Gpu(name.value.decode(errors="replace"), (major, minor))


def _version() -> str:
    """The driver's own version; only NVML knows it."""
    nvml = _library("libnvidia-ml.so.1", "nvml.dll")
    if nvml is None or nvml.nvmlInit_v2():
        return ""
    text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
    nvml.nvmlShutdown()
    return "" if failed else text.value.decode(errors="replace")


def _integer(function: Any, *arguments: int) -> int:
    """What a function of the driver writes through its first argument."""
    value = ctypes.c_int()
    if code := function(ctypes.byref(value), *arguments):
        raise RuntimeError(f"the NVIDIA driver cannot be used: {function.__name__} gives error {code}")
    return value.value


def _library(linux: str, windows: str) -> Any:
    try:
        return ctypes.CDLL(windows if sys.platform == "win32" else linux)
    except OSError:
        return None
