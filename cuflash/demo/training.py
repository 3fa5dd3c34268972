"""Training the demo's model: windows of the text, a schedule by time or by steps, and the bits per byte it reaches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash.demo.model import Model
from cuflash.demo.optimiser import Optimiser
from cuflash.demo.text import Text

_WARM_UP, _COOL_DOWN = 0.05, 0.9  # shares of the training in which the rate rises and falls


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long to train: `steps` when given, else until both `seconds` and `minimum_steps` have passed, or the text has
    been read `passes` times: a small model knows a short text by heart soon after, and gets worse on any other."""

    seconds: float
    minimum_steps: int
    steps: int | None = None
    passes: float = 7.0
    evaluations: int = 5  # of the held-out text, over the whole training, besides the one before it
    windows: int = 4  # of the held-out text in an evaluation

    def progress(self, seconds: float, step: int, passes: float) -> float:
        """The share of the training that is done, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, max(passes / self.passes, min(seconds / self.seconds, step / self.minimum_steps)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one training step found."""

    step: int  # 0: nothing trained yet
    seconds: float  # since the beginning, evaluations included
    progress: float  # in [0, 1]
    train_bits: float | None  # bits per byte of the step's window, before its update
    held_out_bits: float | None  # where the held-out text was evaluated: before, now and then, and at the end


def train(model: Model, text: Text, *, context: int, schedule: Schedule, seed: int = 0) -> Iterator[Step]:
    """Train on random windows of `context` tokens; yields the untrained model's Step and then one each update."""
    data = model.xp.asarray(text.train)
    windows = _held_out_windows(model, text, context, schedule.windows)
    optimiser = Optimiser(model)
    random = np.random.default_rng(seed)
    begin = time.perf_counter()
    yield Step(step=0, seconds=0.0, progress=0.0, train_bits=None, held_out_bits=bits_per_byte(model, windows))
    progress, step, evaluated = 0.0, 0, 0
    while progress < 1:
        start = int(random.integers(0, len(data) - context))
        loss, gradients = model.loss_and_gradients(data[None, start : start + context + 1])
        step += 1
        optimiser.step(gradients, min(1.0, (progress + 0.01) / _WARM_UP, (1 - progress) / _COOL_DOWN))
        progress = schedule.progress(time.perf_counter() - begin, step, step * context / len(data))
        held_out = None
        if progress * schedule.evaluations >= evaluated + 1:
            held_out = bits_per_byte(model, windows)
            evaluated = int(progress * schedule.evaluations)
        yield Step(
            step=step,
            seconds=time.perf_counter() - begin,
            progress=progress,
            train_bits=loss / math.log(2),
            held_out_bits=held_out,
        )


def bits_per_byte(model: Model, windows: list[Any]) -> float:
    """The mean over windows [1, length + 1], each begun without any context."""
    return sum(model.loss(window) for window in windows) / len(windows) / math.log(2)


def _held_out_windows(model: Model, text: Text, context: int, count: int) -> list[Any]:
    """`count` windows spread evenly over the held-out text, as long as the context or as the held-out text allows."""
    data = model.xp.asarray(text.held_out)
    length = min(context, len(data) - 1)
    starts = {int(start) for start in np.linspace(0, len(data) - length - 1, count)}
    return [data[None, start : start + length + 1] for start in sorted(starts)]
