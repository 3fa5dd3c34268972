"""Each header of Hopper primitives, by a small kernel against NumPy: products, tensor copies, barriers."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash import arrays
from cuflash.spec import Spec, Tile

pytestmark = pytest.mark.gpu
SOURCES = Path(__file__).resolve().parents[2] / "cuda_src"
KERNELS = Path(__file__).with_name("primitives.cu")
DTYPES, DIMS, COLS = ("float16", "bfloat16"), (64, 128, 192, 256), (32, 64, 80, 96, 112, 128)


@pytest.fixture
def cp() -> Any:
    import cupy

    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("no Hopper GPU")
    return cupy


@pytest.fixture(scope="module")
def compiled_primitives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The sources with primitives.cu among them, and its variants compiled in parallel."""
    from cuflash.cuda import jit
    from cuflash.cuda.precompile import precompile

    folder = tmp_path_factory.mktemp("primitives") / "sources"
    shutil.copytree(SOURCES, folder)
    shutil.copy(KERNELS, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "_source_folder", lambda: folder)
        outcome = precompile(_variant(*variant) for variant in product(DTYPES, DIMS, COLS))
        assert not outcome.failed, outcome.failed[0]
        yield


def _variant(dtype: str, head_dim: int, cols: int) -> Any:
    from cuflash.cuda.toolchain import Target

    spec = Spec(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim)
    return "primitives", spec, Tile(rows=64, cols=cols, stages=3), Target.named("sm_90a")


@pytest.fixture
def kernel(cp: Any, compiled_primitives: None) -> Any:
    """One kernel of primitives.cu: (entry, dtype, head_dim, cols) -> function."""
    from cuflash.cuda import jit

    def load(entry: str, *variant: Any) -> Any:
        function = jit.kernel(*_variant(*variant), entry)
        cp.cuda.driver.funcSetAttribute(function.ptr, 8, 200_000)  # dynamic shared memory
        return function

    return load


def _map(array: Any, rows: int) -> np.ndarray:
    """The tensor map of an array as a kernel's argument."""
    from cuflash.cuda import tensor_map

    memory = ctypes.create_string_buffer(192)
    address = -(-ctypes.addressof(memory) // 64) * 64
    ctypes.memmove(address, tensor_map.encode(arrays.signature(array), rows), 128)
    tensor_map.point(tensor_map.at(address), array.data.ptr)
    return np.frombuffer(ctypes.string_at(address, 128), dtype="V128")


def _whole_numbers(cp: Any, *shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    """Small whole numbers, whose products and sums are exact."""
    return cp.asarray(np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dim", DIMS)
def test_product_of_shared_operands(cp: Any, kernel: Any, dim: int, cols: int, dtype: str) -> None:
    a = _whole_numbers(cp, 1, 64, 1, dim, dtype=dtype)
    b = _whole_numbers(cp, 1, cols, 1, dim, dtype=dtype, seed=1)
    found = cp.full((64, cols), np.nan, np.float32)
    kernel("product_of_shared", dtype, dim, cols)((1, 1, 1), (128, 1, 1), [_map(a, 64), _map(b, cols), found], 180_000)
    left, right = (cp.asnumpy(x).astype(np.float64)[0, :, 0] for x in (a, b))
    np.testing.assert_array_equal(cp.asnumpy(found), left @ right.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dim", DIMS)
def test_product_of_registers_and_a_transposed_operand(cp: Any, kernel: Any, dim: int, cols: int, dtype: str) -> None:
    a = _whole_numbers(cp, 64, cols)
    b = _whole_numbers(cp, 1, cols, 1, dim, dtype=dtype, seed=1)
    found = cp.full((64, dim), np.nan, np.float32)
    kernel("product_of_registers", dtype, dim, cols)((1, 1, 1), (128, 1, 1), [a, _map(b, cols), found], 180_000)
    right = cp.asnumpy(b).astype(np.float64)[0, :, 0]
    np.testing.assert_array_equal(cp.asnumpy(found), cp.asnumpy(a).astype(np.float64) @ right)


def _swizzled(tile: np.ndarray) -> np.ndarray:
    """A tile [rows, dim] of 16-bit elements as TMA lays it down: panels of 64 columns, 128 bytes a row, whose 16-byte
    chunks are exchanged by the row's number modulo 8."""
    rows, dim = tile.shape
    chunks = tile.reshape(rows, dim // 64, 8, 8).transpose(1, 0, 2, 3)
    row, chunk = np.arange(rows)[:, None], np.arange(8)[None]
    return chunks[:, row, chunk ^ row % 8]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("row", [0, 40, 90])
def test_tile_load_is_swizzled_and_padded(cp: Any, kernel: Any, row: int, dim: int) -> None:
    cols, length = 64, 100
    bits = np.random.default_rng(0).integers(1, 2**16, (2, length, 3, dim)).astype(np.uint16)
    array = cp.asarray(bits).view(np.float16)
    found = cp.zeros((dim // 64, cols, 8, 8), np.uint16)
    kernel("load_tile", "float16", dim, cols)((1, 1, 1), (64, 1, 1), [_map(array, cols), np.int32(row), found], 60_000)
    expected = np.zeros((cols, dim), np.uint16)
    inside = bits[1, row : row + cols, 1]
    expected[: len(inside)] = inside
    np.testing.assert_array_equal(cp.asnumpy(found), _swizzled(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("row", [0, 16, 90])
def test_tile_store_leaves_out_what_is_beyond(cp: Any, kernel: Any, row: int, dim: int, dtype: str) -> None:
    values = _whole_numbers(cp, 16, dim)
    array = cp.asarray(np.full((2, 100, 3, dim), 9, dtype))
    kernel("store_tile", dtype, dim, 64)((1, 1, 1), (32, 1, 1), [values, _map(array, 16), np.int32(row)], 60_000)
    expected = np.full(array.shape, 9.0)
    expected[1, row : row + 16, 1] = cp.asnumpy(values)[: 100 - row]
    np.testing.assert_array_equal(cp.asnumpy(array).astype(np.float64), expected)


def test_bulk_addition(cp: Any, kernel: Any) -> None:
    x, y = _whole_numbers(cp, 1024), _whole_numbers(cp, 1024, seed=1)
    expected = cp.asnumpy(x) + 7 * cp.asnumpy(y)
    kernel("add_in_bulk", "float16", 64, 64)((7, 1, 1), (64, 1, 1), [x, y], 8192)
    np.testing.assert_array_equal(cp.asnumpy(x), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 1000])
def test_ring_of_barriers(cp: Any, kernel: Any, count: int) -> None:
    found = cp.zeros(3, np.int32)
    kernel("pass_through_ring", "float16", 64, 64)((1, 1, 1), (128, 1, 1), [np.int32(count), found], 1024)
    assert cp.asnumpy(found).tolist() == [count * (count - 1) // 2] * 3


def test_vote_of_a_named_barrier(cp: Any, kernel: Any) -> None:
    who = [-1, -1, 0, 127, -1, 64, 31, -1, -1, 100, 3, -1]
    found = cp.full(len(who), 7, np.int32)
    arguments = [cp.asarray(who, np.int32), np.int32(len(who)), found]
    kernel("vote", "float16", 64, 64)((1, 1, 1), (128, 1, 1), arguments, 0)
    assert cp.asnumpy(found).tolist() == [int(x < 0) for x in who]
