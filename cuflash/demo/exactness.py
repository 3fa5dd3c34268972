"""The exactness check: cuflash against float64, measured by the error of a naive computation in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import cuflash
from cuflash import reference
from cuflash.arrays import dtype_of
from cuflash.errors import UnsupportedError

GPU_DTYPES = ("float32", "float16", "bfloat16")
DTYPES = ("float64", *GPU_DTYPES)
# A tiled computation rounds in other places than a naive one: twice the naive error is allowed forward, three times
# backward. In float64 the naive computation is the measure itself and its error zero.
_FACTOR = {"out": 2, "dq": 3, "dk": 3, "dv": 3}
_TINY = 1e-10


@dataclass(frozen=True, slots=True)
class Row:
    """One result compared: the largest absolute errors against float64."""

    dtype: str
    result: str  # out, dq, dk or dv
    error: float  # of cuflash
    naive_error: float  # of the naive computation in the same dtype
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within what is allowed; a NaN never is."""
        return self.error <= self.allowed


def check(xp: Any = np, dtypes: tuple[str, ...] = DTYPES, length: int = 320, seed: int = 0) -> list[Row]:
    """Compare causal attention of 4 heads over 2 key/value heads of 64, forward and backward, on random normal inputs.

    `xp` is numpy or cupy. Four Rows a dtype, the same on every run with the same arguments.

    Raises UnsupportedError for a dtype that this device does not serve.
    """
    rows = []
    for dtype in dtypes:
        q, k, v, dout = _inputs(dtype, length, seed)
        exact = _by_reference(q, k, v, dout, "float64")
        naive = _by_reference(q, k, v, dout, dtype)
        q, k, v, dout = (_on_device(x, xp) for x in (q, k, v, dout))
        out, lse = cuflash.flash_attention(q, k, v, causal=True, return_lse=True)
        computed = (out, *cuflash.flash_attention_backward(dout, q, k, v, out, lse, causal=True))
        for name, right, plain, value in zip(_FACTOR, exact, naive, computed, strict=True):
            naive_error = _error(plain, right)
            allowed = _FACTOR[name] * naive_error + _TINY
            rows.append(Row(dtype, name, _error(_to_numpy(value), right), naive_error, allowed))
    return rows


def check_served(xp: Any, dtypes: tuple[str, ...], length: int = 320) -> tuple[list[Row], dict[str, str]]:
    """As `check`: the Rows of the dtypes that this device serves, and the reason for each that it does not."""
    found = {dtype: _rows_or_reason(xp, dtype, length) for dtype in dtypes}
    rows = [row for result in found.values() if isinstance(result, list) for row in result]
    return rows, {dtype: reason for dtype, reason in found.items() if isinstance(reason, str)}


def _rows_or_reason(xp: Any, dtype: str, length: int) -> list[Row] | str:
    try:
        return check(xp, (dtype,), length)
    except UnsupportedError as error:  # such as bfloat16 on Turing
        return str(error)


def _inputs(dtype: str, length: int, seed: int) -> list[np.ndarray]:
    """q, k, v and dout, rounded to the dtype."""
    random = np.random.default_rng(seed)
    return [random.standard_normal((1, length, heads, 64)).astype(dtype_of(dtype)) for heads in (4, 2, 2, 4)]


def _on_device(x: np.ndarray, xp: Any) -> Any:
    try:
        return xp.asarray(x)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(f"{xp.__name__} {xp.__version__} knows no {x.dtype} ({error})") from error


def _by_reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, dtype: str) -> tuple[np.ndarray, ...]:
    out, _ = reference.attention(q, k, v, causal=True, dtype=dtype_of(dtype))
    return (out, *reference.attention_backward(dout, q, k, v, causal=True, dtype=dtype_of(dtype)))


def _error(value: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(value.astype(np.float64) - right).max())


def _to_numpy(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()
