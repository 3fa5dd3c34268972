"""The NumPy backend: the tiled algorithm of the kernels, on any machine.

Forward: online softmax over tiles of keys (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022). Backward:
the tiles of P are recomputed from Q, K and LSE. Working memory is linear in the sequence length: float32 copies of one
head's K and V, their gradients, and a few tiles. Sums are kept in float32 (float64 for float64 inputs); the products
are BLAS.

Arrays arrive validated and head-minor: q [batch, q_len, heads, head_dim], or packed [total, heads, head_dim] with the
boundaries in cu_seqlens. Results are written into arrays given by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cuflash import dropout, tuning
from cuflash.spec import Extras, Problem, Tile


def empty(shape: tuple[int, ...], dtype: np.dtype, like: np.ndarray) -> np.ndarray:
    """How a result is allocated."""
    return np.empty(shape, dtype)


class _Sequence(NamedTuple):
    """One sequence's place in the arrays: x[index][:, head] is that head's [len, dim] matrix."""

    batch: int
    q_index: int | slice  # of the batch axis, or rows of the packed one
    kv_index: int | slice
    q_len: int
    kv_len: int


def forward(
    problem: Problem, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray, extras: Extras
) -> None:
    """Write out (q's shape with head_dim_v) and lse [batch, heads, q_len] (packed [heads, total])."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        _clear_outside(extras.cu_seqlens_q, out)
        if extras.cu_seqlens_q is not None:
            lse[:, int(extras.cu_seqlens_q[-1]) :] = -np.inf
        for sequence in _sequences(problem, extras):
            for kv_head in range(problem.kv_heads):
                k_head = _accumulable(k[sequence.kv_index][:, kv_head])
                v_head = _accumulable(v[sequence.kv_index][:, kv_head])
                for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                    _forward_head(problem, sequence, head, q, k_head, v_head, out, lse, extras)


def backward(
    problem: Problem,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dlse: np.ndarray | None,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    dsinks: np.ndarray | None,
    extras: Extras,
    *,
    accumulate: bool,
    lean: bool,
) -> None:
    """Write (or with `accumulate` add) the gradients into dq, dk, dv; dsinks [heads] is always written.

    There is one way, which is lean.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if not accumulate:
            _clear_outside(extras.cu_seqlens_q, dq)
            _clear_outside(extras.cu_seqlens_k, dk, dv)
        dsinks_sum = np.zeros(problem.heads, dtype=lse.dtype)
        for sequence in _sequences(problem, extras):
            for kv_head in range(problem.kv_heads):
                k_head = _accumulable(k[sequence.kv_index][:, kv_head])
                v_head = _accumulable(v[sequence.kv_index][:, kv_head])
                dk_head, dv_head = np.zeros_like(k_head), np.zeros_like(v_head)
                for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                    dq_head, dsink = _backward_head(
                        problem, sequence, head, dout, q, k_head, v_head, out, lse, dlse, dk_head, dv_head, extras
                    )
                    _store(dq[sequence.q_index][:, head], dq_head, accumulate)
                    dsinks_sum[head] += dsink
                dk_head *= dk_head.dtype.type(problem.scale)
                _store(dk[sequence.kv_index][:, kv_head], dk_head, accumulate)
                _store(dv[sequence.kv_index][:, kv_head], dv_head, accumulate)
        if dsinks is not None:
            dsinks[...] = dsinks_sum


def _forward_head(
    problem: Problem,
    sequence: _Sequence,
    head: int,
    q: np.ndarray,
    k_head: np.ndarray,
    v_head: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    extras: Extras,
) -> None:
    """One head's O [q_len, head_dim_v] and LSE [q_len]."""
    tile = tuning.numpy_tile(sequence.q_len, sequence.kv_len)
    scores = _Scores(problem, sequence, head, extras.alibi_slopes, k_head.dtype)
    q_head, out_head, lse_head = (
        q[sequence.q_index][:, head],
        out[sequence.q_index][:, head],
        _rows(lse, sequence, head),
    )
    for rows in _steps(0, sequence.q_len, tile.rows):
        q_tile = _accumulable(q_head[rows])  # [rows, head_dim]
        m = np.full(q_tile.shape[0], -np.inf, dtype=q_tile.dtype)  # running row maximum of S
        denominator = np.zeros_like(m)  # running row sum of exp(S - m)
        o = np.zeros((q_tile.shape[0], problem.spec.head_dim_v), dtype=q_tile.dtype)
        for cols in _kv_tiles(problem, sequence, rows, tile):
            s, _ = scores.tile(q_tile, k_head[cols], rows, cols)  # S = scale Q K^T  [rows, cols]
            m_new = np.maximum(m, s.max(axis=1))
            reference = _finite_reference(m_new)
            s -= reference[:, None]
            p = np.exp(s, out=s)  # P = exp(S - m)
            rescale = np.exp(m - reference)
            denominator = denominator * rescale + p.sum(axis=1)
            if problem.spec.dropout:
                p *= scores.dropped(rows, cols)
            o *= rescale[:, None]
            o += p @ v_head[cols]  # O = P V  [rows, head_dim_v]
            m = m_new
        reference = _finite_reference(m)
        if extras.sinks is not None:  # exp(sink) joins the denominator
            sink = q_tile.dtype.type(extras.sinks[head])
            with_sink = _finite_reference(np.maximum(m, sink))
            rescale = np.exp(m - with_sink)
            denominator = denominator * rescale + np.exp(sink - with_sink)
            o *= rescale[:, None]
            reference = with_sink
        empty = denominator == 0  # rows that may attend to nothing
        o /= np.where(empty, 1, denominator)[:, None]
        out_head[rows] = o
        lse_head[rows] = np.where(empty, -np.inf, reference + np.log(np.where(empty, 1, denominator)))


def _backward_head(
    problem: Problem,
    sequence: _Sequence,
    head: int,
    dout: np.ndarray,
    q: np.ndarray,
    k_head: np.ndarray,
    v_head: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dlse: np.ndarray | None,
    dk_head: np.ndarray,
    dv_head: np.ndarray,
    extras: Extras,
) -> tuple[np.ndarray, float]:
    """Add one query head to dK and dV; return its dQ [q_len, head_dim] and its sink's gradient."""
    tile = tuning.numpy_tile(sequence.q_len, sequence.kv_len)
    scores = _Scores(problem, sequence, head, extras.alibi_slopes, k_head.dtype)
    q_head, out_head, dout_head = (x[sequence.q_index][:, head] for x in (q, out, dout))
    lse_head = _rows(lse, sequence, head)
    dq_head = np.zeros((sequence.q_len, problem.spec.head_dim), dtype=k_head.dtype)
    dsink = 0.0
    for rows in _steps(0, sequence.q_len, tile.rows):
        q_tile = _accumulable(q_head[rows])  # [rows, head_dim]
        dout_tile = _accumulable(dout_head[rows])  # [rows, head_dim_v]
        lse_tile = _accumulable(lse_head[rows])
        delta = np.einsum("ij,ij->i", dout_tile, _accumulable(out_head[rows]))  # D = rowsum(dO * O)
        if dlse is not None:  # d LSE / d S = P, so dLSE enters dS as P * dLSE
            delta -= _rows(dlse, sequence, head)[rows]
        reference = _finite_reference(lse_tile)
        if extras.sinks is not None:
            dsink -= float((np.exp(extras.sinks[head] - reference) * delta).sum())
        dq_tile = dq_head[rows]
        for cols in _kv_tiles(problem, sequence, rows, tile):
            s, softcap_slope = scores.tile(q_tile, k_head[cols], rows, cols)
            s -= reference[:, None]
            p = np.exp(s, out=s)  # P = exp(S - LSE)  [rows, cols]
            dp = dout_tile @ v_head[cols].T  # dP = dO V^T  [rows, cols]
            if problem.spec.dropout:
                dropped = scores.dropped(rows, cols)
                dv_head[cols] += (p * dropped).T @ dout_tile
                dp *= dropped
            else:
                dv_head[cols] += p.T @ dout_tile  # dV += P^T dO  [cols, head_dim_v]
            dp -= delta[:, None]
            dp *= p  # dS = P * (dP - D)
            if softcap_slope is not None:
                dp *= softcap_slope
            dq_tile += dp @ k_head[cols]  # dQ += dS K  [rows, head_dim]
            dk_head[cols] += dp.T @ q_tile  # dK += dS^T Q  [cols, head_dim]
        dq_tile *= dq_tile.dtype.type(problem.scale)
    return dq_head, dsink


class _Scores:
    """The score stage of one head: everything between Q K^T and the exponential."""

    def __init__(
        self, problem: Problem, sequence: _Sequence, head: int, alibi_slopes: np.ndarray | None, dtype: np.dtype
    ) -> None:
        self.problem, self.sequence, self.head, self.dtype = problem, sequence, head, dtype
        self.offset = sequence.kv_len - sequence.q_len  # q_pos = q_index + offset
        self.slope = None
        if alibi_slopes is not None:
            slopes = alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[sequence.batch]
            self.slope = dtype.type(slopes[head])

    def tile(
        self, q_tile: np.ndarray, k_tile: np.ndarray, rows: slice, cols: slice
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """S [rows, cols] with softcap, ALiBi and mask, and d softcap / d score where there is a softcap."""
        problem, mask = self.problem, self.problem.mask
        s = q_tile @ k_tile.T
        s *= self.dtype.type(problem.scale)
        slope = None
        if problem.softcap is not None:  # c tanh(s / c), whose derivative is 1 - tanh^2
            s /= self.dtype.type(problem.softcap)
            np.tanh(s, out=s)
            slope = 1 - s * s
            s *= self.dtype.type(problem.softcap)
        q_pos = np.arange(rows.start, rows.stop)[:, None] + self.offset
        kv_pos = np.arange(cols.start, cols.stop)[None, :]
        if self.slope is not None:
            s -= self.slope * np.abs(q_pos - kv_pos).astype(self.dtype)
        start, stop = mask.kv_range_unmasked(rows.start, rows.stop, self.sequence.q_len, self.sequence.kv_len)
        if cols.start < start or cols.stop > stop:
            np.copyto(s, -np.inf, where=~mask.allowed(q_pos, kv_pos))
        return s, slope

    def dropped(self, rows: slice, cols: slice) -> np.ndarray:
        """The factor of dropout [rows, cols]: 0 where P is dropped, 1 / (1 - dropout_p) where it is kept."""
        problem = self.problem
        keep = dropout.keep_mask(
            problem.seed,
            problem.dropout_p,
            self.sequence.batch,
            self.head,
            rows.start,
            rows.stop,
            cols.start,
            cols.stop,
        )
        return keep * self.dtype.type(1 / (1 - problem.dropout_p))


def _sequences(problem: Problem, extras: Extras) -> Iterator[_Sequence]:
    """Every sequence of the batch, dense or packed."""
    if extras.cu_seqlens_q is None or extras.cu_seqlens_k is None:
        for batch in range(problem.batch):
            yield _Sequence(batch, batch, batch, problem.q_len, problem.kv_len)
        return
    q_bounds, kv_bounds = extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist()
    for batch in range(problem.batch):
        q_slice, kv_slice = slice(*q_bounds[batch : batch + 2]), slice(*kv_bounds[batch : batch + 2])
        yield _Sequence(batch, q_slice, kv_slice, q_slice.stop - q_slice.start, kv_slice.stop - kv_slice.start)


def _rows(statistic: np.ndarray, sequence: _Sequence, head: int) -> np.ndarray:
    """One head's part of a row statistic: [batch, heads, q_len], or packed [heads, total]."""
    index = sequence.q_index
    return statistic[head, index] if isinstance(index, slice) else statistic[index, head]


def _steps(start: int, stop: int, step: int) -> Iterator[slice]:
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def _kv_tiles(problem: Problem, sequence: _Sequence, rows: slice, tile: Tile) -> Iterator[slice]:
    """The tiles of keys that at least one query of `rows` may attend to; the others are never touched."""
    start, stop = problem.mask.kv_range(rows.start, rows.stop, sequence.q_len, sequence.kv_len)
    return _steps(start, stop, tile.cols)


def _accumulable(x: np.ndarray) -> np.ndarray:
    """A contiguous array in the dtype that sums are kept in: float64 for float64, else float32."""
    return np.ascontiguousarray(x, dtype=np.float64 if x.dtype == np.float64 else np.float32)


def _finite_reference(m: np.ndarray) -> np.ndarray:
    """The point exponentials refer to: the row maximum, or 0 for a row with no keys (so that exp(-inf - 0) = 0)."""
    return np.where(m == -np.inf, m.dtype.type(0), m)


def _store(target: np.ndarray, value: np.ndarray, accumulate: bool) -> None:
    target[...] = _accumulable(target) + value if accumulate else value


def _clear_outside(cu_seqlens: np.ndarray | None, *arrays: np.ndarray) -> None:
    """Zero the rows of packed arrays that belong to no sequence."""
    if cu_seqlens is not None:
        for array in arrays:
            array[int(cu_seqlens[-1]) :] = 0
