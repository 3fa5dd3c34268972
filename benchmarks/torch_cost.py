"""What a call from PyTorch costs the host, beside torch's own attention with its FlashAttention-2 backend.

    python -m benchmarks.torch_cost

Small bfloat16 tensors on a GPU, so that the host is slower than the kernels; the peers are interleaved in one process
and the outputs compared first. Prints the median microseconds of a call: forward without gradients, and forward with
backward. Needs torch, and CuPy with a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import cuflash

BATCH, LENGTH, HEADS, HEAD_DIM = 1, 128, 8, 64
CALLS, ROUNDS = 200, 25


def main() -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def tensors(grad: bool) -> list[Any]:
        shape = (BATCH, LENGTH, HEADS, HEAD_DIM)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for _ in range(3)]

    def ours(q: Any, k: Any, v: Any) -> Any:
        return cuflash.flash_attention(q, k, v, causal=True)

    def torchs(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def trained(attend: Callable[..., Any], inputs: list[Any], dout: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(*inputs), inputs, dout)

    plain, leaves = tensors(False), tensors(True)
    heads_first = [x.transpose(1, 2).contiguous() for x in plain]
    dout = torch.randn_like(plain[0])
    rows: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {
            "cuflash": lambda: ours(*plain),
            "torch": lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True),
        },
        "forward and backward": {"cuflash": trained(ours, leaves, dout), "torch": trained(torchs, leaves, dout)},
    }
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(ours(*plain), torchs(*plain), rtol=2e-2, atol=2e-2)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; median microseconds of a call")
        print(f"{'':22} {'cuflash':>8} {'torch':>8} {'ratio':>6}")
        for name, calls in rows.items():
            times = medians(calls, torch.cuda.synchronize)
            print(f"{name:22} {times['cuflash']:8.1f} {times['torch']:8.1f} {times['cuflash'] / times['torch']:6.2f}")


def medians(calls: dict[str, Callable[[], Any]], synchronize: Callable[[], None]) -> dict[str, float]:
    """Of rounds that alternate between the peers; in each, many calls one after the other before the device is waited
    for."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(ROUNDS + 2):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            elapsed = time.perf_counter() - start
            synchronize()
            if round_number >= 2:  # the first two warm up
                times[name].append(elapsed / CALLS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
