"""flash-attn 2's functions under their own names and signatures: code written for it runs after a change of import.

    from cuflash.adapters.flash_attn import flash_attn_func, flash_attn_varlen_func, pad_input, unpad_input

Arguments that flash-attn documents mean what they mean there. `window_size` is (left, right) with -1 for no bound,
`softcap` 0 is none, and dropout draws its seed from torch's default generator of the CPU. What differs: more dtypes
and head dimensions, tensors on the CPU too, float32 gradients through the LSE, and -inf as the LSE of a query with no
key. What is not served raises.
"""

from __future__ import annotations

from typing import Any

import torch

from cuflash import UnsupportedError
from cuflash.adapters.torch._call import fresh_seed
from cuflash.adapters.torch.attention import flash_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "index_first_axis",
    "pad_input",
    "unpad_input",
]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q [batch, q_len, heads, head_dim], k and v [batch, kv_len, kv_heads, head_dim].

    Returns out like q, or with `return_attn_probs` (out, lse, None): lse [batch, heads, q_len] is float32 and
    differentiable; the probabilities that flash-attn returns third, for its tests, are never written down here.
    """
    return _attend(
        *(q, k, v, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor [batch, kv_len, 2, kv_heads, head_dim]."""
    k, v = _parts("kv", kv, 2, 5)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor [batch, len, 3, heads, head_dim]."""
    q, k, v = _parts("qkv", qkv, 3, 5)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """Attention of packed sequences: q [total_q, heads, head_dim], k and v [total_k, kv_heads, head_dim], and their
    boundaries, int32 [sequences + 1].

    The longest lengths are not needed and not read. Returns out like q, or with `return_attn_probs` (out, lse, None)
    with lse [heads, total_q].

    Raises UnsupportedError for a `block_table` (a paged cache).
    """
    if block_table is not None:
        raise UnsupportedError("block_table: got a paged cache; allowed: None, with k and v packed")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {x!r:.60} ({type(x).__name__}); allowed: an int32 tensor [sequences + 1]")
    return _attend(
        *(q, k, v, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor [total_k, 2, kv_heads, head_dim]."""
    k, v = _parts("kv", kv, 2, 4)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor [total, 3, heads, head_dim]."""
    q, k, v = _parts("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
    )


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows of x [rows, ...] at `indices` [kept]: [kept, ...]."""
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The kept tokens of a padded batch, one after the other. On a GPU this waits for their number.

    hidden_states [batch, len, ...]; attention_mask [batch, len], 1 for a token; unused_mask [batch, len], 1 for room
    that is kept in the packed result though it holds no token.

    Returns the packed tokens [total, ...], their places in [batch * len], the boundaries int32 [batch + 1], the longest
    length, and the number of tokens of each sequence without unused room, int32 [batch].
    """
    tokens = attention_mask.bool()
    kept = tokens if unused_mask is None else tokens | unused_mask.bool()
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, boundaries, int(lengths.max()) if len(lengths) else 0, tokens.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse of `unpad_input`: [total, ...] to [batch, seqlen, ...], 0 where no token is."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    **boundaries: torch.Tensor,
) -> Any:
    """flash-attn's arguments as those of `flash_attention`, which also takes the boundaries of packed sequences."""
    out, lse = flash_attention(
        q,
        k,
        v,
        causal=causal,
        window_size=_window(window_size),
        scale=softmax_scale,
        softcap=softcap if softcap != 0 else None,
        alibi_slopes=alibi_slopes,
        **boundaries,
        dropout_p=dropout_p,
        seed=fresh_seed() if dropout_p != 0 else None,
        return_lse=True,
        deterministic=deterministic,
    )
    return (out, lse, None) if return_attn_probs else out


def _window(window_size: Any) -> Any:
    """-1 is no bound; what is no pair is left to `flash_attention`, which says so."""
    if not isinstance(window_size, (tuple, list)):
        return window_size
    return tuple(None if side == -1 else side for side in window_size)


def _parts(name: str, packed: torch.Tensor, parts: int, rank: int) -> tuple[torch.Tensor, ...]:
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{name}: got {packed!r:.60} ({type(packed).__name__}); allowed: a torch.Tensor")
    if packed.ndim != rank or packed.shape[-3] != parts:
        raise ValueError(
            f"{name}: got shape {tuple(packed.shape)}; allowed: {rank} axes, the third from the end of length {parts}"
        )
    return packed.unbind(-3)
