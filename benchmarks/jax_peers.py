"""Speed in JAX beside cuDNN through jax.nn, and beside the same call on CuPy arrays: `python -m benchmarks.jax_peers`.

One process, jitted functions, bfloat16; the grid and the way of counting are those of `benchmarks.peers`, a training
step being the forward and the backward of it (3.5 times the operations of a forward). Results are held against cuDNN's
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # CuPy has memory of its own

import jax
import jax.numpy as jnp

import cuflash
from benchmarks.peers import BURST_SECONDS, HIDDEN, ROUNDS, TOKENS, WARM_UP, Cell

LENGTHS, HEAD_DIMS = (2_048, 8_192, 16_384), (64, 128)
PASSES = {"forward": 1.0, "step": 3.5}  # and its operations, relative to a forward's


def contestants(cell: Cell, pass_: str) -> dict[str, Callable[[], Any]]:
    """Each contestant's call on the same data, which returns when all of it is enqueued; their results compared."""
    import cupy

    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (jax.random.normal(key, cell.shape, jnp.bfloat16) for key in keys)
    functions: dict[str, Callable[..., Any]] = {
        "cuflash": partial(cuflash.flash_attention, causal=cell.causal),
        "cudnn": partial(jax.nn.dot_product_attention, is_causal=cell.causal, implementation="cudnn"),
    }

    def step(function: Callable[..., Any], dout: Any, *arrays: Any) -> Any:
        out, pull = jax.vjp(function, *arrays)
        return (out, *pull(dout))

    calls: dict[str, Callable[[], Any]] = {}
    for name, function in functions.items():
        if pass_ == "forward":
            calls[name] = partial(jax.jit(lambda *arrays, f=function: (f(*arrays),)), q, k, v)
        else:
            calls[name] = partial(jax.jit(partial(step, function)), dout, q, k, v)
    for ours, theirs in zip(calls["cuflash"](), calls["cudnn"](), strict=True):
        ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
        difference = float(jnp.linalg.norm((ours - theirs).ravel()) / jnp.linalg.norm(theirs.ravel()))
        if not difference < 0.01:  # two bfloat16 results differ by 2e-3 to 5e-3
            raise AssertionError(f"{cell}: differs from cuDNN by {difference:.2e}")

    on_cupy = {name: cupy.from_dlpack(x) for name, x in {"q": q, "k": k, "v": v}.items()}
    dout_on_cupy = cupy.from_dlpack(dout)

    def call_cupy() -> None:
        out, lse = cuflash.flash_attention(**on_cupy, causal=cell.causal, return_lse=True)
        if pass_ == "step":
            cuflash.flash_attention_backward(dout_on_cupy, **on_cupy, out=out, lse=lse, causal=cell.causal)

    calls["cupy"] = call_cupy
    return calls


def seconds(name: str, call: Callable[[], Any], repeats: int) -> float:
    """Time of one call, over a burst of `repeats` that is enqueued at once."""
    import cupy

    result = None
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    if name == "cupy":
        cupy.cuda.get_current_stream().synchronize()
    else:
        jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def measure(cell: Cell, pass_: str) -> dict[str, float]:
    """TFLOP/s of every contestant, medians of interleaved rounds."""
    calls = contestants(cell, pass_)
    repeats = {name: max(2, round(BURST_SECONDS / seconds(name, call, 3))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            elapsed = seconds(name, call, repeats[name])
            if round_ >= WARM_UP:
                times[name].append(elapsed)
    flops = cell.forward_flops * PASSES[pass_]
    return {name: round(flops / statistics.median(found) / 1e12, 1) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed in JAX beside cuDNN through jax.nn, in one process.")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--length", type=int, nargs="+", default=list(LENGTHS))
    arguments = parser.parse_args()

    device = jax.devices("cuda")[0].device_kind
    rows: list[dict[str, Any]] = []
    record = {"gpu": device, "date": datetime.now(timezone.utc).date().isoformat(), "jax": jax.__version__}
    record |= {"cuflash": cuflash.__version__, "unit": "TFLOP/s", "rows": rows}
    print(f"{device}, bfloat16, {TOKENS} tokens, hidden {HIDDEN}; TFLOP/s, then cuflash over each other")
    for pass_ in PASSES:
        for head_dim, length, causal in product(arguments.head_dim, arguments.length, (False, True)):
            speed = measure(Cell(head_dim, length, causal), pass_)
            rows.append({"pass": pass_, "head_dim": head_dim, "length": length, "causal": causal, **speed})
            ratios = {name: round(speed["cuflash"] / other, 3) for name, other in speed.items()}
            print(pass_, f"d{head_dim}", length, "causal" if causal else "full", speed, ratios, flush=True)
            if arguments.json:  # after every cell, so that an interrupted run leaves what it measured
                arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
