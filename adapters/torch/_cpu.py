"""Torch tensors in the CPU's memory: NumPy arrays over the same memory, both ways, no copy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

import cuflash
from cuflash import UnsupportedError
from cuflash.adapters.torch._values import DTYPE_NAMES, Given, Operands, Options, differentiated
from cuflash.arrays import dtype_of


def forward(operands: Given, options: Options, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of `cuflash.flash_attention`; the LSE only if it is wanted."""
    out, lse = cuflash.flash_attention(**_arrays(Operands(*operands)._asdict()), **_options(options), return_lse=True)
    return _tensor(out), _tensor(lse) if with_lse else None


def backward(
    dout: torch.Tensor,
    operands: Given,
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
    with_dbias: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The gradients of `cuflash.flash_attention_backward`; given dq, dk and dv come back as the same tensors."""
    given = {"dq": dq, "dk": dk, "dv": dv}
    tensors = {"dout": dout, **Operands(*operands)._asdict(), "out": out, "lse": lse, "dlse": dlse, **given}
    gradients = cuflash.flash_attention_backward(
        **_arrays(tensors), **_options(options), accumulate=accumulate, memory=memory
    )
    targets = (*given.values(), None, None)
    wanted = differentiated(operands, with_dbias)  # dbias is the last
    return tuple(
        _tensor(array) if target is None else target
        for array, target, _ in zip(gradients, targets, wanted, strict=False)
    )


def _options(options: Options) -> dict[str, Any]:
    if options.backend == "cuda":
        raise UnsupportedError("backend: got 'cuda' with q in the CPU's memory; copy it to the GPU with q.cuda()")
    return options._asdict()


def _arrays(tensors: dict[str, torch.Tensor | None]) -> dict[str, Any]:
    return {name: None if tensor is None else _array(name, tensor) for name, tensor in tensors.items()}


_DTYPES = {dtype: dtype_of(name) for dtype, name in DTYPE_NAMES.items()}


class _Memory:
    """A tensor's memory as NumPy reads it. `Tensor.numpy()` would forbid torch to resize it ever after, which FSDP
    does with parameters."""

    def __init__(self, tensor: torch.Tensor, itemsize: int) -> None:
        self.owner = tensor
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * itemsize for stride in tensor.stride()),
            "typestr": f"V{itemsize}",
            "data": (tensor.data_ptr(), False),
        }


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or tensor.is_neg() or tensor.is_conj():
        lazily = "" if dtype is None else ", lazily negated or conjugated"
        raise TypeError(
            f"{name}: got a tensor of {tensor.dtype}{lazily}; "
            "allowed: float16, bfloat16, float32 or float64 (a mask: bool), with its values in memory"
        )
    if tensor.numel() == 0:
        return np.empty(tuple(tensor.shape), dtype)
    return np.asarray(_Memory(tensor, dtype.itemsize)).view(dtype)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
