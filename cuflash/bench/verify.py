"""Before anything is timed: every contestant's results against cuflash's, and some rows against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash import masking
from cuflash.bench.contestant import Inputs
from cuflash.bench.workloads import Workload

# Norm of the difference over the norm. Two bfloat16 results differ by 2e-3 to 5e-3; the roundings of float16 and
# float32 are 8 and 65,536 times smaller.
ALLOWED = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
ROWS = 16  # query rows of one head, about, that are computed in float64
_PIECE = 65_536  # tokens compared at a time


class WrongResult(Exception):
    """A contestant's result is not attention's; nothing of the problem has been timed."""


@dataclass(frozen=True, slots=True)
class ExactRows:
    """Rows of out (of a forward) or of dq, in float64."""

    index: tuple[Any, ...]  # where they stand in the result
    values: np.ndarray  # [rows, head_dim]


def exact_rows(workload: Workload, inputs: Inputs) -> ExactRows:
    """Rows of the last head of the last sequence, of the longest where they are packed.

    They are spread over the last three quarters: the first rows of a causal dq are all but zero, and rounding errors.

        S = scale * q K^T    P = softmax(S)    out = P V    dq = scale * (P * (dout V^T - rowsum(dout * out))) K
    """
    if workload.sequences:
        longest = int(np.argmax(workload.sequences))
        start, q_len = int(workload.boundaries[longest]), workload.sequences[longest]
        length = q_len
        sequence: tuple[Any, ...] = (slice(start, start + length),)
    else:
        start, q_len, length = 0, workload.q_len, workload.length
        sequence = (workload.batch - 1, slice(None))
    head = workload.heads - 1
    first = q_len // 4
    step = max(1, (q_len - first) // ROWS)
    rows = np.arange(first, q_len, step)
    index = (*sequence[:-1], slice(start + first, start + q_len, step), head)
    keys = (*sequence, head * workload.kv_heads // workload.heads)
    q, dout = (_float64(x[index]) for x in (inputs.q, inputs.dout))
    k, v = (_float64(x[keys]) for x in (inputs.k, inputs.v))
    mask = masking.causal() if workload.causal else masking.full()
    scale = 1 / math.sqrt(workload.head_dim)
    scores = scale * q @ k.T  # [rows, length]
    scores[~mask.allowed(rows[:, None] + length - q_len, np.arange(length)[None])] = -np.inf
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    out = probabilities @ v
    if workload.direction == "forward":
        return ExactRows(index, out)
    delta = (dout * out).sum(axis=1, keepdims=True)
    return ExactRows(index, scale * (probabilities * (dout @ v.T - delta)) @ k)


def check(name: str, results: Sequence[Any], ours: Sequence[Any], exact: ExactRows) -> float:
    """The largest error of `exact`'s rows in `results`, arrays of NumPy or CuPy as are `ours`, cuflash's.

    Raises WrongResult where a result differs from cuflash's, or a row from float64, by more than ALLOWED.
    """
    allowed = ALLOWED[str(results[0].dtype)]
    for part, mine, theirs in zip(("out",) if len(ours) == 1 else ("dq", "dk", "dv"), ours, results, strict=True):
        difference = _difference(theirs, mine)
        if not difference <= allowed:
            raise WrongResult(f"{part} of {name} differs from cuflash's by {difference:.1e}; allowed: {allowed:.0e}")
    rows = _float64(results[0][exact.index])
    difference = float(np.linalg.norm(rows - exact.values) / np.linalg.norm(exact.values))
    if not difference <= allowed:
        raise WrongResult(f"{name} differs from float64 by {difference:.1e}; allowed: {allowed:.0e}")
    return float(np.abs(rows - exact.values).max())


def _difference(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of `b`, [..., len, heads, head_dim]; summed over pieces of the length."""
    if a.shape != b.shape:
        raise WrongResult(f"shape {a.shape}; expected: {b.shape}")
    above = below = 0.0
    for start in range(0, a.shape[-3], _PIECE):
        x, y = (z[..., start : start + _PIECE, :, :].astype("float32") for z in (a, b))
        above += float(((x - y) ** 2).sum())
        below += float((y**2).sum())
    return math.sqrt(above / below) if below else math.inf


def _float64(x: Any) -> np.ndarray:
    return (x if isinstance(x, np.ndarray) else x.get()).astype(np.float64)
