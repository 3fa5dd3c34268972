"""Bad input: an error that names the argument, what it was and what is allowed, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.contract.backends import DLPackArray

BATCH, Q_LEN, KV_LEN, HEADS, KV_HEADS, DIM, DIM_V = 2, 5, 7, 4, 2, 8, 6


def array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.full(shape, 0.5, dtype)


def good_forward() -> dict[str, Any]:
    return {
        "q": array(BATCH, Q_LEN, HEADS, DIM),
        "k": array(BATCH, KV_LEN, KV_HEADS, DIM),
        "v": array(BATCH, KV_LEN, KV_HEADS, DIM_V),
    }


def good_packed() -> dict[str, Any]:
    return {
        "q": array(12, HEADS, DIM),
        "k": array(14, KV_HEADS, DIM),
        "v": array(14, KV_HEADS, DIM_V),
        "cu_seqlens_q": np.array([0, 5, 12], np.int32),
        "cu_seqlens_k": np.array([0, 7, 14], np.int32),
    }


def good_backward(forward: dict[str, Any]) -> dict[str, Any]:
    """The call whose forward this is, with arrays given for the gradients."""
    out, lse = cuflash.flash_attention(**forward, return_lse=True)
    given = {name: np.full_like(forward[name[1:]], np.nan) for name in ("dq", "dk", "dv")}
    return {**forward, "dout": np.ones_like(out), "out": out, "lse": lse, **given}


@dataclass(frozen=True)
class OtherDevice:
    """An array of another library on a device (Metal) that cuflash does not know."""

    shape: tuple[int, ...] = (BATCH, Q_LEN, HEADS, DIM)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("an array on another device is not to be read")


class Unexportable(DLPackArray):
    """An array that has `__dlpack__` and refuses, as one that requires gradients does."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("detach it first")


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


# (change of a good call, argument that is named, what it was, what is allowed, exception)
Row = tuple[dict[str, Any], str, str, str, type[Exception]]

BATCHED: list[Row] = [
    # what is not an array, or cannot be read
    ({"q": [[1.0]]}, "q", "list", "array", TypeError),
    ({"k": None}, "k", "None", "array", TypeError),
    ({"v": 3.0}, "v", "3.0", "array", TypeError),
    ({"q": Unexportable(array(BATCH, Q_LEN, HEADS, DIM))}, "q", "Unexportable", "__dlpack__", TypeError),
    ({"q": OtherDevice()}, "q", "OtherDevice", "CPU", cuflash.UnsupportedError),
    ({"alibi_slopes": [0.5] * HEADS}, "alibi_slopes", "list", "array", TypeError),
    ({"sinks": 0.0}, "sinks", "0.0", "array", TypeError),
    # rank and shape
    ({"q": array(Q_LEN, HEADS, DIM)}, "q", "(5, 4, 8)", "4 axes [batch, len, heads, head_dim]", ValueError),
    ({"k": array(1, 2, 3, 4, 5)}, "k", "(1, 2, 3, 4, 5)", "4 axes", ValueError),
    ({"v": array(3)}, "v", "(3,)", "4 axes", ValueError),
    ({"q": array(BATCH, Q_LEN, HEADS, 0)}, "q", "(2, 5, 4, 0)", "at least 1", ValueError),
    ({"q": array(BATCH, Q_LEN, 0, DIM)}, "q", "(2, 5, 0, 8)", "at least one head", ValueError),
    ({"k": array(3, KV_LEN, KV_HEADS, DIM)}, "k", "(3, 7, 2, 8)", "(2, 5, 4, 8)", ValueError),
    ({"k": array(BATCH, KV_LEN, KV_HEADS, 9)}, "k", "(2, 7, 2, 9)", "(2, 5, 4, 8)", ValueError),
    ({"k": array(BATCH, KV_LEN, 3, DIM)}, "k", "3", "divides q's 4", ValueError),
    ({"k": array(BATCH, KV_LEN, 0, DIM)}, "k", "0", "divides q's 4", ValueError),
    ({"v": array(BATCH, 6, KV_HEADS, DIM_V)}, "v", "(2, 6, 2, 6)", "(2, 7, 2, 8)", ValueError),
    ({"v": array(BATCH, KV_LEN, 1, DIM_V)}, "v", "(2, 7, 1, 6)", "(2, 7, 2, 8)", ValueError),
    ({"v": array(1, KV_LEN, KV_HEADS, DIM_V)}, "v", "(1, 7, 2, 6)", "(2, 7, 2, 8)", ValueError),
    ({"v": array(BATCH, KV_LEN, KV_HEADS, 0)}, "v", "(2, 7, 2, 0)", "(2, 7, 2, 8)", ValueError),
    ({"layout": "bhsd"}, "k", "(2, 7, 2, 8)", "divides q's 5", ValueError),
    # dtype
    ({"q": array(BATCH, Q_LEN, HEADS, DIM, dtype=np.int32)}, "q", "int32", "float16", TypeError),
    ({"q": array(BATCH, Q_LEN, HEADS, DIM, dtype=np.complex64)}, "q", "complex64", "float32", TypeError),
    ({"q": array(BATCH, Q_LEN, HEADS, DIM, dtype=">f4")}, "q", ">f4", "float32", TypeError),
    ({"q": array(BATCH, Q_LEN, HEADS, DIM, dtype=object)}, "q", "object", "float32", TypeError),
    ({"k": array(BATCH, KV_LEN, KV_HEADS, DIM, dtype=np.float64)}, "k", "float64", "float32", TypeError),
    ({"v": array(BATCH, KV_LEN, KV_HEADS, DIM_V, dtype=np.float16)}, "v", "float16", "float32", TypeError),
    # strides
    ({"q": array(BATCH, Q_LEN, HEADS, 2 * DIM)[..., ::2]}, "q", "strides", "contiguous", ValueError),
    ({"k": array(BATCH, KV_LEN, KV_HEADS, DIM)[..., ::-1]}, "k", "strides", "contiguous", ValueError),
    ({"v": array(BATCH, DIM_V, KV_HEADS, KV_LEN).swapaxes(1, 3)}, "v", "strides", "contiguous", ValueError),
    # options
    ({"causal": 1}, "causal", "1", "True or False", TypeError),
    ({"causal": None}, "causal", "None", "True or False", TypeError),
    ({"causal": "yes"}, "causal", "'yes'", "True or False", TypeError),
    ({"causal": np.ones(2, bool)}, "causal", "True", "True or False", TypeError),
    ({"deterministic": 1}, "deterministic", "1", "True or False", TypeError),
    ({"allow_tf32": 1}, "allow_tf32", "1", "True or False", TypeError),
    ({"window_size": 5}, "window_size", "5", "(left, right)", TypeError),
    ({"window_size": (1, 2, 3)}, "window_size", "(1, 2, 3)", "(left, right)", TypeError),
    ({"window_size": [1.5, 0]}, "window_size", "1.5", "integer >= 0", TypeError),
    ({"window_size": (0, "1")}, "window_size", "'1'", "integer >= 0", TypeError),
    ({"window_size": (True, 0)}, "window_size", "True", "integer >= 0", TypeError),
    ({"window_size": (-1, 0)}, "window_size", "-1", "integer >= 0", ValueError),
    ({"window_size": (None, -2)}, "window_size", "-2", "integer >= 0", ValueError),
    ({"scale": math.nan}, "scale", "nan", "finite", ValueError),
    ({"scale": -math.inf}, "scale", "-inf", "finite", ValueError),
    ({"scale": "1"}, "scale", "'1'", "finite", TypeError),
    ({"scale": 1j}, "scale", "1j", "finite", TypeError),
    ({"softcap": 0.0}, "softcap", "0.0", "positive", ValueError),
    ({"softcap": -1}, "softcap", "-1", "positive", ValueError),
    ({"softcap": math.nan}, "softcap", "nan", "finite", ValueError),
    ({"softcap": math.inf}, "softcap", "inf", "finite", ValueError),
    ({"softcap": [30.0]}, "softcap", "[30.0]", "positive", TypeError),
    ({"alibi_slopes": array(3)}, "alibi_slopes", "(3,)", "(4,) or (2, 4)", ValueError),
    ({"alibi_slopes": array(HEADS, BATCH)}, "alibi_slopes", "(4, 2)", "(4,) or (2, 4)", ValueError),
    ({"alibi_slopes": array(HEADS, dtype=int)}, "alibi_slopes", "int64", "float32", TypeError),
    ({"sinks": array(BATCH, HEADS)}, "sinks", "(2, 4)", "(4,)", ValueError),
    ({"sinks": array(HEADS, dtype=np.float16)}, "sinks", "float16", "float32", TypeError),
    ({"dropout_p": 1.0, "seed": 1}, "dropout_p", "1.0", "[0, 1)", ValueError),
    ({"dropout_p": -0.1, "seed": 1}, "dropout_p", "-0.1", "[0, 1)", ValueError),
    ({"dropout_p": math.nan, "seed": 1}, "dropout_p", "nan", "[0, 1)", ValueError),
    ({"dropout_p": None, "seed": 1}, "dropout_p", "None", "[0, 1)", TypeError),
    ({"dropout_p": 0.1}, "seed", "None", "[0, 2**64)", ValueError),
    ({"dropout_p": 0.1, "seed": -1}, "seed", "-1", "[0, 2**64)", ValueError),
    ({"dropout_p": 0.1, "seed": 2**64}, "seed", str(2**64), "[0, 2**64)", ValueError),
    ({"dropout_p": 0.1, "seed": 1.0}, "seed", "1.0", "[0, 2**64)", TypeError),
    ({"dropout_p": 0.1, "seed": True}, "seed", "True", "[0, 2**64)", TypeError),
    ({"layout": "sbhd"}, "layout", "'sbhd'", "bhsd", ValueError),
    ({"layout": None}, "layout", "None", "bhsd", ValueError),
    ({"layout": ["bshd"]}, "layout", "['bshd']", "bhsd", ValueError),
    ({"backend": "torch"}, "backend", "'torch'", "cuda", ValueError),
    # sequences
    ({"cu_seqlens_q": np.array([0, 5])}, "cu_seqlens_k", "None", "both or neither", ValueError),
    ({"cu_seqlens_k": np.array([0, 5])}, "cu_seqlens_q", "None", "both or neither", ValueError),
]

SEQUENCES: list[Row] = [
    ({"q": array(BATCH, Q_LEN, HEADS, DIM)}, "q", "(2, 5, 4, 8)", "3 axes [len, heads, head_dim]", ValueError),
    ({"cu_seqlens_q": [0, 5, 12]}, "cu_seqlens_q", "list", "array", TypeError),
    ({"cu_seqlens_q": array(3)}, "cu_seqlens_q", "float32", "int32", TypeError),
    ({"cu_seqlens_k": np.array([0, 7, 14], np.uint8)}, "cu_seqlens_k", "uint8", "int32", TypeError),
    ({"cu_seqlens_q": np.array([[0, 5, 12]])}, "cu_seqlens_q", "(1, 3)", "one axis", ValueError),
    ({"cu_seqlens_q": np.array([], int)}, "cu_seqlens_q", "(0,)", "one axis", ValueError),
    ({"cu_seqlens_k": np.array([0, 7])}, "cu_seqlens_k", "(2,)", "(3,)", ValueError),
    ({"cu_seqlens_q": np.array([0, 13, 12])}, "cu_seqlens_q", "12 after 13", "never decrease", ValueError),
    ({"cu_seqlens_k": np.array([0, -1, 14])}, "cu_seqlens_k", "-1 after 0", "never decrease", ValueError),
    ({"cu_seqlens_q": np.array([1, 5, 12])}, "cu_seqlens_q", "1", "start at 0", ValueError),
    ({"cu_seqlens_q": np.array([0, 5, 13])}, "cu_seqlens_q", "13", "12", ValueError),
    ({"cu_seqlens_k": np.array([0, 7, 2**40])}, "cu_seqlens_k", str(2**40), "14", ValueError),
    ({"alibi_slopes": array(3, HEADS)}, "alibi_slopes", "(3, 4)", "(4,) or (2, 4)", ValueError),
]

BACKWARD: list[Row] = [
    ({"dout": None}, "dout", "None", "array", TypeError),
    ({"dout": array(BATCH, Q_LEN, HEADS, DIM)}, "dout", "(2, 5, 4, 8)", "(2, 5, 4, 6)", ValueError),
    ({"dout": array(BATCH, Q_LEN, HEADS, DIM_V, dtype=np.float64)}, "dout", "float64", "float32", TypeError),
    ({"dout": array(BATCH, Q_LEN, HEADS, 12)[..., ::2]}, "dout", "strides", "contiguous", ValueError),
    ({"out": array(BATCH, HEADS, Q_LEN, DIM_V)}, "out", "(2, 4, 5, 6)", "(2, 5, 4, 6)", ValueError),
    ({"out": array(BATCH, Q_LEN, HEADS, DIM_V, dtype=np.float16)}, "out", "float16", "float32", TypeError),
    ({"lse": None}, "lse", "None", "array", TypeError),
    ({"lse": array(BATCH, Q_LEN, HEADS)}, "lse", "(2, 5, 4)", "(2, 4, 5)", ValueError),
    ({"lse": array(BATCH, HEADS, Q_LEN, dtype=np.float64)}, "lse", "float64", "float32", TypeError),
    ({"dlse": array(BATCH, HEADS, Q_LEN, 1)}, "dlse", "(2, 4, 5, 1)", "(2, 4, 5)", ValueError),
    ({"dlse": array(BATCH, HEADS, Q_LEN, dtype=np.float16)}, "dlse", "float16", "float32", TypeError),
    ({"dq": [0.0]}, "dq", "list", "array", TypeError),
    ({"dq": array(BATCH, Q_LEN, KV_HEADS, DIM)}, "dq", "(2, 5, 2, 8)", "(2, 5, 4, 8)", ValueError),
    ({"dk": array(BATCH, KV_LEN, HEADS, DIM)}, "dk", "(2, 7, 4, 8)", "(2, 7, 2, 8)", ValueError),
    ({"dv": array(BATCH, KV_LEN, KV_HEADS, DIM)}, "dv", "(2, 7, 2, 8)", "(2, 7, 2, 6)", ValueError),
    ({"dq": array(BATCH, Q_LEN, HEADS, DIM, dtype=np.int32)}, "dq", "int32", "float32", TypeError),
    ({"dk": array(BATCH, KV_LEN, KV_HEADS, DIM, dtype=np.float16)}, "dk", "float16", "float32", TypeError),
    ({"dv": array(BATCH, KV_LEN, KV_HEADS, 12)[..., ::2]}, "dv", "strides", "contiguous", ValueError),
    ({"dq": read_only(array(BATCH, Q_LEN, HEADS, DIM))}, "dq", "read-only", "writable", ValueError),
    ({"dk": read_only(array(BATCH, KV_LEN, KV_HEADS, DIM))}, "dk", "read-only", "writable", ValueError),
    ({"dq": None, "accumulate": True}, "dq", "None", "all three", ValueError),
    ({"dv": None, "accumulate": True}, "dv", "None", "all three", ValueError),
    ({"accumulate": 1}, "accumulate", "1", "True or False", TypeError),
    ({"memory": "none"}, "memory", "'none'", "lean", ValueError),
    ({"memory": ["fast"]}, "memory", "['fast']", "lean", ValueError),
]


def assert_names(message: str, argument: str, was: str, allowed: str) -> None:
    assert argument in message.split(":")[0].split(), f"does not name {argument}: {message}"
    assert was in message, f"does not say that it was {was}: {message}"
    assert allowed in message, f"does not say that {allowed} is allowed: {message}"
    assert message.index(argument) <= message.index(was)


def check(function: Any, arguments: dict[str, Any], row: Row) -> None:
    """The call with the row's change raises what the row says and writes to none of its arrays."""
    change, argument, was, allowed, exception = row
    arguments = arguments | change
    before = {name: x.tobytes() for name, x in arguments.items() if isinstance(x, np.ndarray)}
    with pytest.raises(exception) as caught:
        function(**arguments)
    assert type(caught.value) is exception
    assert_names(str(caught.value), argument, was, allowed)
    after = {name: x.tobytes() for name, x in arguments.items() if isinstance(x, np.ndarray)}
    assert after == before


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[1]} {row[2]}") for row in BATCHED])
def test_batched(row: Row):
    check(cuflash.flash_attention, good_forward(), row)
    check(cuflash.flash_attention_backward, good_backward(good_forward()), row)


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[1]} {row[2]}") for row in SEQUENCES])
def test_packed(row: Row):
    check(cuflash.flash_attention, good_packed(), row)
    check(cuflash.flash_attention_backward, good_backward(good_packed()), row)


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[1]} {row[2]}") for row in BACKWARD])
def test_backward(row: Row):
    check(cuflash.flash_attention_backward, good_backward(good_forward()), row)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_return_lse(value: Any):
    row = ({"return_lse": value}, "return_lse", repr(value), "True or False", TypeError)
    check(cuflash.flash_attention, good_forward(), row)


def test_given_gradient_that_overlaps_itself():
    dk = np.lib.stride_tricks.as_strided(array(KV_LEN, KV_HEADS, DIM), (BATCH, KV_LEN, KV_HEADS, DIM), (0, 64, 32, 4))
    row = ({"dk": dk}, "dk", "strides (0, 16, 8, 1)", "do not overlap", ValueError)
    check(cuflash.flash_attention_backward, good_backward(good_forward()), row)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "out"])
def test_given_gradient_in_an_inputs_memory(name: str):
    forward = good_forward() | {"v": array(BATCH, KV_LEN, KV_HEADS, DIM)}
    backward = good_backward(forward)
    target = "dq" if backward["dq"].shape == backward[name].shape else "dk"
    row = ({target: backward[name]}, target, name, "memory that no input uses", ValueError)
    check(cuflash.flash_attention_backward, backward, row)


def test_two_gradients_in_one_array():
    forward = good_forward() | {"v": array(BATCH, KV_LEN, KV_HEADS, DIM)}
    backward = good_backward(forward)
    row = ({"dv": backward["dk"]}, "dv", "dk", "memory", ValueError)
    check(cuflash.flash_attention_backward, backward, row)


def test_positional_options_are_refused():
    with pytest.raises(TypeError, match="positional"):
        cuflash.flash_attention(*good_forward().values(), True)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="is_causal"):
        cuflash.flash_attention(**good_forward(), is_causal=True)


@pytest.mark.parametrize("good", [good_forward, good_packed])
def test_the_good_calls_are_good(good: Any):
    """Otherwise the tables above would show nothing."""
    backward = good_backward(good())
    cuflash.flash_attention_backward(**backward)
    assert all(np.isfinite(backward[name]).all() for name in ("dq", "dk", "dv"))
