"""The yardstick must be able to say no."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.contract.tolerance import assert_close, unit_roundoff

HALF = [np.float16, ml_dtypes.bfloat16, np.float32]


def results(dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An actual that is as far from the oracle as a naive computation may be, the oracle, and the naive result."""
    oracle = np.random.default_rng(0).standard_normal((3, 40))
    oracle[0, 0], oracle[1, 1], oracle[2, 2] = np.nan, np.inf, -np.inf
    naive = (oracle * (1 + 4 * unit_roundoff(dtype))).astype(dtype)
    return naive.copy(), oracle, naive


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.float16, 2**-11), (ml_dtypes.bfloat16, 2**-8), ("float32", 2**-24)]
)
def test_unit_roundoff(dtype, expected: float):
    assert unit_roundoff(dtype) == expected


@pytest.mark.parametrize("dtype", HALF)
def test_accepts_what_is_as_good_as_naive(dtype):
    assert_close(*results(dtype), dtype, 2.0)


@pytest.mark.parametrize("dtype", HALF)
def test_accepts_the_rounding_of_the_result_itself(dtype):
    _, oracle, _ = results(dtype)
    assert_close(oracle.astype(dtype), oracle, oracle, dtype, 2.0)


@pytest.mark.parametrize("dtype", HALF)
def test_one_element_too_far_off(dtype):
    actual, oracle, naive = results(dtype)
    place = np.unravel_index(np.nanargmax(np.where(np.isfinite(oracle), oracle, 0)), oracle.shape)
    actual[place] *= 1 + 16 * unit_roundoff(dtype)  # 20 roundoffs; 2 x 4 and 1 are allowed, and one more was rounded
    with pytest.raises(AssertionError, match=r"dq: largest error .* naive error"):
        assert_close(actual, oracle, naive, dtype, 2.0, "dq")
    assert_close(actual, oracle, naive, dtype, 6.0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_special_value_where_the_oracle_is_finite(wrong: float):
    actual, oracle, naive = results(np.float32)
    actual[0, 5] = wrong
    with pytest.raises(AssertionError, match=r"differs from the oracle at 1 of 120 places, first at \(0, 5\)"):
        assert_close(actual, oracle, naive, np.float32, 2.0)


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 2)])
def test_finite_value_where_the_oracle_is_special(place: tuple[int, int]):
    actual, oracle, naive = results(np.float32)
    actual[place] = 0
    with pytest.raises(AssertionError, match="differs from the oracle at 1 of 120 places"):
        assert_close(actual, oracle, naive, np.float32, 2.0)


def test_infinity_of_the_wrong_sign():
    actual, oracle, naive = results(np.float32)
    actual[1, 1] = -np.inf
    with pytest.raises(AssertionError, match="Inf differs"):
        assert_close(actual, oracle, naive, np.float32, 2.0)


def test_wrong_shape():
    actual, oracle, naive = results(np.float32)
    with pytest.raises(AssertionError, match=r"shape \(1, 3, 40\), expected \(3, 40\)"):
        assert_close(actual[None], oracle, naive, np.float32, 2.0)


def test_wrong_dtype():
    actual, oracle, naive = results(np.float32)
    with pytest.raises(AssertionError, match="dtype float64, expected float32"):
        assert_close(actual.astype(np.float64), oracle, naive, np.float32, 2.0)


def test_a_naive_computation_that_overflowed_is_no_yardstick():
    actual, oracle, naive = results(np.float16)
    naive[0, 5] = np.inf
    with pytest.raises(AssertionError, match="no yardstick"):
        assert_close(actual, oracle, naive, np.float16, 2.0)


def test_float64_is_exact_to_ten_digits():
    oracle = np.array([1e-3, 3.0])
    assert_close(oracle + 2.9e-10, oracle, oracle, np.float64, 2.0)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(oracle + 3.1e-10, oracle, oracle, np.float64, 2.0)


def test_typical_error_stands_in_for_a_lucky_naive_one():
    oracle = np.array([1.0])
    actual = np.array([1 + 1e-5], np.float32)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(actual, oracle, oracle, np.float32, 2.0)
    assert_close(actual, oracle, oracle, np.float32, 2.0, typical=1e-5)


def test_empty():
    empty = np.zeros((0, 4))
    assert_close(empty.astype(np.float16), empty, empty, np.float16, 2.0)
