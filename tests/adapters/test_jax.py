"""The JAX adapter under JAX's transformations, against the same calls on NumPy arrays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.adapters import jax_backend
from tests.contract.test_bad_input import BACKWARD, BATCHED, SEQUENCES, Row, check, good_backward, good_forward
from tests.contract.test_bad_input import good_packed as good_packed_input

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

from cuflash.adapters.jax import flash_attention, flash_attention_backward  # noqa: E402

BATCH, Q_LEN, KV_LEN, HEADS, KV_HEADS, DIM = 2, 33, 40, 4, 2, 16

Put = Callable[[np.ndarray], Any]
Arrays = dict[str, np.ndarray]


@pytest.fixture(params=jax_backend.BACKENDS)
def put(request: pytest.FixtureRequest) -> Put:
    """Puts a NumPy array on the device under test."""
    return request.param.array


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def dense(*leading: int) -> Arrays:
    """q, k and v, with leading axes of examples."""
    q = draw(*leading, BATCH, Q_LEN, HEADS, DIM)
    k, v = (draw(*leading, BATCH, KV_LEN, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    return {"q": q, "k": k, "v": v}


def packed(*leading: int) -> Arrays:
    boundaries = {
        "cu_seqlens_q": np.array([0, 20, 20, 31], np.int32),
        "cu_seqlens_k": np.array([0, 15, 20, 40], np.int32),
    }
    q = draw(*leading, Q_LEN, HEADS, DIM)
    k, v = (draw(*leading, KV_LEN, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    return {"q": q, "k": k, "v": v, **boundaries}


def on_numpy(arrays: Arrays, dout: np.ndarray, dlse: np.ndarray | None, **options: Any) -> dict[str, np.ndarray]:
    """Results and gradients of one call on NumPy arrays, by name."""
    out, lse = cuflash.flash_attention(**arrays, **options, return_lse=True)
    gradients = cuflash.flash_attention_backward(dout, **arrays, out=out, lse=lse, dlse=dlse, **options)
    names = ("q", "k", "v", *(name for name in ("sinks", "bias") if name in arrays))
    return {"out": out, "lse": lse, **dict(zip(names, gradients, strict=True))}


def assert_close(actual: Any, expected: np.ndarray) -> None:
    assert isinstance(actual, jax.Array)
    assert actual.dtype == expected.dtype
    # Either result has float32's rounding of sums as large as the largest element.
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=1)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=2e-5, atol=2e-5 * largest)


def primitives(jaxpr: Any) -> list[str]:
    """The names of all primitives of a jaxpr, those in its loops and calls too."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += primitives(inner)
    return found


# ---- gradients ---------------------------------------------------------------------------------------------------

FEATURES: dict[str, tuple[Callable[[], Arrays], dict[str, Any]]] = {
    "causal": (dense, {"causal": True}),
    "window, softcap, scale": (dense, {"window_size": (9, 5), "softcap": 2.0, "scale": 0.3}),
    "sinks": (lambda: {**dense(), "sinks": draw(HEADS)}, {"causal": True}),
    "alibi": (lambda: {**dense(), "alibi_slopes": np.full((BATCH, HEADS), 0.1, np.float32)}, {}),
    "dropout": (dense, {"dropout_p": 0.2, "seed": 2**64 - 1}),
    "packed": (packed, {"causal": True}),
    "packed, sinks, lean": (lambda: {**packed(), "sinks": draw(HEADS)}, {"memory": "lean"}),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("feature", FEATURES)
def test_vjp_of_out_and_lse(put: Put, feature: str, jit: bool):
    make, options = FEATURES[feature]
    arrays = make()
    differentiated = [name for name in ("q", "k", "v", "sinks") if name in arrays]
    rest = {name: put(x) for name, x in arrays.items() if name not in differentiated}

    def function(*values: Any) -> Any:
        return flash_attention(**dict(zip(differentiated, values, strict=True)), **rest, **options, return_lse=True)

    def pull(values: Any, cotangents: Any) -> Any:
        results, vjp = jax.vjp(function, *values)
        return results, vjp(cotangents)

    forward_options = {name: value for name, value in options.items() if name != "memory"}
    out, lse = cuflash.flash_attention(**arrays, **forward_options, return_lse=True)
    dout, dlse = draw(*out.shape, seed=5), draw(*lse.shape, seed=6)
    expected = on_numpy(arrays, dout, dlse, **forward_options)
    values = [put(arrays[name]) for name in differentiated]
    results, gradients = (jax.jit(pull) if jit else pull)(values, (put(dout), put(dlse)))
    for actual, name in zip((*results, *gradients), ("out", "lse", *differentiated), strict=True):
        assert_close(actual, expected[name])


def test_gradient_of_one_result_alone(put: Put):
    arrays = dense()
    values = [put(x) for x in arrays.values()]
    out, lse = cuflash.flash_attention(**arrays, causal=True, return_lse=True)
    calls = {"out": lambda *a: flash_attention(*a, causal=True).sum(),
             "lse": lambda *a: flash_attention(*a, causal=True, return_lse=True)[1].sum()}  # fmt: skip
    dout, dlse = {"out": np.ones_like(out), "lse": np.zeros_like(out)}, {"out": None, "lse": np.ones_like(lse)}
    for name, call in calls.items():
        expected = on_numpy(arrays, dout[name], dlse[name], causal=True)
        for actual, argument in zip(jax.grad(call, (0, 1, 2))(*values), "qkv", strict=True):
            assert_close(actual, expected[argument])


def test_a_backward_has_no_dlse_where_lse_is_not_used():
    values = [jnp.asarray(x) for x in dense().values()]
    for index, operands in ((0, 6), (1, 7)):
        loss = lambda *a, index=index: flash_attention(*a, return_lse=True)[index].sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss))(*values)
        (backward,) = (e for e in jaxpr.eqns if e.primitive.name == "cuflash_backward")
        assert len(backward.invars) == operands


def test_forward_mode_raises():
    values = tuple(jnp.asarray(x) for x in dense().values())
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(flash_attention, values, values)


def test_second_derivatives_raise():
    values = tuple(jnp.asarray(x) for x in dense().values())
    gradient = jax.grad(lambda q: flash_attention(q, *values[1:]).sum())
    with pytest.raises(cuflash.UnsupportedError, match=r"second derivative.*jax\.grad"):
        jax.grad(lambda q: gradient(q).sum())(values[0])


def test_the_gradient_of_slopes_raises_unless_stopped():
    values = {name: jnp.asarray(x) for name, x in dense().items()}
    slopes = jnp.full(HEADS, 0.1, jnp.float32)
    with pytest.raises(cuflash.UnsupportedError, match=r"alibi_slopes.*stop_gradient"):
        jax.grad(lambda slopes: flash_attention(**values, alibi_slopes=slopes).sum())(slopes)
    stopped = jax.grad(lambda slopes: flash_attention(**values, alibi_slopes=jax.lax.stop_gradient(slopes)).sum())
    assert not stopped(slopes).any()


# ---- control flow and compilation --------------------------------------------------------------------------------


def loss_of(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return (flash_attention(q, k, v, causal=True, **options) ** 2).sum()


def reference_gradients(arrays: Arrays) -> dict[str, np.ndarray]:
    out = cuflash.flash_attention(**arrays, causal=True)
    return on_numpy(arrays, 2 * out, None, causal=True)


def test_value_and_grad(put: Put):
    arrays = dense()
    value, gradients = jax.jit(jax.value_and_grad(loss_of, (0, 1, 2)))(*map(put, arrays.values()))
    expected = reference_gradients(arrays)
    np.testing.assert_allclose(value, (expected["out"] ** 2).sum(), rtol=1e-5)
    for actual, name in zip(gradients, "qkv", strict=True):
        assert_close(actual, expected[name])


def test_scan_and_its_gradient(put: Put):
    arrays = {**dense(), "q": draw(3, BATCH, Q_LEN, HEADS, DIM)}

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradients(q: Any, k: Any, v: Any) -> Any:
        return jax.lax.scan(lambda total, q: (total + loss_of(q, k, v), None), jnp.float32(0), q)[0]

    actual = gradients(*map(put, arrays.values()))
    parts = [reference_gradients({**arrays, "q": q}) for q in arrays["q"]]
    assert_close(actual[0], np.stack([part["q"] for part in parts]))
    for gradient, name in zip(actual[1:], "kv", strict=True):
        assert_close(gradient, sum(part[name] for part in parts))


def test_while_and_cond(put: Put):
    arrays = {**dense(), "k": draw(BATCH, Q_LEN, HEADS, DIM), "v": draw(BATCH, Q_LEN, HEADS, DIM, seed=1)}

    @jax.jit
    def thrice(q: Any, k: Any, v: Any) -> Any:
        def step(state: Any) -> Any:
            count, q = state
            even = partial(flash_attention, causal=True)
            return count + 1, jax.lax.cond(count % 2 == 0, even, flash_attention, q, k, v)

        return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, q))[1]

    q = arrays["q"]
    for causal in (True, False, True):
        q = cuflash.flash_attention(q, arrays["k"], arrays["v"], causal=causal)
    assert_close(thrice(*map(put, arrays.values())), q)


@pytest.mark.parametrize(("names", "forwards"), [((), 2), (("cuflash_out", "cuflash_lse"), 1)])
def test_checkpoint_policies(put: Put, names: tuple[str, ...], forwards: int):
    """A policy that keeps out and LSE by their names spares the second forward."""
    arrays = dense()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    gradient = jax.grad(jax.checkpoint(loss_of, policy=policy), (0, 1, 2))
    values = [put(x) for x in arrays.values()]
    jaxpr = jax.make_jaxpr(gradient)(*values)
    assert primitives(jaxpr.jaxpr).count("cuflash_forward") == forwards
    for actual, name in zip(jax.jit(gradient)(*values), "qkv", strict=True):
        assert_close(actual, reference_gradients(arrays)[name])


def test_donation(put: Put):
    arrays = dense()
    q, k, v = map(put, arrays.values())
    out = jax.jit(flash_attention, donate_argnums=0)(q, k, v)
    assert q.is_deleted()
    assert_close(out, cuflash.flash_attention(**arrays))


def test_eval_shape_computes_nothing():
    q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in dense().values())
    out, lse = jax.eval_shape(partial(flash_attention, return_lse=True), q, k, v)
    assert (out.shape, out.dtype) == (q.shape, jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((BATCH, HEADS, Q_LEN), jnp.float32)


def test_eight_threads(put: Put):
    step = jax.jit(jax.grad(loss_of, (0, 1, 2)))
    examples = [{name: x * (1 + seed / 8) for name, x in dense().items()} for seed in range(8)]

    def run(arrays: Arrays) -> Any:
        values = [put(x) for x in arrays.values()]
        return [step(*values) for _ in range(5)][-1]

    with ThreadPoolExecutor(8) as pool:
        for arrays, gradients in zip(examples, pool.map(run, examples), strict=True):
            for actual, name in zip(gradients, "qkv", strict=True):
                assert_close(actual, reference_gradients(arrays)[name])


CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in ("cuflash_forward", "cuflash_backward")]

LOADER = """
import sys
import jax, jax.export
import numpy as np
import cuflash.adapters.jax
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
arrays = np.load(sys.argv[2])
gradients = exported.call(*(arrays[name] for name in "qkv"))
np.savez(sys.argv[3], **dict(zip("qkv", map(np.asarray, gradients))))
"""


def test_export_to_another_process(tmp_path: Any):
    arrays = dense()
    exported = export.export(jax.jit(jax.grad(loss_of, (0, 1, 2))), platforms=["cpu"], disabled_checks=CHECKS)
    blob = exported(*map(jnp.asarray, arrays.values())).serialize()
    (tmp_path / "exported").write_bytes(blob)
    np.savez(tmp_path / "arrays.npz", **arrays)
    loader = [sys.executable, "-c", LOADER, *(tmp_path / name for name in ("exported", "arrays.npz", "gradients.npz"))]
    subprocess.run([str(part) for part in loader], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    with np.load(tmp_path / "gradients.npz") as gradients:
        for name in "qkv":
            np.testing.assert_allclose(gradients[name], reference_gradients(arrays)[name], rtol=2e-5, atol=2e-5)


def test_lowering_for_a_gpu_needs_one():
    """Kernels are compiled then, for the GPU that they will run on."""
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is a GPU here")
    traced = jax.jit(loss_of).trace(*map(jnp.asarray, dense().values()))
    with pytest.raises(cuflash.UnsupportedError, match="JAX finds no GPU here"):
        traced.lower(lowering_platforms=("cuda",))


def test_the_cuda_backend_takes_no_arrays_of_the_cpu():
    q = jax.device_put(np.zeros((1, 4, 2, 8), np.float32), jax.devices("cpu")[0])
    with pytest.raises(cuflash.UnsupportedError, match=r"backend: got 'cuda'.*jax\.device_put"):
        cuflash.flash_attention(q, q, q, backend="cuda")


# ---- vmap --------------------------------------------------------------------------------------------------------

EXAMPLES = 3

# how arrays are made, which of them have an axis of examples and where, and options
VMAP: dict[str, tuple[Callable[..., Arrays], dict[str, int], dict[str, Any]]] = {
    "all": (dense, {"q": 0, "k": 0, "v": 0}, {"causal": True}),
    "q alone": (dense, {"q": 0}, {"causal": True}),
    "k in the middle, v at the end": (dense, {"q": 0, "k": 2, "v": 4}, {"window_size": (5, 2)}),
    "bhsd": (dense, {"q": 1, "v": 1}, {"layout": "bhsd"}),
    "same slopes": (lambda *n: {**dense(*n), "alibi_slopes": draw(HEADS) ** 2}, {"q": 0, "k": 0, "v": 0}, {}),
    "own slopes": (lambda *n: {**dense(*n), "alibi_slopes": draw(*n, HEADS) ** 2}, {"q": 0, "alibi_slopes": 0}, {}),
    "own slopes of the batch": (
        lambda *n: {**dense(*n), "alibi_slopes": draw(*n, BATCH, HEADS) ** 2}, {"q": 0, "alibi_slopes": 0}, {},
    ),
    "same sinks": (lambda *n: {**dense(*n), "sinks": draw(HEADS)}, {"q": 0, "k": 0, "v": 0}, {"causal": True}),
    "own sinks": (lambda *n: {**dense(*n), "sinks": draw(*n, HEADS)}, {"sinks": 0}, {"causal": True}),
    "dropout": (dense, {"q": 0, "k": 0, "v": 0}, {"dropout_p": 0.4, "seed": 3}),
    "same bias, of heads": (lambda *n: {**dense(*n), "bias": draw(HEADS, 1, KV_LEN)}, {"q": 0}, {"causal": True}),
    "own bias, of queries": (lambda *n: {**dense(*n), "bias": draw(*n, Q_LEN, 1)}, {"bias": 1}, {}),
    "own bias and mask, own sinks": (
        lambda *n: {
            **dense(*n), "sinks": draw(*n, HEADS), "bias": draw(*n, BATCH, 1, Q_LEN, KV_LEN),
            "mask": draw(*n, Q_LEN, KV_LEN, seed=5) < 1,
        },
        {"sinks": 0, "bias": 2, "mask": 0}, {},
    ),
    "mask, dropout": (
        lambda *n: {**dense(*n), "mask": draw(*n, Q_LEN, KV_LEN) < 1},
        {"q": 0, "mask": 0}, {"dropout_p": 0.4, "seed": 3},
    ),
    "packed": (packed, {"q": 0, "k": 0, "v": 0}, {"causal": True}),
    "own boundaries": (
        lambda *n: {**packed(*n), "cu_seqlens_q": np.array([[0, 1, 2, 3], [0, 9, 20, 30], [0, 0, 0, 33]], np.int32)},
        {"q": 0, "cu_seqlens_q": 0}, {"causal": True},
    ),
}  # fmt: skip


def vmapped(name: str) -> tuple[Arrays, Callable[[Arrays, int], Arrays], dict[str, int], dict[str, Any]]:
    """The arrays of a case of VMAP, what picks one example, the axes of examples, and the options."""
    make, axes, options = VMAP[name]
    whole = make(EXAMPLES)
    arrays = {}
    for operand, x in whole.items():
        single = make()[operand].ndim
        if operand in axes:
            arrays[operand] = np.moveaxis(x, 0, axes[operand])
        else:
            arrays[operand] = x if x.ndim == single else x[0]
    if options.get("layout") == "bhsd":
        arrays["k"] = arrays["k"][:, :, :KV_HEADS]
        arrays["q"] = draw(BATCH, EXAMPLES, HEADS, Q_LEN, DIM)
        arrays["k"], arrays["v"] = draw(BATCH, KV_HEADS, KV_LEN, DIM), draw(BATCH, EXAMPLES, KV_HEADS, KV_LEN, DIM)

    def pick(arrays: Arrays, i: int) -> Arrays:
        return {name: np.take(x, i, axes[name]) if name in axes else x for name, x in arrays.items()}

    return arrays, pick, axes, options


@pytest.mark.parametrize("name", VMAP)
def test_vmap(put: Put, name: str):
    arrays, pick, axes, options = vmapped(name)
    in_axes = ({operand: axes.get(operand) for operand in arrays},)
    call = jax.vmap(lambda given: flash_attention(**given, **options, return_lse=True), in_axes=in_axes)
    out, lse = jax.jit(call)({operand: put(x) for operand, x in arrays.items()})
    expected = [cuflash.flash_attention(**pick(arrays, i), **options, return_lse=True) for i in range(EXAMPLES)]
    assert_close(out, np.stack([pair[0] for pair in expected]))
    assert_close(lse, np.stack([pair[1] for pair in expected]))


@pytest.mark.parametrize("name", VMAP)
def test_vmap_of_grad(put: Put, name: str):
    arrays, pick, axes, options = vmapped(name)
    differentiated = [operand for operand in ("q", "k", "v", "sinks", "bias") if operand in arrays]
    constant = [operand for operand in arrays if operand not in differentiated]

    def loss(given: dict[str, Any], fixed: dict[str, Any]) -> Any:
        out, lse = flash_attention(**given, **fixed, **options, return_lse=True)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    in_axes = tuple({operand: axes.get(operand) for operand in names} for names in (differentiated, constant))
    given, fixed = ({operand: put(arrays[operand]) for operand in names} for names in (differentiated, constant))
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=in_axes))(given, fixed)
    for i in range(EXAMPLES):
        example = pick(arrays, i)
        out, lse = cuflash.flash_attention(**example, **options, return_lse=True)
        expected = on_numpy(example, 2 * out, np.isfinite(lse).astype(np.float32), **options)
        for operand in differentiated:
            assert_close(gradients[operand][i], expected[operand])


def test_vmap_of_vmap(put: Put):
    arrays = dense(2, EXAMPLES)
    out = jax.vmap(jax.vmap(partial(flash_attention, causal=True)))(*map(put, arrays.values()))
    merged = {name: x.reshape(-1, *x.shape[3:]) for name, x in arrays.items()}
    assert_close(out, cuflash.flash_attention(**merged, causal=True).reshape(arrays["q"].shape))


def test_vmap_over_no_examples():
    none = {name: jnp.zeros((0, *x.shape), x.dtype) for name, x in dense().items()}
    gradients = jax.vmap(jax.grad(loss_of, (0, 1, 2)))(*none.values())
    assert [x.shape for x in gradients] == [x.shape for x in none.values()]


def test_vmap_is_one_call_where_that_is_possible():
    """And a loop only for dropout, whose mask depends on the place in the batch, and for boundaries that differ."""
    loops = set()
    for name in VMAP:
        arrays, _, axes, options = vmapped(name)
        in_axes = ({operand: axes.get(operand) for operand in arrays},)
        call = jax.vmap(lambda given, options=options: flash_attention(**given, **options), in_axes=in_axes)
        if "scan" in primitives(jax.make_jaxpr(call)(arrays).jaxpr):
            loops.add(name)
    assert loops == {"dropout", "mask, dropout", "own boundaries"}


# ---- bad input ---------------------------------------------------------------------------------------------------


def in_jax(row: Row) -> bool:
    """Whether a row of the contract's bad input is one here: NumPy arrays of any strides are copied, the values of
    boundaries are known when the call runs, and arrays of other libraries are no arrays of JAX.
    """
    _, argument, was, allowed, _ = row
    values = argument.startswith("cu_seqlens") and allowed in ("never decrease", "start at 0", "12", "14")
    return was not in ("strides", "Unexportable", "OtherDevice") and not values


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[1]} {row[2]}") for row in BATCHED if in_jax(row)])
def test_bad_batched(row: Row):
    check(flash_attention, good_forward(), row)
    check(flash_attention_backward, functional(good_forward()), row)


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row[1]} {row[2]}") for row in SEQUENCES if in_jax(row)])
def test_bad_packed(row: Row):
    check(flash_attention, good_packed_input(), row)
    check(flash_attention_backward, functional(good_packed_input()), row)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row[1]} {row[2]}")
        for row in BACKWARD
        if in_jax(row) and row[1] not in ("dq", "dk", "dv")
    ],
)
def test_bad_backward(row: Row):
    check(flash_attention_backward, functional(good_forward()), row)


def functional(forward: dict[str, Any]) -> dict[str, Any]:
    """A good call of the backward without arrays for the gradients."""
    return {name: x for name, x in good_backward(forward).items() if name not in ("dq", "dk", "dv")}


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_given_gradients_are_refused(name: str):
    row = ({name: np.zeros(1)}, name, "ndarray", "None", TypeError)
    check(flash_attention_backward, functional(good_forward()), row)


def test_accumulating_is_refused():
    row = ({"accumulate": True}, "accumulate", "True", "False", ValueError)
    check(flash_attention_backward, functional(good_forward()), row)


@pytest.mark.parametrize("option", ["scale", "softcap", "causal", "seed", "dropout_p", "return_lse"])
def test_traced_options_are_refused(option: str):
    with pytest.raises(TypeError, match=rf"^{option}: got .*allowed"):
        jax.jit(lambda value: flash_attention(**good_forward(), **{option: value}))(1)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bad_boundaries_raise_when_the_call_runs(name: str):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"ValueError: {name}: got 2 after 9 at index 2"):
        flash_attention(**(good_packed_input() | {name: np.array([0, 9, 2], np.int32)})).block_until_ready()


def test_symbolic_lengths_are_refused():
    (length,) = export.symbolic_shape("length")
    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    with pytest.raises(cuflash.UnsupportedError, match="q: got the symbolic shape"):
        export.export(jax.jit(flash_attention))(q, q, q)


def test_no_dtype_is_narrowed_silently():
    wide = {name: x.astype(np.float64) for name, x in good_forward().items()}
    with jax.enable_x64(False):
        with pytest.raises(TypeError, match="q: got dtype float64; allowed: float32, or 64-bit types"):
            flash_attention(**wide)
        with pytest.raises(TypeError, match="cu_seqlens_q: got dtype int64"):
            flash_attention(**(good_packed_input() | {"cu_seqlens_q": np.array([0, 5, 12])}))


# ---- the way in --------------------------------------------------------------------------------------------------


def test_the_public_functions_take_jax_arrays(put: Put):
    arrays = dense()
    values = [put(x) for x in arrays.values()]
    out, lse = jax.jit(partial(cuflash.flash_attention, causal=True, return_lse=True))(*values)
    gradients = cuflash.flash_attention_backward(2 * out, *values, out, lse, causal=True)
    for actual, name in zip(gradients, "qkv", strict=True):
        assert_close(actual, reference_gradients(arrays)[name])


def test_numpy_operands_are_taken_along(put: Put):
    arrays = {**dense(), "sinks": draw(HEADS)}
    out = jax.jit(lambda q: flash_attention(q, arrays["k"], arrays["v"], sinks=arrays["sinks"]))(put(arrays["q"]))
    assert_close(out, cuflash.flash_attention(**arrays))
