"""The oracle itself: cases computed by hand, the mask's alignment written out, gradients against finite differences."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from cuflash.dropout import keep_mask
from cuflash.reference import attention, attention_backward

INF = math.inf


def column(*values: float) -> np.ndarray:
    """One head of head_dim 1: [batch 1, len, heads 1, 1]."""
    return np.array(values, dtype=np.float64).reshape(1, -1, 1, 1)


def probabilities(q_len: int, kv_len: int, **options: object) -> np.ndarray:
    """P [q_len, kv_len] of equal scores, read off the output by attending to the rows of the identity."""
    q, k = np.zeros((1, q_len, 1, 4)), np.zeros((1, kv_len, 1, 4))
    out, _ = attention(q, k, np.eye(kv_len).reshape(1, kv_len, 1, kv_len), **options)
    return out[0, :, 0]


# ---- hand-computed -----------------------------------------------------------------------------------------------


def test_two_keys():
    # scores log 3 and 0, so P = (3/4, 1/4)
    out, lse = attention(column(1), column(math.log(3), 0), column(8, 4), scale=1.0)
    np.testing.assert_allclose(out, column(7), rtol=1e-15)
    np.testing.assert_allclose(lse, [[[math.log(4)]]], rtol=1e-15)


def test_two_keys_backward():
    # P = (3/4, 1/4), O = 7; dV = P dO; dS_j = P_j (V_j - O) dO = (3/4, -3/4) dO
    dq, dk, dv = attention_backward(column(2), column(1), column(math.log(3), 0), column(8, 4), scale=1.0)
    np.testing.assert_allclose(dv, column(1.5, 0.5), rtol=1e-15)
    np.testing.assert_allclose(dk, column(1.5, -1.5), rtol=1e-14)
    np.testing.assert_allclose(dq, column(1.5 * math.log(3)), rtol=1e-14)


def test_sink_joins_the_denominator():
    # exp(sink) = 4 beside 3 and 1, so P = (3/8, 1/8) and the sink's own probability 1/2 attends to nothing
    arguments = column(1), column(math.log(3), 0), column(8, 4)
    sinks = np.array([math.log(4)])
    out, lse = attention(*arguments, scale=1.0, sinks=sinks)
    np.testing.assert_allclose(out, column(3.5), rtol=1e-15)
    np.testing.assert_allclose(lse, [[[math.log(8)]]], rtol=1e-15)
    # dO = 2, dLSE = 5: dsink = 1/2 (dLSE - O dO) = 1/2 (5 - 7)
    *_, dsinks = attention_backward(column(2), *arguments, scale=1.0, sinks=sinks, dlse=np.full((1, 1, 1), 5.0))
    np.testing.assert_allclose(dsinks, [-1.0], rtol=1e-14)


def test_default_scale_is_one_over_the_root_of_head_dim():
    q, k, v = np.ones((1, 1, 1, 4)), np.ones((1, 2, 1, 4)), np.ones((1, 2, 1, 1))
    _, lse = attention(q, k, v)
    np.testing.assert_allclose(lse, 2 + math.log(2), rtol=1e-15)


def test_softcap():
    _, lse = attention(column(1), column(3), column(1), scale=2.0, softcap=5.0)
    np.testing.assert_allclose(lse, 5 * math.tanh(6 / 5), rtol=1e-15)


def test_softcap_comes_before_alibi():
    # the query at position 1 is one away from key 0: softcap 5 * tanh(6/5), then minus the slope
    _, lse = attention(column(1), column(3, -INF), column(1, 1), scale=2.0, softcap=5.0, alibi_slopes=np.array([0.5]))
    np.testing.assert_allclose(lse, np.logaddexp(5 * math.tanh(6 / 5) - 0.5, -5.0), rtol=1e-15)


def test_alibi_distances_count_from_the_bottom_right():
    # two queries at positions 1 and 2 of three keys
    expected = np.exp(-math.log(2) * np.array([[1, 0, 1], [2, 1, 0]]))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities(2, 3, alibi_slopes=np.array([math.log(2)])), expected, rtol=1e-14)


def test_alibi_slopes_by_batch_and_head():
    q, k, v = (
        np.zeros((2, 1, 2, 1)),
        np.zeros((2, 2, 2, 1)),
        np.array([[[[1.0]] * 2, [[0.0]] * 2]] * 2).reshape(2, 2, 2, 1),
    )
    out, _ = attention(q, k, v, alibi_slopes=np.log([[1.0, 2.0], [3.0, 7.0]]))
    # the query is at position 1; the key at distance 1 has weight 1 / (1 + exp(slope))
    np.testing.assert_allclose(out[:, 0, :, 0], [[1 / 2, 1 / 3], [1 / 4, 1 / 8]], rtol=1e-14)


def test_group_of_query_heads_shares_a_key_head():
    q, k = np.zeros((1, 1, 4, 1)), np.zeros((1, 1, 2, 1))
    v = np.array([10.0, 20.0]).reshape(1, 1, 2, 1)
    out, _ = attention(q, k, v)
    np.testing.assert_array_equal(out[0, 0, :, 0], [10, 10, 20, 20])
    _, _, dv = attention_backward(np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4, 1), q, k, v)
    np.testing.assert_array_equal(dv[0, 0, :, 0], [3, 7])


def test_dropout_drops_and_rescales_and_leaves_lse():
    options = {"dropout_p": 0.5, "seed": 11}
    keep = keep_mask(11, 0.5, 0, 0, 0, 24, 0, 24)
    assert 0 < keep.sum() < keep.size
    np.testing.assert_allclose(probabilities(24, 24, **options), keep / 24 / 0.5, rtol=1e-15)
    _, lse = attention(np.zeros((1, 2, 1, 1)), np.zeros((1, 3, 1, 1)), np.ones((1, 3, 1, 1)), **options)
    np.testing.assert_allclose(lse, math.log(3), rtol=1e-15)


def test_dropout_speaks_of_batch_and_head():
    q, k = np.zeros((2, 8, 2, 1)), np.zeros((2, 8, 1, 1))
    out, _ = attention(q, k, np.broadcast_to(np.eye(8)[:, None, :], (2, 8, 1, 8)), dropout_p=0.25, seed=3)
    for batch in range(2):
        for head in range(2):
            keep = keep_mask(3, 0.25, batch, head, 0, 8, 0, 8)
            np.testing.assert_array_equal(out[batch, :, head] != 0, keep)


# ---- the mask's alignment, written out ---------------------------------------------------------------------------

ALIGNMENT = {
    "causal, square": ({"causal": True}, ["X..", "XX.", "XXX"]),
    "causal, more keys": ({"causal": True}, ["XXX..", "XXXX.", "XXXXX"]),
    "causal, more queries": ({"causal": True}, ["...", "...", "X..", "XX.", "XXX"]),
    "window (1, 0), square": ({"window_size": (1, 0)}, ["X...", "XX..", ".XX.", "..XX"]),
    "window (0, 1), square": ({"window_size": (0, 1)}, ["XX..", ".XX.", "..XX", "...X"]),
    "window (1, 1), more keys": ({"window_size": (1, 1)}, [".XXX.", "..XXX", "...XX"]),
    "window (1, 0), more queries": ({"window_size": (1, 0)}, ["...", "...", "X..", "XX.", ".XX"]),
    "window (None, 1), more keys": ({"window_size": (None, 1)}, ["XXXX.", "XXXXX", "XXXXX"]),
    "window (1, None), more queries": ({"window_size": (1, None)}, ["XXX", "XXX", "XXX", "XXX", ".XX"]),
    "causal and window (1, 1)": ({"causal": True, "window_size": (1, 1)}, ["X...", "XX..", ".XX.", "..XX"]),
    "no bounds": ({"window_size": (None, None)}, ["XXX", "XXX"]),
}


@pytest.mark.parametrize("name", ALIGNMENT)
def test_mask_alignment(name: str):
    options, picture = ALIGNMENT[name]
    expected = np.array([[mark == "X" for mark in line] for line in picture])
    weights = np.maximum(expected.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(probabilities(*expected.shape, **options), expected / weights, rtol=1e-15)


def test_a_row_that_may_attend_to_nothing():
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, 1, 3, 1, 2))
    k, v = rng.standard_normal((2, 1, 2, 1, 2))
    out, lse = attention(q, k, v, causal=True)
    np.testing.assert_array_equal(out[0, 0], 0)
    assert lse[0, 0, 0] == -INF
    dlse = np.ones((1, 1, 3))
    gradients = attention_backward(dout, q, k, v, causal=True, dlse=dlse)
    np.testing.assert_array_equal(gradients[0][0, 0], 0)
    # the rest is what it is without that row
    rest = attention_backward(dout[:, 1:], q[:, 1:], k, v, causal=True, dlse=dlse[:, :, 1:])
    np.testing.assert_array_equal(gradients[1], rest[1])
    np.testing.assert_array_equal(gradients[2], rest[2])


def test_a_row_that_may_attend_to_nothing_but_its_sink():
    q, k = np.ones((1, 3, 1, 2)), np.ones((1, 2, 1, 2))
    sinks = np.array([0.75])
    out, lse = attention(q, k, k, causal=True, sinks=sinks)
    np.testing.assert_array_equal(out[0, 0], 0)
    assert lse[0, 0, 0] == 0.75
    # only that row's LSE has a gradient: the sink is all of it
    dlse = np.array([[[3.0, 0.0, 0.0]]])
    dq, _, _, dsinks = attention_backward(np.zeros_like(q), q, k, k, causal=True, sinks=sinks, dlse=dlse)
    np.testing.assert_array_equal(dq, 0)
    np.testing.assert_array_equal(dsinks, [3.0])


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 3), (3, 0), (0, 0)])
def test_empty_lengths(q_len: int, kv_len: int):
    q, k = np.ones((1, q_len, 2, 4)), np.ones((1, kv_len, 2, 4))
    out, lse = attention(q, k, k, causal=True)
    np.testing.assert_array_equal(out, np.zeros((1, q_len, 2, 4)))
    np.testing.assert_array_equal(lse, np.full((1, 2, q_len), -INF))
    for gradient, x in zip(attention_backward(q, q, k, k, causal=True), (q, k, k), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros_like(x))


# ---- NaN and Inf -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_masked_pairs_contribute_nothing(poison: float):
    rng = np.random.default_rng(1)
    q, k, v, dout = rng.standard_normal((4, 1, 6, 2, 4))
    options = {"causal": True, "softcap": 3.0, "sinks": np.array([0.5, -0.5])}
    clean = attention(q, k, v, **options) + attention_backward(dout, q, k, v, **options)
    k[:, 4], v[:, 4] = poison, poison
    with np.errstate(all="raise"):  # and none of it is reported
        dirty = attention(q, k, v, **options) + attention_backward(dout, q, k, v, **options)
    for before, after in ((clean[0], dirty[0]), (clean[2], dirty[2])):  # out and dq
        np.testing.assert_array_equal(after[:, :4], before[:, :4])
        assert not np.isfinite(after[:, 4:]).any()
    np.testing.assert_array_equal(dirty[1][:, :, :4], clean[1][:, :, :4])  # lse


def test_nan_in_one_query_row_stays_in_its_row_and_the_keys_it_sees():
    rng = np.random.default_rng(2)
    q, k, v, dout = rng.standard_normal((4, 1, 6, 1, 4))
    q[0, 2] = math.nan
    out, lse = attention(q, k, v, causal=True)
    dq, dk, dv = attention_backward(dout, q, k, v, causal=True)
    row_two = np.arange(6) == 2
    for x in (out[0, :, 0, 0], lse[0, 0], dq[0, :, 0, 0]):
        np.testing.assert_array_equal(np.isnan(x), row_two)
    for x in (dk[0, :, 0, 0], dv[0, :, 0, 0]):
        np.testing.assert_array_equal(np.isnan(x), np.arange(6) <= 2)


# ---- packed sequences and layouts --------------------------------------------------------------------------------


def test_packed_is_each_sequence_alone():
    rng = np.random.default_rng(3)
    q_lens, kv_lens = (3, 0, 5, 2), (4, 2, 0, 2)
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(lens)]) for lens in (q_lens, kv_lens))
    q, dout = rng.standard_normal((2, 12, 4, 3))  # two rows beyond the last sequence
    k, v = rng.standard_normal((2, 9, 2, 3))  # one row beyond
    q[10:], dout[10:], k[8:], v[8:] = math.nan, math.nan, math.nan, math.nan
    dlse = rng.standard_normal((4, 12))
    options = {"causal": True, "sinks": rng.standard_normal(4), "alibi_slopes": rng.random((4, 4))}
    out, lse = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    dq, dk, dv, dsinks = attention_backward(dout, q, k, v, dlse=dlse, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    sum_dsinks = np.zeros(4)
    for sequence in range(4):
        rows, cols = slice(*cu_q[sequence : sequence + 2]), slice(*cu_k[sequence : sequence + 2])
        alone = {**options, "alibi_slopes": options["alibi_slopes"][sequence]}
        one = q[None, rows], k[None, cols], v[None, cols]
        out_alone, lse_alone = attention(*one, **alone)
        np.testing.assert_array_equal(out[rows], out_alone[0])
        np.testing.assert_array_equal(lse[:, rows], lse_alone[0])
        gradients = attention_backward(dout[None, rows], *one, dlse=dlse[None, :, rows], **alone)
        for packed, gradient in zip((dq[rows], dk[cols], dv[cols]), gradients, strict=False):
            np.testing.assert_array_equal(packed, gradient[0])
        sum_dsinks += gradients[3]
    np.testing.assert_allclose(dsinks, sum_dsinks, rtol=1e-14)
    for tail in (out[10:], dq[10:], dk[8:], dv[8:]):
        np.testing.assert_array_equal(tail, 0)
    np.testing.assert_array_equal(lse[:, 10:], -INF)


@pytest.mark.parametrize("packed", [False, True])
def test_layout_moves_axes_and_nothing_else(packed: bool):
    rng = np.random.default_rng(4)
    options = {"causal": True, "window_size": (3, 0)}
    q, dout = rng.standard_normal((2, 2, 6, 4, 3))
    k, v = rng.standard_normal((2, 2, 7, 2, 3))
    if packed:
        q, dout, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, dout, k, v))
        options |= {"cu_seqlens_q": [0, 5, 12], "cu_seqlens_k": [0, 9, 14]}
    out, lse = attention(q, k, v, **options)
    dlse = rng.standard_normal(lse.shape)
    gradients = attention_backward(dout, q, k, v, dlse=dlse, **options)
    moved = [np.swapaxes(x, -3, -2) for x in (q, k, v)]
    out_moved, lse_moved = attention(*moved, layout="bhsd", **options)
    gradients_moved = attention_backward(np.swapaxes(dout, -3, -2), *moved, dlse=dlse, layout="bhsd", **options)
    np.testing.assert_array_equal(lse_moved, lse)
    for plain, transposed in zip((out, *gradients), (out_moved, *gradients_moved), strict=True):
        np.testing.assert_array_equal(np.swapaxes(transposed, -3, -2), plain)


# ---- gradients against finite differences ------------------------------------------------------------------------

GRADIENTS = {
    "plain": {},
    "causal": {"causal": True},
    "causal, fully masked rows": {"causal": True, "q_len": 6, "kv_len": 3},
    "window": {"window_size": (1, 1)},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": np.array([0.3, -0.2])},
    "alibi by batch": {"alibi_slopes": np.array([[0.1, 0.2], [0.3, 0.4]])},
    "sinks": {"sinks": np.array([0.4, -INF])},
    "sinks, fully masked rows": {"sinks": np.array([0.4, 1.2]), "causal": True, "q_len": 6, "kv_len": 3},
    "dropout": {"dropout_p": 0.4, "seed": 5},
    "packed": {"packed": True},
    "bhsd": {"layout": "bhsd"},
    "everything": {
        "packed": True,
        "causal": True,
        "window_size": (2, None),
        "scale": 0.9,
        "softcap": 0.8,
        "alibi_slopes": np.array([[0.1, 0.2], [0.3, 0.4]]),
        "sinks": np.array([0.4, 1.2]),
        "dropout_p": 0.4,
        "seed": 5,
        "layout": "bhsd",
    },
}


def central_differences(loss, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        if not np.isfinite(x[index]):
            continue
        before = x[index]
        x[index] = before + step
        above = loss()
        x[index] = before - step
        gradient[index] = (above - loss()) / (2 * step)
        x[index] = before
    return gradient


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_against_central_differences(name: str):
    rng = np.random.default_rng(6)
    options = {"q_len": 4, "kv_len": 5, "packed": False, **GRADIENTS[name]}
    q_len, kv_len, packed = options.pop("q_len"), options.pop("kv_len"), options.pop("packed")
    q = rng.standard_normal((2, q_len, 2, 3))
    k = rng.standard_normal((2, kv_len, 1, 3))
    v = rng.standard_normal((2, kv_len, 1, 2))
    dout = rng.standard_normal((2, q_len, 2, 2))
    if packed:  # the last row of each belongs to no sequence
        q, k, v, dout = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout))
        options |= {"cu_seqlens_q": [0, 3, len(q) - 1], "cu_seqlens_k": [0, 4, len(k) - 1]}
    if options.get("layout") == "bhsd":
        q, k, v, dout = (np.ascontiguousarray(np.swapaxes(x, -3, -2)) for x in (q, k, v, dout))
    dlse = rng.standard_normal(attention(q, k, v, **options)[1].shape)

    def loss() -> float:
        out, lse = attention(q, k, v, **options)
        return (out * dout).sum() + (np.where(np.isfinite(lse), lse, 0) * dlse).sum()

    inputs = [q, k, v] + ([options["sinks"]] if "sinks" in options else [])
    gradients = attention_backward(dout, q, k, v, dlse=dlse, **options)
    assert len(gradients) == len(inputs)
    for x, gradient in zip(inputs, gradients, strict=True):
        np.testing.assert_allclose(gradient, central_differences(loss, x), atol=2e-9, rtol=1e-7)


# ---- the naive computation in a smaller dtype --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_naive_same_dtype(dtype):
    rng = np.random.default_rng(7)
    q, k, v, dout = rng.standard_normal((4, 2, 40, 2, 16)).astype(dtype)
    options = {"causal": True, "softcap": 5.0, "sinks": np.array([0.5, -0.5])}
    out, lse = attention(q, k, v, dtype=dtype, **options)
    gradients = attention_backward(dout, q, k, v, dtype=dtype, **options)
    assert lse.dtype == np.float32
    oracle = attention(q, k, v, **options)
    assert oracle[1].dtype == np.float64
    expected = oracle[:1] + attention_backward(dout, q, k, v, **options)
    roundoff = float(ml_dtypes.finfo(dtype).eps) / 2
    for actual, exact in zip((out, *gradients), expected, strict=True):
        assert actual.dtype == dtype
        assert exact.dtype == np.float64
        error = np.abs(actual.astype(np.float64) - exact).max() / np.abs(exact).max()
        # it rounds at least once, and a handful of stages at most
        assert roundoff / 8 < error < 12 * roundoff


def test_inputs_are_left_alone():
    rng = np.random.default_rng(8)
    arrays = [rng.standard_normal((1, 5, 2, 3)) for _ in range(4)]
    copies = [x.copy() for x in arrays]
    attention_backward(arrays[0], *arrays[1:], causal=True)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
