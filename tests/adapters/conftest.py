"""The device that a test of an adapter runs on: the CPU, and with `-m gpu_adapter` a GPU.

The adapters run the contract suite's cases: they leave out what a backend does not have, and compile ahead, too.
"""

from __future__ import annotations

import pytest

from tests.contract.conftest import compiled, pytest_collection_modifyitems

__all__ = ["compiled", "device", "pytest_collection_modifyitems"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu_adapter)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
