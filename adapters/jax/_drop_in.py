"""The signatures that JAX, Flax and packed data already have, on top of `flash_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cuflash.adapters.jax._attention import flash_attention
from cuflash.errors import UnsupportedError
from cuflash.plans import bad


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
) -> Any:
    """`jax.nn.dot_product_attention` by cuflash: the same arguments, layout and alignment of masks.

    Parameters
    ----------
    query : array [batch, q_len, heads, head_dim] or [q_len, heads, head_dim]
    key, value : arrays [batch, kv_len, kv_heads, head_dim], or without batch like query
        query's dtype; kv_heads divides heads.
    bias, mask : arrays that broadcast to [batch, heads, q_len, kv_len] or None
        Added to the scores, and bool: True may attend. They skip no work, and take the portable kernels.
    scale : float or None
        Factor of the scores; None is 1 / sqrt(head_dim).
    is_causal : bool
        Key index <= query index: aligned to the top left, where `flash_attention` aligns to the bottom right.
    query_seq_lengths, key_value_seq_lengths : int32 arrays [batch] or None
        The rows of each example that are no padding; the output of padded queries is 0. With is_causal or
        local_window_size query and key have to be of the same length, and one array is given as both.
    local_window_size : int, (left, right) or None
        Keep q_index - left <= kv_index <= q_index + right; one number is both sides, None no bound on a side.
    implementation : None
    return_residual : bool
        Also return LSE [batch, q_len, heads] (or without batch) in query's dtype; it has no gradient.
    softcap, sinks
        As for `flash_attention`, which jax.nn does not have.

    Returns
    -------
    out, or (out, residual)
        out has query's shape and dtype. A query that may attend to no key gives 0 (in jax.nn the mean of value).

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As for `flash_attention`.
    """
    if implementation is not None:
        bad("implementation", repr(implementation), "None")
    query, key, value = (_ranked(*pair) for pair in (("query", query), ("key", key), ("value", value)))
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    bounds = _bounds(is_causal, local_window_size)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks}
    dense = _dense(bias, mask, query.dtype, query.shape[:1])
    if bias is not None or mask is not None:  # packed sequences have none
        batch, q_len, kv_len = *query.shape[:2], key.shape[1]
        mask = _within(dense["mask"], query_seq_lengths, "query_seq_lengths", q_len, batch, queries=True)
        mask = _within(mask, key_value_seq_lengths, "key_value_seq_lengths", kv_len, batch, queries=False)
        out, lse = _top_left(query, key, value, bounds, options | {"bias": dense["bias"], "mask": mask})
    elif query_seq_lengths is None and key_value_seq_lengths is None:
        out, lse = _top_left(query, key, value, bounds, options)
    else:
        out, lse = _padded(query, key, value, query_seq_lengths, key_value_seq_lengths, bounds, options)
    residual = jax.lax.stop_gradient(lse.swapaxes(1, 2).astype(out.dtype))
    if not batched:
        out, residual = out[0], residual[0]
    return (out, residual) if return_residual else out


def attention_fn(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: None = None,
    module: None = None,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
) -> Any:
    """The `attention_fn` of Flax's attention modules, of linen and of nnx.

    Give causal masks and windows as options, which skip work, with functools.partial where the module does not pass
    them on:
    `nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=partial(attention_fn, is_causal=True))`.

    Parameters
    ----------
    query, key, value : arrays [..., len, heads, head_dim]
        Any number of batch axes, the same for all three.
    bias, mask : arrays that broadcast to [..., heads, q_len, kv_len] or None
        Added to the scores; and what is not 0 or False in a mask may attend. They skip no work, and take the portable
        kernels.
    precision, module : None
        Another precision and sown attention weights raise.
    dropout_rng, dropout_rate, deterministic, broadcast_dropout
        Dropout is not supported: the key is known only at run time, where cuflash takes a seed that is known while
        tracing. A dropout_rate above 0 without `deterministic` raises.
    dtype : dtype or None
        What query, key and value are cast to.
    is_causal, local_window_size, scale, softcap, sinks
        As for `dot_product_attention`.

    Returns
    -------
    out : array of query's shape with value's head_dim
    """
    if precision is not None:
        bad("precision", repr(precision), "None")
    if module is not None:
        raise UnsupportedError("module: got a module that sows attention weights; they are never computed as a whole")
    if dropout_rate > 0 and not deterministic:
        raise UnsupportedError(
            f"dropout_rate: got {dropout_rate}; use 0 or deterministic=True, or flash_attention with dropout_p and seed"
        )
    *batch, q_len, heads, _ = query.shape
    query, key, value = (x.astype(dtype or x.dtype).reshape(-1, *x.shape[x.ndim - 3 :]) for x in (query, key, value))
    bounds = _bounds(is_causal, local_window_size)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks} | _dense(bias, mask, query.dtype, batch)
    out, _ = _top_left(query, key, value, bounds, options)
    return out.reshape(*batch, q_len, heads, out.shape[-1])


def segment_boundaries(segment_ids: Any, *, max_segments: int) -> jax.Array:
    """The cu_seqlens of packed sequences that segment ids describe, without a host synchronisation.

    Parameters
    ----------
    segment_ids : integer array [len] or [batch, len]
        Neighbours of the same id belong to one sequence. Rows of a batch never share a sequence.
    max_segments : int
        How many sequences there may be in all, known while tracing. Tokens of further ones belong to no sequence:
        output 0, LSE -inf.

    Returns
    -------
    int32 array [max_segments + 1]
        For q, k and v as [batch * len, heads, head_dim]: `cu_seqlens_q` and `cu_seqlens_k` of `flash_attention`.
    """
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.ndim not in (1, 2) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        bad("segment_ids", f"shape {segment_ids.shape}, dtype {segment_ids.dtype}", "integers [len] or [batch, len]")
    if not isinstance(max_segments, int) or max_segments < 1:
        bad("max_segments", repr(max_segments), "an integer of at least 1")
    first = jnp.ones_like(segment_ids[..., :1], dtype=bool)
    starts = jnp.concatenate([first, segment_ids[..., 1:] != segment_ids[..., :-1]], axis=-1).ravel()
    (boundaries,) = jnp.nonzero(starts, size=max_segments + 1, fill_value=segment_ids.size)
    return boundaries.astype(jnp.int32)


# ---- what they share ---------------------------------------------------------------------------------------------


def _dense(bias: Any, mask: Any, dtype: Any, batch: Sequence[int]) -> dict[str, Any]:
    """A bias and a mask with one batch axis, the bias in a dtype that `flash_attention` takes beside this one."""
    dense = {"bias": bias, "mask": mask}
    for name, array in dense.items():
        if array is None:
            continue
        array = jnp.asarray(array)
        wanted = bool if name == "mask" else array.dtype if array.dtype == dtype else jnp.float32
        if len(batch) != 1 and array.ndim > 3:
            try:
                array = jnp.broadcast_to(array, (*batch, *array.shape[array.ndim - 3 :]))
            except ValueError:
                bad(name, f"shape {array.shape}", f"one that broadcasts to [{batch}, heads, q_len, kv_len]")
            array = array.reshape(-1, *array.shape[array.ndim - 3 :])
        dense[name] = array.astype(wanted)
    return dense


def _kept(name: str, array: Any, whole: tuple[int, int], kept: tuple[int, int]) -> Any:
    """A bias or a mask of the first queries and keys alone."""
    if array is None:
        return None
    lengths = array.shape[-2:]
    expected = whole[2 - len(lengths) :]
    if any(length not in (1, n) for length, n in zip(lengths, expected, strict=True)):
        bad(name, f"shape {array.shape}", f"one that broadcasts to [batch, heads, {whole[0]}, {whole[1]}]")
    parts = (slice(n if length > 1 else None) for length, n in zip(lengths, kept[2 - len(lengths) :], strict=True))
    return array[(..., *parts)]


def _within(mask: Any, lengths: Any, name: str, total: int, batch: int, *, queries: bool) -> Any:
    """The mask without what is padding."""
    if lengths is None:
        return mask
    inside = jnp.arange(total) < _checked_lengths(lengths, name, batch)[:, None]
    inside = inside[:, None, :, None] if queries else inside[:, None, None, :]
    return inside if mask is None else inside & mask


def _checked_lengths(lengths: Any, name: str, batch: int) -> jax.Array:
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        bad(name, f"shape {lengths.shape}, dtype {lengths.dtype}", f"int32 [{batch}]")
    return lengths


def _ranked(name: str, array: Any) -> jax.Array:
    array = jnp.asarray(array)
    if array.ndim not in (3, 4):
        bad(name, f"shape {array.shape}", "[batch, len, heads, head_dim] or [len, heads, head_dim]")
    return array


def _bounds(is_causal: Any, local_window_size: Any) -> tuple[int | None, int | None]:
    """How far a query sees to the left and to the right of its own index."""
    if not isinstance(is_causal, bool):
        bad("is_causal", repr(is_causal), "True or False", TypeError)
    window = local_window_size
    if window is None or (isinstance(window, int) and not isinstance(window, bool)):
        window = (window, window)
    sides = list(window) if isinstance(window, Sequence) else []
    if len(sides) != 2 or not all(side is None or (isinstance(side, int) and side >= 0) for side in sides):
        bad("local_window_size", repr(local_window_size), "None, an integer >= 0 or (left, right) of these")
    left, right = sides
    return left, 0 if is_causal else right


def _top_left(
    query: jax.Array, key: jax.Array, value: jax.Array, bounds: tuple[int | None, int | None], options: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """out and LSE where positions are indices. Without keys that no query sees and queries that see no key, the window
    that is aligned to the last of both has bounds >= 0 again.
    """
    left, right = bounds
    q_len, kv_len = query.shape[1], key.shape[1]
    kept_keys = kv_len if right is None else min(kv_len, q_len + right)
    kept_queries = q_len if left is None else min(q_len, kept_keys + left)
    shift = kept_keys - kept_queries
    kept = kept_queries, kept_keys
    options = options | {name: _kept(name, options.get(name), (q_len, kv_len), kept) for name in ("bias", "mask")}
    out, lse = flash_attention(
        query[:, :kept_queries],
        key[:, :kept_keys],
        value[:, :kept_keys],
        window_size=(None if left is None else left + shift, None if right is None else right - shift),
        return_lse=True,
        **options,
    )
    without_keys = q_len - kept_queries
    if without_keys:
        sinks = options["sinks"]
        empty = jnp.full((), -jnp.inf, lse.dtype) if sinks is None else jnp.asarray(sinks, lse.dtype)[:, None]
        rest = jnp.broadcast_to(empty, (*lse.shape[:2], without_keys))
        out = jnp.pad(out, ((0, 0), (0, without_keys), (0, 0), (0, 0)))
        lse = jnp.concatenate([lse, rest], axis=2)
    return out, lse


def _padded(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    q_lengths: Any,
    kv_lengths: Any,
    bounds: tuple[int | None, int | None],
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """out and LSE of examples with padding: packed sequences, of which each example is three.

    Its queries with its keys; its padded queries, without a key; its padded keys, without a query.
    """
    (batch, q_len, heads, _), kv_len = query.shape, key.shape[1]
    if bounds != (None, None) and (q_lengths is not kv_lengths or q_len != kv_len):
        raise UnsupportedError(
            "key_value_seq_lengths: got lengths that may differ from those of the queries; with is_causal or "
            "local_window_size give one array as both, and query and key of the same length"
        )

    def boundaries(lengths: Any, name: str, total: int, *, queries: bool) -> jax.Array:
        lengths = _checked_lengths(jnp.full(batch, total, jnp.int32) if lengths is None else lengths, name, batch)
        starts = total * jnp.arange(batch, dtype=jnp.int32)
        ends = starts + jnp.clip(lengths, 0, total)
        padded = starts + total
        bounds = jnp.stack([ends, padded if queries else ends, padded], axis=1).ravel()
        return jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])

    left, right = bounds
    out, lse = flash_attention(
        *(x.reshape(-1, *x.shape[2:]) for x in (query, key, value)),
        cu_seqlens_q=boundaries(q_lengths, "query_seq_lengths", q_len, queries=True),
        cu_seqlens_k=boundaries(kv_lengths, "key_value_seq_lengths", kv_len, queries=False),
        window_size=(left, right),
        return_lse=True,
        **options,
    )
    return out.reshape(batch, q_len, heads, -1), lse.reshape(heads, batch, q_len).swapaxes(0, 1)
