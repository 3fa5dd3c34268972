"""PyTorch: exact attention on torch tensors, differentiable, compilable and under functorch's transforms.

`cuflash.flash_attention` brings torch tensors here by itself. Beside it stands `scaled_dot_product_attention`, with
torch's own signature and conventions, and `install`, which puts it in the place of torch's.
"""

from cuflash.adapters.torch import _extension
from cuflash.adapters.torch._extension import build_extension
from cuflash.adapters.torch.attention import flash_attention, flash_attention_backward
from cuflash.adapters.torch.sdpa import install, installed, scaled_dot_product_attention, uninstall

__all__ = [
    "build_extension",
    "flash_attention",
    "flash_attention_backward",
    "install",
    "installed",
    "scaled_dot_product_attention",
    "uninstall",
]

_extension.load_if_built()
