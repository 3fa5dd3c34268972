"""The FFI handler called as XLA calls it, with call frames made here: what needs no GPU of the part for GPUs."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.adapters import jax_backend

jax = jax_backend.jax

import cuflash  # noqa: E402
from cuflash.adapters.jax import _gpu, _handler  # noqa: E402
from cuflash.adapters.jax._call import Call, Options, described  # noqa: E402
from cuflash.cuda.launch import OPERANDS  # noqa: E402
from cuflash.plans import BackwardPlan, ForwardPlan  # noqa: E402

CALL = Call(False, ("q", "k", "v"), Options(causal=True, seed=2**64 - 1, window_size=(None, 3)))


class Frame:
    """A call frame of one attribute, with NumPy arrays as buffers, and the interface of an XLA that is made up."""

    def __init__(
        self,
        operands: list[np.ndarray],
        results: list[np.ndarray],
        *,
        call: Call = CALL,
        stage: int = 3,
        minor: int = 9,
    ) -> None:
        self.errors: list[tuple[int, str]] = []
        self.metadata = _handler._Metadata()
        self.api = _handler._Api()
        self.api.version.major, self.api.version.minor = 0, minor
        self.api.error_create = type(self.api.error_create)(self.error_create)
        self.api.stream_get = type(self.api.stream_get)(self.stream_get)
        self.text = ctypes.create_string_buffer(call.text(operands).encode())
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


def run_nothing(text: bytes, operands: Any, results: Any, stream: int) -> None:
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

    def run(text: bytes, operands: Any, results: Any, stream: int) -> None:
        seen.append((text.decode(), stream))
        seen.extend((block.address, block.shape, block.dtype, block.nbytes) for block in (*operands, *results))

    frame = Frame([q], [out])
    assert frame.call(_handler.handler(run, gpu=True, capturable=False)) is None
    assert frame.errors == []
    assert seen == [
        (CALL.text([q]), 1234),
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
    def run(text: bytes, operands: Any, results: Any, stream: int) -> None:
        raise error

    frame = Frame([], [])
    assert frame.call(_handler.handler(run, gpu=False, capturable=False)) == 99
    assert frame.errors == [(code, f"{type(error).__name__}: q: bad")]


def test_a_call_survives_its_text():
    q = np.zeros((2, 0), ml_dtypes.bfloat16)
    assert described(CALL.text([q, q])) == (CALL, (((2, 0), "bfloat16"), ((2, 0), "bfloat16")))


def test_an_older_jax_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 2))
    monkeypatch.setattr(jax, "__version__", "0.9.2")
    monkeypatch.delitem(sys.modules, "cuflash.adapters.jax")
    with pytest.raises(cuflash.UnsupportedError, match=r"jax: got version 0\.9\.2; allowed: 0\.10 or newer"):
        __import__("cuflash.adapters.jax")


class Launches:
    """What a plan launches on a GPU; it notes with what it is run."""

    workspace = 32

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """A GPU of the number 3 that holds the host's memory."""
    made = Launches()
    runtime = SimpleNamespace(
        pointerGetAttributes=lambda address: SimpleNamespace(device=3), setDevice=lambda device: device
    )
    monkeypatch.setattr(_gpu, "import_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    for plan in (ForwardPlan, BackwardPlan):
        monkeypatch.setattr(
            plan, "launches", lambda self, aligned: made if (self.device, aligned) == (3, True) else None
        )
    return made


def aligned(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An array at a multiple of 64 bytes, as XLA's are."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def test_a_forward_on_a_gpu_runs_its_plan(launches: Launches):
    given = {name: aligned(2, 9, 2, 8) for name in ("q", "k", "v")} | {"sinks": aligned(2)}
    made = {"out": aligned(2, 9, 2, 8), "lse": aligned(2, 2, 9)}
    call = Call(False, tuple(given), Options(dropout_p=0.5, seed=2**64 - 1, window_size=(None, None)))
    frame = Frame(list(given.values()), list(made.values()), call=call)
    assert frame.call(_handler.handler(_gpu.run_on_gpu, gpu=True, capturable=True)) is None
    assert frame.errors == []
    addresses = {name: array.ctypes.data for name, array in (given | made).items()}
    assert launches.runs == [(1234, tuple(addresses.get(name, 0) for name in OPERANDS), 0, 2**64 - 1)]


def test_a_backward_on_a_gpu_has_a_workspace(launches: Launches):
    given = {name: aligned(2, 9, 2, 8) for name in ("dout", "out")} | {"lse": aligned(2, 2, 9)}
    given |= {name: aligned(2, 9, 2, 8) for name in ("q", "k", "v")}
    made = {name: aligned(2, 9, 2, 8) for name in ("dq", "dk", "dv")}
    workspace = aligned(4, dtype=np.int64)
    call = Call(True, tuple(given), Options(window_size=(None, None)))
    frame = Frame(list(given.values()), [*made.values(), workspace], call=call)
    assert frame.call(_handler.handler(_gpu.run_on_gpu, gpu=True, capturable=True)) is None
    assert frame.errors == []
    addresses = {name: array.ctypes.data for name, array in (given | made).items()}
    assert launches.runs == [(1234, tuple(addresses.get(name, 0) for name in OPERANDS), workspace.ctypes.data, 0)]


def test_preparing_gives_the_largest_workspace_of_the_gpus(launches: Launches, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [SimpleNamespace(local_hardware_id=3)])
    q = aligned(2, 9, 2, 8)
    assert _gpu.prepare(Call(False, ("q", "k", "v"), Options(window_size=(None, None))).text([q, q, q])) == 32
