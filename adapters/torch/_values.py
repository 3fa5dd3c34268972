"""A call as values: its tensors and its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

DTYPE_NAMES = {
    getattr(torch, name): name
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64"),
        *("int8", "int16", "int32", "int64", "uint8", "bool"),
    )
}


class Operands(NamedTuple):
    """The tensors of a call, in the order in which everything here passes them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None


# The tensors of a call on its way to a backend: all of Operands, or q, k and v alone where there are no others, which
# takes less time to look at.
Given = Sequence[Any]


def differentiated(operands: Given, with_dbias: bool) -> Given:
    """Those that have gradients, in the order of these."""
    if len(operands) == 3:
        return operands
    named = Operands(*operands)
    return [x for x in (*named[:3], named.sinks, named.bias if with_dbias else None) if x is not None]


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
