"""The text of the demo: bytes, their train and held-out parts, and the entropies that a model is compared with."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuflash.errors import UnsupportedError

HELD_OUT = 10  # the last tenth of a text is held out
SMALLEST = 10_240  # bytes: below this the held-out part says little


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it came from."""

    name: str
    data: np.ndarray  # [bytes] uint8

    @property
    def train(self) -> np.ndarray:
        """All but the last tenth."""
        return self.data[: -(len(self.data) // HELD_OUT)]

    @property
    def held_out(self) -> np.ndarray:
        """The last tenth, which no gradient ever sees."""
        return self.data[-(len(self.data) // HELD_OUT) :]


def load(path: str | None = None) -> Text:
    """The bytes of the file at `path`; without one, of the language reference that ships with Python.

    Raises OSError for a file that cannot be read and UnsupportedError for a Python without `pydoc_data`.
    """
    if path is not None:
        return Text(Path(path).name, np.frombuffer(Path(path).read_bytes(), dtype=np.uint8))
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UnsupportedError("this Python ships without pydoc_data.topics: name a text with --text PATH") from error
    joined = "\n\n".join(topics.values()).encode()
    return Text("the language reference of Python (pydoc_data.topics)", np.frombuffer(joined, dtype=np.uint8))


def check_length(text: Text, context: int) -> None:
    """ValueError when the text is too short to train at `context` tokens."""
    needed = max(2 * (context + 1), SMALLEST)
    if len(text.data) < needed:
        raise ValueError(
            f"text: {text.name} has {len(text.data):,} bytes; "
            f"allowed: at least {needed:,} for a context of {context:,} tokens"
        )


def order_0_entropy(data: np.ndarray) -> float:
    """Empirical entropy of the bytes, in bits per byte: -sum p(b) log2 p(b) with p their frequencies in `data`.

    No model that ignores what stands before a byte does better on this very text. Taken of the whole text, held-out
    part included, it is a hard baseline, and a model that falls below it does use what stands before.
    """
    return _entropy(np.bincount(data, minlength=256))


def order_1_entropy(data: np.ndarray) -> float:
    """Empirical entropy of a byte given the byte before it, in bits per byte: H(pairs) - H(their first bytes).

    Frequencies are those of the neighbouring pairs in `data`. A model that falls below the entropy of the whole text
    uses more than the last byte.
    """
    return _conditional_entropy(data, 1)


def order_2_entropy(data: np.ndarray) -> float:
    """Empirical entropy of a byte given the two before it, in bits per byte: H(triples) - H(their first two bytes).

    Frequencies are those in `data`. A model that falls below it on the whole text uses more than the last two bytes.
    """
    return _conditional_entropy(data, 2)


def _conditional_entropy(data: np.ndarray, order: int) -> float:
    """Entropy of a byte given the `order` bytes before it."""
    contexts = np.zeros(len(data) - order, np.int64)
    for i in range(order):
        contexts = contexts * 256 + data[i : i + len(contexts)]
    strings = contexts * 256 + data[order:]
    longer, shorter = (np.unique(codes, return_counts=True)[1] for codes in (strings, contexts))
    return _entropy(longer) - _entropy(shorter)


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float((p * -np.log2(p)).sum())
