"""A small GPT in plain JAX, trained twice: with cuflash and with jax.nn's attention. The losses agree within rounding.

    python examples/gpt_jax.py

Bytes of the language reference that ships with Python; 50 steps of Adam; attention is in bfloat16 on a GPU.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cuflash.adapters.jax import flash_attention

STEPS, BATCH, LENGTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 50, 8, 128, 2, 4, 2, 16
WIDTH, RATE = HEADS * HEAD_DIM, 3e-3

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v [batch, len, heads, head_dim]
ATTENTIONS: dict[str, Attention] = {
    "cuflash": functools.partial(flash_attention, causal=True),
    "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=True),
}


def initial_parameters() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def matrix(rows: int, cols: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, cols)) / np.sqrt(rows), jnp.float32)

    layer = {"qkv": (WIDTH, WIDTH + 2 * KV_HEADS * HEAD_DIM), "out": (WIDTH, WIDTH)}
    layer |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    layers = [{name: matrix(*shape) for name, shape in layer.items()} for _ in range(LAYERS)]
    return {"tokens": matrix(256, WIDTH), "places": matrix(LENGTH, WIDTH), "layers": layers}


def normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def loss_of(parameters: dict[str, Any], text: jax.Array, attention: Attention, dtype: Any) -> jax.Array:
    """Mean negative log-likelihood of text [batch, LENGTH + 1]."""
    x = parameters["tokens"][text[:, :-1]] + parameters["places"]
    for layer in parameters["layers"]:
        qkv = (normalised(x) @ layer["qkv"]).astype(dtype).reshape(*x.shape[:2], -1, HEAD_DIM)
        out = attention(*jnp.split(qkv, [HEADS, HEADS + KV_HEADS], axis=2))
        x += out.astype(x.dtype).reshape(x.shape) @ layer["out"]
        x += jax.nn.gelu(normalised(x) @ layer["up"]) @ layer["down"]
    scores = jax.nn.log_softmax(normalised(x) @ parameters["tokens"].T)
    return -jnp.mean(jnp.take_along_axis(scores, text[:, 1:, None], axis=-1))


def train(attention: Attention, dtype: Any) -> list[float]:
    """The loss before every step; q, k and v are of the dtype."""
    corpus = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, moments: Any, number: Any, text: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(parameters, text, attention, dtype)
        first, second = (
            jax.tree.map(lambda m, g, p=power, d=decay: d * m + (1 - d) * g**p, moment, gradients)
            for moment, power, decay in zip(moments, (1, 2), (0.9, 0.99), strict=True)
        )
        rates = RATE / (1 - 0.9**number), 1 / (1 - 0.99**number)
        parameters = jax.tree.map(
            lambda p, m, s: p - rates[0] * m / (jnp.sqrt(rates[1] * s) + 1e-8), parameters, first, second
        )
        return parameters, (first, second), loss

    parameters = initial_parameters()
    moments = tuple(jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))
    losses = []
    for number in range(1, STEPS + 1):
        starts = rng.integers(0, len(corpus) - LENGTH - 1, BATCH)
        text = jnp.asarray(np.stack([corpus[start : start + LENGTH + 1] for start in starts]))
        parameters, moments, loss = step(parameters, moments, number, text)
        losses.append(float(loss))
    return losses


def main() -> None:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    losses = {}
    for name, attention in ATTENTIONS.items():
        start = time.perf_counter()
        losses[name] = train(attention, dtype)
        seconds = time.perf_counter() - start
        print(f"{name:8} loss {losses[name][0]:.4f} -> {losses[name][-1]:.4f} in {STEPS} steps, {seconds:.1f} s")
    difference = max(abs(a - b) for a, b in zip(losses["cuflash"], losses["jax.nn"], strict=True))
    print(f"largest difference of a loss: {difference:.1e}")


if __name__ == "__main__":
    main()
