"""A transformer layer in plain PyTorch: attention as one line of an nn.Module, trained, compiled and checkpointed.

    python examples/torch_module.py

The layer has grouped heads and a learned sink a head; it runs on a GPU if there is one. It learns to say which of two
marks stood earlier in a sequence, which takes attention.
"""

from __future__ import annotations

import torch
from torch import nn

import cuflash

LENGTH, WIDTH, HEADS, KV_HEADS, STEPS = 24, 32, 4, 2, 120


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.project = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * self.head_dim, bias=False)
        self.close = nn.Linear(WIDTH, WIDTH, bias=False)
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(x).unflatten(-1, (-1, self.head_dim))  # [batch, len, heads + 2 * kv_heads, head_dim]
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=-2)
        return self.close(cuflash.flash_attention(q, k, v, causal=True, sinks=self.sinks).flatten(-2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) / 8)
        self.attention = Attention()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.expand = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, 2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.places
        x = x + self.attention(self.norms[0](x))
        return self.expand(self.norms[1](x[:, -1]))


def batch_of(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros with one 1 and one 2, then a 3 to answer at; and whether the 2 came first."""
    tokens = torch.zeros(size, LENGTH, dtype=torch.long)
    places = torch.rand(size, LENGTH - 1, generator=generator).argsort(1)[:, :2]
    tokens.scatter_(1, places, torch.tensor([[1, 2]]).expand(size, -1))
    tokens[:, -1] = 3
    return tokens, (places[:, 1] < places[:, 0]).long()


def main(steps: int = STEPS) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        tokens, answers = (x.to(device) for x in batch_of(32, generator))
        loss = nn.functional.cross_entropy(model(tokens), answers)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0:
            print(f"step {step:4d}: loss {loss.item():.3f}")
    tokens, answers = (x.to(device) for x in batch_of(512, generator))
    with torch.no_grad():
        right = (model(tokens).argmax(-1) == answers).float().mean().item()
        compiled = torch.compile(model.attention, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, LENGTH, WIDTH, device=device)
        difference = (compiled(x) - model.attention(x)).abs().max().item()
    print(f"right in {right:.1%} of new sequences; compiled and plain layers differ by {difference:.1e}")
    return right


if __name__ == "__main__":
    main()
