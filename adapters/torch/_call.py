"""A call as values, and the direct way to a backend: by the device of q, with nothing of torch between."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cuflash.adapters.torch import _cpu, _cuda
from cuflash.errors import UnsupportedError


class Operands(NamedTuple):
    """The tensors of a call, in the order in which everything here passes them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None


class Options(NamedTuple):
    """The options of a call that are no tensors, named as those of `cuflash.flash_attention`."""

    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: Any = None  # int, or an int64 tensor of one element on the CPU: the same 64 bits
    deterministic: bool = False
    allow_tf32: bool = False
    layout: str = "bshd"
    backend: str | None = None


def forward(operands: Operands, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), neither of which autograd knows about."""
    return _library(operands.q).forward(operands._asdict(), _with_number(options))


def backward(
    dout: torch.Tensor,
    operands: Operands,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    options: Options,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv), and dsinks where the call has sinks. `more` is dq, dk, dv, accumulate and memory of
    `cuflash.flash_attention_backward`."""
    tensors = {"dout": dout, "out": out, "lse": lse, "dlse": dlse, **operands._asdict()}
    return _library(operands.q).backward(tensors, _with_number(options), **more)


def _library(q: torch.Tensor) -> Any:
    return _cpu if q.is_cpu else _cuda


def _with_number(options: Options) -> dict[str, Any]:
    if isinstance(options.seed, torch.Tensor):
        options = options._replace(seed=int(options.seed) % 2**64)
    return options._asdict()


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
