"""What every backend promises, over every case: the suite that each later backend and adapter joins by one fixture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.contract.backends import Backend, memory_of
from tests.contract.cases import DTYPES, Case, Inputs, make_inputs
from tests.contract.conftest import Prepared
from tests.contract.expected import Expected, expected_backward, expected_forward


def run_forward(backend: Backend, case: Case, inputs: Inputs) -> tuple[Any, Any]:
    """(out, lse) as the backend's arrays."""
    arguments = (backend.array(x) for x in (inputs.q, inputs.k, inputs.v))
    return backend.forward(*arguments, return_lse=True, **call_options(backend, case, inputs))


def run_backward(
    backend: Backend, case: Case, inputs: Inputs, out: Any, lse: Any, **more: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The gradients, and the arrays that were given for dq, dk and dv."""
    given = {name: backend.array(x) for name, x in inputs.given.items()}
    gradients = backend.backward(
        *(backend.array(x) for x in (inputs.dout, inputs.q, inputs.k, inputs.v)),
        out,
        lse,
        dlse=None if inputs.dlse is None else backend.array(inputs.dlse),
        accumulate=case.gradients == "added to",
        memory=case.memory,
        **given,
        **call_options(backend, case, inputs),
        **more,
    )
    return gradients, given


def call_options(backend: Backend, case: Case, inputs: Inputs) -> dict[str, Any]:
    arrays = {name: backend.array(x) for name, x in inputs.options.items() if isinstance(x, np.ndarray)}
    return {**inputs.options, **arrays, "deterministic": case.deterministic}


def all_bytes(inputs: Inputs) -> list[bytes]:
    arrays = [inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse, *inputs.options.values()]
    return [memory_of(x).tobytes() for x in arrays if isinstance(x, np.ndarray)]


def check(backend: Backend, case: Case, inputs: Inputs, expected: dict[str, Expected], actual: tuple[Any, ...]) -> None:
    """Assert that each result is as near to its oracle as it has to be."""
    for (name, result), array in zip(expected.items(), actual, strict=True):
        result.check(backend.numpy(array), name, backend.arithmetic(case, inputs, name, result.oracle))


def assert_bitwise(backend: Backend, actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert backend.numpy(x).tobytes() == backend.numpy(y).tobytes()


# ---- over every case ---------------------------------------------------------------------------------------------


def test_forward(backend: Backend, prepared: Prepared):
    case, inputs = prepared.case, prepared.inputs
    before = all_bytes(inputs)
    results = run_forward(backend, case, inputs)
    for (name, expected), result in zip(prepared.forward.items(), results, strict=True):
        assert type(result) is type(backend.array(inputs.q)), "the result is of the caller's kind of array"
        expected.check(backend.numpy(result), name, backend.arithmetic(case, inputs, name, expected.oracle))
    assert all_bytes(inputs) == before, "the inputs are left alone"
    if case.deterministic:
        assert_bitwise(backend, run_forward(backend, case, inputs), results)


def test_backward(backend: Backend, prepared: Prepared):
    case = prepared.case
    inputs = replace(prepared.inputs, given=make_inputs(case).given)  # fresh ones, for this backend to write to
    out, lse = run_forward(backend, case, inputs)
    before = all_bytes(inputs)
    gradients, given = run_backward(backend, case, inputs, out, lse)
    for (name, expected), gradient in zip(prepared.backward.items(), gradients, strict=True):
        assert type(gradient) is type(backend.array(inputs.q)), "the result is of the caller's kind of array"
        expected.check(backend.numpy(gradient), name, backend.arithmetic(case, inputs, name, expected.oracle))
        if name in given:
            assert gradient is given[name], "what was given is what comes back"
    assert all_bytes(inputs) == before, "the inputs are left alone"
    if case.deterministic:
        again = replace(inputs, given=make_inputs(case).given)
        assert_bitwise(backend, run_backward(backend, case, again, out, lse)[0], gradients)
    if case.strides == "slice" and backend.memory is not None:
        for array in given.values():
            array[...] = np.nan
            assert np.isnan(backend.memory(array)).all(), "nothing is written around a given array"


# ---- single promises ---------------------------------------------------------------------------------------------

FEATURES: dict[str, Any] = {
    "q_len": 70,
    "kv_len": 90,
    "heads": 4,
    "causal": True,
    "softcap": 3.0,
    "alibi": "heads",
    "sinks": "float32",
    "dropout_p": 0.1,
    "seed": 5,
    "dlse": True,
    "deterministic": True,
}


NAN_CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_size": (5, 0)},
    "window, softcap, sinks": {"window_size": (5, 3), "softcap": 3.0, "sinks": "float32"},
}

# What these tests have for cases: a backend that compiles does so ahead of them, in parallel.
OTHER_CASES = (
    FEATURES,
    *NAN_CASES.values(),
    {"head_dim": 128, "head_dim_v": 128},
    {"causal": True, "sinks": "float32"},
)


def case_in(backend: Backend, dtype: str, **fields: Any) -> Case:
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    return Case(name=f"{dtype} {fields}", dtype=dtype, **fields)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_alone_is_out_with_lse(backend: Backend, dtype: str):
    case = case_in(backend, dtype, **FEATURES)
    inputs = make_inputs(case)
    arguments = (backend.array(x) for x in (inputs.q, inputs.k, inputs.v))
    out = backend.forward(*arguments, **call_options(backend, case, inputs))
    assert_bitwise(backend, (out,), run_forward(backend, case, inputs)[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_memory_in_the_other_layout(backend: Backend, dtype: str):
    case = case_in(backend, dtype, **FEATURES)
    inputs = make_inputs(case)
    out, lse = run_forward(backend, case, inputs)
    gradients, _ = run_backward(backend, case, inputs, out, lse)

    moved = replace(
        inputs,
        options={**inputs.options, "layout": "bhsd"},
        **{name: np.swapaxes(getattr(inputs, name), -3, -2) for name in ("q", "k", "v", "dout")},
    )
    out_moved, lse_moved = run_forward(backend, case, moved)
    gradients_moved, _ = run_backward(backend, case, moved, out_moved, lse_moved)
    assert_bitwise(backend, (lse_moved, gradients_moved[3]), (lse, gradients[3]))
    for plain, transposed in zip((out, *gradients[:3]), (out_moved, *gradients_moved[:3]), strict=True):
        np.testing.assert_array_equal(np.swapaxes(backend.numpy(transposed), -3, -2), backend.numpy(plain))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulating_twice_adds_twice(backend: Backend, dtype: str):
    case = case_in(backend, dtype, **FEATURES, gradients="added to", gradients_dtype="float32")
    inputs = make_inputs(case)
    for array in inputs.given.values():
        array[...] = 0
    out, lse = run_forward(backend, case, inputs)
    given = {name: backend.array(x) for name, x in inputs.given.items()}
    once = None
    for _ in range(2):
        backend.backward(
            *(backend.array(x) for x in (inputs.dout, inputs.q, inputs.k, inputs.v)),
            out,
            lse,
            dlse=backend.array(inputs.dlse),
            accumulate=True,
            **given,
            **call_options(backend, case, inputs),
        )
        if once is None:
            once = [backend.numpy(x).copy() for x in given.values()]
    for single, double in zip(once, given.values(), strict=True):
        assert single.any()
        np.testing.assert_array_equal(backend.numpy(double), 2 * single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_dlse_is_zero_dlse(backend: Backend, dtype: str):
    case = case_in(backend, dtype, **FEATURES)
    inputs = make_inputs(case)
    out, lse = run_forward(backend, case, inputs)
    without, _ = run_backward(backend, case, replace(inputs, dlse=None), out, lse)
    zero, _ = run_backward(backend, case, replace(inputs, dlse=np.zeros_like(inputs.dlse)), out, lse)
    for x, y in zip(without, zero, strict=True):
        np.testing.assert_array_equal(backend.numpy(x), backend.numpy(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_seed_decides_what_is_dropped(backend: Backend, dtype: str):
    case = case_in(backend, dtype, **FEATURES)
    inputs = make_inputs(case)
    out, lse = (backend.numpy(x) for x in run_forward(backend, case, inputs))
    other = replace(inputs, options={**inputs.options, "seed": 6})
    out_other, lse_other = (backend.numpy(x) for x in run_forward(backend, case, other))
    assert (out_other != out).any()
    np.testing.assert_array_equal(lse_other, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_of_minus_infinity_is_no_sink(backend: Backend, dtype: str):
    case = case_in(backend, dtype, q_len=40, kv_len=20, causal=True, sinks="float32", dlse=True)
    inputs = make_inputs(case)
    inputs.options["sinks"][0] = -np.inf
    expected = expected_forward(case, inputs)
    expected |= expected_backward(case, inputs, expected)
    assert np.isneginf(expected["lse"].oracle).sum() == case.batch * 20, "rows of that head that attend to nothing"
    out, lse = run_forward(backend, case, inputs)
    gradients, _ = run_backward(backend, case, inputs, out, lse)
    check(backend, case, inputs, expected, (out, lse, *gradients))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_far_below_every_score(backend: Backend, dtype: str):
    case = case_in(backend, dtype, q_len=40, kv_len=20, causal=True, sinks="float32", dlse=True)
    inputs = make_inputs(case)
    inputs.options["sinks"][:] = -90
    expected = expected_forward(case, inputs)
    expected |= expected_backward(case, inputs, expected)
    assert (expected["lse"].oracle == -90).sum() == case.batch * case.heads * 20, "rows that attend to nothing else"
    out, lse = run_forward(backend, case, inputs)
    gradients, _ = run_backward(backend, case, inputs, out, lse)
    check(backend, case, inputs, expected, (out, lse, *gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("growth", "softcap"), [(4.0, None), (60.0, None), (400.0, None), (60.0, 100.0), (400.0, 40.0), (400.0, 600.0)]
)
@pytest.mark.parametrize("towards", ["later keys", "earlier keys"])
def test_scores_that_grow_from_tile_to_tile(
    backend: Backend, towards: str, growth: float, softcap: float | None, dtype: str
):
    """The row maximum moves by about `growth` in every tile: whatever a backend refers to is wrong soon. A softcap
    bounds it by twice the cap, which many scores are far beyond."""
    lengths = {"q_len": 70, "kv_len": 700, "head_dim": 128, "head_dim_v": 128}
    case = case_in(backend, dtype, batch=1, **lengths, scale=1.0, softcap=softcap)
    inputs = make_inputs(case)
    steps = np.linspace(0, 5, case.kv_len) if towards == "later keys" else np.linspace(5, 0, case.kv_len)
    inputs.q[...] = np.sign(inputs.q) + inputs.q.dtype.type(0.5)
    inputs.k[...] = (growth * steps[None, :, None, None] / 128).astype(inputs.k.dtype)
    inputs.k[..., ::2] *= inputs.k.dtype.type(2)  # so that rows differ
    check(backend, case, inputs, expected_forward(case, inputs), run_forward(backend, case, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_beyond_the_softcap_leave_their_neighbours_alone(backend: Backend, dtype: str):
    """Every eighth is 43 caps high, where e^2x is barely finite in float32, and a product of two of these is not."""
    lengths = {"q_len": 70, "kv_len": 700, "head_dim": 128, "head_dim_v": 128}
    case = case_in(backend, dtype, batch=1, **lengths, scale=1.0, softcap=2.0)
    inputs = make_inputs(case)
    inputs.q[...] = 1 + inputs.q / 40
    inputs.k[...] = inputs.k / 20
    inputs.k[:, ::8] += inputs.k.dtype.type(43 * case.softcap / case.head_dim)
    check(backend, case, inputs, expected_forward(case, inputs), run_forward(backend, case, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, 300.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_large_scores_select_rows_of_v(backend: Backend, head_dim: int, causal: bool, size: float, dtype: str):
    """Each query finds one key by a score of up to 1e6, in whose float32 an ulp is 1/8: P is 1 there and 0 elsewhere,
    out is that row of V, to what P loses in its dtype where its exponent is not quite 0, and dS is what is then left of
    the two sums that cancel in it."""
    q_len, kv_len = 300, 280
    lengths = {"q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "head_dim_v": head_dim}
    case = case_in(backend, dtype, batch=1, heads=2, kv_heads=2, causal=causal, **lengths)
    inputs = make_inputs(case)
    inputs.k[...] = (size * np.sign(inputs.k.astype(np.float32))).astype(inputs.k.dtype) + inputs.k
    allowed = np.clip(np.arange(q_len) + 1 + kv_len - q_len, 0, kv_len) if causal else np.full(q_len, kv_len)
    key = (np.random.default_rng(0).random(q_len) * allowed).astype(int)
    inputs.q[...] = inputs.k[:, key]
    out, lse = run_forward(backend, case, inputs)
    (dq, dk, _), _ = run_backward(backend, case, inputs, out, lse)
    found = allowed > 0
    dout, v, k = (x.astype(np.float64) for x in (inputs.dout, inputs.v[:, key], inputs.k[:, key]))
    loss = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-21, "float64": 2.0**-50}[dtype]
    error = np.abs(backend.numpy(out).astype(np.float64) - np.where(found[:, None, None], v, 0))
    assert (error <= 2 * loss * np.abs(v)).all()  # once for P, once for out

    of_score = 2 * loss * np.abs(dout * v).sum(-1, keepdims=True) / np.sqrt(head_dim)
    largest = (of_score * np.abs(k)).max()
    for name, gradient, count in (("dq", dq, 1), ("dk", dk, np.bincount(key[found]).max())):
        worst = np.abs(backend.numpy(gradient).astype(np.float64)).max()
        assert worst <= 2 * count * largest, (name, worst, largest)  # LSE in float32 leaves P within a factor of 2


# ---- NaN gets at least where the arithmetic puts it, and never to another head -----------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("mask", NAN_CASES)
def test_nan_row(backend: Backend, mask: str, poisoned: str, dtype: str):
    case = case_in(backend, dtype, q_len=65, kv_len=65, **NAN_CASES[mask])
    inputs = make_inputs(case)
    getattr(inputs, poisoned)[0, 40, 1] = np.nan
    out, lse = run_forward(backend, case, inputs)
    gradients, _ = run_backward(backend, case, inputs, out, lse)
    expected = expected_forward(case, inputs)
    expected |= expected_backward(case, inputs, expected)
    assert any(np.isnan(result.oracle).any() for result in expected.values())
    for (name, result), actual in zip(expected.items(), (out, lse, *gradients), strict=True):
        found = backend.numpy(actual)
        if poisoned in ("q", "k") and name in ("out", "lse"):
            arithmetic = backend.arithmetic(case, inputs, name, result.oracle)
            result.check(found, name, arithmetic)  # masked scores are selected away, whatever they were
            continue
        # 0 * NaN is NaN: inside the head a product may carry it to pairs that are masked.
        assert np.isnan(found[np.isnan(result.oracle)]).all(), f"{name}: NaN has been lost"
        head = np.zeros(found.shape, bool)
        index = (0, 1) if name == "lse" else (1,) if name == "dsinks" else (0, slice(None), 1)
        head[index] = True
        np.testing.assert_array_equal(np.isnan(found) & ~head, False, err_msg=name)
