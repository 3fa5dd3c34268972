"""Dropout of P by a counter-based generator: the same mask forward and backward, on every backend, for every tiling.

Philox4x32-7 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), by whom seven
rounds are the fewest that no test told from chance. The key is the 64-bit seed. One counter serves 32 elements of P,
chosen so that a lane of a tensor-core accumulator finds its elements in one counter:

    q_index  = 16 a + 8 s + g       (s in 0..1, g in 0..7)
    kv_index = 64 b + 8 t + 2 c + u (t in 0..7, c in 0..3, u in 0..1)
    counter  = (8 a + g, 4 b + c, head, batch);  word 2 (t // 2) + s of eight, and where t is odd, rotated left by eight
               bits; its low half for u = 0, the high half for u = 1

The first four words are the counter's own, W0 to W3. The others are W0 ^ r(W2), W1 ^ r(W3), W2 ^ r(W1) and
W3 ^ r(W0), where r rotates left by four bits: any two of the eight are independent.

An element's number is the low 15 bits of its half, and n = round(32768 dropout_p) of the 32768 numbers mean that it is
dropped: those below n, or, where n is above 16384, all but those below 32768 - n. (So the limit is never above 16384,
and kernels can compare with it as float16.) Indices are local to the sequence, and batch is the index of the sequence
when sequences are packed.

So every byte of a word is the upper byte of one number and the lower byte of another, which belong to elements 7 to 9
keys apart. A lower byte decides only where the upper one, its top bit aside, equals that of the limit. With random
words, an element is dropped with probability n / 32768 exactly, elements of different words, or of one that share no
byte, are independent in pairs, and the drops of two that share one are correlated by at most 1 / 257. So the mean of an
output is exactly, and its variance but for those pairs, what independent drops give. Of three elements, whose words are
two and the mixture of these, all are dropped somewhat more often than independent ones, at most 1.3 times at 0.1.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike

ROUNDS = 7
_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int], rounds: int = ROUNDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four 32-bit random words for each counter (four broadcastable integer arrays); returned as uint64 arrays."""
    x0, x1, x2, x3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    for both in round_keys(key[0] | key[1] << 32, rounds):
        key0, key1 = np.uint64(both & 0xFFFFFFFF), np.uint64(both >> 32)
        product0 = x0 * _MULTIPLIER[0]
        product1 = x2 * _MULTIPLIER[1]
        x0, x2 = (product1 >> _SHIFT) ^ x1 ^ key0, (product0 >> _SHIFT) ^ x3 ^ key1
        x1, x3 = product1 & _LOW, product0 & _LOW
    return x0, x1, x2, x3


@functools.lru_cache(maxsize=16)
def round_keys(seed: int, rounds: int = ROUNDS) -> tuple[int, ...]:
    """The two key words of every round, the first in the low half of a 64-bit number."""
    return tuple(
        (seed + round * _KEY_STEP[0]) % 2**32 | ((seed >> 32) + round * _KEY_STEP[1]) % 2**32 << 32
        for round in range(rounds)
    )


def threshold(dropout_p: float) -> int:
    """How many of the 32768 numbers mean that an element is dropped."""
    return round(dropout_p * 32768)


def limit(dropout_p: float) -> tuple[int, bool]:
    """The number below which an element is drawn, and whether those that are drawn are kept (else dropped)."""
    dropped = threshold(dropout_p)
    return (32768 - dropped, True) if dropped > 16384 else (dropped, False)


def keep_mask(
    seed: int, dropout_p: float, batch: int, head: int, q_start: int, q_stop: int, kv_start: int, kv_stop: int
) -> np.ndarray:
    """Which elements of P[batch, head, q_start:q_stop, kv_start:kv_stop] are kept: bool [rows, cols]."""
    a0, a1 = q_start // 16, -(-q_stop // 16)
    b0, b1 = kv_start // 64, -(-kv_stop // 64)
    rows = np.arange(8 * a0, 8 * a1)[:, None]
    cols = np.arange(4 * b0, 4 * b1)[None, :]
    own = philox4x32((rows, cols, np.uint64(head), np.uint64(batch)), (seed & 0xFFFFFFFF, seed >> 32))
    words = [word.astype(np.uint32).reshape(a1 - a0, 8, b1 - b0, 4) for word in own]
    words += [words[i] ^ _rotated(words[j], 4) for i, j in enumerate((2, 3, 1, 0))]
    numbers = np.empty((a1 - a0, 2, 8, b1 - b0, 8, 4, 2), dtype=np.uint16)
    for s in range(2):
        for t in range(8):
            word = words[2 * (t // 2) + s]
            if t % 2:
                word = _rotated(word, 8)
            numbers[:, s, :, :, t, :, 0] = word & np.uint32(0x7FFF)
            numbers[:, s, :, :, t, :, 1] = word >> np.uint32(16) & np.uint32(0x7FFF)
    below, keeps = limit(dropout_p)
    keep = (numbers.reshape(16 * (a1 - a0), 64 * (b1 - b0)) < below) == keeps
    return keep[q_start - 16 * a0 : q_stop - 16 * a0, kv_start - 64 * b0 : kv_stop - 64 * b0]


def _rotated(words: np.ndarray, bits: int) -> np.ndarray:
    """Words of 32 bits rotated left."""
    return words << np.uint32(bits) | words >> np.uint32(32 - bits)
