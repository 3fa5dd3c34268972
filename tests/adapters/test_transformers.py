"""Models of Hugging Face transformers with random weights: what they give with eager attention, they give with this."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import cuflash

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("cuflash.adapters.transformers")

LENGTH, VOCABULARY = 20, 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def registered() -> None:
    adapter.register()


def model(kind: str, implementation: str, device: str = "cpu") -> Any:
    """Equal weights for every implementation."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES)
        made = transformers.LlamaForCausalLM
    elif kind == "mistral, a window":
        config = transformers.MistralConfig(**SIZES, sliding_window=7)
        made = transformers.MistralForCausalLM
    elif kind == "gemma2, softcap and a window in every other layer":
        config = transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=7, query_pre_attn_scalar=16)
        made = transformers.Gemma2ForCausalLM
    elif kind == "modernbert, a window to both sides":
        config = transformers.ModernBertConfig(
            **SIZES, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
        made = transformers.ModernBertForMaskedLM
    else:
        assert kind == "bert, not causal"
        config = transformers.BertConfig(**{name: x for name, x in SIZES.items() if name != "num_key_value_heads"})
        made = transformers.BertForMaskedLM
    config._attn_implementation = implementation
    return made(config).to(device).eval()


KINDS = [
    "llama",
    "mistral, a window",
    "gemma2, softcap and a window in every other layer",
    "bert, not causal",
    "modernbert, a window to both sides",
]


def tokens(device: str = "cpu", batch: int = 3) -> Any:
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)


def padding(side: str, device: str = "cpu") -> Any:
    mask = torch.ones(3, LENGTH, dtype=torch.long, device=device)
    if side == "right":
        mask[0, 13:], mask[1, LENGTH - 1 :] = 0, 0
    elif side == "left":
        mask[0, :7], mask[1, :1] = 0, 0
    return mask


def logits_and_gradients(network: Any, mask: Any) -> tuple[Any, ...]:
    network.zero_grad()
    ids = tokens(mask.device.type)
    logits = network(input_ids=ids, attention_mask=mask).logits * mask[..., None]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return logits.detach(), *(x.grad.clone() for x in network.parameters() if x.grad is not None)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind: str, side: str, device: str):
    mask = padding(side, device)
    expected = logits_and_gradients(model(kind, "eager", device), mask)
    found = logits_and_gradients(model(kind, adapter.NAME, device), mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("q_len", [5, LENGTH, LENGTH + 6])
def test_an_encoder_and_a_decoder(q_len: int, device: str):
    """Queries that are no keys: the padding of the encoder's tokens says nothing of them."""

    def run(implementation: str) -> tuple[Any, ...]:
        torch.manual_seed(0)
        config = transformers.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
        )
        config._attn_implementation = implementation
        network = transformers.BartForConditionalGeneration(config).to(device).eval()
        targets = torch.randint(3, VOCABULARY, (3, q_len), generator=torch.Generator().manual_seed(2)).to(device)
        logits = network(
            input_ids=tokens(device),
            attention_mask=padding("right", device),
            decoder_input_ids=targets,
            decoder_attention_mask=torch.ones_like(targets),
            use_cache=False,
        ).logits
        logits.square().mean().backward()
        return logits.detach(), *(x.grad for x in network.parameters() if x.grad is not None)

    torch.testing.assert_close(run(adapter.NAME), run("eager"), rtol=1e-4, atol=2e-6)


def test_padding_is_not_looked_at(device: str):
    network = model("llama", adapter.NAME, device)
    ids, mask = tokens(device), padding("left", device)
    expected = network(input_ids=ids, attention_mask=mask).logits
    ids[mask == 0] = 5
    found = network(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found[mask == 1], expected[mask == 1])


def test_a_mask_is_packed_once_and_forgotten(monkeypatch: pytest.MonkeyPatch):
    made = []
    of = adapter.Packing.of
    monkeypatch.setattr(adapter.Packing, "of", lambda kept: (made.append(kept.shape), of(kept))[1])
    network = model("llama", adapter.NAME)
    with torch.no_grad():
        network(tokens(), attention_mask=padding("left"), use_cache=False)
    assert made == [(3, LENGTH)], "one packing for queries and keys of both layers"
    gc.collect()
    assert len(adapter._packings_of_masks) == 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_generation_with_a_cache(kind: str, cache: str, device: str):
    generated = [
        model(kind, implementation, device).generate(
            tokens(device),
            attention_mask=padding("left", device),
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
            pad_token_id=0,
            disable_compile=True,
        )
        for implementation in ("eager", adapter.NAME)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_packed_rows(kind: str, device: str):
    """Positions that start again tell transformers that a row holds several sequences."""
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None].expand(3, -1).to(device)
    expected, found = (
        model(kind, implementation, device)(tokens(device), position_ids=positions, use_cache=False).logits
        for implementation in ("eager", adapter.NAME)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_boundaries_of_a_collator(device: str):
    ids = tokens(device, batch=1)
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None].to(device)
    ends = torch.tensor([0, 8, LENGTH], dtype=torch.int32, device=device)
    more = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    expected = model("llama", "eager", device)(ids, position_ids=positions, use_cache=False).logits
    found = model("llama", adapter.NAME, device)(ids, position_ids=positions, use_cache=False, **more).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of inductor, on a GPU
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["llama", "bert, not causal"])
def test_compiled(kind: str, side: str, device: str):
    torch._dynamo.reset()
    network = model(kind, adapter.NAME, device)
    more: dict[str, Any] = {"attention_mask": padding(side, device)}
    if kind == "llama":
        more["use_cache"] = False
    backend = "aot_eager" if device == "cpu" else "inductor"
    fast = torch.compile(network, fullgraph=True, backend=backend)
    expected = network(tokens(device), **more).logits
    torch.testing.assert_close(fast(tokens(device), **more).logits, expected, rtol=1e-4, atol=2e-6)


def test_sinks_and_dropout_of_a_layer():
    layer = torch.nn.Module()
    layer.is_causal = True
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    sinks = torch.randn(4)
    out, probabilities = adapter.attention(layer, q, k, v, None, s_aux=sinks, scaling=0.3)
    expected = cuflash.flash_attention(q, k, v, sinks=sinks, scale=0.3, causal=True, layout="bhsd")
    assert probabilities is None
    torch.testing.assert_close(out, expected.transpose(1, 2))
    torch.manual_seed(0)
    dropped, _ = adapter.attention(layer, q, k, v, None, dropout=0.5)
    torch.manual_seed(0)
    again, _ = adapter.attention(layer, q, k, v, None, dropout=0.5)
    assert torch.equal(dropped, again)
    assert not torch.equal(dropped, out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions: got True"),
        ({"position_bias": torch.zeros(1)}, "position_bias: got Tensor"),
        ({"attention_mask": torch.zeros(2, 1, 6, 6)}, r"attention_mask: got a mask of shape \(2, 1, 6, 6\)"),
    ],
)
def test_what_is_not_supported_raises(arguments: dict[str, Any], message: str):
    x = torch.randn(2, 4, 6, 8)
    with pytest.raises(cuflash.UnsupportedError, match=message):
        adapter.attention(torch.nn.Module(), x, x, x, **({"attention_mask": None} | arguments))


def test_masks_that_are_no_packing_raise():
    from transformers import masking_utils

    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long))
    either = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    for function, name in ((chunked, "chunked_overlay"), (either, "or_masks")):
        with pytest.raises(cuflash.UnsupportedError, match=f"mask_function: got {name}"):
            adapter.attention_mask(3, 8, 8, mask_function=function)


def test_a_name_with_flash_is_refused():
    with pytest.raises(ValueError, match="name: got 'cuflash'"):
        adapter.register("cuflash")


@pytest.mark.gpu_adapter
def test_a_llama_at_4096_tokens():
    """Eight layers, a padded batch: the errors of logits and gradients against the model in float64."""
    sizes = SIZES | {"hidden_size": 256, "num_hidden_layers": 8, "max_position_embeddings": 4096}
    ids = torch.randint(0, VOCABULARY, (2, 4096), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[0, 3000:], mask[1, :500] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)

    def run(implementation: str, dtype: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes)
        config._attn_implementation = implementation
        network = transformers.LlamaForCausalLM(config).cuda().to(dtype)
        logits = network(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        torch.nn.functional.cross_entropy(wide, labels[mask == 1]).backward()
        gradients = torch.cat([x.grad.double().flatten() for x in network.parameters()])
        return logits.detach().double(), gradients

    exact = run("sdpa", torch.float64)  # eager's softmax is in float32, where float64's mask overflows

    def errors(implementation: str, dtype: Any) -> list[float]:
        found = run(implementation, dtype)
        return [float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]

    for dtype, peer, factor in ((torch.float32, "eager", 2.0), (torch.bfloat16, "sdpa", 1.05)):
        for ours, theirs in zip(errors(adapter.NAME, dtype), errors(peer, dtype), strict=True):
            assert ours <= factor * theirs, f"{dtype}: {ours:.3e}, {peer} {theirs:.3e}"
