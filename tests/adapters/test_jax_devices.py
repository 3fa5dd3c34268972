"""The JAX adapter over several devices: what plain jit partitions, and shard_map."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.adapters.jax_backend import ON_GPU
from tests.adapters.test_jax import Arrays, assert_close, draw, on_numpy

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from cuflash.adapters.jax import _gpu, flash_attention  # noqa: E402
from cuflash.adapters.jax._call import described  # noqa: E402

BATCH, Q_LEN, KV_LEN, HEADS, DIM = 4, 24, 32, 4, 16

MakeMesh = Callable[..., Any]
PLATFORMS = ["cpu", *(pytest.param("cuda", id=f"cuda-{name}", marks=marks) for name, marks in ON_GPU.items())]


def on_meshes(*shapes: tuple[int, int]) -> pytest.MarkDecorator:
    """Runs a test on meshes (data, model) of these shapes: of two devices too, as more machines have them."""
    return pytest.mark.parametrize("mesh_shape", shapes, ids=lambda shape: "{}x{}".format(*shape))


@pytest.fixture(params=PLATFORMS)
def make_mesh(request: pytest.FixtureRequest) -> MakeMesh:
    def make(data: int, model: int, kind: AxisType = AxisType.Auto) -> Any:
        devices = jax.devices(request.param)
        if len(devices) < data * model:
            pytest.skip(f"{data * model} devices are needed, {len(devices)} are here")
        return jax.make_mesh((data, model), ("data", "model"), (kind, kind), devices=devices[: data * model])

    return make


def attention_arrays(kv_heads: int = 2) -> Arrays:
    q = draw(BATCH, Q_LEN, HEADS, DIM)
    k, v = (draw(BATCH, KV_LEN, kv_heads, DIM, seed=seed) for seed in (1, 2))
    return {"q": q, "k": k, "v": v, "sinks": draw(HEADS)}


def loss(given: dict[str, Any], **options: Any) -> Any:
    out, lse = flash_attention(**given, **options, return_lse=True)
    return (out**2).sum() + lse.sum()


def gradient_of_loss(check_vma: bool | None) -> Callable[[dict[str, Any]], Any]:
    """The gradient of `loss`, which is inside a shard_map over four CPU devices unless `check_vma` is None."""
    if check_vma is None:
        return jax.grad(loss)
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    rows = P("data", None, "model")
    specs = {"q": rows, "k": rows, "v": rows, "sinks": P("model")}
    total = jax.shard_map(
        lambda given: jax.lax.psum(loss(given), ("data", "model")),
        mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=check_vma,
    )  # fmt: skip
    return jax.grad(total)


def expected_gradients(arrays: Arrays, **options: Any) -> dict[str, np.ndarray]:
    out, lse = cuflash.flash_attention(**arrays, **options, return_lse=True)
    return on_numpy(arrays, 2 * out, np.ones_like(lse), **options)


def assert_gradients(gradients: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name])


def local_shapes(compiled: Any, target: str) -> list[tuple[int, ...]]:
    """The first result's shape of every call in a compiled program: of a device's out or dq.

    The handler's calls have the target itself; of those that XLA launches, the kernel that writes out or dq counts.
    """
    writers = {
        "cuflash_forward": "forward_(?:hopper|portable|combine)",
        "cuflash_backward": "backward_(?:finish|portable_dq|hopper_dq)",
    }
    named = rf'(?:"{target}"|"triton_kernel_call_ffi".*cuflash_{writers[target]})'
    calls = re.findall(rf"= \(?\w+\[([\d,]*)\].* custom-call\(.*custom_call_target={named}", compiled.as_text())
    return [tuple(map(int, shape.split(","))) for shape in calls]


# the mesh (data, model), kv_heads, and the shape of q that a device works on
SPREAD = {
    "batch": ((4, 1), 2, (1, Q_LEN, HEADS, DIM)),
    "batch over two": ((2, 1), 2, (2, Q_LEN, HEADS, DIM)),
    "heads": ((1, 2), 2, (BATCH, Q_LEN, 2, DIM)),
    "batch and heads": ((2, 2), 2, (2, Q_LEN, 2, DIM)),
    "heads, as many of keys": ((2, 2), 4, (2, Q_LEN, 2, DIM)),
    "heads, one of keys": ((1, 4), 1, (BATCH, Q_LEN, 1, DIM)),
    "heads, two devices for one of keys": ((1, 4), 2, (BATCH, Q_LEN, 1, DIM)),
    "heads over two, one of keys": ((1, 2), 1, (BATCH, Q_LEN, 2, DIM)),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("shape", [(BATCH, HEADS, Q_LEN, KV_LEN), (1, HEADS, 1, KV_LEN), (BATCH, 1, Q_LEN, 1), ()])
@pytest.mark.parametrize(
    "case",
    [
        "batch",
        "batch over two",
        "batch and heads",
        "heads, two devices for one of keys",
        "heads over two, one of keys",
    ],
)
def test_jit_partitions_with_a_bias(make_mesh: MakeMesh, case: str, shape: tuple[int, ...], kind: AxisType):
    mesh_shape, kv_heads, local = SPREAD[case]
    mesh = make_mesh(*mesh_shape, kind)
    arrays = attention_arrays(kv_heads) | {"bias": draw(*shape), "mask": draw(BATCH, 1, 1, KV_LEN, seed=5) < 1}
    rows = P("data", None, "model" if kv_heads % mesh_shape[1] == 0 else None)
    specs = {"q": P("data", None, "model"), "k": rows, "v": rows, "sinks": P("model")}
    given = {name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in arrays.items()}
    mask = given.pop("mask")
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(partial(loss, mask=mask))).lower(given).compile()
        gradients = step(given)
    assert local_shapes(step, "cuflash_backward") == [local]
    assert_gradients(gradients, expected_gradients(arrays))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("case", SPREAD)
def test_jit_partitions_batch_and_heads(make_mesh: MakeMesh, case: str, kind: AxisType):
    shape, kv_heads, local = SPREAD[case]
    mesh = make_mesh(*shape, kind)
    arrays = attention_arrays(kv_heads)
    key_axis = "model" if kv_heads % shape[1] == 0 else None
    specs = {
        "q": P("data", None, "model"),
        "k": P("data", None, key_axis),
        "v": P("data", None, key_axis),
        "sinks": P("model"),
    }
    given = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(partial(loss, causal=True))).lower(given).compile()
        gradients = step(given)
        forward = jax.jit(partial(flash_attention, causal=True)).lower(**given).compile()
    assert local_shapes(forward, "cuflash_forward") == [local]
    assert local_shapes(step, "cuflash_backward") == [local]
    assert "all-gather" not in forward.as_text()
    assert_close(forward(**given), cuflash.flash_attention(**arrays, causal=True))
    assert_gradients(gradients, expected_gradients(arrays, causal=True))


@on_meshes((2, 2), (2, 1))
def test_a_sharded_length_is_gathered(make_mesh: MakeMesh, mesh_shape: tuple[int, int]):
    """Heads stay spread; the keys, spread over their length, come to every device first."""
    mesh = make_mesh(*mesh_shape)
    arrays = attention_arrays()
    specs = {"q": P(None, None, "model"), "k": P(None, "data"), "v": P(None, "data"), "sinks": P()}
    given = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
    step = jax.jit(jax.grad(loss)).lower(given).compile()
    assert local_shapes(step, "cuflash_backward") == [(BATCH, Q_LEN, HEADS // mesh_shape[1], DIM)]
    assert_gradients(step(given), expected_gradients(arrays))


@on_meshes((2, 2), (2, 1))
def test_dropout_is_the_same_however_it_is_sharded(make_mesh: MakeMesh, mesh_shape: tuple[int, int]):
    mesh = make_mesh(*mesh_shape)
    arrays = attention_arrays()
    given = {
        name: jax.device_put(x, NamedSharding(mesh, P("data") if x.ndim == 4 else P())) for name, x in arrays.items()
    }
    options = {"dropout_p": 0.3, "seed": 11}
    assert_gradients(jax.jit(jax.grad(partial(loss, **options)))(given), expected_gradients(arrays, **options))


def test_packed_sequences_over_heads(make_mesh: MakeMesh):
    mesh = make_mesh(1, 2)
    boundaries = np.array([0, 10, 24], np.int32)
    q, k, v = (draw(24, heads, DIM, seed=heads) for heads in (4, 2, 2))
    sharding = NamedSharding(mesh, P(None, "model"))
    options = {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries, "causal": True}
    compiled = (
        jax.jit(partial(flash_attention, **options)).lower(*(jax.device_put(x, sharding) for x in (q, k, v))).compile()
    )
    assert local_shapes(compiled, "cuflash_forward") == [(24, 2, DIM)]
    out = compiled(*(jax.device_put(x, sharding) for x in (q, k, v)))
    assert_close(out, cuflash.flash_attention(q, k, v, **options))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    ("mesh_shape", "spec"),
    [
        ((2, 2), P("data")),
        ((2, 2), P(None, "data")),
        ((2, 2), P(None, None, None, "model")),
        ((2, 2), P("data", None, None, "model")),
        ((2, 1), P("data")),
        ((2, 1), P(None, "data")),
        ((1, 2), P(None, None, None, "model")),
    ],
    ids=str,
)
def test_vmap_over_sharded_arrays(
    make_mesh: MakeMesh, mesh_shape: tuple[int, int], spec: P, sinks: bool, kind: AxisType
):
    mesh = make_mesh(*mesh_shape, kind)
    arrays = {name: x for name, x in attention_arrays().items() if sinks or name != "sinks"}
    examples = {name: np.stack([x, draw(*x.shape, seed=seed)]) for seed, (name, x) in enumerate(arrays.items(), 3)}
    specs = {name: spec if name != "sinks" else P(spec[0]) for name in examples}
    given = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in examples.items()}
    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.vmap(jax.grad(loss)))(given)
    for i in range(2):
        expected = expected_gradients({name: x[i] for name, x in examples.items()})
        for name, gradient in gradients.items():
            np.testing.assert_allclose(np.asarray(gradient)[i], expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("check_vma", [True, False, None], ids=["shard_map", "shard_map, unchecked", "jit"])
def test_a_gpu_gets_its_workspace_from_xla(monkeypatch: pytest.MonkeyPatch, check_vma: bool | None):
    """What is lowered for the handler has a result more; that needs no GPU where its size is known."""
    monkeypatch.setenv("CUFLASH_JAX_ROUTE", "handler")
    monkeypatch.setattr(_gpu, "prepare", lambda text: 4096 if described(text)[0].backward else 0)
    given = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in attention_arrays().items()}
    text = jax.jit(gradient_of_loss(check_vma)).trace(given).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@cuflash_" in line]
    assert len(calls) == 2
    assert [line.count("tensor<4096xui8>") for line in calls] == [0, 1]


@pytest.mark.parametrize("check_vma", [True, False])
@on_meshes((2, 2), (2, 1), (1, 2))
def test_shard_map_over_batch_and_heads(make_mesh: MakeMesh, mesh_shape: tuple[int, int], check_vma: bool):
    mesh = make_mesh(*mesh_shape)
    arrays = attention_arrays()
    rows = P("data", None, "model")
    specs = ({"q": rows, "k": rows, "v": rows, "sinks": P("model")},)

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    def total(given: dict[str, Any]) -> Any:
        return jax.lax.psum(loss(given, causal=True), ("data", "model"))

    given = {name: jnp.asarray(x) for name, x in arrays.items()}
    assert_gradients(jax.jit(jax.grad(total))(given), expected_gradients(arrays, causal=True))


@on_meshes((4, 1), (2, 1))
def test_shard_map_with_replicated_keys(make_mesh: MakeMesh, mesh_shape: tuple[int, int]):
    """An array that every device holds whole gets the sum of the devices' gradients."""
    mesh = make_mesh(*mesh_shape)
    devices = mesh_shape[0]
    own = BATCH // devices  # examples of a device
    arrays = attention_arrays()
    arrays |= {name: np.tile(arrays[name][:own], (devices, 1, 1, 1)) for name in ("k", "v")}
    specs = ({"q": P("data"), "k": P(), "v": P(), "sinks": P()},)

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def total(given: dict[str, Any]) -> Any:
        return jax.lax.psum(loss(given), "data")

    shared = {name: jnp.asarray(x[:own] if name in ("k", "v") else x) for name, x in arrays.items()}
    expected = expected_gradients(arrays)
    expected |= {name: expected[name].reshape(devices, own, KV_LEN, 2, DIM).sum(axis=0) for name in ("k", "v")}
    assert_gradients(jax.jit(jax.grad(total))(shared), expected)


def ring_attention(q: Any, k: Any, v: Any, axis: str) -> Any:
    """Attention over keys that are spread over a mesh axis: parts are merged by their LSE while the keys go round."""
    size = jax.lax.axis_size(axis)
    out, lse = flash_attention(q, k, v, return_lse=True)
    for _ in range(size - 1):
        k, v = (jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]) for x in (k, v))
        part, part_lse = flash_attention(q, k, v, return_lse=True)
        merged = jnp.logaddexp(lse, part_lse)
        weights = (jnp.exp(x - merged).swapaxes(1, 2)[..., None] for x in (lse, part_lse))
        out, lse = sum(weight * x for weight, x in zip(weights, (out, part), strict=True)), merged
    return out


def test_shard_map_with_ppermute(make_mesh: MakeMesh, request: pytest.FixtureRequest):
    """Communication between the calls, many times over: nothing may wait for itself or read too early."""
    mesh = make_mesh(2, 1)
    arrays = {name: x for name, x in attention_arrays().items() if name != "sinks"}
    length = P(None, "data")
    ring = jax.shard_map(
        partial(ring_attention, axis="data"), mesh=mesh, in_specs=(length, length, length), out_specs=length
    )
    step = jax.jit(jax.value_and_grad(lambda *a: (ring(*a) ** 2).sum(), (0, 1, 2)))
    out = cuflash.flash_attention(**arrays)
    expected = on_numpy(arrays, 2 * out, None)
    orders = (slice(None), slice(None, None, -1))  # of the batch, in turn: what is read of the run before is wrong
    values = [[jnp.asarray(x[order]) for x in arrays.values()] for order in orders]
    runs = 2000 if "cuda" in request.node.callspec.id else 20
    for run in range(runs):
        value, gradients = step(*values[run % 2])
        np.testing.assert_allclose(value, (out**2).sum(), rtol=1e-5)
        for gradient, name in zip(gradients, "qkv", strict=True):
            assert_close(gradient, expected[name][orders[run % 2]])


PROCESS = """
import sys
import jax
import numpy as np
from cuflash.adapters.jax import flash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"localhost:{port}", 2, rank, local_device_ids=[rank])  # of the machine's GPUs
assert jax.local_device_count() == 1
mesh = jax.make_mesh((2,), ("data",))


def place(x):
    sharding = NamedSharding(mesh, P("data") if x.ndim == 4 else P())
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


arrays = {name: place(x) for name, x in np.load(f"{folder}/arrays.npz").items()}
gradients = jax.jit(jax.grad(lambda given: (flash_attention(**given, causal=True) ** 2).sum()))(arrays)
parts = {name: x.addressable_shards[0] for name, x in gradients.items()}
np.savez(f"{folder}/{rank}.npz", **{name: part.data for name, part in parts.items()})
"""


@pytest.mark.parametrize("platform", PLATFORMS)
def test_one_process_a_device(platform: str, tmp_path: Path):
    """Two processes of one device each: each has the gradients of its examples, and the sum of those of the sinks."""
    if len(jax.devices(platform)) < 2:
        pytest.skip("2 devices are needed, 1 is here")
    arrays = attention_arrays()
    np.savez(tmp_path / "arrays.npz", **arrays)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROCESS]
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
    out = cuflash.flash_attention(**arrays, causal=True)
    expected = on_numpy(arrays, 2 * out, None, causal=True)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as gradients:
            for name, gradient in gradients.items():
                part = expected[name] if name == "sinks" else np.split(expected[name], 2)[rank]
                np.testing.assert_allclose(gradient, part, rtol=2e-5, atol=2e-5)


ENDING = """
import jax
import jax.numpy as jnp
from cuflash.adapters.jax import flash_attention

jax.config.update("jax_num_cpu_devices", 4)
x = jnp.ones((4, 2, 128, 4, 16))
attend = jax.pmap(lambda x: flash_attention(x, x, x))
for _ in range(4):
    kept = attend(x)
if {drop}:
    del kept
"""


@pytest.mark.parametrize("drop", [False, True], ids=["results kept", "results dropped"])
def test_the_interpreter_ends_while_calls_run(drop: bool):
    """Without waiting for them it would wait for ever."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", ENDING.format(drop=drop)], check=True, timeout=60, env=environment)
