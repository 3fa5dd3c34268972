"""The command line: exit codes, errors on one line, `doctor` and `bench`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import cli
from cuflash.demo import bench, doctor, exactness, machine
from cuflash.demo.doctor import Finding


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command which cannot run leaves on stderr, and nothing else anywhere."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cuflash: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["demo", "--context", "-5"], "-5"),
        (["demo", "--context", "many"], "many"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--device", "abacus"], "abacus"),
        (["doctor", "--loud"], "--loud"),
        (["bench", "--lengths", "128", "1.5"], "1.5"),
        (["bench", "--repeats"], "--repeats"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in error_of(arguments, capsys)


def test_texts_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_bytes(b"too short")
    arguments = ["demo", "--device", "cpu", "--output", str(tmp_path / "out"), "--text"]
    assert "No such file" in error_of([*arguments, str(tmp_path / "nowhere.txt")], capsys)
    assert str(tmp_path) in error_of([*arguments, str(tmp_path)], capsys)
    message = error_of([*arguments, str(short)], capsys)
    assert "short.txt has 9 bytes" in message
    assert "10,240" in message
    short.write_bytes(b"0123456789" * 2_000)
    assert "200,002" in error_of([*arguments, str(short), "--context", "100000"], capsys)
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert "taken" in error_of(["demo", "--device", "cpu", "--output", str(tmp_path / "taken")], capsys)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_gpu_that_is_not_there(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "gpu_obstacle", lambda: "there is none")
    assert "there is none" in error_of([command, "--device", "gpu"], capsys)
    assert machine.array_module("auto") is np


def test_errors_of_several_lines_become_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> int:
        raise cuflash.UnsupportedError("one\n  two\nthree")

    monkeypatch.setattr(doctor, "run", broken)
    assert error_of(["doctor"], capsys) == "cuflash: error: one two three\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "cuflash: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"], ["bench", "--help"]])
def test_help_and_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "cuflash" in capsys.readouterr().out


def test_importing_cuflash_loads_nothing_of_the_demo() -> None:
    code = (
        "import sys, cuflash.cli; print([m for m in sys.modules if m.split('.')[0] in ('rich', 'matplotlib', 'cupy')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"


def test_one_blas_thread_is_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [3]
    functions = (lambda: threads[0], lambda number: threads.__setitem__(0, number))
    monkeypatch.setattr(machine, "_openblas_threads", lambda: functions)
    seen = []

    def interrupted() -> None:
        with machine.one_blas_thread() as possible:
            seen.append((possible, *threads))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == [(True, 1)]
    assert threads == [3]
    monkeypatch.setattr(machine, "_openblas_threads", lambda: None)
    with machine.one_blas_thread() as possible:
        assert not possible


def test_openblas_of_this_numpy_is_found() -> None:
    functions = machine._openblas_threads()
    assert (functions is not None) == ("openblas" in machine.blas())
    if functions is not None:
        assert functions[0]() >= 1


# ---- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cuflash {cuflash.__version__}"
    assert [line.split("  ")[1] for line in lines[1:-1]] == list(doctor.CHECKS)
    assert lines[-1] == "healthy"
    assert np.__version__ in "".join(lines)


def test_doctor_without_anything_optional(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not installed") == 6  # CuPy, GPU, NVRTC, and the arrays of CuPy, torch and JAX


def test_doctor_reports_what_breaks_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Finding:
        raise RuntimeError("driver\nfell over")

    monkeypatch.setattr(doctor, "CHECKS", {"GPU": broken, "Python": doctor.python})
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "! GPU     RuntimeError: driver fell over"
    assert lines[2].startswith("  Python  3.")
    assert lines[-1] == "not healthy: GPU"


def test_doctor_fails_when_results_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = exactness.Row("float32", "dq", error=1.0, naive_error=1e-7, allowed=3e-7)
    monkeypatch.setattr(exactness, "check", lambda *arguments, **options: [wrong])
    assert cli.main(["doctor"]) == 1
    assert "not healthy: exactness, CPU" in capsys.readouterr().out


# ---- bench -------------------------------------------------------------------------------------------------------


def test_bench_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    arguments = ["bench", "--device", "cpu", "--lengths", "64", "128", "--heads", "2", "--head-dim", "16"]
    assert cli.main([*arguments, "--repeats", "3", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [row["length"] for row in found["rows"]] == [64, 128]
    assert all(value > 0 for row in found["rows"] for value in row.values())
    assert found["settings"]["repeats"] == 3
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-2:]] == ["64", "128"]
    assert f"{found['rows'][0]['cuflash_forward'] * 1e3:.2f}" in printed[-2]


def test_bench_times_nothing_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = cuflash.flash_attention

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = forward(*arguments, **options)
        return result if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(cuflash, "flash_attention", wrong)
    path = tmp_path / "bench.json"
    assert bench.run(bench.Settings(lengths=(64,), device="cpu", json=str(path))) == 1
    assert "out differs" in capsys.readouterr().out
    assert not path.exists()
