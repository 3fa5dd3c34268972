"""The FFI handler called as XLA calls it, with call frames made here: what needs no GPU of the part for GPUs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.adapters import jax_backend

jax = jax_backend.jax

import cuflash  # noqa: E402
from cuflash.adapters.jax import _gpu, _handler  # noqa: E402
from cuflash.adapters.jax._call import Call, Options  # noqa: E402

CALL = Call(False, ("q", "k", "v"), Options(causal=True, seed=2**64 - 1, window_size=(None, 3)))


class Frame:
    """A call frame of one attribute, with NumPy arrays as buffers, and the interface of an XLA that is made up."""

    def __init__(
        self, operands: list[np.ndarray], results: list[np.ndarray], *, stage: int = 3, minor: int = 9
    ) -> None:
        self.errors: list[tuple[int, str]] = []
        self.metadata = _handler._Metadata()
        self.api = _handler._Api()
        self.api.version.major, self.api.version.minor = 0, minor
        self.api.error_create = type(self.api.error_create)(self.error_create)
        self.api.stream_get = type(self.api.stream_get)(self.stream_get)
        self.text = ctypes.create_string_buffer(CALL.text().encode())
        self.span = _handler._ByteSpan(ctypes.addressof(self.text), len(self.text.value))
        self.spans = (ctypes.POINTER(_handler._ByteSpan) * 1)(ctypes.pointer(self.span))
        self.frame = _handler._CallFrame(api=ctypes.pointer(self.api), context=7, stage=stage)
        self.frame.attributes.size, self.frame.attributes.values = 1, self.spans
        self.frame.operands, self.kept_operands = self.buffers(operands)
        self.frame.results, self.kept_results = self.buffers(results)

    def buffers(self, arrays: list[np.ndarray]) -> tuple[Any, Any]:
        codes = {name: code for code, name in _handler._DTYPES.items()}
        made = []
        for array in arrays:
            dims = (ctypes.c_int64 * array.ndim)(*array.shape)
            made.append(_handler._Buffer(0, None, codes[array.dtype.name], array.ctypes.data, array.ndim, dims))
        pointers = (ctypes.POINTER(_handler._Buffer) * len(made))(*map(ctypes.pointer, made))
        return _handler._Buffers(0, None, len(made), None, pointers), (made, pointers)

    def error_create(self, arguments: Any) -> int:
        self.errors.append((arguments.contents.code, arguments.contents.message.decode()))
        return 99

    def stream_get(self, arguments: Any) -> None:
        assert arguments.contents.context == 7
        arguments.contents.stream = 1234

    def call(self, function: Any) -> int | None:
        return function(ctypes.addressof(self.frame))


def run_nothing(call: Call, operands: Any, results: Any, stream: int) -> None:
    raise AssertionError("the handler is not to run")


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("theirs", "answered"), [(3, 3), (9, 4)])
def test_metadata(theirs: int, answered: int, capturable: bool):
    """Asked for it, the handler names the version it speaks and whether it may be captured, and does nothing else."""
    frame = Frame([], [], minor=theirs)
    extension = _handler._Extension(0, 1, None, ctypes.pointer(frame.metadata))
    frame.frame.extension = ctypes.pointer(extension)
    assert frame.call(_handler.handler(run_nothing, gpu=True, capturable=capturable)) is None
    assert frame.errors == []
    assert frame.metadata.traits == capturable
    assert (frame.metadata.api_version.major, frame.metadata.api_version.minor) == (0, answered)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_nothing_runs_before_the_execution(stage: int):
    frame = Frame([], [], stage=stage)
    assert frame.call(_handler.handler(run_nothing, gpu=True, capturable=False)) is None
    assert frame.errors == []


def test_a_gpu_gets_its_stream_addresses_and_shapes():
    q, out = np.zeros((2, 3), np.float16), np.zeros((4, 0), np.int64)
    seen: list[Any] = []

    def run(call: Call, operands: Any, results: Any, stream: int) -> None:
        seen.append((call, stream))
        seen.extend((block.address, block.shape, block.dtype, block.nbytes) for block in (*operands, *results))

    frame = Frame([q], [out])
    assert frame.call(_handler.handler(run, gpu=True, capturable=False)) is None
    assert frame.errors == []
    assert seen == [
        (CALL, 1234),
        (q.ctypes.data, (2, 3), np.float16, 12),
        (out.ctypes.data, (4, 0), np.int64, 0),
    ]


def test_the_cpu_writes_the_results():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 9, 2, 8))
    out, lse = np.empty_like(q), np.empty((2, 2, 9))
    frame = Frame([q, k, v], [out, lse])
    assert frame.call(_handler.handler(_handler.run_on_cpu, gpu=False, capturable=False)) is None
    assert frame.errors == []
    expected = cuflash.flash_attention(q, k, v, causal=True, window_size=(None, 3), return_lse=True)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("q: bad"), 3), (TypeError("q: bad"), 3), (cuflash.UnsupportedError("q: bad"), 13)]
)
def test_an_exception_becomes_an_error_of_xla(error: Exception, code: int):
    def run(call: Call, operands: Any, results: Any, stream: int) -> None:
        raise error

    frame = Frame([], [])
    assert frame.call(_handler.handler(run, gpu=False, capturable=False)) == 99
    assert frame.errors == [(code, f"{type(error).__name__}: q: bad")]


def test_a_call_survives_its_text():
    assert Call.from_text(CALL.text().encode()) == CALL


def test_an_older_jax_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 2))
    monkeypatch.setattr(jax, "__version__", "0.9.2")
    monkeypatch.delitem(sys.modules, "cuflash.adapters.jax")
    with pytest.raises(cuflash.UnsupportedError, match=r"jax: got version 0\.9\.2; allowed: 0\.10 or newer"):
        __import__("cuflash.adapters.jax")


class HostCuPy:
    """What the adapter uses of CuPy, for memory of the host; it notes the device and the stream of a call."""

    def __init__(self) -> None:
        self.entered: list[Any] = []
        attributes = SimpleNamespace(pointerGetAttributes=lambda address: SimpleNamespace(device=3))
        self.cuda = SimpleNamespace(
            runtime=attributes,
            Device=lambda device: self.enter("device", device),
            Stream=SimpleNamespace(from_external=lambda stream: self.enter("stream", stream.__cuda_stream__())),
            UnownedMemory=lambda address, size, owner, device: (address, size, device),
            MemoryPointer=lambda memory, offset: memory,
        )

    @contextmanager
    def enter(self, *what: Any) -> Iterator[None]:
        self.entered.append(what)
        yield

    def ndarray(self, shape: tuple[int, ...], dtype: np.dtype, memory: tuple[int, int, int]) -> np.ndarray:
        address, size, device = memory
        assert (size, device) == (int(np.prod(shape)) * dtype.itemsize, 3)
        return np.ndarray(shape, dtype, memoryview((ctypes.c_char * size).from_address(address)))


def test_a_gpu_call_goes_over_views_on_its_device_and_stream(monkeypatch: pytest.MonkeyPatch):
    cupy = HostCuPy()
    monkeypatch.setattr(_gpu, "import_cupy", lambda: cupy)
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 9, 2, 8), dtype=np.float32).astype(ml_dtypes.bfloat16)
    out, lse = np.empty_like(q), np.empty((2, 2, 9), np.float32)
    frame = Frame([q, k, v], [out, lse])
    assert frame.call(_handler.handler(_gpu.run_on_gpu, gpu=True, capturable=False)) is None
    assert frame.errors == []
    expected = cuflash.flash_attention(q, k, v, causal=True, window_size=(None, 3), return_lse=True)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    assert cupy.entered == [("device", 3), ("stream", (0, 1234))]
