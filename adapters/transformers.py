"""Hugging Face transformers: exact attention as an attention implementation, with padding masks honoured.

    from cuflash.adapters import transformers as cuflash_transformers

    cuflash_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=cuflash_transformers.NAME)

Padded batches are packed inside: what is padding is not computed with. In causal models its outputs are 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from cuflash import UnsupportedError
from cuflash.adapters.torch._call import fresh_seed
from cuflash.adapters.torch.attention import flash_attention
from cuflash.adapters.torch.packing import Packing, equal_lengths

NAME = "cuattention"  # a name with "flash" in it would make transformers look for the package flash-attn

_UNSUPPORTED_ARGUMENTS = ("position_bias", "head_mask", "block_table")


def register(name: str = NAME) -> None:
    """Make `attn_implementation=name` of transformers' models this attention and its masks.

    Raises ValueError for a name that contains "flash".
    """
    if "flash" in name:
        raise ValueError(f"name: got {name!r}; allowed: one without 'flash', which transformers takes for flash-attn")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' models call: query [batch, heads, q_len, head_dim], key and value alike with kv_heads.

    `attention_mask` is what the function of that name below made; `s_aux` [heads] are sinks. Packed batches of one row
    come with `cu_seq_lens_q` and `cu_seq_lens_k`, as transformers' data collators give them.

    Returns the output [batch, q_len, heads, head_dim], and None for the probabilities, which are never written down.
    """
    if more.get("output_attentions"):
        raise UnsupportedError("output_attentions: got True; allowed: False, as the probabilities are not written down")
    for name in _UNSUPPORTED_ARGUMENTS:
        if more.get(name) is not None:
            raise UnsupportedError(f"{name}: got {type(more[name]).__name__}; allowed: None")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reach = None if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": None if reach is None else (reach, None if causal else reach),
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux if s_aux is None or s_aux.dtype == torch.float32 else s_aux.to(query.dtype),
    }
    if dropout:
        options |= {"dropout_p": dropout, "seed": fresh_seed()}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]

    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q: got a batch of {batch} rows; allowed: one packed row")
        return _packed(q, k, v, cu_seq_lens_q.int(), cu_seq_lens_k.int(), options), None
    if attention_mask is None:
        return flash_attention(q, k, v, **options), None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != kv_len + q_len:
        raise UnsupportedError(
            f"attention_mask: got a mask of shape {tuple(attention_mask.shape)}; allowed: None, or a padding mask "
            "[batch, len] given to the model"
        )
    if attention_mask.dtype != torch.bool:
        boundaries = _boundaries(attention_mask[:, :kv_len])
        return _packed(q, k, v, boundaries, boundaries, options), None
    queries, keys = _packings(attention_mask, q_len, kv_len)
    packed_keys = {"k": keys.pack(k), "v": keys.pack(v), "cu_seqlens_k": keys.cu_seqlens}
    if not causal and reach is None:  # queries have no place among the keys; those of another sequence have no mask
        ends = equal_lengths(batch, q_len, q.device)
        out = flash_attention(q.flatten(0, 1), cu_seqlens_q=ends, **packed_keys, **options)
        return out.unflatten(0, (batch, q_len)), None
    out = flash_attention(queries.pack(q), cu_seqlens_q=queries.cu_seqlens, **packed_keys, **options)
    return queries.unpack(out, batch), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor | None:
    """What `attention` above is given as its mask, [batch, kv_len + q_len]: for the keys, then for the queries.

    Of booleans, which tokens are there; of integers, which packed sequence a token belongs to; None where every token
    is there. Causal masks and windows are the attention's own. Raises UnsupportedError for a mask that none of this
    can say.
    """
    bidirectional = allow_is_bidirectional_skip is not None  # only such masks are asked for with it
    sequences = None
    if torch.compiler.is_compiling():  # functions cannot be looked into here
        chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
        if use_vmap or chunked or not (allow_is_causal_skip or allow_is_bidirectional_skip or q_length == 1):
            raise UnsupportedError(
                "mask_function: got a mask under torch.compile that may be more than causal, a window and padding; "
                "allowed: these (give the model an attention_mask, so that it does not look for packed sequences)"
            )
    else:
        for part in _parts(mask_function):
            name = part.__qualname__.partition(".")[0]
            if name == "packed_sequence_mask_function":
                sequences = _captured(part)["packed_sequence_mask"]
            elif name not in _KNOWN_MASKS:
                raise UnsupportedError(
                    f"mask_function: got {name}; allowed: causal and bidirectional masks, windows, padding and packing"
                )
    if sequences is not None:
        return torch.cat((sequences, sequences), dim=1)
    last = q_offset + q_length
    whole = bidirectional or (not isinstance(last, torch.Tensor) and last == kv_offset + kv_length)
    if attention_mask is None and whole:
        return None
    # A cache of fixed size has room for tokens to come.
    columns = torch.arange(kv_length, device=device) + kv_offset
    there = torch.ones_like(columns, dtype=torch.bool) if whole else columns < last
    if attention_mask is not None:
        missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
        padded = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
        there = there & padded[:, kv_offset : kv_offset + kv_length]
    there = there.expand(batch_size, kv_length)
    if not torch.compiler.is_compiling() and there.all():
        return None
    if bidirectional and q_length != kv_length:  # the queries are of another sequence
        queries = there.new_ones(batch_size, q_length)
    else:
        queries = there.index_select(1, torch.arange(q_length, device=device) + (q_offset - kv_offset))
    return torch.cat((there, queries), dim=1)


_KNOWN_MASKS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "padding_mask_function",
)


def _parts(mask_function: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """The masks of which a mask function of transformers is the intersection."""
    if mask_function is None:
        return
    name = mask_function.__qualname__.partition(".")[0]
    if name == "and_masks":
        for part in _captured(mask_function)["mask_functions"]:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence":
        yield from _parts(_captured(mask_function)["mask_function"])
    else:
        yield mask_function


def _captured(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The variables of the surrounding function that a function uses."""
    return inspect.getclosurevars(function).nonlocals


_packings_of_masks = WeakTensorKeyDictionary()


def _packings(mask: torch.Tensor, q_len: int, kv_len: int) -> tuple[Packing, Packing]:
    """Of the queries and of the keys; made by the first layer that sees a mask, for all that see the same one."""
    eager = not torch.compiler.is_compiling()
    if eager and mask in _packings_of_masks:
        return _packings_of_masks[mask]
    keys = Packing.of(mask[:, :kv_len])
    queries = keys if q_len == kv_len else Packing.of(mask[:, kv_len:])
    if eager:
        _packings_of_masks[mask] = queries, keys
    return queries, keys


def _boundaries(sequences: torch.Tensor) -> torch.Tensor:
    """The boundaries int32 [sequences + 1] of a batch of packed rows, from the number of each token's sequence."""
    batch, length = sequences.shape
    starts = torch.ones(batch, length, dtype=torch.bool, device=sequences.device)
    starts[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    return torch.nn.functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=batch * length).int()


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    out = flash_attention(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, **options)
    return out.unflatten(0, q.shape[:2])
