"""The run-time compiler of the CUDA backend, without a GPU: only loading and asking for the device are replaced."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuflash.cuda import cache, jit, toolchain
from cuflash.cuda.precompile import precompile
from cuflash.cuda.toolchain import KernelCompileError, Target
from cuflash.errors import UnsupportedError
from cuflash.spec import DTYPES, Spec, Tile

SPEC = Spec(dtype="float16", head_dim=64, head_dim_v=64)
TILE = Tile(rows=64, cols=32)
TARGET = Target.named("sm_90a")
VARIANT = ("tiny", SPEC, TILE, TARGET)

TINY = """\
// a kernel in a few lines
#include "spec.cuh"
#include "variant.cuh"
#include "twice.cuh"   // a header that includes a header
#include <cuda_fp16.h>

extern "C" __global__ void tiny(float* out) {
    __shared__ float staged[TILE.rows];
    staged[threadIdx.x] = __half2float(__float2half(out[threadIdx.x]));
    __syncthreads();
    out[threadIdx.x] = twice(staged[threadIdx.x ^ 1]) * SPEC.head_dim + CUFLASH_ARCH;
}
"""
TWICE = """\
#pragma once
#include "spec.cuh"
#include "sum.cuh"
__device__ inline float twice(float x) { return sum(x, x); }
"""
SUM = "#pragma once\n__device__ inline float sum(float x, float y) { return x + y; }\n"


def struct_text(value: Spec | Tile) -> str:
    """A C++ struct that takes the constants a value renders."""
    types = {bool: "bool", int: "int"}
    members = [f"{types.get(type(getattr(value, f.name)), f.name.capitalize())} {f.name};" for f in fields(value)]
    return f"struct {type(value).__name__} {{ {' '.join(members)} }};\n"


@pytest.fixture(autouse=True)
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A source folder with a small kernel, an empty cache, and a process that has compiled nothing yet."""
    sources = tmp_path / "sources"
    sources.mkdir()
    spec = f"enum class Dtype {{ {', '.join(DTYPES)} }};\n{struct_text(SPEC)}{struct_text(TILE)}"
    for name, text in {"tiny.cu": TINY, "spec.cuh": spec, "twice.cuh": TWICE, "sum.cuh": SUM}.items():
        (sources / name).write_text(text, encoding="utf-8")
    for variable in ("CUFLASH_PRECOMPILED", "CUFLASH_DUMP", "CUFLASH_CACHE_MAX_MB", "CUFLASH_FORCE_ARCH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_source_folder", lambda: sources)
    monkeypatch.setattr(jit, "_current_device", lambda: 0)
    monkeypatch.setattr(jit, "_load", lambda cubin, entry: (cubin, entry))
    cache._warn_unwritable.cache_clear()
    forget(monkeypatch)
    return SimpleNamespace(sources=sources, cache=tmp_path / "cache", other=tmp_path / "other")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing is compiled, loaded or read."""
    monkeypatch.setattr(jit, "_CUBINS", jit._Once())
    monkeypatch.setattr(jit, "_FUNCTIONS", jit._Once())
    jit._flattened.cache_clear()


class StandIn:
    """A compiler that counts: its cubins are made of the text, so that every test of caching runs without CuPy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str = "13.5") -> None:
        self.compiled: list[str] = []
        self.set_version(monkeypatch, version)
        monkeypatch.setattr(jit, "compile_cubin", self.compile)

    def set_version(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        monkeypatch.setattr(jit, "toolchain", lambda: toolchain.Toolchain(version, Path("nowhere")))

    def compile(self, text: str, target: Target, *, name: str) -> toolchain.CompileResult:
        time.sleep(0.02)  # long enough for a second thread to ask for the same kernel
        self.compiled.append(text)
        return toolchain.CompileResult(f"{name} {target} {text}".encode(), "the log")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


def cubins(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cubin"))


# ---- source text


def test_headers_are_put_in_place_once_and_in_order() -> None:
    lines = jit.source("tiny", SPEC, TILE).splitlines()
    order = [
        "struct Spec",
        "struct Tile",
        "constexpr Spec SPEC{",
        "constexpr Tile TILE{",
        "__device__ inline float sum",
    ]
    order += ["__device__ inline float twice", "#include <cuda_fp16.h>", 'extern "C" __global__']
    places = [[number for number, line in enumerate(lines) if line.startswith(start)] for start in order]
    assert [len(found) for found in places] == [1] * len(order)
    assert places == sorted(places)
    assert not any('#include "' in line or "#pragma once" in line for line in lines)


def test_line_directives_name_every_line_of_every_file(rooms: SimpleNamespace) -> None:
    file, number, seen = "", 0, 0
    for line in jit.source("tiny", SPEC, TILE).splitlines():
        if line.startswith("#line"):
            _, digits, quoted = line.split(" ")
            file, number = quoted.strip('"'), int(digits)
            continue
        if file != "variant.cuh" and line:
            assert (rooms.sources / file).read_text(encoding="utf-8").splitlines()[number - 1] == line
            seen += 1
        number += 1
    written = [line for path in rooms.sources.iterdir() for line in path.read_text(encoding="utf-8").splitlines()]
    assert seen == sum(1 for line in written if line and not line.startswith(('#include "', "#pragma once")))


def test_windows_line_ends_give_the_same_text(rooms: SimpleNamespace) -> None:
    before = jit.source("tiny", SPEC, TILE)
    (rooms.sources / "tiny.cu").write_bytes(TINY.replace("\n", "\r\n").encode())
    jit._flattened.cache_clear()
    assert jit.source("tiny", SPEC, TILE) == before


def test_a_header_that_is_missing_is_named_with_its_line(rooms: SimpleNamespace) -> None:
    (rooms.sources / "sum.cuh").unlink()
    with pytest.raises(FileNotFoundError, match=r"twice\.cuh, line 3, includes 'sum\.cuh'"):
        jit.source("tiny", SPEC, TILE)


def test_a_kernel_without_its_constants_is_rejected(rooms: SimpleNamespace) -> None:
    (rooms.sources / "tiny.cu").write_text(TINY.replace('#include "variant.cuh"\n', ""), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tiny\.cu has 0 lines #include \"variant\.cuh\""):
        jit.source("tiny", SPEC, TILE)


def test_an_unknown_kernel_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"kernel is 'huge'; the sources are tiny"):
        jit.source("huge", SPEC, TILE)


def test_the_key_follows_everything_that_decides_the_cubin(rooms: SimpleNamespace) -> None:
    def key(spec: Spec = SPEC, tile: Tile = TILE, target: Target = TARGET) -> str:
        return cache.key(jit.source("tiny", spec, tile), toolchain.options(target))

    keys = [key(), key(replace(SPEC, bounded_right=True)), key(tile=replace(TILE, stages=2))]
    keys += [key(target=Target.named("sm_80")), key(target=Target("sm_90a", 750))]
    assert key(target=Target("sm_90a", 800)) == key(), "paths from 800 on take the same instructions"
    (rooms.sources / "sum.cuh").write_text(SUM.replace("x + y", "y + x"), encoding="utf-8")
    jit._flattened.cache_clear()
    keys.append(key())
    assert len(set(keys)) == len(keys)
    (rooms.sources / "sum.cuh").write_text(SUM, encoding="utf-8")
    jit._flattened.cache_clear()
    assert key() == keys[0]


# ---- targets


@pytest.mark.parametrize(
    ("capability", "arch", "path"),
    [
        ((7, 5), "sm_75", 750),
        ((8, 0), "sm_80", 800),
        ((8, 6), "sm_86", 860),
        ((8, 7), "sm_87", 870),
        ((8, 8), "sm_87", 870),
        ((8, 9), "sm_89", 890),
        ((9, 0), "sm_90a", 900),
        ((10, 0), "sm_100", 1000),
        ((10, 3), "sm_100", 1000),
        ((11, 0), "sm_110", 1100),
        ((12, 0), "sm_120", 1200),
        ((12, 1), "sm_120", 1200),
        ((13, 4), "sm_130", 1300),
    ],
)
def test_every_gpu_gets_an_architecture(capability: tuple[int, int], arch: str, path: int) -> None:
    assert toolchain.capability_target(capability) == Target(arch, path)


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (5, 2)])
def test_gpus_before_turing_are_refused(capability: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match=rf"capability {capability[0]}\.{capability[1]}.* 7\.5 \(Turing\)"):
        toolchain.capability_target(capability)


def test_a_forced_path_keeps_the_gpus_own_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "capability", lambda device: (9, 0))
    for forced, path in (("sm_75", 750), ("sm_80", 800), ("sm_90a", 900), ("", 900)):
        monkeypatch.setenv("CUFLASH_FORCE_ARCH", forced)
        assert toolchain.device_target(0) == Target("sm_90a", path)


def test_a_forced_path_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_FORCE_ARCH", "75")
    with pytest.raises(ValueError, match=r"CUFLASH_FORCE_ARCH is '75'; allowed are sm_75, sm_80"):
        toolchain.capability_target((9, 0))
    monkeypatch.setenv("CUFLASH_FORCE_ARCH", "sm_100")
    with pytest.raises(UnsupportedError, match=r"CUFLASH_FORCE_ARCH is 'sm_100', but the GPU has .* 9\.0"):
        toolchain.capability_target((9, 0))


def test_a_machine_without_a_usable_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class DriverError(RuntimeError):
        pass

    def no_device(device: int) -> Any:
        raise DriverError("cudaErrorInsufficientDriver")

    cuda = SimpleNamespace(Device=no_device, runtime=SimpleNamespace(CUDARuntimeError=DriverError))
    monkeypatch.setattr(toolchain, "import_cupy", lambda: SimpleNamespace(cuda=cuda))
    toolchain.capability.cache_clear()
    with pytest.raises(UnsupportedError, match=r"no usable CUDA device 3: cudaErrorInsufficientDriver"):
        toolchain.device_target(3)


# ---- what is missing


@pytest.fixture
def fresh_toolchain() -> Any:
    """The toolchain is looked for again, in the test and after it."""
    toolchain.toolchain.cache_clear()
    yield
    toolchain.toolchain.cache_clear()


@pytest.mark.usefixtures("fresh_toolchain")
def test_without_cupy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match=r"needs CuPy.*pip install 'cuflash\[cuda13\]', or 'cuflash\[cuda12\]'"):
        jit.kernel(*VARIANT)


@pytest.mark.usefixtures("compiler", "fresh_toolchain")
def test_without_nvrtc_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there() -> tuple[int, int]:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr("cupy.cuda.nvrtc.getVersion", not_there)
    expected = (
        r"NVRTC cannot be loaded \(libnvrtc\.so\.13: cannot open shared object file\): pip install 'cuflash\[cuda13\]'"
    )
    with pytest.raises(UnsupportedError, match=expected):
        jit.kernel(*VARIANT)


@pytest.mark.usefixtures("compiler", "fresh_toolchain")
def test_headers_of_another_major_version_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("cuda_fp16.h", "cuda_bf16.h"):
        (tmp_path / name).touch()
    (tmp_path / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  9020\n", encoding="utf-8")
    monkeypatch.setattr(toolchain, "_header_folders", lambda major: [tmp_path, tmp_path / "absent"])
    assert toolchain._headers_major(tmp_path) == 9
    with pytest.raises(UnsupportedError, match=r"headers of CUDA 1\d .*were not found: pip install"):
        jit.kernel(*VARIANT)


@pytest.mark.usefixtures("compiler")
def test_an_architecture_the_compiler_does_not_know() -> None:
    with pytest.raises(UnsupportedError, match=r"NVRTC 1\d\.\d+ cannot compile for sm_999"):
        jit.compile_variant("tiny", SPEC, TILE, Target("sm_999", 9990))


# ---- the real compiler


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_every_architecture_compiles(arch: str, compiler: toolchain.Toolchain) -> None:
    if arch in ("sm_100", "sm_120") and tuple(map(int, compiler.version.split("."))) < (12, 8):
        with pytest.raises(UnsupportedError, match=f"NVRTC {compiler.version} cannot compile for {arch}"):
            jit.compile_variant("tiny", SPEC, TILE, Target.named(arch))
        return
    result = jit.compile_variant("tiny", SPEC, TILE, Target.named(arch))
    assert result.cubin.startswith(b"\x7fELF")
    used = toolchain.resources(result.log)["tiny"]
    assert 0 < used.registers < 64
    assert used.shared_bytes == 4 * TILE.rows
    assert (used.stack_bytes, used.spill_bytes, used.advisories) == (0, 0, ())


@pytest.mark.usefixtures("compiler")
def test_the_sources_see_the_path_and_not_the_gpu(rooms: SimpleNamespace) -> None:
    check = "\nstatic_assert(CUFLASH_ARCH == 750);\n"
    (rooms.sources / "tiny.cu").write_text(TINY + check, encoding="utf-8")
    assert jit.compile_variant("tiny", SPEC, TILE, Target("sm_90a", 750)).cubin
    with pytest.raises(KernelCompileError, match=r"tiny\.cu\(14\): error: static assertion failed"):
        jit.compile_variant("tiny", SPEC, TILE, TARGET)


@pytest.mark.usefixtures("compiler")
def test_spills_and_local_memory_are_reported(rooms: SimpleNamespace) -> None:
    greedy = """
    extern "C" __global__ void __launch_bounds__(1024, 2) greedy(float* out, int n) {
        float kept[96], picked[8];
        for (int i = 0; i < 8; ++i) picked[i] = out[i * n];
        #pragma unroll
        for (int i = 0; i < 96; ++i) kept[i] = out[i * n + 8];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 96; ++i) out[i * n] = kept[i] * kept[95 - i] + picked[n & 7];
    }
    """
    (rooms.sources / "tiny.cu").write_text(TINY + greedy, encoding="utf-8")
    used = toolchain.resources(jit.compile_variant("tiny", SPEC, TILE, TARGET).log)
    assert set(used) == {"tiny", "greedy"}
    assert used["greedy"].spill_bytes > 0
    assert used["greedy"].stack_bytes > 0
    assert (used["tiny"].spill_bytes, used["tiny"].stack_bytes) == (0, 0)


@pytest.mark.usefixtures("compiler")
def test_an_error_shows_all_that_is_needed_to_mend_it(rooms: SimpleNamespace) -> None:
    (rooms.sources / "sum.cuh").write_text(SUM.replace("x + y", "x + z"), encoding="utf-8")
    with pytest.raises(KernelCompileError) as caught:
        jit.kernel(*VARIANT)
    message = str(caught.value)
    for part in ("kernel tiny", str(SPEC), str(TILE), str(TARGET), 'sum.cuh(2): error: identifier "z" is undefined'):
        assert part in message
    (dumped,) = (rooms.cache / "rejected").glob("*.cu")
    assert str(dumped) in message
    assert dumped.read_text(encoding="utf-8") == jit.source("tiny", SPEC, TILE)
    assert "sum.cuh(2): error" in dumped.with_suffix(".log").read_text(encoding="utf-8")

    (rooms.sources / "sum.cuh").write_text(SUM, encoding="utf-8")  # mended: the failure is not remembered
    jit._flattened.cache_clear()
    cubin, entry = jit.kernel(*VARIANT)
    assert cubin.startswith(b"\x7fELF")
    assert entry == "tiny"


@pytest.mark.usefixtures("compiler")
def test_the_dumped_source_compiles_alone(rooms: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    cubin, _ = jit.kernel(*VARIANT)
    forget(monkeypatch)
    monkeypatch.setenv("CUFLASH_DUMP", str(rooms.other))
    jit.kernel(*VARIANT)  # although the cache has it
    (dumped,) = rooms.other.glob("*.cu")
    assert toolchain.compile_cubin(dumped.read_text(encoding="utf-8"), TARGET, name="tiny.cu").cubin == cubin
    log = dumped.with_suffix(".log").read_text(encoding="utf-8")
    assert "-arch=sm_90a -DCUFLASH_ARCH=800" in log
    assert toolchain.resources(log)["tiny"].registers > 0


# ---- ptxas's report, as written down from three versions

REPORT_12_0 = """\
ptxas info    : 304 bytes gmem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
ptxas info    : Compiling entry function 'probe' for 'sm_90a'
ptxas info    : Function properties for probe
ptxas         .     256 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 156 registers, 256 bytes smem
"""
REPORT_13_5 = """\
ptxas info    : (C7517) wgmma.wait_group is injected in around line 64 by compiler in function 'gemm'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
insufficient register resources for the wgmma pipeline in the function 'gemm' in line 72
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm' for 'sm_90a'
ptxas info    : Function properties for gemm
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 16384 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 7.703 ms
ptxas info    : Function properties for _Z6helperPKfi
ptxas         .     160 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""


def test_the_report_of_old_and_new_compilers_is_read() -> None:
    used = toolchain.resources(REPORT_12_0)
    assert used["second"] == toolchain.Resources(
        registers=8, stack_bytes=0, spill_bytes=0, shared_bytes=0, advisories=()
    )
    assert used["probe"] == toolchain.Resources(
        registers=156, stack_bytes=256, spill_bytes=28, shared_bytes=256, advisories=()
    )
    gemm = toolchain.resources(REPORT_13_5)["gemm"]
    assert (gemm.registers, gemm.stack_bytes, gemm.spill_bytes, gemm.shared_bytes) == (30, 160, 8, 16384)
    assert [line[:7] for line in gemm.advisories] == ["(C7517)", "(C7511)"]


def test_a_log_without_a_report_is_no_proof_of_no_spills() -> None:
    with pytest.raises(ValueError, match="no ptxas report"):
        toolchain.resources("warning: something else")
    with pytest.raises(ValueError, match="report on 'k' is not understood"):
        toolchain.resources("ptxas info : Compiling entry function 'k' for 'sm_80'\n")


# ---- once a process


def test_threads_compile_a_variant_once_and_load_it_once_a_device(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = threading.local()
    loads: list[tuple[int, str]] = []

    def load(cubin: bytes, entry: str) -> Any:
        loads.append((where.device, entry))
        return object()

    monkeypatch.setattr(jit, "_current_device", lambda: where.device)
    monkeypatch.setattr(jit, "_load", load)
    wide = replace(TILE, cols=64)
    start = threading.Barrier(12)

    def ask(number: int) -> tuple[int, Tile, Any]:
        where.device, tile = number % 2, (TILE, wide)[number // 2 % 2]
        start.wait()
        return where.device, tile, jit.kernel("tiny", SPEC, tile, TARGET)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert len(stand_in.compiled) == len(set(stand_in.compiled)) == 2
    assert sorted(loads) == [(0, "tiny")] * 2 + [(1, "tiny")] * 2
    assert len({(device, tile): function for device, tile, function in answers}) == 4
    assert len({id(function) for _, _, function in answers}) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_compilation_runs_alone_and_the_others_together(fails: bool) -> None:
    first_alone = toolchain.FirstAlone()
    running, most, alone, start, meeting = [], [], [], threading.Barrier(8), threading.Barrier(7)

    def call(number: int) -> int:
        running.append(number)
        most.append(len(running))
        if len(most) == 1:
            time.sleep(0.05)  # long enough for the others to come
            alone.append(running == [number])
            running.remove(number)
            if fails:
                raise RuntimeError("no")
        else:
            meeting.wait(10)  # for all the others
            running.remove(number)
        return number

    def ask(number: int) -> int | str:
        start.wait()
        try:
            return first_alone(call, number)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert alone == [True]
    assert max(most) == 7
    assert answers.count("no") == fails
    assert sum(answer == number for number, answer in enumerate(answers)) == 8 - fails


def test_a_failure_reaches_every_caller_and_the_next_one_tries_again() -> None:
    once, tries = jit._Once(), []

    def fail() -> None:
        tries.append(1)
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            once.get("key", fail)
    assert len(tries) == 2
    assert once.get("key", lambda: 5) == once.get("key", fail) == 5


def test_an_entry_of_another_name_is_loaded(stand_in: StandIn) -> None:
    assert jit.kernel(*VARIANT, entry="finish")[1] == "finish"
    assert jit.kernel(*VARIANT)[1] == "tiny"
    assert len(stand_in.compiled) == 1


def test_a_compilation_is_logged_at_debug_level(stand_in: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cuflash")
    jit.kernel(*VARIANT)
    (record,) = [record for record in caplog.records if record.message.startswith("compiled tiny in")]
    assert (record.name, record.levelno) == ("cuflash", logging.DEBUG)


# ---- on disk


def test_a_second_process_finds_the_cubin(
    rooms: SimpleNamespace, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.kernel(*VARIANT)
    assert len(cubins(rooms.cache)) == 1
    forget(monkeypatch)
    assert jit.kernel(*VARIANT) == first
    assert len(stand_in.compiled) == 1


def test_another_version_of_the_compiler_compiles_again(
    rooms: SimpleNamespace, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit.kernel(*VARIANT)
    forget(monkeypatch)
    stand_in.set_version(monkeypatch, "13.6")
    jit.kernel(*VARIANT)
    assert len(stand_in.compiled) == len(cubins(rooms.cache)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:],
    ],
    ids=["empty", "short", "truncated", "longer", "flipped"],
)
def test_a_damaged_file_is_compiled_again(
    damage: Any, rooms: SimpleNamespace, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.kernel(*VARIANT)
    (path,) = cubins(rooms.cache)
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    forget(monkeypatch)
    assert jit.kernel(*VARIANT) == first
    assert len(stand_in.compiled) == 2
    assert path.read_bytes() == sound


def test_precompiled_kernels_need_no_compiler(
    rooms: SimpleNamespace, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.kernel(*VARIANT)
    rooms.cache.rename(rooms.other)
    forget(monkeypatch)

    def no_compiler() -> Any:
        raise UnsupportedError("NVRTC cannot be loaded")

    monkeypatch.setattr(jit, "toolchain", no_compiler)
    with pytest.raises(UnsupportedError):
        jit.kernel(*VARIANT)
    monkeypatch.setenv("CUFLASH_PRECOMPILED", str(rooms.other))
    assert jit.kernel(*VARIANT) == first
    assert not rooms.cache.exists()


def test_a_damaged_precompiled_file_is_not_used(
    rooms: SimpleNamespace, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.kernel(*VARIANT)
    rooms.cache.rename(rooms.other)
    (path,) = cubins(rooms.other)
    path.write_bytes(path.read_bytes()[:-40])
    broken = path.read_bytes()
    forget(monkeypatch)
    monkeypatch.setenv("CUFLASH_PRECOMPILED", str(rooms.other))
    assert jit.kernel(*VARIANT) == first
    assert len(stand_in.compiled) == 2
    assert path.read_bytes() == broken  # that folder is only read


def test_a_cache_that_cannot_be_written_warns_once_and_works(
    rooms: SimpleNamespace, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    rooms.cache.write_text("a file where the folder should be", encoding="utf-8")
    jit.kernel(*VARIANT)
    jit.kernel(*VARIANT)
    jit.kernel("tiny", SPEC, replace(TILE, cols=64), TARGET)
    assert len(stand_in.compiled) == 2
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "kept in memory only" in warnings[0]


def test_a_missing_home_is_a_cache_that_cannot_be_written(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("CUFLASH_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cache.Path, "home", no_home)
    jit.kernel(*VARIANT)
    assert "CUFLASH_CACHE_DIR chooses another" in caplog.text


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUFLASH_CACHE_DIR")
    monkeypatch.setattr(cache.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.user_folder() == tmp_path / ".cache" / "cuflash"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache.user_folder() == tmp_path / ".cache" / "cuflash"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.user_folder() == tmp_path / "xdg" / "cuflash"
    monkeypatch.setattr(cache.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.user_folder() == tmp_path / "local" / "cuflash"


def fill(folder: Path, sizes: dict[str, int]) -> None:
    """Files of the given sizes in bytes, each used an hour after the one before."""
    for hours, (name, size) in enumerate(sizes.items()):
        cache.store(folder, name, "13.5", bytes(size - 32))
        used = time.time() - 3600 * (len(sizes) - hours)
        os.utime(folder / f"{name}-13.5.cubin", (used, used))


def test_the_files_used_longest_ago_are_evicted(rooms: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rooms.cache, {"a": 400_000, "b": 300_000, "c": 200_000, "d": 100_000})
    left_by_a_dead_process = rooms.cache / "e.tmp"
    left_by_a_dead_process.write_bytes(bytes(1000))
    os.utime(left_by_a_dead_process, (0, 0))
    (rooms.cache / "rejected").mkdir()
    monkeypatch.setenv("CUFLASH_CACHE_MAX_MB", "1")
    cache.keep("f", "13.5", bytes(500_000))
    assert [path.name[0] for path in cubins(rooms.cache)] == ["c", "d", "f"]
    assert not left_by_a_dead_process.exists()
    assert sum(path.stat().st_size for path in cubins(rooms.cache)) <= 1_000_000


def test_use_refreshes_a_file_once_a_day(rooms: SimpleNamespace) -> None:
    fill(rooms.cache, {"a": 1000})
    path = rooms.cache / "a-13.5.cubin"
    written = path.stat().st_mtime
    assert cache.find("a", "13.5") == bytes(968)
    assert path.stat().st_mtime == written  # an hour old: not touched
    os.utime(path, (written - 90_000, written - 90_000))
    assert cache.find("a", "13.5") is not None
    assert time.time() - path.stat().st_mtime < 60


def test_the_limit_is_checked_and_zero_keeps_nothing(
    rooms: SimpleNamespace, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_MAX_MB", "0")
    jit.kernel(*VARIANT)
    assert not rooms.cache.exists()
    for wrong in ("-1", "1.5", "big"):
        monkeypatch.setenv("CUFLASH_CACHE_MAX_MB", wrong)
        with pytest.raises(ValueError, match=rf"CUFLASH_CACHE_MAX_MB is '{wrong}'; allowed are whole numbers"):
            cache.user_limit()


def write_and_read(folder: str, seed: int) -> str:
    """One of several processes: store the same keys again and again, and look at what the others wrote."""
    for turn in range(60):
        name = str((turn + seed) % 3)
        cubin = name.encode() * 300_000
        cache.store(Path(folder), name, "13.5", cubin)
        if cache.load(Path(folder), name, "13.5") != cubin:
            return f"process {seed} read something else in turn {turn}"
    return ""


def test_processes_write_at_once_and_never_read_a_half(rooms: SimpleNamespace) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(write_and_read, [(str(rooms.cache), seed) for seed in range(3)]) == [""] * 3
    assert sorted(path.name for path in rooms.cache.iterdir()) == [f"{name}-13.5.cubin" for name in "012"]


# ---- ahead of time


@pytest.mark.usefixtures("compiler")
def test_precompiled_folders_hold_what_kernels_look_for(
    rooms: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, str]] = []
    narrow, wrong = Tile(rows=32, cols=32), Tile(rows=0, cols=32)  # an array of no elements is an error
    jobs = [(*VARIANT[:2], tile, TARGET) for tile in (TILE, narrow, wrong, TILE)]
    report = precompile(
        jobs, rooms.other, workers=2, progress=lambda done, total, job: seen.append((done, total, job[0]))
    )
    assert (report.compiled, report.present) == (2, 0)
    assert [job for job, _ in report.failed] == [jobs[2]]
    assert "staged" in report.failed[0][1]
    assert str(wrong) in report.failed[0][1]
    assert seen == [(1, 3, "tiny"), (2, 3, "tiny"), (3, 3, "tiny")]
    assert 0 < report.seconds < 600
    assert len(list(rooms.other.iterdir())) == 2

    again = precompile(jobs[:2], rooms.other)
    assert (again.compiled, again.present, again.failed) == (0, 2, ())

    monkeypatch.setenv("CUFLASH_PRECOMPILED", str(rooms.other))
    monkeypatch.setattr(jit, "compile_cubin", None)  # nothing is left to compile
    for job in jobs[:2]:
        assert jit.kernel(*job)[0].startswith(b"\x7fELF")


@pytest.mark.usefixtures("compiler")
def test_precompiling_checks_its_arguments_first(rooms: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="workers is 0; allowed are 1 and more"):
        precompile([VARIANT], rooms.other, workers=0)
    with pytest.raises(ValueError, match="kernel is 'huge'"):
        precompile([VARIANT, ("huge", *VARIANT[1:])], rooms.other)
    assert not rooms.other.exists()
    rooms.other.touch()
    with pytest.raises(FileExistsError):
        precompile([VARIANT], rooms.other)


def test_an_interrupt_stops_precompiling_and_keeps_what_is_done(
    rooms: SimpleNamespace, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int, job: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cuflash.cuda.precompile.toolchain", jit.toolchain)
    jobs = [("tiny", SPEC, replace(TILE, stages=stages), TARGET) for stages in range(1, 9)]
    with pytest.raises(KeyboardInterrupt):
        precompile(jobs, workers=1, progress=interrupt)
    assert 1 <= len(stand_in.compiled) < len(jobs)
    assert len(cubins(rooms.cache)) == len(stand_in.compiled)


def test_importing_the_compiler_does_not_import_cupy() -> None:
    code = "import sys, cuflash.cuda.precompile; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
