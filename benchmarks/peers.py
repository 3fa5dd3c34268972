"""Speed on a GPU beside PyTorch's attention backends, in one process: `python -m benchmarks.peers [--json PATH]`.

Every cell draws fresh random data, holds the output against the peer's before anything is timed, warms up until the
clocks have settled, and interleaves the contestants; the median of the rounds is reported. TFLOP/s count 4 * pairs *
head_dim for the forward and 2.5 times that for the backward, pairs being those the mask keeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import cuflash
from cuflash import masking

TOKENS, HIDDEN = 16_384, 2_048
LENGTHS = (512, 2_048, 8_192, 16_384, 32_768)
HEAD_DIMS = (64, 128, 256)
PEERS = ("CUDNN_ATTENTION", "FLASH_ATTENTION")
ROUNDS, WARM_UP = 7, 3
BURST_SECONDS = 0.01  # of work behind one timing: long against the cost of a launch


class Cell(NamedTuple):
    """One problem of the grid: TOKENS tokens in sequences of `length`, or one that is longer, HIDDEN wide."""

    head_dim: int
    length: int
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(1, TOKENS // self.length), self.length, HIDDEN // self.head_dim, self.head_dim

    @property
    def forward_flops(self) -> float:
        batch, length, heads, head_dim = self.shape
        mask = masking.causal() if self.causal else masking.full()
        return 4.0 * batch * heads * head_dim * mask.count(length, length)


def contestants(cell: Cell, backward: bool) -> dict[str, Callable[[], Any]]:
    """Each contestant's call on the same data, their results compared."""
    import cupy
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tensors = [torch.randn(cell.shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, dout = (cupy.from_dlpack(tensor) for tensor in tensors)
    out, lse = cuflash.flash_attention(q, k, v, causal=cell.causal, return_lse=True)
    if backward:
        calls = {"cuflash": lambda: cuflash.flash_attention_backward(dout, q, k, v, out, lse, causal=cell.causal)}
    else:
        calls = {"cuflash": lambda: cuflash.flash_attention(q, k, v, causal=cell.causal, return_lse=True)[:1]}

    heads_first = [tensor.transpose(1, 2).detach().requires_grad_(backward) for tensor in tensors]

    def peer_forward(peer: str) -> Any:
        with sdpa_kernel(getattr(SDPBackend, peer)):
            queries, keys, values, _ = heads_first
            return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=cell.causal)

    for peer in PEERS:
        try:
            result = peer_forward(peer)
        except RuntimeError as error:
            print(f"{peer} cannot do {cell}: {error}")
            continue
        if backward:
            calls[peer] = lambda result=result: torch.autograd.grad(
                result, heads_first[:3], tensors[3].transpose(1, 2), retain_graph=True
            )
        else:
            calls[peer] = lambda peer=peer: (peer_forward(peer),)
    ours = [torch.from_dlpack(x).transpose(1, 2).float() for x in calls["cuflash"]()]
    for peer in PEERS:
        if peer in calls:
            for mine, theirs in zip(ours, calls[peer](), strict=True):
                difference = (mine - theirs.float()).norm() / theirs.float().norm()
                if not difference < 0.01:  # two bfloat16 results differ by 2e-3 to 5e-3
                    raise AssertionError(f"{cell}: differs from {peer} by {difference:.2e}")
    return calls


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Time of one call on the GPU, over a burst of `repeats`."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) * 1e-3 / repeats


def measure(cell: Cell, backward: bool) -> dict[str, float]:
    """TFLOP/s of every contestant, medians of interleaved rounds."""
    calls = contestants(cell, backward)
    flops = cell.forward_flops * (2.5 if backward else 1.0)
    repeats = {name: max(2, round(BURST_SECONDS / seconds(call, 1))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            elapsed = seconds(call, repeats[name])
            if round_ >= WARM_UP:
                times[name].append(elapsed)
    return {name: round(flops / statistics.median(found) / 1e12, 1) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed on a GPU beside PyTorch's attention backends, in one process.")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--length", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    arguments = parser.parse_args()

    import cupy
    import torch

    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    rows: list[dict[str, Any]] = []
    record = {
        "gpu": device,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cupy": cupy.__version__,
        "cuflash": cuflash.__version__,
        "unit": "TFLOP/s",
        "rows": rows,
    }
    print(f"{device}, bfloat16, {TOKENS} tokens, hidden {HIDDEN}; TFLOP/s, then cuflash over each peer")
    for pass_, head_dim, length, causal in product(
        arguments.passes, arguments.head_dim, arguments.length, (False, True)
    ):
        speed = measure(Cell(head_dim, length, causal), pass_ == "backward")
        rows.append({"pass": pass_, "head_dim": head_dim, "length": length, "causal": causal, **speed})
        ratios = {name: round(speed["cuflash"] / other, 2) for name, other in speed.items()}
        print(pass_, f"d{head_dim}", length, "causal" if causal else "full", speed, ratios, flush=True)
        if arguments.json:  # after every cell, so that an interrupted run leaves what it measured
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
