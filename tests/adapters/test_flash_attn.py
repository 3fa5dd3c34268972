"""flash-attn 2's functions: its conventions, against standard attention written down here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import cuflash

torch = pytest.importorskip("torch")
flash_attn = pytest.importorskip("cuflash.adapters.flash_attn")


def normal(*shape: int, device: str = "cpu", seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype(device)).requires_grad_()


def dtype(device: str) -> Any:
    return torch.float64 if device == "cpu" else torch.float32


def assert_close(actual: Any, expected: Any) -> None:
    precise = (expected if isinstance(expected, torch.Tensor) else expected[0]).dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-9 if precise else 1e-4, atol=1e-12 if precise else 2e-5)


def standard(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
) -> tuple[Any, Any]:
    """(out, lse) with flash-attn's meaning of every argument: windows of -1, softcap 0, bottom-right alignment."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    q_pos = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    distance = torch.arange(k.shape[1], device=q.device) - q_pos
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores)[..., None, None] * distance.abs()
    left, right = window_size
    masked = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        masked |= distance > 0
    if left >= 0:
        masked |= distance < -left
    if right >= 0:
        masked |= distance > right
    scores = scores.masked_fill(masked, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "causal window": {"causal": True, "window_size": (3, -1)},
    "softcap and scale": {"softcap": 2.0, "softmax_scale": 0.5},
    "slopes": {"alibi_slopes": torch.linspace(0.1, 0.4, 4), "causal": True},
    "slopes of a batch": {"alibi_slopes": torch.linspace(0.1, 0.8, 8).view(2, 4)},
}


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_func_kvpacked_and_qkvpacked(name: str, device: str):
    options = on(device, OPTIONS[name])
    q, kv = normal(2, 7, 4, 8, device=device), normal(2, 9, 2, 2, 8, device=device, seed=1)
    expected, expected_lse = standard(q, kv[:, :, 0], kv[:, :, 1], **options)
    wanted = torch.autograd.grad(expected.square().sum() + expected_lse.sin().sum(), (q, kv))
    for out, lse, probabilities in (
        flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], return_attn_probs=True, **options),
        flash_attn.flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **options),
    ):
        assert probabilities is None
        assert_close((out, lse.to(out.dtype)), (expected, expected_lse))
        assert_close(torch.autograd.grad(out.square().sum() + lse.sin().sum(), (q, kv)), wanted)
    assert_close(flash_attn.flash_attn_kvpacked_func(q, kv, **options), expected)

    qkv = normal(2, 9, 3, 4, 8, device=device, seed=2)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, **options)
    expected, _ = standard(*qkv.unbind(2), **options)
    assert_close(out, expected)
    assert_close(*(torch.autograd.grad(x.square().sum(), qkv)[0] for x in (out, expected)))


@pytest.mark.parametrize("name", [name for name in OPTIONS if "batch" not in name])
def test_varlen(name: str, device: str):
    options = on(device, OPTIONS[name])
    q_lens, k_lens = (4, 0, 7), (4, 3, 9)
    ends_q, ends_k = (torch.tensor([0, *lens], device=device).cumsum(0, dtype=torch.int32) for lens in (q_lens, k_lens))
    q, kv = normal(11, 4, 8, device=device), normal(16, 2, 2, 8, device=device, seed=1)
    parts = [
        standard(q_part[None], kv_part[None, :, 0], kv_part[None, :, 1], **options)
        for q_part, kv_part in zip(q.split(q_lens), kv.split(k_lens), strict=True)
    ]
    expected, expected_lse = torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)
    for out, lse, _ in (
        flash_attn.flash_attn_varlen_func(
            *(q, kv[:, 0], kv[:, 1], ends_q, ends_k, max(q_lens), max(k_lens)), return_attn_probs=True, **options
        ),
        flash_attn.flash_attn_varlen_kvpacked_func(
            *(q, kv, ends_q, ends_k, max(q_lens), max(k_lens)), return_attn_probs=True, **options
        ),
    ):
        assert_close((out, lse.to(out.dtype)), (expected, expected_lse))

    qkv = normal(16, 3, 4, 8, device=device, seed=2)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, ends_k, max(k_lens), **options)
    whole = [standard(*(x[None] for x in part.unbind(1)), **options)[0][0] for part in qkv.split(k_lens)]
    assert_close(out, torch.cat(whole))


def test_positions_of_the_arguments_are_those_of_flash_attn():
    """As its documentation gives them; code that passes dropout or the longest lengths by position depends on it."""
    tail = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    expected = {
        "flash_attn_func": f"q k v {tail}",
        "flash_attn_kvpacked_func": f"q kv {tail}",
        "flash_attn_qkvpacked_func": f"qkv {tail}",
        "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {tail} block_table",
        "flash_attn_varlen_kvpacked_func": f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {tail}",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {tail}",
        "unpad_input": "hidden_states attention_mask unused_mask",
        "pad_input": "hidden_states indices batch seqlen",
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(flash_attn, name)).parameters) == parameters.split(), name


def test_unpad_attend_pad(device: str):
    """The round that models make: what is padding changes nothing."""
    x = normal(3, 6, 4, 8, device=device)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6], device=device)
    packed, indices, ends, longest, lengths = flash_attn.unpad_input(x, mask)
    assert packed.shape == (13, 4, 8)
    assert (ends.tolist(), ends.dtype, longest) == ([0, 3, 7, 13], torch.int32, 6)
    assert lengths.tolist() == [3, 4, 6]
    out = flash_attn.flash_attn_varlen_func(packed, packed, packed, ends, ends, longest, longest, causal=True)
    padded = flash_attn.pad_input(out, indices, 3, 6)
    for row, kept in enumerate(mask.bool()):
        alone, _ = standard(*[x[row, kept][None]] * 3, causal=True)
        assert_close(padded[row, kept], alone[0])
        assert not padded[row, ~kept].any()
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert not gradient[~mask.bool()].any()


def test_unused_room_is_kept():
    x = normal(2, 3, 5)
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 1, 0], [0, 0, 0]])
    packed, indices, ends, longest, tokens = flash_attn.unpad_input(x, mask, unused)
    assert (packed.shape[0], indices.tolist(), ends.tolist(), longest) == (4, [0, 1, 3, 4], [0, 2, 4], 2)
    assert tokens.tolist() == [1, 2]


def test_dropout_keeps_the_lse_and_follows_manual_seed(device: str):
    q, k, v = (normal(2, 40, 4, 8, device=device, seed=i) for i in range(3))
    torch.manual_seed(0)
    first, lse, _ = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    torch.manual_seed(0)
    again, _, _ = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    assert torch.equal(first, again)
    plain, plain_lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert not torch.equal(first, plain)
    assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize(
    ("call", "message", "error"),
    [
        (lambda x: flash_attn.flash_attn_func(x, x, x, window_size=(-2, 0)), "window_size", ValueError),
        (lambda x: flash_attn.flash_attn_func(x, x, x, window_size=3), "window_size: got 3", TypeError),
        (lambda x: flash_attn.flash_attn_func(x, x, x, softcap=-1.0), "softcap", ValueError),
        (lambda x: flash_attn.flash_attn_qkvpacked_func(x), r"qkv: got shape \(2, 7, 4, 8\)", ValueError),
        (lambda x: flash_attn.flash_attn_kvpacked_func(x, None), "kv: got None", TypeError),
        (
            lambda x: flash_attn.flash_attn_varlen_func(x, x, x, None, None, 7, 7),
            "cu_seqlens_q: got None",
            TypeError,
        ),
        (
            lambda x: flash_attn.flash_attn_varlen_func(x, x, x, None, None, 7, 7, block_table=x),
            "block_table",
            cuflash.UnsupportedError,
        ),
    ],
)
def test_bad_input(call: Any, message: str, error: type[Exception]):
    with pytest.raises(error, match=message):
        call(normal(2, 7, 4, 8))
