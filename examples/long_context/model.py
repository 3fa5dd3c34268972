"""The model: a GPT of bytes whose parts can keep little for the backward. What each part keeps: docs/long_context.md.

Tensors are [batch, tokens, width] between the parts and [batch, tokens, heads, head_dim] in attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import cuflash
import cuflash.adapters.torch  # registers the operator cuflash::fwd

VOCABULARY = 256
CHECKPOINTS = ("selective", "full", "none")
ROTARY_BASE = 500_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes, and how memory is saved; ValueError for what does not fit together."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    attention: str = "cuflash"
    checkpoint: str = "selective"  # attention keeps out and LSE; "full": it is computed again; "none": all is kept
    mlp_tile: int = 16_384  # tokens; 0: all at once
    loss_chunk: int = 16_384  # tokens; 0: all at once

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 1 or more")
        for name in ("mlp_tile", "loss_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: tokens, or 0 for all at once")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {self.kv_heads}; allowed: a divisor of heads, {self.heads}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width: got {self.width}; allowed: a multiple of 2 * heads, {2 * self.heads}")
        for name, allowed in (("attention", tuple(ATTENTIONS)), ("checkpoint", CHECKPOINTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed: one of {allowed}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


# ---- attention ---------------------------------------------------------------------------------------------------

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend | None = None) -> torch.Tensor:
    def attend() -> torch.Tensor:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    if backend is None:
        return attend()
    with sdpa_kernel(backend):
        return attend()


def _standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The textbook's, which writes down S and P [batch, heads, tokens, tokens]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = at_least_float32(torch.einsum("bqhd,bkhd->bhqk", q, k)) / math.sqrt(q.shape[3])
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    probabilities = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities.to(v.dtype), v)


ATTENTIONS: dict[str, Attention] = {
    "cuflash": functools.partial(cuflash.flash_attention, causal=True),
    "sdpa": _sdpa,  # with the backend that torch chooses
    "sdpa-cudnn": functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "standard": _standard,
}

# The operators whose results, out and LSE, a selective checkpoint keeps. Standard attention has none: keeping out alone
# would not spare the backward its S and P.
KEPT = [
    torch.ops.cuflash.fwd.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


# ---- less memory -------------------------------------------------------------------------------------------------


def recomputed(function: Callable[..., torch.Tensor], *inputs: Any, **options: Any) -> torch.Tensor:
    """function(*inputs), of which autograd keeps the inputs alone and computes the rest again in the backward."""
    # Nothing here draws random numbers, so their state need not be kept.
    result = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
    assert isinstance(result, torch.Tensor)
    return result


def tiles(function: Callable[..., torch.Tensor], size: int, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """function of each tile of `size` tokens, one after the other, recomputed in the backward; 0: of all, and kept.

    The tiles are views of the inputs, so that what is kept is the inputs, once.
    """
    if size == 0:
        return [function(*inputs)]
    return [recomputed(function, *tile) for tile in zip(*(x.split(size, dim=1) for x in inputs), strict=True)]


# ---- the model ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = nn.RMSNorm(config.width)
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        policy = self.config.checkpoint
        if policy == "none":
            x = self.attend(x, rotation)
        elif policy == "full":
            x = recomputed(self.attend, x, rotation)
        else:
            contexts = functools.partial(create_selective_checkpoint_contexts, KEPT)
            x = recomputed(self.attend, x, rotation, context_fn=contexts)
        whole = 0 if policy == "none" else x.shape[1]
        return torch.cat(tiles(self.transform, self.config.mlp_tile or whole, x), dim=1)

    def attend(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        heads, kv_heads = self.config.heads, self.config.kv_heads
        qkv = self.qkv(self.attention_norm(x)).unflatten(2, (heads + 2 * kv_heads, self.config.head_dim))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
        out = ATTENTIONS[self.config.attention](rotated(q, rotation), rotated(k, rotation), v)
        return x + self.out(out.flatten(2))

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Model(nn.Module):
    """Bytes [batch, tokens + 1] to the mean cross entropy of all but the first, in nats."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)  # also the head
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_x = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.layers) if into_x else 1))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        tokens, targets = text[:, :-1], text[:, 1:]
        x = self.embedding(tokens)
        rotation = rotation_table(tokens.shape[1], self.config.head_dim, x.device)
        for block in self.blocks:
            x = block(x, rotation)
        return torch.stack(tiles(self.loss, self.config.loss_chunk, x, targets)).sum() / targets.numel()

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the cross entropies of a chunk; its logits [batch * tokens, 256] live in here."""
        logits = at_least_float32(F.linear(self.norm(x), self.embedding.weight))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def rotation_table(length: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of rotary positions, [2, length, 1, head_dim / 2] float32, from float64 angles: at a million
    tokens a float32 angle is off by a twentieth."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float64)[:, None, None] * frequencies
    return torch.stack((angles.cos().float(), angles.sin().float()))


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al., 2021) on [batch, tokens, heads, head_dim], in x's dtype."""
    cos, sin = rotation
    first, second = at_least_float32(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
