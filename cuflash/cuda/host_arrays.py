"""NumPy arrays on the GPU, in chunks (cuflash.cuda.chunks): what is larger than the device's memory runs too.

The arrays of a chunk lie one after another in one block, on the device and, the same way, in pinned memory: NumPy's
memory is pageable, and copies from it would wait for the GPU. Two slots of such blocks, each with a stream of its own
for copy in, kernels and copy out, take turns: while a chunk computes, the host and the copy engines work on those
before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuflash import arrays, plans
from cuflash.arrays import Signature
from cuflash.cuda import launch, toolchain
from cuflash.cuda.chunks import Block, Call, Chunk, chunk_limit, size_of, usable_bytes
from cuflash.errors import UnsupportedError
from cuflash.plans import BackwardPlan, ForwardPlan

_OTHERS = ("dout", "out", "lse", "dlse")  # that a backward reads beside plans.INPUTS


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
    ways = plan.accumulate, "lean" if plan.lean else "fast", True

    def prepare(found: dict[str, Signature]) -> BackwardPlan:
        return plans.backward(*map(found.get, (*_OTHERS, "dq", "dk", "dv", *plans.INPUTS)), *ways, *options)

    targets = plans.targets(plan, given, arrays.empty)
    host = dict(zip((*_OTHERS, *plans.INPUTS), operands, strict=True))
    _run(call, host | dict(zip(plan.gradients, targets, strict=True)), prepare, seed)
    return targets


def _given(signatures: dict[str, Signature | None]) -> dict[str, Signature]:
    return {name: array for name, array in signatures.items() if array is not None}


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
    if cupy.cuda.runtime.streamIsCapturing(cupy.cuda.get_current_stream().ptr):
        raise UnsupportedError(
            "backend: got 'cuda' with NumPy arrays inside the capture of a CUDA graph, which cannot wait for results; "
            "allowed: CuPy arrays, or a call outside"
        )
    free = _free_bytes(cupy)
    chunks = call.chunks(limit, free)
    tasks: dict[tuple[int, int], _Task] = {}  # by size: there are two at most
    for chunk in chunks:
        if chunk.counts not in tasks:
            block = call.block(chunk, device)
            tasks[chunk.counts] = _Task(block, prepare(block.arrays).launches(True), seed)
    dsinks = host.get("dsinks")
    if dsinks is not None:
        host = {**host, "dsinks": np.zeros(dsinks.shape, np.float64)}
    if chunks:
        block_bytes = max(task.block.size for task in tasks.values())
        device_bytes = max(task.block.size + task.launches.workspace for task in tasks.values())
        count = max(1, min(2, len(chunks), usable_bytes(free) // device_bytes))
        slots = [_Slot(cupy, call, host, block_bytes, device_bytes) for _ in range(count)]
        # CuPy's pool hands out memory that work on the caller's stream may still use.
        reusable = cupy.cuda.Event(disable_timing=True)
        reusable.record()
        try:
            for slot in slots:
                slot.stream.wait_event(reusable)
            for i, chunk in enumerate(chunks):
                slots[i % count].collect()
                slots[i % count].start(chunk, tasks[chunk.counts])
            for i in range(count):
                slots[(len(chunks) + i) % count].collect()
        finally:  # the slots' memory goes back to CuPy's pools: no copy and no kernel may use it any more
            for slot in slots:
                slot.stream.synchronize()
    if dsinks is not None:
        with np.errstate(over="ignore", invalid="ignore"):  # infinity, as on the GPU
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
                with np.errstate(invalid="ignore"):
                    target += self._staged(block, name)
            else:
                np.copyto(target, self._staged(block, name))

    def _staged(self, block: Block, name: str) -> np.ndarray:
        """An array of a chunk in pinned memory."""
        array, first = block.arrays[name], block.offsets[name]
        part = self._bytes[first : first + size_of(array)]
        return part.view(arrays.dtype_of(array.dtype)).reshape(array.shape)


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
