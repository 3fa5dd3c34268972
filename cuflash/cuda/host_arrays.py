"""NumPy arrays on the GPU, in chunks of batch entries and heads: what is larger than the device's memory runs too.

Attention is a problem of its own for every batch entry and key/value head with its group of query heads, so a chunk is
the same call on slices of the arrays. The arrays of a chunk lie one after another in one block, on the device and, the
same way, in pinned memory: NumPy's memory is pageable, and copies from it would wait for the GPU. Two slots of such
blocks, each with a stream of its own for copy in, kernels and copy out, take turns: while a chunk computes, the host
and the copy engines work on those before and after it.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cuflash import arrays, plans
from cuflash.arrays import Signature
from cuflash.cuda import launch, toolchain
from cuflash.errors import UnsupportedError
from cuflash.plans import BackwardPlan, ForwardPlan
from cuflash.spec import Problem

LIMIT = "CUFLASH_HOST_CHUNK_MB"
_MIB = 2**20
_USUAL = 128 * _MIB  # of a chunk: enough work for a GPU, small enough for copies to overlap
_ALIGNMENT = 256  # of the arrays in a block
_OTHERS = ("dout", "out", "lse", "dlse")  # that a backward reads beside plans.INPUTS


class Chunk(NamedTuple):
    """A part of a call that is computed at once."""

    batch: slice  # all where sequences are packed
    kv_heads: slice  # with the query heads that share them


class Block(NamedTuple):
    """Where the arrays of a chunk lie: inputs, then results."""

    arrays: dict[str, Signature]  # by name, contiguous
    offsets: dict[str, int]  # in bytes
    results: int  # bytes before the first result
    size: int  # in bytes


@dataclass(frozen=True, kw_only=True)
class Call:
    """A validated call whose arrays are in the host's memory."""

    problem: Problem
    head_major: bool
    inputs: dict[str, Signature]  # by name; those that the call has
    results: dict[str, Signature]
    accumulate: bool = False
    lean: bool = False

    def index(self, name: str, chunk: Chunk) -> tuple[slice, ...]:
        """Where a chunk lies in an array of the call."""
        axes = [slice(None)] * len((self.inputs | self.results)[name].shape)
        if name in ("cu_seqlens_q", "cu_seqlens_k"):
            return tuple(axes)
        if name in launch.TENSORS:
            head_axis, own_axes = (-3 if self.head_major else -2), 3
        elif name in ("lse", "dlse"):
            head_axis, own_axes = -2, 2
        else:  # alibi_slopes, sinks, dsinks
            head_axis, own_axes = -1, 1
        heads, group = chunk.kv_heads, self.problem.group
        shared = name in ("k", "v", "dk", "dv")
        axes[head_axis] = heads if shared else slice(heads.start * group, heads.stop * group)
        if len(axes) > own_axes and not self.problem.spec.packed:
            axes[0] = chunk.batch
        return tuple(axes)

    def block(self, chunk: Chunk, device: int = 0) -> Block:
        """The block of a chunk on a device."""
        found: dict[str, Signature] = {}
        offsets, results, end = {}, 0, 0
        for name, array in (self.inputs | self.results).items():
            if name in self.results and not offsets.keys() & self.results.keys():
                results = end
            index = self.index(name, chunk)
            shape = tuple(len(range(n)[part]) for n, part in zip(array.shape, index, strict=True))
            # Sums over the batch are rounded once, at the end.
            dtype = "float32" if name in ("sinks", "dsinks") else array.dtype
            found[name] = plans.contiguous(Signature(shape, (), dtype, f"cuda:{device}", True))
            offsets[name] = end
            end += -(-_bytes(found[name]) // _ALIGNMENT) * _ALIGNMENT
        return Block(found, offsets, results, max(end, _ALIGNMENT))

    def device_bytes(self, batch: int, kv_heads: int) -> int:
        """The most device memory that a chunk of this size takes: its block and the kernels' workspace."""
        sizes = {"batch": batch, "heads": kv_heads * self.problem.group, "kv_heads": kv_heads}
        workspace = (
            launch.workspace_bound(replace(self.problem, **sizes), lean=self.lean) if "dq" in self.results else 0
        )
        return self.block(Chunk(slice(0, batch), slice(0, kv_heads))).size + workspace

    def chunks(self, limit: int | None, free: int) -> list[Chunk]:
        """Chunks of at most `limit` bytes on a device with `free` bytes, the first one the largest.

        Whole batch entries as far as they go, because they are contiguous, else heads of one. None is the usual limit,
        which one batch entry with one key/value head may exceed. Raises UnsupportedError where that does not fit, and
        for dropout, whose mask depends on the place in the whole call, where that is more than one chunk.
        """
        problem = self.problem
        packed = problem.spec.packed
        if problem.batch == 0 and not packed:
            return []
        entries = problem.batch if packed else 1  # packed sequences are not taken apart
        usable = _usable(free)
        if problem.spec.dropout:
            whole = self.device_bytes(problem.batch, problem.kv_heads)
            if whole > min(usable, usable if limit is None else limit):
                raise UnsupportedError(
                    f"dropout_p: got {problem.dropout_p} with NumPy arrays on a GPU, which then must be one chunk: of "
                    f"{_mib(whole)}, where {_allowed(limit, usable)}; allowed: a batch in that memory, backend='numpy' "
                    "or dropout_p=0"
                )
            return [Chunk(slice(0, problem.batch), slice(0, problem.kv_heads))]
        smallest = self.device_bytes(entries, 1)
        most = min(max(_USUAL, smallest) if limit is None else limit, max(usable // 2, smallest))
        if smallest > min(most, usable):
            lengths = f"{problem.group} query heads of {problem.q_len} and {problem.kv_len} tokens"
            raise UnsupportedError(
                f"q, k: got {lengths} for one key/value head, which take {_mib(smallest)} on the GPU, where "
                f"{_allowed(limit, usable)}; allowed: shorter ones, memory='lean' in the backward, or backend='numpy'"
            )
        all_heads = slice(0, problem.kv_heads)
        if packed or self.device_bytes(1, problem.kv_heads) > most:
            count = _largest(problem.kv_heads, most, lambda n: self.device_bytes(entries, n))
            batches = [slice(0, problem.batch)] if packed else _parts(problem.batch, 1)
            return [Chunk(batch, heads) for batch in batches for heads in _parts(problem.kv_heads, count)]
        count = _largest(problem.batch, most, lambda n: self.device_bytes(n, problem.kv_heads))
        return [Chunk(batch, all_heads) for batch in _parts(problem.batch, count)]


def chunk_limit() -> int | None:
    """CUFLASH_HOST_CHUNK_MB in bytes, or None where it is not set; a ValueError for anything but a positive number."""
    text = os.environ.get(LIMIT)
    if not text:
        return None
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = math.nan
    if not (math.isfinite(megabytes) and megabytes > 0):
        raise ValueError(f"{LIMIT}: got {text!r}; allowed: a positive number of MiB")
    return int(megabytes * _MIB)


# ---- the two directions ------------------------------------------------------------------------------------------


def forward(
    plan: ForwardPlan, inputs: Sequence[Any], options: Sequence[Any], seed: int, with_lse: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """(out, lse or None), new arrays; `inputs` as in plans.INPUTS, `options` as plans.forward takes them."""
    call = Call(
        problem=plan.problem,
        head_major=plan.head_major,
        inputs=_given(plan.inputs),
        results={"out": plan.out, "lse": plan.lse} if with_lse else {"out": plan.out},
    )

    def prepare(found: dict[str, Signature]) -> ForwardPlan:
        return plans.forward(*map(found.get, plans.INPUTS), *options)

    results = {name: arrays.empty(like) for name, like in call.results.items()}
    _run(call, dict(zip(plans.INPUTS, inputs, strict=True)) | results, prepare, seed)
    return results["out"], results.get("lse")


def backward(
    plan: BackwardPlan, operands: Sequence[Any], given: Sequence[Any], options: Sequence[Any], seed: int
) -> list[np.ndarray]:
    """dq, dk, dv and, with sinks, dsinks: those of the first three that are given, and new arrays; `operands` are dout,
    out, lse, dlse and the inputs, `options` as plans.forward takes them."""
    call = Call(
        problem=plan.problem,
        head_major=plan.head_major,
        inputs=_given(plan.others | plan.forward.inputs),
        results=plan.gradients,
        accumulate=plan.accumulate,
        lean=plan.lean,
    )
    ways = plan.accumulate, "lean" if plan.lean else "fast"

    def prepare(found: dict[str, Signature]) -> BackwardPlan:
        return plans.backward(*map(found.get, (*_OTHERS, "dq", "dk", "dv", *plans.INPUTS)), *ways, *options)

    targets = plans.targets(plan, given, arrays.empty)
    host = dict(zip((*_OTHERS, *plans.INPUTS), operands, strict=True))
    _run(call, host | dict(zip(plan.gradients, targets, strict=True)), prepare, seed)
    return targets


# ---- on the device -----------------------------------------------------------------------------------------------


def _run(
    call: Call,
    host: dict[str, Any],
    prepare: Callable[[dict[str, Signature]], ForwardPlan | BackwardPlan],
    seed: int,
) -> None:
    """Compute all chunks; `prepare` gives the plan of one, of the signatures of its arrays on the device."""
    limit = chunk_limit()
    device = _current_device()
    cupy = toolchain.import_cupy()
    free = _free_bytes(cupy)
    chunks = call.chunks(limit, free)
    tasks: dict[tuple[int, int], _Task] = {}  # by size: there are two at most
    for chunk in chunks:
        if _size(chunk) not in tasks:
            block = call.block(chunk, device)
            tasks[_size(chunk)] = _Task(block, prepare(block.arrays).launches(True), seed)
    dsinks = host.get("dsinks")
    if dsinks is not None:
        host = {**host, "dsinks": np.zeros(dsinks.shape, np.float64)}
    if chunks:
        block_bytes = max(task.block.size for task in tasks.values())
        device_bytes = max(task.block.size + task.launches.workspace for task in tasks.values())
        count = max(1, min(2, len(chunks), _usable(free) // device_bytes))
        slots = [_Slot(cupy, call, host, block_bytes, device_bytes) for _ in range(count)]
        # CuPy's pool hands out memory that work on the caller's stream may still use.
        reusable = cupy.cuda.Event(disable_timing=True)
        reusable.record()
        try:
            for slot in slots:
                slot.stream.wait_event(reusable)
            for i, chunk in enumerate(chunks):
                slots[i % count].collect()
                slots[i % count].start(chunk, tasks[_size(chunk)])
            for i in range(count):
                slots[(len(chunks) + i) % count].collect()
        finally:  # the slots' memory goes back to CuPy's pools: no copy and no kernel may use it any more
            for slot in slots:
                slot.stream.synchronize()
    if dsinks is not None:
        dsinks[...] = host["dsinks"]


class _Task(NamedTuple):
    """What computes chunks of one size."""

    block: Block
    launches: launch.Plan
    seed: int


class _Slot:
    """Memory for one chunk at a time, on the device and pinned, and the stream that all its work is on, in order.

    The host touches the pinned memory while nothing is on the stream: from `collect`, which waits for it, to `start`.
    """

    def __init__(self, cupy: Any, call: Call, host: dict[str, Any], block_bytes: int, device_bytes: int) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._runtime = cupy.cuda.runtime
        self._device = cupy.cuda.alloc(device_bytes)
        self._pinned = cupy.cuda.alloc_pinned_memory(block_bytes)
        self._bytes = np.frombuffer(self._pinned, np.uint8, block_bytes)
        self._call = call
        self._host = host
        self._under_way: tuple[Chunk, Block] | None = None

    def start(self, chunk: Chunk, task: _Task) -> None:
        """Copy a chunk in, compute it and copy its results out, once the slot has been collected."""
        call, block = self._call, task.block
        for name in (call.inputs | call.results) if call.accumulate else call.inputs:
            if name != "dsinks":  # these alone are never added to on the device
                np.copyto(self._staged(block, name), self._host[name][call.index(name, chunk)], casting="same_kind")
        device, pinned, stream = self._device.ptr, self._pinned.ptr, self.stream.ptr
        read = block.size if call.accumulate else block.results
        self._under_way = chunk, block
        self._runtime.memcpyAsync(device, pinned, read, self._runtime.memcpyHostToDevice, stream)
        pointers = [device + block.offsets[name] if name in block.offsets else 0 for name in launch.OPERANDS]
        task.launches.run(stream, tuple(pointers), device + block.size, task.seed)
        first, written = block.results, block.size - block.results
        self._runtime.memcpyAsync(pinned + first, device + first, written, self._runtime.memcpyDeviceToHost, stream)

    def collect(self) -> None:
        """Wait for the chunk that is under way, if any, and put its results where they belong."""
        if self._under_way is None:
            return
        chunk, block = self._under_way
        self._under_way = None
        self.stream.synchronize()
        for name in self._call.results:
            target = self._host[name][self._call.index(name, chunk)]
            if name == "dsinks":  # of the chunk's batch entries
                target += self._staged(block, name)
            else:
                np.copyto(target, self._staged(block, name))

    def _staged(self, block: Block, name: str) -> np.ndarray:
        """An array of a chunk in pinned memory."""
        array, first = block.arrays[name], block.offsets[name]
        part = self._bytes[first : first + _bytes(array)]
        return part.view(arrays.dtype_of(array.dtype)).reshape(array.shape)


# ---- sizes -------------------------------------------------------------------------------------------------------


def _current_device() -> int:
    try:
        return toolchain.current_device()
    except UnsupportedError as error:
        raise UnsupportedError(f"backend: got 'cuda' with NumPy arrays, but {error}") from error


def _free_bytes(cupy: Any) -> int:
    """Memory of the current device that CuPy's pool can still give."""
    pool = cupy.get_default_memory_pool()
    free = cupy.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
    limit = pool.get_limit()  # 0 is none
    return min(free, limit - pool.used_bytes()) if limit else free


def _usable(free: int) -> int:
    """The part of the free memory that a call takes: pools have gaps, and kernels need some to be loaded."""
    return free // 10 * 9


def _given(signatures: dict[str, Signature | None]) -> dict[str, Signature]:
    return {name: array for name, array in signatures.items() if array is not None}


def _bytes(array: Signature) -> int:
    return math.prod(array.shape) * arrays.dtype_of(array.dtype).itemsize


def _size(chunk: Chunk) -> tuple[int, int]:
    return chunk.batch.stop - chunk.batch.start, chunk.kv_heads.stop - chunk.kv_heads.start


def _largest(count: int, most: int, size: Callable[[int], int]) -> int:
    """The largest n of 1 to `count` with size(n) <= most, where size(1) is and size grows."""
    return bisect_right(range(1, count + 1), most, key=size)


def _parts(count: int, most: int) -> list[slice]:
    """`count` in as few parts of at most `most` as it takes, of about the same size, the first the largest."""
    parts = -(-count // most)
    step = -(-count // parts)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _mib(size: int) -> str:
    return f"{size / _MIB:.4g} MiB"


def _allowed(limit: int | None, usable: int) -> str:
    """What a chunk may take, for an error message."""
    if limit is not None and limit <= usable:
        return f"{LIMIT} allows {_mib(limit)}"
    return f"{_mib(usable)} of the GPU's memory are free for it (and {LIMIT} sets the most of a chunk)"
