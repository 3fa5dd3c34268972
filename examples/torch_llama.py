"""A small Llama of Hugging Face transformers, trained a few steps with cuflash and with torch's own attention.

    python examples/torch_llama.py

Random weights, random text with a pattern, padded batches; the losses of the two agree within rounding. On a GPU it
trains in bfloat16 autocast, on a CPU in float32.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cuflash.adapters import transformers as cuflash_transformers

VOCABULARY, LENGTH, BATCH, STEPS = 64, 96, 8, 12


def losses(implementation: str, device: str, steps: int) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        stride = torch.randint(1, 4, (BATCH, 1), generator=generator)
        tokens = (start + stride * torch.arange(LENGTH)) % VOCABULARY
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
        mask = torch.arange(LENGTH) < lengths
        labels = tokens.masked_fill(~mask, -100)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


def main(steps: int = STEPS) -> float:
    """Trains both, prints their losses and returns the largest difference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cuflash_transformers.register()
    ours, torchs = (losses(name, device, steps) for name in (cuflash_transformers.NAME, "sdpa"))
    print(f"{'step':>4} {'cuflash':>9} {'sdpa':>9}")
    for step, pair in enumerate(zip(ours, torchs, strict=True)):
        print(f"{step:4d} {pair[0]:9.5f} {pair[1]:9.5f}")
    largest = max(abs(x - y) for x, y in zip(ours, torchs, strict=True))
    print(f"largest difference {largest:.1e}")
    return largest


if __name__ == "__main__":
    main()
