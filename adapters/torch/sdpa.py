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
    attn_mask : None, a tensor that broadcasts to [..., heads, q_len, kv_len], or a torch.nn.attention.bias.CausalBias
        Boolean, True for a key that takes part, or float32 or of query's dtype, added to the scores and differentiable.
        The keys that a boolean mask of the keys alone keeps, [batch, 1, 1, kv_len], are packed, without waiting for a
        GPU; no other mask saves work. A query with no key left gets 0.
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
        Names the argument (q, k and v for query, key and value, bias for an additive attn_mask, where `flash_attention`
        finds it).
    UnsupportedError
        As for `flash_attention`.
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
    heads, kv_heads, kv_len = query.shape[-3], key.shape[-3], key.shape[-2]
    if not enable_gqa and kv_heads not in (heads, 1):
        raise ValueError(f"key: got {kv_heads} heads for query's {heads}; allowed: as many, or enable_gqa=True")
    leading = query.shape[:-3]
    if key.shape[:-3] != leading or value.shape[:-3] != leading:
        leading = _broadcast(query, key, value)
        query, key, value = (x.expand(*leading, *x.shape[-3:]) for x in (query, key, value))
    # Lengths before heads, as models hold them: the output then lies in memory as theirs from torch's own does.
    q, k, v = (_one_batch_axis(x).transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scale}
    if dropout_p != 0:
        options |= {"dropout_p": dropout_p, "seed": fresh_seed()}

    if isinstance(attn_mask, CausalBias):
        lengths = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
        if lengths != (query.shape[-2], kv_len):
            raise ValueError(f"attn_mask: got a causal bias of {lengths}; allowed: {(query.shape[-2], kv_len)}")
        top_left = attn_mask.variant == CausalVariant.UPPER_LEFT
        out = (
            _causal_from_the_top_left(q, k, v, options)
            if top_left
            else flash_attention(q, k, v, causal=True, **options)
        )
    elif attn_mask is not None:
        mask = _mask(attn_mask, leading, (heads, query.shape[-2], kv_len), key)
        if mask.dtype != torch.bool:
            out = flash_attention(q, k, v, bias=mask, **options)
        elif any(mask.shape[axis] != 1 for axis in (-3, -2)):
            out = flash_attention(q, k, v, mask=mask, **options)
        else:
            out = _with_key_mask(q, k, v, mask[:, 0, 0].expand(len(q), kv_len), options)
    elif is_causal:
        out = _causal_from_the_top_left(q, k, v, options)
    else:
        out = flash_attention(q, k, v, **options)
    out = out.transpose(1, 2)
    if len(leading) != 1:
        out = out.unflatten(0, leading)
    return out.squeeze(-3) if without_heads else out


def _broadcast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError as error:
        raise ValueError(
            f"key: got shape {tuple(key.shape)}, value {tuple(value.shape)}; allowed: leading axes that broadcast "
            f"against query's, {tuple(query.shape)}"
        ) from error


def _one_batch_axis(x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _causal_from_the_top_left(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """`flash_attention` counts positions from the bottom right: the last query stands at the last key."""
    q_len, kv_len = q.shape[1], k.shape[1]
    if kv_len >= q_len:  # no query reaches a key beyond q_len
        return flash_attention(q, k[:, :q_len], v[:, :q_len], causal=True, **options)
    return flash_attention(q, k, v, window_size=(None, q_len - kv_len), **options)


def _mask(mask: Any, leading: torch.Size, of_scores: tuple[int, int, int], key: torch.Tensor) -> torch.Tensor:
    """The mask with four axes, the leading ones made one; each broadcasts."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attn_mask: got {mask!r:.60} ({type(mask).__name__}); allowed: None, a tensor or a CausalBias")
    if mask.device != key.device:
        raise ValueError(f"attn_mask: got a tensor on {mask.device}; allowed: key's device, {key.device}")
    whole = (*leading, *of_scores)
    axes = zip(reversed(mask.shape), reversed(whole), strict=False)
    if mask.ndim > len(whole) or any(length not in (1, of_whole) for length, of_whole in axes):
        raise ValueError(f"attn_mask: got shape {tuple(mask.shape)}; allowed: one that broadcasts to {whole}")
    mask = mask.reshape(*(1,) * (len(whole) - mask.ndim), *mask.shape)
    if len(leading) == 1:
        return mask
    one = all(length == 1 for length in mask.shape[:-3])
    return _one_batch_axis(mask if one else mask.expand(*leading, *mask.shape[-3:]))


def _with_key_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    batch, q_len = q.shape[:2]
    packing = Packing.of(kept)
    packed = flash_attention(
        q.flatten(0, 1),
        packing.pack(k),
        packing.pack(v),
        cu_seqlens_q=equal_lengths(batch, q_len, q.device),
        cu_seqlens_k=packing.cu_seqlens,
        **options,
    )
    return packed.unflatten(0, (batch, q_len))


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
