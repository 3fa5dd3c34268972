"""How close is close enough: derived from the naive computation in the same dtype, not tuned.

An attention in float16 cannot be exact, but it must not be worse than what anybody would write down: its largest error
against the float64 oracle is at most `factor` times the largest error of the naive computation whose every stage is
kept in that dtype, plus the rounding of the result itself.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

OUTPUT = 2.0  # factor for out and LSE
GRADIENT = 3.0  # factor for dq, dk, dv and dsinks
FLOAT64 = 1e-10  # what exact means in float64, relative to max(1, |oracle|)


def unit_roundoff(dtype: DTypeLike) -> float:
    """Half the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def assert_close(
    actual: np.ndarray,
    oracle: np.ndarray,
    naive: np.ndarray,
    dtype: DTypeLike,
    factor: float,
    name: str = "result",
    typical: float = 0.0,
    arithmetic: float = 0.0,
) -> None:
    """Assert that `actual` has the oracle's shape, the given dtype, NaN and Inf where the oracle has them, and

        max|actual - oracle| <= factor * max|naive - oracle| + unit_roundoff(dtype) * max|oracle|

    over the finite elements; in float64 the right side is 1e-10 * max(1, max|oracle|). `typical` is for a result of a
    handful of long sums: the naive error of those may be small by luck, and is then taken to be what it typically is.
    `arithmetic` is what a backend's products lose by their documented precision, added to the right side; never in
    float64.
    """
    dtype = np.dtype(dtype)
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    assert actual.dtype == dtype, f"{name}: dtype {actual.dtype}, expected {dtype}"
    actual, oracle, naive = (x.astype(np.float64) for x in (actual, oracle, naive))
    for kind, where in (("NaN", np.isnan), ("+Inf", np.isposinf), ("-Inf", np.isneginf)):
        wrong = where(actual) != where(oracle)
        assert not wrong.any(), (
            f"{name}: {kind} differs from the oracle at {wrong.sum()} of {wrong.size} places, first at "
            f"{tuple(np.argwhere(wrong)[0].tolist())}: {actual[wrong][0]}, expected {oracle[wrong][0]}"
        )
    finite = np.isfinite(oracle)
    error = _largest(actual[finite] - oracle[finite])
    naive_error = max(_largest(naive[finite] - oracle[finite]), typical)
    assert np.isfinite(naive_error), f"{name}: the naive computation is not finite where the oracle is: no yardstick"
    magnitude = _largest(oracle[finite])
    if dtype == np.float64:
        allowed = FLOAT64 * max(1.0, magnitude)
    else:
        allowed = factor * naive_error + unit_roundoff(dtype) * magnitude + arithmetic
    assert error <= allowed, (
        f"{name}: largest error {error:.3e} of allowed {allowed:.3e} = {factor:g} x naive error {naive_error:.3e} + "
        f"rounding of the largest value {magnitude:.3e} in {dtype.name} + {arithmetic:.3e}"
    )


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0.0))
