"""Standard attention: the whole score matrix in memory, written well over an array module. The baseline of the demo.

`xp` is numpy or cupy. The two products are batched matrix products, the softmax works in place, the backward keeps the
probabilities P of the forward and needs one more matrix of that size, dP, which becomes dS in place:

    S = scale * Q K^T    P = softmax(S)    O = P V                        [batch, heads, q_len, kv_len] twice
    dV = P^T dO    dP = dO V^T    dS = P * (dP - D), D = rowsum(dO * O)    dQ = scale * dS K    dK = scale * dS^T Q
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, xp: Any = np) -> tuple[Any, Any]:
    """Attention of q, k, v, each [batch, len, heads, head_dim] of one dtype: (out, probabilities).

    `out` is [batch, len, heads, head_dim], `probabilities` [batch, heads, len, len]; both have the dtype that came in.
    """
    q, k, v = (_head_major(x) for x in (q, k, v))
    scores = _product(xp, q, k.swapaxes(-1, -2))
    scores *= scores.dtype.type(1 / math.sqrt(q.shape[-1]))
    if causal:
        length = q.shape[-2]
        later = xp.arange(length)[None, :] > xp.arange(length)[:, None]
        xp.copyto(scores, -math.inf, where=later)
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    # Half-precision sums run over thousands of terms: accumulate them in float32.
    total = scores.sum(axis=-1, keepdims=True, dtype=_accumulator(scores.dtype))
    scores /= total.astype(scores.dtype)
    return _head_major(_product(xp, scores, v)), scores


def attention_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, probabilities: Any, *, xp: Any = np
) -> tuple[Any, Any, Any]:
    """Gradients (dq, dk, dv) of `attention` given dout and its two results; shapes and dtype of q, k and v."""
    dout, q, k, v, out = (_head_major(x) for x in (dout, q, k, v, out))
    dv = _product(xp, probabilities.swapaxes(-1, -2), dout)
    dscores = _product(xp, dout, v.swapaxes(-1, -2))  # dP
    dscores -= (dout * out).sum(axis=-1, keepdims=True, dtype=_accumulator(out.dtype)).astype(out.dtype)
    dscores *= probabilities
    scale = dscores.dtype.type(1 / math.sqrt(q.shape[-1]))
    dq = _product(xp, dscores, k) * scale
    dk = _product(xp, dscores.swapaxes(-1, -2), q) * scale
    return _head_major(dq), _head_major(dk), _head_major(dv)


def peak_bytes(batch: int, heads: int, length: int, head_dim: int, itemsize: int) -> int:
    """Bytes that forward and backward hold at once beyond q, k, v and dout: P and dP, and out, dv, dq, dk besides."""
    return batch * heads * length * (2 * length + 4 * head_dim) * itemsize


def _head_major(x: Any) -> Any:
    """[batch, len, heads, head_dim] <-> [batch, heads, len, head_dim], as a view."""
    return x.swapaxes(1, 2)


def _accumulator(dtype: Any) -> Any:
    return np.dtype("float32") if dtype.itemsize == 2 else dtype


def _product(xp: Any, a: Any, b: Any) -> Any:
    """The batched matrix product [..., rows, cols], two-byte types accumulated in float32, without large copies.

    NumPy has no BLAS for two-byte types. CuPy's batched product would copy a transposed operand, and a two-byte one
    into float32; its product of two matrices does neither.
    """
    if xp is np and a.dtype.itemsize == 2:
        return np.matmul(a.astype("float32"), b.astype("float32")).astype(a.dtype)
    if xp is np:
        return np.matmul(a, b)
    product = xp.empty((*a.shape[:-1], b.shape[-1]), a.dtype)
    for index in np.ndindex(*a.shape[:-2]):
        xp.matmul(a[index], b[index], out=product[index])
    return product
