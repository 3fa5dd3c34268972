"""Fixtures of the unit tests."""

from __future__ import annotations

import importlib.util

import pytest

from cuflash.cuda import toolchain


@pytest.fixture
def compiler() -> toolchain.Toolchain:
    """The real NVRTC. Only a machine without CuPy skips; where CuPy is, a toolchain that does not work is a failure."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed; the extras cuda12 and cuda13 bring it with NVRTC")
    return toolchain.toolchain()
