"""The part of `cuflash doctor` about CUDA: the driver, CuPy and the compiler, the cache, the kernels a GPU gets.

Without a GPU nothing of this is needed, and nothing that is missing is unhealthy.
"""

from __future__ import annotations

import importlib
import os
from itertools import product
from pathlib import Path
from types import ModuleType

from cuflash import tuning
from cuflash.cuda import cache, toolchain
from cuflash.cuda.toolchain import ARCHS, Target
from cuflash.demo import machine
from cuflash.demo.driver import Gpu, driver
from cuflash.demo.finding import Finding
from cuflash.errors import UnsupportedError
from cuflash.spec import Spec

_OLDEST = (7, 5)  # Turing: an older GPU is no reason to install anything
_TABLE = tuple(product(("float16", "bfloat16", "float32"), (64, 128, 256)))  # the common problems


def wanted() -> bool:
    """Whether this machine has a GPU that cuflash could use. One whose driver fails counts."""
    try:
        found = driver()
    except RuntimeError:
        return True
    return found is not None and any(gpu.capability >= _OLDEST for gpu in found.gpus)


def extra() -> str:
    """The extra to install, by the CUDA that the driver can run."""
    try:
        found = driver()
    except RuntimeError:
        found = None
    return "cuflash[cuda12]" if found is not None and found.cuda < (13, 0) else "cuflash[cuda13]"


# ---- checks ------------------------------------------------------------------------------------------------------


def gpus() -> Finding:
    found = driver()
    if found is None:
        return Finding("none, or no NVIDIA driver for it")
    return Finding("; ".join(f"{gpu.name}, compute capability {_dotted(gpu.capability)}" for gpu in found.gpus))


def driver_version() -> Finding:
    found = driver()
    if found is None:
        return Finding("none")
    return Finding(f"{found.version or 'of unknown version'}, runs CUDA {_dotted(found.cuda)} and older")


def cupy() -> Finding:
    try:
        module = importlib.import_module("cupy")
    except ImportError as error:
        return _missing(_not_importable("CuPy", error))
    built = module.cuda.runtime.runtimeGetVersion()
    text = f"{module.__version__}, for CUDA {built // 1000}"
    if obstacle := _unreachable(module) if wanted() else "":
        return Finding(f"{text}, which does not reach the GPU ({obstacle}): {_install()}", healthy=False)
    return Finding(text)


def nvrtc() -> Finding:
    try:
        tools = toolchain.toolchain()
    except UnsupportedError as error:
        # Kernels that were carried here need no compiler.
        return Finding(str(error), healthy=not wanted() or bool(os.environ.get("CUFLASH_PRECOMPILED")))
    return Finding(f"{tools.version}, headers in {tools.headers}")


def cuda_bindings() -> Finding:
    """What describes tensors to the copy engine of Hopper."""
    version = machine.version_of("cuda-bindings")
    return Finding(version) if version else _missing("not installed")


def cublas() -> Finding:
    """What `cuflash demo` and `cuflash bench` multiply matrices with; attention itself does without."""
    if machine.gpu_obstacle():
        return Finding("not looked for: no GPU backend here")
    try:
        machine.require_products(importlib.import_module("cupy"))
    except UnsupportedError as error:
        return Finding(str(error))
    return Finding("found")


def code_path() -> Finding:
    found = driver()
    if found is None:
        return Finding("none: no GPU")
    targets = {gpu: _target_or_reason(gpu) for gpu in found.gpus}
    texts = [target if isinstance(target, str) else _path_text(target) for target in targets.values()]
    healthy = all(isinstance(target, Target) or gpu.capability < _OLDEST for gpu, target in targets.items())
    return Finding("; ".join(dict.fromkeys(texts)), healthy)


def kernel_cache() -> Finding:
    folder, limit = cache.user_folder(), cache.user_limit()
    text = f"{folder}: {_contents(folder)}, at most {limit / 1e6:.0f} MB"
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if limit and not (existing.is_dir() and os.access(existing, os.W_OK)):
        text += "; it cannot be written, so every process compiles anew (CUFLASH_CACHE_DIR chooses another)"
        return Finding(text, healthy=not wanted())
    return Finding(text)


def precompiled() -> Finding:
    folder = os.environ.get("CUFLASH_PRECOMPILED")
    if not folder:
        return Finding("none (CUFLASH_PRECOMPILED is not set)")
    if not Path(folder).is_dir():
        return Finding(f"CUFLASH_PRECOMPILED is {folder!r}, which is no folder", healthy=False)
    return Finding(f"{folder}: {_contents(Path(folder))}")


# ---- kernels -----------------------------------------------------------------------------------------------------


def kernel_table() -> list[str]:
    """Lines that name the kernels, with their tiles, that common causal problems get on the GPUs of this machine."""
    found = driver()
    targets = [_target_or_reason(gpu) for gpu in found.gpus] if found else []
    lines = []
    for target in dict.fromkeys(target for target in targets if isinstance(target, Target)):
        lines += ["", f"kernels on {_path_text(target)}, with rows x columns of a tile / tiles in flight / warps:"]
        lines += [f"  {dtype:<8} {head_dim:>3}  {_kernels(dtype, head_dim, target)}" for dtype, head_dim in _TABLE]
    return lines


def _kernels(dtype: str, head_dim: int, target: Target) -> str:
    """Name and tile of each kernel of a causal problem with aligned rows, or why there is none."""
    spec = Spec(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim, bounded_right=True)
    try:
        tuning.check_supported(spec, target.path)
    except UnsupportedError as error:
        return f"none: {error}"
    cells = []
    for backward in (False, True):
        hopper = target == Target.named("sm_90a") and tuning.has_hopper(spec, backward=backward)
        wanted = tuning.served(spec, target.path) if backward and not hopper else spec
        names = tuning.kernels_of(wanted, backward=backward, hopper=hopper)
        for name, tile in tuning.tiles_of(names, wanted, target.path, 16).items():
            if name not in ("backward_prepare", "backward_finish"):  # those have nothing to choose
                cells.append(f"{name} {tile.rows}x{tile.cols}/{tile.stages}/{tile.warps}")
    return "  ".join(f"{cell:<32}" for cell in cells).rstrip()


def _target_or_reason(gpu: Gpu) -> Target | str:
    try:
        return toolchain.capability_target(gpu.capability)
    except UnsupportedError as error:
        return str(error)


def _path_text(target: Target) -> str:
    path = next((arch for arch in ARCHS if Target.named(arch).path == target.path), f"sm_{target.path // 10}")
    return path if path == target.arch else f"the {path} path in code for {target.arch} (CUFLASH_FORCE_ARCH)"


# ---- words -------------------------------------------------------------------------------------------------------


def _missing(what: str) -> Finding:
    """Something that a GPU needs and nothing else does."""
    return Finding(f"{what}: {_install()}", False) if wanted() else Finding(f"{what} (optional: {_install()})")


def _install() -> str:
    return f"pip install '{extra()}'"


def _not_importable(name: str, error: ImportError) -> str:
    return "not installed" if isinstance(error, ModuleNotFoundError) else f"{name} cannot be imported ({error})"


def _unreachable(module: ModuleType) -> str:
    """Why CuPy cannot use the GPU that is here, most often for a driver that is too old for its CUDA."""
    try:
        module.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        return str(error)
    return ""


def _contents(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.glob("*.cubin")]
    return f"{len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
