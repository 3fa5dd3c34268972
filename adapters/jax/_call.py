"""What a call is: its operands by name, its options, and both as the text that XLA carries to the handler.

This is the one module of the adapter that knows how cuflash checks a call and computes it. Checking happens while JAX
traces, on shapes and dtypes alone; `run` happens when XLA executes, on views of XLA's buffers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import cuflash
from cuflash import plans
from cuflash.arrays import Signature
from cuflash.errors import UnsupportedError
from cuflash.plans import bad, check_flag

__all__ = ["BACKWARD", "FORWARD", "Call", "Options", "bad", "check", "check_flag", "planned", "run", "signature"]

# The operands of the two passes, in the order in which they reach XLA. Those after v may be absent.
FORWARD = ("q", "k", "v", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k")
BACKWARD = ("dout", "out", "lse", "dlse", *FORWARD)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a call: Python values, known while tracing."""

    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    deterministic: bool = False
    allow_tf32: bool = False
    layout: str = "bshd"
    backend: str | None = None
    memory: str = "fast"  # of the backward

    def plain(self) -> Options:
        """The same once they are checked, as Python's own types, which hash and go through JSON."""
        left, right = (None, None) if self.window_size is None else self.window_size
        return Options(
            causal=bool(self.causal),
            window_size=(None if left is None else int(left), None if right is None else int(right)),
            scale=None if self.scale is None else float(self.scale),
            softcap=None if self.softcap is None else float(self.softcap),
            dropout_p=float(self.dropout_p),
            seed=None if self.seed is None else int(self.seed),
            deterministic=bool(self.deterministic),
            allow_tf32=bool(self.allow_tf32),
            layout=self.layout,
            backend=self.backend,
            memory=self.memory,
        )


@dataclass(frozen=True)
class Call:
    """A forward or a backward, but for the arrays: a static parameter of the primitives."""

    backward: bool
    operands: tuple[str, ...]  # those that are there, in the order of FORWARD or BACKWARD
    options: Options

    @property
    def results(self) -> tuple[str, ...]:
        if not self.backward:
            return ("out", "lse")
        return ("dq", "dk", "dv", "dsinks") if "sinks" in self.operands else ("dq", "dk", "dv")

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.operands

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_text(text: bytes) -> Call:
        fields = json.loads(text)
        options = fields["options"]
        if options["window_size"] is not None:
            options["window_size"] = tuple(options["window_size"])
        return Call(fields["backward"], tuple(fields["operands"]), Options(**options))


def signature(name: str, shape: Sequence[Any], dtype: str, device: str = "cpu") -> Signature:
    """The signature of an operand as XLA hands it over: row-major."""
    if not all(isinstance(length, int) for length in shape):
        raise UnsupportedError(f"{name}: got the symbolic shape {shape}; kernels are made for lengths that are numbers")
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return Signature(tuple(shape), tuple(reversed(strides)), dtype, device, True)


def check(arrays: Mapping[str, Signature | None], options: Options) -> dict[str, Signature]:
    """The signatures of a call's results, given those of its operands and its options, both checked.

    A call with a `dout` among its arrays is a backward. Raises the TypeError, ValueError or UnsupportedError of
    `cuflash.flash_attention` and `cuflash.flash_attention_backward`.
    """
    if options.memory not in plans.MEMORY:
        bad("memory", repr(options.memory), f"one of {plans.MEMORY}")
    plans.checked_seed(options.seed)
    plan = planned(arrays, options)
    return plan.gradients if "dout" in arrays else {"out": plan.out, "lse": plan.lse}


def planned(arrays: Mapping[str, Signature | None], options: Options) -> Any:
    """The plan of a call; a backward's where there is a `dout`."""
    inputs = [arrays.get(name) for name in FORWARD]
    values = (
        *(options.causal, options.window_size, options.scale, options.softcap, options.dropout_p),
        *(options.seed is not None, options.deterministic, options.allow_tf32, options.layout, options.backend),
    )
    if "dout" not in arrays:
        return plans.forward(*inputs, *values)
    others = [arrays.get(name) for name in ("dout", "out", "lse", "dlse", "dq", "dk", "dv")]
    return plans.backward(*others, *inputs, False, options.memory, *values)


def run(call: Call, operands: Sequence[Any], results: Sequence[Any]) -> None:
    """Compute a call on NumPy arrays, into the given results."""
    arrays = dict(zip(call.operands, operands, strict=True))
    options = asdict(call.options)
    if call.backward:
        leading = [arrays.pop(name) for name in ("dout", "q", "k", "v", "out", "lse")]
        gradients = dict(zip(("dq", "dk", "dv"), results, strict=False))
        computed = cuflash.flash_attention_backward(*leading, **arrays, **gradients, **options)
        computed, results = computed[3:], results[3:]  # dsinks: the others are written already
    else:
        leading = [arrays.pop(name) for name in ("q", "k", "v")]
        del options["memory"]
        computed = cuflash.flash_attention(*leading, **arrays, return_lse=True, **options)
    for target, value in zip(results, computed, strict=True):
        target[...] = value
