"""How a peer's attention becomes something that can be run, timed and compared, whatever framework it is written for.

Each framework is one function that takes the peer's attention and gives a `Prepare`: from a problem and its inputs, as
arrays of NumPy or CuPy, to a Contestant.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cuflash.bench.workloads import Workload


class Inputs(NamedTuple):
    """Arrays of `xp`, which is numpy or cupy; shapes as Workload says, dout as q."""

    xp: Any
    q: Any
    k: Any
    v: Any
    dout: Any

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        return self.q, self.k, self.v, self.dout


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One peer's call on one problem."""

    call: Callable[[], Sequence[Any]]  # (out,) of a forward, else (dq, dk, dv), in the peer's own arrays
    native: Callable[[Any], Any]  # a result as an array of NumPy or CuPy
    peak: Callable[[], tuple[int, Sequence[Any]]] | None  # bytes held at most in a call, and its results; None: unknown
    wait: Callable[[Any], object] | None = None  # for results that are computed on streams of the peer's own
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext  # what the calls of one timing stand in


class Pair(NamedTuple):
    """Attention with its backward written by hand."""

    forward: Callable[..., tuple[Any, ...]]  # (q, k, v) -> (out, and what the backward needs besides)
    backward: Callable[..., tuple[Any, Any, Any]]  # (dout, q, k, v, *all that the forward gave) -> (dq, dk, dv)


Prepare = Callable[[Workload, Inputs], Contestant]


def on_arrays(attend: Callable[[Workload, Any], Pair]) -> Prepare:
    """Of a peer that takes NumPy's and CuPy's arrays: (problem, xp) -> Pair."""

    def prepare(workload: Workload, inputs: Inputs) -> Contestant:
        xp, q, k, v, dout = inputs
        pair = attend(workload, xp)
        if workload.direction == "forward":
            call = lambda: pair.forward(q, k, v)[:1]  # noqa: E731
        elif workload.direction == "backward":
            kept = pair.forward(q, k, v)
            call = lambda: pair.backward(dout, q, k, v, *kept)  # noqa: E731
        else:
            call = lambda: pair.backward(dout, q, k, v, *pair.forward(q, k, v))  # noqa: E731
        return Contestant(call=call, native=lambda x: x, peak=lambda: _peak_of_arrays(xp, call))

    return prepare


def on_torch(
    attend: Callable[[Workload, Any], Callable[[Any, Any, Any], Any]],
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Prepare:
    """Of a differentiable function of torch tensors: (problem, device) -> ((q, k, v) -> out), shaped as `Inputs`."""

    def prepare(workload: Workload, inputs: Inputs) -> Contestant:
        import torch

        q, k, v, dout = (torch.from_dlpack(x) for x in inputs.arrays)
        function = attend(workload, q.device)
        if workload.direction == "forward":
            call = lambda: (function(q, k, v),)  # noqa: E731
        else:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            if workload.direction == "backward":
                with scope():
                    out = function(*leaves)
                call = lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)  # noqa: E731
            else:
                call = lambda: torch.autograd.grad(function(*leaves), leaves, dout)  # noqa: E731

        def peak() -> tuple[int, Sequence[Any]]:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before, results

        return Contestant(
            call=call,
            native=lambda x: inputs.xp.from_dlpack(x.detach()),
            peak=peak if q.is_cuda else None,
            scope=scope,
        )

    return prepare


def on_jax(attend: Callable[[Workload], Callable[[Any, Any, Any], Any]]) -> Prepare:
    """Of a differentiable function of JAX arrays, which is jitted: problem -> ((q, k, v) -> out), shaped as `Inputs`.

    JAX computes on streams of its own, so its results are waited for.
    """

    def prepare(workload: Workload, inputs: Inputs) -> Contestant:
        import jax

        q, k, v, dout = (jax.dlpack.from_dlpack(x) for x in inputs.arrays)
        function = attend(workload)
        forward = jax.jit(function)
        step = jax.jit(lambda dout, *arrays: jax.vjp(function, *arrays)[1](dout))
        if workload.direction == "forward":
            call = lambda: (forward(q, k, v),)  # noqa: E731
        elif workload.direction == "backward":
            _, pull = jax.jit(lambda *arrays: jax.vjp(function, *arrays))(q, k, v)
            backward = jax.jit(lambda pull, dout: pull(dout))
            call = lambda: backward(pull, dout)  # noqa: E731
        else:
            call = lambda: step(dout, q, k, v)  # noqa: E731
        return Contestant(call=call, native=inputs.xp.from_dlpack, peak=None, wait=jax.block_until_ready)

    return prepare


def _peak_of_arrays(xp: Any, call: Callable[[], Sequence[Any]]) -> tuple[int, Sequence[Any]]:
    """NumPy: by tracemalloc, which counts the buffers of arrays. CuPy: the size that a fresh memory pool grows to."""
    if xp is np:
        tracemalloc.start()
        try:
            results = call()
            return tracemalloc.get_traced_memory()[1], results
        finally:
            tracemalloc.stop()
    pool = xp.cuda.MemoryPool()
    with xp.cuda.using_allocator(pool.malloc):
        results = call()
        xp.cuda.get_current_stream().synchronize()
    return int(pool.total_bytes()), results
