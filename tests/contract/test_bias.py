"""An additive bias with its gradient and a boolean mask, dense arrays that broadcast: against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.contract.backends import BACKENDS, Backend
from tests.contract.cases import DTYPES, Case, Inputs, make_inputs
from tests.contract.expected import expected_backward, expected_forward
from tests.contract.test_contract import all_bytes, run_backward, run_forward

BATCH, Q_LEN, KV_LEN, HEADS = 2, 33, 41, 4
SHAPES: dict[str, tuple[int, ...]] = {
    "full": (BATCH, HEADS, Q_LEN, KV_LEN),
    "heads": (HEADS, Q_LEN, KV_LEN),
    "batch": (BATCH, 1, Q_LEN, KV_LEN),
    "keys": (BATCH, 1, 1, KV_LEN),
    "queries": (Q_LEN, 1),
    "number": (),
}
SIZES: dict[str, Any] = {"batch": BATCH, "q_len": Q_LEN, "kv_len": KV_LEN, "heads": HEADS, "kv_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, dlse": {"causal": True, "dlse": True},
    "window, softcap": {"window_size": (20, 5), "softcap": 2.0},
    "alibi, sinks": {"alibi": "heads", "sinks": "float32", "dlse": True},
    "dropout, bhsd": {"dropout_p": 0.3, "seed": 3, "layout": "bhsd", "strides": "transposed"},
    "several tiles": {"q_len": 300, "kv_len": 1100, "batch": 1, "heads": 1, "kv_heads": 1, "causal": True},
    "added to": {"gradients": "added to", "gradients_dtype": "float32", "head_dim": 64, "head_dim_v": 40},
}


def with_dense(case: Case, bias: str | None, mask: str | None, *, bias_dtype: str = "float32") -> Inputs:
    """The inputs of a case with a bias and a mask of these SHAPES, which mask a part of the pairs."""
    inputs = make_inputs(case)
    rng = np.random.default_rng(1)
    sizes = (case.batch, case.heads, case.q_len, case.kv_len)
    dense: dict[str, Any] = {}

    def shape(kind: str) -> tuple[int, ...]:
        of_kind = SHAPES[kind]
        return tuple(
            1 if length == 1 else size for length, size in zip(of_kind, sizes[4 - len(of_kind) :], strict=True)
        )

    if bias is not None:
        dense["bias"] = rng.standard_normal(shape(bias)).astype(DTYPES[bias_dtype])
        if dense["bias"].size > 1:
            dense["bias"][rng.random(dense["bias"].shape) < 0.05] = -np.inf
    if mask is not None:
        dense["mask"] = np.asarray(rng.random(shape(mask)) < 0.7)
    return replace(inputs, options={**inputs.options, **dense})


@pytest.fixture(params=[pytest.param(backend, id=backend.name) for backend in BACKENDS if backend.dense])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def check(backend: Backend, case: Case, inputs: Inputs) -> None:
    forward = expected_forward(case, inputs)
    backward = expected_backward(case, inputs, forward)
    before = all_bytes(inputs)
    out, lse = run_forward(backend, case, inputs)
    gradients, _ = run_backward(backend, case, inputs, out, lse)
    for (name, expected), actual in zip((forward | backward).items(), (out, lse, *gradients), strict=True):
        expected.check(backend.numpy(actual), name)
    assert all_bytes(inputs) == before, "the inputs are left alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(("bias", "mask"), [("full", None), (None, "full"), ("heads", "keys"), ("keys", "heads")])
def test_with_other_options(
    backend: Backend, bias: str | None, mask: str | None, options: dict[str, Any], dtype: str
) -> None:
    case = Case(name=f"{bias} {mask} {options} {dtype}", dtype=dtype, **SIZES | options)
    check(backend, case, with_dense(case, bias, mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_to_broadcast(backend: Backend, shape: str, dtype: str) -> None:
    case = Case(name=f"{shape} {dtype}", dtype=dtype, **SIZES)
    check(backend, case, with_dense(case, shape, shape, bias_dtype=dtype))


def test_a_mask_is_a_bias_of_minus_infinity(backend: Backend) -> None:
    case = Case(name="mask as bias", **SIZES)
    inputs = with_dense(case, None, "full")
    mask = inputs.options["mask"]
    as_bias = replace(
        inputs, options={**inputs.options, "mask": None, "bias": np.where(mask, np.float32(0), np.float32(-np.inf))}
    )
    for x, y in zip(run_forward(backend, case, inputs), run_forward(backend, case, as_bias), strict=True):
        np.testing.assert_array_equal(backend.numpy(x), backend.numpy(y))


def test_any_strides(backend: Backend) -> None:
    case = Case(name="strides", **SIZES)
    inputs = with_dense(case, "full", "full")
    expected = [backend.numpy(x) for x in run_forward(backend, case, inputs)]
    turned = {name: np.asfortranarray(inputs.options[name]) for name in ("bias", "mask")}
    found = run_forward(backend, case, replace(inputs, options={**inputs.options, **turned}))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(backend.numpy(x), y)


Q = np.ones((2, 5, 4, 8), np.float32)
BIAS, MASK = np.zeros((5, 5), np.float32), np.ones((5, 5), bool)


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        (
            {"bias": np.zeros((3, 5, 5), np.float32)},
            r"bias: got shape \(3, 5, 5\); allowed: one that broadcasts",
            ValueError,
        ),
        ({"mask": np.ones((1, 2, 4, 5, 5), bool)}, r"mask: got shape .* broadcasts to .* \(2, 4, 5, 5\)", ValueError),
        ({"bias": BIAS.astype(np.float64)}, r"bias: got dtype float64; allowed: float32", TypeError),
        ({"bias": BIAS.astype(np.float16)}, r"bias: got dtype float16", TypeError),
        ({"mask": BIAS}, r"mask: got dtype float32; allowed: bool", TypeError),
        ({"mask": "causal"}, r"mask: got 'causal' \(str\)", TypeError),
        ({"bias": BIAS, "backend": "cuda"}, r"bias: got an array with backend 'cuda'", cuflash.UnsupportedError),
        ({"mask": MASK, "backend": "cuda"}, r"mask: got an array with backend 'cuda'", cuflash.UnsupportedError),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        cuflash.flash_attention(Q, Q, Q, **options)
    out, lse = cuflash.flash_attention(Q, Q, Q, return_lse=True)
    with pytest.raises(error, match=message):
        cuflash.flash_attention_backward(Q, Q, Q, Q, out, lse, **options)


def test_packed_sequences_take_none() -> None:
    ends = np.array([0, 5], np.int32)
    with pytest.raises(ValueError, match=r"mask: got an array with cu_seqlens_q; allowed: None"):
        cuflash.flash_attention(Q[0], Q[0], Q[0], mask=MASK, cu_seqlens_q=ends, cu_seqlens_k=ends)


def test_gradients_may_not_overlap_a_bias() -> None:
    memory = np.zeros((2, 4, 8, 8), np.float32)
    q = memory.copy()
    out, lse = cuflash.flash_attention(q, q, q, return_lse=True)
    with pytest.raises(ValueError, match=r"dq: got an array that shares memory with bias"):
        cuflash.flash_attention_backward(q, q, q, q, out, lse, bias=memory[:, :1, :4, :4], dq=memory)


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_arrays_of_frameworks_are_refused(library: str) -> None:
    x = pytest.importorskip(library).ones((1, 4, 2, 8))
    with pytest.raises(cuflash.UnsupportedError, match=r"bias: got an array with q a"):
        cuflash.flash_attention(x, x, x, bias=BIAS)
