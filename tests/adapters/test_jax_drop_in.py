"""jax.nn's signature against jax.nn, Flax's attention_fn against Flax, and packed sequences from segment ids."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from tests.adapters.jax_backend import ON_GPU
from tests.adapters.test_jax import Put, assert_close, draw, put  # noqa: F401

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from cuflash.adapters.jax import attention_fn, dot_product_attention, flash_attention, segment_boundaries  # noqa: E402

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 5},
    "window, left and right": {"local_window_size": (7, 2)},
    "causal and window": {"is_causal": True, "local_window_size": (4, 9)},
    "window of one": {"local_window_size": 0},
    "scale": {"scale": 0.2, "is_causal": True},
}


def arrays_of(put: Put, q_len: int, kv_len: int) -> tuple[Any, Any, Any]:  # noqa: F811
    k, v = (draw(BATCH, kv_len, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    return put(draw(BATCH, q_len, HEADS, DIM)), put(k), put(v)


def results_and_gradients(function: Any, weight: Any, *arrays: Any) -> Any:
    """out and residual, and the gradients of weighted out."""

    def loss(*arrays: Any) -> Any:
        out, residual = function(*arrays, return_residual=True)
        return (out * weight).sum(), (out, residual)

    gradients, results = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return *results, *gradients


def rows_with_keys(q_len: int, kv_len: int, options: dict[str, Any]) -> np.ndarray:
    """Which queries see a key; the others have an average of value in jax.nn and 0 here."""
    window = options.get("local_window_size")
    left = None if window is None else window if isinstance(window, int) else window[0]
    return np.arange(q_len) < (q_len if left is None else kv_len + left)


@pytest.mark.parametrize("lengths", [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("mask", MASKS)
def test_like_jax_nn(put: Put, mask: str, lengths: tuple[int, int]):  # noqa: F811
    arrays, options = arrays_of(put, *lengths), MASKS[mask]
    seen = rows_with_keys(*lengths, options)
    weight = np.where(seen[:, None, None], draw(lengths[0], HEADS, DIM, seed=9), 0).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        expected = results_and_gradients(partial(jax.nn.dot_product_attention, **options), weight, *arrays)
    actual = results_and_gradients(partial(dot_product_attention, **options), weight, *arrays)
    for result in actual[:2]:
        assert not np.isfinite(result[:, ~seen]).any() or not np.asarray(result[:, ~seen]).any()
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert_close(a[:, seen], np.asarray(e)[:, seen])
    for a, e in zip(actual[2:], expected[2:], strict=True):
        assert_close(a, np.asarray(e))


@pytest.mark.parametrize("lengths", [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": 30}])
@pytest.mark.parametrize("shape", ["full", "keys", "queries"])
def test_bias_and_mask_like_jax_nn(put: Put, shape: str, options: dict[str, Any], lengths: tuple[int, int]):  # noqa: F811
    q_len, kv_len = lengths
    arrays, weight = arrays_of(put, *lengths), draw(q_len, HEADS, DIM, seed=9)
    shapes = {"full": (BATCH, HEADS, q_len, kv_len), "keys": (1, HEADS, 1, kv_len), "queries": (BATCH, 1, q_len, 1)}
    bias = put(draw(*shapes[shape], seed=3))
    mask = draw(BATCH, 1, q_len, kv_len, seed=4) < 0.8
    mask[..., 0] = True
    lengths_of_keys = put(np.array([kv_len, kv_len - 5], np.int32)) if not options else None

    def both(function: Any) -> Any:
        def call(*given: Any, return_residual: bool) -> Any:
            *qkv, bias = given
            more = {"bias": bias, "mask": put(mask), "key_value_seq_lengths": lengths_of_keys, **options}
            return function(*qkv, **more, return_residual=return_residual)

        def loss(*given: Any) -> Any:
            out, residual = call(*given, return_residual=True)
            return (out * weight).sum(), (out, residual)

        gradients, results = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays, bias)
        return *results, *gradients

    with jax.default_matmul_precision("highest"):
        expected = both(jax.nn.dot_product_attention)
    for a, e in zip(both(dot_product_attention), expected, strict=True):
        assert_close(a, np.asarray(e))


@pytest.mark.parametrize("which", ["query", "key", "both", "the same, causal", "the same, window"])
def test_sequence_lengths_like_jax_nn(put: Put, which: str):  # noqa: F811
    arrays = arrays_of(put, 24, 24) if "the same" in which else arrays_of(put, 24, 40)
    q_lengths, kv_lengths = jnp.array([24, 7], jnp.int32), jnp.array([13, 40], jnp.int32)
    given: dict[str, dict[str, Any]] = {
        "query": {"query_seq_lengths": q_lengths},
        "key": {"key_value_seq_lengths": kv_lengths},
        "both": {"query_seq_lengths": q_lengths, "key_value_seq_lengths": kv_lengths},
    }
    same = {"query_seq_lengths": q_lengths, "key_value_seq_lengths": q_lengths}
    given["the same, causal"] = {**same, "is_causal": True}
    given["the same, window"] = {**same, "local_window_size": (3, 2)}
    weight = draw(24, HEADS, DIM, seed=9)
    with jax.default_matmul_precision("highest"):
        expected = results_and_gradients(partial(jax.nn.dot_product_attention, **given[which]), weight, *arrays)
    actual = results_and_gradients(partial(dot_product_attention, **given[which]), weight, *arrays)
    for index in (0, 2, 3, 4):
        assert_close(actual[index], np.asarray(expected[index]))
    if "query_seq_lengths" in given[which]:
        assert np.isneginf(actual[1][1, 7:]).all()
        assert_close(actual[1][1, :7], np.asarray(expected[1][1, :7]))


def test_without_a_batch_axis(put: Put):  # noqa: F811
    q, k, v = (x[0] for x in arrays_of(put, 24, 24))
    actual = dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    with jax.default_matmul_precision("highest"):
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, np.asarray(e))


def test_sinks_and_queries_without_keys(put: Put):  # noqa: F811
    """LSE of a row that sees no key is its head's sink."""
    q, k, v = arrays_of(put, 20, 4)
    sinks = put(draw(HEADS))
    out, residual = dot_product_attention(q, k, v, local_window_size=3, sinks=sinks, return_residual=True)
    assert not np.asarray(out[:, 7:]).any()
    np.testing.assert_array_equal(residual[:, 7:], np.broadcast_to(sinks, (BATCH, 13, HEADS)))
    inside = dot_product_attention(q[:, :7], k, v, local_window_size=3, sinks=sinks)
    assert_close(out[:, :7], np.asarray(inside))


BAD: dict[str, tuple[dict[str, Any], str, type[Exception]]] = {
    "bias": ({"bias": np.zeros((1, 1, 5, 4), np.float32)}, "broadcasts", ValueError),
    "mask": ({"mask": np.ones((3, 1, 5, 5), bool)}, "broadcasts", ValueError),
    "implementation": ({"implementation": "cudnn"}, "None", ValueError),
    "is_causal": ({"is_causal": 1}, "True or False", TypeError),
    "local_window_size": ({"local_window_size": (3, -1)}, ">= 0", ValueError),
    "query": ({"query": np.zeros((5, 16), np.float32)}, r"\[batch, len, heads, head_dim\]", ValueError),
    "query_seq_lengths": ({"query_seq_lengths": np.zeros(3, np.int32)}, r"int32 \[2\]", ValueError),
    "key_value_seq_lengths": (
        {"key_value_seq_lengths": np.zeros(2, np.int32), "is_causal": True},
        "one array as both",
        cuflash.UnsupportedError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_of_jax_nns_signature(name: str):
    change, allowed, exception = BAD[name]
    good = {"query": draw(2, 5, HEADS, DIM), "key": draw(2, 5, KV_HEADS, DIM), "value": draw(2, 5, KV_HEADS, DIM)}
    with pytest.raises(exception, match=rf"^{name}: got .*{allowed}"):
        dot_product_attention(**(good | change))


# ---- segments ----------------------------------------------------------------------------------------------------


def test_boundaries_of_segments():
    ids = jnp.array([[3, 3, 3, 7, 7], [7, 7, 0, 0, 0]])
    boundaries = jax.jit(partial(segment_boundaries, max_segments=6))(ids)
    np.testing.assert_array_equal(boundaries, [0, 3, 5, 7, 10, 10, 10])
    assert boundaries.dtype == jnp.int32
    np.testing.assert_array_equal(segment_boundaries(ids[0], max_segments=2), [0, 3, 5])
    np.testing.assert_array_equal(segment_boundaries(ids, max_segments=3), [0, 3, 5, 7])  # the rest is in no sequence


def test_attention_within_segments(put: Put):  # noqa: F811
    """Packed as one call, under jit, with a gradient, equals every segment alone."""
    ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    q, k, v = (put(draw(*ids.shape, heads, DIM, seed=heads)) for heads in (HEADS, KV_HEADS, KV_HEADS))

    @jax.jit
    def packed(q: Any, k: Any, v: Any, ids: Any) -> Any:
        boundaries = segment_boundaries(ids, max_segments=8)
        rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        out = flash_attention(*rows, causal=True, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries)
        return out.reshape(q.shape)

    def masked(q: Any, k: Any, v: Any, ids: Any) -> Any:
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)

    with jax.default_matmul_precision("highest"):
        expected = jax.value_and_grad(lambda *a: (masked(*a) ** 2).sum(), (0, 1, 2))(q, k, v, put(ids))
    actual = jax.value_and_grad(lambda *a: (packed(*a) ** 2).sum(), (0, 1, 2))(q, k, v, put(ids))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    for a, e in zip(actual[1], expected[1], strict=True):
        assert_close(a, np.asarray(e))


@pytest.mark.parametrize(
    ("ids", "max_segments", "name"),
    [
        (np.zeros(4, np.float32), 2, "segment_ids"),
        (np.zeros((1, 2, 3), int), 2, "segment_ids"),
        (np.zeros(4, int), 0, "max_segments"),
    ],
)
def test_bad_segments(ids: np.ndarray, max_segments: int, name: str):
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed"):
        segment_boundaries(ids, max_segments=max_segments)


# ---- Flax and Equinox --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_flax_modules(put: Put, module: str):  # noqa: F811
    pytest.importorskip("flax")
    x = put(draw(2, 12, 32))
    mask = np.tril(np.ones((12, 12), bool))[None, None]

    if module == "linen":
        from flax import linen

        ours = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=partial(attention_fn, is_causal=True))
        theirs = linen.MultiHeadDotProductAttention(num_heads=4)
        parameters = theirs.init(jax.random.key(0), x)

        def losses(parameters: Any, masked: bool) -> Any:
            out = theirs.apply(parameters, x, mask=mask) if masked else ours.apply(parameters, x)
            return (out**2).sum()

    else:
        from flax import nnx

        made = {
            name: nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0), attention_fn=function)
            for name, function in (("ours", attention_fn), ("theirs", nnx.dot_product_attention))
        }
        graph = {name: nnx.split(attention)[0] for name, attention in made.items()}
        parameters = nnx.split(made["theirs"])[1]

        def losses(parameters: Any, masked: bool) -> Any:
            name, options = ("theirs", {"mask": mask}) if masked else ("ours", {"is_causal": True})
            return (nnx.merge(graph[name], parameters)(x, **options) ** 2).sum()

    with jax.default_matmul_precision("highest"):
        actual, expected = (jax.jit(jax.value_and_grad(partial(losses, masked=m)))(parameters) for m in (False, True))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"mask": np.ones((1, 1, 4, 5), bool)}, "mask"),
        ({"bias": np.ones((1, 1, 1, 4, 4), np.float32)}, "bias"),
        ({"dropout_rate": 0.1}, "dropout_rate"),
        ({"module": object()}, "module"),
        ({"precision": "highest"}, "precision"),
    ],
)
def test_bad_input_of_attention_fn(change: dict[str, Any], name: str):
    x = jnp.asarray(draw(2, 4, HEADS, DIM))
    with pytest.raises((cuflash.UnsupportedError, ValueError), match=f"^{name}: got"):
        attention_fn(x, x, x, **change)


def test_attention_fn_takes_any_batch_axes_and_a_dtype():
    x = jnp.asarray(draw(2, 3, 4, HEADS, DIM))
    out = attention_fn(x, x, x, dtype=jnp.bfloat16, dropout_rate=0.5, deterministic=True)
    assert (out.shape, out.dtype) == (x.shape, jnp.bfloat16)
    merged = np.asarray(x.astype(jnp.bfloat16)).reshape(6, 4, HEADS, DIM)
    np.testing.assert_array_equal(
        np.asarray(out).reshape(merged.shape), cuflash.flash_attention(merged, merged, merged)
    )


def test_attention_fn_takes_flax_masks_and_biases():
    x = jnp.asarray(draw(2, 3, 4, HEADS, DIM))
    mask = np.tril(np.ones((2, 1, 1, 4, 4), np.float32))
    bias = jnp.asarray(draw(HEADS, 1, 4), jnp.bfloat16)
    found = attention_fn(x, x, x, bias, mask)
    assert_close(found, np.asarray(attention_fn(x, x, x, bias.astype(jnp.float32), is_causal=True)))


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "dtype", "allowed"),
    [
        ("cpu", "float32", 1e-5),
        *(pytest.param("cuda", "bfloat16", 0.05, id=f"cuda-{name}", marks=marks) for name, marks in ON_GPU.items()),
    ],
)
def test_fifty_steps_of_a_flax_gpt_like_with_jax_nn(platform: str, dtype: str, allowed: float):
    """The losses differ by the rounding of attention alone; the model learns."""
    pytest.importorskip("flax")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "gpt_flax.py"))
    with jax.enable_x64(False), jax.default_device(jax.devices(platform)[0]):
        ours, theirs = (np.array(example["train"](function, dtype)) for function in example["ATTENTIONS"].values())
    assert len(ours) == 50
    assert ours[-1] < 0.6 * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=allowed)
