"""The direct way to a backend: by the device of q, with nothing of torch between."""

from __future__ import annotations

from typing import Any

import torch

from cuflash import UnsupportedError
from cuflash.adapters.torch import _cpu, _cuda
from cuflash.adapters.torch._values import Given, Options


def forward(operands: Given, options: Options, with_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse or None), neither of which autograd knows about."""
    return _library(operands[0]).forward(operands, _with_number(options), with_lse)


def backward(
    dout: torch.Tensor,
    operands: Given,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    options: Options,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv), then dsinks where the call has sinks and dbias where it has a bias.

    `more` is dq, dk, dv, accumulate and memory of `cuflash.flash_attention_backward`, and `with_dbias`, which is False
    where nobody asks for that.
    """
    return _library(operands[0]).backward(dout, operands, out, lse, dlse, _with_number(options), **more)


def _library(q: torch.Tensor) -> Any:
    if q.is_cpu:
        return _cpu
    if q.is_cuda:
        return _cuda
    raise UnsupportedError(f"q: got a tensor on {q.device}; allowed: the CPU or a CUDA GPU")


def _with_number(options: Options) -> Options:
    seed = options.seed
    return options._replace(seed=int(seed) % 2**64) if isinstance(seed, torch.Tensor) else options


def fresh_seed() -> int | torch.Tensor:
    """A seed for dropout, from torch's default generator of the CPU: `torch.manual_seed` and checkpoints govern it."""
    if torch.compiler.is_compiling():
        return torch.randint(2**63 - 1, (), device="cpu")  # drawn anew by each run of what is compiled
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "dropout_p: got dropout with a seed to be drawn inside a CUDA graph, which would repeat one mask; "
            "allowed: dropout_p=0, or `flash_attention` with a seed that you choose"
        )
    return int(torch.randint(2**63 - 1, (), device="cpu"))
