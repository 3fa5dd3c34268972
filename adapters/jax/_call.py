"""What a call is: its operands by name, its options, and both as the text that XLA carries to the handler.

A call is checked while JAX traces, on shapes and dtypes alone, by making its plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from cuflash import plans
from cuflash.arrays import Signature
from cuflash.errors import UnsupportedError
from cuflash.plans import BackwardPlan, ForwardPlan

# The axes of a bias and of a mask.
DENSE_AXES = ("batch", "heads", "len", "kv_len")
# The operands of the two passes, in the order in which they reach XLA. dlse and those after v may be absent.
FORWARD = plans.INPUTS
BACKWARD = ("dout", "out", "lse", "dlse", *FORWARD)


@dataclass(frozen=True)
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
    # Of a bias and a mask, which have four axes here: those along which they are not broadcast.
    bias_axes: tuple[str, ...] = ()
    mask_axes: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[str, ...]:
        if not self.backward:
            return ("out", "lse")
        return ("dq", "dk", "dv", *(f"d{name}" for name in ("sinks", "bias") if name in self.operands))

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.operands

    def text(self, operands: Sequence[Any]) -> str:
        """The call and its operands' shapes and dtypes."""
        return json.dumps([asdict(self), [(x.shape, x.dtype.name) for x in operands]])


@lru_cache(maxsize=4096)
def described(text: bytes | str) -> tuple[Call, tuple[tuple[tuple[int, ...], str], ...]]:
    """A call and its operands' shapes and dtypes, of its text."""
    call, operands = json.loads(text)
    options = call["options"]
    options["window_size"] = tuple(options["window_size"])
    shapes = tuple((tuple(shape), dtype) for shape, dtype in operands)
    axes = tuple(call["bias_axes"]), tuple(call["mask_axes"])
    return Call(call["backward"], tuple(call["operands"]), Options(**options), *axes), shapes


def signature(name: str, shape: Sequence[Any], dtype: str, device: str = "cpu") -> Signature:
    """The signature of an operand as XLA hands it over: row-major."""
    if not all(isinstance(length, int) for length in shape):
        raise UnsupportedError(f"{name}: got the symbolic shape {shape}; kernels are made for lengths that are numbers")
    return plans.contiguous(Signature(tuple(shape), (), dtype, device, True))


def plan_of(arrays: Mapping[str, Signature], options: Options) -> ForwardPlan | BackwardPlan:
    """The plan of a call, given the signatures of its operands and its options, both checked.

    A call with a `dout` among its arrays is a backward. Raises the TypeError, ValueError or UnsupportedError of
    `cuflash.flash_attention` and `cuflash.flash_attention_backward`.
    """
    seeded = replace(options, seed=options.seed is not None)
    values = [getattr(seeded, field.name) for field in fields(options) if field.name != "memory"]
    inputs = [arrays.get(name) for name in FORWARD]
    if "dout" in arrays:
        others = [arrays.get(name) for name in ("dout", "out", "lse", "dlse", "dq", "dk", "dv")]
        plan = plans.backward(*others, *inputs, False, options.memory, True, *values)
    else:
        plan = plans.forward(*inputs, *values)
        if options.memory not in plans.MEMORY:
            plans.bad("memory", repr(options.memory), f"one of {plans.MEMORY}")
    plans.checked_seed(options.seed)
    if options.backend == "cuda" and plan.device < 0:
        raise UnsupportedError("backend: got 'cuda' with arrays on JAX's CPU; place them on a GPU with jax.device_put")
    return plan


def results_of(plan: ForwardPlan | BackwardPlan) -> dict[str, Signature]:
    """The signatures of a call's results."""
    return {"out": plan.out, "lse": plan.lse} if isinstance(plan, ForwardPlan) else plan.gradients
