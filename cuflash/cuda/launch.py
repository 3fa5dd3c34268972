"""Launches of the kernels on CuPy arrays: parameters, grids, workspace.

Everything runs on the current stream of the arrays' device, without a synchronisation; the workspace of the backward,
one float32 a query row and, where the Hopper kernel sums dQ, one float32 an element of q, comes from CuPy's pool. A
kernel is compiled at its first use (cuflash.cuda.jit).

What a call launches depends on its Problem, on strides and on alignment, and is prepared once (`_prepared`); a further
call fills in its pointers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuflash import dropout, tuning
from cuflash.cuda import jit, tensor_map, toolchain
from cuflash.errors import UnsupportedError
from cuflash.spec import Extras, Problem, Spec, Tile

logger = logging.getLogger("cuflash")

MAX_LENGTH = 2**29  # tokens: positions and bounds are 32-bit integers in the kernels
_UNBOUNDED = 2**30 - 1024  # a mask's bound beyond every position
_MAX_BLOCKS = 2**31 - 1
_TICKETS = 1  # counter behind D
_SECTION_BYTES = 2**25  # of the L2 cache
_PAIRED_TILES = 64  # of a head, up to which the Hopper forward works on them in pairs under a mask
_SHARED_SIZE_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

# struct Params of cuda_src/params.cuh: arrays are a pointer and strides, then the scalars, all naturally aligned.
_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_STATISTICS = ("lse", "dlse", "delta")
PARAMS = (
    *((f"{name}.{field}", "P" if field == "data" else "q") for name in _TENSORS
      for field in ("data", "batch_stride", "row_stride", "head_stride")),
    *((f"{name}.{field}", "P" if field == "data" else "q") for name in _STATISTICS
      for field in ("data", "batch_stride", "head_stride")),
    ("dq_sum", "P"), ("dq_turns", "P"), ("tickets", "P"),
    ("alibi_slopes", "P"), ("alibi_batch_stride", "q"), ("alibi_head_stride", "q"),
    ("sinks", "P"), ("sinks_stride", "q"), ("dsinks", "P"),
    ("cu_seqlens_q", "P"), ("cu_seqlens_k", "P"), ("seed", "Q"),
    *((name, "i") for name in ("batch", "heads", "group", "q_len", "kv_len", "q_tiles", "kv_tiles", "section_heads",
                             "left", "right")),
    ("dropout_threshold", "I"), ("dropout_scale", "f"), ("scale", "f"), ("softcap", "f"),
    *((name, "i") for name in ("cu_seqlens_int64", "alibi_float32", "sinks_float32", "dq_float32", "dk_float32",
                               "dv_float32", "accumulate")),
)  # fmt: skip
PARAMS_STRUCT = struct.Struct("@" + "".join(code for _, code in PARAMS) + "0P")  # padded to the alignment of a pointer
PARAMS_OFFSETS = {
    name: struct.calcsize("@" + "".join(code for _, code in PARAMS[:i]) + "0" + code)
    for i, (name, code) in enumerate(PARAMS)
}
_POINTER = struct.Struct("@P")
# The arrays of a call, in this order everywhere below, and where their pointers lie.
_ARRAYS = (
    *_TENSORS,
    *_STATISTICS,
    "dsinks",
    "dq_sum",
    "dq_turns",
    "tickets",
    "alibi_slopes",
    "sinks",
    "cu_seqlens_q",
    "cu_seqlens_k",
)
_DQ_SUM, _DQ_TURNS = _ARRAYS.index("dq_sum"), _ARRAYS.index("dq_turns")
_POINTERS = tuple(PARAMS_OFFSETS.get(name, PARAMS_OFFSETS.get(f"{name}.data", -1)) for name in _ARRAYS)


def empty(shape: tuple[int, ...], dtype: np.dtype, like: Any) -> Any:
    """How a result is allocated: from CuPy's pool, on the device of `like`."""
    cupy = toolchain.import_cupy()
    with _on_device(like):
        return cupy.empty(shape, dtype)


def forward(problem: Problem, q: Any, k: Any, v: Any, out: Any, lse: Any, extras: Extras) -> None:
    """Write out and lse; the arrays as for cuflash.numpy_backend.forward, on one GPU."""
    arrays = (q, k, v, out, None, None, None, None, lse, None, None, None, None, None, None, *extras)
    with _on_device(q):
        _run(problem, arrays, backward=False)


def backward(
    problem: Problem,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dsinks: Any,
    extras: Extras,
    *,
    accumulate: bool,
    lean: bool,
) -> None:
    """Write (or add) the gradients; the arrays as for cuflash.numpy_backend.backward, on one GPU.

    D and dsinks first, then dK and dV, then dQ. Only the sum of dQ of the Hopper kernel is atomic: where the Spec is
    deterministic, `lean` is asked for, or other kernels serve the call, the gradients are bitwise reproducible.
    """
    cupy = toolchain.import_cupy()
    with _on_device(q):
        rows = cupy.empty(lse.size + _TICKETS, np.float32)
        delta, tickets = cupy.ndarray(lse.shape, np.float32, rows.data), rows[lse.size :]
        arrays = (q, k, v, out, dout, dq, dk, dv, lse, dlse, delta, dsinks, None, None, tickets, *extras)
        workspace = _run(problem, arrays, backward=True, accumulate=accumulate, lean=lean)
        if cupy.cuda.get_current_stream().is_capturing():
            _CAPTURED.extend((rows, workspace))  # a graph goes on using them after this call


_CAPTURED: list[Any] = []  # workspace of calls inside captured graphs


# ---- what a call launches ----------------------------------------------------------------------------------------


class _Kernel(NamedTuple):
    """A loaded kernel and how it is launched."""

    function: Any
    tile: Tile
    shared_bytes: int


class _Launch(NamedTuple):
    """One launch of a prepared call: everything but the pointers."""

    kernel: _Kernel
    blocks: int
    params: bytes
    mapped: tuple[tuple[int, int], ...]  # the arrays that tensor maps describe, as indices, and the rows of their tiles
    maps: dict[tuple[int, ...], list[np.ndarray]]  # and the maps, by the arrays' pointers


class _Prepared(NamedTuple):
    """What a call launches, and the elements of 4 bytes of dq_sum and dq_turns that it needs."""

    launches: list[_Launch]
    sum_size: int
    turns_size: int


def _run(
    problem: Problem, arrays: tuple[Any, ...], *, backward: bool, accumulate: bool = False, lean: bool = False
) -> Any:
    """Launch a call; its workspace for dQ, or None."""
    pointers = [0 if array is None else array.data.ptr for array in arrays]
    together = 0
    for pointer in pointers[: len(_TENSORS)]:
        together |= pointer
    key = (
        problem,
        backward,
        accumulate,
        lean,
        arrays[0].data.device_id,
        together % 16 == 0,
        os.environ.get("CUFLASH_FORCE_ARCH"),
        tuple([None if array is None else (array.strides, array.dtype) for array in arrays]),
    )
    prepared = _PREPARED.get(key)
    if prepared is None:
        if len(_PREPARED) > 4096:
            _PREPARED.clear()
        prepared = _PREPARED[key] = _prepare(problem, arrays, backward, accumulate, lean, together % 16 == 0)
    workspace = None
    if prepared.sum_size:
        workspace = toolchain.import_cupy().empty(prepared.sum_size + prepared.turns_size, np.float32)
        workspace.data.memset_async(0, workspace.nbytes)
        pointers[_DQ_SUM] = workspace.data.ptr
        pointers[_DQ_TURNS] = workspace.data.ptr + 4 * prepared.sum_size
    for kernel, blocks, template, mapped, maps in prepared.launches:
        params = bytearray(template)
        for offset, pointer in zip(_POINTERS, pointers, strict=True):
            if pointer:
                _POINTER.pack_into(params, offset, pointer)
        arguments = [np.frombuffer(params, dtype=_PARAMS_DTYPE)]
        if mapped:
            place = tuple([pointers[index] for index, _ in mapped])
            found = maps.get(place)
            if found is None:
                if len(maps) > 256:
                    maps.clear()
                found = maps[place] = [tensor_map.tile_map(arrays[index], rows) for index, rows in mapped]
            arguments += found
        kernel.function((blocks, 1, 1), (32 * kernel.tile.warps, 1, 1), arguments, kernel.shared_bytes)
    return workspace


_PREPARED: dict[Any, _Prepared] = {}
_PARAMS_DTYPE = np.dtype(f"V{PARAMS_STRUCT.size}")  # CuPy passes an array of one element by value


def _prepare(
    problem: Problem, arrays: tuple[Any, ...], backward: bool, accumulate: bool, lean: bool, aligned: bool
) -> _Prepared:
    """The launches of a call, their kernels compiled (several at the same time) and loaded."""
    device = arrays[0].data.device_id
    target = toolchain.device_target(device)
    tuning.check_supported(problem.spec, target.path)
    if max(problem.q_len, problem.kv_len) > MAX_LENGTH:
        raise UnsupportedError(f"q, k: got lengths {problem.q_len} and {problem.kv_len}; the kernels go to 2^29 tokens")
    named: dict[str, Any] = dict(zip(_ARRAYS, arrays, strict=True))
    hopper = _takes_hopper(problem, target, named, backward)
    spec = replace(problem.spec, lean=lean, deterministic=problem.spec.deterministic and not lean)  # lean always is
    names = tuning.kernels_of(spec, backward=backward, hopper=hopper)
    vector = _vector(problem.spec, arrays[: len(_TENSORS)]) if aligned else _element_bytes(problem.spec)
    jobs = [(name, tuning.kernel_spec(name, spec), vector, target, device) for name in names]
    if len(jobs) == 1:
        kernels = [_kernel(*jobs[0])]
    else:
        with ThreadPoolExecutor(len(jobs)) as pool:
            kernels = list(pool.map(lambda job: _kernel(*job), jobs))
    # The tile whose rows divide the queries of dq_sum is that of the kernel that adds to it.
    rows = {name: kernel.tile.rows for name, kernel in zip(names, kernels, strict=True)}
    launches, sum_size, turns_size = [], 0, 0
    for name, kernel in zip(names, kernels, strict=True):
        logger.debug("%s %s for %s on device %d", name, kernel.tile, spec, device)
        q_tiles = _tiles(problem, problem.q_len, kernel.tile.rows)
        if name == "backward_finish":
            q_tiles = (
                _tiles(problem, problem.q_len, rows["backward_hopper"]) * rows["backward_hopper"] // kernel.tile.rows
            )
            pieces = problem.batch * problem.heads * q_tiles * -(-spec.head_dim // kernel.tile.cols)
            sum_size = pieces * kernel.tile.rows * kernel.tile.cols
            turns_size = pieces if spec.deterministic else 0
        blocks = _blocks(name, problem, kernel.tile, device, q_tiles)
        if blocks > _MAX_BLOCKS:
            raise UnsupportedError(f"q: got a problem of {blocks} tiles; the kernels go to 2^31 - 1: split the batch")
        if blocks:
            section_heads = _section_heads(name, problem, device, q_tiles)
            params = _params(problem, kernel.tile, named, q_tiles, section_heads, accumulate)
            mapped = tuple(
                (_ARRAYS.index(array), side if isinstance(side, int) else getattr(kernel.tile, side))
                for array, side in _MAPPED.get(name, ())
            )
            launches.append(_Launch(kernel, blocks, params, mapped, {}))
    return _Prepared(launches, sum_size, turns_size)


# The arrays that a kernel loads by tensor maps, in the order of its arguments, and the side of its tile they follow, or
# the rows of a copy.
_OPERANDS = (("q", "rows"), ("k", "cols"), ("v", "cols"))
_MAPPED: dict[str, tuple[tuple[str, str | int], ...]] = {
    "forward_hopper": (("q", 64), *_OPERANDS[1:]),
    "backward_hopper": (*_OPERANDS, ("dout", "rows")),
    "backward_hopper_wide": (*_OPERANDS, ("dout", "rows")),
    "backward_hopper_dq": (*_OPERANDS, ("dout", "rows")),
}


@lru_cache(maxsize=4096)
def _kernel(name: str, spec: Spec, vector: int, target: toolchain.Target, device: int) -> _Kernel:
    tile = tuning.tile_of(name, spec, target.path, vector, _shared_limit(device))
    shared_bytes = tuning.shared_bytes(name, spec, tile)
    cupy = toolchain.import_cupy()
    with cupy.cuda.Device(device):  # this may be a thread of its own
        function = jit.kernel(name, spec, tile, target)
        cupy.cuda.driver.funcSetAttribute(function.ptr, _SHARED_SIZE_ATTRIBUTE, shared_bytes)
    return _Kernel(function, tile, shared_bytes)


@lru_cache
def _shared_limit(device: int) -> int:
    """Shared memory that one thread block may have: a forced path must fit the GPU that is there."""
    return toolchain.import_cupy().cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]


@lru_cache
def _multiprocessors(device: int) -> int:
    return toolchain.import_cupy().cuda.Device(device).attributes["MultiProcessorCount"]


def _takes_hopper(problem: Problem, target: toolchain.Target, arrays: dict[str, Any], backward: bool) -> bool:
    """Whether a call gets the Hopper kernels: they need a positive scale and what tensor maps can express."""
    return (
        target == toolchain.Target.named("sm_90a")
        and tuning.has_hopper(problem.spec, backward=backward)
        and problem.scale > 0
        and all(
            arrays[name].size and tensor_map.expressible(arrays[name])
            for name in ("q", "k", "v", "dout" if backward else "out")
        )
    )


def _section_heads(name: str, problem: Problem, device: int, q_tiles: int) -> int:
    """How many heads' tiles are worked on together, so that what their blocks share stays in the L2 cache."""
    if name in ("forward_hopper", "backward_hopper_dq"):  # as many as fill the multiprocessors once
        return max(1, round(_multiprocessors(device) / q_tiles))
    if name in ("backward_hopper", "backward_hopper_wide"):  # Q and dO of a group's heads
        head_bytes = 2 * problem.q_len * (problem.spec.head_dim + problem.spec.head_dim_v) * problem.group
        return max(1, _SECTION_BYTES // head_bytes)
    return 1


def _element_bytes(spec: Spec) -> int:
    return 4 if spec.dtype == "float32" else 2


def _vector(spec: Spec, tensors: tuple[Any, ...]) -> int:
    """Bytes that one copy instruction can move: 16 where every row of every tensor is aligned, else an element's."""
    element_bytes = _element_bytes(spec)
    if spec.head_dim * element_bytes % 16 or spec.head_dim_v * element_bytes % 16:
        return element_bytes
    for tensor in tensors:
        if tensor is not None:
            for stride, length in zip(tensor.strides[:-1], tensor.shape[:-1], strict=True):
                if length > 1 and stride % 16:
                    return element_bytes
    return 16


# ---- grids and parameters ----------------------------------------------------------------------------------------


def _tiles(problem: Problem, length: int, rows: int) -> int:
    """Tiles of a head: exact when dense; packed, the bound of cuda_src/schedule.cuh with one range for rows outside."""
    return length // rows + problem.batch + 1 if problem.spec.packed else -(-length // rows)


def _blocks(name: str, problem: Problem, tile: Tile, device: int, q_tiles: int) -> int:
    """Thread blocks of a kernel's grid."""
    batch = 1 if problem.spec.packed else problem.batch  # packed sequences share one range of tiles
    heads = problem.heads * batch
    q_blocks = q_tiles * heads
    kv_blocks = _tiles(problem, problem.kv_len, tile.cols) * problem.kv_heads * batch
    uneven = problem.spec.bounded_left or problem.spec.bounded_right

    counts: dict[str, Callable[[], int]] = {
        "forward_portable": lambda: q_blocks,
        # Equal tiles, or equal pairs of tiles of which there are enough: each multiprocessor loops over its share. Few
        # or very long tiles under a mask: a block each, so that a multiprocessor that is done takes the next.
        "forward_hopper": lambda: (
            q_blocks
            if uneven and (q_tiles > _PAIRED_TILES or (q_tiles + 1) // 2 * heads <= 3 * _multiprocessors(device))
            else min(q_blocks, _multiprocessors(device))
        ),
        "backward_prepare": lambda: -(-problem.q_len * batch // tile.rows),
        "backward_sinks": lambda: problem.heads,
        "backward_portable_dkv": lambda: kv_blocks,
        "backward_portable_dq": lambda: q_blocks,
        "backward_hopper": lambda: min(kv_blocks, _multiprocessors(device)),
        "backward_hopper_wide": lambda: min(kv_blocks, _multiprocessors(device)),
        "backward_hopper_dq": lambda: q_blocks,
        "backward_finish": lambda: q_blocks * -(-problem.spec.head_dim // tile.cols),
    }
    return counts[name]()


def _params(
    problem: Problem, tile: Tile, arrays: dict[str, Any], q_tiles: int, section_heads: int, accumulate: bool
) -> bytes:
    """struct Params with null pointers."""
    mask = problem.mask
    left, right = (_UNBOUNDED if side is None else min(side, _UNBOUNDED) for side in (mask.left, mask.right))
    values: dict[str, Any] = dict.fromkeys((name for name, _ in PARAMS), 0)
    for name, fields in (
        *((name, ("batch_stride", "row_stride", "head_stride")) for name in _TENSORS),
        *((name, ("batch_stride", "head_stride")) for name in _STATISTICS),
    ):
        if arrays[name] is not None:  # packed arrays have no batch axis: its stride stays 0
            strides = _element_strides(arrays[name])[:-1]
            for field, stride in zip(fields[-len(strides) :], strides, strict=True):
                values[f"{name}.{field}"] = stride
    if arrays["alibi_slopes"] is not None:
        *batch_stride, values["alibi_head_stride"] = _element_strides(arrays["alibi_slopes"])
        values["alibi_batch_stride"] = batch_stride[0] if batch_stride else 0
    if arrays["sinks"] is not None:
        (values["sinks_stride"],) = _element_strides(arrays["sinks"])
    values |= {
        "seed": problem.seed,
        "batch": problem.batch,
        "heads": problem.heads,
        "group": problem.group,
        "q_len": problem.q_len,
        "kv_len": problem.kv_len,
        "q_tiles": q_tiles,
        "kv_tiles": _tiles(problem, problem.kv_len, tile.cols),
        "section_heads": section_heads,
        "left": left,
        "right": right,
        "dropout_threshold": dropout.threshold(problem.dropout_p),
        "dropout_scale": 1 / (1 - problem.dropout_p),
        "scale": problem.scale,
        "softcap": problem.softcap or 0.0,
        "cu_seqlens_int64": arrays["cu_seqlens_q"] is not None and arrays["cu_seqlens_q"].dtype == np.int64,
        "alibi_float32": _is_float32(arrays["alibi_slopes"]),
        "sinks_float32": _is_float32(arrays["sinks"]),
        "dq_float32": _is_float32(arrays["dq"]),
        "dk_float32": _is_float32(arrays["dk"]),
        "dv_float32": _is_float32(arrays["dv"]),
        "accumulate": bool(accumulate),
    }
    return PARAMS_STRUCT.pack(*values.values())


def _element_strides(array: Any) -> list[int]:
    return [stride // array.itemsize for stride in array.strides]


def _is_float32(array: Any) -> bool:
    return array is not None and array.dtype == np.float32


def _on_device(array: Any) -> Any:
    """The arrays' device as the current one, entered only where it is not."""
    current = toolchain.import_cupy().cuda.runtime.getDevice()
    return contextlib.nullcontext() if current == array.data.device_id else array.device
