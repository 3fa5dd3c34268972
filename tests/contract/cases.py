"""The one list of cases: what every backend and adapter must compute, and what the benchmarks may draw from.

A `Case` is a value: sizes, options and how the arrays lie in memory. `make_inputs` makes its arrays, the same on every
machine. The list is every pair of values of every two options in every dtype (`pairwise`), and edges by name.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    dtype: str = "float32"
    batch: int = 2
    q_len: int = 17
    kv_len: int = 17
    sequences: tuple[tuple[int, int], ...] | None = None  # packed: (q_len, kv_len) of each, instead of the three above
    tail: int = 0  # packed: rows of NaN beyond the last sequence
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 16

    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None  # "heads": float32 [heads]; "batch": q's dtype [batch, heads]
    sinks: str | None = None  # their dtype: "float32" or "same"
    bias: str | None = None  # by which of DENSE it is broadcast; it masks a few pairs
    bias_dtype: str = "float32"  # or "same"
    mask: str | None = None  # the same, of bool
    dropout_p: float = 0.0
    seed: int | None = None
    deterministic: bool = False
    layout: str = "bshd"
    memory: str = "fast"

    cu_seqlens_dtype: str = "int32"
    strides: str = "contiguous"  # see `lay_out`
    dlse: bool = False
    gradients: str = "new"  # dq, dk, dv: "new", "given" full of NaN, or "added to"
    gradients_dtype: str = "same"  # of given ones: "same" or "float32" (which is float64 for float64 inputs)

    @property
    def accumulation_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"


# The axes of [batch, heads, q_len, kv_len] that a bias or a mask has; the others are of length 1, or not there at all
# where all before the first are.
DENSE = {"full": "bhqk", "heads": "hqk", "batch": "bqk", "keys": "bk", "queries": "q", "number": ""}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arrays of a case. `options` go to forward and backward, to the oracle too; the rest to the backward."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray | None
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, np.ndarray] = field(default_factory=dict)  # dq, dk and dv as they are before the backward


def make_inputs(case: Case) -> Inputs:
    """Arrays of standard normal numbers; equal cases give equal arrays."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype = DTYPES[case.dtype]
    batch = case.batch if case.sequences is None else len(case.sequences)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    options: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window_size,
        "scale": case.scale,
        "softcap": case.softcap,
        "dropout_p": case.dropout_p,
        "seed": case.seed,
        "layout": case.layout,
    }
    if case.sequences is None:
        q_shape, kv_shape, lse_shape = (batch, case.q_len), (batch, case.kv_len), (batch, case.heads, case.q_len)
    else:
        bounds = np.cumsum([(0, 0), *case.sequences], axis=0).astype(case.cu_seqlens_dtype)
        options["cu_seqlens_q"], options["cu_seqlens_k"] = bounds.T.copy()
        q_total, kv_total = (int(total) + case.tail for total in bounds[-1])
        q_shape, kv_shape, lse_shape = (q_total,), (kv_total,), (case.heads, q_total)
    if case.alibi == "heads":
        options["alibi_slopes"] = np.linspace(0.02, 0.5, case.heads, dtype=np.float32)
    elif case.alibi == "batch":
        options["alibi_slopes"] = np.linspace(0.02, 0.5, batch * case.heads).reshape(batch, case.heads).astype(dtype)
    if case.sinks is not None:
        options["sinks"] = rng.standard_normal(case.heads).astype(dtype if case.sinks == "same" else np.float32)

    options |= _dense(case)

    q = normal(*q_shape, case.heads, case.head_dim)
    k = normal(*kv_shape, case.kv_heads, case.head_dim)
    v = normal(*kv_shape, case.kv_heads, case.head_dim_v)
    dout = normal(*q_shape, case.heads, case.head_dim_v)
    dlse = rng.standard_normal(lse_shape).astype(case.accumulation_dtype) if case.dlse else None
    if case.tail:
        for rows in (q, k, v, dout):
            rows[-case.tail :] = np.nan
        if dlse is not None:
            dlse[:, -case.tail :] = np.nan

    given = {}
    if case.gradients != "new":
        for name, like in (("dq", q), ("dk", k), ("dv", v)):
            given[name] = normal(*like.shape) if case.gradients == "added to" else np.full(like.shape, np.nan)
            given[name] = given[name].astype(dtype if case.gradients_dtype == "same" else case.accumulation_dtype)
    # Only k and v are broadcast: a head axis of stride 0 would give the query heads nothing to differ in, and outputs
    # may not overlap themselves.
    own_strides = "contiguous" if case.strides == "broadcast" else case.strides
    return Inputs(
        q=lay_out(q, case.layout, own_strides),
        k=lay_out(k, case.layout, case.strides),
        v=lay_out(v, case.layout, case.strides),
        dout=lay_out(dout, case.layout, own_strides),
        dlse=dlse,
        options=options,
        given={name: lay_out(array, case.layout, own_strides) for name, array in given.items()},
    )


def _dense(case: Case) -> dict[str, np.ndarray]:
    """The bias and the mask."""
    rng = np.random.default_rng(zlib.crc32(f"{case.name}, dense".encode()))
    dense: dict[str, np.ndarray] = {}

    def shape(kind: str) -> tuple[int, ...]:
        lengths = dict(zip("bhqk", (case.batch, case.heads, case.q_len, case.kv_len), strict=True))
        first = "bhqk".index(DENSE[kind][0]) if kind != "number" else 4
        return tuple(lengths[axis] if axis in DENSE[kind] else 1 for axis in "bhqk"[first:])

    if case.bias is not None:
        bias = rng.standard_normal(shape(case.bias))
        if bias.size > 1:
            bias[rng.random(bias.shape) < 0.05] = -np.inf
        dense["bias"] = bias.astype(DTYPES[case.dtype] if case.bias_dtype == "same" else np.float32)
    if case.mask is not None:
        dense["mask"] = np.asarray(rng.random(shape(case.mask)) < 0.7)
    return dense


def lay_out(array: np.ndarray, layout: str, strides: str) -> np.ndarray:
    """The array [..., len, heads, dim] in the layout asked for, lying in memory as `strides` says:

    "contiguous"; "transposed", a view of the other layout's memory; "slice", of a bigger array that is NaN all around;
    "reversed", the third axis from the end at a negative stride; "broadcast", every head is the first, at stride 0.
    """
    if layout == "bhsd":
        array = array.swapaxes(-3, -2)
    if strides == "contiguous":
        return np.ascontiguousarray(array)
    if strides == "transposed":
        return np.ascontiguousarray(array.swapaxes(-3, -2)).swapaxes(-3, -2)
    if strides == "reversed":
        return np.ascontiguousarray(array[..., ::-1, :, :])[..., ::-1, :, :]
    if strides == "broadcast":
        first = array[..., :1, :] if layout == "bshd" else array[..., :1, :, :]
        return np.broadcast_to(first, array.shape)
    assert strides == "slice"
    inner = np.full([length + 3 for length in array.shape], np.nan, array.dtype)[(slice(1, -2),) * array.ndim]
    inner[...] = array
    return inner


# ---- the list ----------------------------------------------------------------------------------------------------

PACKED: dict[str, Any] = {"sequences": ((17, 40), (0, 7), (33, 33), (5, 0), (60, 21)), "tail": 3}

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "mask": [
        {},
        {"causal": True},
        {"window_size": (20, 5)},
        {"window_size": (None, 3)},
        {"window_size": (10, None)},
        {"causal": True, "window_size": (16, 4)},
    ],
    "lengths": [
        {"q_len": 17, "kv_len": 17},
        {"q_len": 128, "kv_len": 128},
        {"q_len": 129, "kv_len": 65},
        {"q_len": 40, "kv_len": 150},
        PACKED,
        {**PACKED, "cu_seqlens_dtype": "int64"},
    ],
    "dims": [
        {"head_dim": 8, "head_dim_v": 8},
        {"head_dim": 40, "head_dim_v": 40},
        {"head_dim": 64, "head_dim_v": 64},
        {"head_dim": 72, "head_dim_v": 72},
        {"head_dim": 128, "head_dim_v": 128},
        {"head_dim": 192, "head_dim_v": 128},
        {"head_dim": 64, "head_dim_v": 96},
        {"head_dim": 136, "head_dim_v": 192},
        {"head_dim": 256, "head_dim_v": 256},
    ],
    "heads": [{"heads": 2, "kv_heads": 2}, {"heads": 4, "kv_heads": 2}, {"heads": 3, "kv_heads": 1}],
    "scale": [{}, {"scale": 0.3}],
    "softcap": [{}, {"softcap": 2.0}],
    "alibi": [{}, {"alibi": "heads"}, {"alibi": "batch"}],
    "sinks": [{}, {"sinks": "float32"}, {"sinks": "same"}],
    "dropout": [{}, {"dropout_p": 0.2, "seed": 1234}],
    "layout": [{"layout": "bshd"}, {"layout": "bhsd"}],
    "strides": [{"strides": how} for how in ("contiguous", "transposed", "slice", "broadcast")],
    "dlse": [{}, {"dlse": True}],
    "gradients": [
        {"gradients": "new"},
        {"gradients": "given"},
        {"gradients": "given", "gradients_dtype": "float32"},
        {"gradients": "added to"},
        {"gradients": "added to", "gradients_dtype": "float32"},
    ],
    "deterministic": [{}, {"deterministic": True}],
    "memory": [{"memory": "fast"}, {"memory": "lean"}],
}

EDGES: dict[str, dict[str, Any]] = {
    "one query, one key": {"q_len": 1, "kv_len": 1, "dlse": True},
    "one query": {"q_len": 1, "kv_len": 300, "causal": True},
    "one key": {"q_len": 300, "kv_len": 1},
    "ragged 127": {"q_len": 127, "kv_len": 127, "causal": True},
    "ragged 129": {"q_len": 129, "kv_len": 129, "causal": True},
    "ragged 300": {"q_len": 300, "kv_len": 300, "causal": True, "batch": 1},
    "several tiles": {"q_len": 600, "kv_len": 1100, "causal": True, "batch": 1, "heads": 1, "kv_heads": 1},
    "several tiles, window": {"q_len": 1100, "kv_len": 1100, "window_size": (300, 20), "batch": 1, "dlse": True},
    "several tiles, deterministic": {
        "q_len": 600,
        "kv_len": 1100,
        "causal": True,
        "batch": 1,
        "head_dim": 128,
        "head_dim_v": 128,
        "deterministic": True,
    },
    "several tiles, lean": {
        "q_len": 600,
        "kv_len": 500,
        "window_size": (200, 100),
        "batch": 1,
        "head_dim": 256,
        "head_dim_v": 256,
        "memory": "lean",
    },
    "both sides of the diagonal": {
        "q_len": 500,
        "kv_len": 700,
        "batch": 1,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "alibi": "heads",
        "dlse": True,
    },
    "both sides of the diagonal, wide": {
        "q_len": 300,
        "kv_len": 200,
        "batch": 1,
        "head_dim": 192,
        "head_dim_v": 192,
        "window_size": (100, 150),
        "alibi": "batch",
    },
    "both sides of the diagonal, packed": {
        "sequences": ((300, 500), (3, 400), (257, 129)),
        "head_dim": 128,
        "head_dim_v": 128,
        "alibi": "batch",
        "tail": 5,
    },
    "few queries": {"q_len": 1, "kv_len": 2100, "heads": 8, "kv_heads": 2, "head_dim": 128, "head_dim_v": 128},
    "few queries, everything": {
        "q_len": 5,
        "kv_len": 1500,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 40,
        "head_dim_v": 72,
        "causal": True,
        "softcap": 3.0,
        "alibi": "batch",
        "sinks": "float32",
        "dlse": True,
        "deterministic": True,
    },
    "few queries, window": {
        "q_len": 33,
        "kv_len": 3000,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 64,
        "head_dim_v": 64,
        "window_size": (1200, 100),
        "alibi": "heads",
        "sinks": "same",
        "layout": "bhsd",
    },
    "few queries, narrow": {
        "q_len": 3,
        "kv_len": 1100,
        "batch": 1,
        "head_dim": 33,
        "head_dim_v": 7,
        "causal": True,
        "strides": "slice",
    },
    "few queries, wide": {"q_len": 2, "kv_len": 1030, "batch": 1, "head_dim": 256, "head_dim_v": 200, "causal": True},
    "fully masked rows": {"q_len": 300, "kv_len": 128, "causal": True, "dlse": True},
    "fully masked rows, sinks": {"q_len": 300, "kv_len": 128, "causal": True, "dlse": True, "sinks": "float32"},
    "fully masked rows, window": {"q_len": 129, "kv_len": 40, "window_size": (3, 2), "dlse": True},
    "window of one": {"q_len": 65, "kv_len": 65, "window_size": (0, 0)},
    "window wider than all": {"q_len": 40, "kv_len": 65, "window_size": (1000, 1000)},
    "window without bounds": {"q_len": 40, "kv_len": 65, "window_size": (None, None)},
    "empty batch": {"batch": 0, "sinks": "float32"},
    "no queries": {"q_len": 0, "kv_len": 17, "causal": True},
    "no keys": {"q_len": 17, "kv_len": 0, "dlse": True},
    "no keys but a sink": {"q_len": 17, "kv_len": 0, "sinks": "float32", "dlse": True},
    "no sequences": {"sequences": (), "tail": 5},
    "empty sequences alone": {"sequences": ((0, 0), (0, 0)), "tail": 2},
    "sequences without keys": {"sequences": ((4, 0), (0, 3), (2, 2)), "dlse": True},
    "packed, ragged": {"sequences": ((1, 1), (17, 17), (127, 127), (128, 128), (129, 129)), "causal": True},
    "packed, long tail": {"sequences": ((20, 30), (30, 20)), "tail": 300, "causal": True, "dlse": True},
    "packed, several tiles": {
        "sequences": ((600, 700), (1, 400), (257, 129), (130, 64)),
        "causal": True,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 128,
        "head_dim_v": 128,
        "tail": 5,
    },
    "packed, several tiles, in order": {
        "sequences": ((500, 400), (3, 300), (385, 385)),
        "window_size": (200, 100),
        "head_dim": 64,
        "head_dim_v": 64,
        "dlse": True,
        "deterministic": True,
    },
    "packed, several tiles, lean": {
        "sequences": ((300, 500), (129, 128)),
        "window_size": (None, 100),
        "head_dim": 256,
        "head_dim_v": 256,
        "memory": "lean",
    },
    "packed, many": {
        "sequences": tuple((n * 37 % 90, n * 53 % 70) for n in range(70)),
        "causal": True,
        "head_dim": 64,
        "head_dim_v": 64,
        "sinks": "float32",
    },
    "one key head for eight": {"heads": 8, "kv_heads": 1, "causal": True},
    "head_dim 1": {"head_dim": 1, "head_dim_v": 1},
    "head_dim 7 and 33": {"head_dim": 7, "head_dim_v": 33},
    "head_dim 8 and 256": {"head_dim": 8, "head_dim_v": 256},
    "head_dim 256 and 8": {"head_dim": 256, "head_dim_v": 8},
    "head_dim 200 and 120": {"q_len": 129, "kv_len": 300, "head_dim": 200, "head_dim_v": 120, "causal": True},
    "head_dim 256 and 152": {"q_len": 129, "kv_len": 300, "head_dim": 256, "head_dim_v": 152, "window_size": (150, 9)},
    "large scores": {"q_len": 65, "kv_len": 65, "scale": 4.0},
    "negative scale": {"scale": -0.5},
    "scale zero": {"scale": 0.0},
    "saturated softcap": {"q_len": 65, "kv_len": 65, "scale": 2.0, "softcap": 0.5},
    "much dropout": {"q_len": 65, "kv_len": 65, "dropout_p": 0.9, "seed": 0},
    "largest seed": {"dropout_p": 0.5, "seed": 2**64 - 1, "causal": True},
    "dropout by sequence": {"sequences": ((33, 33), (20, 40)), "dropout_p": 0.3, "seed": 7, "causal": True},
    "reversed": {"strides": "reversed", "causal": True, "gradients": "given"},
    "reversed, bhsd": {"strides": "reversed", "layout": "bhsd", "gradients": "added to"},
    "everything": {
        **PACKED,
        "heads": 4,
        "head_dim": 40,
        "head_dim_v": 24,
        "causal": True,
        "window_size": (12, None),
        "scale": 0.2,
        "softcap": 3.0,
        "alibi": "batch",
        "sinks": "float32",
        "dropout_p": 0.1,
        "seed": 99,
        "layout": "bhsd",
        "strides": "slice",
        "dlse": True,
        "gradients": "added to",
        "gradients_dtype": "float32",
        "deterministic": True,
        "memory": "lean",
    },
}


def pairwise(options: dict[str, list[Any]], seed: int) -> list[dict[str, Any]]:
    """Choices that together hold every pair of values of every two options: greedy, the same on every run."""
    rng = random.Random(seed)
    missing = {
        pair: None  # a dict, because a set's order differs from run to run
        for (a, a_values), (b, b_values) in combinations(options.items(), 2)
        for pair in (((a, i), (b, j)) for i in range(len(a_values)) for j in range(len(b_values)))
    }
    order = {option: place for place, option in enumerate(options)}

    def gain(choice: dict[str, int], option: str, value: int) -> int:
        ends = ((option, value),)
        pairs = (tuple(sorted((*ends, other), key=lambda end: order[end[0]])) for other in choice.items())
        return sum(pair in missing for pair in pairs)

    rows = []
    while missing:
        choice = dict(next(iter(missing)))
        for option in rng.sample(list(options), len(options)):
            if option not in choice:
                values = rng.sample(range(len(options[option])), len(options[option]))
                choice[option] = max(values, key=lambda value: gain(choice, option, value))
        for a, b in combinations(options, 2):
            missing.pop(((a, choice[a]), (b, choice[b])), None)
        rows.append({option: options[option][value] for option, value in choice.items()})
    return rows


def _cases() -> list[Case]:
    cases = []
    for seed, dtype in enumerate(DTYPES):
        for number, choice in enumerate(pairwise(OPTIONS, seed)):
            fields = {name: value for values in choice.values() for name, value in values.items()}
            cases.append(Case(name=f"{dtype}-pairs {number}", dtype=dtype, **fields))
        cases += [Case(name=f"{dtype}-{name}", dtype=dtype, **fields) for name, fields in EDGES.items()]
    return cases


CASES = _cases()
