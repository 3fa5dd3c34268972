"""How XLA calls cuflash: a handler of XLA's foreign function interface (FFI), written with ctypes.

XLA calls a handler with a call frame, which holds addresses: the operands, the results, the attributes (here one text,
`call`, see `_call.described`) and on a GPU the stream. The handler keeps no state between calls. The structures are
those of `xla/ffi/api/c_api.h`, which jaxlib ships and keeps stable; only their leading fields are declared here.
"""

from __future__ import annotations

import atexit
import ctypes
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import cuflash
from cuflash.adapters.jax import _gpu
from cuflash.adapters.jax._call import Call, described
from cuflash.arrays import dtype_of

_API_MINOR = 4  # the newest minor version of the interface that was tried; XLA serves older ones
_METADATA = 1  # XLA_FFI_Extension_Metadata
_COMMAND_BUFFER_COMPATIBLE = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_INVALID_ARGUMENT, _INTERNAL = 3, 13  # XLA_FFI_Error_Code
_DTYPES = {
    1: "bool",
    4: "int32",
    5: "int64",
    10: "float16",
    11: "float32",
    12: "float64",
    16: "bfloat16",
}  # XLA_FFI_DataType


class _ApiVersion(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("api_version", _ApiVersion),
        ("traits", ctypes.c_uint32),
        ("state_type_id", ctypes.c_int64),
    )


class _Extension(ctypes.Structure):
    """XLA_FFI_Extension_Base, and what follows it in a metadata extension."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    )


class _ErrorCreate(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class _StreamGet(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("version", _ApiVersion),
        ("internal", ctypes.c_void_p),
        ("error_create", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorCreate))),
        ("error_get_message", ctypes.c_void_p),
        ("error_destroy", ctypes.c_void_p),
        ("handler_register", ctypes.c_void_p),
        ("stream_get", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_StreamGet))),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _ByteSpan(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def text(self) -> bytes:
        return ctypes.string_at(self.data, self.size)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.POINTER(ctypes.POINTER(_ByteSpan))),
        ("values", ctypes.POINTER(ctypes.POINTER(_ByteSpan))),  # of strings: there is no other attribute
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class Block:
    """One of XLA's buffers: an address, and the shape and dtype of the row-major array that lies there."""

    __slots__ = ("_buffer",)

    def __init__(self, buffer: _Buffer) -> None:
        self._buffer = buffer

    @property
    def address(self) -> int:
        return self._buffer.data or 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._buffer.dims[: self._buffer.rank])

    @property
    def dtype(self) -> np.dtype:
        return dtype_of(_DTYPES[self._buffer.dtype])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Run = Callable[[bytes, Sequence[Block], Sequence[Block], int], None]


def handler(run: Run, *, gpu: bool, capturable: bool) -> Any:
    """A C function that XLA can call, and which calls `run(text, operands, results, stream)`; keep it alive.

    On a GPU `stream` is the CUstream to launch on. `capturable` says that what `run` does may be captured in a command
    buffer (a CUDA graph) and replayed.
    """

    def execute(address: int) -> int | None:
        frame = _CallFrame.from_address(address)
        api = frame.api.contents
        if frame.extension and frame.extension.contents.type == _METADATA:
            metadata = frame.extension.contents.metadata.contents
            metadata.api_version.major = api.version.major
            metadata.api_version.minor = min(api.version.minor, _API_MINOR)
            metadata.traits = _COMMAND_BUFFER_COMPATIBLE if capturable else 0
            return None
        if frame.stage != _EXECUTE:
            return None
        try:
            text = frame.attributes.values[0].contents.text()
            operands, results = (
                [Block(side.buffers[i].contents) for i in range(side.size)] for side in (frame.operands, frame.results)
            )
            run(text, operands, results, _stream(api, frame.context) if gpu else 0)
        except BaseException as error:  # none may pass through C code
            code = _INVALID_ARGUMENT if isinstance(error, (TypeError, ValueError)) else _INTERNAL
            message = f"{type(error).__name__}: {error}".encode()
            return api.error_create(_ErrorCreate(ctypes.sizeof(_ErrorCreate), None, message, code))
        return None

    return _HANDLER(execute)


def _stream(api: _Api, context: int) -> int:
    asked = _StreamGet(ctypes.sizeof(_StreamGet), None, context, None)
    if api.stream_get(asked):
        raise RuntimeError("XLA gave no CUDA stream")
    return asked.stream or 0


def run_on_cpu(text: bytes, operands: Sequence[Block], results: Sequence[Block], stream: int) -> None:
    """The public functions on NumPy views; XLA's CPU has no stream."""
    finish_at_exit()
    call, _ = described(text)
    arrays = dict(zip(call.operands, map(_numpy, operands), strict=True))
    targets = [_numpy(block) for block in results]
    options = asdict(call.options)
    if call.backward:
        leading = [arrays.pop(name) for name in ("dout", "q", "k", "v", "out", "lse")]
        gradients = dict(zip(("dq", "dk", "dv"), targets, strict=False))
        computed = cuflash.flash_attention_backward(*leading, **arrays, **gradients, **options)
        computed, targets = computed[3:], targets[3:]  # dsinks and dbias: the others are written already
    else:
        leading = [arrays.pop(name) for name in ("q", "k", "v")]
        del options["memory"]
        computed = cuflash.flash_attention(*leading, **arrays, return_lse=True, **options)
    for target, value in zip(targets, computed, strict=True):
        target[...] = value


def _numpy(block: Block) -> np.ndarray:
    if block.nbytes == 0:
        return np.empty(block.shape, block.dtype)
    memory = memoryview((ctypes.c_char * block.nbytes).from_address(block.address))
    return np.ndarray(block.shape, block.dtype, memory)


# ---- registration ------------------------------------------------------------------------------------------------

_TARGETS = ("cuflash_forward", "cuflash_backward")


def target(call: Call) -> str:
    """The name under which XLA finds the handler."""
    return _TARGETS[call.backward]


def register() -> None:
    """Make the targets known to XLA, on CPUs and on NVIDIA GPUs."""
    for platform, function in (("cpu", _ON_CPU), ("CUDA", _ON_GPU)):
        for name in _TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform=platform)


@lru_cache
def finish_at_exit() -> None:
    """Once something was compiled for the CPU: have the interpreter wait for it before it ends.

    A handler that is entered after that waits for the interpreter for ever, and JAX for the handler.
    """
    atexit.register(_finish)


def _finish() -> None:
    for array in jax.live_arrays("cpu"):
        with suppress(RuntimeError):  # of a computation that failed, or an array that was donated
            array.block_until_ready()
    # Calls whose results nobody kept: a device's computations start in the order in which they were dispatched.
    devices = jax.local_devices(backend="cpu")
    last = NamedSharding(Mesh(np.array(devices), "devices"), PartitionSpec("devices"))
    jax.jit(jnp.negative)(jax.device_put(np.zeros(len(devices)), last)).block_until_ready()


_ON_CPU = handler(run_on_cpu, gpu=False, capturable=False)
_ON_GPU = handler(_gpu.run_on_gpu, gpu=True, capturable=True)
