"""The two fixtures of the contract suite: each backend, and each case with what it must give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from cuflash import plans
from cuflash.spec import Spec
from tests.contract.backends import BACKENDS, Backend
from tests.contract.cases import CASES, DTYPES, Case, Inputs, make_inputs
from tests.contract.expected import Expected, expected_backward, expected_forward


@pytest.fixture(params=[pytest.param(backend, id=backend.name, marks=backend.marks) for backend in BACKENDS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    chosen = request.param
    if chosen.forced_arch is not None:
        request.getfixturevalue("compiled")
        monkeypatch.setenv("CUFLASH_FORCE_ARCH", chosen.forced_arch)
        plans.forget()
    yield chosen
    if chosen.forced_arch is not None:
        plans.forget()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a backend does not have: other dtypes' cases, and a fresh kernel for every random example."""

    def fits(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend, case = parameters.get("backend"), parameters.get("prepared")
        dtype = case.dtype if case is not None else parameters.get("dtype")
        if backend is None:
            return True
        if (backend.adapter or backend.forced_arch is not None) and item.path.name == "test_properties.py":
            return False
        if backend.forced_arch in getattr(item.module, "LIKE_NATIVE", ()):
            return False
        return dtype is None or dtype in backend.dtypes

    left_out = [item for item in items if not fits(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if fits(item)]


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> None:
    """Compile what the collected GPU cases need, in parallel, before the first of them."""
    from tests.gpu.compilation import compile_first

    compile_first(jobs_of_cases(request.session.items))


def jobs_of_cases(items: Iterable[Any]) -> list[Any]:
    """The kernels of the collected GPU cases on the first device."""
    from cuflash.cuda import toolchain

    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        for arch, case in cases_on_gpu(items):
            patch.setenv("CUFLASH_FORCE_ARCH", arch)
            jobs += needed_jobs(case, toolchain.device_target(0))
    return jobs


def cases_on_gpu(items: Iterable[Any]) -> list[tuple[str, Case]]:
    """What collected tests run on a GPU: architectures to force and cases, each pair once."""
    pairs: dict[tuple[str, Case], None] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend, case = parameters.get("backend"), parameters.get("prepared")
        if backend is None or backend.forced_arch is None:
            continue
        cases = [case]
        if case is None:
            others = product(backend.dtypes, getattr(item.module, "OTHER_CASES", ()))
            cases = [Case(name="", dtype=dtype, **fields) for dtype, fields in others]
        pairs |= {(backend.forced_arch, case): None for case in cases}
    return list(pairs)


def needed_jobs(case: Case, target: Any) -> list[Any]:
    """The kernels that a case's two calls launch; where this guesses wrong, the call compiles what it needs."""
    from cuflash.cuda.precompile import jobs_of
    from tests.gpu.compilation import usual_jobs

    way = {"lean": True} if case.memory == "lean" else {"deterministic": case.deterministic}
    if case.strides in ("contiguous", "transposed") and (case.scale is None or case.scale > 0):
        few_queries = case.q_len <= 64 and case.kv_len >= 1024
        return usual_jobs(spec_of(case), target, [way], vector_of(case), few_queries)
    return jobs_of(spec_of(case), target, vector_of(case), [way])


def spec_of(case: Case) -> Spec:
    """The Spec that a case's call has."""
    left, right = (None, None) if case.window_size is None else case.window_size
    return Spec(
        dtype=case.dtype,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        bounded_left=left is not None,
        bounded_right=right is not None or case.causal,
        softcap=case.softcap is not None,
        alibi=case.alibi is not None,
        sinks=case.sinks is not None,
        bias=case.bias is not None,
        mask=case.mask is not None,
        packed=case.sequences is not None,
        dropout=case.dropout_p > 0,
        deterministic=case.deterministic and case.bias is not None,
    )


def vector_of(case: Case) -> int:
    """How wide the kernels' copies can be."""
    itemsize = np.dtype(DTYPES[case.dtype]).itemsize
    unaligned = case.head_dim * itemsize % 16 or case.head_dim_v * itemsize % 16 or case.strides == "slice"
    return itemsize if unaligned else 16


@dataclass(frozen=True)
class Prepared:
    """A case's arrays, shared by every backend (tests copy what they let a backend write), and what it must give."""

    case: Case
    inputs: Inputs
    forward: dict[str, Expected]
    backward: dict[str, Expected]


def prepare(case: Case) -> Prepared:
    inputs = make_inputs(case)
    forward = expected_forward(case, inputs)
    return Prepared(case, inputs, forward, expected_backward(case, inputs, forward))


@pytest.fixture(scope="module", params=[pytest.param(case, id=case.name) for case in CASES])
def prepared(request: pytest.FixtureRequest) -> Prepared:
    return prepare(request.param)
