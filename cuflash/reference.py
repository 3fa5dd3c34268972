"""The one naive attention that all else is checked against: dense, a loop over sequences and heads, every option.

The same code serves two purposes. With dtype=float64 it is the oracle. With a smaller dtype it is what a framework's
naive attention does in that dtype: each stage (S, softcapped S, P, O, dP, dS, ...) is computed in float32 and its
result rounded to the dtype. The error of that naive computation is what the tests' tolerances are made of.

One head, with whole matrices [q_len, kv_len]:

    S = scale * Q K^T;  S = softcap * tanh(S / softcap);  S = S - slope * |q_pos - kv_pos|
    S = S + bias;  S = -inf where masked
    LSE = log(exp(sink) + sum_j exp(S_j));  P = exp(S - LSE);  P' = keep * P / (1 - dropout_p);  O = P' V

    dV = P'^T dO;  dP = keep * (dO V^T) / (1 - dropout_p);  D = rowsum(dO * O)
    dS = P * (dP - D + dLSE);  dbias = dS;  dsink = sum_i exp(sink - LSE_i) * (dLSE_i - D_i)
    dS = dS * (1 - tanh^2);  dQ = scale * dS K;  dK = scale * dS^T Q

A masked pair contributes exactly nothing, even where K or V hold NaN or Inf: it is left out, not multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cuflash import masking
from cuflash.dropout import keep_mask


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword options of both functions; they mean what they mean in `cuflash.flash_attention`."""

    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    scale: float | None = None  # None is 1 / sqrt(head_dim)
    softcap: float | None = None
    alibi_slopes: np.ndarray | None = None  # [heads] or [batch, heads]
    sinks: np.ndarray | None = None  # [heads]
    bias: np.ndarray | None = None  # broadcasts to [batch, heads, q_len, kv_len]; -inf masks
    mask: np.ndarray | None = None  # the same, bool: True may attend
    cu_seqlens_q: np.ndarray | None = None  # [batch + 1]
    cu_seqlens_k: np.ndarray | None = None  # [batch + 1]
    dropout_p: float = 0.0
    seed: int | None = None
    layout: str = "bshd"

    @property
    def bounds(self) -> masking.Mask:
        mask = masking.causal() if self.causal else masking.full()
        return mask if self.window_size is None else mask & masking.window(*self.window_size)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, dtype: Any = np.float64, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Naive attention with the keyword options of `Options`: (out, lse).

    q [batch, q_len, heads, head_dim], k [batch, kv_len, kv_heads, head_dim], v [batch, kv_len, kv_heads, head_dim_v];
    layout "bhsd" has heads before positions; packed arrays have no batch axis. `out` is shaped as q with head_dim_v, of
    type `dtype`; `lse` is [batch, heads, q_len], packed [heads, total], natural log, float64 for float64, else float32.
    Rows beyond cu_seqlens_q[-1] belong to no sequence: output 0, LSE -inf.
    """
    settings = Options(**options)
    dtype = np.dtype(dtype)
    out = np.zeros(q.shape[:-1] + v.shape[-1:], dtype)
    lse = np.full(_lse_shape(q, settings), -np.inf, _work_dtype(dtype))
    outs = _sequences(out, settings.cu_seqlens_q, settings.layout)
    lses = _lse_sequences(lse, settings.cu_seqlens_q)
    for sequence, index, _, head in _heads(q, k, v, settings, dtype):
        stages = head.forward()
        outs[sequence][index] = stages.out
        lses[sequence][index] = stages.lse
    return out, lse


def attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    dtype: Any = np.float64,
    **options: Any,
) -> tuple[np.ndarray, ...]:
    """Gradients of sum(out * dout) + sum(lse * dlse): (dq, dk, dv), then dsinks with sinks and dbias with bias, of type
    `dtype`.

    `dout` is shaped as out and `dlse` as lse, the gradients as q, k, v, sinks and bias. A row that may attend to
    nothing and has no sink has zero gradients whatever its dout and dlse.
    """
    settings = Options(**options)
    dtype = np.dtype(dtype)
    # Query heads of a group add into one dk and dv, sequences into one dsinks: summed here before the last rounding.
    dq, dk, dv = (np.zeros(x.shape, _work_dtype(dtype)) for x in (q, k, v))
    dsinks = np.zeros(_lse_shape(q, settings)[-2], _work_dtype(dtype))
    dbias = None if settings.bias is None else np.zeros(settings.bias.shape, _work_dtype(dtype))
    if dlse is None:
        dlse = np.zeros(_lse_shape(q, settings), _work_dtype(dtype))

    douts, dqs = (_sequences(x, settings.cu_seqlens_q, settings.layout) for x in (dout, dq))
    dks, dvs = (_sequences(x, settings.cu_seqlens_k, settings.layout) for x in (dk, dv))
    dlses = _lse_sequences(dlse, settings.cu_seqlens_q)
    for sequence, index, kv_index, head in _heads(q, k, v, settings, dtype):
        head_dq, head_dk, head_dv, head_dsink, head_dbias = head.backward(
            douts[sequence][index], dlses[sequence][index]
        )
        dqs[sequence][index] = head_dq
        dks[sequence][kv_index] += head_dk
        dvs[sequence][kv_index] += head_dv
        dsinks[index] += head_dsink
        if dbias is not None:
            _add_broadcast(dbias, sequence, index, head_dbias)

    gradients = (dq, dk, dv, None if settings.sinks is None else dsinks, dbias)
    return tuple(_keep(x, dtype).astype(dtype) for x in gradients if x is not None)


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """What the forward of one head computes on its way; the matrices are [q_len, kv_len]."""

    tanh: np.ndarray | None  # of S / softcap
    probabilities: np.ndarray  # P, zero where masked
    dropped: np.ndarray  # P', what multiplies V
    out: np.ndarray  # [q_len, head_dim_v]
    lse: np.ndarray  # [q_len], never rounded below float32


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The attention of one head of one sequence, in the working precision, each stage rounded to `dtype`."""

    q: np.ndarray  # [q_len, head_dim]
    k: np.ndarray  # [kv_len, head_dim]
    v: np.ndarray  # [kv_len, head_dim_v]
    allowed: np.ndarray  # [q_len, kv_len] bool, the mask
    kept: np.ndarray | None  # [q_len, kv_len] bool, what dropout keeps
    scale: float
    softcap: float | None
    slope: float | None
    bias: np.ndarray | None  # [q_len, kv_len]
    sink: float | None
    dropout_p: float
    dtype: np.dtype

    @np.errstate(all="ignore")  # NaN and Inf in the inputs are legal and end up where IEEE arithmetic puts them
    def forward(self) -> _Stages:
        q_len, kv_len = self.allowed.shape
        tanh = None
        scores = self._keep(self.scale * (self.q @ self.k.T))
        if self.softcap is not None:
            tanh = np.tanh(scores / self.softcap)
            scores = self._keep(self.softcap * tanh)
        if self.slope is not None:
            q_pos = np.arange(q_len)[:, None] + (kv_len - q_len)
            distance = np.abs(q_pos - np.arange(kv_len)[None, :])
            scores = self._keep(scores - self.slope * distance.astype(scores.dtype))
        if self.bias is not None:
            scores = self._keep(scores + self.bias)
        scores = np.where(self.allowed, scores, -np.inf)

        sink = -np.inf if self.sink is None else self.sink
        largest = np.maximum(scores.max(axis=1, initial=-np.inf), sink)[:, None]
        largest = np.where(np.isneginf(largest), 0, largest)  # a row with nothing to attend to: exp(-inf - 0) is 0
        exponentials = np.exp(scores - largest)
        denominator = exponentials.sum(axis=1, keepdims=True) + np.exp(sink - largest)
        probabilities = np.where(self.allowed, exponentials / denominator, 0)
        probabilities = self._keep(probabilities.astype(scores.dtype))

        dropped = self._keep(self._drop(probabilities))
        return _Stages(
            tanh=tanh,
            probabilities=probabilities,
            dropped=dropped,
            out=self._keep(_sum_allowed(self.allowed, dropped, self.v)),
            lse=(largest + np.log(denominator))[:, 0],
        )

    @np.errstate(all="ignore")
    def backward(
        self, dout: np.ndarray, dlse: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]:
        """(dq, dk, dv, dsink, dbias) of this head."""
        dout, dlse = (x.astype(self.q.dtype) for x in (dout, dlse))
        stages = self.forward()
        dv = _sum_allowed(self.allowed.T, stages.dropped.T, dout)
        d_probabilities = self._keep(np.where(self.allowed, dout @ self.v.T, 0))
        d_probabilities = self._keep(self._drop(d_probabilities))

        delta = (dout * stages.out).sum(axis=1)
        d_scores = stages.probabilities * (d_probabilities + (dlse - delta)[:, None])
        d_scores = d_bias = self._keep(np.where(self.allowed, d_scores, 0))
        if stages.tanh is not None:
            d_scores = self._keep(np.where(self.allowed, d_scores * (1 - stages.tanh**2), 0))
        dq = self.scale * _sum_allowed(self.allowed, d_scores, self.k)
        dk = self.scale * _sum_allowed(self.allowed.T, d_scores.T, self.q)
        dsink = 0.0
        if self.sink is not None and self.sink > -np.inf:  # exp(-inf) is no sink, also where LSE is -inf
            dsink = (np.exp(self.sink - stages.lse) * (dlse - delta)).sum()
        return self._keep(dq), self._keep(dk), self._keep(dv), dsink, d_bias

    def _drop(self, matrix: np.ndarray) -> np.ndarray:
        """Dropout, which is its own transpose: forward it drops P, backward it drops dP."""
        return matrix if self.kept is None else np.where(self.kept, matrix / (1 - self.dropout_p), 0)

    def _keep(self, stage: np.ndarray) -> np.ndarray:
        return _keep(stage, self.dtype)


def _heads(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, settings: Options, dtype: np.dtype
) -> Iterator[tuple[int, int, int, _Head]]:
    """(sequence, head, kv_head, the problem of that head) for every head of every sequence."""
    work = _work_dtype(dtype)
    qs = _sequences(q, settings.cu_seqlens_q, settings.layout)
    ks, vs = (_sequences(x, settings.cu_seqlens_k, settings.layout) for x in (k, v))
    for sequence, (q_heads, k_heads, v_heads) in enumerate(zip(qs, ks, vs, strict=True)):
        heads, q_len, head_dim = q_heads.shape
        kv_heads, kv_len, _ = k_heads.shape
        slopes, sinks = settings.alibi_slopes, settings.sinks
        if slopes is not None:
            slopes = np.broadcast_to(slopes, (len(qs), heads))[sequence]
        for index in range(heads):
            kv_index = index // (heads // kv_heads)
            kept = None
            if settings.dropout_p > 0:
                assert settings.seed is not None
                kept = keep_mask(settings.seed, settings.dropout_p, sequence, index, 0, q_len, 0, kv_len)
            allowed = settings.bounds.dense(q_len, kv_len)
            bias = None
            if settings.mask is not None:
                allowed = allowed & _of_head(settings.mask, sequence, index, q_len, kv_len)
            if settings.bias is not None:
                bias = _of_head(settings.bias, sequence, index, q_len, kv_len).astype(work)
                allowed = allowed & ~np.isneginf(bias)
            head = _Head(
                q=q_heads[index].astype(work),
                k=k_heads[kv_index].astype(work),
                v=v_heads[kv_index].astype(work),
                allowed=allowed,
                kept=kept,
                scale=head_dim**-0.5 if settings.scale is None else settings.scale,
                softcap=settings.softcap,
                slope=None if slopes is None else float(slopes[index]),
                bias=bias,
                sink=None if sinks is None else float(sinks[index]),
                dropout_p=settings.dropout_p,
                dtype=dtype,
            )
            yield sequence, index, kv_index, head


def _of_head(x: np.ndarray, sequence: int, head: int, q_len: int, kv_len: int) -> np.ndarray:
    """One head's [q_len, kv_len] of an array that broadcasts to [batch, heads, q_len, kv_len]."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    matrix = x[sequence if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]
    return np.broadcast_to(matrix, (q_len, kv_len))


def _add_broadcast(total: np.ndarray, sequence: int, head: int, matrix: np.ndarray) -> None:
    """Add one head's [q_len, kv_len] to where it was broadcast from."""
    total = total.reshape((1,) * (4 - total.ndim) + total.shape)  # a view, as `total` is contiguous
    target = total[sequence if total.shape[0] > 1 else 0, head if total.shape[1] > 1 else 0]
    for axis in (0, 1):
        if target.shape[axis] == 1:
            matrix = matrix.sum(axis=axis, keepdims=True)
    target += matrix


def _sequences(x: np.ndarray, cu_seqlens: np.ndarray | None, layout: str) -> list[np.ndarray]:
    """Views [heads, len, dim] into x, one a sequence: writing to them writes to x."""
    if layout == "bshd":
        x = np.swapaxes(x, -3, -2)
    if cu_seqlens is None:
        return list(x)
    return [x[:, start:stop] for start, stop in pairwise(cu_seqlens)]


def _lse_sequences(lse: np.ndarray, cu_seqlens_q: np.ndarray | None) -> list[np.ndarray]:
    """Views [heads, q_len], one a sequence, into lse [batch, heads, q_len] or packed [heads, total]."""
    return list(lse) if cu_seqlens_q is None else [lse[:, start:stop] for start, stop in pairwise(cu_seqlens_q)]


def _lse_shape(q: np.ndarray, settings: Options) -> tuple[int, ...]:
    return np.swapaxes(q, -3, -2).shape[:-1] if settings.layout == "bshd" else q.shape[:-1]


def _work_dtype(dtype: np.dtype) -> np.dtype:
    """What a stage is computed in before it is rounded."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@np.errstate(all="ignore")
def _keep(stage: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The stage's result as it is after being stored in `dtype`."""
    return stage.astype(dtype).astype(stage.dtype)


def _sum_allowed(allowed: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_j weights[i, j] * values[j] over the allowed pairs alone, so that 0 * NaN of a masked pair never enters.

    allowed and weights [rows, cols], weights zero where not allowed; values [cols, dim]. Returns [rows, dim].
    """
    special = ~np.isfinite(values).all(axis=1)
    result = weights[:, ~special] @ values[~special]
    for col in np.flatnonzero(special):
        rows = allowed[:, col]
        result[rows] += weights[rows, col, None] * values[col]
    return result
