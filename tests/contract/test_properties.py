"""Random shapes, strides and options against the oracle, and laws of attention that need no oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.backends import Backend
from tests.contract.cases import DTYPES, Case, Inputs, make_inputs
from tests.contract.expected import expected_backward, expected_forward
from tests.contract.test_contract import run_backward, run_forward

# The fixture is only a choice of backend, so that Hypothesis' examples may share it.
examples = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

BOUND = st.none() | st.integers(0, 30)
SEQUENCES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.3]))
    packed = draw(st.booleans())
    fields: dict[str, Any] = {
        "batch": draw(st.integers(0, 2)),
        "q_len": draw(st.integers(0, 40)),
        "kv_len": draw(st.integers(0, 40)),
        "sequences": draw(SEQUENCES) if packed else None,
        "tail": draw(st.integers(0, 3)) if packed else 0,
        "heads": group * kv_heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.integers(1, 20)),
        "head_dim_v": draw(st.integers(1, 20)),
        "causal": draw(st.booleans()),
        "window_size": draw(st.none() | st.tuples(BOUND, BOUND)),
        "scale": draw(st.none() | st.floats(-2, 2)),
        "softcap": draw(st.none() | st.floats(0.5, 50)),
        "alibi": draw(st.sampled_from([None, "heads", "batch"])),
        "sinks": draw(st.sampled_from([None, "float32", "same"])),
        "dropout_p": dropout_p,
        "seed": draw(st.integers(0, 2**64 - 1)) if dropout_p else None,
        "layout": draw(st.sampled_from(["bshd", "bhsd"])),
        "strides": draw(st.sampled_from(["contiguous", "transposed", "slice", "reversed", "broadcast"])),
        "dlse": draw(st.booleans()),
        "gradients": draw(st.sampled_from(["new", "given", "added to"])),
    }
    return Case(name=str(fields), **fields)


def widest(backend: Backend) -> str:
    """The dtype in which a law can be checked most sharply."""
    return "float64" if "float64" in backend.dtypes else "float32"


def assert_within_bounds(backend: Backend, case: Case) -> None:
    inputs = make_inputs(case)
    expected = expected_forward(case, inputs)
    expected |= expected_backward(case, inputs, expected)
    out, lse = run_forward(backend, case, inputs)
    gradients, _ = run_backward(backend, case, inputs, out, lse)
    for (name, result), actual in zip(expected.items(), (out, lse, *gradients), strict=True):
        result.check(backend.numpy(actual), name)


@pytest.mark.parametrize("dtype", DTYPES)
@examples
@given(case=cases())
def test_random_case(backend: Backend, case: Case, dtype: str):
    assert_within_bounds(backend, replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 4, 8, 16])
def test_few_numbers(backend: Backend, head_dim: int, dtype: str):
    """The naive computation may be close by luck, as its largest error is one of few: a result must be close always."""
    for draw in range(30):
        name = f"{dtype} head_dim {head_dim} draw {draw}"
        assert_within_bounds(backend, Case(name=name, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 8, 64])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 200), (200, 1), (2, 2)])
def test_few_queries_or_keys(backend: Backend, lengths: tuple[int, int], head_dim: int, dtype: str):
    """As above, and with one key the naive dQ and dK are now and then exact: zero."""
    q_len, kv_len = lengths
    for draw in range(10):
        name = f"{dtype} {lengths} head_dim {head_dim} draw {draw}"
        sizes = {"batch": 1, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "head_dim_v": head_dim}
        assert_within_bounds(backend, Case(name=name, dtype=dtype, **sizes))


# ---- laws ----------------------------------------------------------------------------------------------------------


def plain_inputs(backend: Backend, data: st.DataObject, **fields: Any) -> tuple[Case, Inputs]:
    sizes = {"q_len": data.draw(st.integers(1, 40)), "kv_len": data.draw(st.integers(2, 60))}
    case = Case(name=str(sizes), dtype=widest(backend), **sizes, **fields)
    return case, make_inputs(case)


def forward(backend: Backend, case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    out, lse = (backend.numpy(x) for x in run_forward(backend, case, inputs))
    return out, lse


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    precise = actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-10 if precise else 1e-4, atol=1e-12 if precise else 1e-5)


@examples
@given(data=st.data())
def test_parts_of_the_keys_merge_by_their_lse(backend: Backend, data: st.DataObject):
    case, inputs = plain_inputs(backend, data, softcap=5.0)
    cut = data.draw(st.integers(1, case.kv_len - 1))
    out, lse = forward(backend, case, inputs)
    parts = [
        forward(backend, case, replace(inputs, k=inputs.k[:, part], v=inputs.v[:, part]))
        for part in (slice(None, cut), slice(cut, None))
    ]
    merged_lse = np.logaddexp(parts[0][1], parts[1][1])
    assert_same(lse, merged_lse)
    weights = [np.exp(part_lse - merged_lse).swapaxes(1, 2)[..., None] for _, part_lse in parts]
    assert_same(out, weights[0] * parts[0][0] + weights[1] * parts[1][0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_parts_of_the_keys(backend: Backend, dtype: str):
    """Given out and LSE of all keys, the backward over a part of them gives that part's gradients."""
    case = Case(name=dtype, dtype=dtype, q_len=40, kv_len=60, softcap=5.0, dlse=True)
    inputs = make_inputs(case)
    out, lse = run_forward(backend, case, inputs)
    whole, _ = run_backward(backend, case, inputs, out, lse)
    parts = [
        run_backward(backend, case, replace(inputs, k=inputs.k[:, part], v=inputs.v[:, part]), out, lse)[0]
        for part in (slice(None, 23), slice(23, None))
    ]
    (dq, dk, dv), first, second = ([backend.numpy(x) for x in gradients] for gradients in (whole, *parts))
    assert_same(first[0] + second[0], dq)
    assert_same(np.concatenate((first[1], second[1]), axis=1), dk)
    assert_same(np.concatenate((first[2], second[2]), axis=1), dv)


@examples
@given(data=st.data())
def test_the_order_of_keys_does_not_matter(backend: Backend, data: st.DataObject):
    case, inputs = plain_inputs(backend, data, sinks="float32")
    order = np.random.default_rng(case.kv_len).permutation(case.kv_len)
    shuffled = replace(inputs, k=inputs.k[:, order], v=inputs.v[:, order])
    for actual, expected in zip(forward(backend, case, shuffled), forward(backend, case, inputs), strict=True):
        assert_same(actual, expected)


@examples
@given(data=st.data())
def test_a_later_token_changes_nothing_before_it(backend: Backend, data: st.DataObject):
    case, inputs = plain_inputs(backend, data, causal=True)
    case = replace(case, q_len=case.kv_len)
    inputs = make_inputs(case)
    place = data.draw(st.integers(0, case.kv_len - 1))
    out, _ = forward(backend, case, inputs)
    changed = replace(inputs, **{name: getattr(inputs, name).copy() for name in ("q", "k", "v")})
    for array in (changed.q, changed.k, changed.v):
        array[:, place:] = 3
    out_changed, _ = forward(backend, case, changed)
    np.testing.assert_array_equal(out_changed[:, :place], out[:, :place])


@examples
@given(data=st.data())
def test_causal_and_a_window_is_the_window_that_ends_here(backend: Backend, data: st.DataObject):
    left, right = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    case, inputs = plain_inputs(backend, data)
    both = replace(inputs, options={**inputs.options, "causal": True, "window_size": (left, right)})
    alone = replace(inputs, options={**inputs.options, "window_size": (left, 0)})
    for actual, expected in zip(forward(backend, case, both), forward(backend, case, alone), strict=True):
        np.testing.assert_array_equal(actual, expected)
