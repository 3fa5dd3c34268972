"""What the contract suite runs over: a backend or a kind of array joins by one entry in BACKENDS."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from tests.contract import tolerance
from tests.contract.cases import DTYPES, Case, Inputs


@dataclass(frozen=True, kw_only=True)
class Backend:
    """How to make arrays of one kind, read them back, and call the two functions on them."""

    name: str
    array: Callable[[np.ndarray], Any]  # the same values, at the same strides
    numpy: Callable[[Any], np.ndarray]
    forward: Callable[..., Any] = cuflash.flash_attention
    backward: Callable[..., Any] = cuflash.flash_attention_backward
    dtypes: tuple[str, ...] = tuple(DTYPES)
    marks: tuple[pytest.MarkDecorator, ...] = ()
    memory: Callable[[Any], np.ndarray] | None = None  # all of the memory that an array made by `array` is a view of
    dense: bool = True  # it takes bias and mask
    adapter: bool = False  # another entry's backend through an adapter: laws of the results are that entry's
    forced_arch: str | None = None  # CUFLASH_FORCE_ARCH; the backend compiles a kernel for each new Spec
    # What the products of a result lose by their documented precision: (case, inputs, name, oracle) -> error
    arithmetic: Callable[[Case, Inputs, str, np.ndarray], float] = lambda case, inputs, name, oracle: 0.0


class DLPackArray:
    """An array of a library that cuflash has never heard of: nothing but DLPack, and the name of its library."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array_namespace__(self) -> Any:
        return sys.modules[__name__]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if self._array.dtype != ml_dtypes.bfloat16:
            return self._array.__dlpack__(**options)
        capsule = self._array.view(np.uint16).__dlpack__(**options)  # NumPy exports no bfloat16
        _type_code(capsule).value = _BFLOAT
        return capsule


class _Capsule:
    """A DLPack capsule as a producer that NumPy reads."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule


def from_dlpack(producer: Any) -> DLPackArray:
    """The library's own entry, as the array API standard names it."""
    capsule = producer.__dlpack__()
    code = _type_code(capsule)
    if code.value != _BFLOAT:
        return DLPackArray(np.from_dlpack(_Capsule(capsule)))
    code.value = _UNSIGNED
    return DLPackArray(np.from_dlpack(_Capsule(capsule)).view(ml_dtypes.bfloat16))


_UNSIGNED, _BFLOAT = 1, 4  # kDLUInt and kDLBfloat of DLDataTypeCode


def _type_code(capsule: Any) -> ctypes.c_uint8:
    """DLTensor.dtype.code of a capsule, to read and to write. The offsets are those of dlpack.h on a 64-bit machine."""
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    name = get_name(capsule)
    versioned = 32 if name == b"dltensor_versioned" else 0
    return ctypes.c_uint8.from_address(get_pointer(capsule, name) + versioned + 20)


def memory_of(array: np.ndarray) -> np.ndarray:
    """The whole memory that an array is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def to_cupy(array: np.ndarray) -> Any:
    """The same values on the GPU, at the same strides in the same surroundings."""
    import cupy

    base = memory_of(array).ravel(order="K")
    offset = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // array.itemsize
    on_gpu = cupy.asarray(base).ravel()[offset if array.size else 0 :]
    return cupy.lib.stride_tricks.as_strided(on_gpu, array.shape, array.strides)


def cupy_memory(array: Any) -> np.ndarray:
    while array.base is not None:
        array = array.base
    return array.get()


def tensor_core_error(case: Case, inputs: Inputs, name: str, oracle: np.ndarray) -> float:
    """What tensor cores lose beside float32 arithmetic.

    float32 factors are split in two terms, whose product keeps 23 bits: half a unit in the last place of the result,
    also where a naive computation happens to be exact (one key, P = 1), and of S in LSE, where a bias may leave little
    of it. 16-bit factors are exact, but the sums S = q.k are truncated, not rounded, after every 8 of head_dim terms,
    by at most 2^-24 of the sum on average; LSE shows it, other results are rounded to 16 bits anyway.
    """
    rounding = 2**-24 * float(np.abs(oracle[np.isfinite(oracle)]).max(initial=0.0)) if case.dtype == "float32" else 0.0
    if case.dtype == "float32" and case.q_len == case.kv_len == 1 and not (case.dlse or case.sequences):
        rounding = max(rounding, _left_of_cancelling(case, inputs, name))
    if name != "lse" or not np.isfinite(oracle).any():
        return rounding
    largest = float(
        np.abs(_scale(case) * np.einsum("...qhd,...khd->...hqk", *_rows(case, inputs.q, inputs.k))).max(initial=0.0)
    )
    return max(rounding, 2**-24 * largest) if case.dtype == "float32" else 2**-24 * -(-case.head_dim // 8) * largest


def _left_of_cancelling(case: Case, inputs: Inputs, name: str) -> float:
    """What is left of dS = dP - D in the gradients of one query and one key, where P = 1 and the two cancel. (A
    gradient of LSE would stay.)

    Both are sums of dO V: with two factors of 23 bits in a term of dP and one, O, in a term of D. Each loses up to
    2^-24 of the term, of either sign and evenly: together as much as 2^-24 of the term as a standard deviation. A naive
    computation, whose sums are the same, errs by nothing.
    """
    if name not in ("dq", "dk", "dbias"):
        return 0.0
    dout, q, k, v = _rows(case, inputs.dout, inputs.q, inputs.k, inputs.v)
    d_scores = 2**-24 * np.sqrt(((dout * v) ** 2).sum(axis=-1, keepdims=True))  # [batch, 1, heads, 1]
    if name == "dbias":
        return tolerance.GRADIENT * float(np.sqrt((d_scores**2).sum()))
    group = case.heads // case.kv_heads if name == "dk" else 1  # of heads that add up
    return tolerance.GRADIENT * group**0.5 * _scale(case) * float(np.abs(d_scores * (k if name == "dq" else q)).max())


def _rows(case: Case, *arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays in float64 as [..., len, heads, dim], keys and values once for every query head; 0 for what is not
    finite."""
    rows = [np.nan_to_num(x.astype(np.float64), posinf=0, neginf=0) for x in arrays]
    if case.layout == "bhsd":
        rows = [x.swapaxes(-3, -2) for x in rows]
    return [x.repeat(case.heads // x.shape[-2], axis=-2) for x in rows]


def _scale(case: Case) -> float:
    return case.head_dim**-0.5 if case.scale is None else case.scale


def _cupy(arch: str, *dtypes: str) -> Backend:
    return Backend(
        name=f"cupy {arch}",
        array=to_cupy,
        numpy=lambda x: x.get(),
        dtypes=dtypes,
        marks=(pytest.mark.gpu,),
        memory=cupy_memory,
        forced_arch="" if arch == "native" else arch,
        arithmetic=tensor_core_error,
    )


def in_smallest_chunks(function: Callable[..., Any]) -> Callable[..., Any]:
    """A public function on the GPU with NumPy arrays, in as many chunks as there are: the limit is the first power of
    two that the call accepts."""

    def called(*arrays: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for exponent in range(-10, 10):
                patch.setenv("CUFLASH_HOST_CHUNK_MB", str(2.0**exponent))
                try:
                    return function(*arrays, backend="cuda", **options)
                except cuflash.UnsupportedError as error:
                    if "CUFLASH_HOST_CHUNK_MB allows" not in str(error):
                        raise
        raise AssertionError("no limit is large enough")

    return called


def to_torch(array: np.ndarray, device: str = "cpu") -> Any:
    """The same values as a torch tensor, in the same surroundings, at the same strides unless one is negative."""
    import torch

    if min(array.strides, default=0) < 0:
        array = np.ascontiguousarray(array)
    base = memory_of(array).ravel(order="K")
    offset = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // array.itemsize
    if array.dtype == ml_dtypes.bfloat16:
        memory = torch.from_numpy(base.view(np.int16)).view(torch.bfloat16)
    else:
        memory = torch.from_numpy(base)
    strides = [stride // array.itemsize for stride in array.strides]
    return memory.to(device).flatten().as_strided(array.shape, strides, offset if array.size else 0)


def from_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def torch_memory(tensor: Any) -> np.ndarray:
    return from_torch(tensor.new_empty(0).set_(tensor.untyped_storage()))


def autograd_forward(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """As a training step calls it."""
    return cuflash.flash_attention(*(x.detach().requires_grad_() for x in (q, k, v)), **options)


def autograd_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    accumulate: bool = False,
    memory: str = "fast",
    **options: Any,
) -> tuple[Any, ...]:
    """`flash_attention_backward` by torch's engine, which computes out and lse again and leaves sums to the caller."""
    import torch

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for name in ("sinks", "bias"):
        if options.get(name) is not None:
            options[name] = options[name].detach().requires_grad_()
            leaves.append(options[name])
    results = cuflash.flash_attention(*leaves[:3], return_lse=True, **options)
    used = 1 if dlse is None else 2
    gradients = torch.autograd.grad(results[:used], leaves, (dout, dlse)[:used])
    for target, gradient in zip((dq, dk, dv), gradients, strict=False):
        if target is not None:
            target.copy_(target + gradient if accumulate else gradient)
    given = (dq, dk, dv, None, None)
    return tuple(x if target is None else target for x, target in zip(gradients, given, strict=False))


def _torch(device: str, *, autograd: bool) -> Backend:
    gpu = device == "cuda"
    return Backend(
        name=f"torch {device}{' autograd' if autograd else ''}",
        array=lambda x: to_torch(x, device),
        numpy=from_torch,
        forward=autograd_forward if autograd else cuflash.flash_attention,
        backward=autograd_backward if autograd else cuflash.flash_attention_backward,
        dtypes=("float16", "bfloat16", "float32") if gpu else tuple(DTYPES),
        marks=(pytest.mark.gpu_adapter,) if gpu else (),
        memory=torch_memory,
        adapter=True,
        forced_arch="" if gpu else None,
        arithmetic=tensor_core_error if gpu else lambda case, inputs, name, oracle: 0.0,
    )


BACKENDS = [
    Backend(name="numpy", array=lambda x: x, numpy=lambda x: x, memory=memory_of),
    Backend(name="dlpack", array=DLPackArray, numpy=lambda x: x._array),
    _cupy("native", "float16", "bfloat16", "float32"),
    _cupy("sm_80", "float16", "bfloat16", "float32"),
    _cupy("sm_75", "float16"),
    Backend(
        name="numpy on cuda",
        array=lambda x: x,
        numpy=lambda x: x,
        forward=in_smallest_chunks(cuflash.flash_attention),
        backward=in_smallest_chunks(cuflash.flash_attention_backward),
        dtypes=("float16",),
        marks=(pytest.mark.gpu_adapter,),
        memory=memory_of,
        dense=False,
        forced_arch="",
        arithmetic=tensor_core_error,
    ),
]

if importlib.util.find_spec("torch") is not None:
    BACKENDS += [_torch(device, autograd=autograd) for device in ("cpu", "cuda") for autograd in (False, True)]
