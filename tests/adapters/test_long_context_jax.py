"""The long-context example in JAX: what saves memory changes no result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash.demo import text

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
corpus = pytest.importorskip("examples.long_context.corpus")
example = pytest.importorskip("examples.long_context_jax")

SETTINGS = example.Settings(
    length=96, steps=10, rate=1e-2, layers=2, width=32, heads=4, kv_heads=2, mlp_tile=96, loss_chunk=96
)


def window() -> Any:
    return jax.numpy.asarray(corpus.training_window(text.load(), 96, 0, 0).astype(np.int32))


def loss_and_gradients(**changes: Any) -> list[np.ndarray]:
    settings = replace(SETTINGS, **changes)
    # Larger than the initial ones, so that every part has its say.
    parameters = jax.tree.map(lambda x: 4 * x, example.initial_parameters(settings))
    function = jax.jit(jax.value_and_grad(lambda x: example.loss_of(x, window(), settings)))
    return [np.asarray(x) for x in jax.tree.leaves(function(parameters))]


@pytest.mark.parametrize(
    "changes",
    [{"loss_chunk": 32}, {"mlp_tile": 24}, {"checkpoint": "full"}, {"checkpoint": "none"}, {"attention": "jax.nn"}],
    ids=str,
)
def test_saving_memory_changes_no_result(changes: dict[str, Any]):
    for actual, expected in zip(loss_and_gradients(**changes), loss_and_gradients(), strict=True):
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def forwards(jaxpr: Any) -> int:
    """Calls of the attention forward in a jaxpr, its loops counted once."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "cuflash_forward"
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += forwards(inner) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize(("checkpoint", "expected"), [("selective", 1), ("full", 2)])
def test_attention_runs_forward_once_a_layer(checkpoint: str, expected: int):
    """The layers are one loop forward and one backward, and only a full checkpoint attends in the second too."""
    settings = replace(SETTINGS, checkpoint=checkpoint)
    gradient = jax.grad(lambda x: example.loss_of(x, window(), settings))
    assert forwards(jax.make_jaxpr(gradient)(example.initial_parameters(settings)).jaxpr) == expected


def test_losses_do_not_depend_on_the_attention():
    mine, theirs = (
        [step.bits for step in example.steps(replace(SETTINGS, attention=name), text.load(), 0)]
        for name in ("cuflash", "jax.nn")
    )
    assert mine[-1] < mine[0] - 1
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@pytest.mark.parametrize("steps", ["1", "4"])
def test_command(steps: str, tmp_path: Path):
    arguments = ["--length", "128", "--mlp-tile", "64", "--loss-chunk", "64", "--output", str(tmp_path)]
    assert example.main([*arguments, "--steps", steps]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["status"], len(report["losses"])) == ("complete", int(steps))
    assert report["tokens_per_second"] > 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mlp-tile", "100"], "mlp_tile: got 100; allowed: a divisor of length, 512"),
        (["--length", "9999999", "--mlp-tile", "1", "--loss-chunk", "1"], "length: got 9,999,999; allowed: 2 to"),
        (["--kv-heads", "3"], "kv_heads: got 3; allowed: a divisor of heads, 4"),
        (["--width", "30"], "width: got 30; allowed: a multiple of 2 * heads, 8"),
        (["--steps", "0"], "steps: got 0; allowed: 1 or more"),
        (["--seed", "-1"], "seed: got -1; allowed: 0 or more"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert example.main(["--output", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
