"""Everything that may stand beside cuflash: PEERS, one entry each. What is not installed is named and left out.

An entry says what must be importable, what the peer is asked for, and how its attention is called on arrays
[batch, len, heads, head_dim], or packed [total, heads, head_dim]. A peer that raises at its first call on a problem is
left out there, with its own words as the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import cuflash
from cuflash.bench.contestant import Pair, Prepare, on_arrays, on_jax, on_torch
from cuflash.bench.workloads import Workload
from cuflash.demo import standard

OURS = "cuflash"


def _any(workload: Workload) -> str:
    """Of a peer that is asked for every problem."""
    return ""


def _few(workload: Workload) -> str:
    """Of a peer that compiles for seconds: some problems must do."""
    few = workload.causal and workload.head_dim == 128 and workload.heads == workload.kv_heads
    few = few and (workload.length == 16_384 or workload.sequences != ())
    return "" if few else "compiled anew for every problem: measured causal, at head_dim 128, at 16,384 and packed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One contestant. `refuses` gives the reason why it is not asked for a problem, empty when it is."""

    name: str
    module: str | None = None  # that must be importable
    prepare: Prepare
    device: str | None = None  # "cpu" or "gpu" where it runs, or is of interest, only there
    quantity: str | None = None  # the only one of the tables' that it is of interest for
    refuses: Callable[[Workload], str] = _any

    def obstacle(self, on_gpu: bool) -> str:
        """Why it does not take part on this machine at all; empty when it does."""
        if self.device is not None and (self.device == "gpu") != on_gpu:
            return f"takes part on a {self.device.upper()} only"
        if self.module is None:
            return ""
        try:
            found = importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # a parent package is not there
            found = False
        return "" if found else f"{self.module} is not installed"


# ---- cuflash and standard attention, on arrays of NumPy and CuPy -----------------------------------------------------


def _options(workload: Workload, asarray: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """The keyword options of cuflash for the problem."""
    options: dict[str, Any] = {"causal": workload.causal}
    if workload.sequences:
        boundaries = asarray(workload.boundaries)
        options |= {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries}
    return options


def _cuflash(workload: Workload, xp: Any) -> Pair:
    options = _options(workload, xp.asarray)
    if workload.direction == "forward":
        return Pair(lambda q, k, v: (cuflash.flash_attention(q, k, v, **options),), cuflash.flash_attention_backward)
    return Pair(
        lambda q, k, v: cuflash.flash_attention(q, k, v, **options, return_lse=True),
        lambda dout, q, k, v, out, lse: cuflash.flash_attention_backward(dout, q, k, v, out, lse, **options),
    )


def _standard(workload: Workload, xp: Any) -> Pair:
    """Standard attention, of a sequence after the other where they are packed; keys and values are repeated for the
    query heads that share them, and their gradients summed."""
    group = workload.heads // workload.kv_heads
    parts = [slice(*pair) for pair in zip(workload.boundaries, workload.boundaries[1:], strict=False)]

    def shared(x: Any) -> Any:
        return x if group == 1 else xp.repeat(x, group, axis=-2)

    def summed(x: Any) -> Any:
        return x if group == 1 else x.reshape(*x.shape[:-2], -1, group, x.shape[-1]).sum(axis=-2)

    def forward(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        return standard.attention(q, shared(k), shared(v), causal=workload.causal, xp=xp)

    def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, probabilities: Any) -> tuple[Any, Any, Any]:
        dq, dk, dv = standard.attention_backward(dout, q, shared(k), shared(v), out, probabilities, xp=xp)
        return dq, summed(dk), summed(dv)

    def packed_forward(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        outs, probabilities = zip(
            *(forward(q[None, part], k[None, part], v[None, part]) for part in parts), strict=True
        )
        return xp.concatenate(outs, axis=1)[0], probabilities

    def packed_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, probabilities: Any) -> tuple[Any, Any, Any]:
        found = [
            backward(dout[None, part], q[None, part], k[None, part], v[None, part], out[None, part], p)
            for part, p in zip(parts, probabilities, strict=True)
        ]
        dq, dk, dv = (xp.concatenate(gradients, axis=1)[0] for gradients in zip(*found, strict=True))
        return dq, dk, dv

    return Pair(packed_forward, packed_backward) if workload.sequences else Pair(forward, backward)


# ---- torch -----------------------------------------------------------------------------------------------------------


def _sdpa(workload: Workload, device: Any) -> Callable[[Any, Any, Any], Any]:
    """torch's scaled_dot_product_attention, of a sequence after the other where they are packed."""
    import torch

    shared: dict[str, Any] = {"enable_gqa": True} if workload.heads != workload.kv_heads else {}

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=workload.causal, **shared)
        return out.transpose(-3, -2)

    if not workload.sequences:
        return attend
    lengths = list(workload.sequences)
    return lambda q, k, v: torch.cat(
        [attend(*(x[None] for x in part))[0] for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)]
    )


def _sdpa_peer(backend: str, device: str | None = None) -> Peer:
    """torch's attention with one of its backends, named as torch names it."""

    def scope() -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, backend))

    return Peer(name=backend, module="torch", prepare=on_torch(_sdpa, scope), device=device)


def _flex_attention(workload: Workload, device: Any) -> Callable[[Any, Any, Any], Any]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # each problem is compiled for its own shape; without this the limit of recompilations is met
    compiled: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    lengths = torch.tensor(workload.sequences or (workload.length,), device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)

    def causal(batch: Any, head: Any, q_index: Any, kv_index: Any) -> Any:
        return q_index >= kv_index

    def causal_in_documents(batch: Any, head: Any, q_index: Any, kv_index: Any) -> Any:
        return (q_index >= kv_index) & (document[q_index] == document[kv_index])

    mask = None
    if workload.causal:
        total = len(document)
        predicate = causal_in_documents if workload.sequences else causal
        # Not compiled: with torch 2.11 that takes minutes, for the sort in it (pytorch/pytorch#182060).
        mask = create_block_mask(predicate, None, None, total, total, device=device)
    shared = workload.heads != workload.kv_heads

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=shared).transpose(1, 2)

    if workload.sequences:
        return lambda q, k, v: attend(q[None], k[None], v[None])[0]
    return attend


def _flash_attn(module: str, workload: Workload, device: Any) -> Callable[[Any, Any, Any], Any]:
    """flash-attn's functions, which releases 2, 3 and 4 have in modules of their own."""
    library = importlib.import_module(module)
    attend: Callable[..., Any] = partial(library.flash_attn_func, causal=workload.causal)
    if workload.sequences:
        import torch

        boundaries = torch.from_numpy(workload.boundaries).to(device)
        attend = partial(
            library.flash_attn_varlen_func,
            cu_seqlens_q=boundaries, cu_seqlens_k=boundaries,
            max_seqlen_q=workload.length, max_seqlen_k=workload.length, causal=workload.causal,
        )  # fmt: skip

    def out_only(q: Any, k: Any, v: Any) -> Any:
        result = attend(q, k, v)
        return result[0] if isinstance(result, tuple) else result  # some releases return the LSE besides

    return out_only


def _flash_attn_peer(name: str, module: str) -> Peer:
    return Peer(name=name, module=module, prepare=on_torch(partial(_flash_attn, module)), device="gpu")


def _xformers(workload: Workload, device: Any) -> Callable[[Any, Any, Any], Any]:
    ops: Any = importlib.import_module("xformers.ops")
    bias: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    if workload.heads != workload.kv_heads:
        raise ValueError("grouped heads need another layout there")
    if workload.sequences:
        mask = bias.BlockDiagonalCausalMask.from_seqlens(list(workload.sequences))
        return lambda q, k, v: ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    mask = bias.LowerTriangularMask() if workload.causal else None
    return partial(ops.memory_efficient_attention, attn_bias=mask)


def _cuflash_on_torch(workload: Workload, device: Any) -> Callable[[Any, Any, Any], Any]:
    return partial(cuflash.flash_attention, causal=workload.causal)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def _jax_nn(workload: Workload) -> Callable[[Any, Any, Any], Any]:
    import jax

    if workload.sequences:
        raise ValueError("it takes no packed sequences")
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return partial(jax.nn.dot_product_attention, is_causal=workload.causal, implementation=implementation)


def _cuflash_on_jax(workload: Workload) -> Callable[[Any, Any, Any], Any]:
    return partial(cuflash.flash_attention, causal=workload.causal)


PEERS = (
    Peer(name=OURS, prepare=on_arrays(_cuflash)),
    Peer(name="standard", prepare=on_arrays(_standard), device="cpu"),  # on a GPU torch's MATH is standard attention
    _sdpa_peer("CUDNN_ATTENTION", "gpu"),
    _sdpa_peer("FLASH_ATTENTION"),
    _sdpa_peer("EFFICIENT_ATTENTION", "gpu"),
    _sdpa_peer("MATH"),
    Peer(name="flex_attention", module="torch", prepare=on_torch(_flex_attention), device="gpu", refuses=_few),
    _flash_attn_peer("flash_attn 2", "flash_attn"),
    _flash_attn_peer("flash_attn 3", "flash_attn_interface"),
    _flash_attn_peer("flash_attn 4", "flash_attn.cute"),
    Peer(name="xformers", module="xformers.ops", prepare=on_torch(_xformers), device="gpu"),
    Peer(name="jax.nn", module="jax", prepare=on_jax(_jax_nn)),
    Peer(name="cuflash on torch", module="torch", prepare=on_torch(_cuflash_on_torch), quantity="host"),
    Peer(name="cuflash on jax", module="jax", prepare=on_jax(_cuflash_on_jax), quantity="host"),
)
