"""NumPy arrays on the GPU without a GPU: how calls are cut into chunks, and the streaming on a stand-in for the device.

The stand-in has memory of its own, fills what it hands out with NaN, and does what is put on its streams either at once
or as late as it may, which is when the host waits. Its kernels are the NumPy backend on the memory at the pointers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import arrays, numpy_backend, plans, tuning
from cuflash.cuda import chunks, launch, toolchain
from cuflash.cuda.chunks import Call, Chunk
from cuflash.cuda.toolchain import Target
from cuflash.spec import Extras
from tests.contract.backends import in_smallest_chunks
from tests.contract.cases import CASES, Case, make_inputs

MIB = 2**20
BIG = 2**40  # bytes free, as good as any number


# ---- chunks ------------------------------------------------------------------------------------------------------


def call_of(
    *,
    batch: int = 4,
    length: int = 1024,
    heads: int = 8,
    kv_heads: int = 8,
    dim: int = 64,
    dtype: str = "float16",
    layout: str = "bshd",
    packed: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    dropout_p: float = 0.0,
    backward: bool = False,
    lean: bool = False,
) -> Call:
    def signature(*shape: int, dtype: str = dtype) -> arrays.Signature:
        return plans.contiguous(arrays.Signature(shape, (), dtype, "cpu", True))

    def tensor(count: int) -> arrays.Signature:
        axes = (count, length, dim) if layout == "bhsd" else (length, count, dim)
        return signature(*axes) if packed else signature(batch, *axes)

    boundaries = signature(batch + 1, dtype="int32") if packed else None
    extras = signature(batch, heads) if alibi else None, signature(heads) if sinks else None, boundaries, boundaries
    options = (False, None, None, None, dropout_p, True, False, False, layout, "cuda")
    plan = plans.forward(tensor(heads), tensor(kv_heads), tensor(kv_heads), *extras, None, None, *options)
    inputs = {name: array for name, array in plan.inputs.items() if array is not None}
    results = {"out": plan.out, "lse": plan.lse}
    if backward:
        inputs = {"dout": plan.out, **results, **inputs}
        results = {"dq": inputs["q"], "dk": inputs["k"], "dv": inputs["v"]}
    return Call(problem=plan.problem, head_major=plan.head_major, inputs=inputs, results=results, lean=lean)


def ranges(call: Call, limit: int | None = None, free: int = BIG) -> list[tuple[range, range]]:
    """What chunks cover: batch entries and key/value heads."""
    problem = call.problem
    return [
        (range(problem.batch)[chunk.batch], range(problem.kv_heads)[chunk.kv_heads])
        for chunk in call.chunks(limit, free)
    ]


ENTRY = 8 * 1024 * (4 * 64 * 2 + 4)  # bytes of one batch entry of `call_of()`: q, k, v, out and lse


def test_a_small_call_is_one_chunk() -> None:
    assert ranges(call_of()) == [(range(4), range(8))]


def test_batch_entries_are_kept_whole_where_they_fit() -> None:
    assert ranges(call_of(), ENTRY) == [(range(i, i + 1), range(8)) for i in range(4)]
    assert ranges(call_of(), 2 * ENTRY) == [(range(2), range(8)), (range(2, 4), range(8))]
    assert ranges(call_of(batch=5), 4 * ENTRY) == [(range(3), range(8)), (range(3, 5), range(8))]


def test_heads_are_split_where_a_batch_entry_does_not_fit() -> None:
    assert ranges(call_of(batch=2), ENTRY - 1) == [
        (range(1), range(4)),
        (range(1), range(4, 8)),
        (range(1, 2), range(4)),
        (range(1, 2), range(4, 8)),
    ]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 12, 3), (3, 8, 8), (7, 6, 1), (2, 30, 10)])
@pytest.mark.parametrize("parts", [1, 2, 3, 10])
def test_chunks_cover_the_call_once_and_fit(
    layout: str, backward: bool, packed: bool, batch: int, heads: int, kv_heads: int, parts: int
) -> None:
    call = call_of(
        batch=batch, heads=heads, kv_heads=kv_heads, layout=layout, packed=packed, backward=backward, sinks=True
    )
    whole = call.device_bytes(batch, kv_heads)
    limit = max(whole // parts, call.device_bytes(batch if packed else 1, 1))
    parts_found = call.chunks(limit, BIG)
    seen = np.zeros((batch, kv_heads), int)
    for chunk in parts_found:
        seen[chunk.batch, chunk.kv_heads] += 1
        assert call.device_bytes(*chunk.counts) <= limit
        assert not packed or chunk.counts[0] == batch
    assert (seen == 1).all()
    sizes = [call.block(chunk).size for chunk in parts_found]
    assert sizes[0] == max(sizes), "memory for the first is memory for all"


def test_a_group_of_query_heads_stays_together() -> None:
    call = call_of(heads=12, kv_heads=3, layout="bhsd", alibi=True, sinks=True)
    chunk = Chunk(slice(1, 2), slice(1, 3))
    assert call.index("q", chunk) == (slice(1, 2), slice(4, 12), slice(None), slice(None))
    assert call.index("k", chunk) == (slice(1, 2), slice(1, 3), slice(None), slice(None))
    assert call.index("lse", chunk) == (slice(1, 2), slice(4, 12), slice(None))
    assert call.index("alibi_slopes", chunk) == (slice(1, 2), slice(4, 12))
    assert call.index("sinks", chunk) == (slice(4, 12),)


def test_packed_sequences_are_cut_by_heads_alone() -> None:
    call = call_of(packed=True, alibi=True)
    chunk = Chunk(slice(0, 4), slice(1, 3))
    assert call.index("q", chunk) == (slice(None), slice(1, 3), slice(None))
    assert call.index("lse", chunk) == (slice(1, 3), slice(None))
    assert call.index("alibi_slopes", chunk) == (slice(None), slice(1, 3))
    assert call.index("cu_seqlens_q", chunk) == (slice(None),)


def test_arrays_of_a_block_do_not_overlap() -> None:
    call = call_of(batch=3, length=7, heads=6, kv_heads=3, dim=5, sinks=True, alibi=True, backward=True)
    block = call.block(Chunk(slice(0, 2), slice(0, 1)), 3)
    names = [*call.inputs, *call.results]
    assert list(block.arrays) == names
    assert block.arrays["q"].shape == (2, 7, 2, 5)
    assert {array.device for array in block.arrays.values()} == {"cuda:3"}
    ends = [block.offsets[name] + chunks.size_of(block.arrays[name]) for name in names]
    starts = [*block.offsets.values(), block.size]
    assert all(start % 256 == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=True))
    assert block.results == block.offsets["dq"]


def test_the_device_holds_two_chunks_or_one_that_is_too_large_for_that() -> None:
    assert [len(heads) for _, heads in ranges(call_of(batch=1), free=ENTRY)] == [3, 3, 2]  # 0.45 of its 8 heads
    call = call_of(batch=2, kv_heads=1)
    smallest = call.device_bytes(1, 1)
    assert len(ranges(call, free=smallest * 3 // 2)) == 2
    with pytest.raises(cuflash.UnsupportedError, match=r"q, k: got 8 query heads .* of the GPU's memory are free"):
        ranges(call, free=smallest)


def test_one_head_may_exceed_the_usual_limit_but_not_a_given_one() -> None:
    call = call_of(batch=1, length=2**20, heads=2, kv_heads=2)
    assert len(ranges(call)) == 2
    with pytest.raises(
        cuflash.UnsupportedError,
        match=r"got 1 query heads of 1048576 and 1048576 tokens .* take 516 MiB .* CUFLASH_HOST_CHUNK_MB allows 64 MiB",
    ):
        ranges(call, 64 * MIB)


def test_dropout_is_one_chunk_or_refused() -> None:
    call = call_of(dropout_p=0.1)
    whole = call.device_bytes(4, 8)
    assert ranges(call) == ranges(call, free=2 * whole) == ranges(call, whole) == [(range(4), range(8))]
    with pytest.raises(cuflash.UnsupportedError, match=r"dropout_p: got 0\.1 .* CUFLASH_HOST_CHUNK_MB allows"):
        ranges(call, whole - 1)
    with pytest.raises(cuflash.UnsupportedError, match=r"dropout_p: got 0\.1 .* are free"):
        ranges(call, free=whole)


def test_an_empty_batch_has_no_chunks() -> None:
    assert ranges(call_of(batch=0)) == []
    assert ranges(call_of(batch=0, packed=True)) == [(range(0), range(8))]


def test_workspace_is_counted() -> None:
    fast, lean, forward = call_of(backward=True), call_of(backward=True, lean=True), call_of()
    whole = Chunk(slice(0, 4), slice(0, 8))
    rows = 4 * 8 * 1024
    assert forward.device_bytes(4, 8) == forward.block(whole).size
    assert lean.device_bytes(4, 8) == lean.block(whole).size + 4 * rows + 256
    assert fast.device_bytes(4, 8) == fast.block(whole).size + 4 * rows + 256 + 4 * rows * 64


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_a_wrong_limit_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", text)
    q = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match=rf"CUFLASH_HOST_CHUNK_MB: got '{text}'; allowed: a positive number"):
        cuflash.flash_attention(q, q, q, backend="cuda")


def test_the_limit_is_in_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", "0.5")
    assert chunks.chunk_limit() == MIB // 2
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", "")
    assert chunks.chunk_limit() is None


def test_a_machine_without_a_gpu_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDARuntimeError(Exception):
        pass

    def no_device() -> int:
        raise CUDARuntimeError("no CUDA-capable device is detected")

    runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDevice=no_device)
    monkeypatch.setattr(toolchain, "import_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    q = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(cuflash.UnsupportedError, match=r"backend: got 'cuda' .* no CUDA-capable device .* NVIDIA GPU"):
        cuflash.flash_attention(q, q, q, backend="cuda")


# ---- streaming ---------------------------------------------------------------------------------------------------


class _Memory:
    """Memory of the device, NaN in every dtype."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.ptr = self.bytes.ctypes.data


class _Device:
    """The part of CuPy that cuflash.cuda.host_arrays uses."""

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self.order: list[tuple[str, int]] = []  # what was done, by stream
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self.allocated: list[_Memory] = []
        self.pool = SimpleNamespace(free_bytes=lambda: 0, used_bytes=lambda: 0, get_limit=lambda: 0)
        device = self

        class Stream:
            def __init__(self, *, non_blocking: bool) -> None:
                assert non_blocking
                self.ptr = 1 + len(device.queues)
                device.queues[self.ptr] = []
                self.waited = False

            def wait_event(self, event: Any) -> None:
                assert event.recorded
                self.waited = True

            def synchronize(self) -> None:
                queue = device.queues[self.ptr]
                while queue:
                    queue.pop(0)()

        class Event:
            recorded = False

            def __init__(self, *, disable_timing: bool) -> None: ...

            def record(self) -> None:
                self.recorded = True

        runtime = SimpleNamespace(
            CUDARuntimeError=RuntimeError,
            getDevice=lambda: 0,
            memGetInfo=lambda: (BIG, BIG),
            streamIsCapturing=lambda stream: False,
            memcpyAsync=self._copy,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Stream=Stream,
            Event=Event,
            get_current_stream=lambda: SimpleNamespace(ptr=0),
            alloc=self._alloc,
            alloc_pinned_memory=self._pinned,
        )

    def get_default_memory_pool(self) -> Any:
        return self.pool

    def enqueue(self, what: str, stream: int, work: Callable[[], None]) -> None:
        self.order.append((what, stream))
        if self.late:
            self.queues[stream].append(work)
        else:
            work()

    def _alloc(self, size: int) -> _Memory:
        self.allocated.append(_Memory(size))
        return self.allocated[-1]

    def _pinned(self, size: int) -> np.ndarray:
        return np.full(size, 0xFF, np.uint8).view(_Pinned)

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        what = {1: "in", 2: "out"}[kind]
        self.enqueue(what, stream, lambda: ctypes.memmove(target, source, size))


class _Pinned(np.ndarray):
    """Pinned memory: a buffer with a `ptr`, also NaN."""

    @property
    def ptr(self) -> int:
        return self.ctypes.data


class _Kernels:
    """The launches of a plan, computed by the NumPy backend."""

    workspace = 1000

    def __init__(self, device: _Device, plan: Any) -> None:
        self.device, self.plan = device, plan

    def run(self, stream: int, pointers: tuple[int, ...], workspace: int, seed: int) -> None:
        self.device.enqueue("kernels", stream, lambda: self._compute(pointers, workspace, seed))

    def _compute(self, pointers: tuple[int, ...], workspace: int, seed: int) -> None:
        plan = self.plan
        ctypes.memset(workspace, 0xEE, self.workspace)
        signatures, ways = plan._arrays_and_ways()
        found: dict[str, Any] = {}
        for name, pointer in zip(launch.OPERANDS, pointers, strict=True):
            like = signatures.get(name)
            if not pointer:
                found[name] = None if like is None else arrays.empty(like)  # the LSE that nobody asked for
                continue
            assert like is not None
            assert pointer % 256 == pointers[0] % 256
            assert like == plans.contiguous(like)
            memory = (ctypes.c_char * max(1, chunks.size_of(like))).from_address(pointer)
            array = np.frombuffer(memory, np.uint8)[: chunks.size_of(like)]
            found[name] = array.view(arrays.dtype_of(like.dtype)).reshape(like.shape)
            if plan.head_major and name in launch.TENSORS:
                found[name] = found[name].swapaxes(-3, -2)
        problem = replace(plan.problem, seed=seed)
        extras = Extras(*map(found.get, Extras._fields))
        if not ways["backward"]:
            numpy_backend.forward(problem, *(found[name] for name in ("q", "k", "v", "out", "lse")), extras)
            return
        names = ("dout", "q", "k", "v", "out", "lse", "dlse", "dq", "dk", "dv", "dsinks")
        operands = [found[name] for name in names]
        numpy_backend.backward(problem, *operands, None, extras, accumulate=ways["accumulate"], lean=ways["lean"])


@pytest.fixture(params=["late", "at once"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Device]:
    """A device in the place of CuPy's, which in the end must have nothing left to do."""
    found = _Device(late=request.param == "late")
    monkeypatch.setattr(toolchain, "import_cupy", lambda: found)
    monkeypatch.setattr(plans._Launched, "launches", lambda plan, aligned: _Kernels(found, plan))
    yield found
    assert not any(found.queues.values())


def assert_like_numpy(case: Case, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """The two functions give what they give on the CPU, but for sums over the batch, which are in another order."""
    found, expected = [], []
    for results, functions in (
        (found, (forward, backward)),
        (expected, (cuflash.flash_attention, cuflash.flash_attention_backward)),
    ):
        inputs = make_inputs(case)
        options = {**inputs.options, "deterministic": case.deterministic}
        out, lse = functions[0](inputs.q, inputs.k, inputs.v, return_lse=True, **options)
        more = {**inputs.given, "accumulate": case.gradients == "added to", "memory": case.memory}
        operands = inputs.dout, inputs.q, inputs.k, inputs.v, out, lse
        results += [out, lse, *functions[1](*operands, dlse=inputs.dlse, **more, **options)]
        assert all(result is array for result, array in zip(results[2:], inputs.given.values(), strict=False))
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), found, expected, strict=False):
        assert (x.dtype, x.shape, type(x)) == (y.dtype, y.shape, np.ndarray)
        rounding = {"float16": 2e-3, "bfloat16": 2e-2}.get(case.dtype, 1e-5) if name == "dsinks" else 0
        np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != "float64"], ids=lambda case: case.name)
def test_every_case_in_chunks(case: Case, device: _Device) -> None:
    assert_like_numpy(
        case, in_smallest_chunks(cuflash.flash_attention), in_smallest_chunks(cuflash.flash_attention_backward)
    )
    batch = case.batch if case.sequences is None else 1
    calls = 0 if case.batch == 0 else 2
    most = 1 if case.dropout_p else batch * case.kv_heads
    # The limit may be twice the least, and smallest arrays are padded.
    least = 1 if case.head_dim < 16 or case.q_len == 1 else -(-most // 2)
    assert calls * least <= [what for what, _ in device.order].count("kernels") <= calls * most


def test_chunks_take_turns_on_two_streams(device: _Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", "0.125")
    q = np.random.default_rng(0).standard_normal((5, 100, 2, 32), dtype=np.float32)
    out = cuflash.flash_attention(q, q, q, backend="cuda")
    np.testing.assert_array_equal(out, cuflash.flash_attention(q, q, q))
    assert len(device.allocated) == 2
    steps = ("in", "kernels", "out")
    assert device.order == [(what, 1 + i % 2) for i in range(5) for what in steps]


def test_what_fits_at_once_is_one_chunk(device: _Device) -> None:
    q = np.ones((5, 100, 2, 32), np.float32)
    cuflash.flash_attention(q, q, q, backend="cuda")
    assert device.order == [("in", 1), ("kernels", 1), ("out", 1)]


def test_an_error_on_the_way_leaves_nothing_under_way(device: _Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """`device` sees to it at its end."""
    started = []

    def run(kernels: _Kernels, *arguments: Any) -> None:
        started.append(arguments)
        if len(started) == 3:
            raise RuntimeError("launch failed")

    monkeypatch.setattr(_Kernels, "run", run)
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", "0.125")
    q = np.ones((5, 100, 2, 32), np.float32)
    with pytest.raises(RuntimeError, match="launch failed"):
        cuflash.flash_attention(q, q, q, backend="cuda")


def test_streams_wait_for_the_callers(device: _Device) -> None:
    waited = []
    stream = device.cuda.Stream
    wait = stream.wait_event
    stream.wait_event = lambda self, event: (waited.append(self.ptr), wait(self, event))
    q = np.ones((1, 4, 1, 8), np.float32)
    cuflash.flash_attention(q, q, q, backend="cuda")
    assert waited == [1]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("length", "kv_len"), [(1, 1), (127, 127), (1000, 1000), (1, 20_000), (60, 3_000)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
def test_the_bound_of_the_workspace_holds(
    arch: str, packed: bool, length: int, kv_len: int, dim: int, deterministic: bool, lean: bool
) -> None:
    def signature(*shape: int, dtype: str = "bfloat16") -> arrays.Signature:
        return plans.contiguous(arrays.Signature(shape, (), dtype, "cuda:0", True))

    q, k = (signature(n, 4, dim) if packed else signature(3, n, 4, dim) for n in (length, kv_len))
    ends = signature(4, dtype="int32") if packed else None
    inputs = (q, k, k, None, None, ends, ends, None, None)
    options = (False, None, None, None, 0.0, False, deterministic, False, "bshd", None)
    forward = plans.forward(*inputs, *options)
    others = (forward.out, forward.out, forward.lse, None, None, None, None)
    plan = plans.backward(*others, *inputs, False, "lean" if lean else "fast", True, *options)
    target = Target.named(arch)
    for backward, call in ((False, forward), (True, plan)):
        steps, _ = call.steps(launch.Machine(target, 132, tuning.SHARED_MEMORY[target.path]))
        needed = sum(-(-size // 256) * 256 for size in steps.workspace.values())
        assert needed <= launch.workspace_bound(call.problem, backward=backward, lean=lean)
