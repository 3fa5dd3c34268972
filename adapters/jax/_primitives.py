"""The forward and the backward as JAX primitives: shapes, vmap, partitioning over devices, and what XLA is told.

A primitive's arrays are the operands of its `Call`, all of them given, on one device or sharded over several. Sharded
ones are partitioned over batch and heads (`custom_partitioning`): each device attends to its own part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cuflash.adapters.jax import _compiled, _gpu, _handler
from cuflash.adapters.jax._call import DENSE_AXES, Call, plan_of, results_of, signature
from cuflash.adapters.jax._route import route
from cuflash.arrays import Signature, dtype_of
from cuflash.errors import UnsupportedError

_handler.register()


# ---- shapes and dtypes -------------------------------------------------------------------------------------------


def axes_of(call: Call, name: str, rank: int) -> tuple[str, ...]:
    """What the axes of an operand or result are: batch, len, heads, dim; the boundaries of cu_seqlens; or, of a bias or
    a mask, `DENSE_AXES`, each "one" where it is broadcast along it."""
    if name in ("bias", "dbias", "mask"):
        whole = call.mask_axes if name == "mask" else call.bias_axes
        return tuple(axis if axis in whole else "one" for axis in DENSE_AXES)
    if name in ("cu_seqlens_q", "cu_seqlens_k"):
        return ("boundaries",)
    if name in ("alibi_slopes", "sinks", "dsinks"):
        axes = ("batch", "heads")
    elif name in ("lse", "dlse"):
        axes = ("batch", "heads", "len")
    else:
        axes = ("batch", "len", "heads", "dim") if call.options.layout == "bshd" else ("batch", "heads", "len", "dim")
    return axes[len(axes) - rank :]


def check_types(call: Call, types: Sequence[Any], device: str = "") -> dict[str, Signature]:
    """The signatures of a call's results; with a device ("cpu", "cuda:0") also whether it can be served there."""
    options = call.options if device else replace(call.options, backend=None)
    signatures = {
        name: signature(name, x.shape, x.dtype.name, device or "cpu")
        for name, x in zip(call.operands, types, strict=True)
    }
    return results_of(plan_of(signatures, options))


def result_types(call: Call, *operands: Any) -> tuple[Any, ...]:
    """The JAX types of a call's results, of its operands'. Gradients are typed like what they belong to."""
    types = dict(zip(call.operands, operands, strict=True))
    signatures = check_types(call, operands)
    q = types["q"]
    place = dict(zip(axes_of(call, "q", q.ndim), q.sharding.spec, strict=True)) | {"len": None, "dim": None}
    results = []
    for name in call.results:
        shape, dtype = signatures[name].shape, dtype_of(signatures[name].dtype)
        like = types.get(name.removeprefix("d"))
        if like is None:
            spec = P(*(place[axis] for axis in axes_of(call, name, len(shape))))
            like = q.update(shape=shape, sharding=q.sharding.update(spec=spec))
        results.append(like.update(shape=shape, dtype=dtype, weak_type=False))
    return tuple(results)


# ---- the primitives ----------------------------------------------------------------------------------------------


def forward(call: Call, *arrays: Any) -> tuple[Any, ...]:
    """out and lse."""
    return tuple(_FORWARD.bind(*arrays, call=call))


def backward(call: Call, *arrays: Any) -> tuple[Any, ...]:
    """dq, dk, dv, then dsinks with sinks and dbias with a bias."""
    return tuple(_BACKWARD.bind(*arrays, call=call))


def _primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    eager = jax.jit(lambda *arrays, call: primitive.bind(*arrays, call=call), static_argnames="call")
    primitive.def_impl(eager)
    primitive.def_abstract_eval(lambda *types, call: result_types(call, *types))
    batching.primitive_batchers[primitive] = partial(_batched, primitive)
    ad.primitive_jvps[primitive] = _no_derivative
    prim_requires_devices_during_lowering.add(primitive)  # custom_partitioning does, which lowering goes through
    for platform, device in (("cpu", "cpu"), ("cuda", "cuda:0")):
        mlir.register_lowering(primitive, partial(_lower, device), platform=platform)
    return primitive


def _no_derivative(primals: Any, tangents: Any, *, call: Call) -> NoReturn:
    raise UnsupportedError(
        "flash_attention: got a second derivative or one in forward mode; it has first ones in reverse mode, as "
        "jax.grad and jax.vjp compute"
    )


def _lower(device: str, context: Any, *arrays: Any, call: Call) -> Any:
    check_types(call, context.avals_in, device)
    if device == "cpu":
        _handler.finish_at_exit()
    types = dict(zip(call.operands, context.avals_in, strict=True))
    heads = axes_of(call, "q", types["q"].ndim).index("heads")
    same_heads = types["q"].shape[heads] == types["k"].shape[heads]
    function = _on_devices(call, tuple(x.ndim for x in types.values()), same_heads, device != "cpu")
    return mlir.lower_fun(function, multiple_results=True)(context, *arrays)


def _launch(call: Call, on_gpu: bool, *arrays: Any) -> tuple[Any, ...]:
    """A call on the arrays of one device. On a GPU its kernels are compiled here, and XLA allocates its workspace."""
    operands = [jax.typeof(array) for array in arrays]
    types = result_types(call, *operands)
    found = route().gpu if on_gpu else None
    if found is not None:
        return _compiled.launch(call, found, types, *arrays)
    text = call.text(operands)
    workspace = _gpu.prepare(text) if on_gpu else 0
    if workspace:
        sharding = types[0].sharding.update(spec=P(None))
        types += (types[0].update(shape=(workspace,), dtype=jnp.uint8, sharding=sharding),)
    return tuple(jax.ffi.ffi_call(_handler.target(call), types)(*arrays, call=text))[: len(call.results)]


# ---- vmap --------------------------------------------------------------------------------------------------------


def _batched(primitive: Primitive, arrays: Sequence[Any], dims: Sequence[Any], *, call: Call) -> tuple[Any, Any]:
    """All examples in one call, folded into its batch axis.

    Into its heads where the batch axis would not do: packed sequences have none, and the gradient of sinks is a sum
    over it where each example has its own. A bias and a mask become whole along that axis. One call an example where
    the boundaries of sequences differ between examples, with dropout, whose mask depends on the place in the batch, and
    where the heads to fold into are spread over an explicit axis of a mesh.
    """
    size = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)
    mapped = [dim is not None for dim in dims]
    arrays = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arrays, dims, strict=True)]
    ranks = [x.ndim - of_examples for x, of_examples in zip(arrays, mapped, strict=True)]
    axes = [axes_of(call, name, rank) for name, rank in zip(call.operands, ranks, strict=True)]
    axes_of_mapped = [
        DENSE_AXES if name in ("bias", "mask") else a
        for name, a, of_examples in zip(call.operands, axes, mapped, strict=True)
        if of_examples
    ]
    into = "batch" if "sinks" not in call.operands and all("batch" in a for a in axes_of_mapped) else "heads"

    # Of two axes that become one, only the major one may be spread over an explicit axis of a mesh.
    specs = [jax.typeof(x).sharding.spec[x.ndim - rank :] for x, rank in zip(arrays, ranks, strict=True)]
    spread = any(dict(zip(*pair, strict=True)).get(into) is not None for pair in zip(axes, specs, strict=True))
    if spread:
        arrays = [
            _with_whole_first_axis(x) if of_examples else x for x, of_examples in zip(arrays, mapped, strict=True)
        ]
    if call.options.dropout_p > 0 or ("boundaries",) in axes_of_mapped or (spread and into == "heads"):
        return _one_by_one(primitive, arrays, mapped, call)

    shapes = _shapes_of_results(call, arrays, ranks)
    whole = replace(
        call,
        bias_axes=(*call.bias_axes, into) if "bias" in call.operands else (),
        mask_axes=(*call.mask_axes, into) if "mask" in call.operands else (),
    )
    of_q = call.operands.index("q")
    length = arrays[of_q].shape[arrays[of_q].ndim - ranks[of_q] + axes[of_q].index(into)]
    for i, name in enumerate(call.operands):
        if name in ("bias", "mask"):
            axes[i] = axes_of(whole, name, 4)
            shape = list(arrays[i].shape)
            shape[len(shape) - 4 + DENSE_AXES.index(into)] = length
            arrays[i] = jnp.broadcast_to(arrays[i], shape)
    folded = []
    for x, of_examples, a in zip(arrays, mapped, axes, strict=True):
        if into in a:
            x = x if of_examples else jnp.broadcast_to(x, (size, *x.shape))
            place = a.index(into)
            x = jnp.moveaxis(x, 0, place + spread)
            x = x.reshape(*x.shape[:place], x.shape[place] * x.shape[place + 1], *x.shape[place + 2 :])
        folded.append(x)
    whole_shapes = _shapes_of_results(whole, arrays, ranks)
    places = [axes_of(whole, name, len(shapes[name])).index(into) + spread for name in call.results]
    results = []
    for name, place, x in zip(call.results, places, primitive.bind(*folded, call=whole), strict=True):
        shape = whole_shapes[name]
        x = x.reshape(*shape[:place], size, *shape[place:])
        if shape != shapes[name]:  # each example's bias is broadcast
            x = x.sum(place - 1 if spread else place + 1, keepdims=True)
        results.append(x)
    return results, places


def _shapes_of_results(call: Call, arrays: Sequence[Any], ranks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes of one example's results."""
    single = [jax.ShapeDtypeStruct(x.shape[x.ndim - rank :], x.dtype) for x, rank in zip(arrays, ranks, strict=True)]
    return {name: found.shape for name, found in check_types(call, single).items()}


def _with_whole_first_axis(x: Any) -> Any:
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(x, sharding.update(spec=P(None, *sharding.spec[1:])))


def _one_by_one(primitive: Primitive, arrays: Sequence[Any], mapped: Sequence[bool], call: Call) -> tuple[Any, Any]:
    places = [i for i, of_examples in enumerate(mapped) if of_examples]

    def example(parts: list[Any]) -> list[Any]:
        whole = list(arrays)
        for i, part in zip(places, parts, strict=True):
            whole[i] = part
        return primitive.bind(*whole, call=call)

    results = jax.lax.map(example, [arrays[i] for i in places])
    return results, [0] * len(results)


# ---- several devices ---------------------------------------------------------------------------------------------


class _Spread(NamedTuple):
    """Over which axes of a mesh a call is spread: names as they stand in a PartitionSpec, or None."""

    batch: Any = None
    heads: Any = None
    devices_per_kv_head: int = 1  # more than 1: every device is given all of k and v and works with one of their heads

    def spec(self, call: Call, name: str, rank: int) -> P:
        shared = name in ("k", "v", "dk", "dv") and self.devices_per_kv_head > 1
        places = {"batch": None if name == "dsinks" else self.batch, "heads": None if shared else self.heads}
        return P(*(places.get(axis) for axis in axes_of(call, name, rank)))


def _spread(call: Call, mesh: Any, operands: Sequence[Any]) -> _Spread:
    """How a call on operands of these shapes and shardings is spread: like its q, as far as the parts are even."""
    q, k = (operands[call.operands.index(name)] for name in ("q", "k"))
    if call.options.dropout_p > 0 or not isinstance(q.sharding, NamedSharding):
        return _Spread()  # the mask of dropout depends on the place in the whole batch and its heads
    axes = axes_of(call, "q", q.ndim)
    lengths, kv_lengths = (dict(zip(axes, x.shape, strict=True)) for x in (q, k))
    place = dict(zip(axes, tuple(q.sharding.spec) + (None,) * q.ndim, strict=False))
    batch, heads = place.get("batch"), place["heads"]
    if lengths.get("batch", 0) % _devices(mesh, batch):
        batch = None
    devices, kv_heads = _devices(mesh, heads), kv_lengths["heads"]
    if kv_heads % devices == 0:
        return _Spread(batch, heads)
    if devices % kv_heads == 0 and lengths["heads"] % devices == 0:
        return _Spread(batch, heads, devices // kv_heads)
    return _Spread(batch)


def _devices(mesh: Any, axes: Any) -> int:
    """How many devices lie along axes of a mesh, as they stand in a PartitionSpec."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def _partition(call: Call, on_gpu: bool, mesh: Any, operands: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
    """What each device computes, and how operands and results lie: the answer to XLA's partitioner."""
    spread = _spread(call, mesh, operands)

    def lie(names: Sequence[str], arrays: Sequence[Any]) -> tuple[NamedSharding, ...]:
        pairs = zip(names, arrays, strict=True)
        return tuple(NamedSharding(mesh, spread.spec(call, name, x.ndim)) for name, x in pairs)

    return mesh, partial(_part, call, on_gpu, spread), lie(call.results, results), lie(call.operands, operands)


@contextmanager
def _manual_axes() -> Iterator[None]:
    """The mesh of `jax.set_mesh`, if there is one, with all axes manual: what a device's part is traced under.

    Where its axes are explicit, psum's sum of two numbers would get a sharding, which XLA refuses (jax 0.11).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        yield
        return
    manual = (AxisType.Manual,) * len(mesh.axis_names)
    with jax.sharding.use_abstract_mesh(AbstractMesh(mesh.axis_sizes, mesh.axis_names, manual)):
        yield


@_manual_axes()
def _part(call: Call, on_gpu: bool, spread: _Spread, *arrays: Any) -> tuple[Any, ...]:
    """One device's part of a call, on its parts of the arrays."""
    whole = dict(zip(call.operands, arrays, strict=True))
    if spread.devices_per_kv_head == 1:
        parts = dict(zip(call.results, _launch(call, on_gpu, *arrays), strict=True))
    else:
        axis = axes_of(call, "k", whole["k"].ndim).index("heads")
        head = jax.lax.axis_index(spread.heads) // spread.devices_per_kv_head
        own = {name: jax.lax.dynamic_slice_in_dim(whole[name], head, 1, axis) for name in ("k", "v")}
        parts = dict(zip(call.results, _launch(call, on_gpu, *(whole | own).values()), strict=True))
        for name in ("dk", "dv") if call.backward else ():
            zeros = jnp.zeros_like(whole[name.removeprefix("d")])
            parts[name] = jax.lax.dynamic_update_slice_in_dim(zeros, parts[name], head, axis)
            parts[name] = jax.lax.psum(parts[name], spread.heads)
    if "dsinks" in parts and spread.batch is not None:
        parts["dsinks"] = jax.lax.psum(parts["dsinks"], spread.batch)
    for axis, place in (("batch", spread.batch), ("heads", spread.heads)):
        if "dbias" in parts and place is not None and axis not in call.bias_axes:
            parts["dbias"] = jax.lax.psum(parts["dbias"], place)
    return tuple(parts.values())


@lru_cache(maxsize=1024)
def _on_devices(call: Call, ranks: tuple[int, ...], same_heads: bool, on_gpu: bool) -> Any:
    """A function of a call's whole arrays that XLA spreads over the devices they are on.

    The rule says which axes have the same sharding: one letter (factor) each for batch, heads and those of k and v,
    for lengths, dimensions and boundaries. All but batch and heads are gathered.
    """
    of_q = {"batch": "b", "len": "s", "heads": "h", "dim": "d", "boundaries": "n"}
    of_k = {**of_q, "len": "t", "heads": "h" if same_heads else "g"}
    of_name = {"q": of_q, "k": of_k, "v": {**of_k, "dim": "e"}, "out": {**of_q, "dim": "e"}}
    of_name |= {"dout": of_name["out"], "dq": of_name["q"], "dk": of_name["k"], "dv": of_name["v"]}
    rank_of = dict(zip(call.operands, ranks, strict=True))
    rank_of |= {f"d{name}": rank for name, rank in rank_of.items()}
    rank_of |= {"out": rank_of["q"], "lse": rank_of["q"] - 1}

    def side(names: Sequence[str]) -> str:
        return ", ".join(" ".join(letters(name)) for name in names)

    def letters(name: str) -> list[str]:
        if name in ("bias", "dbias", "mask"):  # an axis of length 1 is a factor of its own
            own = "wxyz" if name == "mask" else "WXYZ"
            return [{**of_q, "kv_len": "t"}.get(axis, own[i]) for i, axis in enumerate(axes_of(call, name, 4))]
        return [of_name.get(name, of_q)[axis] for axis in axes_of(call, name, rank_of[name])]

    rule = f"{side(call.operands)} -> {side(call.results)}"
    gathered = set("bhgstden" if call.options.dropout_p > 0 else "stden") & set(rule)

    def infer(mesh: Any, operands: Sequence[Any], results: Sequence[Any]) -> Any:
        return _partition(call, on_gpu, mesh, operands, results)[2]

    spread = custom_partitioning(partial(_launch, call, on_gpu))
    spread.def_partition(
        partial(_partition, call, on_gpu),
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        need_replication_factors=tuple(sorted(gathered, key=rule.index)),
    )
    return spread


_FORWARD, _BACKWARD = _primitive("cuflash_forward"), _primitive("cuflash_backward")
