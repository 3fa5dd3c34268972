"""One small view of any array, without importing its framework.

A `Signature` is what can be said of an array without reading it (shape, strides, dtype, device). NumPy arrays are used
as they are; CuPy's give their fields; every other array comes in through DLPack, zero copies, and results go back
through the `from_dlpack` of the caller's own library. DLPack's struct is read here with ctypes because NumPy's reader
knows no bfloat16.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuflash.errors import UnsupportedError

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Signature(NamedTuple):
    """Shape, strides in elements, dtype name and device ("cpu", "cuda:0") of an array, and whether it can be
    written."""

    shape: tuple[int, ...]
    strides: tuple[float, ...]  # whole numbers but in an array that is refused for it
    dtype: str
    device: str
    writable: bool


NATIVE = {np.ndarray}  # types of arrays that backends take as they are; CuPy's joins when one has been seen


def kind(array: Any) -> str:
    """Which library an array belongs to: "numpy", "cupy" or "dlpack" (any other with `__dlpack__`); "" for no array."""
    if isinstance(array, np.ndarray):
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        NATIVE.add(cupy.ndarray)
        return "cupy"
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return "dlpack"
    return ""


def signature(array: Any) -> Signature:
    """The signature of a NumPy or CuPy array."""
    if isinstance(array, np.ndarray):
        return _signature(array.shape, array.strides, array.dtype, -1, array.flags.writeable)
    return _signature(array.shape, array.strides, array.dtype, array.data.device_id, True)


@lru_cache(maxsize=4096)
def _signature(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, device: int, writable: bool
) -> Signature:
    whole = all(stride % dtype.itemsize == 0 for stride in strides)
    return Signature(
        shape,
        # Fractions are for the error message of the caller.
        tuple(stride // dtype.itemsize if whole else stride / dtype.itemsize for stride in strides),
        dtype.name if dtype.isnative else str(dtype),
        "cpu" if device < 0 else f"cuda:{device}",
        writable,
    )


def footprint(array: Any) -> np.ndarray:
    """The elements' addresses as a NumPy array that must not be read: what memory an array has, also on a GPU."""
    if isinstance(array, np.ndarray):
        return array
    interface = {
        "version": 3,
        "shape": array.shape,
        "strides": array.strides,
        "typestr": f"V{array.itemsize}",
        "data": (array.data.ptr, False),
    }
    return np.asarray(_Borrowed(array, interface))


@lru_cache
def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of a dtype's name; bfloat16 is ml_dtypes'."""
    return _BFLOAT16 if name == "bfloat16" else np.dtype(name)


def empty(like: Signature) -> np.ndarray:
    """A new NumPy array of this shape and dtype."""
    return np.empty(like.shape, dtype_of(like.dtype))


# ---- DLPack ------------------------------------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_CPU = 1  # kDLCPU
_GPU = (2, 13)  # kDLCUDA, kDLCUDAManaged
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_CODE_BFLOAT = 4  # kDLBfloat
_TYPESTR = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}  # DLDataTypeCode -> array-interface letter

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _tensor_of(capsule: Any) -> tuple[_DLTensor, bool]:
    """The DLTensor that a capsule holds, and whether its memory must not be written."""
    name = _capsule_name(capsule)
    pointer = _capsule_pointer(capsule, name)
    if name == b"dltensor_versioned":
        managed = _DLManagedTensorVersioned.from_address(pointer)
        return managed.tensor, bool(managed.flags & _READ_ONLY)
    return _DLTensor.from_address(pointer), False


class _Borrowed:
    """Memory of another library, kept alive by its owner: the array, or the capsule that frees it in the end."""

    def __init__(self, owner: Any, interface: dict[str, Any]) -> None:
        self.owner = owner
        self.__array_interface__ = interface


def from_dlpack(array: Any) -> Any:
    """A view of an array that has `__dlpack__`: NumPy's on the CPU (bfloat16 included), CuPy's on a GPU; no copy.

    Raises UnsupportedError for other devices or without CuPy, and BufferError (or what the other library raises) when
    the array cannot be exported.
    """
    device = int(array.__dlpack_device__()[0])
    if device in _GPU:
        from cuflash.cuda.toolchain import import_cupy

        return import_cupy().from_dlpack(array)
    if device != _CPU:
        raise UnsupportedError(
            f"got a {type(array).__name__} on DLPack device type {device}; the CPU and CUDA GPUs are supported"
        )
    try:
        capsule = array.__dlpack__(max_version=(1, 0))
    except TypeError:  # a library from before DLPack 1.0
        capsule = array.__dlpack__()
    tensor, read_only = _tensor_of(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    bfloat16 = tensor.code == _CODE_BFLOAT and tensor.bits == 16
    if tensor.lanes != 1 or not (bfloat16 or tensor.code in _TYPESTR):
        raise BufferError(f"DLPack type code {tensor.code} with {tensor.bits} bits and {tensor.lanes} lanes")
    letter = "u" if bfloat16 else _TYPESTR[tensor.code]
    dtype = np.dtype(f"{letter}{tensor.bits // 8}")
    target = _BFLOAT16 if bfloat16 else dtype
    if 0 in shape:
        return np.empty(shape, target)
    interface: dict[str, Any] = {
        "version": 3,
        "shape": shape,
        "typestr": dtype.str,
        "data": ((tensor.data or 0) + tensor.byte_offset, read_only),
    }
    if tensor.strides:
        interface["strides"] = tuple(stride * dtype.itemsize for stride in tensor.strides[: tensor.ndim])
    return np.asarray(_Borrowed(capsule, interface)).view(target)


class _Exported:
    """A NumPy array as a DLPack producer that knows bfloat16."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0

    def __dlpack__(self, **options: Any) -> Any:
        if self.array.dtype != _BFLOAT16:
            return self.array.__dlpack__(**options)
        capsule = self.array.view(np.uint16).__dlpack__(**options)
        _tensor_of(capsule)[0].code = _CODE_BFLOAT
        return capsule


def like(result: Any, array: Any) -> Any:
    """`result` (NumPy's or CuPy's) as the kind of array `array` is, or unchanged if that has no `from_dlpack`."""
    if isinstance(array, type(result)):
        return result
    if hasattr(array, "__array_namespace__"):
        library = array.__array_namespace__()
    else:
        library = sys.modules.get(type(array).__module__.partition(".")[0])
    convert = getattr(library, "from_dlpack", None)
    if convert is None:
        return result
    return convert(_Exported(result) if isinstance(result, np.ndarray) else result)
