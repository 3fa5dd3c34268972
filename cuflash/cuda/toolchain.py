"""From one source text to a cubin: which architecture, which NVRTC and headers, and what ptxas said of the result.

Nothing here needs a GPU but `device_target`; CuPy is imported on first use.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cuflash.errors import UnsupportedError

INSTALL = "pip install 'cuflash[cuda13]', or 'cuflash[cuda12]' where the driver is older than CUDA 13"

# Compute capability -> NVRTC's name. A cubin also runs on later minors of its major, so a GPU that is not here takes
# the nearest minor below; 8.7 is here because a Tegra GPU runs only cubins made for it. wgmma needs the a of sm_90a.
_ARCHS = {
    (7, 5): "sm_75",
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 7): "sm_87",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100",
    (11, 0): "sm_110",
    (12, 0): "sm_120",
}
ARCHS = tuple(_ARCHS.values())


class KernelCompileError(RuntimeError):
    """A kernel that NVRTC or ptxas rejected; the message holds their log."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a kernel is compiled for: the GPU that loads the cubin, and the code path the sources take.

    The two differ only where `CUFLASH_FORCE_ARCH` asks a newer GPU for an older path, since a cubin for an older major
    does not load there.
    """

    arch: str  # NVRTC's name, e.g. "sm_90a"
    path: int  # which tiles and instructions it takes, 100 * major + 10 * minor, e.g. 900

    @classmethod
    def named(cls, arch: str) -> Target:
        """The target of an architecture's own path; `arch` is one of `ARCHS`, else a ValueError."""
        for (major, minor), name in _ARCHS.items():
            if name == arch:
                return cls(arch, 100 * major + 10 * minor)
        raise ValueError(f"arch is {arch!r}; allowed are {', '.join(ARCHS)}")


def capability_target(capability: tuple[int, int]) -> Target:
    """The target of a GPU of this compute capability, its path lowered to `CUFLASH_FORCE_ARCH` where that is set.

    Raises UnsupportedError for a GPU older than Turing or a path newer than the GPU, ValueError for an unknown name.
    """
    major, minor = capability
    below = [known for known in _ARCHS if known[0] == major and known <= capability]
    if below:
        native = Target.named(_ARCHS[max(below)])
    elif capability > max(_ARCHS):
        native = Target(f"sm_{major}0", 100 * major)  # a GPU newer than this release: NVRTC knows whether it can
    else:
        raise UnsupportedError(
            f"the GPU has compute capability {major}.{minor}; the CUDA kernels need 7.5 (Turing) or newer. "
            "backend='numpy' runs on the CPU."
        )
    forced = os.environ.get("CUFLASH_FORCE_ARCH")
    if not forced:
        return native
    try:
        path = Target.named(forced).path
    except ValueError:
        raise ValueError(f"CUFLASH_FORCE_ARCH is {forced!r}; allowed are {', '.join(ARCHS)}") from None
    if path > native.path:
        raise UnsupportedError(
            f"CUFLASH_FORCE_ARCH is {forced!r}, but the GPU has compute capability {major}.{minor} and runs only that "
            "or older code paths."
        )
    return Target(native.arch, path)


def device_target(device: int) -> Target:
    """The target of one CUDA device. Raises as `capability_target`, and UnsupportedError where no GPU is usable."""
    return capability_target(capability(device))


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of one CUDA device."""
    cupy = import_cupy()
    try:
        digits = cupy.cuda.Device(device).compute_capability  # "75", "120"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise _unusable(f"device {device}", error) from error
    return int(digits[:-1]), int(digits[-1])


def current_device() -> int:
    """The number of the current CUDA device, or an UnsupportedError where no GPU is usable."""
    cupy = import_cupy()
    try:
        return cupy.cuda.runtime.getDevice()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise _unusable("device", error) from error


def _unusable(device: str, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"no usable CUDA {device}: {error}. The CUDA backend needs an NVIDIA GPU and a driver as new as the "
        f"installed CuPy's CUDA; backend='numpy' runs on the CPU."
    )


def import_cupy() -> ModuleType:
    """The module cupy, or an UnsupportedError that says how to install it."""
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(f"the CUDA backend needs CuPy, which cannot be imported ({error}): {INSTALL}") from error
    return cupy


@dataclass(frozen=True, slots=True)
class Toolchain:
    """The compiler this process uses."""

    version: str  # of NVRTC, e.g. "13.5"
    headers: Path  # the folder of cuda_fp16.h and cuda_bf16.h


@functools.cache
def toolchain() -> Toolchain:
    """NVRTC and CUDA's headers of the same major version, or an UnsupportedError that names the extra to install."""
    import_cupy()
    from cupy.cuda import nvrtc

    major, minor = _nvrtc_version(nvrtc)
    for folder in _header_folders(major):
        if _headers_major(folder) == major:
            return Toolchain(f"{major}.{minor}", folder)
    raise UnsupportedError(
        f"NVRTC {major}.{minor} is there, but the headers of CUDA {major} (cuda_fp16.h, cuda_bf16.h) were not found: "
        f"{INSTALL}; a CUDA toolkit is found through CUDA_PATH"
    )


def _nvrtc_version(nvrtc: ModuleType) -> tuple[int, int]:
    """NVRTC's version, which loads the library."""
    try:
        return nvrtc.getVersion()
    except Exception as error:
        try:
            # CuPy before 14 does not look into the wheels; a library that is loaded already is found by its name.
            from cuda.pathfinder import load_nvidia_dynamic_lib

            load_nvidia_dynamic_lib("nvrtc")
            return nvrtc.getVersion()
        except Exception:
            reason = str(error).partition("\n")[0]
            raise UnsupportedError(
                f"the run-time compiler NVRTC cannot be loaded ({reason}): {INSTALL}. Without it only kernels that "
                "`cuflash compile` made, found through CUFLASH_PRECOMPILED, can run."
            ) from error


def _header_folders(major: int) -> Iterator[Path]:
    """Where CUDA's headers may be, the wheels first, then a toolkit."""
    wheels = importlib.util.find_spec("nvidia")
    for root in (wheels.submodule_search_locations if wheels else None) or ():
        yield Path(root, f"cu{major}", "include")  # CUDA 13 and newer
        yield Path(root, "cuda_runtime", "include")  # CUDA 12
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "include")
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError:  # comes with cuda-bindings and with CuPy 14
        pass
    else:
        found = find_nvidia_header_directory("cudart")  # knows conda and the usual places of a toolkit
        if found:
            yield Path(found)
    yield Path("/usr/local/cuda/include")


def _headers_major(folder: Path) -> int | None:
    """The major version of the CUDA headers in a folder; None where they are not."""
    if not (folder / "cuda_fp16.h").is_file() or not (folder / "cuda_bf16.h").is_file():
        return None
    try:
        text = (folder / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text)
    return int(version[1]) // 1000 if version else None


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What one compilation gives."""

    cubin: bytes
    log: str  # the compiler's warnings and ptxas's report


def options(target: Target) -> tuple[str, ...]:
    """NVRTC's options, as far as they are the same on every machine: with the source they decide the cubin.

    CUFLASH_ARCH is the instruction set that the sources use: Turing's (750), or what every later GPU has (800), so that
    all later paths share a cubin where they share a tile. (The Hopper kernels are files of their own.)
    """
    instructions = 800 if target.path >= 800 else 750
    return ("-std=c++20", f"-arch={target.arch}", f"-DCUFLASH_ARCH={instructions}", "--ptxas-options=-v")


class FirstAlone:
    """Calls of which the first has ended before another begins; after it all run side by side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = False

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if not self._ended:
            with self._lock:
                if not self._ended:
                    try:
                        return call(*arguments)
                    finally:
                        self._ended = True
        return call(*arguments)


# NVRTC loads its builtins at the first compilation. Of two at once one has failed to open them (13.0, now and then).
_compile = FirstAlone()


def compile_cubin(text: str, target: Target, *, name: str) -> CompileResult:
    """Compile one complete source text; `name` stands for it in messages.

    Raises KernelCompileError with the log, UnsupportedError where the toolchain is missing or too old for the target.
    """
    tools = toolchain()
    from cupy.cuda import nvrtc

    if int(re.sub(r"\D", "", target.arch)) not in nvrtc.getSupportedArchs():
        raise UnsupportedError(f"NVRTC {tools.version} cannot compile for {target.arch}: {INSTALL}, in another version")
    program = nvrtc.createProgram(text, name, (), ())
    try:
        try:
            _compile(nvrtc.compileProgram, program, (*options(target), f"-I{tools.headers}"))
            cubin = nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program).rstrip("\0\n ")
            raise KernelCompileError(f"{name}: NVRTC {tools.version} says {error}\n{log}") from None
        return CompileResult(cubin, nvrtc.getProgramLog(program).rstrip("\0\n "))
    finally:
        nvrtc.destroyProgram(program)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one kernel uses, as ptxas reports it."""

    registers: int  # a thread
    stack_bytes: int  # local memory a thread, functions that were not inlined included
    spill_bytes: int  # stores and loads a thread
    shared_bytes: int  # static shared memory a block
    advisories: tuple[str, ...]  # lines "(C75xx) ...": wgmma serialised, waits injected, setmaxnreg ignored


def resources(log: str) -> dict[str, Resources]:
    """ptxas's report in the log of a compilation: entry name -> resources. A ValueError where there is no report.

    A cubin that came out of the cache has no log: what must be checked is compiled afresh.
    """
    sections = re.split(r"Compiling entry function '(.+?)' for", log)
    report = {}
    for entry, text in zip(sections[1::2], sections[2::2], strict=True):
        used = re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", text)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if not used or not frames:
            raise ValueError(f"ptxas's report on {entry!r} is not understood:\n{text}")
        report[entry] = Resources(
            registers=int(used[1]),
            stack_bytes=sum(int(stack) for stack, _, _ in frames),
            spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in frames),
            shared_bytes=int(used[2] or 0),
            advisories=tuple(re.findall(rf"\(C\d+\).*?function '{re.escape(entry)}'.*", log)),
        )
    if not report:
        raise ValueError(f"there is no ptxas report in the log:\n{log}")
    return report
