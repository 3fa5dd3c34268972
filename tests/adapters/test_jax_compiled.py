"""The compiled route of JAX: its messages, flat entries, what calls are lowered to, and the choice of a route. No GPU.

The tests marked gpu_adapter run calls on a GPU by both routes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.adapters import jax_backend
from tests.adapters.test_jax import draw, on_numpy
from tests.adapters.test_jax_contract import IN_JAX, lower
from tests.adapters.test_jax_devices import attention_arrays, gradient_of_loss
from tests.gpu.compilation import allowed_spills
from tests.unit.conftest import compiler  # noqa: F401

jax = jax_backend.jax

import jax.numpy as jnp  # noqa: E402

from cuflash import dropout  # noqa: E402
from cuflash.adapters.jax import _compiled, _gpu, _kernel_call, _route, flash_attention  # noqa: E402
from cuflash.cuda import flat, jit, launch  # noqa: E402
from cuflash.cuda.toolchain import Target, resources  # noqa: E402
from cuflash.demo import doctor, machine  # noqa: E402

HOPPER = _compiled.Gpu((9, 0), launch.Machine(Target.named("sm_90a"), 132, 232448))
AMPERE = _compiled.Gpu((8, 0), launch.Machine(Target.named("sm_80"), 108, 166912))


def parse(message: bytes) -> dict[int, list[Any]]:
    """The fields of a message: numbers and bytes by their field number."""
    fields: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key % 8 == 0:
            value: Any = varint()
        else:
            size = varint() if key % 8 == 2 else 4
            value = message[at : at + size]
            at += size
        fields.setdefault(key // 8, []).append(value)
    return fields


# ---- messages ----------------------------------------------------------------------------------------------------


def test_a_message_is_what_jaxlib_makes():
    """The bytes are those of jaxlib 0.11.2 for a kernel with a tensor map, two pointers and a number."""
    arguments = [
        _kernel_call.tensor_map("bfloat16", (64, 700, 1, 3, 2), (8, 6, 4, 2), (64, 128, 1, 1, 1)),
        _kernel_call.pointer(divisor=16),
        _kernel_call.pointer(zeroed=4096),
        _kernel_call.number("Q", 77),
    ]
    kernel = _kernel_call.Kernel("nm", b"", 4, 1234, (9, 0), 7)
    expected = bytes.fromhex(
        "0a4c0a120a026e6d100418d2092203505458305a50011007180120012a1f4a1d0a1b080910031a06020301bc0540220501020304"
        "012a060101018001402a040a0210102a050a030880202a02304d22026e6d"
    )
    assert _kernel_call.message(kernel, arguments, "PTX") == expected


def test_a_message_holds_the_cubin_and_the_types_of_numbers():
    kernel = _kernel_call.Kernel("entry", b"code", 12, 99, (9, 0), 7)
    arguments = [
        _kernel_call.number(code, value) for code, value in (("i", -1), ("q", 0), ("f", 0.5), ("I", 2**32 - 1))
    ]
    (call,) = parse(zlib.decompress(_kernel_call.opaque(kernel, arguments)))[1]
    (code,) = parse(call)[1]
    fields = parse(code)
    assert (fields[1], fields[2], fields[3], fields[6]) == ([b"entry"], [12], [99], [90])
    assert re.fullmatch(rb"cuflash [0-9a-f]{64}", fields[4][0])  # tells kernels apart
    assert parse(fields[11][0]) == {1: [b"code"], 2: [b"entry"], 3: [99]}
    expected = [{3: [2**64 - 1]}, {5: [0]}, {7: [np.float32(0.5).tobytes()]}, {4: [2**32 - 1]}]
    assert [parse(argument) for argument in parse(call)[5]] == expected
    assert [parse(call)[field] for field in (2, 3, 4)] == [[7], [1], [1]]


# ---- lowering ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[_compiled.Gpu], None]]:
    """Lets calls be lowered by the compiled route for a GPU that is not here, their kernels not compiled."""
    monkeypatch.setenv(_route.VARIABLE, "compiled")
    monkeypatch.setattr(_route, "toolchain", lambda: None)
    monkeypatch.setattr(_compiled, "obstacle", lambda tried_only: None)
    monkeypatch.setattr(jit, "cubin", lambda *job: repr(job).encode())
    jax.clear_caches()
    yield lambda gpu: monkeypatch.setattr(_compiled, "gpu", lambda: gpu)
    jax.clear_caches()


class Lowered:
    """A custom call of a lowered program."""

    def __init__(self, line: str) -> None:
        self.operands = re.findall(r"%[\w#]+", line.partition("(")[2].partition(")")[0])
        escaped = re.search(r'opaque = "((?:[^"\\]|\\.)*)"', line)
        assert escaped
        text = re.sub(
            rb"\\([0-9A-F]{2}|.)",
            lambda m: bytes([int(m[1], 16)]) if len(m[1]) == 2 else m[1],
            escaped[1].encode(),
        )
        message = parse(zlib.decompress(text))
        self.call = parse(message[1][0])
        self.name = parse(self.call[1][0])[1][0].decode()
        self.aliases = re.findall(r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)", line)
        self.arguments = [parse(argument) for argument in self.call[5]]

    @property
    def buffers(self) -> list[str]:
        """What each buffer is passed as, in the order of the call's operands and results."""
        kinds = {1: "pointer", 9: "map"}
        return [kinds[next(iter(argument))] for argument in self.arguments if next(iter(argument)) in kinds]

    @property
    def zeroed(self) -> list[int]:
        return [parse(argument[1][0]).get(1, [0])[0] for argument in self.arguments if 1 in argument]


def lowered(function: Callable[..., Any], *arrays: Any) -> list[Lowered]:
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return [Lowered(line) for line in text.splitlines() if "@triton_kernel_call_ffi" in line]


def gradients(**options: Any) -> Callable[..., Any]:
    def loss(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
        return flash_attention(q, k, v, sinks=sinks, **options).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def dense(dtype: Any, dim: int, length: int = 300) -> list[Any]:
    shapes = ((2, length, 4, dim), (2, length, 2, dim), (2, length, 2, dim))
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def test_a_forward_on_hopper_is_one_call(compiled_for: Any):
    compiled_for(HOPPER)
    (call,) = lowered(partial(flash_attention, causal=True), *dense(jnp.bfloat16, 128))
    assert call.name == "cuflash_forward_hopper"
    assert call.buffers == ["map", "map", "map", "map", "pointer"]  # q, k, v, out; lse
    q_map = parse(parse(call.arguments[0][9][0])[1][0])
    assert q_map == {
        1: [9],
        2: [3],
        3: [bytes([2, 4, 2, 172, 2, 64])],  # batch, heads, dim / 64, len, 64
        4: [bytes([128, 176, 9, 128, 1, 64, 128, 4, 1])],
        5: [bytes([1, 1, 2, 64, 64])],
    }
    assert len(call.arguments) == 5 + len(flat.NUMBERS)


def test_a_backward_on_hopper_passes_its_workspace_on(compiled_for: Any):
    compiled_for(HOPPER)
    calls = lowered(gradients(causal=True, deterministic=True), *dense(jnp.bfloat16, 64))
    forward, prepare, keys, finish = calls
    assert [call.name.removeprefix("cuflash_") for call in calls] == [
        *("forward_hopper", "backward_prepare", "backward_hopper", "backward_finish")
    ]
    assert prepare.buffers == ["pointer"] * 4  # out, dout; delta, tickets
    # q, k, v, dout; lse, delta, tickets; dk, dv, tickets again, dq_sum, dq_turns
    assert keys.buffers == ["map"] * 4 + ["pointer"] * 8
    assert keys.aliases == [("2", "6")]
    assert [bool(size) for size in keys.zeroed] == [False] * 6 + [True] * 2
    assert finish.buffers == ["pointer", "pointer"]
    assert keys.operands[:3] == forward.operands


def test_a_backward_by_the_portable_kernels(compiled_for: Any):
    compiled_for(AMPERE)
    arrays = [*dense(jnp.float32, 40), jax.ShapeDtypeStruct((4,), jnp.float32)]
    calls = lowered(jax.grad(loss_with_sinks, (0, 3)), *arrays)
    assert [call.name.removeprefix("cuflash_") for call in calls] == [
        *("forward_portable", "backward_prepare", "backward_sinks", "backward_portable", "backward_portable_dq")
    ]
    assert all("map" not in call.buffers for call in calls)


def test_a_portable_backward_that_sums_dq(compiled_for: Any):
    """The sum is zero before the kernel that adds to it, and read by the last."""
    compiled_for(AMPERE)
    calls = lowered(gradients(causal=True), *dense(jnp.bfloat16, 64))
    assert [call.name.removeprefix("cuflash_") for call in calls] == [
        *("forward_portable", "backward_prepare", "backward_portable", "backward_finish")
    ]
    *_, keys, finish = calls
    # q, k, v, dout; lse, delta; dk, dv, dq_sum
    assert keys.buffers == ["pointer"] * 9
    assert [bool(size) for size in keys.zeroed] == [False] * 8 + [True]
    assert finish.buffers == ["pointer", "pointer"]


@pytest.mark.parametrize("shape", [(2, 4, 300, 300), (300, 300)])
def test_a_bias_and_a_mask_take_the_portable_kernels(compiled_for: Any, shape: tuple[int, ...]):
    """dbias is written at once, or is a sum in the workspace that a kernel of its own rounds."""
    compiled_for(HOPPER)
    bias, mask = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((300,), jnp.bool_)

    def loss(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
        return flash_attention(q, k, v, bias=bias, mask=mask).astype(jnp.float32).sum()

    calls = lowered(jax.grad(loss, (0, 1, 2, 3)), *dense(jnp.bfloat16, 64), bias, mask)
    names = [call.name.removeprefix("cuflash_") for call in calls]
    broadcast = len(shape) < 4
    assert names == [
        *("forward_portable", "backward_prepare", "backward_portable", "backward_portable_dq"),
        *(("backward_bias",) if broadcast else ()),
    ]
    of_dq = calls[3]
    # q, k, v, dout; lse, bias, mask, delta; dq, and dbias or its sum
    assert of_dq.buffers == ["pointer"] * 10
    assert [size for size in of_dq.zeroed if size] == ([4 * 300 * 300] if broadcast else [])
    assert len(of_dq.arguments) == 10 + len(flat.DENSE_NUMBERS)


def loss_with_sinks(q: Any, k: Any, v: Any, sinks: Any) -> Any:
    out, lse = flash_attention(q, k, v, sinks=sinks, causal=True, return_lse=True)
    return out.sum() + lse.sum()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_empty_arrays_need_no_launch(compiled_for: Any, q_len: int, kv_len: int):
    compiled_for(HOPPER)
    arrays = [jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16) for length in (q_len, kv_len, kv_len)]
    names = {call.name for call in lowered(gradients(), *arrays)}
    assert ("cuflash_backward_portable_dq" in names) == (q_len > 0 and kv_len == 0)
    assert "cuflash_backward_finish" not in names
    assert ("cuflash_backward_portable" in names) == (kv_len > 0)


def test_the_gradient_of_a_bias_without_queries_is_a_sum_of_nothing(compiled_for: Any):
    """A kernel rounds the sum of dbias, to which no kernel has added."""
    compiled_for(HOPPER)
    arrays = [jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16) for length in (0, 5, 5)]

    def loss(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return flash_attention(q, k, v, bias=bias).astype(jnp.float32).sum()

    bias = jax.ShapeDtypeStruct((5,), jnp.bfloat16)
    names = [call.name.removeprefix("cuflash_") for call in lowered(jax.grad(loss, (1, 3)), *arrays, bias)]
    assert names == ["backward_portable", "backward_bias"]


@pytest.mark.parametrize("gpu", [HOPPER, AMPERE], ids=["sm_90a", "sm_80"])
def test_every_case_of_the_contract_is_lowered(compiled_for: Any, gpu: _compiled.Gpu):
    """What a launch reads, an earlier one has written or nobody has to."""
    compiled_for(gpu)
    for case in IN_JAX:
        if case.dtype != "float64":
            lower(case)


def test_the_seed_is_a_number_of_the_call(compiled_for: Any):
    compiled_for(HOPPER)
    options = {"dropout_p": 0.5, "seed": 2**64 - 1}
    (call,) = lowered(partial(flash_attention, **options), *dense(jnp.bfloat16, 128))
    place = [name for name, _ in flat.NUMBERS].index("keys.r0") - len(flat.NUMBERS)
    keys = dropout.round_keys(2**64 - 1)
    assert call.arguments[place : place + len(keys)] == [{6: [key]} for key in keys]


@pytest.mark.parametrize("check_vma", [True, False, None], ids=["shard_map", "shard_map, unchecked", "jit"])
@pytest.mark.parametrize("length", [24, 0])
def test_inside_shard_map(compiled_for: Any, check_vma: bool | None, length: int):
    """Workspace and results are typed as the arrays of one device are, empty ones too."""
    compiled_for(AMPERE)
    given = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in attention_arrays().items()}
    given["q"] = jax.ShapeDtypeStruct((given["q"].shape[0], length, *given["q"].shape[2:]), jnp.float32)
    names = [call.name.removeprefix("cuflash_") for call in lowered(gradient_of_loss(check_vma), given)]
    expected = [
        "forward_portable",
        "backward_prepare",
        "backward_sinks",
        "backward_portable",
        "backward_portable_dq",
    ]
    assert names == (expected if length else ["backward_sinks", "backward_portable"])


def test_the_route_is_read_when_a_program_is_lowered(compiled_for: Any, monkeypatch: pytest.MonkeyPatch):
    compiled_for(HOPPER)
    monkeypatch.setattr(_gpu, "prepare", lambda text: 0)
    arrays = dense(jnp.bfloat16, 64)
    assert len(lowered(flash_attention, *arrays)) == 1
    monkeypatch.setenv(_route.VARIABLE, "handler")
    jax.clear_caches()
    assert len(lowered(flash_attention, *arrays)) == 0


# ---- flat entries ------------------------------------------------------------------------------------------------


def test_cases_of_the_contract_are_lowered_ahead(compiled_for: Any, monkeypatch: pytest.MonkeyPatch):
    """With the kernels that the calls then ask for."""
    compiled_for(HOPPER)
    asked: list[str] = []
    monkeypatch.setattr(jit, "cubin", lambda *job: asked.append(job[0]) or b"")
    case = next(case for case in IN_JAX if case.dtype == "bfloat16" and case.sinks and not case.sequences)
    lower(case)
    assert {"backward_prepare", "backward_sinks"} < set(asked)
    assert any(name.startswith("forward") for name in asked)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("gpu", [HOPPER, AMPERE], ids=["sm_90a", "sm_80"])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"softcap": 20.0, "dropout_p": 0.1, "seed": 1}, {"deterministic": True}], ids=str
)
def test_flat_entries_compile_without_spills(
    compiled_for: Any, monkeypatch: pytest.MonkeyPatch, gpu: _compiled.Gpu, options: dict[str, Any]
):
    compiled_for(gpu)
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jit, "cubin", lambda *job: seen.append(job) or b"cubin")
    for dim in (64, 128, 256) if "softcap" not in options else (128,):
        lowered(gradients(**options), *dense(jnp.bfloat16, dim))
    assert len(seen) >= 4
    for job in dict.fromkeys(seen):
        ((entry, used),) = resources(jit.compile_variant(*job).log).items()
        assert entry == f"cuflash_{job[0]}"
        assert max(used.spill_bytes, used.stack_bytes) <= allowed_spills(job), job
        assert all("(C7519)" in line for line in used.advisories), job


# ---- the choice of a route ---------------------------------------------------------------------------------------


def test_a_route_that_does_not_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(_route.VARIABLE, "fast")
    with pytest.raises(ValueError, match="CUFLASH_JAX_ROUTE is 'fast'; allowed are compiled, handler, or to leave it"):
        _route.route()


def test_the_handler_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(_route.VARIABLE, "handler")
    assert _route.route() == ("handler", "CUFLASH_JAX_ROUTE asks for it", None)


@pytest.mark.parametrize("wanted", [None, ""])
def test_the_compiled_route_is_taken_where_it_works(monkeypatch: pytest.MonkeyPatch, wanted: str | None):
    monkeypatch.delenv(_route.VARIABLE, raising=False)
    if wanted is not None:
        monkeypatch.setenv(_route.VARIABLE, wanted)
    monkeypatch.setattr(_route, "toolchain", lambda: None)
    monkeypatch.setattr(_compiled, "obstacle", lambda tried_only: None if tried_only else "asked wrongly")
    monkeypatch.setattr(_compiled, "gpu", lambda: HOPPER)
    assert _route.route().name == "compiled"
    assert _route.route().gpu == HOPPER
    monkeypatch.setattr(_compiled, "obstacle", lambda tried_only: "jaxlib 0.10.2 is older than 0.11.2")
    assert _route.route() == ("handler", "jaxlib 0.10.2 is older than 0.11.2", None)


def test_a_forced_route_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(_route.VARIABLE, "compiled")
    monkeypatch.setattr(_compiled, "obstacle", lambda tried_only: None if tried_only else "jaxlib is odd")
    with pytest.raises(
        cuflash.UnsupportedError, match="CUFLASH_JAX_ROUTE is 'compiled', but jaxlib is odd; unset it, or set it to 'ha"
    ):
        _route.route()


def test_without_a_compiler_calls_go_by_the_handler(monkeypatch: pytest.MonkeyPatch):
    """The kernels that `cuflash compile` made for a machine without one are those of the handler."""

    def toolchain() -> None:
        raise cuflash.UnsupportedError("there is no NVRTC")

    monkeypatch.delenv(_route.VARIABLE, raising=False)
    monkeypatch.setattr(_compiled, "obstacle", lambda tried_only: None)
    monkeypatch.setattr(_compiled, "gpu", lambda: HOPPER)
    monkeypatch.setattr(_route, "toolchain", toolchain)
    assert _route.route() == ("handler", "there is no NVRTC", None)


def test_gpus_that_differ_are_served_by_the_handler(monkeypatch: pytest.MonkeyPatch):
    def gpu() -> _compiled.Gpu:
        raise cuflash.UnsupportedError("the GPUs of this process differ: [(8, 0), (9, 0)]")

    monkeypatch.delenv(_route.VARIABLE, raising=False)
    monkeypatch.setattr(_route, "toolchain", lambda: None)
    monkeypatch.setattr(_compiled, "obstacle", lambda tried_only: None)
    monkeypatch.setattr(_compiled, "gpu", gpu)
    assert _route.route() == ("handler", "the GPUs of this process differ: [(8, 0), (9, 0)]", None)


@pytest.mark.parametrize(
    ("version", "reason"),
    [((0, 11, 1), "is older than 0.11.2"), ((0, 99, 0), "was not tried"), ((0, 11, 2), "lacks what it takes")],
)
def test_versions_of_jaxlib(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], reason: str):
    monkeypatch.setattr(_compiled.jaxlib_version, "__version_info__", version)
    monkeypatch.setattr(_compiled, "_difference", lambda: "jaxlib's GPU plugin lacks what it takes (...)")
    assert reason in (_compiled.obstacle() or "")


def test_a_jaxlib_without_a_gpu_plugin_lacks_what_it_takes(monkeypatch: pytest.MonkeyPatch):
    import jaxlib.gpu_triton

    for name in ("TritonKernel", "create_tma_descriptor_parameter"):
        monkeypatch.delattr(jaxlib.gpu_triton, name, raising=False)
    _compiled._difference.cache_clear()
    assert "lacks what it takes" in (_compiled._difference() or "")
    _compiled._difference.cache_clear()


@pytest.mark.parametrize("obstacle", [None, "there is no GPU"])
def test_doctor_names_the_route(monkeypatch: pytest.MonkeyPatch, obstacle: str | None):
    monkeypatch.setattr(machine, "gpu_obstacle", lambda: obstacle)
    monkeypatch.setenv(_route.VARIABLE, "handler")
    named = "on a GPU by the handler route: CUFLASH_JAX_ROUTE asks for it" in doctor.jax_arrays().text
    assert named == (obstacle is None)


def test_messages_have_the_form_of_the_installed_jaxlib():
    if not hasattr(import_module("jaxlib.gpu_triton"), "create_tma_descriptor_parameter"):
        pytest.skip("the installed jaxlib has no GPU plugin whose kernel calls take tensor maps")
    assert _compiled._difference() is None


# ---- on a GPU, by both routes ------------------------------------------------------------------------------------


BY_ROUTE = pytest.mark.parametrize(
    "route", [pytest.param(name, marks=marks) for name, marks in jax_backend.ON_GPU.items()]
)


def on_gpu(array: np.ndarray) -> Any:
    return jax.device_put(array, jax.devices("cuda")[0])


CASES = {
    "float32": (40, np.float32, {"causal": True}),
    "hopper": (128, jnp.bfloat16, {"causal": True}),
    "narrow": (64, jnp.float16, {"window_size": (100, 20)}),
    "padded": (96, jnp.bfloat16, {}),
    "wide": (256, jnp.bfloat16, {"causal": True}),
    "deterministic": (64, jnp.bfloat16, {"deterministic": True}),
    "lean": (128, jnp.bfloat16, {"memory": "lean"}),
    "softcap and dropout": (128, jnp.bfloat16, {"softcap": 5.0, "dropout_p": 0.2, "seed": 2**63 + 5}),
}


@BY_ROUTE
@pytest.mark.parametrize("name", CASES)
def test_results_on_a_gpu(route: str, name: str):
    """Results and gradients, with sinks, against float32 on NumPy of the same inputs."""
    dim, dtype, options = CASES[name]
    q = draw(2, 300, 4, dim).astype(dtype)
    k, v = (draw(2, 333, 2, dim, seed=seed).astype(dtype) for seed in (1, 2))
    sinks, dout = draw(4, seed=3), draw(2, 300, 4, dim, seed=4).astype(dtype)

    def call(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return flash_attention(q, k, v, sinks=sinks, return_lse=True, **options)

    @jax.jit
    def both(*arrays: Any) -> Any:
        *inputs, dout = arrays
        (out, lse), pull = jax.vjp(call, *inputs)
        return out, lse, *pull((dout, jnp.ones_like(lse)))

    found = both(*map(on_gpu, (q, k, v, sinks, dout)))
    wide = {"q": q, "k": k, "v": v, "sinks": sinks}
    wide = {key: np.asarray(x, np.float32) for key, x in wide.items()}
    backward_only = {key: value for key, value in options.items() if key != "memory"}
    expected = on_numpy(wide, np.asarray(dout, np.float32), np.ones((2, 4, 300), np.float32), **backward_only)
    unit = float(jnp.finfo(dtype).eps)
    for actual, (key, reference) in zip(found, expected.items(), strict=True):
        error = np.abs(np.asarray(actual, np.float32) - reference).max()
        assert error <= max(4 * unit, 1e-5) * max(1.0, np.abs(reference).max()), (key, error)


@BY_ROUTE
@pytest.mark.parametrize(("dim", "dtype"), [(40, np.float32), (128, jnp.bfloat16)])
def test_a_hundred_calls_with_fresh_buffers(route: str, dim: int, dtype: Any):
    """Tensor maps and pointers are those of each call's own arrays: results are bitwise those of the first call."""
    run = jax.jit(lambda x: jax.value_and_grad(lambda x: flash_attention(x, x, x, causal=True, memory="lean").sum())(x))
    x = draw(1, 200, 2, dim).astype(dtype)
    first = [np.asarray(array) for array in run(on_gpu(x))]
    kept = []
    for i in range(100):
        kept.append(jnp.full((17 + i,), i, jnp.float32, device=jax.devices("cuda")[0]))  # shifts the allocator
        again = run(on_gpu(x))
        kept += again if i % 3 else []
        for actual, expected in zip(again, first, strict=True):
            np.testing.assert_array_equal(np.asarray(actual), expected)


@BY_ROUTE
@pytest.mark.parametrize("dim", [40, 128])
def test_calls_in_a_scan(route: str, dim: int):
    """Inside a loop of XLA, where calls may be captured in command buffers, and its gradient."""
    x = on_gpu(draw(1, 130, 2, dim).astype(jnp.bfloat16))

    def step(x: Any, _: Any) -> Any:
        # The mean: x would double in every step, to scores of which float32 keeps nothing that an exponential bears.
        return (x + flash_attention(x, x, x, causal=True, memory="lean")) / 2, None

    def looped(x: Any) -> Any:
        return jax.lax.scan(step, x, length=20)[0].astype(jnp.float32).sum()

    def unrolled(x: Any) -> Any:
        for _ in range(20):
            x, _ = step(x, None)
        return x.astype(jnp.float32).sum()

    expected = jax.jit(jax.grad(unrolled))(x)
    assert jnp.isfinite(expected).all()
    run = jax.jit(jax.grad(looped))
    for _ in range(5):
        error = jnp.abs(run(x).astype(jnp.float32) - expected.astype(jnp.float32)).max()
        assert error <= 0.02 * jnp.abs(expected.astype(jnp.float32)).max()


@pytest.mark.gpu_adapter
def test_both_routes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    if _compiled.obstacle(tried_only=False):
        pytest.skip(str(_compiled.obstacle(tried_only=False)))
    x = on_gpu(draw(2, 513, 4, 128).astype(jnp.bfloat16))
    results = []
    for name in ("compiled", "handler"):
        monkeypatch.setenv(_route.VARIABLE, name)
        jax.clear_caches()
        function = jax.jit(lambda x: flash_attention(x, x, x, causal=True, return_lse=True))
        results.append([np.asarray(array, np.float32) for array in function(x)])
    jax.clear_caches()
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
