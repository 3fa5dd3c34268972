"""The long-context example in PyTorch: what saves memory changes no result, and a resumed run no bit."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash.demo import text

torch = pytest.importorskip("torch")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
_call = pytest.importorskip("cuflash.adapters.torch._call")
corpus = pytest.importorskip("examples.long_context.corpus")
models = pytest.importorskip("examples.long_context.model")
training = pytest.importorskip("examples.long_context.training")
main = pytest.importorskip("examples.long_context.__main__").main

CONFIG = models.Config(
    layers=2, width=32, heads=4, kv_heads=2, mlp_tile=24, loss_chunk=40
)  # tiles that do not divide 96
SCHEDULE = training.Schedule(length=96, steps=8, rate=3e-3)
CPU = torch.device("cpu")


def trainer(**changes: Any) -> Any:
    return training.Trainer(replace(CONFIG, **changes), SCHEDULE, text.load(), CPU)


def tokens(length: int) -> torch.Tensor:
    return torch.from_numpy(corpus.training_window(text.load(), length, 0, 0).astype(np.int64))[None]


def loss_and_gradients(dtype: torch.dtype = torch.float64, **changes: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = models.Model(replace(CONFIG, **changes)).to(dtype)
    loss = model(tokens(96))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    return [loss.detach(), *gradients]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def curve(attention: str, dtype: torch.dtype, steps: int) -> list[float]:
    """Losses of steps that are large enough for attention to matter."""
    schedule = replace(SCHEDULE, steps=40, rate=2e-2)
    trainer = training.Trainer(replace(CONFIG, attention=attention), schedule, text.load(), CPU)
    trainer.model.to(dtype)
    return [step.bits for step in itertools.islice(trainer.steps(), steps)]


@pytest.mark.parametrize(
    ("dtype", "steps", "rounding"), [(torch.float64, 30, 1e-9), (torch.float32, 12, 1e-5)], ids=["float64", "float32"]
)
def test_losses_do_not_depend_on_the_attention(
    dtype: torch.dtype, steps: int, rounding: float, monkeypatch: pytest.MonkeyPatch
):
    """Rounding, which the steps let grow, is all that differs; another attention is another curve."""
    mine = curve("cuflash", dtype, steps)
    assert mine[-1] < mine[0] - 2
    for attention in ("sdpa", "standard"):
        np.testing.assert_allclose(curve(attention, dtype, steps), mine, rtol=rounding)
    monkeypatch.setitem(models.ATTENTIONS, "cuflash", lambda q, k, v: q)
    assert np.abs(np.subtract(curve("cuflash", dtype, steps), mine)).max() > 100 * rounding


@pytest.mark.parametrize("chunk", [0, 1, 32, 1000])
def test_chunked_loss_is_the_whole(chunk: int):
    assert_same(loss_and_gradients(loss_chunk=chunk), loss_and_gradients(loss_chunk=0), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tile", [1, 32, 1000])
@pytest.mark.parametrize("checkpoint", ["selective", "none"])
def test_tiled_mlp_is_the_plain_one(tile: int, checkpoint: str):
    whole = loss_and_gradients(mlp_tile=0, checkpoint="none")
    assert_same(loss_and_gradients(mlp_tile=tile, checkpoint=checkpoint), whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("attention", ["cuflash", "sdpa", "standard"])
@pytest.mark.parametrize("checkpoint", ["selective", "full"])
def test_checkpoints_change_no_gradient(attention: str, checkpoint: str):
    actual = loss_and_gradients(attention=attention, checkpoint=checkpoint)
    assert_same(actual, loss_and_gradients(attention=attention, checkpoint="none"), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("checkpoint", "forwards"), [("selective", 1), ("full", 2), ("none", 1)])
def test_attention_runs_forward_once_a_layer_and_step(checkpoint: str, forwards: int, monkeypatch: pytest.MonkeyPatch):
    calls = {"forward": 0, "backward": 0}
    for name in calls:
        function = getattr(_call, name)

        def counted(*arguments: Any, name: str = name, function: Any = function, **more: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **more)

        monkeypatch.setattr(_call, name, counted)
    loss_and_gradients(checkpoint=checkpoint)
    assert calls == {"forward": forwards * CONFIG.layers, "backward": CONFIG.layers}


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and their peak; parameters left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(results):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()).data_ptr() not in self.parameters:
                reference = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, self.alive())
        return results

    def alive(self) -> int:
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        return sum(size for _, size in self.storages.values())


def bytes_of_a_step(length: int = 512, **changes: Any) -> tuple[int, int]:
    """What is alive between forward and backward, and at the peak of the two."""
    torch.manual_seed(0)
    model, text_ = models.Model(replace(CONFIG, **changes)), tokens(length)
    with Watch(model) as watch:
        loss = model(text_)
        kept = watch.alive()
        loss.backward()
    return kept, watch.peak


def per_layer_and_token(**changes: Any) -> float:
    two, four = (bytes_of_a_step(layers=layers, **changes)[0] for layers in (2, 4))
    return (four - two) / 2 / 512


FLOAT = 4  # bytes; on a GPU out is bfloat16, and has two


def test_a_layer_keeps_what_the_document_says():
    """docs/long_context.md: x twice in float32, out, and LSE; without a checkpoint every input of an operation."""
    width, heads = CONFIG.width, CONFIG.heads
    assert per_layer_and_token(mlp_tile=32) == 2 * FLOAT * width + FLOAT * width + FLOAT * heads
    assert per_layer_and_token(checkpoint="full", mlp_tile=32) == 2 * FLOAT * width
    assert per_layer_and_token(checkpoint="none", mlp_tile=0) > 15 * FLOAT * width


@pytest.mark.parametrize(
    ("saving", "without", "at_least"),
    [
        ({"checkpoint": "selective"}, {"checkpoint": "none", "mlp_tile": 0}, 2 * 10 * 512 * 32 * FLOAT),
        ({"mlp_tile": 32}, {"mlp_tile": 0}, 4 * 480 * 32 * FLOAT),  # up(x), but for one tile
        ({"loss_chunk": 32}, {"loss_chunk": 0}, 480 * 256 * FLOAT),  # the logits, but for one chunk
    ],
)
def test_every_measure_lowers_the_peak(saving: dict[str, Any], without: dict[str, Any], at_least: int):
    common = {"layers": 4, "mlp_tile": 32, "loss_chunk": 32}
    peaks = [bytes_of_a_step(**{**common, **changes})[1] for changes in (saving, without)]
    assert peaks[1] - peaks[0] > at_least


def test_tiles_and_checkpoints_under_bfloat16_autocast():
    """What a GPU does: the weights' casts of a tile computed again match those of the first time."""
    found = []
    for changes in ({}, {"mlp_tile": 0, "loss_chunk": 0, "checkpoint": "none"}):
        torch.manual_seed(0)
        model = models.Model(replace(CONFIG, **changes))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = model(tokens(96))
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for tiled, whole in zip(*found, strict=True):  # a tile's gradients are rounded to bfloat16 before they are added
        assert (tiled - whole).norm() <= 2e-2 * whole.norm()


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    q, k = (models.rotated(x.float().expand(1, 64, 1, 16), models.rotation_table(64, 16, CPU))[0, :, 0] for x in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path):
    whole = [step.bits for step in trainer().steps()]
    first = trainer()
    for step in first.steps():
        if step.number == 3:
            break
    first.save(tmp_path / "checkpoint.pt")
    second = trainer()
    second.resume(tmp_path / "checkpoint.pt")
    rest = list(second.steps())
    assert [step.number for step in rest] == [4, 5, 6, 7, 8]
    assert second.losses == whole
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_resuming_with_other_settings_names_the_setting(tmp_path: Path):
    trainer().save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="width: got 64; allowed: 32"):
        trainer(width=64).resume(tmp_path / "checkpoint.pt")


SMALL = ["--device", "cpu", "--length", "128", "--width", "32", "--layers", "1"]


def test_command_trains_resumes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = [*SMALL, "--steps", "6", "--save-every", "2", "--output"]
    assert main([*output, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "no GPU: a reduced form" in printed or torch.cuda.is_available()
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["status"] == "complete"
    assert len(report["losses"]) == len(report["step_seconds"]) == 6
    assert report["entropies"] == sorted(report["entropies"], reverse=True)
    assert report["held_out_bits"] < 8
    assert report["tokens_per_second"] > 0
    assert report["peak_bytes"] > 2**20
    assert (tmp_path / "a" / "report.png").read_bytes().startswith(b"\x89PNG")

    assert main([*output, str(tmp_path / "a"), "--resume"]) == 0  # nothing is left to do
    again = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (again["losses"], again["resumed_at"]) == (report["losses"], 6)

    compared = ["--attention", "sdpa", "--compare", str(tmp_path / "a" / "report.json")]
    assert main([*output, str(tmp_path / "b"), *compared]) == 0
    (difference,) = (
        float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines() if "largest difference" in line
    )
    assert difference < 1e-4


def test_command_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    short = tmp_path / "short.txt"
    short.write_bytes(bytes(range(256)) * 4)
    arguments = ["--smoke", "--text", str(short), "--output", str(tmp_path / "run")]
    assert main([*SMALL, *arguments, "--length", "2000"]) == 0
    assert "the text is repeated to fill 2,000 tokens" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["status"], report["losses"]) == ("complete", [])
    assert 7.5 < report["smoke_bits"] < 8.5
    assert math.isfinite(report["gradient_norm"])
    assert report["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "1"], "length: got 1; allowed: 2 to"),
        (["--length", "9999999"], "length: got 9,999,999; allowed: 2 to"),
        (["--smoke", "--length", "1"], "length: got 1; allowed: 2 or more"),
        (["--kv-heads", "3"], "kv_heads: got 3; allowed: a divisor of heads, 4"),
        (["--width", "30"], "width: got 30; allowed: a multiple of 2 * heads, 8"),
        (["--layers", "0"], "layers: got 0; allowed: 1 or more"),
        (["--mlp-tile", "-1"], "mlp_tile: got -1; allowed: tokens, or 0"),
        (["--steps", "0"], "steps: got 0; allowed: 1 or more"),
        (["--rate", "0"], "rate: got 0.0; allowed: a positive number"),
        (["--seed", "-1"], "seed: got -1; allowed: 0 or more"),
        (["--save-every", "0"], "save-every: got 0; allowed: 1 or more"),
        (["--resume"], "checkpoint.pt"),
        (["--compare", "pyproject.toml"], "compare: got pyproject.toml; allowed: the report.json of another run"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--output", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().out
