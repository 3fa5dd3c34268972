"""Plans: made once for equal signatures and options, and what they say of a call."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

from cuflash import arrays, plans, tuning
from cuflash.arrays import Signature
from cuflash.cuda import launch
from cuflash.cuda.toolchain import KernelCompileError, Target

OPTIONS = (False, None, None, None, 0.0, False, False, False, "bshd", None)


def _signature(*shape: int, dtype: str = "float32") -> Signature:
    return arrays.signature(np.zeros(shape, dtype))


def _inputs(layout: str = "bshd") -> list[Any]:
    q, k, v = (2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 8)
    if layout == "bhsd":
        q, k, v = ((b, h, n, d) for b, n, h, d in (q, k, v))
    return [_signature(*q), _signature(*k), _signature(*v), *(None,) * 6]


def test_equal_calls_share_a_plan() -> None:
    assert plans.forward(*_inputs(), *OPTIONS) is plans.forward(*_inputs(), *OPTIONS)
    causal = (True, *OPTIONS[1:])
    assert plans.forward(*_inputs(), *causal) is not plans.forward(*_inputs(), *OPTIONS)


def test_an_option_of_another_type_is_not_taken_for_one_that_equals_it() -> None:
    plans.forward(*_inputs(), *OPTIONS)
    with pytest.raises(TypeError, match="causal: got 0"):
        plans.forward(*_inputs(), 0, *OPTIONS[1:])


def test_an_option_that_cannot_be_remembered_is_named() -> None:
    with pytest.raises(TypeError, match="scale: got"):
        plans.forward(*_inputs(), False, None, [1.0], *OPTIONS[3:])


def test_results_are_new_arrays_in_the_callers_layout() -> None:
    plan = plans.forward(*_inputs("bhsd"), *OPTIONS[:-2], "bhsd", None)
    assert (plan.out.shape, plan.out.strides) == ((2, 4, 5, 8), (160, 40, 8, 1))
    assert (plan.lse.shape, plan.lse.strides) == ((2, 4, 5), (20, 5, 1))
    assert plan.problem.statistics == 40


def test_gradients_look_like_the_inputs_unless_given() -> None:
    inputs = _inputs()
    inputs[plans.INPUTS.index("sinks")], inputs[plans.INPUTS.index("bias")] = _signature(4), _signature(5, 7)
    forward = plans.forward(*inputs, *OPTIONS)
    given = _signature(2, 5, 4, 16, dtype="float32")._replace(strides=(640, 128, 32, 1))
    plan = plans.backward(
        forward.out, forward.out, forward.lse, None, given, None, None, *inputs, False, "lean", True, *OPTIONS
    )
    assert plan.lean
    assert plan.gradients["dq"] is given
    assert plan.gradients["dk"] == inputs[1]
    assert plan.gradients["dsinks"].shape == (4,)
    assert plan.gradients["dbias"].shape == (5, 7)


def test_a_bias_and_a_mask_have_four_axes_of_stride_0_where_they_are_broadcast() -> None:
    array = Signature((4, 1, 7), (7, 3, 1), "float32", "cuda:0", True)
    seen = plans.four_axes(array)
    assert (seen.shape, seen.strides) == ((1, 4, 1, 7), (0, 7, 0, 1))
    assert plans.four_axes(array._replace(shape=(), strides=())).strides == (0, 0, 0, 0)


def test_head_major_tensors_are_seen_head_minor() -> None:
    array = Signature((2, 4, 5, 8), (160, 40, 8, 1), "float16", "cuda:0", True)
    seen = plans.head_minor(array, True)
    assert (seen.shape, seen.strides) == ((2, 5, 4, 8), (160, 8, 40, 1))
    assert plans.head_minor(array, False) is array


def test_arguments_of_a_launch_lie_where_the_driver_looks() -> None:
    pytest.importorskip("cuda.bindings")
    from cuflash.cuda import launch

    params, maps = bytes(range(200)), [b"a" * 128, b"b" * 128]
    arguments = launch._Arguments(params, maps)
    places = (ctypes.c_void_p * 3).from_address(arguments.address)
    assert all(place % 64 == 0 for place in places)
    assert [ctypes.string_at(place, n) for place, n in zip(places, (200, 128, 128), strict=True)] == [params, *maps]
    arguments.words[3] = 2**64 - 1
    assert ctypes.string_at(places[0] + 24, 8) == b"\xff" * 8
    assert [tensor_map.getPtr() for tensor_map in arguments.maps] == list(places)[1:]


def test_what_tensor_maps_can_express() -> None:
    pytest.importorskip("cuda.bindings")
    from cuflash.cuda import tensor_map

    dense = Signature((2, 5, 4, 64), (1280, 256, 64, 1), "bfloat16", "cuda:0", True)
    assert tensor_map.expressible(dense)
    for other in (
        dense._replace(shape=(2, 5, 4, 60)),
        dense._replace(strides=(1284, 256, 64, 1)),
        dense._replace(strides=(0, 256, 64, 1)),
        dense._replace(strides=(-1280, 256, 64, 1)),
        dense._replace(shape=(5, 4, 64), strides=(2**33, 64, 1)),
    ):
        assert not tensor_map.expressible(other)
    assert tensor_map.expressible(dense._replace(shape=(1, 5, 4, 64), strides=(0, 256, 64, 1)))
    assert tensor_map.expressible(dense._replace(shape=(5, 4, 64), strides=(256, 64, 1)))


@pytest.mark.parametrize("stride", [256, 96, 2**32])
def test_the_map_of_packed_sequences_ends_with_each(stride: int) -> None:
    from cuflash.cuda import tensor_map

    array = Signature((1000, 4, 24), (stride, 24, 1), "bfloat16", "cuda:0", True)
    _, shape, strides, box = tensor_map.describe(array, 128)
    assert box == (64, 128, 1, 1, 1)
    end = shape[1]
    for start, length, row in ((0, 7, 0), (7, 300, 299), (307, 693, 128)):
        # The coordinates of Sequence::q_row and q_place, and that of the outermost axis, in cuda_src.
        coordinates = (end - length + row, 3, start + length, end)
        assert all(x < n for x, n in zip(coordinates, shape[1:], strict=True))
        address = sum(x * step for x, step in zip(coordinates, strides, strict=True)) % 2**64
        assert address == 2 * ((start + row) * stride + 3 * 24)


@pytest.mark.parametrize("option", [None, "sinks", "bias"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_forward_with_lse_begins_to_compile_its_backward(
    arch: str, option: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [_signature(2, 5, 4, 16, dtype="float16"), *[_signature(2, 7, 2, 16, dtype="float16")] * 2, *(None,) * 6]
    if option is not None:
        inputs[plans.INPUTS.index(option)] = _signature(*{"sinks": (4,), "bias": (5, 7)}[option])
    inputs = [array and array._replace(device="cuda:0") for array in inputs]
    target = Target.named(arch)
    machine = launch.Machine(target, 132, tuning.SHARED_MEMORY[target.path])
    begun: list[Any] = []

    def compile_it(*job: Any) -> bytes:
        begun.append(job)
        raise KernelCompileError("for the backward to raise")

    monkeypatch.setattr(launch, "machine", lambda device: machine)
    monkeypatch.setattr(launch, "plan", lambda *_, **__: None)
    monkeypatch.setattr(launch.jit, "cubin", compile_it)
    launch._begin_to_compile.cache_clear()
    plans.forget()
    forward = plans.forward(*inputs, *OPTIONS)
    forward.launches(True)
    assert not begun
    forward._launches.clear()
    forward.launches(True, backward_too=True)
    for thread in threading.enumerate():
        if thread.name.startswith("cuflash "):
            thread.join()
    backward = plans.backward(
        forward.out, forward.out, forward.lse, None, None, None, None, *inputs, False, "fast", True, *OPTIONS
    )
    steps, _ = backward.steps(machine)
    assert sorted(map(str, begun)) == sorted(str((*step[:3], target)) for step in steps.launches)
    launch._begin_to_compile.cache_clear()
    plans.forget()
