"""The training of examples/long_context in JAX, in a smaller form: checkpoints that keep out and LSE, a chunked loss
and a tiled MLP, with cuflash or with jax.nn attention.

    python -m examples.long_context_jax                       # 65,536 tokens a step on a GPU, on a CPU a reduced form
    python -m examples.long_context_jax --attention jax.nn --compare long_context_run/report.json --output jax_nn_run

Run it from the root of the repository, with jax, optax, rich and matplotlib installed. It writes report.json and
report.png into --output. On a GPU it trains in bfloat16, on a CPU in float32.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from cuflash.adapters.jax import flash_attention
from cuflash.demo import machine, text
from cuflash.demo.text import Text
from examples.long_context import corpus, progress

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v [batch, tokens, heads, head_dim]
ATTENTIONS: dict[str, Attention] = {
    "cuflash": functools.partial(flash_attention, causal=True),
    "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=True),
}
POLICIES = {
    "selective": jax.checkpoint_policies.save_only_these_names("cuflash_out", "cuflash_lse"),
    "full": jax.checkpoint_policies.nothing_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}
VOCABULARY, ROTARY_BASE = 256, 500_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A model and its training; ValueError for what does not fit together."""

    length: int
    steps: int
    rate: float
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_tile: int  # tokens
    loss_chunk: int  # tokens
    attention: str = "cuflash"
    checkpoint: str = "selective"
    dtype: str = "float32"  # of the products; parameters and x are float32

    def __post_init__(self) -> None:
        for name in ("length", "steps", "layers", "width", "heads", "kv_heads", "mlp_tile", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 1 or more")
        for name in ("mlp_tile", "loss_chunk"):
            if self.length % getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: a divisor of length, {self.length}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {self.kv_heads}; allowed: a divisor of heads, {self.heads}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width: got {self.width}; allowed: a multiple of 2 * heads, {2 * self.heads}")
        for name, allowed in (("attention", tuple(ATTENTIONS)), ("checkpoint", tuple(POLICIES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed: one of {allowed}")


GPU = {"length": 65_536, "steps": 200, "rate": 1e-3, "layers": 4, "width": 512, "heads": 4, "kv_heads": 2}
GPU |= {"mlp_tile": 4096, "loss_chunk": 4096, "dtype": "bfloat16"}
CPU = {"length": 512, "steps": 60, "rate": 3e-3, "layers": 2, "width": 64, "heads": 4, "kv_heads": 2}
CPU |= {"mlp_tile": 256, "loss_chunk": 256, "dtype": "float32"}


# ---- the model ---------------------------------------------------------------------------------------------------


def initial_parameters(settings: Settings) -> dict[str, Any]:
    """Matrices in float32; those of the layers are stacked, [layers, rows, cols]."""
    width, head_dim = settings.width, settings.width // settings.heads
    shapes = {
        "qkv": (width, width + 2 * settings.kv_heads * head_dim),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 1))
    into_x = math.sqrt(2 * settings.layers)
    layers = {
        name: 0.02
        / (into_x if name in ("out", "down") else 1)
        * jax.random.normal(next(keys), (settings.layers, *shape))
        for name, shape in shapes.items()
    }
    return {"embedding": 0.02 * jax.random.normal(next(keys), (VOCABULARY, width)), "layers": layers}


def tiled(function: Callable[..., jax.Array], size: int, *inputs: jax.Array) -> jax.Array:
    """function of every tile of `size` tokens, [tiles, ...]; what is in it is computed again in the backward."""
    tiles = tuple(x.reshape(-1, size, *x.shape[1:]) for x in inputs)
    return jax.lax.map(jax.checkpoint(lambda tile: function(*tile)), tiles)


def loss_of(parameters: dict[str, Any], window: jax.Array, settings: Settings) -> jax.Array:
    """Mean cross entropy, in nats, of bytes [length + 1] after the first; x is [length, width]."""
    dtype, head_dim = jnp.dtype(settings.dtype), settings.width // settings.heads
    rotation = rotation_table(settings.length, head_dim)

    def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return x.astype(dtype) @ matrix.astype(dtype)

    def attend(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
        qkv = product(normalised(x), layer["qkv"]).reshape(1, len(x), -1, head_dim)
        q, k, v = jnp.split(qkv, (settings.heads, settings.heads + settings.kv_heads), axis=2)
        out = ATTENTIONS[settings.attention](rotated(q, rotation), rotated(k, rotation), v)
        return x + product(out.reshape(x.shape), layer["out"])

    def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        def transform(tile: jax.Array) -> jax.Array:
            return tile + product(jax.nn.gelu(product(normalised(tile), layer["up"])), layer["down"])

        x = jax.checkpoint(attend, policy=POLICIES[settings.checkpoint])(x, layer)
        return tiled(transform, settings.mlp_tile, x).reshape(x.shape), None

    def loss(x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = product(normalised(x), parameters["embedding"].T).astype(jnp.float32)  # of one chunk
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()

    x, _ = jax.lax.scan(block, parameters["embedding"][window[:-1]], parameters["layers"])
    return tiled(loss, settings.loss_chunk, x, window[1:]).sum() / settings.length


def normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotation_table(length: int, head_dim: int) -> jax.Array:
    """Cosines and sines of rotary positions, [2, length, 1, head_dim / 2], from float64 angles."""
    angles = np.arange(length)[:, None, None] * ROTARY_BASE ** -(np.arange(0, head_dim, 2) / head_dim)
    return jnp.asarray(np.stack((np.cos(angles), np.sin(angles))), jnp.float32)


def rotated(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotary positions (Su et al., 2021) on [batch, tokens, heads, head_dim], in x's dtype."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


# ---- training ----------------------------------------------------------------------------------------------------


def steps(settings: Settings, data: Text, seed: int) -> Iterator[progress.Step]:
    """Train, from the same windows of the text as the example in PyTorch. FloatingPointError for a loss not finite."""
    warm_up = min(20, settings.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0, settings.rate, warm_up, settings.steps, 0.1 * settings.rate)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, window: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(parameters, window, settings)
        updates, state = optimiser.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    parameters = initial_parameters(settings)
    state = optimiser.init(parameters)
    for taken in range(settings.steps):
        begin = time.perf_counter()
        window = jnp.asarray(corpus.training_window(data, settings.length, taken, seed).astype(np.int32))
        parameters, state, loss = step(parameters, state, window)
        bits = float(loss) / math.log(2)  # waits for the device
        if not math.isfinite(bits):
            raise FloatingPointError(f"the loss of step {taken + 1} is {bits}")
        yield progress.Step(taken + 1, bits, time.perf_counter() - begin)


def peak_memory(device: Any) -> int | None:
    """Bytes at the peak: of XLA's arrays on a GPU, of the process on a CPU; None where the system does not say."""
    if device.platform == "cpu":
        return progress.process_peak_memory()
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def main(arguments: list[str] | None = None) -> int:
    """0 when all was done, 1 when a step failed, 2 for bad arguments, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        "python -m examples.long_context_jax", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--text", metavar="PATH", help="train on this file instead of Python's language reference")
    parser.add_argument("--attention", choices=tuple(ATTENTIONS), default="cuflash")
    parser.add_argument("--checkpoint", choices=tuple(POLICIES), default="selective", help="what attention keeps")
    sizes = ("length", "steps", "layers", "width", "heads", "kv_heads", "mlp_tile", "loss_chunk")
    for name in sizes:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the windows of the text")
    parser.add_argument("--output", default="long_context_jax_run", metavar="FOLDER")
    parser.add_argument("--compare", nargs="+", default=[], metavar="REPORT", help="report.json of other runs, to plot")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    device = jax.devices()[0]
    try:
        defaults = CPU if device.platform == "cpu" else GPU
        changes = {name: getattr(given, name) for name in sizes if getattr(given, name) is not None}
        settings = Settings(**(defaults | changes), attention=given.attention, checkpoint=given.checkpoint)
        if given.seed < 0:
            raise ValueError(f"seed: got {given.seed}; allowed: 0 or more")
        data = text.load(given.text)
        corpus.check_length(data, settings.length)
        others = [progress.read(path) for path in given.compare]
        folder = Path(given.output)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # UnsupportedError is a RuntimeError
        console.print(f"error: {error}", markup=False)
        return 2
    report = {
        "framework": f"jax {jax.__version__}",
        "cuflash": machine.version_of("cuflash"),
        "device": machine.describe(np)["processor"] if device.platform == "cpu" else device.device_kind,
        "text": data.name,
        "bytes": len(data.data),
        **asdict(settings),
        "seed": given.seed,
        "entropies": corpus.entropies(data),
        "peak_of": "the process" if device.platform == "cpu" else "XLA's arrays on the GPU",
    }
    console.print(f"{settings.attention} attention on {report['device']}, {report['framework']}", markup=False)
    if device.platform == "cpu":
        console.print("no GPU: a reduced form in float32 (a GPU trains 65,536 tokens a step in bfloat16)")
    with progress.recorded(
        report,
        folder,
        others,
        console,
        peak=lambda: peak_memory(device),
        failures=(jax.errors.JaxRuntimeError,),
    ):
        for _ in progress.followed(steps(settings, data, given.seed), report, console):
            pass
    return progress.exit_code(report)


if __name__ == "__main__":
    sys.exit(main())
