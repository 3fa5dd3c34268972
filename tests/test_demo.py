"""The demo's parts on small problems, and the whole of it: complete, failing, and ended by Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.live import Live

from cuflash import UnsupportedError, reference
from cuflash.cli import main
from cuflash.demo import exactness, job, machine, memory, report, standard, text, training
from cuflash.demo.model import Config, Model
from cuflash.demo.optimiser import Optimiser, _orthogonal

TINY = Config(dim=8, heads=2, blocks=2, hidden=12, history=3)
SWEEP = memory.Sweep(
    heads=1,
    head_dim=16,
    dtype="float32",
    first_length=128,
    last_length=1024,
    cuflash_seconds=60,
    standard_seconds=60,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> job.Size:
    """The demo at a size that takes a second."""
    schedule = training.Schedule(seconds=1, minimum_steps=1, steps=6, evaluations=2, windows=2)
    size = job.Size(context=256, model=TINY, schedule=schedule, sweep=SWEEP)
    monkeypatch.setattr(job, "size", lambda settings, xp: size)
    return size


def read_report(folder: Path) -> dict[str, Any]:
    assert (folder / report.PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.partial"))
    return json.loads((folder / report.JSON_NAME).read_text(encoding="utf-8"))


# ---- the text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "order_0", "order_1", "order_2"),
    [
        (b"aaaa", 0.0, 0.0, 0.0),
        (b"abababab", 1.0, 0.0, 0.0),
        (b"abcd" * 8, 2.0, 0.0, 0.0),
        (b"aab", math.log2(3) - 2 / 3, 1.0, 0.0),  # p = 2/3, 1/3; after a: a once, b once
        (b"aabba", 0.6 * math.log2(5 / 3) + 0.4 * math.log2(5 / 2), 1.0, 0.0),  # after a: a, b; after b: b, a
        (b"aaab", 2 - 0.75 * math.log2(3), math.log2(3) - 2 / 3, 1.0),  # after aa: a once, b once
    ],
)
def test_entropies_by_hand(data: bytes, order_0: float, order_1: float, order_2: float) -> None:
    array = np.frombuffer(data, dtype=np.uint8)
    assert text.order_0_entropy(array) == pytest.approx(order_0, abs=1e-12)
    assert text.order_1_entropy(array) == pytest.approx(order_1, abs=1e-12)
    assert text.order_2_entropy(array) == pytest.approx(order_2, abs=1e-12)


def test_default_text_is_long_and_split_without_overlap() -> None:
    loaded = text.load()
    assert len(loaded.data) > 300_000
    assert len(loaded.held_out) == len(loaded.data) // 10
    np.testing.assert_array_equal(np.concatenate([loaded.train, loaded.held_out]), loaded.data)
    order_0, order_1, order_2 = (
        entropy(loaded.data) for entropy in (text.order_0_entropy, text.order_1_entropy, text.order_2_entropy)
    )
    assert 0 < order_2 < order_1 < order_0 < 8


def test_a_python_without_pydoc_data_is_told_to_name_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UnsupportedError, match="--text"):
        text.load()


# ---- standard attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("float16", 2e-2)])
def test_standard_attention_is_right(causal: bool, dtype: str, tolerance: float) -> None:
    random = np.random.default_rng(0)
    q, k, v, dout = (random.standard_normal((2, 33, 3, 16)).astype(dtype) for _ in range(4))
    out, probabilities = standard.attention(q, k, v, causal=causal)
    gradients = standard.attention_backward(dout, q, k, v, out, probabilities)
    expected = (
        reference.attention(q, k, v, causal=causal)[0],
        *reference.attention_backward(dout, q, k, v, causal=causal),
    )
    for value, right in zip((out, *gradients), expected, strict=True):
        assert value.dtype == dtype
        np.testing.assert_allclose(value, right, rtol=tolerance, atol=tolerance)


class LikeCupy:
    """NumPy behind another name: what the demo does for an array module that is not NumPy, on the CPU."""

    __name__, __version__ = "like_cupy", "1.0"

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.mark.parametrize("causal", [False, True])
def test_standard_attention_of_single_matrices_is_the_batched_one(causal: bool) -> None:
    random = np.random.default_rng(0)
    q, k, v, dout = (random.standard_normal((2, 33, 3, 16)).astype("float32") for _ in range(4))
    results = []
    for xp in (np, LikeCupy()):
        out, probabilities = standard.attention(q, k, v, causal=causal, xp=xp)
        results.append((out, *standard.attention_backward(dout, q, k, v, out, probabilities, xp=xp)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


# ---- the model ---------------------------------------------------------------------------------------------------


def tiny_model() -> tuple[Model, np.ndarray]:
    """A float64 model away from its symmetric start, and tokens [2, 10] with repeated bytes."""
    random = np.random.default_rng(1)
    model = Model(TINY, dtype="float64")
    model.parameters["logits"] += random.standard_normal(model.parameters["logits"].shape)
    return model, random.integers(0, 6, (2, 10)).astype(np.uint8)


@pytest.mark.parametrize("name", list(Model(TINY).parameters))
def test_gradients_agree_with_finite_differences(name: str) -> None:
    model, tokens = tiny_model()
    _, gradients = model.loss_and_gradients(tokens)
    assert gradients.keys() == model.parameters.keys()
    parameter, step = model.parameters[name], 1e-4
    assert gradients[name].shape == parameter.shape
    start = parameter.copy()
    for direction in np.random.default_rng(2).standard_normal((3, *parameter.shape)):
        slopes = []
        for distance in (step, 2 * step):  # Richardson: the error of the central difference falls to step ** 4
            parameter[...] = start + distance * direction
            above = model.loss(tokens)
            parameter[...] = start - distance * direction
            slopes.append((above - model.loss(tokens)) / (2 * distance))
        expected = (4 * slopes[0] - slopes[1]) / 3
        assert float((gradients[name] * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_an_untrained_model_knows_nothing_and_a_batch_is_the_mean_of_its_rows() -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (2, 20)).astype(np.uint8)
    assert Model(TINY).loss(tokens) == pytest.approx(math.log(256), rel=1e-6)
    model, tokens = tiny_model()
    assert model.loss(tokens) == pytest.approx((model.loss(tokens[:1]) + model.loss(tokens[1:])) / 2, rel=1e-12)


def test_the_model_does_not_see_what_it_predicts() -> None:
    model, tokens = tiny_model()
    length = tokens.shape[1]

    def loss_of_position(row: np.ndarray, position: int) -> float:
        return model.loss(row[:, : position + 2]) * (position + 1) - (
            model.loss(row[:, : position + 1]) * position if position else 0.0
        )

    losses = [loss_of_position(tokens[:1], position) for position in range(length - 1)]
    assert model.loss(tokens[:1]) == pytest.approx(sum(losses) / (length - 1), rel=1e-12)


def test_slopes_reach_as_far_as_asked() -> None:
    np.testing.assert_array_equal(Model(Config(heads=2)).slopes, np.float32([2**-4, 2**-8]))
    np.testing.assert_allclose(Model(Config(heads=4, reach=16_384)).slopes[-1], 1 / 16_384)


def test_attention_in_two_bytes_loses_precision_and_no_gradient() -> None:
    """The gradient of a mean over thousands of positions is below what float16 can hold."""
    tokens = np.random.default_rng(0).integers(0, 256, (1, 4097)).astype(np.uint8)
    found = {}
    for dtype in ("float32", "float16"):
        model = Model(dataclasses.replace(TINY, attention_dtype=dtype))
        model.parameters["logits"] += 1e-3 * np.random.default_rng(1).standard_normal((8, 256)).astype("float32")
        loss, found[dtype] = model.loss_and_gradients(tokens)
        assert loss == pytest.approx(math.log(256), rel=1e-2)
    for name, exact in found["float32"].items():
        rounded = found["float16"][name]
        assert rounded.dtype == np.float32
        assert np.linalg.norm(rounded - exact) < 0.01 * np.linalg.norm(exact)


class SharedNames:
    """NumPy under the names alone that CuPy has too, with the same meaning: what the model may use."""

    NAMES = ("arange", "asarray", "empty", "exp", "log", "maximum", "sqrt", "zeros_like")

    def __getattr__(self, name: str) -> Any:
        assert name in self.NAMES, f"xp.{name}: does CuPy have it?"
        return getattr(np, name)


def test_model_and_optimiser_use_only_what_cupy_has() -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (1, 33)).astype(np.uint8)
    shared, plain = Model(TINY, xp=SharedNames()), Model(TINY)
    for model in (shared, plain):
        optimiser = Optimiser(model)
        for _ in range(2):
            _, gradients = model.loss_and_gradients(tokens)
            optimiser.step(gradients, 1.0)
    assert shared.loss(tokens) == plain.loss(tokens)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_muon_makes_singular_values_nearly_equal(shape: tuple[int, int]) -> None:
    left, _, right = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), full_matrices=False)
    matrix = left * np.geomspace(1, 20, min(shape)) @ right
    values = np.linalg.svd(_orthogonal(matrix), compute_uv=False)
    assert values.max() < 1.3
    assert values.min() > 0.3


# ---- training ----------------------------------------------------------------------------------------------------


def test_schedule_ends_by_steps_or_by_time_and_steps_or_by_passes() -> None:
    fixed = training.Schedule(seconds=1, minimum_steps=100, steps=4)
    assert [fixed.progress(1000.0, step, 9.0) for step in (1, 4, 5)] == [0.25, 1.0, 1.0]
    timed = training.Schedule(seconds=10, minimum_steps=4)
    assert timed.progress(5.0, 100, 0.1) == 0.5
    assert timed.progress(100.0, 2, 0.1) == 0.5
    assert timed.progress(10.0, 4, 0.1) == 1.0
    assert timed.progress(1.0, 1, timed.passes / 2) == 0.5
    assert timed.progress(1.0, 1, timed.passes + 1) == 1.0


def test_training_learns_and_reports_every_step() -> None:
    corpus = text.Text("a line", np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 300, np.uint8))
    schedule = training.Schedule(seconds=1, minimum_steps=1, steps=30, evaluations=3, windows=2)
    steps = list(training.train(Model(TINY), corpus, context=128, schedule=schedule))
    assert [step.step for step in steps] == list(range(31))
    assert [step.step for step in steps if step.held_out_bits is not None] == [0, 10, 20, 30]
    assert steps[0].held_out_bits == pytest.approx(8.0, rel=1e-6)
    assert steps[-1].held_out_bits is not None
    assert steps[-1].held_out_bits < text.order_0_entropy(corpus.data)


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracing", [False, True])
def test_peak_memory_of_known_allocations(tracing: bool) -> None:
    if tracing:
        tracemalloc.start()
    try:
        kept = np.zeros(2**20, np.uint8)
        peak, seconds = memory.peak_memory(np, lambda: [np.zeros(3 * 2**20, np.uint8).sum(), kept.copy().sum()])
        assert tracemalloc.is_tracing() == tracing
    finally:
        tracemalloc.stop()
    assert 3 * 2**20 <= peak < 3.1 * 2**20
    assert seconds > 0


class FakePools(LikeCupy):
    """CuPy's memory as far as it is measured: a pool holds what was asked of it, and calls are counted."""

    def __init__(self) -> None:
        self.cuda, self.calls, self.held = self, 0, 0

    def MemoryPool(self) -> FakePools:
        self.held = 0
        return self

    get_default_memory_pool = get_current_stream = lambda self: self

    @contextlib.contextmanager
    def using_allocator(self, malloc: Any) -> Iterator[None]:
        self.malloc_in_use = malloc
        yield
        self.malloc_in_use = None

    def malloc(self, size: int) -> None:
        self.held = max(self.held, size)

    def total_bytes(self) -> int:
        return self.held

    def free_all_blocks(self) -> None:
        self.held = 0

    def synchronize(self) -> None:
        pass


def test_peak_memory_of_a_pool_counts_a_call_that_compiles_nothing() -> None:
    xp, calls = FakePools(), []

    def function() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.2 if len(calls) == 1 else 0.01)
        xp.malloc_in_use(1234)

    peak, seconds = memory.peak_memory(xp, function)
    assert (peak, len(calls), xp.held) == (1234, 2, 0)
    assert 0.01 <= seconds < 0.2


def test_time_on_a_gpu_is_that_of_both_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_memory", lambda xp, function: (1, 1.0))
    plan = dataclasses.replace(SWEEP, cuflash_seconds=9.9)
    points = memory.sweep(plan, FakePools(), budget_bytes=0)
    assert [(p.length, p.seconds) for p in points if p.name == "cuflash"] == [(128, 1.0)]


def test_inputs_of_a_longer_sequence_repeat_the_shortest() -> None:
    for x in memory._inputs(SWEEP, 512, np):
        assert x.shape == (1, 512, 1, 16)
        np.testing.assert_array_equal(x[:, :128], x[:, 384:])
        assert np.unique(x).size == 128 * 16


def test_memory_of_standard_attention_is_as_estimated_and_that_of_cuflash_is_linear() -> None:
    points = list(memory.sweep(dataclasses.replace(SWEEP, heads=2, first_length=1024, last_length=2048)))
    assert [(p.length, p.name) for p in points] == list(itertools.product((1024, 2048), ("cuflash", "standard")))
    peaks = {(point.name, point.length): point.peak_bytes or 0 for point in points}
    for length in (1024, 2048):
        assert peaks["standard", length] == pytest.approx(standard.peak_bytes(1, 2, length, 16, 4), rel=0.1)
    assert peaks["cuflash", 2048] < 2.2 * peaks["cuflash", 1024]
    assert peaks["cuflash", 2048] < peaks["standard", 2048] / 5


def test_sweep_marks_what_does_not_fit() -> None:
    budget = standard.peak_bytes(1, 1, 256, 16, 4)
    points = [point for point in memory.sweep(SWEEP, budget_bytes=budget) if point.name == "standard"]
    assert [point.peak_bytes is not None for point in points] == [True, True, False, False]
    assert points[2].missing == "does not fit in 0.0 GiB"
    assert points[2].estimated_bytes == standard.peak_bytes(1, 1, 512, 16, 4)


def test_sweep_stops_by_the_time_it_foresees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_memory", lambda xp, function: (1, 1.0))
    plan = memory.Sweep(
        heads=1, head_dim=8, dtype="float32", first_length=8, last_length=64, cuflash_seconds=9, standard_seconds=4
    )
    points = [(p.name, p.length, p.missing) for p in memory.sweep(plan)]
    assert points == [
        ("cuflash", 8, None),
        ("standard", 8, None),
        ("cuflash", 16, None),
        ("standard", 16, "too long, about 4 s"),
        ("cuflash", 32, None),
        ("standard", 32, "too long, about 16 s"),
        ("cuflash", 64, None),
        ("standard", 64, "too long, about 64 s"),
    ]
    shorter = dataclasses.replace(plan, cuflash_seconds=6)
    assert [p.length for p in memory.sweep(shorter) if p.name == "cuflash"] == [8, 16, 32]


def test_sweep_survives_an_allocation_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(inputs: Any, xp: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(memory, "_run_standard", no_memory)
    assert {p.missing for p in memory.sweep(SWEEP) if p.name == "standard"} == {"does not fit"}
    monkeypatch.setattr(memory, "_run_cuflash", no_memory)
    assert [(p.name, p.length) for p in memory.sweep(SWEEP)] == [("cuflash", 128), ("standard", 128)]


# ---- exactness ---------------------------------------------------------------------------------------------------


def test_exactness_passes_and_a_wrong_result_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = exactness.check(length=70)
    assert [(row.dtype, row.result) for row in rows] == list(
        itertools.product(exactness.DTYPES, ("out", "dq", "dk", "dv"))
    )
    assert all(row.passed for row in rows)

    backward = exactness.cuflash.flash_attention_backward

    def wrong(*arguments: Any, **options: Any) -> Any:
        dq, dk, dv = backward(*arguments, **options)
        dk[0, 3, 1, 5] = np.nan
        dv[0, 3, 1, 5] += 1
        return dq, dk, dv

    monkeypatch.setattr(exactness.cuflash, "flash_attention_backward", wrong)
    assert {row.result: row.passed for row in exactness.check(dtypes=("float32",), length=70)} == {
        "out": True,
        "dq": True,
        "dk": False,
        "dv": False,
    }


def test_exactness_of_what_a_device_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknowing(LikeCupy):
        def asarray(self, x: np.ndarray) -> np.ndarray:
            if x.dtype.name == "bfloat16":
                raise ValueError("Unsupported dtype bfloat16")
            return x

    rows, unsupported = exactness.check_served(Unknowing(), exactness.GPU_DTYPES, length=70)
    assert list(dict.fromkeys(row.dtype for row in rows)) == ["float32", "float16"]
    assert unsupported == {"bfloat16": "like_cupy 1.0 knows no bfloat16 (Unsupported dtype bfloat16)"}


# ---- the whole ---------------------------------------------------------------------------------------------------


def test_quick_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--device", "cpu", "--output", str(tmp_path / "new" / "folder")]) == 0
    found = read_report(tmp_path / "new" / "folder")
    assert found["status"] == "complete"
    assert found["checks"] == {"exact": True, "below_order_0": True}
    assert {"python", "cuflash", "numpy"} <= found["versions"].keys()
    assert found["machine"]["device"] == "cpu"
    assert len(found["exactness"]) == 16
    measured = {point["name"] for point in found["memory"]["points"] if point["peak_bytes"]}
    assert measured == {"cuflash", "standard"}
    learned = found["training"]
    assert learned["context"] == 2048
    assert learned["held_out"][0] == {"step": 0, "bits_per_byte": pytest.approx(8.0, rel=1e-4)}
    assert learned["held_out"][-1]["step"] == learned["steps"] == len(learned["train"])
    assert learned["bits_after"] == learned["held_out"][-1]["bits_per_byte"] < learned["order_0_bits"]
    printed = capsys.readouterr().out
    assert f"{learned['bits_after']:.2f}" in printed
    assert "report.json" in printed


@pytest.mark.parametrize("quick", [False, True])
def test_the_job_on_a_gpu_is_long_and_its_model_trains(quick: bool) -> None:
    size = job.size(job.Settings(quick=quick), LikeCupy())
    assert size.context == 65_536
    assert job.size(job.Settings(context=512), LikeCupy()).context == 512
    text.check_length(text.load(), size.context)
    assert standard.peak_bytes(1, size.sweep.heads, 65_536, size.sweep.head_dim, 2) > 141e9  # more than a GPU has
    held_out = training._held_out_windows(Model(size.model), text.load(), size.context, size.schedule.windows)
    assert [window.shape for window in held_out] == [(1, len(text.load().held_out))]
    small = dataclasses.replace(size.model, dim=32, hidden=32)
    schedule = training.Schedule(seconds=1, minimum_steps=1, steps=4, evaluations=1)
    *_, last = training.train(Model(small), text.load(), context=256, schedule=schedule)
    assert last.held_out_bits is not None
    assert last.held_out_bits < 7.5


def test_held_out_windows_of_the_full_job_are_eight_that_do_not_overlap() -> None:
    size = job.size(job.Settings(), np)
    windows = training._held_out_windows(Model(TINY), text.load(), size.context, size.schedule.windows)
    assert [window.shape for window in windows] == [(1, size.context + 1)] * 8
    assert not any(np.shares_memory(*pair) for pair in itertools.combinations(windows, 2))


def test_demo_says_why_it_does_not_compute_on_a_gpu(
    small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "gpu_obstacle", lambda: "CuPy is [not] installed")
    for device in ("auto", "cpu"):
        main(["demo", "--device", device, "--output", str(tmp_path)])
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith("on ")
        assert ("CuPy is [not] installed" in first) == (device == "auto")


def test_a_dtype_that_is_not_served_is_named_and_no_failure(
    small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = exactness.check

    def turing(xp: Any, dtypes: tuple[str, ...], length: int) -> list[exactness.Row]:
        if dtypes == ("bfloat16",):
            raise UnsupportedError("its tensor cores know float16")
        return check(xp, dtypes, 64)

    monkeypatch.setattr(exactness, "check", turing)
    main(["demo", "--device", "cpu", "--output", str(tmp_path)])
    assert read_report(tmp_path)["checks"]["exact"] is True
    assert "no bfloat16: its tensor cores know float16" in capsys.readouterr().out


def test_demo_on_a_text_of_the_user(small: job.Size, tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_bytes("Ein Männlein steht im Walde, ganz still und stumm.\n".encode() * 400)
    code = main(["demo", "--device", "cpu", "--text", str(path), "--output", str(tmp_path / "out")])
    found = read_report(tmp_path / "out")
    assert found["training"]["text"] == "poem.txt"
    assert found["training"]["bytes"] == path.stat().st_size
    assert found["training"]["steps"] == small.schedule.steps
    assert code == (0 if all(found["checks"].values()) else 1)


def test_a_failed_check_is_exit_code_1(small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = exactness.Row("float32", "dq", error=math.nan, naive_error=1e-7, allowed=3e-7)
    monkeypatch.setattr(exactness, "check", lambda *arguments: [wrong])
    assert job.run(job.Settings(device="cpu", output=str(tmp_path))) == 1
    found = read_report(tmp_path)
    assert found["status"] == "complete"
    assert found["checks"]["exact"] is False


def test_ctrl_c_while_training_keeps_what_was_measured(
    small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = training.train

    def interrupted(*arguments: Any, **options: Any) -> Iterator[training.Step]:
        yield from itertools.islice(train(*arguments, **options), 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert main(["demo", "--device", "cpu", "--output", str(tmp_path)]) == 130
    found = read_report(tmp_path)
    assert found["status"] == "interrupted"
    assert len(found["memory"]["points"]) == 8
    assert [point["step"] for point in found["training"]["train"]] == [1, 2, 3]
    assert "interrupted" in capsys.readouterr().out


def test_ctrl_c_while_measuring_memory_shows_what_was_measured(
    small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> Iterator[memory.Point]:
        yield memory.Point(name="cuflash", length=1024, peak_bytes=5 * 2**20, seconds=0.25)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "sweep", interrupted)
    assert main(["demo", "--device", "cpu", "--output", str(tmp_path)]) == 130
    found = read_report(tmp_path)
    assert [point["length"] for point in found["memory"]["points"]] == [1024]
    assert "training" not in found
    assert "5.0 MiB" in capsys.readouterr().out


def test_a_real_ctrl_c_leaves_a_clean_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cuflash.cli", "demo", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    # A background job of a shell ignores the signal, and so would its child; a handler of ours leaves it the default.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = subprocess.Popen(command, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, ours)
    with started as process:
        assert process.stdout is not None
        before = list(itertools.takewhile(lambda line: "Memory" not in line, process.stdout))
        process.send_signal(signal.SIGINT)
        after, errors = process.communicate(timeout=60)
    assert (errors, process.returncode) == ("", 130)
    assert "interrupted" in after
    printed = "".join(before) + after
    assert printed.rfind("\x1b[?25h") >= printed.rfind("\x1b[?25l")  # the cursor, hidden by a spinner, is back
    found = read_report(tmp_path)
    assert found["status"] == "interrupted"
    assert found["checks"] == {"exact": True}


def test_an_interrupt_of_a_spinner_that_starts(
    small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives: list[Live] = []
    start = Live.start

    def interrupted(live: Live, refresh: bool = False) -> None:
        start(live, refresh)
        lives.append(live)
        raise KeyboardInterrupt

    monkeypatch.setattr(Live, "start", interrupted)
    assert main(["demo", "--device", "cpu", "--output", str(tmp_path)]) == 130
    assert [live.is_started for live in lives] == [False]


def test_an_interrupt_while_a_spinner_is_put_up(
    small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_cursor = Console.show_cursor

    def interrupted(console: Console, show: bool = True) -> bool:
        if not show:
            signal.raise_signal(signal.SIGINT)
        return show_cursor(console, show)

    monkeypatch.setattr(Console, "show_cursor", interrupted)
    assert main(["demo", "--device", "cpu", "--output", str(tmp_path)]) == 130
    assert read_report(tmp_path)["status"] == "interrupted"
    assert "interrupted" in capsys.readouterr().out


def test_an_error_on_the_way_still_leaves_a_report(
    small: job.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **options: Any) -> Iterator[training.Step]:
        raise UnsupportedError("no such kernel")

    monkeypatch.setattr(training, "train", broken)
    assert main(["demo", "--device", "cpu", "--output", str(tmp_path)]) == 2
    assert read_report(tmp_path)["status"] == "failed"
    assert capsys.readouterr().err == "cuflash: error: no such kernel\n"


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_missing_extra_is_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=rf"{module}.*pip install 'cuflash\[demo\]'"):
        job.run(job.Settings(output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_picture_of_an_empty_report() -> None:
    left, right = report.picture({}).axes
    assert [axes.texts[0].get_text() for axes in (left, right)] == ["not measured", "not measured"]


@pytest.mark.parametrize(
    ("count", "shown"), [(512, "512 B"), (1536, "1.5 KiB"), (20 * 2**20, "20 MiB"), (3 * 2**40, "3072 GiB")]
)
def test_bytes_for_people(count: int, shown: str) -> None:
    assert report.format_bytes(count) == shown
