"""Steps of training, and their state on disk."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cuflash.demo.text import Text
from examples.long_context import corpus
from examples.long_context.model import Config, Model
from examples.long_context.progress import Step, process_peak_memory

WARM_UP, CLIP = 20, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, how fast, and from which random numbers."""

    length: int
    steps: int
    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}; allowed: 1 or more")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate: got {self.rate}; allowed: a positive number")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}; allowed: 0 or more")

    def rate_at(self, step: int) -> float:
        """A linear warm-up, then half a cosine down to a tenth."""
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        return self.rate * min(1.0, (step + 1) / WARM_UP) * cosine


class Trainer:
    """A model, its optimiser, and the steps that they have taken."""

    def __init__(self, config: Config, schedule: Schedule, text: Text, device: torch.device) -> None:
        self.config, self.schedule, self.text, self.device = config, schedule, text, device
        torch.manual_seed(schedule.seed)
        self.model = Model(config).to(device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
        )
        self.losses: list[float] = []  # bits per byte

    def steps(self) -> Iterator[Step]:
        """Take the steps that are left. FloatingPointError when a loss is not finite."""
        while (taken := len(self.losses)) < self.schedule.steps:
            begin = time.perf_counter()
            window = corpus.training_window(self.text, self.schedule.length, taken, self.schedule.seed)
            for group in self.optimiser.param_groups:
                group["lr"] = self.schedule.rate_at(taken)
            loss = self.forward_backward(window)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimiser.step()
            bits = loss.item() / math.log(2)  # waits for the device
            if not math.isfinite(bits):
                raise FloatingPointError(f"the loss of step {taken + 1} is {bits}")
            self.losses.append(bits)
            yield Step(taken + 1, bits, time.perf_counter() - begin)

    def forward_backward(self, window: np.ndarray) -> torch.Tensor:
        """The loss of bytes [length + 1], in nats; its gradients replace those of the parameters."""
        self.optimiser.zero_grad()
        loss = self.loss(window)
        loss.backward()
        return loss.detach()

    def evaluate(self, window: np.ndarray) -> float:
        """Bits per byte of bytes [length + 1]."""
        with torch.no_grad():
            return self.loss(window).item() / math.log(2)

    def loss(self, window: np.ndarray) -> torch.Tensor:
        tokens = torch.from_numpy(window.astype(np.int64)).to(self.device)[None]
        # Weights are cast where they are used, so that a tile computed again does what it did the first time.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            return self.model(tokens)

    def save(self, path: Path) -> None:
        """Write all that a run continues from; `path` holds at every moment an old or a new state whole."""
        state = {
            "made_with": self._made_with(),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "losses": self.losses,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote; ValueError where that run had other settings, OSError without a file."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine, theirs = self._made_with(), state["made_with"]
        for name, value in mine.items():
            if value != theirs[name]:
                raise ValueError(f"{name}: got {value!r}; allowed: {theirs[name]!r}, as in the run that {path} is of")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.losses = state["losses"]

    def _made_with(self) -> dict[str, Any]:
        return asdict(self.config) | asdict(self.schedule) | {"text": self.text.name, "bytes": len(self.text.data)}


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure on a GPU; a process keeps the peak of all its life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak: of torch's tensors on a GPU, of the process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak_memory()
