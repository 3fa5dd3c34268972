"""The optimiser of the demo: Muon for the matrices inside the blocks, Adam for the embeddings and the logits.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix, which a few
Newton-Schulz iterations approximate with products alone. After 60 steps at 2,048 tokens the held-out text took 2.39 and
2.54 bits per byte with it (two seeds), and 2.85 and 2.93 with Adam (Kingma and Ba, 2015) on these matrices at 0.003,
the best of three rates.
"""

from __future__ import annotations

import math
from typing import Any

from cuflash.demo.model import Model

# Rates at the top of the schedule. A byte's row of an embedding is touched seldom and may take long steps.
_MATRIX_RATE, _EMBEDDING_RATE, _LOGITS_RATE = 0.05, 0.05, 0.03
_MOMENTUM = 0.95  # of Muon, with Nesterov's look ahead
_BETA1, _BETA2, _EPSILON = 0.9, 0.95, 1e-8  # of Adam
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: steep at zero, so that five iterations are enough


class Optimiser:
    """Updates the parameters of a model in place, after clipping its gradients to a global norm of one."""

    def __init__(self, model: Model) -> None:
        self.model, self.steps = model, 0
        self.momentum = {name: model.xp.zeros_like(value) for name, value in model.parameters.items()}
        self.square = {name: model.xp.zeros_like(self.momentum[name]) for name in model.parameters if _adams(name)}

    def step(self, gradients: dict[str, Any], rate: float) -> None:
        """One update with the gradients of every parameter; `rate` is in [0, 1], the place in the schedule."""
        self.steps += 1
        norm = math.sqrt(sum(float((gradient * gradient).sum()) for gradient in gradients.values()))
        shrink = min(1.0, 1.0 / max(norm, _EPSILON))
        for name, gradient in gradients.items():
            update = self._adam if _adams(name) else self._muon
            self.model.parameters[name] -= rate * update(name, gradient * shrink)

    def _adam(self, name: str, gradient: Any) -> Any:
        momentum, square = self.momentum[name], self.square[name]
        momentum += (1 - _BETA1) * (gradient - momentum)
        square += (1 - _BETA2) * (gradient * gradient - square)
        mean = momentum / (1 - _BETA1**self.steps)
        deviation = self.model.xp.sqrt(square / (1 - _BETA2**self.steps))
        return (_LOGITS_RATE if name == "logits" else _EMBEDDING_RATE) * mean / (deviation + _EPSILON)

    def _muon(self, name: str, gradient: Any) -> Any:
        momentum = self.momentum[name]
        momentum *= _MOMENTUM
        momentum += gradient
        rows, cols = gradient.shape
        return _MATRIX_RATE * math.sqrt(max(1.0, cols / rows)) * _orthogonal(gradient + _MOMENTUM * momentum)


def _adams(name: str) -> bool:
    return name == "logits" or name.startswith("embedding")


def _orthogonal(matrix: Any) -> Any:
    """Roughly U V^T of the singular value decomposition U S V^T: five quintic Newton-Schulz iterations."""
    a, b, c = _QUINTIC
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (math.sqrt(float((wide * wide).sum())) + _EPSILON)
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
