"""A small GPT in Flax, trained twice: with cuflash and with jax.nn's attention. The losses agree within rounding.

    pip install flax
    python examples/gpt_flax.py

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
import optax
from flax import linen

from cuflash.adapters.jax import attention_fn

STEPS, BATCH, LENGTH, LAYERS, HEADS, WIDTH, RATE = 50, 8, 128, 2, 4, 64, 3e-3

Attention = Callable[..., jax.Array]  # of q, k, v [batch, len, heads, head_dim] and what else Flax passes


def attention_of_jax(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


ATTENTIONS: dict[str, Attention] = {
    "cuflash": functools.partial(attention_fn, is_causal=True),
    "jax.nn": attention_of_jax,
}


class Gpt(linen.Module):
    """Scores of the next byte [batch, len, 256] after each byte of text [batch, len]; q, k and v are of `dtype`."""

    attention: Attention
    dtype: Any

    @linen.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        tokens, places = linen.Embed(256, WIDTH), linen.Embed(LENGTH, WIDTH)
        x = tokens(text) + places(jnp.arange(text.shape[1]))
        for _ in range(LAYERS):
            attend = linen.MultiHeadDotProductAttention(HEADS, dtype=self.dtype, attention_fn=self.attention)
            x += attend(linen.RMSNorm()(x)).astype(x.dtype)
            x += linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(linen.RMSNorm()(x))))
        return tokens.attend(linen.RMSNorm()(x))


def train(attention: Attention, dtype: Any) -> list[float]:
    """The loss before every step, the mean negative log-likelihood of a byte."""
    corpus = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(1)
    model, optimizer = Gpt(attention, dtype), optax.adam(RATE)

    def loss_of(parameters: Any, text: jax.Array) -> jax.Array:  # text [batch, LENGTH + 1]
        scores: Any = model.apply(parameters, text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(scores, text[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, text: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(parameters, text)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss

    parameters = model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    state, losses = optimizer.init(parameters), []
    for _ in range(STEPS):
        starts = rng.integers(0, len(corpus) - LENGTH - 1, BATCH)
        text = jnp.asarray(np.stack([corpus[start : start + LENGTH + 1] for start in starts]))
        parameters, state, loss = step(parameters, state, text)
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
