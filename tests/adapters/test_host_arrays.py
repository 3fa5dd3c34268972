"""NumPy arrays on the GPU: the same bits as from CuPy arrays, in memory that is bounded, beside other work."""

from __future__ import annotations

import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from tests.contract.backends import in_smallest_chunks
from tests.gpu.cupy_tools import Allocations, keep_busy

pytestmark = pytest.mark.gpu_adapter
MIB = 2**20


def _inputs(
    batch: int = 2,
    length: int = 600,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    dtype: Any = np.float16,
    layout: str = "bshd",
) -> list[np.ndarray]:
    """q, k, v and dout."""
    rng = np.random.default_rng(0)
    found = [
        rng.standard_normal((batch, length, count, dim), dtype=np.float32).astype(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    return [np.ascontiguousarray(x.swapaxes(1, 2)) for x in found] if layout == "bhsd" else found


def _both(inputs: list[Any], options: dict[str, Any], backend: str | None, **more: Any) -> list[Any]:
    """Forward and backward, by the public functions or in the smallest chunks."""
    forward, backward = cuflash.flash_attention, cuflash.flash_attention_backward
    if backend == "cuda":
        forward, backward = in_smallest_chunks(forward), in_smallest_chunks(backward)
    q, k, v, dout = inputs
    out, lse = forward(q, k, v, return_lse=True, **options)
    return [out, lse, *backward(dout, q, k, v, out, lse, **options, **more)]


def _assert_same(cp: Any, actual: list[Any], expected: list[Any]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert type(x) is np.ndarray
        assert x.tobytes() == cp.asnumpy(y).tobytes()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 20), "scale": 0.2},
    "softcap": {"softcap": 3.0},
    "bhsd": {"causal": True, "layout": "bhsd"},
    "dropout": {"dropout_p": 0.1, "seed": 7},
    "alibi": {"alibi_slopes": np.linspace(0.1, 0.8, 8, dtype=np.float32).reshape(2, 4)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(("dtype", "dim"), [(np.float16, 64), (ml_dtypes.bfloat16, 128), (np.float32, 64)])
def test_the_same_bits_as_from_cupy_arrays(cp: Any, dtype: Any, dim: int, options: dict[str, Any]) -> None:
    inputs = _inputs(dim=dim, dtype=dtype, layout=options.get("layout", "bshd"))
    options = {**options, "deterministic": True}
    there = {name: cp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    expected = _both([cp.asarray(x) for x in inputs], there, None)
    _assert_same(cp, _both(inputs, options, "cuda"), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sinks_are_summed_over_chunks(cp: Any, dtype: Any) -> None:
    inputs, sinks = _inputs(batch=3, dtype=dtype), np.linspace(-1, 1, 4).astype(dtype)
    options = {"causal": True, "deterministic": True}
    *expected, dsinks_expected = _both([cp.asarray(x) for x in inputs], {**options, "sinks": cp.asarray(sinks)}, None)
    *found, dsinks = _both(inputs, {**options, "sinks": sinks}, "cuda")
    _assert_same(cp, found, expected)
    assert dsinks.dtype == dtype
    tolerance = 2e-3 if dtype == np.float16 else 1e-4
    np.testing.assert_allclose(dsinks, cp.asnumpy(dsinks_expected), rtol=tolerance, atol=tolerance)


def test_packed_sequences(cp: Any) -> None:
    q, k, v, dout = (x[0] for x in _inputs(batch=1, heads=8, kv_heads=4))
    ends = np.array([0, 100, 100, 430, 590], np.int32)
    boundaries = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    there = {name: cp.asarray(x) for name, x in boundaries.items()}
    options = {"causal": True, "deterministic": True}
    expected = _both([cp.asarray(x) for x in (q, k, v, dout)], {**options, **there}, None)
    _assert_same(cp, _both([q, k, v, dout], {**options, **boundaries}, "cuda"), expected)


def test_gradients_are_added_to_what_is_given(cp: Any) -> None:
    inputs = _inputs()
    given = {name: np.full(x.shape, 0.5, np.float32) for name, x in zip(("dq", "dk", "dv"), inputs, strict=False)}
    there = {name: cp.asarray(x) for name, x in given.items()}
    options = {"causal": True, "deterministic": True}
    expected = _both([cp.asarray(x) for x in inputs], options, None, **there, accumulate=True)
    # The calls with limits that are too small must not have added anything.
    found = _both(inputs, options, "cuda", **given, accumulate=True)
    _assert_same(cp, found, expected)
    assert all(x is y for x, y in zip(found[2:], given.values(), strict=True))


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_memory_is_that_of_two_chunks(cp: Any, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    inputs = _inputs(batch=1, length=4096, heads=32, kv_heads=16, dim=128)
    q, k, v, dout = inputs
    limit = 40
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", str(limit))
    options = {"causal": True, "backend": "cuda"}
    with Allocations(cp) as allocations:
        out, lse = cuflash.flash_attention(q, k, v, return_lse=True, **options)
        how = {"deterministic": True, "memory": memory}
        found = [out, lse, *cuflash.flash_attention_backward(dout, q, k, v, out, lse, **how, **options)]
    assert sum(x.nbytes for x in (*inputs, *found)) > 4 * limit * MIB, "the call is larger than two chunks"
    assert limit * MIB < allocations.peak <= 2 * limit * MIB
    options = {"causal": True, "deterministic": True}
    _assert_same(cp, found, _both([cp.asarray(x) for x in inputs], options, None, memory=memory))


def test_a_call_that_is_larger_than_the_memory_there_is(cp: Any) -> None:
    """CuPy's pool is bounded to half of what the forward's arrays take."""
    inputs = _inputs(batch=4, length=4096, heads=32, kv_heads=32, dim=128)
    q, k, v, _ = inputs
    expected = cp.asnumpy(cuflash.flash_attention(*(cp.asarray(x) for x in (q, k, v)), causal=True))
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.get_limit()
    pool.set_limit(size=pool.used_bytes() + 2 * q.nbytes)
    try:
        found = cuflash.flash_attention(q, k, v, causal=True, backend="cuda")
        with pytest.raises(cp.cuda.memory.OutOfMemoryError):
            cuflash.flash_attention(*(cp.asarray(x) for x in (q, k, v)), causal=True)
    finally:
        pool.set_limit(size=before)
    np.testing.assert_array_equal(found, expected)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_limit_that_is_too_small_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = _inputs(length=4096)
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", "1")
    with pytest.raises(cuflash.UnsupportedError, match=r"q, k: got 2 query heads .* allows 1 MiB"):
        cuflash.flash_attention(q, k, v, backend="cuda")
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", "5")
    with pytest.raises(cuflash.UnsupportedError, match=r"dropout_p: got 0\.5 .* one chunk"):
        cuflash.flash_attention(q, k, v, dropout_p=0.5, seed=1, backend="cuda")
    monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", "zero")
    with pytest.raises(ValueError, match="CUFLASH_HOST_CHUNK_MB: got 'zero'"):
        cuflash.flash_attention(q, k, v, backend="cuda")


def test_float64_says_what_to_do() -> None:
    q, k, v, _ = _inputs(dtype=np.float64)
    with pytest.raises(cuflash.UnsupportedError, match=r"float64.*cast to float32"):
        cuflash.flash_attention(q, k, v, backend="cuda")


def test_arrays_in_both_memories_are_refused(cp: Any) -> None:
    q, k, v, _ = _inputs()
    with pytest.raises(ValueError, match=r"k: got an array on cuda:0; allowed: q's device, cpu"):
        cuflash.flash_attention(q, cp.asarray(k), v, backend="cuda")


def test_captured_graphs_are_refused(cp: Any) -> None:
    q, k, v, _ = _inputs()
    with cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(cuflash.UnsupportedError, match="capture of a CUDA graph"):
                cuflash.flash_attention(q, k, v, backend="cuda")
        finally:
            stream.end_capture()


# ---- beside other work -------------------------------------------------------------------------------------------


def test_memory_that_the_callers_stream_still_uses_is_left_alone(cp: Any) -> None:
    q, k, v, _ = _inputs(length=4096)
    expected = cuflash.flash_attention(q, k, v, backend="cuda")
    pool = cp.get_default_memory_pool()
    with cp.cuda.Stream(non_blocking=True) as stream:
        keep_busy(cp, 1e-6)  # compiled
        x = cp.full(64 * MIB, 7, np.uint8)
        y = cp.empty_like(x)
        stream.synchronize()
        keep_busy(cp)
        y[...] = x
        del x  # the pool may give it to the call while the copy is still to come
        held = pool.used_bytes()
        found = cuflash.flash_attention(q, k, v, backend="cuda")
        assert pool.used_bytes() == held, "everything has been given back"
        stream.synchronize()
        assert bool((y == 7).all())
    np.testing.assert_array_equal(found, expected)


def test_threads(cp: Any) -> None:
    inputs, options = _inputs(length=1500), {"causal": True, "deterministic": True, "backend": "cuda"}

    def both() -> list[Any]:
        q, k, v, dout = inputs
        out, lse = cuflash.flash_attention(q, k, v, return_lse=True, **options)
        return [out, lse, *cuflash.flash_attention_backward(dout, q, k, v, out, lse, **options)]

    expected = both()
    results: dict[int, list[Any]] = {}
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, both())) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for found in results.values():
        _assert_same(cp, found, expected)


def test_second_device(cp: Any) -> None:
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    q, k, v, _ = _inputs()
    expected = cuflash.flash_attention(q, k, v, causal=True, backend="cuda")
    with cp.cuda.Device(1):
        np.testing.assert_array_equal(cuflash.flash_attention(q, k, v, causal=True, backend="cuda"), expected)


def test_times_of_one_chunk_and_of_many(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed, not judged: what overlapping copies gain depends on the machine."""
    q, k, v, _ = _inputs(batch=1, length=32_768, heads=16, kv_heads=16, dim=128)

    def seconds(limit: str) -> float:
        monkeypatch.setenv("CUFLASH_HOST_CHUNK_MB", limit)
        cuflash.flash_attention(q, k, v, backend="cuda")
        start = time.perf_counter()
        cuflash.flash_attention(q, k, v, backend="cuda")
        return time.perf_counter() - start

    print(f"one chunk {seconds('4096'):.3f} s, eight {seconds('80'):.3f} s, sixteen {seconds('40'):.3f} s")
