"""Windows of a text and the entropies that a loss is compared with, for the examples in PyTorch and JAX."""

from __future__ import annotations

import numpy as np

from cuflash.demo import text
from cuflash.demo.text import Text


def training_window(corpus: Text, length: int, step: int, seed: int) -> np.ndarray:
    """Bytes [length + 1] uint8 of the training part, a function of `seed` and `step` alone."""
    start = np.random.default_rng((seed, step)).integers(len(corpus.train) - length)
    return corpus.train[start : start + length + 1]


def held_out_window(corpus: Text, length: int) -> np.ndarray:
    """The first bytes of the held-out part, at most [length + 1] uint8."""
    return corpus.held_out[: length + 1]


def repeated(corpus: Text, length: int) -> np.ndarray:
    """Bytes [length + 1] uint8 from the text's start, the text over and over where it is shorter."""
    return np.resize(corpus.data, length + 1)


def check_length(corpus: Text, length: int) -> None:
    """ValueError unless the training part of the text has a window of `length` tokens."""
    if not 2 <= length < len(corpus.train):
        raise ValueError(
            f"length: got {length:,}; allowed: 2 to {len(corpus.train) - 1:,}, as {corpus.name} has "
            f"{len(corpus.train):,} bytes to train on (name a longer one with --text)"
        )


def entropies(corpus: Text) -> list[float]:
    """Order-0, -1 and -2 entropy of the whole text, in bits per byte."""
    return [f(corpus.data) for f in (text.order_0_entropy, text.order_1_entropy, text.order_2_entropy)]
