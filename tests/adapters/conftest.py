"""The device that a test of an adapter runs on: the CPU, and with `-m gpu_adapter` a GPU.

The adapters run the contract suite's cases: they leave out what a backend does not have, and compile ahead, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.conftest import compiled, pytest_collection_modifyitems

__all__ = ["compiled", "device", "jax_route", "pytest_collection_modifyitems"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu_adapter)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def jax_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """The route that a mark asks for; what was compiled by another is forgotten."""
    mark = request.node.get_closest_marker("jax_route")
    if mark is None:
        yield None
        return
    import jax

    from cuflash.adapters.jax import _compiled, _route

    (name,) = mark.args
    obstacle = _compiled.obstacle(tried_only=False) if name == "compiled" else None
    if obstacle:
        pytest.skip(obstacle)
    monkeypatch.setenv(_route.VARIABLE, name)
    jax.clear_caches()
    yield name
    jax.clear_caches()
