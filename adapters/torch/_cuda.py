"""Torch tensors on a GPU: CuPy arrays over the same memory, on torch's current stream, with torch's allocator.

Everything that the adapter knows about CUDA is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

import cuflash
from cuflash.adapters.torch._values import Operands, Options
from cuflash.cuda.toolchain import import_cupy


def forward(operands: Operands, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `cuflash.flash_attention`."""
    with _torch_surroundings(operands.q):
        out, lse = cuflash.flash_attention(**_arrays(operands._asdict()), **options._asdict(), return_lse=True)
        return torch.from_dlpack(out), torch.from_dlpack(lse)


def backward(
    dout: torch.Tensor,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    options: Options,
    *,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    accumulate: bool = False,
    memory: str = "fast",
) -> tuple[torch.Tensor, ...]:
    """The gradients of `cuflash.flash_attention_backward`; given dq, dk and dv come back as the same tensors."""
    given = {"dq": dq, "dk": dk, "dv": dv}
    tensors = {"dout": dout, **operands._asdict(), "out": out, "lse": lse, "dlse": dlse, **given}
    with _torch_surroundings(operands.q):
        gradients = cuflash.flash_attention_backward(
            **_arrays(tensors), **options._asdict(), accumulate=accumulate, memory=memory
        )
        targets = (*given.values(), None)
        return tuple(
            torch.from_dlpack(array) if target is None else target
            for array, target in zip(gradients, targets, strict=False)
        )


def _arrays(tensors: dict[str, torch.Tensor | None]) -> dict[str, Any]:
    return {name: None if tensor is None else _array(name, tensor.detach()) for name, tensor in tensors.items()}


def _array(name: str, tensor: torch.Tensor) -> Any:
    try:
        return import_cupy().from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: got a tensor of {tensor.dtype} that CuPy cannot view ({error}); "
            "allowed: float16, bfloat16 or float32, with its values in memory"
        ) from error


class _TorchStream:
    """Torch's current stream of a device, as the protocol that CuPy reads."""

    def __init__(self, device: int) -> None:
        self._handle = torch._C._cuda_getCurrentRawStream(device)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@contextmanager
def _torch_surroundings(q: torch.Tensor) -> Iterator[None]:
    """q's device, the stream torch uses there, and torch's allocator: what it gives is safe inside CUDA graphs too."""
    cupy = import_cupy()
    with (
        torch.cuda.device(q.device),
        cupy.cuda.Stream.from_external(_TorchStream(q.device.index)),
        cupy.cuda.using_allocator(_allocator().malloc),
    ):
        # A thread that has not set its device has no context for the driver to launch in, even on device 0.
        cupy.cuda.runtime.setDevice(q.device.index)
        yield


@lru_cache(maxsize=1)
def _allocator() -> Any:
    def allocate(size: int, device: int) -> int:
        return torch.cuda.caching_allocator_alloc(size, device)

    def free(pointer: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    return import_cupy().cuda.PythonFunctionAllocator(allocate, free)
