"""Masks as values: which keys a query may attend to, as algebra, bounds for tiles, predicate and dense form.

Everything speaks of positions, not indices: the key at index j has kv_pos = j, the query at index i has
q_pos = i + offset with offset = kv_len - q_len. So the last query lines up with the last key, which is the
bottom-right alignment of the flash-attention convention.

A band mask keeps q_pos - left <= kv_pos <= q_pos + right, where None is no bound on that side.
`causal()` is the band (None, 0); `causal() & window(512, 0)` is the intersection of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Mask:
    """The band q_pos - left <= kv_pos <= q_pos + right; None is no bound on that side. Bounds may be negative."""

    left: int | None = None
    right: int | None = None

    def __and__(self, other: Mask) -> Mask:
        return Mask(_tighter(self.left, other.left), _tighter(self.right, other.right))

    def allowed(self, q_pos: np.ndarray, kv_pos: np.ndarray) -> np.ndarray:
        """The predicate, broadcast over positions: bool, True where the query may attend to the key."""
        distance = np.asarray(kv_pos) - np.asarray(q_pos)
        keep = np.ones(distance.shape, dtype=bool)
        if self.left is not None:
            keep &= distance >= -self.left
        if self.right is not None:
            keep &= distance <= self.right
        return keep

    def dense(self, q_len: int, kv_len: int) -> np.ndarray:
        """The whole mask [q_len, kv_len] bool, for the oracle and for pictures."""
        q_pos = np.arange(q_len)[:, None] + (kv_len - q_len)
        return self.allowed(q_pos, np.arange(kv_len)[None, :])

    @property
    def empty(self) -> bool:
        """Whether the bounds leave nothing: no key is both late and early enough for any query."""
        return self.left is not None and self.right is not None and self.left + self.right < 0

    def kv_range(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[int, int]:
        """Keys [start, stop) that at least one query of [q_start, q_stop) may attend to; start == stop if none."""
        offset = kv_len - q_len
        start = 0 if self.left is None else q_start + offset - self.left
        stop = kv_len if self.right is None else q_stop - 1 + offset + self.right + 1
        return (0, 0) if self.empty else _clip(start, stop, kv_len)

    def kv_range_unmasked(self, q_start: int, q_stop: int, q_len: int, kv_len: int) -> tuple[int, int]:
        """Keys [start, stop) that every query of [q_start, q_stop) may attend to: no predicate is needed there."""
        offset = kv_len - q_len
        start = 0 if self.left is None else q_stop - 1 + offset - self.left
        stop = kv_len if self.right is None else q_start + offset + self.right + 1
        return _clip(start, stop, kv_len)

    def q_range(self, kv_start: int, kv_stop: int, q_len: int, kv_len: int) -> tuple[int, int]:
        """Queries [start, stop) that may attend to at least one key of [kv_start, kv_stop): the backward's range."""
        offset = kv_len - q_len
        start = 0 if self.right is None else kv_start - self.right - offset
        stop = q_len if self.left is None else kv_stop - 1 + self.left - offset + 1
        return (0, 0) if self.empty else _clip(start, stop, q_len)

    def count(self, q_len: int, kv_len: int) -> int:
        """How many (query, key) pairs the mask keeps: the arithmetic that is left to do."""
        q_pos = np.arange(q_len, dtype=np.int64) + (kv_len - q_len)
        first = np.zeros(q_len, np.int64) if self.left is None else np.maximum(q_pos - self.left, 0)
        last = (
            np.full(q_len, kv_len - 1, np.int64) if self.right is None else np.minimum(q_pos + self.right, kv_len - 1)
        )
        return int(np.maximum(last - first + 1, 0).sum())


def full() -> Mask:
    """Every query attends to every key."""
    return Mask()


def causal() -> Mask:
    """No query attends to a later position."""
    return Mask(right=0)


def window(left: int | None, right: int | None) -> Mask:
    """A sliding window: `left` keys before the query's position and `right` after it."""
    return Mask(left, right)


def _tighter(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _clip(start: int, stop: int, length: int) -> tuple[int, int]:
    start = min(max(start, 0), length)
    return start, max(min(stop, length), start)
