"""JAX as the tests use it, and as a backend of the contract suite. Skips what imports it where JAX is not installed."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)  # float64 is a dtype of the contract

from tests.contract.backends import Backend, tensor_core_error  # noqa: E402


def on(platform: str) -> Backend:
    """Arrays of JAX on a platform, through the two public functions of cuflash."""
    device = None if platform == "cpu" else "cuda"

    def array(values: np.ndarray) -> jax.Array:
        return jax.device_put(values, jax.devices(device)[0])

    gpu = {"dtypes": ("float16", "bfloat16", "float32"), "arithmetic": tensor_core_error} if device else {}
    return Backend(name=f"jax {platform}", array=array, numpy=np.asarray, **gpu)
