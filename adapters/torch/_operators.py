"""What torch.compile, export and functorch's transforms see: two operators, and two Functions around them.

The operators have schemas and fake implementations. The Functions carry the gradient and the rules of vmap; a formula
given to `torch.library.register_autograd` instead fails under `torch.func.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from cuflash import UnsupportedError
from cuflash.adapters.torch import _call
from cuflash.adapters.torch._values import Given, Operands, Options, differentiated

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? bias, Tensor? mask"
)
_SCALARS = (
    "Tensor? seed, bool causal, SymInt? window_left, SymInt? window_right, float? scale, float? softcap, "
    "float dropout_p, bool deterministic, bool allow_tf32, str layout, str? backend"
)
_COUNT = len(Operands._fields)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_library = torch.library.Library("cuflash", "DEF")
_library.define(f"fwd({_TENSORS}, {_SCALARS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    f"bwd(Tensor dout, {_TENSORS}, Tensor out, Tensor lse, Tensor? dlse, {_SCALARS}, str memory, bool with_dbias) "
    "-> Tensor[]",
    tags=_TAGS,
)


def _seed_and_scalars(options: Options) -> tuple[torch.Tensor | None, tuple[Any, ...]]:
    """The options as the operators take them."""
    window = (None, None) if options.window_size is None else options.window_size
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window_size: got {window!r}; allowed: None or (left, right), each None or an integer >= 0")
    seed = options.seed
    if seed is not None and not isinstance(seed, torch.Tensor):
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed: got {seed!r}; allowed: an integer in [0, 2**64)")
        seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device="cpu")
    if options.dropout_p != 0 and seed is None:
        raise ValueError(f"seed: got None with dropout_p={options.dropout_p}; allowed: an integer in [0, 2**64)")
    more = (options.deterministic, options.allow_tf32, options.layout, options.backend)
    scalars = (options.causal, *window, options.scale, options.softcap, options.dropout_p, *more)
    return seed if options.dropout_p else None, scalars


def _options(seed: torch.Tensor | None, *scalars: Any) -> Options:
    causal, left, right, scale, softcap, dropout_p, deterministic, allow_tf32, layout, backend = scalars
    window = None if left is None and right is None else (left, right)
    return Options(
        causal, window, scale, softcap, dropout_p, seed, deterministic, allow_tf32, layout=layout, backend=backend
    )


def _compute_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _call.forward(Operands(*arguments[:_COUNT]), _options(*arguments[_COUNT:]))


def _compute_backward(dout: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    operands, (out, lse, dlse, *scalars, memory, with_dbias) = Operands(*arguments[:_COUNT]), arguments[_COUNT:]
    how = {"memory": memory, "with_dbias": with_dbias}
    return list(_call.backward(dout, operands, out, lse, dlse, _options(*scalars), **how))


def _fake_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, layout = *arguments[:3], _options(*arguments[_COUNT:]).layout
    heads_axis = {"bshd": -2, "bhsd": -3}.get(layout)
    if heads_axis is None:
        raise ValueError(f"layout: got {layout!r}; allowed: 'bshd' or 'bhsd'")
    rank = 4 if arguments[5] is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != rank:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; allowed: {rank} axes")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}; allowed: one of {_DTYPES}, the same for q, k and v")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: got shape {tuple(k.shape)}; allowed: q's head_dim, {q.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: got shape {tuple(v.shape)}; allowed: k's shape but for the last axis, {tuple(k.shape)}")
    if k.shape[heads_axis] == 0 or q.shape[heads_axis] % k.shape[heads_axis] != 0:
        raise ValueError(
            f"k: got {k.shape[heads_axis]} heads; allowed: a number of heads that divides q's {q.shape[heads_axis]}"
        )
    if rank == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"k: got shape {tuple(k.shape)}; allowed: q's batch, {q.shape[0]}")
    heads_first = q.transpose(-3, -2) if layout == "bshd" else q
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(heads_first.shape[:-1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32),
    )


def _fake_backward(dout: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    operands = Operands(*arguments[:_COUNT])
    return [x.new_empty(x.shape) for x in differentiated(operands, arguments[-1])]


for _key in ("CPU", "CUDA"):
    _library.impl("fwd", _compute_forward, _key)
    _library.impl("bwd", _compute_backward, _key)
torch.library.register_fake("cuflash::fwd", _fake_forward, lib=_library)
torch.library.register_fake("cuflash::bwd", _fake_backward, lib=_library)


def forward(operands: Operands, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), differentiable: the compiler takes the operator as it is, all else the Function."""
    seed, scalars = _seed_and_scalars(options)
    if torch.compiler.is_compiling():
        return torch.ops.cuflash.fwd(*operands, seed, *scalars)
    return Forward.apply(*operands, seed, scalars)


def backward(
    dout: torch.Tensor,
    operands: Given,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    options: Options,
    *,
    memory: str = "fast",
    with_dbias: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The gradients, whose derivative raises."""
    operands = Operands(*operands)
    seed, scalars = _seed_and_scalars(options)
    if torch.compiler.is_compiling():
        return tuple(torch.ops.cuflash.bwd(dout, *operands, out, lse, dlse, seed, *scalars, memory, with_dbias))
    return Backward.apply(dout, *operands, out, lse, dlse, seed, scalars, memory, with_dbias)


# ---- the Functions -----------------------------------------------------------------------------------------------


class Forward(torch.autograd.Function):
    """(out, lse) of the operator `fwd`, from its tensors and a tuple of its scalars."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, scalars = inputs
        return torch.ops.cuflash.fwd(*tensors, *scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *tensors, ctx.scalars = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        *operands, seed, out, lse = ctx.saved_tensors
        dout, dlse = arrived(gradients, out)
        with_dbias = ctx.needs_input_grad[Operands._fields.index("bias")]
        results = Backward.apply(dout, *operands, out, lse, dlse, seed, ctx.scalars, "fast", with_dbias)
        return *of_operands(Operands(*operands), results), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        *operands, seed, scalars = inputs
        folding = _Folding.of(info, in_dims[:-1], operands, scalars)
        out, lse = Forward.apply(*folding.operands(operands, in_dims[:-2]), seed, scalars)
        return (folding.unfold(out), folding.unfold(lse, folding.lse_axis)), (folding.axis, folding.lse_axis)


class Backward(torch.autograd.Function):
    """The gradients, a tuple, of the operator `bwd`, from its tensors, a tuple of its scalars, `memory` and
    `with_dbias`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        *tensors, scalars, memory, with_dbias = inputs
        return tuple(torch.ops.cuflash.bwd(*tensors, *scalars, memory, with_dbias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Nothing is kept: nothing is differentiated again."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise UnsupportedError(
            "double backward: got a derivative of attention's gradients; allowed: first derivatives "
            "(torch.nn.functional.scaled_dot_product_attention has second ones with SDPBackend.MATH)"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        dout, *operands, out, lse, dlse, seed, scalars, memory, with_dbias = inputs
        dout_dim, *operand_dims, out_dim, lse_dim, dlse_dim, seed_dim, _, _, _ = in_dims
        folding = _Folding.of(info, (*operand_dims, seed_dim), operands, scalars)
        if folding.dropout_p and lse_dim is None:  # the forward drew the mask of another batch
            raise UnsupportedError(
                f"dropout_p: got {folding.dropout_p} under a vmap of the backward alone; allowed: 0 there, or a vmap "
                "of forward and backward together"
            )
        gradients = Backward.apply(
            folding.fold(dout, dout_dim),
            *folding.operands(operands, operand_dims),
            folding.fold(out, out_dim),
            folding.fold(lse, lse_dim, folding.lse_axis),
            folding.fold(dlse, dlse_dim, folding.lse_axis),
            seed,
            scalars,
            memory,
            with_dbias,
        )
        bias, bias_dim = (x[Operands._fields.index("bias")] for x in (operands, operand_dims))
        dbias = ()
        if bias is not None and with_dbias:
            *gradients, of_bias = gradients
            dbias = (folding.unfold_dense(of_bias, bias, bias_dim),)
        axes = (folding.axis, folding.axis, folding.axis, 0)[: len(gradients)]
        unfolded = (folding.unfold(x, axis) for x, axis in zip(gradients, axes, strict=True))
        return (*unfolded, *dbias), axes + (0,) * len(dbias)


def _differentiable_forward(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
        return Forward.apply(*arguments[: _COUNT + 1], arguments[_COUNT + 1 :])
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.cuflash.fwd(*arguments)


def _differentiable_backward(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
        return list(Backward.apply(*arguments[: _COUNT + 5], arguments[_COUNT + 5 : -2], *arguments[-2:]))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.cuflash.bwd(*arguments)


# For those who call the operators themselves: the compiler, and an exported program.
_library.impl("fwd", _differentiable_forward, "Autograd")
_library.impl("bwd", _differentiable_backward, "Autograd")


def _refuse_forward_mode() -> NoReturn:
    raise UnsupportedError(
        "forward mode: got a tangent of q, k, v, sinks or bias; allowed: reverse mode (backward, torch.func.grad, "
        "jacrev)"
    )


def of_operands(operands: Operands, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradients by operand, None where there is none."""
    found = iter(gradients)
    with_gradients = ("q", "k", "v", "sinks", "bias")
    pairs = zip(Operands._fields, operands, strict=True)
    return [next(found, None) if name in with_gradients and x is not None else None for name, x in pairs]


def of_node(
    gradients: tuple[Any, ...],
    operands: Given,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    with_dbias: bool,
) -> tuple[torch.Tensor, ...]:
    """What an eager call's node of the autograd graph computes from the gradients of its results. With
    create_graph=True it carries a derivative, which raises."""
    dout, dlse = arrived(gradients, out)
    compute = backward if torch.is_grad_enabled() else _call.backward
    return compute(dout, operands, out, lse, dlse, options, with_dbias=with_dbias)


def arrived(gradients: tuple[Any, ...], out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dout and dlse from what autograd gives: None for a result that was not used, any strides, dlse with the LSE."""
    dout, dlse = (*gradients, None)[:2]
    dout = torch.zeros_like(out) if dout is None else _last_contiguous(dout)
    return dout, None if dlse is None else _last_contiguous(dlse)


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The gradient of a sum, for one, is expanded: its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- vmap --------------------------------------------------------------------------------------------------------


class _Folding(NamedTuple):
    """A mapped axis becomes part of an axis that attention is independent along.

    That is the batch, which costs no copy where the mapped axis comes first in memory; or the heads, where a batch is
    not enough: packed sequences have none, and sinks, as their gradient, belong to heads.
    """

    size: int
    axis: int  # of q, k, v and out, without the mapped axis
    lse_axis: int
    by_heads: bool
    dropout_p: float

    @classmethod
    def of(cls, info: Any, dims: Sequence[Any], operands: Sequence[Any], scalars: tuple[Any, ...]) -> _Folding:
        """`dims` are those of the operands and of the seed."""
        options = _options(None, *scalars)
        for name, dim in zip(("cu_seqlens_q", "cu_seqlens_k", "seed"), (*dims[5:7], dims[-1]), strict=True):
            if dim is not None:
                raise UnsupportedError(f"{name}: got a tensor that vmap maps over; allowed: one for all examples")
        if options.dropout_p and info.randomness != "different":
            raise UnsupportedError(
                f"dropout_p: got {options.dropout_p} under vmap with randomness={info.randomness!r}; "
                "allowed: randomness='different', as each example gets a dropout mask of its own"
            )
        packed, by_heads = operands[5] is not None, operands[5] is not None or operands[4] is not None
        heads_axis = (2 if options.layout == "bshd" else 1) - packed
        return cls(
            size=info.batch_size,
            axis=heads_axis if by_heads else 0,
            lse_axis=1 if by_heads and not packed else 0,
            by_heads=by_heads,
            dropout_p=options.dropout_p,
        )

    def fold(self, x: torch.Tensor | None, dim: int | None, axis: int | None = None) -> torch.Tensor | None:
        if x is None:
            return None
        axis = self.axis if axis is None else axis
        x = x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)
        return _last_contiguous(x.movedim(0, axis).flatten(axis, axis + 1))

    def unfold(self, x: torch.Tensor, axis: int | None = None) -> torch.Tensor:
        axis = self.axis if axis is None else axis
        return x.unflatten(axis, (self.size, x.shape[axis] // self.size))

    def operands(self, operands: Sequence[Any], dims: Sequence[Any]) -> tuple[Any, ...]:
        q, k, v = (self.fold(x, dim) for x, dim in zip(operands[:3], dims[:3], strict=True))
        assert q is not None
        alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask = operands[3:]
        return (
            *(q, k, v),
            self._fold_slopes(alibi_slopes, dims[3], q),
            self.fold(sinks, dims[4], 0),
            *(cu_seqlens_q, cu_seqlens_k),
            self._fold_dense(bias, dims[7], q),
            self._fold_dense(mask, dims[8], q),
        )

    def _fold_dense(self, x: torch.Tensor | None, dim: int | None, q: torch.Tensor) -> torch.Tensor | None:
        """A bias or a mask as [batch, heads, q_len, kv_len], whole along the axis that is folded into."""
        if x is None:
            return None
        x = x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x[(slice(None), *(None,) * (5 - x.ndim))]
        lengths = [-1] * 5
        lengths[1 + self.lse_axis] = q.shape[self.axis] // self.size
        return x.expand(lengths).movedim(0, self.lse_axis).flatten(self.lse_axis, self.lse_axis + 1)

    def unfold_dense(self, dx: torch.Tensor, x: torch.Tensor, dim: int | None) -> torch.Tensor:
        """The gradient of each example's x, the mapped axis first, of that of the folded one."""
        shape = list(x.shape)
        if dim is not None:
            del shape[dim]
        whole = [1] * (4 - len(shape)) + shape
        dx = self.unfold(dx, self.lse_axis).movedim(self.lse_axis, 0)
        if whole[self.lse_axis] == 1:
            dx = dx.sum(1 + self.lse_axis, keepdim=True)
        return dx.reshape(self.size, *shape)

    def _fold_slopes(self, slopes: torch.Tensor | None, dim: int | None, q: torch.Tensor) -> torch.Tensor | None:
        if slopes is None:
            return None
        rank = slopes.ndim - (dim is not None)
        if self.by_heads or rank == 2:
            return self.fold(slopes, dim, rank - 1 if self.by_heads else 0)
        if dim is None:
            return slopes
        batch = q.shape[0] // self.size
        return self.fold(slopes.movedim(dim, 0)[:, None].expand(-1, batch, -1), 0, 0)
