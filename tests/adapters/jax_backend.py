"""JAX as the tests use it, and as a backend of the contract suite. Skips what imports it where JAX is not installed."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

# The CUDA backend takes memory of its own; XLA is not to take most of it first.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)  # float64 is a dtype of the contract

from tests.contract.backends import Backend, tensor_core_error  # noqa: E402


def _on(platform: str, array: np.ndarray) -> Any:
    return jax.device_put(array, jax.devices(platform)[0])


CPU = Backend(name="jax cpu", array=partial(_on, "cpu"), numpy=np.asarray)
CUDA = Backend(
    name="jax cuda",
    array=partial(_on, "cuda"),
    numpy=np.asarray,
    dtypes=("float16", "bfloat16", "float32"),
    forced_arch="",  # the GPU's own
    arithmetic=tensor_core_error,
)
# The marks of a test on a GPU, by the name of the route.
ON_GPU = {name: (pytest.mark.gpu_adapter, pytest.mark.jax_route(name)) for name in ("compiled", "handler")}
BACKENDS = [
    pytest.param(CPU, id="cpu"),
    *(pytest.param(CUDA, id=f"cuda-{name}", marks=marks) for name, marks in ON_GPU.items()),
]
