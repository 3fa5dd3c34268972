"""The case list covers what it says: every option, and every two options together, in every dtype."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from cuflash.cuda.toolchain import Target
from tests.contract import test_contract
from tests.contract.backends import BACKENDS
from tests.contract.cases import CASES, DTYPES, EDGES, OPTIONS, Case, lay_out, make_inputs, pairwise
from tests.contract.conftest import cases_on_gpu, needed_jobs


def has(case: Case, fields: dict) -> bool:
    """Whether the case has these values (an option that is left out has its default)."""
    return all(getattr(case, name) == value for name, value in fields.items())


def test_enough_cases_with_names_of_their_own():
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_options(dtype: str):
    cases = [case for case in CASES if case.dtype == dtype]
    for a, b in combinations(OPTIONS, 2):
        for a_fields in OPTIONS[a]:
            for b_fields in OPTIONS[b]:
                assert any(has(case, a_fields | b_fields) for case in cases), (a_fields, b_fields)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EDGES)
def test_every_edge(name: str, dtype: str):
    assert sum(case.dtype == dtype and has(case, EDGES[name]) for case in CASES) >= 1


def test_pairwise_is_the_same_on_every_run():
    assert pairwise(OPTIONS, 0) == pairwise(OPTIONS, 0)
    small = pairwise({"a": [1, 2], "b": [3, 4], "c": [5, 6]}, 0)
    assert {(row["a"], row["b"]) for row in small} == {(1, 3), (1, 4), (2, 3), (2, 4)}
    assert len(small) < 8


def test_what_tests_on_a_gpu_need_is_known_ahead():
    """As pytest collects them there: the kernels of every case, and of those that single tests make."""
    items = [
        SimpleNamespace(callspec=SimpleNamespace(params={"backend": backend, **more}), module=test_contract)
        for backend in BACKENDS
        for more in ({}, *({"prepared": case} for case in CASES if case.dtype in backend.dtypes))
    ]
    pairs = cases_on_gpu([*items, SimpleNamespace(module=test_contract)])
    assert len(pairs) == len(set(pairs))
    assert {arch for arch, _ in pairs} == {"", "sm_80", "sm_75"}
    named = {case.name for _, case in pairs}
    assert named == {case.name for case in CASES if case.dtype != "float64"} | {""}
    for arch, case in pairs:
        jobs = needed_jobs(case, Target("sm_90a", {"": 900, "sm_80": 800, "sm_75": 750}[arch]))
        kernels = {name for name, *_ in jobs}
        assert any(name.startswith("forward") for name in kernels)
        assert any(name.startswith("backward") for name in kernels)
        assert arch == "" or not any("hopper" in name for name in kernels)


def test_inputs_are_the_same_on_every_run():
    case = CASES[0]
    first, second = make_inputs(case), make_inputs(case)
    for name in ("q", "k", "v", "dout"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "slice", "reversed", "broadcast"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (5, 3, 4)])
def test_lay_out(shape: tuple[int, ...], strides: str, layout: str):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    laid = lay_out(array, layout, strides)
    heads_axis = -2 if layout == "bshd" else -3
    back = laid if layout == "bshd" else laid.swapaxes(-3, -2)
    np.testing.assert_array_equal(back, np.broadcast_to(array[..., :1, :], shape) if strides == "broadcast" else array)
    assert laid.strides[-1] == laid.itemsize
    assert laid.flags.c_contiguous == (strides == "contiguous")
    assert (laid.strides[heads_axis] == 0) == (strides == "broadcast")
    assert (min(laid.strides) < 0) == (strides == "reversed")
    if strides == "slice":
        assert np.isnan(laid.base).sum() == laid.base.size - laid.size
