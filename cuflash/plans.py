"""Calls validated and prepared from what can be said of their arrays without reading them.

A plan belongs to the signatures of a call's arrays and to its options, and is made once for each combination. Whoever
has the arrays then only has to allocate what the plan says and to run it: the two public functions on NumPy's and
CuPy's arrays, and the adapters on those of their frameworks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cuflash import masking
from cuflash.arrays import Signature
from cuflash.errors import UnsupportedError
from cuflash.spec import DTYPES, Problem, Spec

if TYPE_CHECKING:
    from cuflash.cuda import launch

INPUTS = ("q", "k", "v", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "bias", "mask")
_LAYOUTS = ("bshd", "bhsd")
_BACKENDS = ("numpy", "cuda")
MEMORY = ("fast", "lean")


class _Launched:
    """What runs on the GPU for a plan: made at its first call there."""

    problem: Problem
    device: int
    head_major: bool
    _launches: dict[bool, launch.Plan]

    def launches(self, aligned: bool, backward_too: bool = False) -> launch.Plan:
        """The launches for pointers that are all multiples of 16, or for any; compiled and loaded if new, and beside
        them, with `backward_too`, those of the backward of this forward."""
        found = self._launches.get(aligned)
        return self._launch(aligned, backward_too) if found is None else found

    def steps(self, machine: launch.Machine) -> tuple[launch.Steps, launch.Layouts]:
        """The launches on a GPU, which need not be here, for pointers that are multiples of 16; and the arrays' layouts
        as the kernels see them."""
        from cuflash.cuda import launch

        layouts, how = self._layouts_and_ways()
        return launch.steps(self.problem, layouts, machine, aligned=True, **how), layouts

    def _launch(self, aligned: bool, backward_too: bool) -> launch.Plan:
        from cuflash.cuda import launch  # with CuPy

        layouts, how = self._layouts_and_ways()
        if backward_too:
            launch.compile_backward(self.problem, layouts, self.device, aligned=aligned)
        self._launches[aligned] = launch.plan(self.problem, layouts, self.device, aligned=aligned, **how)
        return self._launches[aligned]

    def _layouts_and_ways(self) -> tuple[launch.Layouts, dict[str, bool]]:
        arrays, how = self._arrays_and_ways()
        layouts = {name: self._layout(name, array) for name, array in arrays.items() if array is not None}
        return layouts, how

    def _layout(self, name: str, array: Signature) -> Signature:
        from cuflash.cuda import launch

        if name in launch.TENSORS:
            return head_minor(array, self.head_major)
        return four_axes(array) if name in launch.DENSE else array

    def _arrays_and_ways(self) -> tuple[dict[str, Signature | None], dict[str, bool]]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class ForwardPlan(_Launched):
    """A validated forward: what it computes, and what its results look like, in the caller's layout."""

    problem: Problem
    backend: str  # "numpy" or "cuda"
    device: int  # that the arrays are on, of a GPU, else -1: with "cuda" they must be copied to one
    head_major: bool
    inputs: dict[str, Signature | None]  # by INPUTS
    out: Signature
    lse: Signature
    _launches: dict[bool, launch.Plan] = field(default_factory=dict)

    def _arrays_and_ways(self) -> tuple[dict[str, Signature | None], dict[str, bool]]:
        return {**self.inputs, "out": self.out, "lse": self.lse}, {"backward": False}


@dataclass(frozen=True, eq=False, kw_only=True)
class BackwardPlan(_Launched):
    """A validated backward: its forward, and what its gradients look like, in the caller's layout."""

    forward: ForwardPlan
    problem: Problem
    device: int
    head_major: bool
    accumulate: bool
    lean: bool
    others: dict[str, Signature | None]  # dout, out, lse, dlse
    gradients: dict[str, Signature]  # dq, dk, dv, with sinks dsinks, with bias dbias
    _launches: dict[bool, launch.Plan] = field(default_factory=dict)

    def _arrays_and_ways(self) -> tuple[dict[str, Signature | None], dict[str, bool]]:
        arrays = {**self.forward.inputs, **self.others, **self.gradients}
        return arrays, {"backward": True, "accumulate": self.accumulate, "lean": self.lean}


def targets(plan: BackwardPlan, given: Sequence[Any], empty: Callable[[Signature], Any]) -> list[Any]:
    """Where the gradients go: dq, dk and dv as they are given, and new ones of `empty` for None and for all others."""
    pairs = zip(plan.gradients.values(), (*given, None, None), strict=False)  # dsinks and dbias are never given
    return [empty(like) if array is None else array for like, array in pairs]


def head_minor(array: Signature, head_major: bool) -> Signature:
    """A tensor as [batch, len, heads, dim] or packed [len, heads, dim], whatever layout it comes in."""
    if not head_major:
        return array

    def swapped(axes: tuple[Any, ...]) -> tuple[Any, ...]:
        *batch, first, second, dim = axes
        return (*batch, second, first, dim)

    return array._replace(shape=swapped(array.shape), strides=swapped(array.strides))


def four_axes(array: Signature) -> Signature:
    """A bias, a mask or a gradient of one as [batch, heads, q_len, kv_len], at stride 0 where it is broadcast."""
    missing = 4 - len(array.shape)
    strides = (0 if length == 1 else stride for length, stride in zip(array.shape, array.strides, strict=True))
    return array._replace(shape=(1,) * missing + array.shape, strides=(0,) * missing + tuple(strides))


# ---- validation --------------------------------------------------------------------------------------------------


_FORGETTING: list[Callable[[], None]] = []


def remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that makes plans: one for equal arguments, until `forget`. Where an argument cannot be looked up,
    such as a list, the function is called: its validation names it."""
    cached = lru_cache(maxsize=1024, typed=True)(make)

    @wraps(make)
    def found(*arguments: Any) -> Any:
        try:
            return cached(*arguments)
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
            return make(*arguments)

    forget_too(cached.cache_clear)
    return found


def forget() -> None:
    """Make all plans afresh: for what they depend on but their arguments, which is `CUFLASH_FORCE_ARCH`."""
    for clear in _FORGETTING:
        clear()


def forget_too(clear: Callable[[], None]) -> None:
    """Let `forget` call this, for plans that are kept elsewhere."""
    _FORGETTING.append(clear)


@remembered
def forward(
    q: Signature,
    k: Signature,
    v: Signature,
    alibi_slopes: Signature | None,
    sinks: Signature | None,
    cu_seqlens_q: Signature | None,
    cu_seqlens_k: Signature | None,
    bias: Signature | None,
    mask: Signature | None,
    causal: Any,
    window_size: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seeded: bool,
    deterministic: Any,
    allow_tf32: Any,
    layout: Any,
    backend: Any,
) -> ForwardPlan:
    """Validate a forward, whose arrays look like this; None for those that it does not have. All arguments are those of
    `cuflash.flash_attention`, but for `seeded`, whether there is a seed.

    Raises TypeError, ValueError and UnsupportedError as `cuflash.flash_attention` does.
    """
    check_flag("causal", causal)
    check_flag("deterministic", deterministic)
    check_flag("allow_tf32", allow_tf32)
    if layout not in _LAYOUTS:
        bad("layout", repr(layout), f"one of {_LAYOUTS}")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        bad(missing, "None while the other is given", "cu_seqlens_q and cu_seqlens_k, both or neither")
    packed = cu_seqlens_q is not None
    head_major = layout == "bhsd"

    axes = {False: ("len", "heads", "head_dim"), True: ("heads", "len", "head_dim")}[head_major]
    axes = axes if packed else ("batch", *axes)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) != len(axes):
            bad(name, f"shape {array.shape}", f"{len(axes)} axes [{', '.join(axes)}]")
        if array.dtype not in DTYPES:
            bad(name, f"dtype {array.dtype}", f"one of {DTYPES}", TypeError)
        if array.dtype != q.dtype:
            bad(name, f"dtype {array.dtype}", f"q's dtype, {q.dtype}", TypeError)
        _check_device(name, array, q)
        _check_strides(name, array)
    *q_batch, q_len, heads, head_dim = head_minor(q, head_major).shape
    *k_batch, kv_len, kv_heads, k_head_dim = head_minor(k, head_major).shape
    *v_batch, v_len, v_heads, head_dim_v = head_minor(v, head_major).shape
    if heads == 0 or head_dim == 0:
        bad("q", f"shape {q.shape}", "at least one head and a head_dim of at least 1")
    if k_batch != q_batch or k_head_dim != head_dim:
        bad("k", f"shape {k.shape}", f"q's batch and head_dim (q has shape {q.shape})")
    if kv_heads == 0 or heads % kv_heads:
        bad("k", f"{kv_heads} heads (shape {k.shape})", f"a number of heads that divides q's {heads}")
    if [*v_batch, v_len, v_heads] != [*k_batch, kv_len, kv_heads] or head_dim_v == 0:
        bad("v", f"shape {v.shape}", f"k's shape but for the last axis (k has shape {k.shape})")

    batch = q_batch[0] if q_batch else 0
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for name, array in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if array.dtype not in ("int32", "int64"):
                bad(name, f"dtype {array.dtype}", "int32 or int64", TypeError)
            if len(array.shape) != 1 or array.shape[0] == 0:
                bad(name, f"shape {array.shape}", "one axis [sequences + 1]")
            _check_device(name, array, q)
            _check_strides(name, array)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            bad("cu_seqlens_k", f"shape {cu_seqlens_k.shape}", f"cu_seqlens_q's shape, {cu_seqlens_q.shape}")
        batch = cu_seqlens_q.shape[0] - 1
    for name, array, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (batch, heads))),
        ("sinks", sinks, ((heads,),)),
    ):
        if array is not None:
            if array.shape not in shapes:
                bad(name, f"shape {array.shape}", f"shape {' or '.join(map(str, shapes))}")
            if array.dtype not in ("float32", q.dtype):
                bad(name, f"dtype {array.dtype}", f"float32 or q's dtype, {q.dtype}", TypeError)
            _check_device(name, array, q)

    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None:
            if packed:
                bad(name, "an array with cu_seqlens_q", "None where sequences are packed")
            _check_broadcasts(name, array, (batch, heads, q_len, kv_len))
            _check_device(name, array, q)
    if bias is not None and bias.dtype not in ("float32", q.dtype):
        bad("bias", f"dtype {bias.dtype}", f"float32 or q's dtype, {q.dtype}", TypeError)
    if mask is not None and mask.dtype != "bool":
        bad("mask", f"dtype {mask.dtype}", "bool, True where a query may attend", TypeError)

    left, right = _checked_window(window_size)
    bounds = masking.window(left, right)
    if causal:
        bounds &= masking.causal()
    dropout_p = _checked_real("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0 <= p < 1)
    if dropout_p > 0 and not seeded:
        bad("seed", f"None with dropout_p={dropout_p}", "an integer in [0, 2**64), the same forward and backward")
    if scale is not None:
        scale = _checked_real("scale", scale, "None or a finite number", math.isfinite)
    if softcap is not None:
        softcap = _checked_real(
            "softcap", softcap, "None or a positive finite number", lambda c: math.isfinite(c) and c > 0
        )

    problem = Problem(
        spec=Spec(
            dtype=q.dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            bounded_left=bounds.left is not None,
            bounded_right=bounds.right is not None,
            softcap=softcap is not None,
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            bias=bias is not None,
            mask=mask is not None,
            packed=packed,
            dropout=dropout_p > 0,
            deterministic=bool(deterministic),
            allow_tf32=bool(allow_tf32),
        ),
        mask=bounds,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=0,
    )
    statistic = (heads, q_len) if packed else (batch, heads, q_len)
    backend = _checked_backend(backend, q.device)
    if backend == "cuda" and q.device == "cpu" and not (bias is None and mask is None):
        name = "mask" if bias is None else "bias"
        raise UnsupportedError(
            f"{name}: got an array in the CPU's memory with backend 'cuda'; allowed: None there, arrays on the GPU, or "
            "backend='numpy'"
        )
    return ForwardPlan(
        problem=problem,
        backend=backend,
        device=-1 if q.device == "cpu" else int(q.device.removeprefix("cuda:")),
        head_major=head_major,
        inputs=dict(zip(INPUTS, (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask), strict=True)),
        out=contiguous(q._replace(shape=(*q.shape[:-1], head_dim_v))),
        lse=contiguous(q._replace(shape=statistic, dtype="float64" if q.dtype == "float64" else "float32")),
    )


@remembered
def backward(
    dout: Signature,
    out: Signature,
    lse: Signature,
    dlse: Signature | None,
    dq: Signature | None,
    dk: Signature | None,
    dv: Signature | None,
    q: Signature,
    k: Signature,
    v: Signature,
    alibi_slopes: Signature | None,
    sinks: Signature | None,
    cu_seqlens_q: Signature | None,
    cu_seqlens_k: Signature | None,
    bias: Signature | None,
    mask: Signature | None,
    accumulate: Any,
    memory: Any,
    with_dbias: bool,
    *options: Any,
) -> BackwardPlan:
    """Validate a backward: arguments as of `cuflash.flash_attention_backward`, whether a bias shall have a dbias, then
    the options of `forward`."""
    plan = forward(q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask, *options)
    for name, array, expected in (("dout", dout, plan.out), ("out", out, plan.out), ("lse", lse, plan.lse)):
        _check_like(name, array, expected, (expected.dtype,))
    if dlse is not None:
        _check_like("dlse", dlse, plan.lse, (plan.lse.dtype,))
    check_flag("accumulate", accumulate)
    if memory not in MEMORY:
        bad("memory", repr(memory), f"one of {MEMORY}")
    gradients: dict[str, Signature] = {}
    for name, given in (("dq", dq), ("dk", dk), ("dv", dv)):
        like = plan.inputs[name[1:]]
        assert like is not None
        if given is not None:
            _check_output(name, given, like)
        elif accumulate:
            bad(name, "None with accumulate=True", "dq, dk and dv, all three given")
        gradients[name] = contiguous(like) if given is None else given
    if sinks is not None:
        gradients["dsinks"] = contiguous(sinks)
    if bias is not None and with_dbias:
        gradients["dbias"] = contiguous(bias)
    return BackwardPlan(
        forward=plan,
        problem=plan.problem,
        device=plan.device,
        head_major=plan.head_major,
        accumulate=bool(accumulate),
        lean=memory == "lean",
        others={"dout": dout, "out": out, "lse": lse, "dlse": dlse},
        gradients=gradients,
    )


def contiguous(array: Signature) -> Signature:
    """The signature of a new array like this one."""
    strides = []
    stride = 1
    for length in reversed(array.shape):
        strides.append(stride)
        stride *= length
    return array._replace(strides=tuple(reversed(strides)), writable=True)


def bad(name: str, was: str, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: got {was}; allowed: {allowed}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        bad(name, f"{value!r} ({type(value).__name__})", "True or False", TypeError)


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def checked_seed(seed: Any) -> int:
    """The seed of a call; plans are made without it."""
    if seed is None:
        return 0
    if not (is_integer(seed) and 0 <= seed < 2**64):
        bad("seed", repr(seed), "an integer in [0, 2**64)", ValueError if is_integer(seed) else TypeError)
    return int(seed)


def _checked_real(name: str, value: Any, allowed: str, holds: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        bad(name, f"{value!r} ({type(value).__name__})", allowed, TypeError)
    if not holds(float(value)):
        bad(name, repr(value), allowed)
    return float(value)


def _checked_window(window_size: Any) -> tuple[int | None, int | None]:
    allowed = "None or (left, right), each None or an integer >= 0"
    if window_size is None:
        return None, None
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        bad("window_size", repr(window_size), allowed, TypeError)
    for side in window_size:
        if side is not None and not is_integer(side):
            bad("window_size", repr(window_size), allowed, TypeError)
        if side is not None and side < 0:
            bad("window_size", repr(window_size), allowed)
    left, right = (None if side is None else int(side) for side in window_size)
    return left, right


def _checked_backend(backend: Any, device: str) -> str:
    if backend is not None and backend not in _BACKENDS:
        bad("backend", repr(backend), f"None or one of {_BACKENDS}")
    if device != "cpu":
        if backend == "numpy":
            bad("backend", f"'numpy' with q on {device}", "None or 'cuda' for arrays on a GPU")
        return "cuda"
    return backend or "numpy"


def _check_device(name: str, array: Signature, q: Signature) -> None:
    if array.device != q.device:
        bad(name, f"an array on {array.device}", f"q's device, {q.device}")


def _check_broadcasts(name: str, array: Signature, shape: tuple[int, ...]) -> None:
    axes = zip(reversed(array.shape), reversed(shape), strict=False)
    if len(array.shape) > len(shape) or any(length not in (1, whole) for length, whole in axes):
        bad(name, f"shape {array.shape}", f"one that broadcasts to [batch, heads, q_len, kv_len], {shape}")


def _check_strides(name: str, array: Signature) -> None:
    if 0 in array.shape:
        return
    if (array.shape[-1] > 1 and array.strides[-1] != 1) or any(stride != int(stride) for stride in array.strides):
        bad(name, f"strides {array.strides} (in elements)", "whole numbers of elements, the last axis contiguous")


def _check_like(name: str, array: Signature, expected: Signature, dtypes: tuple[str, ...]) -> None:
    if array.shape != expected.shape:
        bad(name, f"shape {array.shape}", f"shape {expected.shape}")
    if array.dtype not in dtypes:
        bad(name, f"dtype {array.dtype}", " or ".join(dict.fromkeys(dtypes)), TypeError)
    _check_device(name, array, expected)
    _check_strides(name, array)


def _check_output(name: str, array: Signature, expected: Signature) -> None:
    wider = "float64" if expected.dtype == "float64" else "float32"
    _check_like(name, array, expected, (expected.dtype, wider))
    if not array.writable:
        bad(name, "a read-only array", "a writable array")
    if 0 not in array.shape and any(
        stride == 0 and n > 1 for stride, n in zip(array.strides, array.shape, strict=True)
    ):
        bad(name, f"strides {array.strides} (in elements)", "an array whose elements do not overlap")
