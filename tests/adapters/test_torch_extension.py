"""The C++ route of the torch adapter, with functions of C that stand in for the driver and run NumPy.

What they run is right only if the pointers arrive in their words of struct Params. The tests marked gpu_adapter take
the route to a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("cuflash.adapters.torch")

from cuflash.adapters.torch import _cuda, _extension  # noqa: E402 - torch may not be there
from cuflash.adapters.torch._values import Options  # noqa: E402
from cuflash.cuda import launch  # noqa: E402

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("ninja") or not shutil.which("c++"),
    reason="the extension needs Linux, a C++ compiler and ninja",
)

_launch_type = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
_point_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_zero_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p)
_stream_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
FORWARD, BACKWARD = 1, 2
WORKSPACE, ZEROED, PART = 4096, (1024, 1536), 512
STREAM = 77
FIRST_WORD = 3  # of the pointers, which follow one another in this struct Params


class Driver:
    """The functions of the driver: a launch runs NumPy on the memory that its arguments point to."""

    def __init__(self) -> None:
        self.launches: list[int] = []
        self.last = threading.local()  # `pointed` and `zeroed`, addresses
        self.problems: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = []  # by the number in word 0
        self.strides: list[list[tuple[int, ...]]] = []  # of q, k and v, in elements, by the same
        self.functions = (
            *(_launch_type(self._launch), _point_type(self._point), _zero_type(self._zero), _stream_type(self._stream)),
        )
        self.threads: set[int] = set()
        self.status = 0

    def _launch(self, kernel: int, *arguments: Any) -> int:
        if self.status:
            return self.status
        *geometry, stream, addresses, extra = arguments
        assert geometry == [5, 1, 1, 96, 1, 1, 1234]
        assert (stream, extra) == (STREAM, None)
        words = ctypes.cast(addresses[0], ctypes.POINTER(ctypes.c_uint64))
        shapes, options = self.problems[words[0]]
        pointers = words[FIRST_WORD : FIRST_WORD + len(launch.OPERANDS)]
        assert words[1] == 0xABCD
        assert ctypes.string_at(addresses[1], 128) == bytes(range(128))
        assert self.last.pointed == pointers[0]

        def array(name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> np.ndarray:
            address = pointers[launch.OPERANDS.index(name)]
            memory = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(shape))).from_address(address))
            if strides is None:
                return memory.reshape(shape)
            return np.lib.stride_tricks.as_strided(memory, shape, [4 * stride for stride in strides])

        q, k, v = map(array, "qkv", shapes, self.strides[words[0]])
        out_shape, lse_shape = (*q.shape[:-1], v.shape[-1]), (q.shape[0], q.shape[2], q.shape[1])
        if kernel == FORWARD:
            out, lse = cuflash.flash_attention(q, k, v, return_lse=True, backend="numpy", **options)
            array("out", out_shape)[...] = out
            if pointers[launch.OPERANDS.index("lse")]:
                array("lse", lse_shape)[...] = lse
        else:
            assert self.last.zeroed + PART - ZEROED[0] == words[2]
            out, dout, lse = array("out", out_shape), array("dout", out_shape), array("lse", lse_shape)
            found = cuflash.flash_attention_backward(dout, q, k, v, out, lse, backend="numpy", **options)
            for name, shape, gradient in zip(("dq", "dk", "dv"), shapes, found, strict=True):
                array(name, shape)[...] = gradient
        self.launches.append(kernel)
        return 0

    def _point(self, tensor_map: int, address: int) -> int:
        assert tensor_map % 64 == 0
        self.last.pointed = address
        return 0

    def _zero(self, address: int, value: int, size: int, stream: int) -> int:
        assert (value, size, stream) == (0, ZEROED[1] - ZEROED[0], STREAM)
        self.last.zeroed = address
        return 0

    def _stream(self, device: int, stream: Any) -> int:
        assert device == 0
        stream[0] = STREAM
        return 0

    def enter_thread(self) -> None:
        self.threads.add(threading.get_ident())

    def recipe(self, kernel: int, tensors: Any, settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
        options = Options._make(settings)
        if options.softcap is not None:  # stands for what the library cannot serve
            return None
        number = len(self.problems)
        self.strides.append([x.stride() for x in tensors])
        self.problems.append(([tuple(x.shape) for x in tensors], {"causal": options.causal, "scale": options.scale}))
        params = np.zeros(FIRST_WORD + len(launch.OPERANDS), np.uint64)
        params[:2] = number, 0xABCD
        operands = tuple((FIRST_WORD + i, i) for i in range(len(launch.OPERANDS)))
        maps = ((bytes(range(128)), 0),)
        workspace = (WORKSPACE, ZEROED) if kernel == BACKWARD else (0, (0, 0))
        parts = ((2, PART),) if kernel == BACKWARD else ()
        return 0, *workspace, ((kernel, (5, 96, 1234), params.tobytes(), operands, parts, maps),)


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The library, built in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension, "load_if_built", lambda: None)  # there may be no driver
        with pytest.MonkeyPatch.context() as while_building:
            while_building.setenv("CUFLASH_CACHE_DIR", str(tmp_path_factory.mktemp("extension")))
            path = _extension.build_extension()
            assert path == _extension.library()
        assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left"
        yield _extension.module(path)


@pytest.fixture
def driver(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The route taken for tensors of the CPU."""
    driver = Driver()

    def prepare_forward(q: Any, k: Any, v: Any, settings: Any, with_lse: bool) -> Any:
        plan = _cuda.forward_plan((q, k, v), Options._make(settings))
        recipe = driver.recipe(FORWARD, (q, k, v), settings)
        return None if recipe is None else (plan.out.shape, plan.lse.shape, recipe)

    def prepare_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, settings: Any) -> Any:
        _cuda.backward_plan(dout, (q, k, v), out, lse, (None,) * 4, Options._make(settings))
        return driver.recipe(BACKWARD, (q, k, v), settings)

    monkeypatch.setattr(_extension, "prepare_forward", prepare_forward)
    monkeypatch.setattr(_extension, "prepare_backward", prepare_backward)
    _extension.configure(extension, driver.functions, "cpu", driver.enter_thread)
    monkeypatch.setattr(_extension, "attend", extension.attend)
    return driver


def inputs(*shape: int, seed: int = 0, kv_heads: int = 2) -> list[Any]:
    """q, k, v that require gradients, aligned to 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (2, 24, 4, 16)
    shapes = (shape, (*shape[:2], kv_heads, shape[3]), (*shape[:2], kv_heads, 8))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def expected(tensors: list[Any], dout: Any, dlse: Any = None, **options: Any) -> list[Any]:
    """out, LSE and gradients by NumPy."""
    arrays = [x.detach().numpy() for x in tensors]
    out, lse = cuflash.flash_attention(*arrays, return_lse=True, **options)
    dlse = None if dlse is None else dlse.numpy()
    gradients = cuflash.flash_attention_backward(dout.numpy(), *arrays, out, lse, dlse=dlse, **options)
    return [torch.from_numpy(np.asarray(x)) for x in (out, lse, *gradients)]


def assert_close(found: Any, wanted: Any) -> None:
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.detach(), y)


def test_the_operands_are_where_the_library_has_them() -> None:
    assert launch.OPERANDS[:9] == ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse")
    assert launch.PARAMS_STRUCT.size <= 8 * 128


def test_forward_and_backward(driver: Driver) -> None:
    tensors = inputs()
    dout = torch.randn(2, 24, 4, 8, generator=torch.Generator().manual_seed(1))
    out = cuflash.flash_attention(*tensors, causal=True)
    assert driver.launches == [FORWARD]
    gradients = torch.autograd.grad(out, tensors, dout)
    assert driver.launches == [FORWARD, BACKWARD]
    wanted_out, _, *wanted = expected(tensors, dout, causal=True)
    assert_close((out, *gradients), (wanted_out, *wanted))
    assert driver.threads


def test_plans_are_made_once_for_each_layout_and_options(driver: Driver) -> None:
    for seed in range(3):
        tensors = inputs(seed=seed)
        for options in ({}, {"causal": True}, {"scale": 0.5}):
            cuflash.flash_attention(*tensors, **options).sum().backward()
        cuflash.flash_attention(*inputs(2, 40, 4, 16, seed=seed))
    assert len(driver.problems) == 4


def test_equal_options_of_another_type_are_other_options(driver: Driver) -> None:
    tensors = inputs()
    cuflash.flash_attention(*tensors, causal=True)
    with pytest.raises(TypeError, match="causal: got 1"):
        cuflash.flash_attention(*tensors, causal=1)
    cuflash.flash_attention(*tensors, window_size=(3, 1))
    with pytest.raises(TypeError, match="window_size"):
        cuflash.flash_attention(*tensors, window_size=(3, "1"))


def test_without_gradients_there_is_no_graph(driver: Driver) -> None:
    tensors = inputs()
    with torch.no_grad():
        out, lse = cuflash.flash_attention(*tensors, return_lse=True)
    assert not out.requires_grad
    assert not lse.requires_grad
    with torch.inference_mode():
        again = cuflash.flash_attention(*(x.detach() for x in tensors))
    assert driver.launches == [FORWARD] * 2
    wanted = expected(tensors, out)
    assert_close((out, lse, again), (*wanted[:2], wanted[0]))


@pytest.mark.parametrize("used", ["both", "lse", "sum"])
def test_gradients_however_they_come(driver: Driver, used: str) -> None:
    tensors = inputs()
    out, lse = cuflash.flash_attention(*tensors, return_lse=True)
    loss = {"both": out.square().sum() + lse.sum(), "lse": lse.square().sum(), "sum": out.sum()}[used]
    gradients = torch.autograd.grad(loss, tensors)
    dout = {"both": 2 * out.detach(), "lse": torch.zeros(out.shape), "sum": torch.ones(out.shape)}[used]
    dlse = {"both": torch.ones(lse.shape), "lse": 2 * lse.detach(), "sum": None}[used]
    assert_close(gradients, expected(tensors, dout, dlse)[2:])
    assert driver.launches == [FORWARD], "by Python"


def test_hooks_that_give_what_was_saved_another_layout(driver: Driver) -> None:
    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs()]
    dout = torch.randn(2, 24, 4, 8)
    cuflash.flash_attention(*tensors).backward(dout)  # a backward of this call with other strides
    of_hooks = [x.detach().clone().requires_grad_() for x in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.contiguous()):
        out = cuflash.flash_attention(*of_hooks)
    out.backward(dout)
    assert driver.launches == [FORWARD, BACKWARD] * 2
    assert driver.strides[-1] != driver.strides[1]
    assert_close([x.grad for x in of_hooks], expected(tensors, dout)[2:])


def test_only_some_gradients(driver: Driver) -> None:
    q, k, v = inputs()
    k.requires_grad_(False)
    out = cuflash.flash_attention(q, k, v)
    dout = torch.randn(out.shape)
    out.backward(dout)
    assert k.grad is None
    wanted = expected([q, k, v], dout)
    assert_close((q.grad, v.grad), (wanted[2], wanted[4]))


def test_second_derivatives_raise(driver: Driver) -> None:
    tensors = inputs()
    (dq,) = torch.autograd.grad(cuflash.flash_attention(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(cuflash.UnsupportedError, match="derivative"):
        dq.sum().backward()


def test_a_changed_input_is_noticed(driver: Driver) -> None:
    tensors = inputs()
    out = cuflash.flash_attention(*tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_bad_calls_raise_what_they_raise_without_it(driver: Driver) -> None:
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(ValueError, match="k: got shape"):
        cuflash.flash_attention(q, k[..., :8].contiguous(), v)
    with pytest.raises(TypeError, match="return_lse: got 1"):
        cuflash.flash_attention(q, k, v, return_lse=1)
    with pytest.raises(ValueError, match="seed: got None"):
        cuflash.flash_attention(q, k, v, dropout_p=0.5)
    assert driver.launches == []


def test_a_failed_launch_raises(driver: Driver) -> None:
    driver.status = 700
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with CUresult 700"):
        cuflash.flash_attention(*inputs())


def test_what_it_cannot_serve_goes_another_way(driver: Driver) -> None:
    q, k, v = tensors = inputs()
    sinks = torch.randn(4)
    unaligned = torch.randn(q.numel() + 1)[1:].view(q.shape)
    calls: dict[str, Any] = {
        "options": lambda: cuflash.flash_attention(*tensors, softcap=5.0),
        "an array": lambda: cuflash.flash_attention(*tensors, sinks=sinks),
        "dropout": lambda: cuflash.flash_attention(*tensors, dropout_p=0.5, seed=3),
        "alignment": lambda: cuflash.flash_attention(unaligned, k, v),
        "vmap": lambda: torch.func.vmap(lambda x: cuflash.flash_attention(x[None], k[:1], v[:1]))(q),
        "func.grad": lambda: torch.func.grad(lambda x: cuflash.flash_attention(x, k, v).sum())(q),
        "a NumPy scale": lambda: cuflash.flash_attention(*tensors, scale=np.float64(0.5)),
    }
    for what, call in calls.items():
        results = call()
        assert torch.isfinite(results).all(), what
        assert driver.launches == [], what
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cuflash.flash_attention(*tensors).dtype == torch.bfloat16
    torch.use_deterministic_algorithms(True)
    try:
        cuflash.flash_attention(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert driver.launches == []


def test_a_mode_sees_the_call(driver: Driver) -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    tensors = inputs()
    with Mode():
        cuflash.flash_attention(*tensors)
    assert adapter.flash_attention in seen


def test_checkpoints_and_threads(driver: Driver) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = inputs()
    out = checkpoint(lambda *x: cuflash.flash_attention(*x), *tensors, use_reentrant=False)
    dout = torch.randn(out.shape)
    wanted = expected(tensors, dout)
    assert_close(torch.autograd.grad(out, tensors, dout), wanted[2:])
    assert driver.launches == [FORWARD, FORWARD, BACKWARD]

    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                found = cuflash.flash_attention(*tensors)
                assert_close((found, *torch.autograd.grad(found, tensors, dout)), (wanted[0], *wanted[2:]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(driver.threads) >= 4


def test_many_layouts_do_not_accumulate(driver: Driver) -> None:
    """A node whose call has been forgotten meanwhile gets its gradients from Python."""
    tensors = inputs()
    out = cuflash.flash_attention(*tensors)
    for length in range(1, 1025):
        q, k, v = (torch.zeros(1, length, 1, 4) for _ in range(3))
        cuflash.flash_attention(q, k, v)
    dout = torch.randn(out.shape)
    launched = len(driver.launches)
    assert_close(torch.autograd.grad(out, tensors, dout), expected(tensors, dout)[2:])
    assert len(driver.launches) == launched


@pytest.mark.gpu_adapter
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (50, 10)}, {"softcap": 20.0, "causal": True}, {"scale": -0.1}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("shape", [(2, 256, 8, 64, 8), (2, 512, 8, 128, 2), (3, 77, 4, 40, 4)], ids=str)
def test_on_a_gpu_its_results_are_those_without_it(
    extension: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], options: dict[str, Any], dtype: str
) -> None:
    """To the bit, as the kernels are the same."""
    batch, length, heads, head_dim, kv_heads = shape
    generator = torch.Generator("cuda").manual_seed(0)
    of_tensors = {"generator": generator, "device": "cuda", "dtype": getattr(torch, dtype)}
    q, dout = (torch.randn(batch, length, heads, head_dim, **of_tensors) for _ in range(2))
    k, v = (torch.randn(batch, length, kv_heads, head_dim, **of_tensors) for _ in range(2))
    tensors = [x.requires_grad_() for x in (q, k, v)]

    def results() -> list[Any]:
        out, lse = cuflash.flash_attention(*tensors, deterministic=True, return_lse=True, **options)
        return [out, lse, *torch.autograd.grad(out, tensors, dout)]

    monkeypatch.setattr(_extension, "attend", None)
    expected_results = results()
    _extension.load(Path(extension.__file__))
    assert _extension.attend is not None
    for found, wanted in zip(results(), expected_results, strict=True):
        assert torch.equal(found, wanted)
