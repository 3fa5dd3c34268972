"""Torch tensors on a GPU: plans run with their pointers, on torch's current stream, with torch's memory.

Everything that the adapter knows about CUDA is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cuflash import api, plans
from cuflash.adapters.torch._values import DTYPE_NAMES, Given, Operands, Options, differentiated
from cuflash.arrays import Signature
from cuflash.cuda.launch import aligned
from cuflash.cuda.toolchain import import_cupy
from cuflash.plans import BackwardPlan, ForwardPlan


def forward(operands: Given, options: Options, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of `cuflash.flash_attention`; the LSE only if it is wanted."""
    q, k, v, *extras = operands
    plan = forward_plan(operands, options)
    seed = plans.checked_seed(options.seed)
    same_shape = plan.out.shape == q.shape
    out = _empty_like(q) if same_shape else q.new_empty(plan.out.shape)
    lse = q.new_empty(plan.lse.shape, dtype=torch.float32) if with_lse else None
    pointers = (
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0, 0, 0, 0),
        *(0 if lse is None else lse.data_ptr(), 0, 0),
        *(_pointers(extras) if extras else _NO_POINTERS),
        0,
    )
    _run(plan, q, pointers, seed, with_lse)
    return out, lse


def backward(
    dout: torch.Tensor,
    operands: Given,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    options: Options,
    *,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    accumulate: bool = False,
    memory: str = "fast",
    with_dbias: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The gradients of `cuflash.flash_attention_backward`; given dq, dk and dv come back as the same tensors."""
    given = (dq, dk, dv)
    plan = backward_plan(dout, operands, out, lse, (dlse, *given), options, accumulate, memory, with_dbias)
    seed = plans.checked_seed(options.seed)
    if dq is not None or dk is not None or dv is not None:
        views = [
            None if x is None else import_cupy().from_dlpack(x.detach())
            for x in (dout, out, lse, dlse, *given, *operands)
        ]
        api.check_overlap(dict(zip(("dq", "dk", "dv"), views[4:7], strict=True)), [*views[:4], *views[7:]])
    gradients = tuple(
        [
            _empty_like(x) if target is None else target
            for x, target in zip(differentiated(operands, with_dbias), (*given, None, None), strict=False)
        ]
    )
    found = dict(zip(plan.gradients, gradients, strict=True))
    more = (found.get("dsinks"), *Operands(*operands)[3:], found.get("dbias"))
    q, k, v = operands[:3]
    _run(plan, q, _pointers((q, k, v, out, dout, *gradients[:3], lse, dlse, *more)), seed)
    return gradients


def _run(
    plan: ForwardPlan | BackwardPlan,
    q: torch.Tensor,
    pointers: tuple[int, ...],
    seed: int,
    backward_too: bool = False,
) -> None:
    """Run a plan, its workspace where q is; the pointers in the order of cuflash.cuda.launch.OPERANDS."""
    launches = plan.launches(aligned(pointers), backward_too)
    workspace = 0
    if launches.workspace:
        memory = torch.empty(launches.workspace, dtype=torch.uint8, device=q.device)
        workspace = memory.data_ptr()
    launches.run(torch._C._cuda_getCurrentRawStream(plan.device), pointers, workspace, seed)


_NO_POINTERS = (0,) * (len(Operands._fields) - 3)


def _pointers(tensors: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
    return tuple([0 if x is None else x.data_ptr() for x in tensors])


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- plans of tensors ----------------------------------------------------------------------------------------------


def forward_plan(operands: Given, options: Options) -> ForwardPlan:
    """The plan of a forward. Raises as `cuflash.flash_attention`."""
    q, k, v, *extras = operands
    return _forward_plan(_described(q), _described(k), _described(v), _all_described(extras), *_arguments(options))


def backward_plan(
    dout: torch.Tensor,
    operands: Given,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse_and_given: Sequence[torch.Tensor | None],
    options: Options,
    accumulate: bool = False,
    memory: str = "fast",
    with_dbias: bool = True,
) -> BackwardPlan:
    """The plan of a backward; `dlse_and_given` are dlse and the given dq, dk and dv. Raises as
    `cuflash.flash_attention_backward`."""
    q, k, v, *extras = operands
    return _backward_plan(
        *(_described(dout), _described(out), _described(lse), _all_described(dlse_and_given)),
        *(_described(q), _described(k), _described(v), _all_described(extras)),
        accumulate,
        memory,
        with_dbias,
        *_arguments(options),
    )


# What can be said of a tensor without reading it, as torch says it: a plan is looked up by that.
_Described = tuple[torch.Size, tuple[int, ...], torch.dtype, int, bool]


def _described(x: torch.Tensor) -> _Described:
    return x.shape, x.stride(), x.dtype, x.get_device(), x.is_neg()


def _all_described(tensors: Sequence[torch.Tensor | None]) -> tuple[_Described | None, ...]:
    return tuple([None if x is None else _described(x) for x in tensors]) if tensors else ()


_SEED = Options._fields.index("seed")


def _arguments(options: Options) -> tuple[Any, ...]:
    """The options as plans take them: of the seed, whether there is one."""
    return options if options.seed is None else (*options[:_SEED], True, *options[_SEED + 1 :])


@plans.remembered
def _forward_plan(q: Any, k: Any, v: Any, extras: Any, *options: Any) -> ForwardPlan:
    return plans.forward(*_signatures(plans.INPUTS, Operands(q, k, v, *extras)), *options)


@plans.remembered
def _backward_plan(
    dout: Any,
    out: Any,
    lse: Any,
    dlse_and_given: Any,
    q: Any,
    k: Any,
    v: Any,
    extras: Any,
    accumulate: Any,
    memory: Any,
    with_dbias: bool,
    *options: Any,
) -> BackwardPlan:
    names = ("dout", "out", "lse", "dlse", "dq", "dk", "dv", *plans.INPUTS)
    signatures = _signatures(names, (dout, out, lse, *dlse_and_given, *Operands(q, k, v, *extras)))
    return plans.backward(*signatures, accumulate, memory, with_dbias, *options)


def _signatures(names: Sequence[str], described: Sequence[_Described | None]) -> list[Signature | None]:
    signatures: list[Signature | None] = []
    for name, description in zip(names, described, strict=True):
        if description is None:
            signatures.append(None)
            continue
        shape, strides, dtype, device, negated = description
        if negated:  # a complex tensor, which may be lazily conjugated, is not allowed in any case
            raise TypeError(f"{name}: got a tensor of {dtype}, lazily negated; allowed: its values in memory")
        where = "cpu" if device < 0 else f"cuda:{device}"
        signatures.append(Signature(tuple(shape), strides, DTYPE_NAMES.get(dtype, str(dtype)), where, True))
    return signatures
