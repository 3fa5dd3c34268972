"""What a case must give: the oracle's result, the naive computation's, and from both the tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuflash.reference import attention, attention_backward
from tests.contract import tolerance
from tests.contract.cases import DTYPES, Case, Inputs


class Expected(NamedTuple):
    """One result of one case."""

    oracle: np.ndarray  # float64
    naive: np.ndarray  # the naive computation in the case's dtype (LSE: in float32)
    dtype: np.dtype  # what the result must be in
    factor: float
    typical: float = 0.0  # see `tolerance.assert_close`

    def check(self, actual: np.ndarray, name: str, arithmetic: float = 0.0) -> None:
        tolerance.assert_close(actual, self.oracle, self.naive, self.dtype, self.factor, name, self.typical, arithmetic)


def expected_forward(case: Case, inputs: Inputs) -> dict[str, Expected]:
    """out and lse."""
    dtype, lse_dtype = np.dtype(DTYPES[case.dtype]), np.dtype(case.accumulation_dtype)
    arguments = inputs.q, inputs.k, inputs.v
    out, lse = attention(*arguments, **inputs.options)
    naive_out, naive_lse = out, lse
    if case.dtype != "float64":
        naive_out, naive_lse = attention(*arguments, dtype=dtype, **inputs.options)
    if lse_dtype != dtype:  # a naive LSE is float32 even where S is kept in half precision
        _, naive_lse = attention(*arguments, dtype=lse_dtype, **inputs.options)
    return {
        "out": Expected(out, naive_out, dtype, tolerance.OUTPUT),
        "lse": Expected(lse, naive_lse, lse_dtype, tolerance.OUTPUT),
    }


def expected_backward(case: Case, inputs: Inputs, forward: dict[str, Expected]) -> dict[str, Expected]:
    """dq, dk, dv, then dsinks and dbias where there are sinks and a bias; `forward` is what the forward must give."""
    dtype = np.dtype(DTYPES[case.dtype])
    options: dict[str, Any] = {**inputs.options, "dlse": inputs.dlse}
    oracle = attention_backward(inputs.dout, inputs.q, inputs.k, inputs.v, **options)
    naive = oracle
    if case.dtype != "float64":
        naive = attention_backward(inputs.dout, inputs.q, inputs.k, inputs.v, dtype=dtype, **options)
    expected = {}
    extras = [f"d{name}" for name in ("sinks", "bias") if inputs.options.get(name) is not None]
    for name, exact, rounded in zip(("dq", "dk", "dv", *extras), oracle, naive, strict=True):
        given = inputs.given.get(name)
        result_dtype = dtype if given is None else given.dtype
        typical = 0.0
        if name == "dsinks":
            result_dtype = inputs.options["sinks"].dtype
            typical = _typical_dsinks_error(inputs, forward)
        elif name == "dbias":
            result_dtype = inputs.options["bias"].dtype
            typical = _typical_dbias_error(inputs, forward)
        if given is not None and case.gradients == "added to":
            exact = exact + given.astype(np.float64)
            rounded = (rounded.astype(case.accumulation_dtype) + given).astype(result_dtype)
        expected[name] = Expected(exact, rounded, result_dtype, tolerance.GRADIENT, typical)
    return expected


def _typical_dbias_error(inputs: Inputs, forward: dict[str, Expected]) -> float:
    """How far a naive dbias that is summed over the keys is off on average, as below: dS of a row adds up to dLSE, of
    terms that cancel but for the errors of LSE and D."""
    bias = inputs.options["bias"]
    if bias.ndim > 0 and bias.shape[-1] != 1:
        return 0.0
    shape = (1,) * (4 - bias.ndim) + bias.shape
    summed = tuple(axis for axis in range(3) if shape[axis] == 1)
    of_rows, lse_error = _row_terms(inputs, forward)
    errors = np.sqrt((of_rows**2).sum(axis=summed))
    return float((lse_error + tolerance.unit_roundoff(forward["out"].dtype)) * errors.max(initial=0.0))


def _row_terms(inputs: Inputs, forward: dict[str, Expected]) -> tuple[np.ndarray, float]:
    """|D| + |dLSE| of every row [batch, heads, q_len], what D cancels counted; 0 for a row that attends to nothing. And
    the largest error of a naive LSE."""
    out, lse = forward["out"].oracle, forward["lse"].oracle
    finite = np.isfinite(lse)
    delta = np.abs(out * inputs.dout.astype(np.float64)).sum(axis=-1)
    if inputs.options["layout"] == "bshd":
        delta = delta.swapaxes(-1, -2)
    dlse = 0.0 if inputs.dlse is None else np.abs(inputs.dlse)
    lse_error = np.abs(forward["lse"].naive[finite] - lse[finite]).max(initial=0.0)
    return np.where(finite, delta + dlse, 0), float(lse_error)


def _typical_dsinks_error(inputs: Inputs, forward: dict[str, Expected]) -> float:
    """How far a naive dsinks is off on average: a random walk over the rows.

    dsinks is a sum over all rows of exp(sink - LSE) * (dLSE - D). Each term has the error of LSE and that of D, whose O
    is kept in the dtype; the errors of n terms add up as the root of the sum of their squares.
    """
    lse = forward["lse"].oracle
    sinks = inputs.options["sinks"].astype(np.float64)
    of_rows, lse_error = _row_terms(inputs, forward)
    terms = np.exp(sinks[:, None] - np.where(np.isfinite(lse), lse, 0)) * of_rows  # [batch, heads, q_len]
    of_a_head = np.sqrt((terms**2).sum(axis=-1).reshape(-1, len(sinks)).sum(axis=0))
    return float((lse_error + tolerance.unit_roundoff(forward["out"].dtype)) * of_a_head.max(initial=0.0))
