"""Launches of the portable kernels on CuPy arrays: parameters, grids, workspace.

Everything runs on the current stream of the arrays' device, without a synchronisation; the workspace, one float32 a
query row in the backward, comes from CuPy's pool. A kernel is compiled at its first use (cuflash.cuda.jit).
"""

from __future__ import annotations

import contextlib
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuflash import dropout, tuning
from cuflash.cuda import jit, tensor_map, toolchain
from cuflash.errors import UnsupportedError
from cuflash.spec import Extras, Problem, Spec, Tile

_UNBOUNDED = 2**30  # a mask's bound beyond every position
_MAX_LENGTH = 2**30
_SHARED_SIZE_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

# struct Params of cuda_src/params.cuh, field by field, with native alignment.
_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_STATISTICS = ("lse", "dlse", "delta")
_PARAMS = struct.Struct(
    "@" + "Pqqq" * len(_TENSORS) + "Pqq" * len(_STATISTICS) + "PqqPqPPP" + "Q" + "9i" + "I" + "3f" + "7i"
)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """How a result is allocated: from CuPy's pool."""
    return toolchain.import_cupy().empty(shape, dtype)


class _Kernel(NamedTuple):
    """A loaded kernel and how it is launched."""

    function: Any
    tile: Tile
    shared_bytes: int


def forward(problem: Problem, q: Any, k: Any, v: Any, out: Any, lse: Any, extras: Extras) -> None:
    """Write out and lse; the arrays as for cuflash.numpy_backend.forward, on one GPU."""
    tensors = {"q": q, "k": k, "v": v, "out": out}
    with _on_device(q):
        if _takes_hopper(problem, tensors):
            _forward_hopper(problem, tensors, lse, extras)
            return
        (kernel,) = _kernels(tuning.kernels_of(problem.spec, backward=False), problem, tensors)
        params = _params(problem, kernel.tile, tensors, {"lse": lse}, extras)
        _launch(kernel, _q_tiles(problem, kernel.tile) * problem.heads * _grid_batch(problem), params)


def _takes_hopper(problem: Problem, tensors: dict[str, Any]) -> bool:
    """Whether a forward gets the Hopper kernel: its maximum needs a positive scale, its copies aligned rows."""
    return (
        tuning.has_hopper_forward(problem.spec, toolchain.device_target(tensors["q"].device.id).path)
        and problem.scale > 0
        and all(tensor.size and tensor_map.expressible(tensor) for tensor in tensors.values())
    )


def _forward_hopper(problem: Problem, tensors: dict[str, Any], lse: Any, extras: Extras) -> None:
    device = tensors["q"].device.id
    spec = tuning.kernel_spec("forward_hopper", problem.spec)
    kernel = _kernel("forward_hopper", spec, 16, toolchain.device_target(device), device)
    params = _params(problem, kernel.tile, tensors, {"lse": lse}, extras)
    rows = {"q": kernel.tile.rows, "k": kernel.tile.cols, "v": kernel.tile.cols}
    maps = [tensor_map.tile_map(tensors[name], count) for name, count in rows.items()]
    blocks = _q_tiles(problem, kernel.tile) * problem.heads * problem.batch
    # Equal tiles: each multiprocessor loops over its share. Unequal ones: a block each, the longest first, so that a
    # multiprocessor that is done takes the next.
    uneven = spec.bounded_left or spec.bounded_right
    _launch(kernel, blocks if uneven else min(blocks, _multiprocessors(device)), params, *maps)


@lru_cache
def _multiprocessors(device: int) -> int:
    return toolchain.import_cupy().cuda.Device(device).attributes["MultiProcessorCount"]


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
) -> None:
    """Write (or add) the gradients; the arrays as for cuflash.numpy_backend.backward, on one GPU.

    D and dsinks first, then dK and dV, then dQ. Nothing is atomic: the gradients are bitwise reproducible.
    """
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    statistics = {"lse": lse, "dlse": dlse}
    with _on_device(q):
        statistics["delta"] = empty(lse.shape, lse.dtype)
        blocks = {
            "backward_prepare": lambda tile: -(-problem.q_len * problem.heads * _grid_batch(problem) // tile.warps),
            "backward_sinks": lambda tile: problem.heads,
            "backward_portable_dkv": lambda tile: _kv_tiles(problem, tile) * problem.kv_heads * _grid_batch(problem),
            "backward_portable_dq": lambda tile: _q_tiles(problem, tile) * problem.heads * _grid_batch(problem),
        }
        names = tuning.kernels_of(problem.spec, backward=True)
        for name, kernel in zip(names, _kernels(names, problem, tensors), strict=True):
            params = _params(problem, kernel.tile, tensors, statistics, extras, dsinks, accumulate)
            _launch(kernel, blocks[name](kernel.tile), params)


# ---- kernels -----------------------------------------------------------------------------------------------------


def _kernels(names: tuple[str, ...], problem: Problem, tensors: dict[str, Any]) -> list[_Kernel]:
    """The loaded kernels of a call; those not yet compiled are compiled at the same time."""
    device = next(iter(tensors.values())).device.id
    target = toolchain.device_target(device)
    vector = _vector(problem.spec, tensors.values())
    jobs = [(name, tuning.kernel_spec(name, problem.spec), vector, target, device) for name in names]
    if len(jobs) > 1 and not all(job in _LOADED for job in jobs):
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(lambda job: _kernel(*job), jobs))
    return [_kernel(*job) for job in jobs]


_LOADED: set[tuple[str, Spec, int, toolchain.Target, int]] = set()


@lru_cache(maxsize=4096)
def _kernel(name: str, spec: Spec, vector: int, target: toolchain.Target, device: int) -> _Kernel:
    tuning.check_supported(spec, target.path)
    if name == "forward_hopper":
        tile = tuning.hopper_tile(spec)
    else:
        tile = tuning.portable_tile(name, spec, target.path, vector)
    shared_bytes = tuning.shared_bytes(name, spec, tile)
    cupy = toolchain.import_cupy()
    with cupy.cuda.Device(device):  # this may be a thread of its own
        function = jit.kernel(name, spec, tile, target)
        cupy.cuda.driver.funcSetAttribute(function.ptr, _SHARED_SIZE_ATTRIBUTE, shared_bytes)
    _LOADED.add((name, spec, vector, target, device))
    return _Kernel(function, tile, shared_bytes)


def _vector(spec: Spec, tensors: Any) -> int:
    """Bytes that one copy instruction can move: 16 where every row of every tensor is aligned, else an element's."""
    element_bytes = 4 if spec.dtype == "float32" else 2
    if spec.head_dim * element_bytes % 16 or spec.head_dim_v * element_bytes % 16:
        return element_bytes
    for tensor in tensors:
        if tensor.size and tensor.data.ptr % 16:
            return element_bytes
        for stride, length in zip(tensor.strides[:-1], tensor.shape[:-1], strict=True):
            if length > 1 and stride % 16:
                return element_bytes
    return 16


# ---- grids and parameters ----------------------------------------------------------------------------------------


def _grid_batch(problem: Problem) -> int:
    """Sequences that the grid counts; packed ones share one range of tiles."""
    return 1 if problem.spec.packed else problem.batch


def _tiles(problem: Problem, length: int, rows: int) -> int:
    """Tiles of a head: exact when dense; packed, the bound of cuda_src/schedule.cuh with one range for rows outside."""
    return length // rows + problem.batch + 1 if problem.spec.packed else -(-length // rows)


def _q_tiles(problem: Problem, tile: Tile) -> int:
    return _tiles(problem, problem.q_len, tile.rows)


def _kv_tiles(problem: Problem, tile: Tile) -> int:
    return _tiles(problem, problem.kv_len, tile.cols)


def _launch(kernel: _Kernel, blocks: int, *arguments: np.ndarray) -> None:
    if blocks:
        kernel.function((blocks, 1, 1), (32 * kernel.tile.warps, 1, 1), arguments, kernel.shared_bytes)


def _params(
    problem: Problem,
    tile: Tile,
    tensors: dict[str, Any],
    statistics: dict[str, Any],
    extras: Extras,
    dsinks: Any = None,
    accumulate: bool = False,
) -> np.ndarray:
    """struct Params as a NumPy array of one element, which CuPy passes by value."""
    if max(problem.q_len, problem.kv_len) > _MAX_LENGTH:
        raise UnsupportedError(f"q, k: got lengths {problem.q_len} and {problem.kv_len}; the kernels go to 2^30 tokens")
    values: list[Any] = []
    for name in _TENSORS:
        values += _strided(tensors.get(name), 3)
    for name in _STATISTICS:
        values += _strided(statistics.get(name), 2)
    alibi, sinks, cu_seqlens_q, cu_seqlens_k = extras
    alibi_strides = [0, 0] if alibi is None else [0, *_element_strides(alibi)][-2:]
    values += [_pointer(alibi), *alibi_strides]
    values += [_pointer(sinks), 0 if sinks is None else _element_strides(sinks)[0], _pointer(dsinks)]
    values += [_pointer(cu_seqlens_q), _pointer(cu_seqlens_k), problem.seed]
    values += [problem.batch, problem.heads, problem.group, problem.q_len, problem.kv_len]
    values += [_q_tiles(problem, tile), _kv_tiles(problem, tile)]
    mask = problem.mask
    values += [_UNBOUNDED if side is None else min(side, _UNBOUNDED) for side in (mask.left, mask.right)]
    values += [dropout.threshold(problem.dropout_p), 1 / (1 - problem.dropout_p), problem.scale, problem.softcap or 0.0]
    values += [cu_seqlens_q is not None and cu_seqlens_q.dtype == np.int64]
    values += [_is_float32(alibi), _is_float32(sinks)]
    values += [_is_float32(tensors.get(name)) for name in ("dq", "dk", "dv")]
    values += [accumulate]
    return np.frombuffer(_PARAMS.pack(*values), dtype=f"V{_PARAMS.size}")


def _strided(array: Any, axes: int) -> list[int]:
    """Pointer and element strides of the leading axes, the batch's 0 where packed arrays have none; zeros for None."""
    if array is None:
        return [0] * (axes + 1)
    strides = _element_strides(array)[:-1]
    return [_pointer(array), *[0] * (axes - len(strides)), *strides]


def _element_strides(array: Any) -> list[int]:
    return [stride // array.itemsize for stride in array.strides]


def _pointer(array: Any) -> int:
    return 0 if array is None else array.data.ptr


def _is_float32(array: Any) -> bool:
    return array is not None and array.dtype == np.float32


def _on_device(array: Any) -> Any:
    """The arrays' device as the current one, entered only where it is not."""
    current = toolchain.import_cupy().cuda.runtime.getDevice()
    return contextlib.nullcontext() if current == array.device.id else array.device
