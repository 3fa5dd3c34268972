"""The contract suite through the JAX adapter, every case of it.

JAX arrays are immutable and row-major. So the cases that differ only in strides, or in what is given for the gradients,
are here calls with new gradients; the promises about given ones have no meaning, and the random cases of
test_properties.py would each be compiled for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.adapters import jax_backend
from tests.contract.backends import Backend
from tests.contract.cases import CASES, make_inputs
from tests.contract.conftest import Prepared
from tests.contract.expected import expected_backward, expected_forward
from tests.contract.test_contract import (  # noqa: F401
    OTHER_CASES,
    test_a_sink_far_below_every_score,
    test_a_sink_of_minus_infinity_is_no_sink,
    test_backward,
    test_forward,
    test_nan_row,
    test_no_dlse_is_zero_dlse,
    test_out_alone_is_out_with_lse,
    test_same_memory_in_the_other_layout,
    test_scores_that_grow_from_tile_to_tile,
    test_seed_decides_what_is_dropped,
)

IN_JAX = [replace(case, gradients="new", gradients_dtype="same") for case in CASES]


@pytest.fixture(params=jax_backend.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param.forced_arch is not None:
        request.getfixturevalue("compiled")
    return request.param


@pytest.fixture(scope="module", params=[pytest.param(case, id=case.name) for case in IN_JAX])
def prepared(request: pytest.FixtureRequest) -> Prepared:
    case = request.param
    inputs = make_inputs(case)
    forward = expected_forward(case, inputs)
    return Prepared(case, inputs, forward, expected_backward(case, inputs, forward))
