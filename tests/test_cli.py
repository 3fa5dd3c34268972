"""The command line: exit codes, errors on one line, `doctor` and `compile`."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import cli
from cuflash.cuda import cache, jit, toolchain
from cuflash.cuda.precompile import Job, Precompiled, jobs_of
from cuflash.cuda.toolchain import Target
from cuflash.demo import compilation, doctor, driver, exactness, gpu, machine
from cuflash.demo.driver import Driver, Gpu
from cuflash.demo.finding import Finding
from cuflash.spec import Spec

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
H200, A10, T4, GTX = (
    Gpu("NVIDIA H200", (9, 0)),
    Gpu("NVIDIA A10", (8, 6)),
    Gpu("Tesla T4", (7, 5)),
    Gpu("NVIDIA GeForce GTX 1080", (6, 1)),
)


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
        (["compile", "--arch", "sm_13"], "sm_90a"),
        (["compile", "--dtype", "float64"], "bfloat16"),
        (["compile", "--head-dim", "64:"], "--head-dim"),
        (["compile", "--head-dim", "0:64"], "--head-dim"),
        (["compile", "--workers", "0"], "--workers"),
        (["bench", "--suite", "everything"], "paper"),
        (["bench", "--suite"], "--suite"),
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


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"], ["compile", "--help"]])
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


# ---- what the machine offers ---------------------------------------------------------------------------------------


def fake_driver(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, cuda: tuple[int, int] = (13, 0)) -> None:
    """A machine with these GPUs, where the doctor and `cuflash compile` ask for them."""
    found = Driver("580.65.06", cuda, gpus) if gpus else None
    monkeypatch.setattr(gpu, "driver", lambda: found)
    monkeypatch.setattr(compilation, "driver", lambda: found)


class FakeLibrary:
    """libcuda and libnvidia-ml of a machine with an H200 and an A10; `failing` are functions that give an error."""

    def __init__(self, **failing: int) -> None:
        self.failing = failing

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name in self.failing:
                return self.failing[name]
            texts = {"cuDeviceGetName": ("NVIDIA H200", "NVIDIA A10"), "nvmlSystemGetDriverVersion": ("580.65.06",)}
            if name in texts:
                buffer, *_, last = arguments
                buffer.value = texts[name][last if name == "cuDeviceGetName" else 0].encode()
            elif name in ("cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute"):
                known = {"cuDriverGetVersion": 12_080, "cuDeviceGetCount": 2, "cuDeviceGet": arguments[-1]}
                attributes = {(75, 0): 9, (76, 0): 0, (75, 1): 8, (76, 1): 6}
                value = known.get(name, attributes.get(arguments[1:]))
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = value
            return 0

        call.__name__ = name
        return call


def test_the_driver_names_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_library", lambda linux, windows: FakeLibrary())
    assert driver.driver() == Driver("580.65.06", (12, 8), (H200, A10))


def test_a_driver_that_says_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_cuda(**failing: int) -> None:
        libraries = {"libcuda.so.1": FakeLibrary(**failing)}
        monkeypatch.setattr(driver, "_library", lambda linux, windows: libraries.get(linux))

    only_cuda()
    assert driver.driver() == Driver("", (12, 8), (H200, A10))
    only_cuda(cuInit=100)
    assert driver.driver() is None
    only_cuda(cuInit=803)
    with pytest.raises(RuntimeError, match="cuInit gives error 803"):
        driver.driver()
    only_cuda(cuDeviceGet=101)
    with pytest.raises(RuntimeError, match="cuDeviceGet gives error 101"):
        driver.driver()
    monkeypatch.setattr(driver, "_library", lambda linux, windows: None)
    assert driver.driver() is None


def test_a_library_that_is_not_there() -> None:
    assert driver._library("libnothing-of-the-kind.so.9", "nothing-of-the-kind.dll") is None


def test_products_need_cublas() -> None:
    def without(*_: Any) -> Any:
        raise ImportError('Failure finding "libcublasLt.so.13": No such file')

    cupy = SimpleNamespace(zeros=np.zeros, float32=np.float32, matmul=np.matmul)
    machine.require_products(np)
    machine.require_products(cupy)
    cupy.matmul = without
    with pytest.raises(cuflash.UnsupportedError, match=r"libcublasLt.*pip install nvidia-cublas.*--device cpu"):
        machine.require_products(cupy)


@pytest.mark.parametrize(
    ("available", "said"),
    [
        (lambda: False, "no GPU or no driver"),
        (lambda: (_ for _ in ()).throw(RuntimeError("cudaErrorInsufficientDriver")), "no GPU or no driver"),
        (lambda: True, "cuflash does not run on it (out of order)"),
    ],
)
def test_why_cuflash_does_not_run_on_a_gpu(
    available: Callable[[], bool], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of order")

    cupy = SimpleNamespace(cuda=SimpleNamespace(is_available=available), zeros=zeros, float16="float16")
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    assert said in machine.gpu_obstacle()


# ---- doctor ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where CuPy is not installed, and nothing is known yet of what it brings."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(toolchain, "toolchain", toolchain.toolchain.__wrapped__)


def doctors_lines(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, str]:
    """What the doctor prints for each check, by its name, after exiting with `code`; "! " marks the unhealthy."""
    assert cli.main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cuflash {cuflash.__version__}"
    assert lines[-1].startswith("not healthy: " if code else "healthy")
    width = max(map(len, doctor.CHECKS))
    found = {line[2 : 2 + width].rstrip(): line[:2].strip() + line[4 + width :] for line in lines[1:]}
    assert list(found)[: len(doctor.CHECKS)] == list(doctor.CHECKS)
    return {**found, "everything": "\n".join(lines)}


def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctors_lines(capsys, 0)
    assert np.__version__ in found["NumPy"]
    assert "largest error" in found["exactness, CPU"]


@pytest.mark.usefixtures("without_cupy")
def test_doctor_without_anything_optional(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_driver(monkeypatch)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = doctors_lines(capsys, 0)
    assert found["GPU"].startswith("none")
    assert found["CuPy"] == "not installed (optional: pip install 'cuflash[cuda13]')"
    for name in ("NVRTC", "CuPy arrays", "PyTorch tensors", "JAX arrays"):
        assert "install" in found[name]
    assert "forward_portable" not in found["everything"]


@pytest.mark.parametrize(("cuda", "extra"), [((13, 0), "cuflash[cuda13]"), ((12, 8), "cuflash[cuda12]")])
@pytest.mark.usefixtures("without_cupy")
def test_doctor_names_what_a_gpu_lacks(
    cuda: tuple[int, int], extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_driver(monkeypatch, H200, A10, cuda=cuda)
    found = doctors_lines(capsys, 1)
    assert found["GPU"] == "NVIDIA H200, compute capability 9.0; NVIDIA A10, compute capability 8.6"
    assert found["driver"] == f"580.65.06, runs CUDA {cuda[0]}.{cuda[1]} and older"
    assert found["CuPy"] == f"!not installed: pip install '{extra}'"
    assert found["NVRTC"].startswith("!")
    assert found["CuPy arrays"].startswith("!")
    assert found["code path"] == "sm_90a; sm_86"
    assert "largest error" in found["exactness, CPU"]


def test_doctor_names_what_a_compiler_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def without() -> Any:
        raise cuflash.UnsupportedError("the headers were not found: pip install 'cuflash[cuda13]'")

    monkeypatch.setattr(toolchain, "toolchain", without)
    fake_driver(monkeypatch, H200)
    assert gpu.nvrtc() == Finding("the headers were not found: pip install 'cuflash[cuda13]'", healthy=False)
    monkeypatch.setenv("CUFLASH_PRECOMPILED", str(tmp_path))  # then nothing has to be compiled
    assert gpu.nvrtc().healthy
    monkeypatch.delenv("CUFLASH_PRECOMPILED")
    fake_driver(monkeypatch)
    assert gpu.nvrtc().healthy


def test_doctor_of_a_cupy_that_does_not_reach_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    runtime = SimpleNamespace(runtimeGetVersion=lambda: 13_020, getDeviceCount=count)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), __version__="14.2.0")
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    fake_driver(monkeypatch, T4, cuda=(12, 4))
    assert gpu.cupy() == Finding(
        "14.2.0, for CUDA 13, which does not reach the GPU (cudaErrorInsufficientDriver): "
        "pip install 'cuflash[cuda12]'",
        healthy=False,
    )
    fake_driver(monkeypatch)
    assert gpu.cupy() == Finding("14.2.0, for CUDA 13")


@pytest.mark.usefixtures("without_cupy")
def test_a_gpu_that_is_too_old_is_not_held_against_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_driver(monkeypatch, GTX)
    found = doctors_lines(capsys, 0)
    assert "6.1" in found["code path"]
    assert "Turing" in found["code path"]


@pytest.mark.usefixtures("without_cupy")
def test_doctor_shows_the_kernel_and_tile_of_common_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUFLASH_FORCE_ARCH", raising=False)
    fake_driver(monkeypatch, H200, H200)
    (blank, title, *rows) = gpu.kernel_table()
    assert (blank, "sm_90a" in title) == ("", True)
    assert [row.split()[:2] for row in rows] == [
        [dtype, dim] for dtype in ("float16", "bfloat16", "float32") for dim in ("64", "128", "256")
    ]
    spec = Spec(dtype="float32", head_dim=256, head_dim_v=256, bounded_right=True)
    tile = cuflash.tuning.tile_of("backward_portable_dq", spec, 900, 16)
    assert rows[-1].endswith(f"backward_portable_dq {tile.rows}x{tile.cols}/{tile.stages}/{tile.warps}")
    assert all(row.split()[2].startswith("forward_") and row.count("forward_") == 1 for row in rows)
    for row, (dtype, dim) in zip(rows, gpu._TABLE, strict=True):
        spec = Spec(dtype=dtype, head_dim=dim, head_dim_v=dim, bounded_right=True)
        for backward, name, otherwise in (
            (False, "forward_hopper ", "forward_portable "),
            (True, "backward_hopper", "backward_portable "),
        ):
            hopper = cuflash.tuning.has_hopper(spec, backward=backward)
            assert [name in row, otherwise in row] == [hopper, not hopper]
    monkeypatch.setenv("CUFLASH_FORCE_ARCH", "sm_75")
    found = doctors_lines(capsys, 1)
    assert found["code path"] == "the sm_75 path in code for sm_90a (CUFLASH_FORCE_ARCH)"
    assert "bfloat16  64  none: q: got dtype bfloat16 on sm_75" in found["everything"]


@pytest.mark.parametrize(("forced", "named"), [("sm_1", "allowed are"), ("sm_120", "older code paths")])
@pytest.mark.usefixtures("without_cupy")
def test_doctor_reports_a_code_path_that_cannot_be(
    forced: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_driver(monkeypatch, H200)
    monkeypatch.setenv("CUFLASH_FORCE_ARCH", forced)
    found = doctors_lines(capsys, 1)
    assert found["code path"].startswith("!")
    assert named in found["code path"]


@pytest.mark.usefixtures("without_cupy")
def test_doctor_survives_a_driver_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise RuntimeError("cuInit gives error 803")

    monkeypatch.setattr(gpu, "driver", broken)
    found = doctors_lines(capsys, 1)
    assert found["GPU"] == "!RuntimeError: cuInit gives error 803"
    assert found["everything"].endswith("kernels")


def test_doctor_measures_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUFLASH_CACHE_MAX_MB", "20")
    assert gpu.kernel_cache() == Finding(f"{tmp_path / 'cache'}: 0 kernels, 0.0 MB, at most 20 MB")
    for key in "ab":
        cache.store(tmp_path / "cache", key, "13.5", b"x" * 600_000)
    assert gpu.kernel_cache() == Finding(f"{tmp_path / 'cache'}: 2 kernels, 1.2 MB, at most 20 MB")
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    fake_driver(monkeypatch, H200)
    assert "cannot be written" in gpu.kernel_cache().text
    assert not gpu.kernel_cache().healthy
    monkeypatch.delenv("CUFLASH_PRECOMPILED", raising=False)
    assert gpu.precompiled().healthy
    monkeypatch.setenv("CUFLASH_PRECOMPILED", str(tmp_path / "cache"))
    assert gpu.precompiled() == Finding(f"{tmp_path / 'cache'}: 2 kernels, 1.2 MB")
    monkeypatch.setenv("CUFLASH_PRECOMPILED", str(tmp_path / "nowhere"))
    assert not gpu.precompiled().healthy


def test_doctor_reports_what_breaks_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Finding:
        raise RuntimeError("driver\nfell over")

    fake_driver(monkeypatch)
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


def test_doctor_names_a_dtype_that_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    check = exactness.check

    def turing(xp: Any, dtypes: tuple[str, ...], length: int) -> list[exactness.Row]:
        if dtypes != ("float16",):
            raise cuflash.UnsupportedError("its tensor cores know float16")
        return check(xp, dtypes, length)

    monkeypatch.setattr(exactness, "check", turing)
    finding = doctor.exact_on_cpu()
    assert finding.healthy
    assert finding.text.endswith("; bfloat16 not: its tensor cores know float16")

    def nothing(*_: Any) -> list[exactness.Row]:
        raise cuflash.UnsupportedError("no compiler")

    monkeypatch.setattr(exactness, "check", nothing)
    assert not doctor.exact_on_cpu().healthy


# ---- compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that `cuflash compile` asks for; nothing is compiled."""
    asked: list[Job] = []

    def fake(jobs: Any, output: Path | None, workers: int | None, progress: Callable[..., None]) -> Precompiled:
        asked.extend(jobs)
        for done, job in enumerate(asked, 1):
            progress(done, len(asked), job)
        return Precompiled(compiled=len(asked), present=0, failed=(), seconds=1.0)

    monkeypatch.setattr(compilation, "precompile", fake)
    return asked


def test_compile_asks_for_what_a_call_will_ask_for(asked: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--arch", "sm_80", "--arch", "sm_90a", "--arch", "sm_80"]) == 0
    specs = [
        Spec(dtype=dtype, head_dim=dim, head_dim_v=dim, bounded_right=causal)
        for dtype, dim, causal in itertools.product(("float16", "bfloat16"), (64, 128), (False, True))
    ]
    targets = [Target.named(arch) for arch in ("sm_80", "sm_90a")]
    assert set(asked) == {job for spec in specs for target in targets for job in jobs_of(spec, target)}
    assert len(set(asked)) == len(asked)
    assert f"{len(asked)} kernels for sm_80, sm_90a into the kernel cache" in capsys.readouterr().out


def test_compile_with_options_makes_every_combination(asked: list[Job]) -> None:
    arguments = ["compile", "--arch", "sm_80", "--dtype", "float32", "--head-dim", "192:128", "--head-dim", "33"]
    assert cli.main([*arguments, "--window", "--softcap", "--sinks"]) == 0
    forward = [(spec, tile) for name, spec, tile, _ in asked if name == "forward_portable"]
    assert {(spec.head_dim, spec.head_dim_v, tile.vector) for spec, tile in forward} == {(192, 128, 16), (33, 33, 4)}
    bounds = {(spec.bounded_left, spec.bounded_right) for spec, _ in forward}
    assert bounds == {(False, False), (False, True), (True, True)}
    assert sum(not spec.parts for spec, _ in forward) == 2 * 3 * 2 * 2
    # Sinks are added to parts of the keys by a kernel behind; there are two tiles, for few rows and for more.
    assert sum(spec.parts for spec, _ in forward) == 2 * 3 * 2 * 2
    assert {name for name, *_ in asked} >= {"backward_sinks", "backward_portable_dq", "backward_portable"}


def test_compile_is_for_the_gpus_of_this_machine(asked: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUFLASH_FORCE_ARCH", raising=False)
    fake_driver(monkeypatch, H200, A10, H200)
    assert cli.main(["compile", "--dtype", "float16"]) == 0
    assert {target for *_, target in asked} == {Target.named("sm_90a"), Target.named("sm_86")}


def test_compile_without_a_gpu_asks_for_an_architecture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_driver(monkeypatch)
    assert "--arch" in error_of(["compile"], capsys)


def test_compile_skips_what_an_architecture_cannot_do(asked: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--arch", "sm_75", "--head-dim", "64"]) == 0
    assert {spec.dtype for _, spec, *_ in asked} == {"float16"}
    assert "skipped bfloat16 of head_dim 64 for sm_75" in capsys.readouterr().err
    asked.clear()
    assert cli.main(["compile", "--arch", "sm_75", "--dtype", "float32", "--dtype", "bfloat16"]) == 1
    assert asked == []
    assert "nothing to compile" in capsys.readouterr().err


def test_compile_fails_where_a_kernel_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(jobs: list[Job], *_: Any) -> Precompiled:
        failed = tuple((job, "NVRTC cannot compile for sm_120") for job in jobs[:2])
        return Precompiled(compiled=len(jobs) - 2, present=0, failed=failed, seconds=1.0)

    monkeypatch.setattr(compilation, "precompile", fake)
    arguments = ["compile", "--arch", "sm_120", "--head-dim", "64", "--output", str(tmp_path)]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert "failed: 2 kernels: NVRTC cannot compile for sm_120" in captured.err
    number = int(captured.out.split()[0])
    assert f"compiled {number - 2} kernels in 1.0 s, 2 failed" in captured.out
    assert f"CUFLASH_PRECOMPILED={tmp_path} " in captured.out


def test_compile_shows_lines_where_rich_is_not_installed(
    asked: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert cli.main(["compile", "--arch", "sm_89", "--dtype", "float16", "--head-dim", "64"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"1/{len(asked)} forward_portable sm_89 float16 64"
    assert len(lines) == len(asked)


def test_compile_that_is_interrupted_says_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(jobs: list[Job], output: Any, workers: Any, progress: Callable[..., None]) -> Precompiled:
        assert len(jobs) > 3
        progress(3, len(jobs), jobs[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(compilation, "precompile", fake)
    assert cli.main(["compile", "--arch", "sm_80"]) == 130
    errors = capsys.readouterr().err
    assert "interrupted after 3 of " in errors
    assert errors.endswith("cuflash: interrupted\n")


@needs_compiler
def test_compiled_kernels_are_found_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "folder"
    arguments = ["compile", "--arch", "sm_75", "--dtype", "float16", "--head-dim", "8", "--output", str(folder)]
    assert cli.main(arguments) == 0
    number = len(list(folder.iterdir()))
    assert number > 4
    assert cli.main(arguments) == 0
    assert "compiled 0 kernels in" in (printed := capsys.readouterr().out)
    assert f"{number} were there already" in printed

    def without() -> Any:
        raise cuflash.UnsupportedError("no compiler here")

    monkeypatch.setattr(toolchain, "toolchain", without)
    monkeypatch.setattr(jit, "toolchain", without)
    monkeypatch.setenv("CUFLASH_PRECOMPILED", str(folder))
    monkeypatch.delenv("CUFLASH_DUMP", raising=False)
    spec = Spec(dtype="float16", head_dim=8, head_dim_v=8, bounded_right=True)
    for name, known, tile, target in jobs_of(spec, Target.named("sm_75")):
        assert jit._cubin(name, known, tile, target).startswith(b"\x7fELF")


@needs_compiler
def test_a_real_ctrl_c_while_compiling_keeps_what_was_compiled(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cuflash.cli", "compile", "--arch", "sm_80", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    with subprocess.Popen(
        [*command, "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while not list(tmp_path.glob("*.cubin")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after" in errors
    assert "Traceback" not in errors
    assert errors.rfind("\x1b[?25h") >= errors.rfind("\x1b[?25l")  # the cursor, hidden by the bar, is back
    for path in tmp_path.iterdir():
        key, _, version = path.stem.rpartition("-")
        assert cache.load(tmp_path, key, version)
