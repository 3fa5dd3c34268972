"""The two public functions: make the plan, allocate the results, run the backend.

What a call's arrays and options say without reading data is checked once and remembered (cuflash.plans); only values,
such as the seed and cu_seqlens on the CPU, are looked at in every call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from cuflash import arrays, numpy_backend, plans
from cuflash.arrays import Signature
from cuflash.errors import UnsupportedError
from cuflash.plans import BackwardPlan, ForwardPlan, bad, check_flag
from cuflash.spec import Extras, Problem


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
    bias: Any = None,
    mask: Any = None,
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
    bias : array that broadcasts to [batch, heads, q_len, kv_len], or None
        Is added to the scores, after softcap and ALiBi; float32 or q's dtype, any strides; -inf masks. No packed
        sequences.
    mask : bool array that broadcasts to [batch, heads, q_len, kv_len], or None
        Keep the pairs that are True, as far as causal and window_size keep them too. Where bias may be.
    cu_seqlens_q, cu_seqlens_k : int32 or int64 arrays [sequences + 1] or None
        Boundaries of packed sequences, both or neither: start at 0, never decrease, end at most at the total. Rows
        after the last boundary belong to no sequence: output 0, LSE -inf. On a GPU their values are not checked, since
        that would wait for it: wrong ones read and write out of bounds.
    dropout_p : float in [0, 1)
        Probability to drop an element of P; kept ones are divided by 1 - dropout_p and the LSE is untouched. The mask
        is a function of seed, batch, head and indices alone (Philox4x32-7; see cuflash.dropout), with dropout_p
        rounded to a multiple of 2^-15 for the draw.
    seed : int in [0, 2^64)
        Required with dropout; give the same to the backward.
    return_lse : bool
        Also return LSE, the natural log of the softmax's denominator (sink included): float32 (float64 for float64
        inputs) [batch, heads, q_len], packed [heads, total_q], in either layout.
    deterministic : bool
        Bitwise the same results from the same inputs. (The forward always is, and so are the gradients of the NumPy
        backend.)
    allow_tf32 : bool
        float32 products on a GPU with TF32's 10-bit mantissas; by default they have float32 accuracy (two terms of
        float16 and a power of two a row, Ootomo and Yokota, 2022).
    layout : "bshd" or "bhsd"
    backend : None, "numpy" or "cuda"
        None chooses by where the arrays are. "cuda" with arrays in the CPU's memory computes on the current GPU and
        gives NumPy arrays: batch entries and heads go through it in chunks, copies beside kernels, so that inputs may
        be larger than its memory. The call returns when the results are there, which waits for its own streams, and
        starts on the GPU after what the current stream has to do. CUFLASH_HOST_CHUNK_MB bounds the device memory of a
        chunk, of which there are two at a time. With dropout, all must fit into one chunk.

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
    if type(q) not in arrays.NATIVE and (adapter := _adapter(q)) is not None:
        return adapter.attend(
            (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask),
            (causal, window_size, scale, softcap, dropout_p, seed, deterministic, allow_tf32, layout, backend),
            return_lse,
        )
    check_flag("return_lse", return_lse)
    inputs, signatures = _inputs(q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask)
    seeded = seed is not None
    options = (causal, window_size, scale, softcap, dropout_p, seeded, deterministic, allow_tf32, layout, backend)
    plan: ForwardPlan = plans.forward(*signatures, *options)
    seed = plans.checked_seed(seed)
    if plan.device >= 0:
        out, lse = _cuda().forward(plan, inputs, seed, return_lse)
    elif plan.backend == "cuda":
        _check_values(plan, inputs)
        out, lse = _cuda_from_host().forward(plan, inputs, options, seed, return_lse)
    else:
        _check_values(plan, inputs)
        out, lse = (arrays.empty(result) for result in (plan.out, plan.lse))
        problem, (q_, k_, v_), extras = _for_numpy(plan, inputs, seed)
        numpy_backend.forward(problem, q_, k_, v_, _head_minor(plan, out), lse, extras)
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
    bias: Any = None,
    mask: Any = None,
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

    The other parameters and the errors are those of `flash_attention`. Arrays in the CPU's memory with backend="cuda"
    go through the GPU in chunks as they do there, those given for the gradients too; an error of the GPU on the way
    leaves these partly written.

    Returns
    -------
    (dq, dk, dv), then dsinks with sinks and dbias with bias
        dsinks [heads] and dbias, which has the shape of bias and is summed over the axes along which that is broadcast,
        in their dtypes. Rows that attend to nothing have zero gradients.
    """
    if type(q) not in arrays.NATIVE and (adapter := _adapter(q)) is not None:
        return adapter.flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            causal=causal,
            window_size=window_size,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            bias=bias,
            mask=mask,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=dropout_p,
            seed=seed,
            deterministic=deterministic,
            allow_tf32=allow_tf32,
            layout=layout,
            backend=backend,
            dlse=dlse,
            dq=dq,
            dk=dk,
            dv=dv,
            accumulate=accumulate,
            memory=memory,
        )
    others = _operands(("dout", "out", "lse", "dlse", "dq", "dk", "dv"), (dout, out, lse, dlse, dq, dk, dv), 3)
    inputs, signatures = _inputs(q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask)
    seeded = seed is not None
    options = (causal, window_size, scale, softcap, dropout_p, seeded, deterministic, allow_tf32, layout, backend)
    signatures = (*[None if array is None else arrays.signature(array) for array in others], *signatures)
    plan: BackwardPlan = plans.backward(*signatures, accumulate, memory, True, *options)
    seed = plans.checked_seed(seed)
    dout_, out_, lse_, dlse_, *given = others
    operands = (dout_, out_, lse_, dlse_, *inputs)
    check_overlap(dict(zip(("dq", "dk", "dv"), given, strict=True)), operands)
    if plan.device >= 0:
        targets = _cuda().backward(plan, operands, given, seed)
    elif plan.forward.backend == "cuda":
        _check_values(plan.forward, inputs)
        targets = _cuda_from_host().backward(plan, operands, given, options, seed)
    else:
        _check_values(plan.forward, inputs)
        targets = plans.targets(plan, given, arrays.empty)
        problem, (q_, k_, v_), extras = _for_numpy(plan.forward, inputs, seed)
        dout_, out_, dq_, dk_, dv_ = (_head_minor(plan.forward, array) for array in (dout_, out_, *targets[:3]))
        dsinks, dbias = (dict(zip(plan.gradients, targets, strict=True)).get(name) for name in ("dsinks", "dbias"))
        if dbias is not None:
            dbias = _four_axes(dbias)
        arguments = (problem, dout_, q_, k_, v_, out_, lse_, dlse_, dq_, dk_, dv_, dsinks, dbias, extras)
        numpy_backend.backward(*arguments, accumulate=plan.accumulate, lean=plan.lean)
    # Handing arrays to another library comes after the launches: its stream then waits for what they write.
    return tuple(
        arrays.like(target, q) if array is None else array
        for target, array in zip(targets, (dq, dk, dv, None, None), strict=False)
    )


# ---- on the way to a backend -------------------------------------------------------------------------------------


def _adapter(q: Any) -> Any:
    """What attends to arrays of q's framework, where these are more than memory: gradients, compilation, transforms;
    or None."""
    torch = _framework("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        import cuflash.adapters.torch.attention  # a statement, which torch.compile follows

        return cuflash.adapters.torch.attention
    jax = _framework("jax")
    if jax is not None and isinstance(q, jax.Array):
        import cuflash.adapters.jax._attention

        return cuflash.adapters.jax._attention
    return None


_FRAMEWORKS: dict[str, Any] = {}  # that have been found loaded


def _framework(name: str) -> Any:
    """The module, or None if nobody has imported it."""
    found = _FRAMEWORKS.get(name)  # first, since torch.compile takes a look at every module when it meets sys.modules
    if found is None and name in sys.modules:
        found = _FRAMEWORKS[name] = sys.modules[name]
    return found


_framework("torch")  # now, where it is loaded: the first call may be one that is being compiled


def _inputs(
    q: Any,
    k: Any,
    v: Any,
    alibi_slopes: Any,
    sinks: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    bias: Any,
    mask: Any,
) -> tuple[Sequence[Any], Sequence[Signature | None]]:
    """The inputs of a call as a backend takes them, and their signatures."""
    native = arrays.NATIVE
    alone = alibi_slopes is None and sinks is None and cu_seqlens_q is None and cu_seqlens_k is None
    alone = alone and bias is None and mask is None
    if alone and type(q) in native and type(k) in native and type(v) in native:  # the usual call, at once
        signatures = (arrays.signature(q), arrays.signature(k), arrays.signature(v))
        return (q, k, v, *_NO_OPTIONS), (*signatures, *_NO_OPTIONS)
    given = (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask)
    inputs = _operands(plans.INPUTS, given, 3)
    return inputs, [None if array is None else arrays.signature(array) for array in inputs]


_NO_OPTIONS = (None,) * (len(plans.INPUTS) - 3)


def _operands(names: Sequence[str], given: Sequence[Any], required: int) -> list[Any]:
    """Arrays as a backend takes them: NumPy's and CuPy's as they are, any other as a view through DLPack; None where
    there is none, unless it is one of the first `required`."""
    return [
        array if (array is None and i >= required) or type(array) in arrays.NATIVE else _operand(names[i], array)
        for i, array in enumerate(given)
    ]


def _operand(name: str, array: Any) -> Any:
    kind = arrays.kind(array)
    if kind in ("numpy", "cupy"):
        return array
    if kind == "":
        bad(name, f"{array!r:.60} ({type(array).__name__})", "a NumPy or CuPy array or one with __dlpack__", TypeError)
    try:
        return arrays.from_dlpack(array)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: got a {type(array).__name__} that cannot be exported through DLPack ({error}); "
            "allowed: an array whose __dlpack__ works (detached from gradients)"
        ) from error


@lru_cache(maxsize=1)
def _cuda() -> Any:
    """The launches; CuPy is imported by the first call on a GPU."""
    from cuflash.cuda import launch

    return launch


def _cuda_from_host() -> Any:
    """The launches for arrays in the CPU's memory."""
    from cuflash.cuda import host_arrays

    return host_arrays


def _head_minor(plan: ForwardPlan, array: Any) -> Any:
    return array.swapaxes(-3, -2) if plan.head_major else array


def _for_numpy(
    plan: ForwardPlan, inputs: Sequence[Any], seed: int
) -> tuple[Problem, tuple[np.ndarray, np.ndarray, np.ndarray], Extras]:
    q, k, v = (_head_minor(plan, array) for array in inputs[:3])
    extras = Extras(*inputs[3:])
    bias, mask = (None if array is None else _four_axes(array) for array in (extras.bias, extras.mask))
    return (
        replace(plan.problem, seed=seed) if seed else plan.problem,
        (q, k, v),
        extras._replace(bias=bias, mask=mask),
    )


def _four_axes(array: np.ndarray) -> np.ndarray:
    """A view with the axes [batch, heads, q_len, kv_len]."""
    return array[(None,) * (4 - array.ndim)]


def _check_values(plan: ForwardPlan, inputs: Sequence[Any]) -> None:
    """What only the values of arrays on the CPU say."""
    if plan.problem.spec.packed:
        for name, array, total in (
            ("cu_seqlens_q", inputs[5], plan.problem.q_len),
            ("cu_seqlens_k", inputs[6], plan.problem.kv_len),
        ):
            _check_boundaries(name, array, total)


def _check_boundaries(name: str, cu_seqlens: np.ndarray, total: int) -> None:
    values = cu_seqlens.tolist()
    allowed = f"boundaries that start at 0, never decrease and end at most at the total of {total}"
    if values[0] != 0:
        bad(name, f"first value {values[0]}", allowed)
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            bad(name, f"{values[i]} after {values[i - 1]} at index {i}", allowed)
    if values[-1] > total:
        bad(name, f"last value {values[-1]}", allowed)


def check_overlap(given: dict[str, Any], inputs: Sequence[Any]) -> None:
    """Gradients may share no memory with the inputs nor with each other."""
    names = ("dout", "out", "lse", "dlse", *plans.INPUTS)
    others = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    for name, array in given.items():
        if array is None:
            continue
        for other_name, other in others.items():
            if _share_memory(array, other):
                bad(
                    name,
                    f"an array that shares memory with {other_name}",
                    "memory that no input uses, nor another gradient",
                )
        others[name] = array


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
