"""The message that `triton_kernel_call_ffi` takes: one launch of a kernel, by which jaxlib's GPU plugin launches it.

The target is there for kernels of Triton, but asks only for machine code, a grid, and what each argument is. The
message is a TritonAnyKernelCall of `jaxlib/gpu/triton.proto`, written here field by field: jaxlib's own constructors
(jaxlib.gpu_triton) take PTX alone, which ptxas would compile anew in every process, while the message can carry a
cubin. Exported programs hold such messages, so that JAX keeps reading them.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

TARGET = "triton_kernel_call_ffi"

_FLOAT16, _BFLOAT16 = 6, 9  # CUtensorMapDataType
_SWIZZLE_128B = 3  # CUtensorMapSwizzle
# Of a number: the field of the oneof in TritonKernelCall.Parameter, by its code in cuflash.cuda.launch.PARAMS.
_NUMBER_FIELDS = {"i": 3, "I": 4, "q": 5, "Q": 6, "f": 7}


class Kernel(NamedTuple):
    """Machine code and how it is launched."""

    entry: str
    cubin: bytes
    warps: int
    shared_bytes: int
    capability: tuple[int, int]  # of the GPU that the cubin is for
    blocks: int


def pointer(*, divisor: int = 0, zeroed: int = 0) -> bytes:
    """An argument that is the address of the next buffer, a multiple of `divisor` if that is not 0.

    The first `zeroed` bytes of the buffer are set to 0 before the launch.
    """
    return _message(1, _number(1, zeroed) + _number(2, divisor))


def tensor_map(dtype: str, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """An argument that is a tensor map of the next buffer, swizzled by 128 bytes, zeros beyond the tensor.

    The dtype is float16 or bfloat16. The axes are in the driver's order, the contiguous one first; strides are in bytes
    and without it. The message has them the other way round, in elements.
    """
    elements = [1, *(stride // 2 for stride in strides)]
    description = _number(1, _FLOAT16 if dtype == "float16" else _BFLOAT16) + _number(2, _SWIZZLE_128B)
    for field, values in ((3, shape), (4, elements), (5, box)):
        description += _message(field, b"".join(_varint(value) for value in reversed(values)))
    return _message(9, _message(1, description))


def number(code: str, value: float) -> bytes:
    """An argument that is a number of a type: a code of cuflash.cuda.launch.PARAMS."""
    field = _NUMBER_FIELDS[code]
    if code == "f":
        return _varint(field << 3 | 5) + struct.pack("<f", value)
    return _varint(field << 3) + _varint(int(value))  # also a 0 is written: the field says which type it is


def opaque(kernel: Kernel, arguments: Sequence[bytes], metadata: bytes = b"") -> bytes:
    """The target's attribute `opaque` for a launch with these arguments.

    Buffers come in the order of the custom call, its operands before its results.
    """
    # Kernels are told apart by their PTX; with a cubin nothing else is done with it.
    return zlib.compress(message(kernel, arguments, f"cuflash {hashlib.sha256(kernel.cubin).hexdigest()}", metadata))


def message(kernel: Kernel, arguments: Sequence[bytes], ptx: str, metadata: bytes = b"") -> bytes:
    """The message itself. Without a cubin the PTX is what is compiled."""
    major, minor = kernel.capability
    code = _message(1, kernel.entry.encode()) + _number(2, kernel.warps) + _number(3, kernel.shared_bytes)
    code += _message(4, ptx.encode()) + _number(6, 10 * major + minor) + _number(10, 1, optional=True)
    if kernel.cubin:
        image = _message(1, kernel.cubin) + _message(2, kernel.entry.encode()) + _number(3, kernel.shared_bytes)
        code += _message(11, image)
    call = _message(1, code) + _number(2, kernel.blocks) + _number(3, 1) + _number(4, 1)
    call += b"".join(_message(5, argument) for argument in arguments)
    text = _message(1, call)
    if metadata:
        text += _message(3, metadata)
    return text + _message(4, kernel.entry.encode())


def _varint(value: int) -> bytes:
    """A whole number, seven bits a byte; a negative one as 64 bits."""
    value &= 2**64 - 1
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int, *, optional: bool = False) -> bytes:
    """A field that holds a whole number; a 0 is left out but where that means something else."""
    return _varint(field << 3) + _varint(value) if value or optional else b""


def _message(field: int, content: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content
