"""Memory linear in the sequence length, measured. NumPy reports every allocation to tracemalloc.

`python -m tests.contract.test_memory` measures 8 heads of 64 from 4,096 to 65,536 tokens, which takes a while: the time
is quadratic. Lengths given as arguments replace these.
"""

from __future__ import annotations

import sys
import time
import tracemalloc

import numpy as np

import cuflash

HEADS, HEAD_DIM = 8, 64


def peak_of_attention(length: int, heads: int) -> int:
    """Peak bytes of a causal float32 forward and backward beyond q, k, v and dout: results, LSE and all workspace."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, length, heads, HEAD_DIM), dtype=np.float32) for _ in range(4))
    tracemalloc.start()
    try:
        out, lse = cuflash.flash_attention(q, k, v, causal=True, return_lse=True)
        cuflash.flash_attention_backward(dout, q, k, v, out, lse, causal=True)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def score_matrices_of_standard_attention(length: int, heads: int) -> int:
    """Bytes that standard attention cannot do without: the forward keeps P [heads, length, length] for the backward,
    which holds it together with dP (S and dS can take their places). Frameworks hold three or four.
    """
    return 2 * heads * length * length * np.dtype(np.float32).itemsize


def test_the_measurement_sees_numpy():
    tracemalloc.start()
    try:
        np.ones(1 << 20, np.float32)
        assert tracemalloc.get_traced_memory()[1] >= 4 << 20
    finally:
        tracemalloc.stop()


def test_twenty_times_below_standard_attention_at_8192_tokens():
    peak, standard = peak_of_attention(8192, HEADS), score_matrices_of_standard_attention(8192, HEADS)
    assert peak * 20 <= standard, f"{peak / 2**20:.0f} MiB, standard attention {standard / 2**20:.0f} MiB"


def test_linear_growth():
    short, long = peak_of_attention(4096, 1), peak_of_attention(16384, 1)
    # four times the tokens: at most four times the memory (what does not grow, the tiles, makes it less)
    assert long <= 4.0 * short, f"{short / 2**20:.1f} MiB at 4,096 tokens, {long / 2**20:.1f} MiB at 16,384"


def main(lengths: list[int]) -> None:
    print(f"float32 causal forward and backward, {HEADS} heads of {HEAD_DIM}; MiB beyond the inputs")
    print(f"{'tokens':>8} {'cuflash':>10} {'a 1,024 tokens':>15} {'standard':>10} {'ratio':>7} {'seconds':>8}")
    for length in lengths:
        start = time.perf_counter()
        peak = peak_of_attention(length, HEADS) / 2**20
        seconds = time.perf_counter() - start
        standard = score_matrices_of_standard_attention(length, HEADS) / 2**20
        per_1024 = peak / length * 1024
        print(f"{length:8d} {peak:10.1f} {per_1024:15.2f} {standard:10.0f} {standard / peak:6.0f}x {seconds:8.1f}")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [4096, 8192, 16384, 32768, 65536])
