"""The two public functions: validate, make the Problem, pick the backend.

What a call's arrays and options say without reading data is checked once and remembered (`_plan` is cached on
signatures and scalars); only values, such as cu_seqlens on the CPU, are looked at in every call.
"""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cuflash import arrays, masking, numpy_backend
from cuflash.arrays import Signature
from cuflash.errors import UnsupportedError
from cuflash.spec import DTYPES, Extras, Problem, Spec

_LAYOUTS = ("bshd", "bhsd")
_BACKENDS = ("numpy", "cuda")
_MEMORY = ("fast", "lean")


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    allow_tf32: bool = False,
    layout: str = "bshd",
    backend: str | None = None,
) -> Any:
    """Exact attention O = softmax(scale Q K^T) V in memory linear in the sequence length.

    Online softmax over tiles: Milakov and Gimelshein (2018), Dao, Fu, Ermon, Rudra and Re, FlashAttention (2022).

    Parameters
    ----------
    q : array [batch, q_len, heads, head_dim]
        float16, bfloat16, float32 or float64. With `layout="bhsd"` [batch, heads, q_len, head_dim]. With cu_seqlens the
        batch axis is gone: [total_q, heads, head_dim], or [heads, total_q, head_dim]. Any strides with a contiguous
        last axis.
    k, v : arrays [batch, kv_len, kv_heads, head_dim] and [batch, kv_len, kv_heads, head_dim_v]
        q's dtype and device. `heads` is a multiple of `kv_heads`; query head h attends with key/value head
        h // (heads / kv_heads).
    causal : bool
        Key position <= query position, with the last query aligned to the last key (bottom right).
    window_size : (left, right) or None
        Keep q_pos - left <= kv_pos <= q_pos + right, q_pos = q_index + kv_len - q_len; None is no bound on that side.
    scale : float or None
        Factor of the scores; None is 1 / sqrt(head_dim).
    softcap : float or None
        Scores become softcap * tanh(score / softcap).
    alibi_slopes : array [heads] or [batch, heads] or None
        Subtract slope * |q_pos - kv_pos| from the scores; float32 or q's dtype.
    sinks : array [heads] or None
        A logit per head that joins the softmax's denominator; float32 or q's dtype.
    cu_seqlens_q, cu_seqlens_k : int32 or int64 arrays [sequences + 1] or None
        Boundaries of packed sequences, both or neither: start at 0, never decrease, end at most at the total. Rows
        after the last boundary belong to no sequence: output 0, LSE -inf. On a GPU their values are not checked, since
        that would wait for it: wrong ones read and write out of bounds.
    dropout_p : float in [0, 1)
        Probability to drop an element of P; kept ones are divided by 1 - dropout_p and the LSE is untouched. The mask
        is a function of seed, batch, head and indices alone (Philox4x32-10; see cuflash.dropout), with dropout_p
        rounded to a multiple of 2^-16 for the draw.
    seed : int in [0, 2^64)
        Required with dropout; give the same to the backward.
    return_lse : bool
        Also return LSE, the natural log of the softmax's denominator (sink included): float32 (float64 for float64
        inputs) [batch, heads, q_len], packed [heads, total_q], in either layout.
    deterministic : bool
        Bitwise the same results from the same inputs. (The forward always is, and so are the gradients of the NumPy
        backend and of the portable kernels.)
    allow_tf32 : bool
        float32 products on a GPU with TF32's 10-bit mantissas; by default they have float32 accuracy (three TF32
        terms).
    layout : "bshd" or "bhsd"
    backend : None, "numpy" or "cuda"
        None chooses by where the arrays are.

    Returns
    -------
    out, or (out, lse)
        out has q's shape with head_dim_v, q's dtype and its kind of array. A row that may attend to nothing gives
        output 0 and LSE -inf (with sinks: LSE = sink).

    Raises
    ------
    TypeError, ValueError
        Names the argument, what it was and what is allowed; nothing has been computed.
    UnsupportedError
        What this GPU or build cannot do, and what to do instead.
    """
    if type(q).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return _adapter("jax").flash_attention(**locals())
    arguments = (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    _check_flag("return_lse", return_lse)
    call = _prepare(
        arguments, causal, window_size, scale, softcap, dropout_p, seed, deterministic, allow_tf32, layout, backend
    )
    out = call.empty(call.plan.out.shape, call.plan.out.dtype)
    lse = call.empty(call.plan.lse.shape, call.plan.lse.dtype)
    call.library.forward(call.plan.problem, call.q, call.k, call.v, call.head_minor(out), lse, call.extras)
    return (arrays.like(out, q), arrays.like(lse, q)) if return_lse else arrays.like(out, q)


def flash_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
    layout: str = "bshd",
    backend: str | None = None,
    dlse: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    accumulate: bool = False,
    memory: str = "fast",
) -> tuple[Any, ...]:
    """Gradients of `flash_attention`, recomputing P from q, k and lse in memory linear in the sequence length.

    Dao, Fu, Ermon, Rudra and Re, FlashAttention (2022), algorithm 4. Give q, k, v and the options as they were given to
    the forward, and the forward's out and lse.

    Parameters
    ----------
    dout : array like out
        Gradient with respect to out.
    out, lse : arrays
        As the forward returned them with `return_lse=True`.
    dlse : array like lse or None
        Gradient with respect to the returned LSE.
    dq, dk, dv : arrays like q, k, v or None
        Where to write the gradients: q's dtype or float32, any strides with a contiguous last axis, sharing no memory
        with the inputs. None allocates in q's dtype.
    accumulate : bool
        Add into the given dq, dk and dv (all three) instead of overwriting them.
    memory : "fast" or "lean"
        "lean" asks for the least workspace: one float32 a query row. "fast" may take one float32 an element of q
        besides, where that is faster. (NumPy has one way, which is lean.)

    The other parameters and the errors are those of `flash_attention`.

    Returns
    -------
    (dq, dk, dv), or (dq, dk, dv, dsinks) with sinks
        dsinks [heads] in sinks' dtype. Rows that attend to nothing have zero gradients.
    """
    if type(q).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return _adapter("jax").flash_attention_backward(**locals())
    arguments = (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    call = _prepare(
        arguments, causal, window_size, scale, softcap, dropout_p, seed, deterministic, allow_tf32, layout, backend
    )
    plan = call.plan
    dout_, out_, lse_ = (_operand(*pair) for pair in (("dout", dout), ("out", out), ("lse", lse)))
    for name, array, expected in (("dout", dout_, plan.out), ("out", out_, plan.out), ("lse", lse_, plan.lse)):
        _check_like(name, arrays.signature(array), expected, (expected.dtype,))
    dlse_ = None
    if dlse is not None:
        dlse_ = _operand("dlse", dlse)
        _check_like("dlse", arrays.signature(dlse_), plan.lse, (plan.lse.dtype,))
    _check_flag("accumulate", accumulate)
    if memory not in _MEMORY:
        _bad("memory", repr(memory), f"one of {_MEMORY}")
    given = {"dq": dq, "dk": dk, "dv": dv}
    inputs = {"dout": dout_, "q": call.q, "k": call.k, "v": call.v, "out": out_, "lse": lse_, "dlse": dlse_}
    inputs |= call.extras._asdict()
    targets = {}
    for (name, array), expected in zip(given.items(), (plan.q, plan.k, plan.v), strict=True):
        if array is not None:
            targets[name] = _operand(name, array)
            _check_output(name, targets[name], expected, inputs)
            inputs[name] = targets[name]  # the next output may not overlap it either
        elif accumulate:
            _bad(name, "None with accumulate=True", "dq, dk and dv, all three given")
    for name, expected in (("dq", plan.q), ("dk", plan.k), ("dv", plan.v)):
        if name not in targets:
            targets[name] = call.empty(expected.shape, expected.dtype)
    dsinks = None if call.extras.sinks is None else call.empty(call.extras.sinks.shape, call.extras.sinks.dtype.name)
    call.library.backward(
        plan.problem,
        call.head_minor(dout_),
        call.q,
        call.k,
        call.v,
        call.head_minor(out_),
        lse_,
        dlse_,
        *(call.head_minor(targets[name]) for name in ("dq", "dk", "dv")),
        dsinks,
        call.extras,
        accumulate=accumulate,
        lean=memory == "lean",
    )
    # Handing arrays to another library comes after the launches: its stream then waits for what they write.
    handed = {name: arrays.like(targets[name], q if array is None else array) for name, array in given.items()}
    gradients = tuple(handed[name] if array is None else array for name, array in given.items())
    return gradients if dsinks is None else (*gradients, arrays.like(dsinks, q))


def _adapter(framework: str) -> Any:
    """The adapter of a framework, which the caller's arrays show to be imported already."""
    return importlib.import_module(f"cuflash.adapters.{framework}")


# ---- what a call needs -------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What signatures and options determine: computed once for each combination."""

    problem: Problem
    backend: str
    head_major: bool
    q: Signature  # as the caller lays them out: the shapes of dq, dk, dv
    k: Signature
    v: Signature
    out: Signature
    lse: Signature


class _Call(NamedTuple):
    """A validated call: its plan and its arrays, head-minor."""

    plan: _Plan
    library: Any  # the backend: a module with empty, forward and backward
    q: Any
    k: Any
    v: Any
    extras: Extras

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.library.empty(shape, arrays.dtype_of(dtype), self.q)

    def head_minor(self, array: Any) -> Any:
        return array.swapaxes(-3, -2) if self.plan.head_major else array


def _prepare(arguments: tuple[Any, ...], *options: Any) -> _Call:
    """Validate everything about a call's inputs; nothing is computed before this returns."""
    names = ("q", "k", "v", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k")
    operands: list[Any] = [
        None if array is None and name not in "qkv" else _operand(name, array)
        for name, array in zip(names, arguments, strict=True)
    ]
    signatures = [None if array is None else arrays.signature(array) for array in operands]
    try:
        plan = _plan(*signatures, *options)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        plan = _plan.__wrapped__(*signatures, *options)  # names the option that is not a scalar
    q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k = operands
    if plan.problem.spec.packed and plan.backend == "numpy":
        _check_boundaries("cu_seqlens_q", cu_seqlens_q, plan.problem.q_len)
        _check_boundaries("cu_seqlens_k", cu_seqlens_k, plan.problem.kv_len)
    if plan.head_major:
        q, k, v = (array.swapaxes(-3, -2) for array in (q, k, v))
    return _Call(plan, _library(plan.backend), q, k, v, Extras(alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k))


@lru_cache(maxsize=1024, typed=True)
def _plan(
    q: Signature,
    k: Signature,
    v: Signature,
    alibi_slopes: Signature | None,
    sinks: Signature | None,
    cu_seqlens_q: Signature | None,
    cu_seqlens_k: Signature | None,
    causal: Any,
    window_size: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    deterministic: Any,
    allow_tf32: Any,
    layout: Any,
    backend: Any,
) -> _Plan:
    _check_flag("causal", causal)
    _check_flag("deterministic", deterministic)
    _check_flag("allow_tf32", allow_tf32)
    if layout not in _LAYOUTS:
        _bad("layout", repr(layout), f"one of {_LAYOUTS}")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        _bad(missing, "None while the other is given", "cu_seqlens_q and cu_seqlens_k, both or neither")
    packed = cu_seqlens_q is not None
    head_major = layout == "bhsd"

    axes = {False: ("len", "heads", "head_dim"), True: ("heads", "len", "head_dim")}[head_major]
    axes = axes if packed else ("batch", *axes)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) != len(axes):
            _bad(name, f"shape {array.shape}", f"{len(axes)} axes [{', '.join(axes)}]")
        if array.dtype not in DTYPES:
            _bad(name, f"dtype {array.dtype}", f"one of {DTYPES}", TypeError)
        if array.dtype != q.dtype:
            _bad(name, f"dtype {array.dtype}", f"q's dtype, {q.dtype}", TypeError)
        _check_device(name, array, q)
        _check_strides(name, array)
    *q_batch, q_len, heads, head_dim = _head_minor_shape(q, head_major)
    *k_batch, kv_len, kv_heads, k_head_dim = _head_minor_shape(k, head_major)
    *v_batch, v_len, v_heads, head_dim_v = _head_minor_shape(v, head_major)
    if heads == 0 or head_dim == 0:
        _bad("q", f"shape {q.shape}", "at least one head and a head_dim of at least 1")
    if k_batch != q_batch or k_head_dim != head_dim:
        _bad("k", f"shape {k.shape}", f"q's batch and head_dim (q has shape {q.shape})")
    if kv_heads == 0 or heads % kv_heads:
        _bad("k", f"{kv_heads} heads (shape {k.shape})", f"a number of heads that divides q's {heads}")
    if [*v_batch, v_len, v_heads] != [*k_batch, kv_len, kv_heads] or head_dim_v == 0:
        _bad("v", f"shape {v.shape}", f"k's shape but for the last axis (k has shape {k.shape})")

    batch = q_batch[0] if q_batch else 0
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        for name, array in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if array.dtype not in ("int32", "int64"):
                _bad(name, f"dtype {array.dtype}", "int32 or int64", TypeError)
            if len(array.shape) != 1 or array.shape[0] == 0:
                _bad(name, f"shape {array.shape}", "one axis [sequences + 1]")
            _check_device(name, array, q)
            _check_strides(name, array)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            _bad("cu_seqlens_k", f"shape {cu_seqlens_k.shape}", f"cu_seqlens_q's shape, {cu_seqlens_q.shape}")
        batch = cu_seqlens_q.shape[0] - 1
    for name, array, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (batch, heads))),
        ("sinks", sinks, ((heads,),)),
    ):
        if array is not None:
            if array.shape not in shapes:
                _bad(name, f"shape {array.shape}", f"shape {' or '.join(map(str, shapes))}")
            if array.dtype not in ("float32", q.dtype):
                _bad(name, f"dtype {array.dtype}", f"float32 or q's dtype, {q.dtype}", TypeError)
            _check_device(name, array, q)

    left, right = _checked_window(window_size)
    mask = masking.window(left, right)
    if causal:
        mask &= masking.causal()
    dropout_p = _checked_real("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0 <= p < 1)
    if seed is not None and not (_is_integer(seed) and 0 <= seed < 2**64):
        _bad("seed", repr(seed), "an integer in [0, 2**64)", ValueError if _is_integer(seed) else TypeError)
    if dropout_p > 0 and seed is None:
        _bad("seed", f"None with dropout_p={dropout_p}", "an integer in [0, 2**64), the same forward and backward")
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
            bounded_left=mask.left is not None,
            bounded_right=mask.right is not None,
            softcap=softcap is not None,
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            packed=packed,
            dropout=dropout_p > 0,
            deterministic=bool(deterministic),
            allow_tf32=bool(allow_tf32),
        ),
        mask=mask,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=0 if seed is None else int(seed),
    )
    statistic = (heads, q_len) if packed else (batch, heads, q_len)
    return _Plan(
        problem=problem,
        backend=_checked_backend(backend, q.device),
        head_major=head_major,
        q=q,
        k=k,
        v=v,
        out=q._replace(shape=(*q.shape[:-1], head_dim_v)),
        lse=q._replace(shape=statistic, dtype="float64" if q.dtype == "float64" else "float32"),
    )


# ---- checks ------------------------------------------------------------------------------------------------------


def _bad(name: str, was: str, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: got {was}; allowed: {allowed}")


def _operand(name: str, array: Any) -> Any:
    """The array as a backend takes it: NumPy's and CuPy's as they are, any other as a view
    through DLPack."""
    kind = arrays.kind(array)
    if kind in ("numpy", "cupy"):
        return array
    if kind == "":
        _bad(name, f"{array!r:.60} ({type(array).__name__})", "a NumPy or CuPy array or one with __dlpack__", TypeError)
    try:
        return arrays.from_dlpack(array)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: got a {type(array).__name__} that cannot be exported through DLPack ({error}); "
            "allowed: an array whose __dlpack__ works (detached from gradients)"
        ) from error


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        _bad(name, f"{value!r} ({type(value).__name__})", "True or False", TypeError)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked_real(name: str, value: Any, allowed: str, holds: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        _bad(name, f"{value!r} ({type(value).__name__})", allowed, TypeError)
    if not holds(float(value)):
        _bad(name, repr(value), allowed)
    return float(value)


def _checked_window(window_size: Any) -> tuple[int | None, int | None]:
    allowed = "None or (left, right), each None or an integer >= 0"
    if window_size is None:
        return None, None
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        _bad("window_size", repr(window_size), allowed, TypeError)
    for side in window_size:
        if side is not None and not _is_integer(side):
            _bad("window_size", repr(window_size), allowed, TypeError)
        if side is not None and side < 0:
            _bad("window_size", repr(window_size), allowed)
    left, right = (None if side is None else int(side) for side in window_size)
    return left, right


def _checked_backend(backend: Any, device: str) -> str:
    if backend is not None and backend not in _BACKENDS:
        _bad("backend", repr(backend), f"None or one of {_BACKENDS}")
    if device != "cpu":
        if backend == "numpy":
            _bad("backend", f"'numpy' with q on {device}", "None or 'cuda' for arrays on a GPU")
        return "cuda"
    if backend == "cuda":
        raise UnsupportedError(
            "backend: got 'cuda' with q in the CPU's memory; copy it to the GPU with cupy.asarray(q)"
        )
    return "numpy"


def _library(backend: str) -> Any:
    """The module of a backend; CuPy is imported by the first call on a GPU."""
    if backend == "numpy":
        return numpy_backend
    from cuflash.cuda import launch

    return launch


def _check_device(name: str, array: Signature, q: Signature) -> None:
    if array.device != q.device:
        _bad(name, f"an array on {array.device}", f"q's device, {q.device}")


def _check_strides(name: str, array: Signature) -> None:
    if 0 in array.shape:
        return
    if (array.shape[-1] > 1 and array.strides[-1] != 1) or any(stride != int(stride) for stride in array.strides):
        _bad(name, f"strides {array.strides} (in elements)", "whole numbers of elements, the last axis contiguous")


def _head_minor_shape(array: Signature, head_major: bool) -> tuple[int, ...]:
    *batch, first, second, dim = array.shape
    return (*batch, second, first, dim) if head_major else array.shape


def _check_boundaries(name: str, cu_seqlens: np.ndarray, total: int) -> None:
    values = cu_seqlens.tolist()
    allowed = f"boundaries that start at 0, never decrease and end at most at the total of {total}"
    if values[0] != 0:
        _bad(name, f"first value {values[0]}", allowed)
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            _bad(name, f"{values[i]} after {values[i - 1]} at index {i}", allowed)
    if values[-1] > total:
        _bad(name, f"last value {values[-1]}", allowed)


def _check_like(name: str, array: Signature, expected: Signature, dtypes: tuple[str, ...]) -> None:
    if array.shape != expected.shape:
        _bad(name, f"shape {array.shape}", f"shape {expected.shape}")
    if array.dtype not in dtypes:
        _bad(name, f"dtype {array.dtype}", " or ".join(dict.fromkeys(dtypes)), TypeError)
    _check_device(name, array, expected)
    _check_strides(name, array)


def _check_output(name: str, array: Any, expected: Signature, others: dict[str, Any]) -> None:
    signature = arrays.signature(array)
    wider = "float64" if expected.dtype == "float64" else "float32"
    _check_like(name, signature, expected, (expected.dtype, wider))
    if not signature.writable:
        _bad(name, "a read-only array", "a writable array")
    if 0 not in signature.shape:
        overlapping = (stride == 0 and n > 1 for stride, n in zip(signature.strides, signature.shape, strict=True))
        if any(overlapping):
            _bad(name, f"strides {signature.strides} (in elements)", "an array whose elements do not overlap")
    for other_name, other in others.items():
        if other is not None and _share_memory(array, other):
            _bad(
                name,
                f"an array that shares memory with {other_name}",
                "memory that no input uses, nor another gradient",
            )


def _share_memory(a: Any, b: Any) -> bool:
    """Whether two arrays have an element in common; interleaved views of one buffer have none."""
    try:
        return np.shares_memory(  # the stubs know the numbers 0 and -1 only
            arrays.footprint(a),
            arrays.footprint(b),
            max_work=10_000,  # pyright: ignore[reportArgumentType]
        )
    except np.exceptions.TooHardError:
        return False
