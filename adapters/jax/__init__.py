"""cuflash on JAX arrays: inside jit, differentiable, and over several devices.

>>> import jax
>>> from cuflash.adapters.jax import flash_attention
>>> loss = lambda q, k, v: flash_attention(q, k, v, causal=True).sum()
>>> gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
"""

import jax

from cuflash.errors import UnsupportedError

if jax.__version_info__ < (0, 10):
    raise UnsupportedError(
        f"jax: got version {jax.__version__}; allowed: 0.10 or newer, which needs Python 3.11 or newer"
    )

from cuflash.adapters.jax._attention import flash_attention, flash_attention_backward
from cuflash.adapters.jax._drop_in import attention_fn, dot_product_attention, segment_boundaries

__all__ = [
    "attention_fn",
    "dot_product_attention",
    "flash_attention",
    "flash_attention_backward",
    "segment_boundaries",
]
