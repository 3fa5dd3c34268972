"""The C++ route of eager calls on a GPU (extension.cpp): built on request, and used by every process after that.

It looks plans up, allocates and launches without Python. The plans are made here, once for each layout and options.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cuflash import plans
from cuflash.adapters.torch import _cuda, _operators
from cuflash.adapters.torch._values import Options
from cuflash.cuda import cache, launch
from cuflash.errors import UnsupportedError

logger = logging.getLogger("cuflash")

NAME = "cuflash_torch_extension"

# The route, once it is loaded: `attend` of cuflash.adapters.torch.attention, or NotImplemented for a call that is not
# of its kind.
attend: Any = None


def build_extension() -> Path:
    """Compile the C++ route of eager calls on a GPU, and use it from now on, in this process and in later ones.

    With it a small call takes the host about half the time. It serves q, k and v on a GPU without another array and
    without dropout; for all else, and where a transform, a mode or the compiler looks on, Python remains the way, and
    results are the same. It takes half a minute, a C++ compiler and ninja (`pip install ninja`), once for each version
    of torch, Python and cuflash.

    Returns
    -------
    Path
        Of the library, in the cache folder (`CUFLASH_CACHE_DIR`). To be rid of the route, remove it.

    Raises
    ------
    RuntimeError
        With the compiler's words, where it fails or is not there.
    UnsupportedError
        On a system other than Linux.
    """
    if sys.platform != "linux":
        raise UnsupportedError(f"the C++ extension of the torch adapter: got {sys.platform}; allowed: Linux")
    path = library()
    if not path.exists():
        from torch.utils import cpp_extension

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            source = Path(folder, "extension.cpp")
            source.write_text(_source(), encoding="utf-8")
            cpp_extension.load(
                NAME, [str(source)], extra_cflags=["-O2"], build_directory=folder, is_python_module=False
            )
            os.replace(Path(folder, f"{NAME}.so"), path)
    if attend is None:
        load_if_built()
    return path


def library() -> Path:
    """Where the library belongs that is built of this source for this torch and Python. An OSError where there is no
    home folder."""
    made_for = (_source(), torch.__version__, sys.version, str(torch.compiled_with_cxx11_abi()))
    key = hashlib.sha256("\0".join(made_for).encode()).hexdigest()
    return cache.user_folder() / f"torch-{key[:16]}" / f"{NAME}.so"


def load_if_built() -> None:
    """Use the library if there is one, and torch and the machine have CUDA."""
    if torch.version.cuda is None or sys.platform != "linux":
        return
    try:
        path = library()
        if path.exists():
            load(path)
    except (ImportError, OSError) as error:  # a library that is damaged, or no driver or home folder
        logger.warning("eager calls on a GPU go without the C++ extension: %s", error)


def load(path: Path) -> None:
    """Load the library, and give it the functions of the driver."""
    global attend
    driver = ctypes.CDLL("libcuda.so.1")
    of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
    functions = (
        *(driver.cuLaunchKernel, driver.cuTensorMapReplaceAddress, driver.cuMemsetD8Async),
        of_torch.aoti_torch_get_current_cuda_stream,
    )
    extension = module(path)
    configure(extension, functions, "cuda", enter_thread=launch.enter_thread)
    plans.forget_too(extension.forget)
    attend = extension.attend
    logger.debug("eager calls on a GPU go through %s", extension.__file__)


def module(path: Path) -> ModuleType:
    """The library as a module."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def configure(extension: Any, functions: Sequence[Any], device_type: str, enter_thread: Any) -> None:
    """Give the library functions of C to call, in the order of its struct Functions, and what Python does for it."""
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    callables = (prepare_forward, prepare_backward, backward, enter_thread)
    extension.configure(addresses, callables, device_type, len(launch.OPERANDS), Options._fields.index("seed"))


# ---- what the library asks Python for ------------------------------------------------------------------------------

_KERNELS: dict[int, Any] = {}  # those of all recipes, which stay loaded


def prepare_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: tuple[Any, ...], with_lse: bool
) -> tuple[Sequence[int], Sequence[int], tuple[Any, ...]] | None:
    """The shapes of out and LSE and the launches of a call, with pointers that are multiples of 16; None where the
    library cannot serve it. Raises for a bad call as it would without the library."""
    plan = _cuda.forward_plan((q, k, v), Options._make(settings))
    recipe = _recipe(plan, with_lse)
    return None if recipe is None else (plan.out.shape, plan.lse.shape, recipe)


def prepare_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    """The launches of a backward without dlse."""
    options = Options._make(settings)
    return _recipe(_cuda.backward_plan(dout, (q, k, v), out, lse, (None,) * 4, options, with_dbias=False))


def backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    settings: tuple[Any, ...],
) -> list[torch.Tensor]:
    """The gradients of q, k and v for a node of the library, however the gradients of out and LSE came."""
    return list(_operators.of_node((dout, dlse), (q, k, v), out, lse, Options._make(settings), with_dbias=False))


def _recipe(plan: plans.ForwardPlan | plans.BackwardPlan, backward_too: bool = False) -> tuple[Any, ...] | None:
    """A plan's recipe with the addresses of its kernels."""
    recipe = plan.launches(True, backward_too).recipe()
    if recipe is None:
        return None
    _KERNELS.update({step.kernel.ptr: step.kernel for step in recipe.launches})
    return (*recipe[:3], tuple((step.kernel.ptr, *step[1:]) for step in recipe.launches))


def _source() -> str:
    return resources.files("cuflash.adapters.torch").joinpath("extension.cpp").read_text(encoding="utf-8")
