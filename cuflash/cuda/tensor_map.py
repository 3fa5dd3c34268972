"""Tensor maps: what a tile copy of Hopper (TMA) must know of a tensor, encoded by the driver and passed by value.

A tensor [batch, len, heads, dim] of a 16-bit dtype is described as [batch, heads, dim / 64, len, 64], the last axis
first in the driver's order, so that one copy loads a tile of rows as panels of 64 elements, 128 bytes a row, swizzled
by 128 bytes, as wgmma reads them. Where dim is not a multiple of 64 that split would reach into the next head, so the
map is [batch, heads, len, dim] and a copy loads one panel. Rows beyond `len` and columns beyond `dim` are loaded as
zeros. Of a packed tensor [total, heads, dim] rows beyond a sequence's end must be zeros too, whichever sequence: three
of the map's axes step along the rows, as cuda_src/tma.cuh explains, whose twin this is. (The idea of a bound that moves
with an offset is that of the ragged descriptors of Triton's tools.)
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

from cuflash.arrays import Signature, dtype_of
from cuflash.errors import UnsupportedError

_PANEL = 64  # elements of a 128-byte row
_SOMEWHERE = 2**20  # an aligned address, until `point` gives the array's own
_RAGGED = 2**30  # the axis of rows of a packed tensor's map
_ANYWHERE = 2**31 - 2**16  # the length of an axis that bounds nothing


def expressible(array: Signature) -> bool:
    """Whether a map can describe an aligned array [batch, len, heads, dim] or [total, heads, dim]: its strides are
    positive multiples of 16.

    Axes of length 1 are never stepped along, so their stride does not matter.
    """
    itemsize = dtype_of(array.dtype).itemsize
    if array.shape[-1] * itemsize % 16:
        return False
    largest = 2**40 if len(array.shape) == 4 else 2**34
    steps = zip(array.strides[:-1], array.shape[:-1], strict=True)
    return all(
        length == 1 or (stride * itemsize % 16 == 0 and 0 < stride * itemsize < largest) for stride, length in steps
    )


class Description(NamedTuple):
    """A map but for the address: the axes in the driver's order, the last axis of the array first."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, of all axes but the first, which is contiguous
    box: tuple[int, ...]  # what one copy loads


def describe(array: Signature, rows: int) -> Description:
    """The map of tiles of `rows` rows of an expressible array [batch, len, heads, dim] or [total, heads, dim]."""
    *batch, length, heads, dim = array.shape
    *batch_stride, row_stride, head_stride = (
        2 * int(stride) if count > 1 else 2 * dim
        for stride, count in zip(array.strides[:-1], array.shape[:-1], strict=True)
    )
    if not batch:
        return Description(
            dtype=array.dtype,
            shape=(dim, _RAGGED, heads, _ANYWHERE, _ANYWHERE),
            strides=(row_stride, head_stride, row_stride, 2**64 // _RAGGED - row_stride),
            box=(_PANEL, rows, 1, 1, 1),
        )
    if dim % _PANEL == 0:
        return Description(
            dtype=array.dtype,
            shape=(_PANEL, length, dim // _PANEL, heads, *batch),
            strides=(row_stride, 2 * _PANEL, head_stride, *batch_stride),
            box=(_PANEL, rows, dim // _PANEL, 1, 1),
        )
    return Description(
        dtype=array.dtype,
        shape=(dim, length, heads, *batch),
        strides=(row_stride, head_stride, *batch_stride),
        box=(_PANEL, rows, 1, 1),
    )


def encode(array: Signature, rows: int) -> bytes:
    """The map that `describe` describes, 128 bytes; `point` says where the array lies."""
    driver = _driver()
    _, shape, strides, box = describe(array, rows)
    kinds = driver.CUtensorMapDataType
    integer, wide = driver.cuuint32_t, driver.cuuint64_t
    status, encoded = driver.cuTensorMapEncodeTiled(
        kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if array.dtype == "float16" else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(shape),
        _SOMEWHERE,
        [wide(x) for x in shape],
        [wide(x) for x in strides],
        [integer(x) for x in box],
        [integer(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status) != 0:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {status} for {array}, {rows} rows")
    return b"".join(int(word).to_bytes(8, sys.byteorder) for word in encoded.opaque)


def at(address: int) -> Any:
    """The map that lies at an address, as `point` takes it."""
    return _driver().CUtensorMap(_ptr=address)


def point(tensor_map: Any, address: int) -> None:
    """Let a map describe the same layout at another address, a multiple of 16."""
    driver = _driver()
    (status,) = driver.cuTensorMapReplaceAddress(tensor_map, address)
    if status is not driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuTensorMapReplaceAddress: {status} for address {address:#x}")


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnsupportedError(
            "the Hopper kernels need cuda.bindings: pip install 'cuflash[cuda13]' (or cuda12), or set "
            "CUFLASH_FORCE_ARCH=sm_89 for the portable kernels"
        ) from error
    return driver
