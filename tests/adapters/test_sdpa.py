"""`scaled_dot_product_attention` and `install` against torch's own function."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("cuflash.adapters.torch")
sdpa = pytest.importorskip("cuflash.adapters.torch.sdpa")
bias = pytest.importorskip("torch.nn.attention.bias")

torch_own = torch.nn.functional.scaled_dot_product_attention
LENGTHS = [(7, 7), (5, 9), (9, 5), (1, 9)]


def inputs(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, device: str = "cpu"
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(sum(q))
    dtype = torch.float64 if device == "cpu" else torch.float32
    shapes = (q, k, k if v is None else v)
    return tuple(torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes)


def assert_as_torch(tensors: tuple[Any, ...], **options: Any) -> None:
    actual = adapter.scaled_dot_product_attention(*tensors, **options)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch_own(*tensors, **options)
    precise = expected.dtype == torch.float64
    bounds = {"rtol": 1e-9, "atol": 1e-12} if precise else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, **bounds)
    found, wanted = (torch.autograd.grad(out.square().sum(), tensors) for out in (actual, expected))
    torch.testing.assert_close(found, wanted, **bounds)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_causal_is_at_the_top_left(lengths: tuple[int, int], device: str):
    q_len, kv_len = lengths
    tensors = inputs((2, 4, q_len, 8), (2, 4, kv_len, 8), (2, 4, kv_len, 6), device)
    assert_as_torch(tensors, is_causal=True)
    assert_as_torch(tensors)


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs:UserWarning")
@pytest.mark.parametrize("lengths", LENGTHS)
def test_causal_biases(lengths: tuple[int, int], device: str):
    q_len, kv_len = lengths
    tensors = inputs((2, 4, q_len, 8), (2, 4, kv_len, 8), None, device)
    assert_as_torch(tensors, attn_mask=bias.causal_upper_left(q_len, kv_len))
    if q_len <= kv_len:  # otherwise torch gives NaN for the queries without a key, and this gives 0
        assert_as_torch(tensors, attn_mask=bias.causal_lower_right(q_len, kv_len))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_scale(kv_heads: int, device: str):
    assert_as_torch(inputs((2, 4, 5, 8), (2, kv_heads, 9, 8), None, device), enable_gqa=True, scale=0.3)


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((4, 6, 8), (4, 7, 8)),
        ((3, 2, 4, 6, 8), (3, 2, 4, 7, 8)),
        ((3, 2, 4, 6, 8), (1, 2, 4, 7, 8)),
        ((2, 4, 6, 8), (1, 4, 7, 8)),
        ((2, 4, 6, 8), (2, 1, 7, 8)),
    ],
)
def test_any_leading_axes(q: tuple[int, ...], k: tuple[int, ...], device: str):
    assert_as_torch(inputs(q, k, None, device))


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 1, 1, 9), (1, 9), (9,), (2, 1, 1, 1)])
def test_masks_of_keys(shape: tuple[int, ...], device: str):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., :1] = True
    tensors = inputs((2, 4, 5, 8), (2, 4, 9, 8), None, device)
    if shape == (9,):  # torch wants two axes
        mask = mask[None]
    assert_as_torch(tensors, attn_mask=mask.to(device))


@pytest.mark.parametrize("shape", [(5, 9), (4, 1, 9), (2, 1, 5, 9), (2, 4, 5, 9), (2, 1, 5, 1)])
@pytest.mark.parametrize("additive", [False, True])
def test_dense_masks(shape: tuple[int, ...], additive: bool, device: str):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[..., :1] = True
    tensors = inputs((2, 4, 5, 8), (2, 4, 9, 8), None, device)
    if additive:
        mask = torch.randn(shape, generator=generator).masked_fill(~mask, float("-inf"))
        mask = mask.to(tensors[0].dtype)
    assert_as_torch(tensors, attn_mask=mask.to(device))


@pytest.mark.parametrize("shape", [(3, 2, 4, 6, 7), (3, 1, 1, 6, 7), (1, 1, 4, 6, 1), (2, 4, 6, 7), (6, 7)])
def test_dense_masks_with_any_leading_axes(shape: tuple[int, ...], device: str):
    tensors = inputs((3, 2, 4, 6, 8), (3, 2, 4, 7, 8), None, device)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tensors[0])
    assert_as_torch(tensors, attn_mask=mask)


def test_the_gradient_of_an_additive_mask(device: str):
    tensors = inputs((2, 4, 5, 8), (2, 4, 9, 8), None, device)
    mask = torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(0)).to(tensors[0]).requires_grad_()
    found, expected = (
        torch.autograd.grad(function(*tensors, attn_mask=mask).square().sum(), mask)[0]
        for function in (adapter.scaled_dot_product_attention, torch_own)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_masks_of_keys_without_heads(device: str):
    mask = torch.tensor([[[True, False, True]], [[False, True, True]]], device=device)
    assert_as_torch(inputs((2, 5, 8), (2, 3, 8), None, device), attn_mask=mask)


def test_a_query_without_keys_is_zero(device: str):
    tensors = inputs((2, 4, 5, 8), (2, 4, 9, 8), None, device)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)
    mask[1] = False
    out = adapter.scaled_dot_product_attention(*tensors, attn_mask=mask)
    assert out[0].all()
    assert not out[1].any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"attn_mask": torch.zeros(1, 1, 1, 9).half()}, "bias: got dtype float16", TypeError),
        ({"attn_mask": torch.ones(2, 2, 5, 9)}, r"attn_mask: got shape \(2, 2, 5, 9\)", ValueError),
        ({"attn_mask": torch.ones(1, 2, 4, 5, 9).bool()}, r"attn_mask: got shape \(1, 2, 4, 5, 9\)", ValueError),
        ({"attn_mask": torch.ones(1, 1, 1, 8).bool()}, r"attn_mask: got shape", ValueError),
        ({"attn_mask": torch.ones(1, 9).bool(), "is_causal": True}, "attn_mask: .*is_causal=True", ValueError),
        ({"attn_mask": [True] * 9}, "attn_mask: got .*list", TypeError),
        ({"attn_mask": torch.ones(1, 9, device="meta").bool()}, "attn_mask: got a tensor on meta", ValueError),
        ({"attn_mask": bias.causal_upper_left(5, 8)}, r"attn_mask: got a causal bias of \(5, 8\)", ValueError),
        ({"dropout_p": 1.5}, "dropout_p: got 1.5", ValueError),
        ({"key": torch.ones(2, 2, 9, 8)}, "key: got 2 heads", ValueError),
        ({"key": torch.ones(3, 4, 9, 8)}, r"key: got shape \(3, 4, 9, 8\)", ValueError),
        ({"query": torch.ones(5, 8)}, r"query: got shape \(5, 8\)", ValueError),
        ({"value": None}, "value: got None", TypeError),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, error: type[Exception]):
    good = {"query": torch.ones(2, 4, 5, 8), "key": torch.ones(2, 4, 9, 8), "value": torch.ones(2, 4, 9, 8)}
    with pytest.raises(error, match=message):
        adapter.scaled_dot_product_attention(**(good | options))


def test_dropout_follows_torch_manual_seed(device: str):
    tensors = inputs((2, 4, 50, 8), (2, 4, 50, 8), None, device)
    torch.manual_seed(0)
    first, second = (adapter.scaled_dot_product_attention(*tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    again = adapter.scaled_dot_product_attention(*tensors, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_compiled(device: str):
    torch._dynamo.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    fast = torch.compile(adapter.scaled_dot_product_attention, fullgraph=True, backend=backend)
    tensors = inputs((2, 4, 5, 8), (2, 4, 9, 8), None, device)
    mask = torch.tensor([True, False, True] * 3, device=device)[None]
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
        expected = adapter.scaled_dot_product_attention(*tensors, **options)
        torch.testing.assert_close(fast(*tensors, **options), expected)
    first, second = (fast(*tensors, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second), "each run draws its own seed"


def test_installed_and_back(device: str, monkeypatch: pytest.MonkeyPatch):
    functional = torch.nn.functional
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True, device=device)
    x = torch.randn(2, 6, 16, device=device)
    expected = layer(x, x, x, need_weights=False)[0]
    calls = []
    attend = sdpa.flash_attention

    def watch(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return attend(*arguments, **options)

    monkeypatch.setattr(sdpa, "flash_attention", watch)
    with adapter.installed():
        assert functional.scaled_dot_product_attention is adapter.scaled_dot_product_attention
        found = layer(x, x, x, need_weights=False)[0]
    assert len(calls) == 1
    assert functional.scaled_dot_product_attention is torch_own
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    adapter.install()
    try:
        with adapter.installed():
            pass
        assert functional.scaled_dot_product_attention is adapter.scaled_dot_product_attention
    finally:
        adapter.uninstall()
    assert functional.scaled_dot_product_attention is torch_own
    with pytest.raises(KeyError), adapter.installed():
        raise KeyError
    assert functional.scaled_dot_product_attention is torch_own
