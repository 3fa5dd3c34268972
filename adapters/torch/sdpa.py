"""`scaled_dot_product_attention` with torch's signature and conventions, and putting it in the place of torch's.

Torch's differs from `flash_attention` in layout (heads before lengths, any number of leading axes) and in where a
causal mask stands: at the top left, so that query i attends to keys 0 to i whatever the number of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant

from cuflash.adapters.torch._call import fresh_seed
from cuflash.adapters.torch.attention import flash_attention
from cuflash.adapters.torch.packing import Packing, equal_lengths
from cuflash.errors import UnsupportedError

_torch_own = torch.nn.functional.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed exactly in memory linear in the sequence length.

    Parameters
    ----------
    query : tensor [..., heads, q_len, head_dim]
        float16, bfloat16, float32 (float64 on the CPU), on the CPU or a CUDA GPU. Without an axis of heads, one head.
    key, value : tensors [..., kv_heads, kv_len, head_dim] and [..., kv_heads, kv_len, head_dim_v]
        Their leading axes broadcast against query's.
    attn_mask : None, a boolean tensor, or a torch.nn.attention.bias.CausalBias
        A boolean mask, True for a key that takes part, may depend on the batch and the key: [batch, 1, 1, kv_len] or
        anything that broadcasts so. The keys it keeps are packed, without waiting for a GPU. A query with no key left
        gets 0.
    dropout_p : float in [0, 1)
        The seed is drawn from torch's default generator of the CPU.
    is_causal : bool
        Query i attends to keys 0 to i (top left).
    scale : float or None
        None is 1 / sqrt(head_dim).
    enable_gqa : bool
        Allow kv_heads to be a divisor of heads.

    Raises
    ------
    TypeError, ValueError
        Names the argument (q, k and v for query, key and value, where `flash_attention` finds it).
    UnsupportedError
        Masks that depend on the query or the head, and additive ones.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {x!r:.60} ({type(x).__name__}); allowed: a torch.Tensor")
        if x.ndim < 3:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; allowed: [..., heads, len, dim], at least 3 axes")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: got a mask with is_causal=True; allowed: one of the two")
    without_heads = query.ndim == 3
    if without_heads:
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(-3)
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if not enable_gqa and kv_heads not in (heads, 1):
        raise ValueError(f"key: got {kv_heads} heads for query's {heads}; allowed: as many, or enable_gqa=True")
    try:
        leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError as error:
        shapes = [tuple(x.shape) for x in (query, key, value)]
        raise ValueError(
            f"key: got shapes {shapes} of query, key and value; allowed: leading axes that broadcast"
        ) from error
    q, k, v = (
        x.expand(*leading, *x.shape[-3:]).reshape(math.prod(leading), *x.shape[-3:]) for x in (query, key, value)
    )
    options: dict[str, Any] = {"scale": scale}
    if dropout_p != 0:
        options |= {"dropout_p": dropout_p, "seed": fresh_seed()}

    if isinstance(attn_mask, CausalBias):
        is_causal = attn_mask.variant == CausalVariant.UPPER_LEFT
        if not is_causal:
            options["causal"] = True
        attn_mask = None
    if attn_mask is not None:
        out = _with_key_mask(q, k, v, _key_mask(attn_mask, leading, heads, k.shape[-2]), options)
    elif is_causal:
        out = _causal_from_the_top_left(q, k, v, options)
    else:
        out = flash_attention(q, k, v, layout="bhsd", **options)
    out = out.reshape(*leading, *out.shape[1:])
    return out.squeeze(-3) if without_heads else out


def _causal_from_the_top_left(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """`flash_attention` counts positions from the bottom right: the last query stands at the last key."""
    q_len, kv_len = q.shape[-2], k.shape[-2]
    if kv_len >= q_len:  # no query reaches a key beyond q_len
        return flash_attention(q, k[..., :q_len, :], v[..., :q_len, :], layout="bhsd", causal=True, **options)
    return flash_attention(q, k, v, layout="bhsd", window_size=(None, q_len - kv_len), **options)


def _key_mask(mask: torch.Tensor, leading: torch.Size, heads: int, kv_len: int) -> torch.Tensor:
    """The mask as [batch, kv_len]."""
    allowed = (
        "a boolean mask of the keys alone, [batch, 1, 1, kv_len], is_causal=True, or "
        "torch.nn.attention.bias.causal_upper_left or causal_lower_right"
    )
    if mask.dtype != torch.bool:
        raise UnsupportedError(f"attn_mask: got an additive mask of {mask.dtype}; allowed: {allowed}")
    if any(mask.shape[-axis] != 1 for axis in (2, 3) if mask.ndim >= axis):
        raise UnsupportedError(f"attn_mask: got a mask of shape {tuple(mask.shape)}; allowed: {allowed}")
    mask = mask.reshape(*(1,) * (3 + len(leading) - mask.ndim), *mask.shape)[..., 0, 0, :]
    try:
        return mask.expand(*leading, kv_len).reshape(math.prod(leading), kv_len)
    except RuntimeError as error:
        raise ValueError(
            f"attn_mask: got shape {tuple(mask.shape)}; allowed: one that broadcasts to {(*leading, heads, 1, kv_len)}"
        ) from error


def _with_key_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, options: dict[str, Any]
) -> Any:
    batch, q_len = q.shape[0], q.shape[-2]
    packing = Packing.of(kept)
    packed = flash_attention(
        q.transpose(1, 2).flatten(0, 1),
        packing.pack(k.transpose(1, 2)),
        packing.pack(v.transpose(1, 2)),
        cu_seqlens_q=equal_lengths(batch, q_len, q.device),
        cu_seqlens_k=packing.cu_seqlens,
        **options,
    )
    return packed.unflatten(0, (batch, q_len)).transpose(1, 2)


# ---- in the place of torch's -------------------------------------------------------------------------------------


def install() -> None:
    """Make `torch.nn.functional.scaled_dot_product_attention` the one above, for the whole process.

    Code that looks the function up when it calls it follows; what a module has imported by name, or called from C++,
    stays torch's. What is not supported raises; it does not go back to torch's own.
    """
    torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention


def uninstall() -> None:
    """Put torch's own back."""
    torch.nn.functional.scaled_dot_product_attention = _torch_own


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the body of a with statement; what was there before comes back."""
    before = torch.nn.functional.scaled_dot_product_attention
    install()
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = before
