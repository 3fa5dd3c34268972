"""Documents of mixed length in one buffer: packed attention with a window, forward and backward, no padding.

    python examples/packed_documents.py

The documents are the articles of the language reference that ships with Python. Packing them costs what their own
lengths cost; padding to the longest would cost its length for every one of them.
"""

from __future__ import annotations

import pydoc_data.topics
import time

import numpy as np

import cuflash
from cuflash import masking

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 32, 256


def main() -> None:
    lengths = sorted(len(text.encode()) for text in pydoc_data.topics.topics.values())[:40]
    boundaries = np.cumsum([0, *lengths], dtype=np.int32)
    total = int(boundaries[-1])
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, total, HEADS, HEAD_DIM), dtype=np.float32)
    k, v = rng.standard_normal((2, total, KV_HEADS, HEAD_DIM), dtype=np.float32)

    options = {
        "causal": True,
        "window_size": (WINDOW, None),
        "cu_seqlens_q": boundaries,
        "cu_seqlens_k": boundaries,
    }
    start = time.perf_counter()
    out, lse = cuflash.flash_attention(q, k, v, return_lse=True, **options)
    dq, dk, dv = cuflash.flash_attention_backward(dout, q, k, v, out, lse, **options)
    seconds = time.perf_counter() - start

    mask = masking.causal() & masking.window(WINDOW, None)
    pairs = sum(mask.count(length, length) for length in lengths)
    padded = len(lengths) * max(lengths) ** 2
    print(f"{len(lengths)} documents of {lengths[0]} to {lengths[-1]} bytes, {total} tokens: {seconds:.2f} s")
    print(f"{pairs:,} pairs of query and key per head; padded to the longest, without a mask: {padded:,}")
    print(f"gradient norms: dq {np.linalg.norm(dq):.1f}, dk {np.linalg.norm(dk):.1f}, dv {np.linalg.norm(dv):.1f}")


if __name__ == "__main__":
    main()
