"""Exact attention, forward and backward, in memory linear in the sequence length.

>>> import numpy as np, cuflash
>>> q = k = v = np.random.default_rng(0).standard_normal((1, 128, 4, 64), dtype=np.float32)
>>> out, lse = cuflash.flash_attention(q, k, v, causal=True, return_lse=True)
>>> dq, dk, dv = cuflash.flash_attention_backward(out, q, k, v, out, lse, causal=True)
"""

from cuflash.api import flash_attention, flash_attention_backward
from cuflash.errors import UnsupportedError

__version__ = "0.1.0"
__all__ = ["UnsupportedError", "__version__", "flash_attention", "flash_attention_backward"]
