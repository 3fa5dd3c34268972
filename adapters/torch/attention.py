"""The two functions on torch tensors: check, cast for autocast, and choose how much of torch a call goes through.

- Where the extension is built (`build_extension`), usual calls on a GPU: through that.
- Nobody differentiates: straight to the backend.
- Eager, with gradients: one plain autograd.Function around the backend, the least that the autograd engine takes.
- torch.compile, export, functorch's transforms, modes and tensor subclasses: the operators of `_operators`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cuflash import UnsupportedError
from cuflash.adapters.torch import _call, _extension, _operators
from cuflash.adapters.torch._values import Given, Operands, Options

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_DENSE = torch.strided


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    allow_tf32: bool = False,
    layout: str = "bshd",
    backend: str | None = None,
) -> Any:
    """`cuflash.flash_attention` on torch tensors, differentiable once in q, k, v, sinks and bias, and through the
    LSE.

    Parameters, shapes and dtypes are those of `cuflash.flash_attention`; what torch adds:

    q, k, v : dense tensors on the CPU or a CUDA GPU, all on one device
        Under autocast, those of float16, bfloat16 and float32 are cast to its dtype, as for torch's own attention.
    alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k : tensors without gradients
    bias : tensor
        Its gradient is computed where the tensor requires one, and has its shape.
    seed : int in [0, 2^64), or int64 tensor of one element on the CPU
        A tensor's value need not be known when torch.compile traces.
    deterministic : bool
        Also on while `torch.use_deterministic_algorithms(True)` holds.

    Returns
    -------
    out, or (out, lse)
        On q's device, contiguous, of memory that nothing else uses.

    Raises
    ------
    TypeError, ValueError
        Names the argument, what it was and what is allowed; nothing has been computed.
    UnsupportedError
        What this GPU or build cannot do; double backward and forward mode; vmap over cu_seqlens, or with dropout
        unless randomness="different".
    """
    return attend(
        (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask),
        (causal, window_size, scale, softcap, dropout_p, seed, deterministic, allow_tf32, layout, backend),
        return_lse,
    )


def attend(tensors: tuple[Any, ...], settings: tuple[Any, ...], return_lse: bool) -> Any:
    """`flash_attention` with its arguments in the order of Operands and of Options, as `cuflash.flash_attention` passes
    them: so many names in a call cost a large part of a microsecond."""
    if _extension.attend is not None and not torch.compiler.is_compiling():
        results = _extension.attend(tensors, settings, return_lse)
        if results is not NotImplemented:
            return results
    options = Options._make(settings)
    q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask = tensors
    if torch.overrides.has_torch_function_variadic(*tensors):
        others = dict(zip(Operands._fields[3:], tensors[3:], strict=True))
        named = {**others, **options._asdict(), "return_lse": return_lse}
        return torch.overrides.handle_torch_function(flash_attention, tensors, q, k, v, **named)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: got {return_lse!r} ({type(return_lse).__name__}); allowed: True or False")
    operands: Given = tensors
    few = alibi_slopes is None and sinks is None and cu_seqlens_q is None and cu_seqlens_k is None
    if few and bias is None and mask is None:
        operands = (q, k, v)
    plain, with_gradients = _survey(q, operands[:3], operands[3:], Operands._fields[: len(operands)])
    if options.seed is not None:
        _check_seed(options.seed)
    if with_gradients:
        constants = {"alibi_slopes": alibi_slopes, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        for name, x in constants.items():
            if x is not None and x.requires_grad:
                raise ValueError(f"{name}: got a tensor that requires gradients; allowed: a detached one")
    if torch.are_deterministic_algorithms_enabled():
        options = options._replace(deterministic=True)
    if torch._C._is_any_autocast_enabled():
        operands = _cast_for_autocast(operands)
    if not plain or _is_seen():
        out, lse = _operators.forward(Operands(*operands), options)
    elif with_gradients:
        return _Attention.apply(options, return_lse, *operands)
    else:
        out, lse = _call.forward(operands, options, return_lse)
    return (out, lse) if return_lse else out


def flash_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    layout: str = "bshd",
    backend: str | None = None,
    dlse: torch.Tensor | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    accumulate: bool = False,
    memory: str = "fast",
) -> tuple[torch.Tensor, ...]:
    """`cuflash.flash_attention_backward` on torch tensors, for those who call it by hand; autograd needs no such call.

    Parameters and results are those of `cuflash.flash_attention_backward`; given dq, dk and dv come back as the same
    tensors. The gradients are not differentiable, so tensors that require gradients raise a ValueError unless grad
    mode is off.
    """
    operands = Operands(q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask)
    needed = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    others = dict(zip(operands._fields[3:], operands[3:], strict=True)) | {"dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
    tensors = needed | others
    plain, with_gradients = _survey(q, needed.values(), others.values(), tensors)
    if with_gradients:
        name = next(name for name, x in tensors.items() if x is not None and x.requires_grad)
        raise ValueError(
            f"{name}: got a tensor that requires gradients; allowed: a detached one, or any in torch.no_grad()"
        )
    if seed is not None:
        _check_seed(seed)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    options = Options(
        causal, window_size, scale, softcap, dropout_p, seed, deterministic, allow_tf32, layout=layout, backend=backend
    )
    given = {"dq": dq, "dk": dk, "dv": dv}
    if plain and not _is_seen():
        return _call.backward(dout, operands, out, lse, dlse, options, **given, accumulate=accumulate, memory=memory)
    for name, x in given.items():
        if x is not None or accumulate:
            raise UnsupportedError(
                f"{name}: got a tensor to write to while torch traces or transforms the call; allowed: None"
            )
    return _operators.backward(dout, operands, out, lse, dlse, options, memory=memory)


class _Attention(torch.autograd.Function):
    """Eager attention with gradients, of q, k and v or of all operands: each argument costs autograd time."""

    @staticmethod
    def forward(ctx: Any, options: Options, with_lse: bool, *operands: Any) -> Any:
        out, lse = _call.forward(operands, options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, out, lse)
        ctx.options = options
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        *operands, out, lse = ctx.saved_tensors
        with_dbias = ctx.needs_input_grad[-2] if len(operands) > 3 else False
        results = _operators.of_node(gradients, operands, out, lse, ctx.options, with_dbias)
        if len(operands) == 3:
            return None, None, *results
        return None, None, *_operators.of_operands(Operands(*operands), results)


def _is_seen() -> bool:
    """Whether something between the caller and the backend must see operators instead of memory."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active():
            # The compiler would trace through the gradient and lose it. Without fullgraph it leaves this to eager mode.
            raise UnsupportedError(
                "torch.compile: got a call inside functorch transforms; allowed: these without compile"
            )
        return True
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def _survey(
    q: torch.Tensor, needed: Collection[Any], others: Collection[Any], names: Iterable[str]
) -> tuple[bool, bool]:
    """Whether all tensors are plain memory, and whether any is to be differentiated; raises for what is no dense
    tensor on q's device. The others may be None; `names` are those of both. All else is checked by what computes.

    Every call comes here, so usual tensors pass fast, and what is not usual is told apart afterwards."""
    if not isinstance(q, torch.Tensor):
        _check_unusual("q", q, q)
    device, with_gradients = q.device, False
    for x in (*needed, *[x for x in others if x is not None]) if others else needed:
        if type(x) not in _PLAIN or x.device != device or x.layout is not _DENSE or x.is_nested:
            break
        if x.requires_grad:
            with_gradients = True
    else:
        return not q.is_meta, with_gradients and torch.is_grad_enabled()
    tensors = []
    for i, (name, x) in enumerate(zip(names, (*needed, *others), strict=True)):
        if x is not None or i < len(needed):
            _check_unusual(name, x, q)
            tensors.append(x)
    return False, torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_unusual(name: str, x: Any, q: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: got {x!r:.60} ({type(x).__name__}); allowed: a torch.Tensor")
    if x.layout is not _DENSE or x.is_nested:
        raise TypeError(
            f"{name}: got a {'nested' if x.is_nested else x.layout} tensor; allowed: a dense tensor "
            "(sequences of several lengths: packed, with cu_seqlens_q and cu_seqlens_k)"
        )
    if is_traceable_wrapper_subclass(x) and hasattr(x, "to_local"):
        raise TypeError(f"{name}: got a {type(x).__name__}; allowed: the local tensor of a shard (to_local())")
    if x.device != q.device:
        raise ValueError(f"{name}: got a tensor on {x.device}; allowed: q's device, {q.device}")


def _check_seed(seed: Any) -> None:
    if isinstance(seed, torch.Tensor) and (seed.dtype != torch.int64 or seed.numel() != 1 or not seed.is_cpu):
        raise TypeError(
            f"seed: got a tensor of {seed.dtype} with shape {tuple(seed.shape)} on {seed.device}; "
            "allowed: an integer in [0, 2**64), or an int64 tensor of one element on the CPU"
        )


def _cast_for_autocast(operands: Given) -> Given:
    """q, k and v in autocast's dtype, if it is on for their device, but for float64; the other options follow where
    they are not float32."""
    device_type = operands[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    cast = [x.to(dtype) if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x for x in operands[:3]]
    if len(operands) == 3:
        return cast
    named = Operands(*cast, *operands[3:])
    alibi_slopes, sinks, bias = (
        x.to(dtype) if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x
        for x in (named.alibi_slopes, named.sinks, named.bias)
    )
    return named._replace(alibi_slopes=alibi_slopes, sinks=sinks, bias=bias)
