"""Which kernel and tile a Spec gets, by pure functions that need no GPU."""

from __future__ import annotations

from cuflash.spec import Tile


def numpy_tile(q_len: int, kv_len: int) -> Tile:
    """The NumPy backend's tile: score tiles that stay in a core's cache, few enough for Python's cost to vanish."""
    return Tile(rows=min(256, max(q_len, 1)), cols=min(512, max(kv_len, 1)))
