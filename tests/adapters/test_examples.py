"""The examples run, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_torch_module():
    pytest.importorskip("torch")
    assert main_of("torch_module.py")() > 0.9


def test_torch_llama():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    allowed = 0.02 if torch.cuda.is_available() else 1e-4  # bfloat16 or float32
    assert main_of("torch_llama.py")() < allowed
