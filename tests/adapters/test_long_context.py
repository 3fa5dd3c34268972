"""The long-context example in PyTorch: what saves memory changes no result, and a resumed run no bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from cuflash.adapters.torch import _call
from cuflash.demo import text
from examples.long_context import corpus
from examples.long_context.__main__ import main
from examples.long_context.model import Config, Model, rotated, rotation_table
from examples.long_context.training import Schedule, Trainer

CONFIG = Config(layers=2, width=32, heads=4, kv_heads=2, mlp_tile=24, loss_chunk=40)  # tiles that do not divide 96
SCHEDULE = Schedule(length=96, steps=8, rate=3e-3)
CPU = torch.device("cpu")


def trainer(**changes: Any) -> Trainer:
    return Trainer(replace(CONFIG, **changes), SCHEDULE, text.load(), CPU)


def loss_and_gradients(dtype: torch.dtype = torch.float64, **changes: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Model(replace(CONFIG, **changes)).to(dtype)
    tokens = torch.from_numpy(corpus.training_window(text.load(), 96, 0, 0).astype(np.int64))[None]
    loss = model(tokens)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    return [loss.detach(), *gradients]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "standard"])
def test_losses_do_not_depend_on_the_attention(attention: str):
    """Float32 rounding, which 8 steps of training let grow, is all that differs."""
    mine, theirs = ([step.bits for step in trainer(attention=name).steps()] for name in ("cuflash", attention))
    assert len(mine) == SCHEDULE.steps
    assert mine[-1] < mine[0] - 0.5
    np.testing.assert_allclose(mine, theirs, rtol=2e-5)


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


def kept_bytes(**changes: Any) -> int:
    """Bytes of the distinct storages that autograd holds after a forward, parameters left out."""
    torch.manual_seed(0)
    model = Model(replace(CONFIG, **changes))
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens = torch.from_numpy(corpus.training_window(text.load(), 2048, 0, 0).astype(np.int64))[None]
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in known:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens)
    del loss
    return sum(storages.values())


def test_checkpoints_and_chunks_keep_less():
    """Without checkpoints a layer keeps many times what it keeps with them; the whole loss keeps its logits."""
    assert kept_bytes(checkpoint="none", mlp_tile=0) > 3 * kept_bytes(checkpoint="none")
    logits = 2048 * 256 * 4
    assert kept_bytes(checkpoint="none", mlp_tile=0, loss_chunk=0) - kept_bytes(checkpoint="none", mlp_tile=0) > logits


def test_tiles_and_checkpoints_under_bfloat16_autocast():
    """What a GPU does: the weights' casts of a tile computed again match those of the first time."""
    torch.manual_seed(0)
    found = []
    for changes in ({}, {"mlp_tile": 0, "loss_chunk": 0, "checkpoint": "none"}):
        torch.manual_seed(0)
        model = Model(replace(CONFIG, **changes))
        tokens = torch.from_numpy(corpus.training_window(text.load(), 96, 0, 0).astype(np.int64))[None]
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = model(tokens)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for tiled, whole in zip(*found, strict=True):  # a tile's gradients are rounded to bfloat16 before they are added
        assert (tiled - whole).norm() <= 2e-2 * whole.norm()


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    q, k = (rotated(x.float().expand(1, 64, 1, 16), rotation_table(64, 16, CPU))[0, :, 0] for x in (q, k))
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
