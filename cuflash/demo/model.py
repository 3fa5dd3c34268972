"""A small byte-level language model with hand-written gradients around the two functions of cuflash.

Written once over an array module `xp` (numpy or cupy). One block is x += attention(norm(x)), x += mlp(norm(x)):
pre-normalised (RMSNorm without a gain, which the matrix that follows absorbs), causal attention with ALiBi slopes for
the positions, and a squared-ReLU MLP. A position starts as the sum of the embeddings of its byte and of the bytes
shortly before it, a table for each distance, so that context and induction are a linear map away from the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import cuflash

BYTES = 256  # the vocabulary
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The sizes of a model."""

    dim: int = 128
    heads: int = 2
    blocks: int = 2
    hidden: int = 512  # of the MLP
    history: int = 4  # bytes embedded at a position: its own and the history - 1 before it
    reach: float = 256  # bytes after which the ALiBi of the broadest head has taken one from a score
    attention_dtype: str | None = None  # of q, k, v and their products; None is the model's


class Model:
    """Parameters, the loss, and its gradients. The parameters are the arrays of `parameters`, updated in place."""

    def __init__(self, config: Config, *, xp: Any = np, dtype: str = "float32", seed: int = 0) -> None:
        self.config, self.xp, self.dtype = config, xp, np.dtype(dtype)
        self.attention_dtype = np.dtype(config.attention_dtype or dtype)
        draw = np.random.default_rng(seed).standard_normal  # on the host: the same weights for every array module
        dim, hidden = config.dim, config.hidden

        def matrix(rows: int, cols: int, gain: float = 1.0) -> Any:
            return xp.asarray((draw((rows, cols)) * gain / math.sqrt(rows)).astype(self.dtype))

        self.parameters: dict[str, Any] = {
            f"embedding{distance}": matrix(BYTES, dim, math.sqrt(BYTES / config.history))
            for distance in range(config.history)
        }
        branch = 1 / math.sqrt(2 * config.blocks)  # keeps the variance of the residual sum near one
        for block in range(config.blocks):
            self.parameters[f"qkv{block}"] = matrix(dim, 3 * dim)
            self.parameters[f"merge{block}"] = matrix(dim, dim, branch)
            self.parameters[f"up{block}"] = matrix(dim, hidden)
            self.parameters[f"down{block}"] = matrix(hidden, dim, branch)
        self.parameters["logits"] = matrix(dim, BYTES, 0.0)  # all bytes equally likely: 8 bits per byte
        # Geometric slopes, from sharp to broad; a reach of 256 gives the usual ones.
        slopes = [config.reach ** (-(head + 1) / config.heads) for head in range(config.heads)]
        self.slopes = xp.asarray(slopes, "float32")

    def loss(self, tokens: Any) -> float:
        """Mean cross entropy in nats of tokens[:, 1:], from the bytes before; tokens [batch, length + 1] uint8."""
        return self._forward(tokens.astype("int64"))[0]

    def loss_and_gradients(self, tokens: Any) -> tuple[float, dict[str, Any]]:
        """The loss as in `loss` and its gradient for every parameter, under the same names."""
        tokens = tokens.astype("int64")  # they become indices
        loss, dlogits, saved = self._forward(tokens, keep=True)
        return loss, self._backward(tokens, dlogits, saved)

    def _forward(self, tokens: Any, keep: bool = False) -> tuple[float, Any, list[Any]]:
        xp, weights = self.xp, self.parameters
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        x = weights["embedding0"][tokens[:, :-1]]
        for distance in range(1, self.config.history):
            x[:, distance:] += weights[f"embedding{distance}"][tokens[:, : length - distance]]
        x = x.reshape(batch * length, self.config.dim)
        saved = []
        for block in range(self.config.blocks):
            attended, for_attention = self._attend(x, block, batch)
            x = x + attended
            transformed, for_mlp = self._transform(x, block)
            x = x + transformed
            if keep:
                saved += [for_attention, for_mlp]
        normed, inverse = self._norm(x)
        saved.append((normed, inverse))
        logits = normed @ weights["logits"]
        logits -= logits.max(axis=-1, keepdims=True)
        rows, targets = xp.arange(batch * length), tokens[:, 1:].reshape(-1)
        chosen = logits[rows, targets]
        xp.exp(logits, out=logits)
        total = logits.sum(axis=-1, keepdims=True)
        loss = float((xp.log(total[:, 0]) - chosen).mean())
        if keep:  # the gradient of the mean: (softmax - one hot) / rows
            logits /= total
            logits[rows, targets] -= 1
            logits /= batch * length
        return loss, logits, saved

    def _backward(self, tokens: Any, dlogits: Any, saved: list[Any]) -> dict[str, Any]:
        xp, weights = self.xp, self.parameters
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        normed, inverse = saved.pop()
        gradients = {"logits": normed.T @ dlogits}
        dx = self._norm_backward(dlogits @ weights["logits"].T, normed, inverse)
        for block in reversed(range(self.config.blocks)):
            dx += self._transform_backward(dx, block, saved.pop(), gradients)
            dx += self._attend_backward(dx, block, batch, saved.pop(), gradients)
        # The gradient of a table is a sum by byte: a product with the one-hot matrix, alike on every array module.
        one_hot = (tokens[:, :-1, None] == xp.arange(BYTES)).astype(self.dtype)
        dx = dx.reshape(batch, length, self.config.dim)
        for distance in range(self.config.history):
            hot = one_hot[:, : length - distance].reshape(-1, BYTES)
            gradients[f"embedding{distance}"] = hot.T @ dx[:, distance:].reshape(-1, self.config.dim)
        return gradients

    def _attend(self, x: Any, block: int, batch: int) -> tuple[Any, Any]:
        normed, inverse = self._norm(x)
        qkv = (normed @ self.parameters[f"qkv{block}"]).astype(self.attention_dtype, copy=False)
        q, k, v = self._split(qkv, batch)
        out, lse = cuflash.flash_attention(q, k, v, causal=True, alibi_slopes=self.slopes, return_lse=True)
        return self._rows(out) @ self.parameters[f"merge{block}"], (normed, inverse, qkv, out, lse)

    def _attend_backward(self, dx: Any, block: int, batch: int, saved: Any, gradients: dict[str, Any]) -> Any:
        normed, inverse, qkv, out, lse = saved
        gradients[f"merge{block}"] = self._rows(out).T @ dx
        # The gradient of the mean over all positions would vanish in two bytes, that of their sum does not.
        dout = (dx @ self.parameters[f"merge{block}"].T) * len(dx)
        dout = dout.reshape(out.shape).astype(self.attention_dtype, copy=False)
        dqkv = self.xp.empty(qkv.shape, self.dtype)
        dq, dk, dv = self._split(dqkv, batch)  # views: the backward writes all three into one array
        q, k, v = self._split(qkv, batch)
        cuflash.flash_attention_backward(
            dout, q, k, v, out, lse, causal=True, alibi_slopes=self.slopes, dq=dq, dk=dk, dv=dv
        )
        dqkv /= len(dx)
        gradients[f"qkv{block}"] = normed.T @ dqkv
        return self._norm_backward(dqkv @ self.parameters[f"qkv{block}"].T, normed, inverse)

    def _transform(self, x: Any, block: int) -> tuple[Any, Any]:
        normed, inverse = self._norm(x)
        up = self.xp.maximum(normed @ self.parameters[f"up{block}"], 0)
        return (up * up) @ self.parameters[f"down{block}"], (normed, inverse, up)

    def _transform_backward(self, dx: Any, block: int, saved: Any, gradients: dict[str, Any]) -> Any:
        normed, inverse, up = saved
        gradients[f"down{block}"] = (up * up).T @ dx
        dup = dx @ self.parameters[f"down{block}"].T
        dup *= up
        dup *= 2
        gradients[f"up{block}"] = normed.T @ dup
        return self._norm_backward(dup @ self.parameters[f"up{block}"].T, normed, inverse)

    def _split(self, qkv: Any, batch: int) -> tuple[Any, Any, Any]:
        """Views q, k, v [batch, length, heads, head_dim] of [batch * length, 3 * dim]."""
        heads = self.config.heads
        parts = qkv.reshape(batch, -1, 3, heads, self.config.dim // heads)
        return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]

    def _rows(self, out: Any) -> Any:
        """[batch, length, heads, head_dim] as [batch * length, dim] in the model's dtype."""
        return out.reshape(-1, self.config.dim).astype(self.dtype, copy=False)

    def _norm(self, x: Any) -> tuple[Any, Any]:
        """RMSNorm of the rows: (x / rms, 1 / rms)."""
        inverse = 1 / self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + _EPSILON)
        return x * inverse, inverse

    def _norm_backward(self, dnormed: Any, normed: Any, inverse: Any) -> Any:
        dnormed -= normed * (dnormed * normed).mean(axis=-1, keepdims=True)
        dnormed *= inverse
        return dnormed
