"""`flash_attention` and its backward on JAX arrays, differentiable and transformable."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from cuflash.adapters.jax._call import BACKWARD, DENSE_AXES, FORWARD, Call, Options, plan_of, signature
from cuflash.adapters.jax._primitives import backward, forward
from cuflash.arrays import Signature
from cuflash.errors import UnsupportedError
from cuflash.plans import INPUTS, bad, check_flag

OUT_NAME, LSE_NAME = "cuflash_out", "cuflash_lse"


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
    memory: str = "fast",
) -> Any:
    """`cuflash.flash_attention` on JAX arrays: the same shapes, dtypes, options, results and errors.

    Works under jit, grad, vmap, scan, while_loop, cond, checkpoint, shard_map and export, and on sharded arrays, where
    each device attends to its part of the batch and the heads. Differentiable once, in reverse mode, with respect to
    q, k, v, sinks and bias, also through a returned LSE. A checkpoint policy can keep what the backward needs by the
    names "cuflash_out" and "cuflash_lse".

    Parameters
    ----------
    q, k, v, alibi_slopes, sinks, bias, mask, cu_seqlens_q, cu_seqlens_k : JAX or NumPy arrays
        As for `cuflash.flash_attention`. There is no gradient with respect to alibi_slopes: asking for it raises.
    memory : "fast" or "lean"
        The workspace of the backward, as for `cuflash.flash_attention_backward`.

    The other options are Python values, known while tracing; so is the seed of dropout.

    Raises
    ------
    TypeError, ValueError
        While tracing; names the argument, what it was and what is allowed. The values of cu_seqlens are known only when
        the call runs: on the CPU bad ones raise from there, on a GPU they are not checked.
    UnsupportedError
        What this build or GPU cannot do, and what to do instead.
    """
    return attend(
        (q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, bias, mask),
        (causal, window_size, scale, softcap, dropout_p, seed, deterministic, allow_tf32, layout, backend),
        return_lse,
        memory,
    )


def attend(arrays: tuple[Any, ...], settings: tuple[Any, ...], return_lse: bool, memory: str = "fast") -> Any:
    """`flash_attention` with its arguments in the order of `plans.INPUTS` and of Options, as `cuflash.flash_attention`
    passes them."""
    check_flag("return_lse", return_lse)
    given: dict[str, Any] = dict(zip(INPUTS, arrays, strict=True))
    results: Any = _attention(*_checked(given, Options(*settings, memory=memory)))
    return results if return_lse else results[0]


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
    """`cuflash.flash_attention_backward` on JAX arrays: the same shapes, dtypes, options, results and errors.

    `jax.grad` of `flash_attention` calls it by itself. JAX arrays are immutable, so dq, dk and dv have to be None and
    accumulate False: add the gradients that are returned.
    """
    options = Options(
        causal=causal,
        window_size=window_size,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
        deterministic=deterministic,
        allow_tf32=allow_tf32,
        layout=layout,
        backend=backend,
        memory=memory,
    )
    for name, given in (("dq", dq), ("dk", dk), ("dv", dv)):
        if given is not None:
            bad(name, f"a {type(given).__name__}", "None, as JAX arrays cannot be written to", TypeError)
    check_flag("accumulate", accumulate)
    if accumulate:
        bad("accumulate", "True", "False: add the returned gradients to yours")
    arrays = {"dout": dout, "out": out, "lse": lse, "dlse": dlse, "q": q, "k": k, "v": v}
    arrays |= {"alibi_slopes": alibi_slopes, "sinks": sinks, "bias": bias, "mask": mask}
    arrays |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    call, operands = _checked(arrays, options)
    gradients = backward(call, *operands)
    return gradients if bias is None else (*gradients[:-1], gradients[-1].reshape(bias.shape))


# ---- checks ------------------------------------------------------------------------------------------------------

_OPTIONAL = {"dlse", *FORWARD[3:]}


def _checked(arrays: dict[str, Any], options: Options) -> tuple[Call, tuple[jax.Array, ...]]:
    """The call and its operands, everything about them checked that is known while tracing."""
    given = {name: array for name, array in arrays.items() if array is not None or name not in _OPTIONAL}
    signatures = {name: _signature(name, array) for name, array in given.items()}
    for field in fields(options):
        if isinstance(getattr(options, field.name), Tracer):
            bad(field.name, "a value that JAX traces", "a Python value (static under jit)", TypeError)
    # Which platform the call will run on is known when it is lowered: _primitives checks `backend` against it.
    plan_of(signatures, replace(options, backend=None) if options.backend == "cuda" else options)
    given = {name: jnp.asarray(array) for name, array in given.items()}
    for name, array in given.items():
        if array.dtype.name != signatures[name].dtype:
            allowed = f"{array.dtype.name}, or 64-bit types switched on (jax_enable_x64)"
            bad(name, f"dtype {signatures[name].dtype}", allowed, TypeError)
    lengths: dict[str, int] = dict(
        zip(("batch", "len", "heads") if options.layout == "bshd" else DENSE_AXES, given["q"].shape, strict=False)
    )
    lengths["kv_len"] = given["k"].shape[1 if options.layout == "bshd" else 2]
    axes: dict[str, tuple[str, ...]] = {"bias": (), "mask": ()}
    for name in axes.keys() & given.keys():  # packed sequences have none
        array = given[name] = given[name].reshape((1,) * (4 - given[name].ndim) + given[name].shape)
        axes[name] = tuple(axis for axis, n in zip(DENSE_AXES, array.shape, strict=True) if n == lengths[axis])
    order = BACKWARD if "dout" in given else FORWARD
    operands = tuple(name for name in order if name in given)
    call = Call("dout" in given, operands, options.plain(), axes["bias"], axes["mask"])
    return call, _varying_alike([given[name] for name in operands])


def _signature(name: str, array: Any) -> Signature:
    if not isinstance(array, (jax.Array, np.ndarray)):
        bad(name, f"{array!r:.60} ({type(array).__name__})", "a JAX or NumPy array", TypeError)
    dtype = array.dtype.name if getattr(array.dtype, "isnative", True) else str(array.dtype)
    return signature(name, array.shape, dtype)


def _varying_alike(arrays: list[jax.Array]) -> tuple[jax.Array, ...]:
    """The arrays, inside shard_map all made to vary over the mesh axes that any of them varies over."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    together = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(sorted(together - own)), to="varying") if together - own else array
        for array, own in zip(arrays, varying, strict=True)
    )


# ---- the gradient ------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return forward(call, *operands)


def _attention_forward(call: Call, operands: tuple[Any, ...]) -> tuple[Any, Any]:
    for name, operand in zip(call.operands, operands, strict=True):
        if name == "alibi_slopes" and operand.perturbed:
            raise UnsupportedError(
                "alibi_slopes: got an array that is differentiated; there is no gradient with respect to it: "
                "pass jax.lax.stop_gradient(alibi_slopes)"
            )
    values = tuple(operand.value for operand in operands)
    out, lse = forward(call, *values)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (values, out, lse)


def _attention_backward(call: Call, residuals: Any, cotangents: Any) -> tuple[Any]:
    values, out, lse = residuals
    dout, dlse = cotangents
    given = {"dout": jnp.zeros_like(out) if isinstance(dout, SymbolicZero) else dout, "out": out, "lse": lse}
    if not isinstance(dlse, SymbolicZero):
        given["dlse"] = dlse
    back = replace(call, backward=True, operands=(*given, *call.operands))
    gradients = dict(zip(back.results, backward(back, *given.values(), *values), strict=True))
    return (tuple(gradients.get(f"d{name}") for name in call.operands),)


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)
