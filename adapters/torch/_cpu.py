"""Torch tensors in the CPU's memory: NumPy arrays over the same memory, both ways, no copy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

import cuflash


def forward(tensors: dict[str, torch.Tensor | None], options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `cuflash.flash_attention`."""
    out, lse = cuflash.flash_attention(**_arrays(tensors), **options, return_lse=True)
    return _tensor(out), _tensor(lse)


def backward(
    tensors: dict[str, torch.Tensor | None],
    options: dict[str, Any],
    *,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    accumulate: bool = False,
    memory: str = "fast",
) -> tuple[torch.Tensor, ...]:
    """The gradients of `cuflash.flash_attention_backward`; given dq, dk and dv come back as the same tensors."""
    given = {"dq": dq, "dk": dk, "dv": dv}
    gradients = cuflash.flash_attention_backward(
        **_arrays(tensors), **_arrays(given), **options, accumulate=accumulate, memory=memory
    )
    targets = (*given.values(), None)
    return tuple(
        _tensor(array) if target is None else target for array, target in zip(gradients, targets, strict=False)
    )


def _arrays(tensors: dict[str, torch.Tensor | None]) -> dict[str, Any]:
    return {name: None if tensor is None else _array(name, tensor.detach()) for name, tensor in tensors.items()}


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:  # float8 and the like; lazily negated memory
        raise TypeError(
            f"{name}: got a tensor of {tensor.dtype} that NumPy cannot view ({error}); "
            "allowed: float16, bfloat16, float32 or float64, with its values in memory"
        ) from error


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
