"""The PyTorch adapter on a GPU: streams, CUDA graphs, torch's memory and no wait."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import cuflash

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("cuflash.adapters.torch")

pytestmark = pytest.mark.gpu_adapter
SHAPE = (2, 256, 8, 64)


def inputs(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: Any = None, device: str = "cuda") -> list[Any]:
    """q, k, v that require gradients, and dout."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if dtype is None else dtype
    q, k, v, dout = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    return [*(x.requires_grad_() for x in (q, k, v)), dout]


def step(q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, ...]:
    """A forward and a backward with bitwise reproducible results."""
    out = cuflash.flash_attention(q, k, v, causal=True, deterministic=True)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def assert_equal(actual: Any, expected: Any) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@contextmanager
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_current_stream_is_used():
    tensors = inputs()
    expected = step(*tensors)
    late = [x.detach().clone().zero_().requires_grad_(x.requires_grad) for x in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on any other stream would read zeros
        with torch.no_grad():
            for target, source in zip(late, tensors, strict=True):
                target.copy_(source)
        found = step(*late)
    stream.synchronize()
    assert_equal(found, expected)


def test_two_streams_interleaved():
    sets = [inputs(seed) for seed in range(8)]
    expected = [step(*tensors) for tensors in sets]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for i, tensors in enumerate(sets):
            with torch.cuda.stream(streams[i % 2]):
                found.append(step(*tensors))
        for stream in streams:
            stream.synchronize()
        for actual, wanted in zip(found, expected, strict=True):
            assert_equal(actual, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_a_graph_replays_with_fresh_data(packed: bool):
    options: dict[str, Any] = {"causal": True, "deterministic": True}
    shape = SHAPE
    if packed:
        shape = (512, 8, 64)
        ends = torch.tensor([0, 100, 100, 380, 512], dtype=torch.int32, device="cuda")
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}

    def run(q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, ...]:
        out = cuflash.flash_attention(q, k, v, **options)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    static = inputs(shape=shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*static)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for replay in range(1000):
        fresh = inputs(replay, shape=shape)
        with torch.no_grad():
            for target, source in zip(static, fresh, strict=True):
                target.copy_(source)
        graph.replay()
        for found, expected in zip(captured, run(*fresh), strict=True):
            wrong += (found != expected).sum()
    assert wrong.item() == 0


def test_dropout_in_a_graph_needs_a_seed():
    q, k, v, _ = (x.detach().transpose(1, 2) for x in inputs())
    adapter.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    error = pytest.raises(cuflash.UnsupportedError, match=r"dropout_p: .*CUDA graph")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        q + 1  # an empty graph is a warning
        with error:
            adapter.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def test_the_host_never_waits():
    tensors = inputs()
    ends = torch.tensor([0, 100, 512], dtype=torch.int32, device="cuda")
    heads_first = [x.detach().transpose(1, 2) for x in tensors[:3]]
    mask = torch.ones(2, 1, 1, 256, dtype=torch.bool, device="cuda")

    def everything() -> None:
        step(*tensors)
        q, k, v = (x.detach().flatten(0, 1) for x in tensors[:3])
        cuflash.flash_attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends)
        adapter.scaled_dot_product_attention(*heads_first, attn_mask=mask, dropout_p=0.1)

    everything()  # compiles
    with no_waiting():
        everything()


def test_memory_is_torchs_own():
    import cupy

    tensors = inputs()
    step(*tensors)
    gc.collect()  # what earlier tests left
    pool = cupy.get_default_memory_pool()
    held = pool.total_bytes()
    before = torch.cuda.memory_allocated()
    out, lse = cuflash.flash_attention(*(x.detach() for x in tensors[:3]), return_lse=True)
    size = out.numel() * out.element_size() + lse.numel() * lse.element_size()
    assert size <= torch.cuda.memory_allocated() - before <= size + 4096
    results = step(*tensors)
    assert pool.total_bytes() == held
    del out, lse, results
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before, "all of it goes back"


def test_a_training_step_takes_no_more_memory_than_torchs_flash():
    """One layer's projections around attention, at a length where attention's tensors are what counts."""
    torch.manual_seed(0)
    project, close = (torch.nn.Linear(1024, n, device="cuda", dtype=torch.bfloat16) for n in (3072, 1024))
    x = torch.randn(2, 8192, 1024, device="cuda", dtype=torch.bfloat16)

    def peak(attend: Any) -> int:
        def train() -> None:
            q, k, v = project(x).unflatten(-1, (3, 16, 64)).unbind(2)
            out = attend(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True).transpose(1, 2).flatten(2)
            close(out).square().mean().backward()

        for _ in range(2):  # the second does not compile, and has the gradients of the weights in place
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train()
        return torch.cuda.max_memory_allocated() - before

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        allowed = peak(torch.nn.functional.scaled_dot_product_attention)
    assert peak(adapter.scaled_dot_product_attention) <= allowed


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = step(*inputs())
    there = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in inputs()]
    found = step(*there)  # with device 0 current
    assert {x.device.index for x in found} == {1}
    assert_equal([x.to("cuda:0") for x in found], expected)
    with pytest.raises(ValueError, match="k: got a tensor on cuda:0; allowed: q's device, cuda:1"):
        cuflash.flash_attention(there[0], inputs()[1], there[2])


def test_tensors_on_two_devices():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="v: got a tensor on cpu; allowed: q's device, cuda:0"):
        cuflash.flash_attention(q, k, v.cpu())
    with pytest.raises(ValueError, match="backend: got 'numpy'"):
        cuflash.flash_attention(q, k, v, backend="numpy")


def test_float64_says_what_to_do():
    with pytest.raises(cuflash.UnsupportedError, match=r"float64.*cast to float32"):
        step(*inputs(dtype=torch.float64))


def test_strided_views_of_one_projection():
    """What models make: q, k and v are views of one tensor, and so is the gradient's source."""
    packed = torch.randn(2, 100, 3, 8, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    apart = [x.detach().contiguous().requires_grad_() for x in packed.unbind(2)]
    dout = torch.randn(2, 8, 100, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    out = cuflash.flash_attention(*packed.unbind(2), causal=True, deterministic=True)
    (gradient,) = torch.autograd.grad(out, packed, dout)
    assert_equal((out, *gradient.unbind(2)), step(*apart, dout))
    (of_sum,) = torch.autograd.grad(cuflash.flash_attention(*packed.unbind(2)).sum(), packed)  # dout is expanded
    assert of_sum.isfinite().all()
