"""The problem as frozen values: `Spec` is what a kernel's code depends on, `Tile` how it is cut, `Problem` one call.

A Spec renders itself as the C++ constexpr text that stands at the top of a compiled kernel, so the rendered
source is the whole cache key. Lengths, strides and scalar values are run-time parameters and live in Problem.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from cuflash.masking import Mask

DTYPES = ("float16", "bfloat16", "float32", "float64")


def _render(value: object, type_name: str, constant: str) -> str:
    """One frozen value as a C++20 constexpr with designated initialisers."""
    lines = []
    for field in fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        if isinstance(item, bool):
            text = "true" if item else "false"
        elif isinstance(item, str):
            text = f"{field.name.capitalize()}::{item}"
        else:
            text = str(item)
        lines.append(f"    .{field.name} = {text},\n")
    return f"constexpr {type_name} {constant}{{\n{''.join(lines)}}};\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is computed, as far as the code of a kernel depends on it."""

    dtype: str  # of q, k, v and the result: one of DTYPES
    head_dim: int
    head_dim_v: int
    bounded_left: bool = False  # the mask has a left bound
    bounded_right: bool = False  # the mask has a right bound (causal is the bound 0)
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    bias: bool = False
    mask: bool = False  # a dense boolean one
    packed: bool = False  # sequences are delimited by cu_seqlens
    dropout: bool = False
    deterministic: bool = False
    lean: bool = False  # the backward uses no workspace for dQ
    allow_tf32: bool = False  # float32 numbers as one term with the mantissa of TF32 instead of two
    parts: bool = False  # few queries: their heads share tiles, and thread blocks share the keys (forward_combine.cu)

    def render(self) -> str:
        """`constexpr Spec SPEC{...};` with every field named."""
        return _render(self, "Spec", "SPEC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a kernel cuts the score matrix S [q_len, kv_len]."""

    rows: int  # queries a tile
    cols: int  # keys a tile
    stages: int = 1  # tiles in flight
    warps: int = 4
    split: int = 1  # warps that share rows and divide the head dimension of the accumulators
    blocks: int = (
        0  # thread blocks that must fit on a multiprocessor: bounds the registers; 0 leaves it to the compiler
    )
    p_sets: int = 1  # register sets of P in the Hopper forward: with two the steady state needs no row maximum
    q_slots: int = 0  # pieces of 64 rows of Q in shared memory of the Hopper forward
    turns: bool = False  # the warpgroups of the Hopper forward issue their products in turn
    staged: bool = False  # O of the Hopper forward goes to memory through shared memory
    vector: int = 16  # bytes one copy instruction moves: 16, or an element's where alignment allows no more

    def render(self) -> str:
        """`constexpr Tile TILE{...};` with every field named."""
        return _render(self, "Tile", "TILE")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """One call, validated: the Spec and the run-time values that a backend takes as parameters.

    Compared by identity: equal calls get the same Problem, and backends keep what they prepare for it under it.

    Arrays reach a backend head-minor, [batch, len, heads, dim] or packed [total, heads, dim], whatever layout the
    caller used; `q_len` and `kv_len` are then the packed totals.
    """

    spec: Spec
    mask: Mask
    batch: int  # sequences
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    scale: float
    softcap: float | None
    dropout_p: float
    seed: int

    @property
    def statistics(self) -> int:
        """Elements of the LSE: one for each query row of each head."""
        return self.heads * self.q_len * (1 if self.spec.packed else self.batch)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


class Extras(NamedTuple):
    """The optional arrays of a call; None where the option is not used."""

    alibi_slopes: Any = None  # [heads] or [batch, heads]
    sinks: Any = None  # [heads]
    cu_seqlens_q: Any = None  # [sequences + 1]
    cu_seqlens_k: Any = None
    bias: Any = None  # [batch, heads, q_len, kv_len], an axis of length 1 where it is broadcast
    mask: Any = None  # the same, bool: True may attend
