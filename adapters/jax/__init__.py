"""cuflash on JAX arrays: inside jit, differentiable, and over several devices.

>>> import jax, cuflash.adapters.jax as cuflash
>>> loss = lambda q, k, v: cuflash.flash_attention(q, k, v, causal=True).sum()
>>> gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
"""

from cuflash.adapters.jax._attention import flash_attention, flash_attention_backward

__all__ = ["flash_attention", "flash_attention_backward"]
