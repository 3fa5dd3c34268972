"""The NumPy backend: the tiled algorithm of the kernels, on any machine.

Forward: online softmax over tiles of keys (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022). Backward:
the tiles of P are recomputed from Q, K and LSE. Working memory is linear in the sequence length: copies of one head's K
and V in the dtype it is worked in, their gradients, and a few tiles. The products are BLAS.

Few numbers: float64. Tiles and sums are float32 (float64 for float64 inputs), and the largest of many errors is then
about that of any other computation in float32. Of few errors the largest is a matter of luck: another computation may
even be exact. So a head with few numbers, short or of small head_dim, is worked in float64 and rounded once: no result
in float32 can be closer. Such a head is small; both passes take up to three times as long.

Arrays arrive validated and head-minor: q [batch, q_len, heads, head_dim], or packed [total, heads, head_dim] with the
boundaries in cu_seqlens. Results are written into arrays given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from cuflash import dropout, tuning
from cuflash.spec import Extras, Problem

# How many are few: min(q_len, kv_len) * min(head_dim, head_dim_v) of a head. Worked in float32, single heads of normal
# numbers had an error of more than twice that of a naive float32 computation (gradients: three times) and the rounding
#     in 22 % of 200 draws with 300 tokens at head_dim 1, 3.6 times the bound at worst,
#     in 16 % of 100 draws with 1,100 tokens at head_dim 1, 2.2 times,
#     in 2 % of 400 draws with 512 tokens at head_dim 8, 1.6 times,
#     in 0.2 % of 2,300 draws of 16,384 numbers and more (256 tokens at head_dim 64), 1.1 times.
FEW_NUMBERS = 16_384


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
            work = _work_dtype(problem, sequence, lse.dtype)
            for kv_head in range(problem.kv_heads):
                k_head = _in(work, k[sequence.kv_index][:, kv_head])
                v_head = _in(work, v[sequence.kv_index][:, kv_head])
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
    dbias: np.ndarray | None,
    extras: Extras,
    *,
    accumulate: bool,
    lean: bool,
) -> None:
    """Write (or with `accumulate` add) the gradients into dq, dk, dv; dsinks [heads] and dbias, shaped as extras.bias,
    are always written.

    There is one way, which is lean.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if not accumulate:
            _clear_outside(extras.cu_seqlens_q, dq)
            _clear_outside(extras.cu_seqlens_k, dk, dv)
        dsinks_sum = np.zeros(problem.heads)
        dbias_sum = None if dbias is None else np.zeros(dbias.shape, lse.dtype)
        for sequence in _sequences(problem, extras):
            work = _work_dtype(problem, sequence, lse.dtype)
            for kv_head in range(problem.kv_heads):
                k_head = _in(work, k[sequence.kv_index][:, kv_head])
                v_head = _in(work, v[sequence.kv_index][:, kv_head])
                dk_head, dv_head = np.zeros_like(k_head), np.zeros_like(v_head)
                for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
                    dq_head, dsink = _backward_head(
                        *(problem, sequence, head, dout, q, k_head, v_head, out, lse, dlse, dk_head, dv_head),
                        None if dbias_sum is None else _of_head(dbias_sum, sequence, head),
                        extras,
                    )
                    _store(dq[sequence.q_index][:, head], dq_head, accumulate)
                    dsinks_sum[head] += dsink
                dk_head *= dk_head.dtype.type(problem.scale)
                _store(dk[sequence.kv_index][:, kv_head], dk_head, accumulate)
                _store(dv[sequence.kv_index][:, kv_head], dv_head, accumulate)
        if dsinks is not None:
            dsinks[...] = dsinks_sum
        if dbias is not None:
            dbias[...] = dbias_sum


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
    scores = _Scores(problem, sequence, head, extras, k_head)
    q_head, out_head, lse_head = (
        q[sequence.q_index][:, head],
        out[sequence.q_index][:, head],
        _rows(lse, sequence, head),
    )
    for rows in _steps(0, sequence.q_len, scores.step.rows):
        q_tile = _in(k_head.dtype, q_head[rows])  # [rows, head_dim]
        out_head[rows], lse_head[rows] = scores.average(
            q_tile, rows, problem.spec.head_dim_v, lambda p, cols: p @ v_head[cols]
        )


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
    dbias_head: np.ndarray | None,
    extras: Extras,
) -> tuple[np.ndarray, float]:
    """Add one query head to dK, dV and dbias; return its dQ [q_len, head_dim] and its sink's gradient."""
    scores = _Scores(problem, sequence, head, extras, k_head)
    q_head, out_head, dout_head = (x[sequence.q_index][:, head] for x in (q, out, dout))
    lse_head = _rows(lse, sequence, head)
    dq_head = np.zeros((sequence.q_len, problem.spec.head_dim), dtype=k_head.dtype)
    dsink = 0.0
    for rows in _steps(0, sequence.q_len, scores.step.rows):
        q_tile = _in(k_head.dtype, q_head[rows])  # [rows, head_dim]
        dout_tile = _in(k_head.dtype, dout_head[rows])  # [rows, head_dim_v]
        lse_tile = _in(k_head.dtype, lse_head[rows])
        delta = np.einsum("ij,ij->i", dout_tile, _in(k_head.dtype, out_head[rows]))  # D = rowsum(dO * O)
        if k_head.dtype != lse.dtype:
            lse_tile, delta = _unrounded(scores, q_tile, v_head, dout_tile, lse_head[rows], delta, rows)
        if dlse is not None:  # d LSE / d S = P, so dLSE enters dS as P * dLSE
            delta -= _rows(dlse, sequence, head)[rows]
        reference = _finite_reference(lse_tile)
        if extras.sinks is not None:
            dsink -= float((np.exp(extras.sinks[head] - reference) * delta).sum())
        dq_tile = dq_head[rows]
        for cols in scores.kv_tiles(rows):
            s, softcap_slope = scores.tile(q_tile, rows, cols)
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
            if dbias_head is not None:
                _add_broadcast(dbias_head, rows, cols, dp)
            if softcap_slope is not None:
                dp *= softcap_slope
            dq_tile += dp @ k_head[cols]  # dQ += dS K  [rows, head_dim]
            dk_head[cols] += dp.T @ q_tile  # dK += dS^T Q  [cols, head_dim]
        dq_tile *= dq_tile.dtype.type(problem.scale)
    return dq_head, dsink


def _unrounded(
    scores: _Scores,
    q_tile: np.ndarray,
    v_head: np.ndarray,
    dout_tile: np.ndarray,
    lse: np.ndarray,
    delta: np.ndarray,
    rows: slice,
) -> tuple[np.ndarray, np.ndarray]:
    """LSE and D [rows] in float64, where the caller's LSE and O are rounded to less; `delta` is D of the rounded O.

    The rounding of LSE multiplies a row's P by up to exp(|LSE| * 2^-24), so both are computed again, with
    D = rowsum(P * dP): for a row with one key, where dS = 0, that is dP to the last bit. An LSE that is not the
    rounding of this one is of more keys than these, of which the caller gives a part: there LSE and O count as given.
    """
    average, own_lse = scores.average(
        q_tile, rows, 1, lambda p, cols: np.einsum("ij,ij->i", p, dout_tile @ v_head[cols].T)[:, None]
    )
    own = own_lse.astype(lse.dtype) == lse
    return np.where(own, own_lse, lse), np.where(own, average[:, 0], delta)


class _Scores:
    """The scores of one head: everything between Q K^T and the softmax, and the softmax's weighted averages."""

    def __init__(self, problem: Problem, sequence: _Sequence, head: int, extras: Extras, k_head: np.ndarray) -> None:
        self.problem, self.sequence, self.head = problem, sequence, head
        self.k_head, self.dtype = k_head, k_head.dtype  # [kv_len, head_dim]
        self.step = tuning.numpy_tile(sequence.q_len, sequence.kv_len, self.dtype.itemsize)
        self.offset = sequence.kv_len - sequence.q_len  # q_pos = q_index + offset
        self.slope, self.sink = None, None
        if extras.alibi_slopes is not None:
            slopes = extras.alibi_slopes if extras.alibi_slopes.ndim == 1 else extras.alibi_slopes[sequence.batch]
            self.slope = self.dtype.type(slopes[head])
        if extras.sinks is not None:
            self.sink = self.dtype.type(extras.sinks[head])
        self.bias, self.kept = (
            None if x is None else np.broadcast_to(_of_head(x, sequence, head), (sequence.q_len, sequence.kv_len))
            for x in (extras.bias, extras.mask)
        )

    def kv_tiles(self, rows: slice) -> Iterator[slice]:
        """The tiles of keys that at least one query of `rows` may attend to; the others are never touched."""
        q_len, kv_len = self.sequence.q_len, self.sequence.kv_len
        return _steps(*self.problem.mask.kv_range(rows.start, rows.stop, q_len, kv_len), self.step.cols)

    def average(
        self, q_tile: np.ndarray, rows: slice, width: int, weigh: Callable[[np.ndarray, slice], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sum over tiles of weigh(P, cols) [rows, width], linear in P, and LSE [rows]: online softmax.

        The P to be weighed has dropout applied; LSE knows no dropout.
        """
        m = np.full(q_tile.shape[0], -np.inf, dtype=self.dtype)  # running row maximum of S
        denominator = np.zeros_like(m)  # running row sum of exp(S - m)
        total = np.zeros((q_tile.shape[0], width), dtype=self.dtype)
        for cols in self.kv_tiles(rows):
            s, _ = self.tile(q_tile, rows, cols)  # S = scale Q K^T  [rows, cols]
            m_new = np.maximum(m, s.max(axis=1))
            reference = _finite_reference(m_new)
            s -= reference[:, None]
            p = np.exp(s, out=s)  # P = exp(S - m)
            rescale = np.exp(m - reference)
            denominator = denominator * rescale + p.sum(axis=1)
            if self.problem.spec.dropout:
                p *= self.dropped(rows, cols)
            total *= rescale[:, None]
            total += weigh(p, cols)
            m = m_new
        reference = _finite_reference(m)
        if self.sink is not None:  # exp(sink) joins the denominator
            with_sink = _finite_reference(np.maximum(m, self.sink))
            rescale = np.exp(m - with_sink)
            denominator = denominator * rescale + np.exp(self.sink - with_sink)
            total *= rescale[:, None]
            reference = with_sink
        empty = denominator == 0  # rows that may attend to nothing
        total /= np.where(empty, 1, denominator)[:, None]
        return total, np.where(empty, -np.inf, reference + np.log(np.where(empty, 1, denominator)))

    def tile(self, q_tile: np.ndarray, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """S [rows, cols] with softcap, ALiBi, bias and masks, and d softcap / d score where there is a softcap."""
        problem, mask = self.problem, self.problem.mask
        s = q_tile @ self.k_head[cols].T
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
        if self.bias is not None:
            s += self.bias[rows, cols].astype(self.dtype)
            np.copyto(s, -np.inf, where=np.isneginf(self.bias[rows, cols]))  # whatever the score
        if self.kept is not None:
            np.copyto(s, -np.inf, where=~self.kept[rows, cols])
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


def _of_head(x: np.ndarray, sequence: _Sequence, head: int) -> np.ndarray:
    """One head's part, a view, of an array [batch, heads, q_len, kv_len] whose axes have length 1 where they are
    broadcast."""
    return x[sequence.batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]


def _add_broadcast(target: np.ndarray, rows: slice, cols: slice, tile: np.ndarray) -> None:
    """Add a tile [rows, cols] to a matrix whose axes have length 1 where they are broadcast, and are summed over."""
    for axis, length in enumerate(target.shape):
        if length == 1:
            tile = tile.sum(axis=axis, keepdims=True)
    whole = slice(None)
    target[whole if target.shape[0] == 1 else rows, whole if target.shape[1] == 1 else cols] += tile


def _rows(statistic: np.ndarray, sequence: _Sequence, head: int) -> np.ndarray:
    """One head's part of a row statistic: [batch, heads, q_len], or packed [heads, total]."""
    index = sequence.q_index
    return statistic[head, index] if isinstance(index, slice) else statistic[index, head]


def _steps(start: int, stop: int, step: int) -> Iterator[slice]:
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def _work_dtype(problem: Problem, sequence: _Sequence, dtype: np.dtype) -> np.dtype:
    """What a head of this sequence is worked in: `dtype`, but float64 where its smallest result holds few numbers."""
    spec = problem.spec
    numbers = min(sequence.q_len, sequence.kv_len) * min(spec.head_dim, spec.head_dim_v)
    return np.dtype(np.float64) if numbers <= FEW_NUMBERS else dtype


def _in(dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    """A contiguous array of that dtype."""
    return np.ascontiguousarray(x, dtype)


def _finite_reference(m: np.ndarray) -> np.ndarray:
    """The point exponentials refer to: the row maximum, or 0 for a row with no keys (so that exp(-inf - 0) = 0)."""
    return np.where(m == -np.inf, m.dtype.type(0), m)


def _store(target: np.ndarray, value: np.ndarray, accumulate: bool) -> None:
    target[...] = _in(value.dtype, target) + value if accumulate else value


def _clear_outside(cu_seqlens: np.ndarray | None, *arrays: np.ndarray) -> None:
    """Zero the rows of packed arrays that belong to no sequence."""
    if cu_seqlens is not None:
        for array in arrays:
            array[int(cu_seqlens[-1]) :] = 0
