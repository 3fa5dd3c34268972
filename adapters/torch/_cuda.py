"""Torch tensors on a GPU: plans run with their pointers, on torch's current stream, with torch's memory.

Everything that the adapter knows about CUDA is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from cuflash import api, plans
from cuflash.adapters.torch._values import DTYPE_NAMES, Operands, Options
from cuflash.arrays import Signature
from cuflash.cuda.toolchain import import_cupy


def forward(operands: Operands, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `cuflash.flash_attention`."""
    plan = plans.forward(*_signatures(plans.INPUTS, operands), *_arguments(options))
    seed = plans.checked_seed(options.seed)
    out, lse = _empty(plan.out, operands.q), _empty(plan.lse, operands.q)
    _run(plan, operands.q, (*operands[:3], out, None, None, None, None, lse, None, None, *operands[3:]), seed)
    return out, lse


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
    given = (dq, dk, dv)
    others = (dout, out, lse, dlse, *given)
    plan = plans.backward(
        *_signatures(("dout", "out", "lse", "dlse", "dq", "dk", "dv"), others),
        *_signatures(plans.INPUTS, operands),
        accumulate,
        memory,
        *_arguments(options),
    )
    seed = plans.checked_seed(options.seed)
    if any(target is not None for target in given):
        views = [None if x is None else import_cupy().from_dlpack(x.detach()) for x in (*others, *operands)]
        api.check_overlap(dict(zip(("dq", "dk", "dv"), views[4:7], strict=True)), [*views[:4], *views[7:]])
    gradients = tuple(plans.targets(plan, given, lambda like: _empty(like, operands.q)))
    dsinks = gradients[3] if len(gradients) > 3 else None
    _run(plan, operands.q, (*operands[:3], out, dout, *gradients[:3], lse, dlse, dsinks, *operands[3:]), seed)
    return gradients


def _arguments(options: Options) -> tuple[Any, ...]:
    """The options as plans take them."""
    causal, window_size, scale, softcap, dropout_p, seed, *more = options
    return (causal, window_size, scale, softcap, dropout_p, seed is not None, *more)


def _run(plan: Any, like: torch.Tensor, operands: Sequence[torch.Tensor | None], seed: int) -> None:
    """Run a plan, its workspace where `like` is; the operands in the order of cuflash.cuda.launch.OPERANDS."""
    pointers = tuple([0 if tensor is None else tensor.data_ptr() for tensor in operands])
    q, k, v, out, dout, dq, dk, dv, *_ = pointers
    launches = plan.launches((q | k | v | out | dout | dq | dk | dv) % 16 == 0)
    workspace = 0
    if launches.workspace:
        memory = torch.empty(launches.workspace, dtype=torch.uint8, device=like.device)
        workspace = memory.data_ptr()
    launches.run(torch._C._cuda_getCurrentRawStream(plan.device), pointers, workspace, seed)


def _empty(like: Signature, q: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=_TORCH[like.dtype], device=q.device)


_TORCH = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def _signatures(names: Sequence[str], tensors: Sequence[torch.Tensor | None]) -> list[Signature | None]:
    signatures = []
    for i, x in enumerate(tensors):
        if x is None:
            signatures.append(None)
            continue
        if x.is_neg() or x.is_conj():
            raise TypeError(
                f"{names[i]}: got a tensor of {x.dtype}, lazily negated or conjugated; allowed: its values in memory"
            )
        signatures.append(_signature(x.shape, x.stride(), x.dtype, x.device))
    return signatures


@lru_cache(maxsize=4096)
def _signature(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Signature:
    where = f"cuda:{device.index}" if device.type == "cuda" else str(device)
    return Signature(tuple(shape), strides, DTYPE_NAMES.get(dtype, str(dtype)), where, True)
