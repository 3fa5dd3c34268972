"""The contract suite through the JAX adapter, every case of it.

JAX arrays are immutable and row-major. So the cases that differ only in strides, or in what is given for the gradients,
are here calls with new gradients; the promises about given ones have no meaning, and the random cases of
test_properties.py would each be compiled for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.adapters import jax_backend
from tests.contract.backends import Backend
from tests.contract.cases import CASES, Case, make_inputs
from tests.contract.conftest import Prepared, prepare
from tests.contract.test_bias import CASES as DENSE_CASES
from tests.contract.test_contract import (  # noqa: F401
    OTHER_CASES,
    test_a_sink_far_below_every_score,
    test_a_sink_of_minus_infinity_is_no_sink,
    test_backward,
    test_forward,
    test_large_scores_select_rows_of_v,
    test_nan_row,
    test_no_dlse_is_zero_dlse,
    test_out_alone_is_out_with_lse,
    test_same_memory_in_the_other_layout,
    test_scores_far_beyond_the_softcap_leave_their_neighbours_alone,
    test_scores_that_grow_from_tile_to_tile,
    test_seed_decides_what_is_dropped,
)

IN_JAX = [replace(case, gradients="new", gradients_dtype="same") for case in (*CASES, *DENSE_CASES)]


@pytest.fixture(params=jax_backend.BACKENDS)
def backend(request: pytest.FixtureRequest, jax_route: str | None) -> Backend:
    if request.param.forced_arch is not None:
        request.getfixturevalue("lowered" if jax_route == "compiled" else "compiled")
    return request.param


@pytest.fixture(scope="module")
def lowered(request: pytest.FixtureRequest) -> None:
    """Lower the collected cases of the compiled route at the same time, which compiles their kernels."""
    from cuflash.adapters.jax import _route

    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [each["prepared"] for each in parameters if each.get("backend") is jax_backend.CUDA and "prepared" in each]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv(_route.VARIABLE, "compiled")
        list(pool.map(lower, dict.fromkeys(chosen)))


def lower(case: Case) -> None:
    """Lower the two calls of a case for a GPU."""
    inputs = make_inputs(case)
    options = {**inputs.options, "deterministic": case.deterministic}
    arrays = {name: getattr(inputs, name) for name in ("q", "k", "v", "dout", "dlse")} | options
    arrays = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray)}
    rest = {name: x for name, x in options.items() if name not in arrays}

    def both(q: Any, k: Any, v: Any, dout: Any, dlse: Any = None, **extras: Any) -> Any:
        out, lse = cuflash.flash_attention(q, k, v, return_lse=True, **rest, **extras)
        return cuflash.flash_attention_backward(
            dout, q, k, v, out, lse, dlse=dlse, memory=case.memory, **rest, **extras
        )

    types = {name: jax_backend.jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    jax_backend.jax.jit(both).trace(**types).lower(lowering_platforms=("cuda",))


@pytest.fixture(scope="module", params=[pytest.param(case, id=case.name) for case in IN_JAX])
def prepared(request: pytest.FixtureRequest) -> Prepared:
    return prepare(request.param)
