"""What is measured: attention problems, the tables that they make up, and the suites of tables.

A suite is an entry of SUITES: a function that gives its tables, whole for a GPU or reduced for NumPy on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from cuflash import masking

TOKENS, HIDDEN = 16_384, 2_048  # of the suite `paper`: as many sequences as give so many tokens, heads * head_dim
OPERATIONS = {"forward": 1.0, "backward": 2.5, "step": 3.5}  # of a direction, in those of a forward
UNITS = {"speed": "TFLOP/s", "bandwidth": "GB/s", "memory": "MiB", "host": "us", "start": "s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One attention problem: q [batch, q_len, heads, head_dim] over k and v [batch, length, kv_heads, head_dim].

    With `sequences` it is packed: q, k and v are [sum(sequences), heads, head_dim] and `batch` is 1.
    """

    direction: str  # forward, backward, or step: both
    length: int
    head_dim: int
    heads: int
    kv_heads: int
    batch: int = 1
    q_len: int
    causal: bool = True
    sequences: tuple[int, ...] = ()
    dtype: str | None = None  # the device's own

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of q and of k and v."""
        if self.sequences:
            total = sum(self.sequences)
            return (total, self.heads, self.head_dim), (total, self.kv_heads, self.head_dim)
        return (
            (self.batch, self.q_len, self.heads, self.head_dim),
            (self.batch, self.length, self.kv_heads, self.head_dim),
        )

    @property
    def boundaries(self) -> np.ndarray:
        """cu_seqlens of a packed problem, int32 [sequences + 1]."""
        return np.cumsum((0, *self.sequences), dtype=np.int32)

    @property
    def flops(self) -> float:
        """4 * head_dim for every pair that the mask keeps, and 2.5 times that for the backward."""
        mask = masking.causal() if self.causal else masking.full()
        if self.sequences:
            pairs = sum(mask.count(length, length) for length in self.sequences)
        else:
            pairs = self.batch * mask.count(self.q_len, self.length)
        return 4.0 * self.heads * self.head_dim * pairs * OPERATIONS[self.direction]

    @property
    def cell(self) -> dict[str, Any]:
        """The fields of a row of results that say what was measured."""
        return {
            "pass": self.direction,
            "head_dim": self.head_dim,
            "length": self.length,
            "causal": self.causal,
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "q_len": self.q_len,
            "sequences": len(self.sequences) or self.batch,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Problems measured alike, whose results are one file."""

    name: str
    quantity: str  # a key of UNITS
    workloads: tuple[Workload, ...]


def paper(reduced: bool) -> tuple[Table, ...]:
    """The grid of the FlashAttention papers: a fixed number of tokens in sequences of growing length."""
    tokens, hidden = (1_024, 256) if reduced else (TOKENS, HIDDEN)
    lengths = (256, 1_024) if reduced else (512, 2_048, 8_192, 16_384, 32_768)
    head_dims = (64,) if reduced else (64, 128, 256)
    return _directions(
        "",
        [
            _self_attention(length, head_dim, hidden // head_dim, batch=max(1, tokens // length), causal=causal)
            for head_dim, length, causal in product(head_dims, lengths, (False, True))
        ],
    )


def float32(reduced: bool) -> tuple[Table, ...]:
    """The grid of `paper` at two of its lengths, in float32."""
    tables = []
    for table in paper(reduced):
        chosen = (x for x in table.workloads if reduced or x.length in (2_048, 8_192))
        workloads = tuple(replace(x, dtype="float32") for x in chosen)
        tables.append(replace(table, name=f"float32_{table.name}", workloads=workloads))
    return tuple(tables)


def gqa(reduced: bool) -> tuple[Table, ...]:
    """Grouped and multi-query attention: fewer and fewer key/value heads."""
    heads, head_dim, tokens = (4, 64, 1_024) if reduced else (16, 128, TOKENS)
    lengths = (512,) if reduced else (2_048, 8_192, 16_384)
    return _directions(
        "gqa",
        [
            _self_attention(length, head_dim, heads, kv_heads=kv_heads, batch=tokens // length)
            for kv_heads, length in product((2, 1) if reduced else (4, 1), lengths)
        ],
    )


def long(reduced: bool) -> tuple[Table, ...]:
    """One long sequence of few heads."""
    lengths = (2_048,) if reduced else tuple(2**power for power in range(16, 21))
    heads, head_dim = (1, 64) if reduced else (2, 128)
    return _directions("long", [_self_attention(length, head_dim, heads) for length in lengths])


def packed(reduced: bool) -> tuple[Table, ...]:
    """Sequences of very different lengths in one call."""
    tokens, hidden = (1_024, 128) if reduced else (2 * TOKENS, HIDDEN)
    sequences = _documents(tokens, tokens // 16)
    return _directions(
        "packed",
        [
            _self_attention(max(sequences), head_dim, hidden // head_dim, sequences=sequences)
            for head_dim in ((64,) if reduced else (64, 128))
        ],
    )


def decode(reduced: bool) -> tuple[Table, ...]:
    """One query a sequence over a long cache of keys and values: a matter of bandwidth."""
    heads, kv_heads, head_dim = (4, 2, 64) if reduced else (32, 8, 128)
    caches = ((2, 2_048),) if reduced else ((64, 8_192), (16, 32_768), (4, 131_072), (1, 524_288))
    workloads = (
        Workload(
            direction="forward", batch=batch, q_len=1, length=length, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, causal=False,
        )
        for batch, length in caches
    )  # fmt: skip
    return (Table(name="decode", quantity="bandwidth", workloads=tuple(workloads)),)


def memory(reduced: bool) -> tuple[Table, ...]:
    """The most that a forward and backward hold at once beyond their inputs."""
    lengths = (512, 1_024, 2_048) if reduced else tuple(2**power for power in range(13, 21))
    heads, head_dim = (2, 64) if reduced else (16, 128)
    workloads = tuple(_self_attention(length, head_dim, heads, direction="step") for length in lengths)
    return (Table(name="memory", quantity="memory", workloads=workloads),)


def host(_: bool) -> tuple[Table, ...]:
    """What a small call costs the host, and the first calls of a process."""
    workloads = tuple(_self_attention(128, 64, 8, direction=direction) for direction in ("forward", "step"))
    return (
        Table(name="host", quantity="host", workloads=workloads),
        Table(name="start", quantity="start", workloads=(_self_attention(1_024, 64, 8, direction="step"),)),
    )


SUITES: dict[str, Callable[[bool], tuple[Table, ...]]] = {
    "paper": paper,
    "float32": float32,
    "gqa": gqa,
    "long": long,
    "packed": packed,
    "decode": decode,
    "memory": memory,
    "host": host,
}


def _self_attention(
    length: int,
    head_dim: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    batch: int = 1,
    causal: bool = True,
    direction: str = "forward",
    sequences: tuple[int, ...] = (),
) -> Workload:
    return Workload(
        direction=direction, length=length, q_len=length, head_dim=head_dim, heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads, batch=batch, causal=causal, sequences=sequences,
    )  # fmt: skip


def _directions(name: str, workloads: list[Workload]) -> tuple[Table, ...]:
    """A table for each direction; those of the suite `paper` are named by the direction alone."""
    return tuple(
        Table(
            name="_".join(filter(None, (name, direction))),
            quantity="speed",
            workloads=tuple(replace(workload, direction=direction) for workload in workloads),
        )
        for direction in ("forward", "backward")
    )


def _documents(tokens: int, typical: int) -> tuple[int, ...]:
    """Lengths that add up to `tokens`, spread around `typical` as those of documents are; always the same."""
    random = np.random.default_rng(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, 1 + int(random.lognormal(np.log(typical), 0.8))))
    return tuple(lengths)
