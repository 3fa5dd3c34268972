"""An additive bias with its gradient and a boolean mask, dense arrays that broadcast: the contract with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.contract.backends import Backend
from tests.contract.cases import DENSE, DTYPES, OPTIONS, Case, make_inputs, pairwise
from tests.contract.conftest import Prepared, prepare
from tests.contract.test_contract import (
    assert_bitwise,
    case_in,
    run_backward,
    run_forward,
    test_backward,  # noqa: F401  collected here too, over the cases below
    test_forward,  # noqa: F401
)

WITH_DENSE: dict[str, list[dict[str, Any]]] = {
    **{name: values for name, values in OPTIONS.items() if name not in ("mask", "lengths", "dims")},
    "band": [{}, {"causal": True}, {"window_size": (20, 5)}],
    "lengths": [values for values in OPTIONS["lengths"] if "sequences" not in values],
    "dims": [
        {"head_dim": 40, "head_dim_v": 40},
        {"head_dim": 128, "head_dim_v": 128},
        {"head_dim": 64, "head_dim_v": 96},
        {"head_dim": 192, "head_dim_v": 128},
        {"head_dim": 256, "head_dim_v": 256},
    ],
    "bias": [{"bias": kind} for kind in DENSE] + [{}],
    "bias_dtype": [{"bias_dtype": "float32"}, {"bias_dtype": "same"}],
    "dense mask": [{"mask": kind} for kind in ("full", "heads", "keys")] + [{}],
}
LONG: dict[str, Any] = {"q_len": 300, "kv_len": 700, "batch": 1, "head_dim": 64, "head_dim_v": 64}
EDGES: dict[str, dict[str, Any]] = {
    "several tiles": {**LONG, "bias": "full", "causal": True},
    "several tiles, window": {**LONG, "bias": "full", "window_size": (30, 20)},
    "several tiles, summed over heads": {**LONG, "bias": "batch", "mask": "keys", "heads": 4},
    "several tiles, summed over queries": {**LONG, "bias": "keys", "causal": True},
    "several tiles, summed in order": {**LONG, "bias": "keys", "heads": 4, "deterministic": True},
    "several tiles, summed over keys in order": {**LONG, "bias": "queries", "dlse": True, "deterministic": True},
    "fully masked rows": {"q_len": 150, "kv_len": 70, "causal": True, "bias": "batch", "mask": "full", "dlse": True},
    "one query": {"q_len": 1, "kv_len": 300, "bias": "full", "mask": "keys"},
    "one key": {"q_len": 300, "kv_len": 1, "bias": "full", "dlse": True},
    "one query, one key": {"q_len": 1, "kv_len": 1, "batch": 1, "heads": 1, "kv_heads": 1, "bias": "number"},
    "one query, one key, gradient of LSE": {"q_len": 1, "kv_len": 1, "bias": "number", "dlse": True},
    "empty batch": {"batch": 0, "bias": "keys", "mask": "heads"},
    "empty batch, summed": {"batch": 0, "bias": "heads"},
    "no queries": {"q_len": 0, "bias": "keys"},
    "no keys": {"kv_len": 0, "bias": "queries", "mask": "full", "dlse": True},
    "no keys, in order": {"kv_len": 0, "bias": "full", "deterministic": True},
    "negative scale": {"scale": -0.5, "bias": "full"},
}


def _cases() -> Iterator[Case]:
    for seed, dtype in enumerate(DTYPES):
        for number, choice in enumerate(pairwise(WITH_DENSE, seed)):
            fields = {name: value for values in choice.values() for name, value in values.items()}
            yield Case(name=f"{dtype}-bias pairs {number}", dtype=dtype, **fields)
        for name, fields in EDGES.items():
            yield Case(name=f"{dtype}-bias {name}", dtype=dtype, **fields)


CASES = list(_cases())
LIKE_NATIVE = ("sm_80",)  # where the portable kernels serve every GPU, those of this path are the native ones
SIZES: dict[str, Any] = {"q_len": 33, "kv_len": 41, "heads": 4}
OTHER_CASES = ({**SIZES, "mask": "full"}, {**SIZES, "bias": "full"}, {**SIZES, "bias": "full", "mask": "full"})


@pytest.fixture(scope="module", params=[pytest.param(case, id=case.name) for case in CASES])
def prepared(request: pytest.FixtureRequest) -> Prepared:
    return prepare(request.param)


@pytest.fixture
def backend(backend: Backend) -> Backend:
    if not backend.dense:
        pytest.skip(f"{backend.name} takes no bias and no mask")
    return backend


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_is_a_bias_of_minus_infinity(backend: Backend, dtype: str) -> None:
    case = case_in(backend, dtype, **SIZES, mask="full")
    inputs = make_inputs(case)
    mask = inputs.options["mask"]
    as_bias = replace(
        inputs, options={**inputs.options, "mask": None, "bias": np.where(mask, np.float32(0), np.float32(-np.inf))}
    )
    assert_bitwise(backend, run_forward(backend, case, inputs), run_forward(backend, case, as_bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(backend: Backend, dtype: str) -> None:
    case = case_in(backend, dtype, **SIZES, bias="full", mask="full")
    inputs = make_inputs(case)
    out, lse = run_forward(backend, case, inputs)
    gradients, _ = run_backward(backend, case, inputs, out, lse)
    for turn in (np.asfortranarray, lambda x: np.repeat(x, 2, axis=-1)[..., ::2]):
        turned = {name: turn(inputs.options[name]) for name in ("bias", "mask")}
        same = replace(inputs, options={**inputs.options, **turned})
        assert_bitwise(backend, run_forward(backend, case, same), (out, lse))
        assert_bitwise(backend, run_backward(backend, case, same, out, lse)[0], gradients)


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
        ({"bias": BIAS, "backend": "cuda"}, r"bias: got an array in the CPU's memory", cuflash.UnsupportedError),
        ({"mask": MASK, "backend": "cuda"}, r"mask: got an array in the CPU's memory", cuflash.UnsupportedError),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        cuflash.flash_attention(Q, Q, Q, **options)
    out, lse = cuflash.flash_attention(Q, Q, Q, return_lse=True)
    with pytest.raises(error, match=message):
        cuflash.flash_attention_backward(Q, Q, Q, Q, out, lse, **options)


@pytest.mark.parametrize(
    ("library", "options", "message", "error"),
    [
        (library, *bad)
        for library in ("torch", "jax.numpy")
        for bad in (
            ({"bias": (3, 5, 5)}, r"bias: got shape \(3, 5, 5\)", ValueError),
            ({"mask": (1, 2, 4, 5, 5)}, r"mask: got shape", ValueError),
            ({"mask": (5, 5)}, r"mask: got dtype float32; allowed: bool", TypeError),
        )
    ],
)
def test_bad_input_of_frameworks(
    library: str, options: dict[str, tuple[int, ...]], message: str, error: type[Exception]
) -> None:
    ones = pytest.importorskip(library).ones
    arrays = {name: ones(shape) for name, shape in options.items()}
    x = ones((2, 5, 4, 8))
    with pytest.raises(error, match=message):
        cuflash.flash_attention(x, x, x, **arrays)


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
