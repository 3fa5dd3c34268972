"""Which parts of a call go through the GPU together, and where their arrays lie: pure functions that need no GPU.

Attention is a problem of its own for every batch entry and key/value head with its group of query heads, so a chunk of
both is the same call on slices of the arrays.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from cuflash import plans
from cuflash.arrays import Signature, dtype_of
from cuflash.cuda import launch
from cuflash.errors import UnsupportedError
from cuflash.spec import Problem

LIMIT = "CUFLASH_HOST_CHUNK_MB"
_MIB = 2**20
_USUAL = 128 * _MIB  # of a chunk: enough work for a GPU, small enough for copies to overlap
_ALIGNMENT = 256  # of the arrays in a block


class Chunk(NamedTuple):
    """A part of a call that is computed at once."""

    batch: slice  # all where sequences are packed
    kv_heads: slice  # with the query heads that share them

    @property
    def counts(self) -> tuple[int, int]:
        """Batch entries and key/value heads."""
        return self.batch.stop - self.batch.start, self.kv_heads.stop - self.kv_heads.start


class Block(NamedTuple):
    """Where the arrays of a chunk lie: inputs, then results."""

    arrays: dict[str, Signature]  # by name, contiguous
    offsets: dict[str, int]  # in bytes
    results: int  # bytes before the first result
    size: int  # in bytes


@dataclass(frozen=True, kw_only=True)
class Call:
    """A validated call whose arrays are in the host's memory."""

    problem: Problem
    head_major: bool
    inputs: dict[str, Signature]  # by name; those that the call has
    results: dict[str, Signature]
    accumulate: bool = False
    lean: bool = False

    def index(self, name: str, chunk: Chunk) -> tuple[slice, ...]:
        """Where a chunk lies in an array of the call."""
        axes = [slice(None)] * len((self.inputs | self.results)[name].shape)
        if name in ("cu_seqlens_q", "cu_seqlens_k"):
            return tuple(axes)
        if name in launch.TENSORS:
            head_axis, own_axes = (-3 if self.head_major else -2), 3
        elif name in ("lse", "dlse"):
            head_axis, own_axes = -2, 2
        else:  # alibi_slopes, sinks, dsinks
            head_axis, own_axes = -1, 1
        heads, group = chunk.kv_heads, self.problem.group
        shared = name in ("k", "v", "dk", "dv")
        axes[head_axis] = heads if shared else slice(heads.start * group, heads.stop * group)
        if len(axes) > own_axes and not self.problem.spec.packed:
            axes[0] = chunk.batch
        return tuple(axes)

    def block(self, chunk: Chunk, device: int = 0) -> Block:
        """The block of a chunk on a device."""
        found: dict[str, Signature] = {}
        offsets, results, end = {}, 0, 0
        for name, array in (self.inputs | self.results).items():
            if name in self.results and not offsets.keys() & self.results.keys():
                results = end
            index = self.index(name, chunk)
            shape = tuple(len(range(n)[part]) for n, part in zip(array.shape, index, strict=True))
            # Sums over the batch are rounded once, at the end.
            dtype = "float32" if name in ("sinks", "dsinks") else array.dtype
            found[name] = plans.contiguous(Signature(shape, (), dtype, f"cuda:{device}", True))
            offsets[name] = end
            end += -(-size_of(found[name]) // _ALIGNMENT) * _ALIGNMENT
        return Block(found, offsets, results, max(end, _ALIGNMENT))

    def device_bytes(self, batch: int, kv_heads: int) -> int:
        """The most device memory that a chunk of this size takes: its block and the kernels' workspace."""
        sizes = {"batch": batch, "heads": kv_heads * self.problem.group, "kv_heads": kv_heads}
        backward = "dq" in self.results
        workspace = launch.workspace_bound(replace(self.problem, **sizes), backward=backward, lean=self.lean)
        return self.block(Chunk(slice(0, batch), slice(0, kv_heads))).size + workspace

    def chunks(self, limit: int | None, free: int) -> list[Chunk]:
        """Chunks of at most `limit` bytes on a device with `free` bytes, the first one the largest.

        Whole batch entries as far as they go, because they are contiguous, else heads of one. None is the usual limit,
        which one batch entry with one key/value head may exceed. Raises UnsupportedError where that does not fit, and
        for dropout, whose mask depends on the place in the whole call, where that is more than one chunk.
        """
        problem = self.problem
        packed = problem.spec.packed
        if problem.batch == 0 and not packed:
            return []
        entries = problem.batch if packed else 1  # packed sequences are not taken apart
        usable = usable_bytes(free)
        if problem.spec.dropout:
            whole = self.device_bytes(problem.batch, problem.kv_heads)
            if whole > min(usable, usable if limit is None else limit):
                raise UnsupportedError(
                    f"dropout_p: got {problem.dropout_p} with NumPy arrays on a GPU, which then must be one chunk: of "
                    f"{_mib(whole)}, where {_allowed(limit, usable)}; allowed: a batch in that memory, backend='numpy' "
                    "or dropout_p=0"
                )
            return [Chunk(slice(0, problem.batch), slice(0, problem.kv_heads))]
        smallest = self.device_bytes(entries, 1)
        most = min(max(_USUAL, smallest) if limit is None else limit, max(usable // 2, smallest))
        if smallest > min(most, usable):
            lengths = f"{problem.group} query heads of {problem.q_len} and {problem.kv_len} tokens"
            raise UnsupportedError(
                f"q, k: got {lengths} for one key/value head, which take {_mib(smallest)} on the GPU, where "
                f"{_allowed(limit, usable)}; allowed: shorter ones, memory='lean' in the backward, or backend='numpy'"
            )
        all_heads = slice(0, problem.kv_heads)
        if packed or self.device_bytes(1, problem.kv_heads) > most:
            count = _largest(problem.kv_heads, most, lambda n: self.device_bytes(entries, n))
            batches = [slice(0, problem.batch)] if packed else _parts(problem.batch, 1)
            return [Chunk(batch, heads) for batch in batches for heads in _parts(problem.kv_heads, count)]
        count = _largest(problem.batch, most, lambda n: self.device_bytes(n, problem.kv_heads))
        return [Chunk(batch, all_heads) for batch in _parts(problem.batch, count)]


def chunk_limit() -> int | None:
    """CUFLASH_HOST_CHUNK_MB in bytes, or None where it is not set; a ValueError for anything but a positive number."""
    text = os.environ.get(LIMIT)
    if not text:
        return None
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = math.nan
    if not (math.isfinite(megabytes) and megabytes > 0):
        raise ValueError(f"{LIMIT}: got {text!r}; allowed: a positive number of MiB")
    return int(megabytes * _MIB)


def usable_bytes(free: int) -> int:
    """The part of the free memory that a call takes: pools have gaps, and kernels need some to be loaded."""
    return free // 10 * 9


def size_of(array: Signature) -> int:
    """Bytes of a contiguous array."""
    return math.prod(array.shape) * dtype_of(array.dtype).itemsize


def _largest(count: int, most: int, size: Callable[[int], int]) -> int:
    """The largest n of 1 to `count` with size(n) <= most, where size(1) is and size grows."""
    return bisect_right(range(1, count + 1), most, key=size)


def _parts(count: int, most: int) -> list[slice]:
    """`count` in as few parts of at most `most` as it takes, of about the same size, the first the largest."""
    parts = -(-count // most)
    step = -(-count // parts)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _mib(size: int) -> str:
    return f"{size / _MIB:.4g} MiB"


def _allowed(limit: int | None, usable: int) -> str:
    """What a chunk may take, for an error message."""
    if limit is not None and limit <= usable:
        return f"{LIMIT} allows {_mib(limit)}"
    return f"{_mib(usable)} of the GPU's memory are free for it (and {LIMIT} sets the most of a chunk)"
