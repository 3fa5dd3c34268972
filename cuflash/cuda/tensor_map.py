"""Tensor maps: what a tile copy of Hopper (TMA) must know of a tensor, encoded by the driver and passed by value.

A tensor [batch, len, heads, dim] of a 16-bit dtype is described as [batch, heads, dim / 64, len, 64], the last axis
first in the driver's order, so that one copy loads a tile of rows as panels of 64 elements, 128 bytes a row, swizzled
by 128 bytes, as wgmma reads them. Where dim is not a multiple of 64 that split would reach into the next head, so the
map is [batch, heads, len, dim] and a copy loads one panel. Rows beyond `len` and columns beyond `dim` are loaded as
zeros. The twin of cuda_src/tma.cuh.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuflash.errors import UnsupportedError

_PANEL = 64  # elements of a 128-byte row


def expressible(array: Any) -> bool:
    """Whether a map can describe an array [batch, len, heads, dim]: aligned, and strides that are positive.

    Axes of length 1 are never stepped along, so their stride does not matter.
    """
    if array.ndim != 4 or array.data.ptr % 16 or array.shape[-1] * array.itemsize % 16:
        return False
    steps = zip(array.strides[:-1], array.shape[:-1], strict=True)
    return all(length == 1 or (stride % 16 == 0 and 0 < stride < 2**40) for stride, length in steps)


def tile_map(array: Any, rows: int) -> np.ndarray:
    """The map of tiles of `rows` rows of an expressible array, as a NumPy array of one element of 128 bytes."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnsupportedError(
            "the Hopper kernels need cuda.bindings: pip install 'cuflash[cuda13]' (or cuda12), or set "
            "CUFLASH_FORCE_ARCH=sm_89 for the portable kernels"
        ) from error
    batch, length, heads, dim = array.shape
    batch_stride, row_stride, head_stride = (
        stride if count > 1 else 2 * dim for stride, count in zip(array.strides[:-1], array.shape[:-1], strict=True)
    )
    if dim % _PANEL == 0:
        shape = (_PANEL, length, dim // _PANEL, heads, batch)
        strides = (row_stride, 2 * _PANEL, head_stride, batch_stride)
        box = (_PANEL, rows, dim // _PANEL, 1, 1)
    else:
        shape = (dim, length, heads, batch)
        strides = (row_stride, head_stride, batch_stride)
        box = (_PANEL, rows, 1, 1)
    kinds = driver.CUtensorMapDataType
    integer, wide = driver.cuuint32_t, driver.cuuint64_t
    status, encoded = driver.cuTensorMapEncodeTiled(
        kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if array.dtype == np.float16 else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(shape),
        array.data.ptr,
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
        raise RuntimeError(
            f"cuTensorMapEncodeTiled: {status} for {array.dtype} {array.shape}, strides {array.strides}, {rows} rows"
        )
    return np.array([int(word) for word in encoded.opaque], dtype=np.uint64).view("V128")
