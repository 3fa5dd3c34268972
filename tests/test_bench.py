"""`cuflash bench` on a CPU: options, verification, the files of results, README's section, pictures, missing peers."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import cli, reference
from cuflash.bench import command, measure, peers, plots, readme, results, verify
from cuflash.bench.contestant import Contestant, Inputs, Pair, on_arrays
from cuflash.bench.device import Cpu, Gpu
from cuflash.bench.measure import Meter
from cuflash.bench.peers import PEERS, Peer
from cuflash.bench.verify import WrongResult
from cuflash.bench.workloads import SUITES, UNITS, Table, Workload
from cuflash.demo import machine, standard

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
OURS_AND_STANDARD = PEERS[:2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few repetitions as there can be."""
    for name, value in {"burst": 1e-9, "rounds": 1, "warm_up": 0}.items():
        monkeypatch.setattr(Cpu, name, value)
    monkeypatch.setattr(measure, "_HOST_ROUNDS", 1)
    monkeypatch.setattr(measure, "_HOST_WARM_UP", 0)


def workload(direction: str = "forward", **changes: Any) -> Workload:
    given = {"length": 96, "q_len": 96, "head_dim": 16, "heads": 4, "kv_heads": 2, "batch": 2, **changes}
    return Workload(direction=direction, **given)


def table(*workloads: Workload) -> Table:
    return Table(name="forward", quantity="speed", workloads=workloads)


PROBLEMS = {
    "causal": workload(),
    "full": workload(causal=False),
    "packed": workload(batch=1, sequences=(7, 96, 30)),
    "decode": workload(q_len=1, causal=False),
}


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[command.Settings] = []
    monkeypatch.setattr(command, "run", lambda settings: given.append(settings) or 0)
    options = ["--suite", "gqa", "long", "--json", "there", "--plots", "--update-readme", "--device", "cpu"]
    options += ["--suite", "host", "--suite", "gqa"]  # which add up
    assert cli.main(["bench"]) == 0
    assert cli.main(["bench", *options]) == 0
    assert given == [
        command.Settings(),
        command.Settings(suites=("gqa", "long", "host"), json="there", plots=True, update_readme=True, device="cpu"),
    ]


@pytest.mark.parametrize("suites", [["all"], ["gqa", "all"]])
def test_all_is_every_suite(suites: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[command.Settings] = []
    monkeypatch.setattr(command, "run", lambda settings: given.append(settings) or 0)
    assert cli.main(["bench", "--suite", *suites, "--update-readme"]) == 0
    assert given == [command.Settings(suites=tuple(SUITES), update_readme=True)]


def test_one_command_measures_draws_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tables of every suite, before the pictures and README are made of what is stored then."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    measured: list[str] = []

    def measure_them(suites: tuple[str, ...], folder: Path, device: Cpu) -> int:
        measured.extend(suites)
        record = record_of("NVIDIA H200")
        record["rows"].append({**record["rows"][0], "length": 4_096})
        results.write(record, folder)
        return 0

    monkeypatch.setattr(command, "_measure", measure_them)
    Path("README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n", encoding="utf-8")
    assert cli.main(["bench", "--suite", "all", "--update-readme", "--device", "cpu"]) == 0
    assert measured == list(SUITES)
    assert Path("benchmarks/results/h200_forward.png").exists()
    assert "| head_dim 16, causal | 2 (2.00) | 2 (2.00) |" in Path("README.md").read_text(encoding="utf-8")
    assert "wrote README.md" in capsys.readouterr().out


def test_the_module_takes_the_options_of_the_command() -> None:
    helps = [
        subprocess.run([sys.executable, "-m", *name, "--help"], cwd=REPOSITORY, capture_output=True, text=True).stdout
        for name in (["benchmarks"], ["cuflash.cli", "bench"])
    ]
    assert helps[0] == helps[1]
    assert all(suite in helps[0] for suite in SUITES)


def test_suites_have_tables_of_their_own_whole_and_reduced() -> None:
    whole, reduced = ([table for suite in SUITES.values() for table in suite(small)] for small in (False, True))
    assert [table.name for table in whole] == [table.name for table in reduced]
    assert len({table.name for table in whole}) == len(whole)
    for big, small in zip(whole, reduced, strict=True):
        assert len(set(big.workloads)) == len(big.workloads)
        assert max(w.flops for w in small.workloads) <= max(w.flops for w in big.workloads)
    (longest,) = {max(w.length for w in table.workloads) for table in whole if table.name.startswith("long")}
    assert longest == 1_048_576
    paper = SUITES["paper"](False)[0].workloads
    assert {w.heads * w.head_dim for w in paper} == {2_048}
    assert {w.batch * w.length for w in paper if w.length <= 16_384} == {16_384}


def test_flops_count_the_pairs_that_the_mask_keeps() -> None:
    assert workload(causal=False).flops == 4 * 16 * 4 * 2 * 96 * 96
    assert workload("backward").flops == 2.5 * 4 * 16 * 4 * 2 * 96 * 97 / 2
    pairs = sum(length * (length + 1) // 2 for length in (7, 96, 30))
    assert workload("step", batch=1, sequences=(7, 96, 30)).flops == 3.5 * 4 * 16 * 4 * pairs


# ---- verification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_exact_rows_are_those_of_the_reference(name: str, direction: str) -> None:
    problem = workload(**{f: getattr(PROBLEMS[name], f) for f in ("q_len", "causal", "batch", "sequences")})
    inputs = Cpu().draw(problem)
    options = peers._options(problem, np.asarray)
    if direction == "forward":
        expected, _ = reference.attention(*inputs.arrays[:3], **options)
    else:
        problem = workload("backward", q_len=problem.q_len, causal=problem.causal, batch=problem.batch,
                           sequences=problem.sequences)  # fmt: skip
        expected = reference.attention_backward(inputs.dout, *inputs.arrays[:3], **options)[0]
    exact = verify.exact_rows(problem, inputs)
    np.testing.assert_allclose(exact.values, expected[exact.index], rtol=1e-9, atol=1e-12)


def wrong(part: str, change: Any) -> Peer:
    """Standard attention, of which one result is changed."""

    def attend(workload: Workload, xp: Any) -> Pair:
        def backward(*given: Any) -> Any:
            found = dict(zip(("dq", "dk", "dv"), standard.attention_backward(*given), strict=True))
            return tuple(change(x) if name == part else x for name, x in found.items())

        def forward(q: Any, k: Any, v: Any) -> Any:
            out, probabilities = standard.attention(q, k, v, causal=workload.causal)
            return change(out) if part == "out" else out, probabilities

        return Pair(forward, backward)

    return Peer(name="wrong", prepare=on_arrays(attend))


def with_nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[0, 3, 1, 2] = np.nan
    return x


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("part", "direction"), [("out", "forward"), ("dq", "backward"), ("dk", "step"), ("dv", "step")]
)
@pytest.mark.parametrize(
    "change",
    [lambda x: x * 1.0001, with_nan, lambda x: x[..., :-1], np.zeros_like],
    ids=["scaled", "NaN", "shape", "0"],
)
def test_a_wrong_result_is_not_timed(part: str, direction: str, change: Any) -> None:
    meter = Meter(Cpu(), [*OURS_AND_STANDARD, wrong(part, change)])
    row = meter.row(table(), workload(direction, kv_heads=4))
    assert results.contestants(row) == ["cuflash", "standard"]
    assert row["missing"]["wrong"].startswith("wrong result: ")
    assert set(row["errors"]) == {"cuflash", "standard"}


def test_a_result_that_agrees_with_a_wrong_one_is_held_against_float64() -> None:
    problem = workload()
    inputs = Cpu().draw(problem)
    out = 1.001 * cuflash.flash_attention(*inputs.arrays[:3], causal=True)
    with pytest.raises(WrongResult, match="float64"):
        verify.check("twin", [out], [out], verify.exact_rows(problem, inputs))


@pytest.mark.usefixtures("quick")
def test_nothing_is_timed_where_cuflash_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = cuflash.flash_attention
    monkeypatch.setattr(command, "PEERS", OURS_AND_STANDARD)
    monkeypatch.setattr(cuflash, "flash_attention", lambda *arrays, **options: forward(*arrays, **options) * 1.001)
    assert cli.main(["bench", "--suite", "decode", "--device", "cpu", "--json", str(tmp_path)]) == 1
    (row,) = results.read(tmp_path / "cpu_decode.json")["rows"]
    assert results.contestants(row) == []
    assert "cuflash: wrong result: " in capsys.readouterr().err


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_on_a_cpu(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the reduced form, beside every peer that is installed here; it says what it is and writes its files."""
    assert cli.main(["bench", "--suite", suite, "--device", "cpu", "--json", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "On the CPU (asked for): the NumPy backend in a reduced form" in printed
    tables = SUITES[suite](True)
    assert {path.name for path in tmp_path.iterdir()} == {f"cpu_{table.name}.json" for table in tables}
    for measured in tables:
        record = results.read(tmp_path / f"cpu_{measured.name}.json")
        assert record["gpu"] is None
        assert record["unit"] == UNITS[measured.quantity]
        assert record["ceiling"].keys() == {"gemm_tflop_per_s", "copy_gb_per_s"}
        assert len(record["rows"]) == len(measured.workloads)
        for row in record["rows"]:
            expected = {"empty cache", "filled cache"} if measured.quantity == "start" else {"cuflash", "standard"}
            if measured.quantity in ("speed", "bandwidth") and importlib.util.find_spec("torch") is not None:
                expected |= {"FLASH_ATTENTION", "MATH"}
            assert expected <= set(results.contestants(row))
            assert not any(reason.startswith(results.WRONG) for reason in row["missing"].values())


@pytest.mark.usefixtures("quick")
def test_missing_peers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(workload: Workload, xp: Any) -> Pair:
        raise RuntimeError("not on a\nTuesday")

    absent = Peer(name="absent", module="no_such_library.inner", prepare=on_arrays(refuses))
    elsewhere = Peer(name="elsewhere", prepare=on_arrays(refuses), device="gpu")
    unwilling = Peer(name="unwilling", prepare=on_arrays(refuses))
    monkeypatch.setattr(command, "PEERS", (*OURS_AND_STANDARD, absent, elsewhere, unwilling))
    assert cli.main(["bench", "--suite", "decode", "--device", "cpu", "--json", str(tmp_path)]) == 0
    record = results.read(tmp_path / "cpu_decode.json")
    assert record["missing"] == {
        "absent": "no_such_library.inner is not installed",
        "elsewhere": "takes part on a GPU only",
    }
    assert record["rows"][0]["missing"] == {"unwilling": "not on a Tuesday"}
    printed = capsys.readouterr().out
    assert all(f"left out: {name}: " in printed for name in ("absent", "elsewhere", "unwilling"))


@pytest.mark.usefixtures("quick")
def test_what_takes_too_long_or_too_much_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(workload: Workload, xp: Any) -> Pair:
        raise MemoryError("Unable to allocate 8 EiB")

    meter = Meter(Cpu(), [*OURS_AND_STANDARD, Peer(name="greedy", prepare=on_arrays(greedy))])
    assert meter.row(table(), workload())["missing"] == {"greedy": "out of memory: Unable to allocate 8 EiB"}
    for quantity, left_out in (("memory", False), ("speed", True)):  # where it is called once, and where twice
        given = Table(name="forward", quantity=quantity, workloads=())
        monkeypatch.setattr(measure, "PATIENCE", 1.5 * meter._foreseen(given, "standard", workload()))
        row = meter.row(given, workload())
        assert ("standard" in results.contestants(row)) is not left_out
        assert row["missing"].get("standard", "").startswith("too long, about ") is left_out
    assert results.contestants(row) == ["cuflash"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("where", "name"), [(Cpu, "draw"), (cuflash, "flash_attention")])
def test_a_problem_that_the_device_cannot_hold_is_left_out(
    where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> None:
        def raises(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(where, name, raises)

    meter = Meter(Cpu(), OURS_AND_STANDARD)
    fails(RuntimeError("CUDA out of memory. Tried to allocate 32 GiB"))
    row = meter.row(table(), workload())
    assert results.contestants(row) == []
    assert row["missing"] == {"cuflash": "out of memory: CUDA out of memory. Tried to allocate 32 GiB"}
    fails(RuntimeError("the kernel does not compile"))
    with pytest.raises(RuntimeError, match="does not compile"):
        meter.row(table(), workload())


@pytest.mark.usefixtures("quick")
def test_a_problem_that_the_device_cannot_hold_for_all_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(*_: Any) -> float:
        raise MemoryError("Unable to allocate 8 EiB")

    monkeypatch.setattr(Cpu, "seconds", seconds)
    row = Meter(Cpu(), OURS_AND_STANDARD).row(table(), workload())
    assert results.contestants(row) == []
    assert row["missing"] == dict.fromkeys(("cuflash", "standard"), "out of memory: Unable to allocate 8 EiB")


def test_rounds_begin_with_another_contestant_each_and_lead_in(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    for name, value in {"lead": 0.3, "burst": 0.1, "rounds": 3, "warm_up": 1}.items():
        monkeypatch.setattr(Cpu, name, value)

    def seconds(_: Cpu, contestant: str, repeats: int, before: int) -> float:
        seen.append((contestant, repeats, before))
        return float(len(seen))

    monkeypatch.setattr(Cpu, "seconds", seconds)
    monkeypatch.setattr(measure, "BUDGET", 3 * 1.6)
    meter, contestants = Meter(Cpu(), ()), {name: name for name in ("a", "b", "slow")}
    found = meter._medians(contestants, {"a": 0.1, "b": 0.05, "slow": 0.9})  # type: ignore[arg-type]
    assert [name for name, _, _ in seen] == ["a", "b", "b", "a", "a", "b", "a", "b", "slow"]
    assert set(seen) == {("a", 1, 3), ("b", 2, 6), ("slow", 1, 0)}
    assert found == {"a": 5.0, "b": 6.0, "slow": 9.0}  # without the first round


@pytest.mark.usefixtures("quick")
def test_memory_of_standard_attention_is_quadratic() -> None:
    """Two matrices of scores for each head, in float32."""
    meter = Meter(Cpu(), OURS_AND_STANDARD)
    memory = Table(name="memory", quantity="memory", workloads=())
    row = meter.row(memory, workload("step", length=1_024, q_len=1_024, batch=1, kv_heads=4))
    assert 32 <= row["standard"] < 40
    assert row["cuflash"] < row["standard"] / 3


def stand_in_for_flash_attn(torch: Any) -> SimpleNamespace:
    """A module with flash-attn's two functions; one returns the LSE besides, as some releases do."""

    def flash_attn_func(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
        return torch.from_numpy(cuflash.flash_attention(*(x.numpy() for x in (q, k, v)), causal=causal)), None

    def flash_attn_varlen_func(q: Any, k: Any, v: Any, *, causal: bool, **given: Any) -> Any:
        assert given.keys() == {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == int(given["cu_seqlens_q"].diff().max())
        boundaries = {name: given[name].numpy() for name in ("cu_seqlens_q", "cu_seqlens_k")}
        arrays = (x.numpy() for x in (q, k, v))
        return torch.from_numpy(cuflash.flash_attention(*arrays, causal=causal, **boundaries))

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["causal", "packed"])
@pytest.mark.parametrize("release", ["2", "3", "4"])
def test_flash_attn_is_called_by_its_own_names(release: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a stand-in; the library itself needs a GPU."""
    torch = pytest.importorskip("torch")
    (peer,) = (peer for peer in PEERS if peer.name == f"flash_attn {release}")
    assert peer.module is not None
    monkeypatch.setitem(sys.modules, peer.module, stand_in_for_flash_attn(torch))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(Peer, "obstacle", lambda peer, on_gpu: "")
    row = Meter(Cpu(), [PEERS[0], peer]).row(table(), PROBLEMS[name])
    assert results.contestants(row) == ["cuflash", peer.name]


class FakeEvent:
    def record(self) -> None:
        self.time = time.perf_counter()


def fake_cupy(capability: str) -> Any:
    """Of CuPy as much as `Gpu` asks for, on NumPy; the clock of its events is the host's."""
    properties = {"name": b"NVIDIA H200", "l2CacheSize": 1 << 20}
    cuda = SimpleNamespace(
        Event=FakeEvent,
        get_elapsed_time=lambda start, stop: (stop.time - start.time) * 1e3,
        runtime=SimpleNamespace(getDeviceProperties=lambda device: properties),
        Device=lambda: SimpleNamespace(id=0, compute_capability=capability, synchronize=lambda: None),
    )
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    arrays = {name: getattr(np, name) for name in ("empty", "empty_like", "ones", "copyto", "asarray", "uint8")}
    return SimpleNamespace(__version__="14.2.0", cuda=cuda, get_default_memory_pool=lambda: pool, **arrays)


def test_a_gpu_is_timed_by_events_without_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no torch, which would want a GPU
    assert Gpu(fake_cupy("75")).dtype == "float16"
    gpu = Gpu(fake_cupy("90"))
    assert (gpu.name, gpu.dtype) == ("NVIDIA H200", "bfloat16")
    monkeypatch.setattr(gpu, "_flush", SimpleNamespace(fill=lambda value: time.sleep(0.02)))
    contestant = Contestant(call=lambda: time.sleep(0.005) or (), native=lambda x: x, peak=None)
    assert 0.005 <= gpu.seconds(contestant, 3) < 0.02
    durations = iter((0.05, 0.05, 0.001, 0.001))
    leading = Contestant(call=lambda: time.sleep(next(durations)) or (), native=lambda x: x, peak=None)
    assert gpu.seconds(leading, 2, before=2) < 0.05
    inputs: Inputs = gpu.draw(workload())
    assert [x.shape for x in inputs.arrays] == [(2, 96, 4, 16), (2, 96, 2, 16), (2, 96, 2, 16), (2, 96, 4, 16)]
    assert {str(x.dtype) for x in inputs.arrays} == {"bfloat16"}
    assert all(0.9 < x.astype(np.float32).std() < 1.1 for x in inputs.arrays)
    gpu.release()


# ---- files of results ------------------------------------------------------------------------------------------------


def record_of(gpu: str | None, table: str = "forward") -> dict[str, Any]:
    row = {**workload().cell, "cuflash": 2.0, "CUDNN_ATTENTION": 1.0, "missing": {}, "errors": {}}
    return {"table": table, "gpu": gpu, "cpu": "a CPU", "date": "2026-11-24", "unit": "TFLOP/s", "rows": [row]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda record: record.pop("rows"), "rows"),
        (lambda record: record.update(unit="furlongs"), "furlongs"),
        (lambda record: record["rows"][0].pop("causal"), "causal"),
        (lambda record: record["rows"][0].update(cuflash="fast"), "cuflash"),
        (lambda record: record["rows"][0].update(cuflash=0), "cuflash"),
        (lambda record: record["rows"][0].update(cuflash=True), "cuflash"),
        (lambda record: record["rows"][0].update(missing=["xformers"]), "missing"),
    ],
)
def test_what_is_no_record(change: Any, named: str, tmp_path: Path) -> None:
    record = record_of("NVIDIA H200")
    results.check(copy.deepcopy(record))
    change(record)
    path = tmp_path / "h200_forward.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"h200_forward\.json holds no results \(.*{named}"):
        results.read(path)


def test_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "cpu_forward.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cpu_forward\.json holds no results"):
        list(results.stored(tmp_path))


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb_hbm3"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("Tesla T4", "t4"),
        (None, "cpu"),
    ],
)
def test_names_of_files(gpu: str | None, name: str, tmp_path: Path) -> None:
    path = results.write(record_of(gpu), tmp_path)
    assert path == tmp_path / f"{name}_forward.json"
    assert results.read(path) == record_of(gpu)


def test_an_older_gpus_kernels_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", on_gpu=True, dtype="bfloat16", xp=np)
    table = Table(name="forward", quantity="speed", workloads=())
    own = {**results.new(table, gpu, {}, {}), "rows": record_of("NVIDIA H200")["rows"]}
    monkeypatch.setenv("CUFLASH_FORCE_ARCH", "sm_80")
    forced = {**results.new(table, gpu, {}, {}), "rows": record_of("NVIDIA H200")["rows"]}
    forced["rows"][0]["cuflash"] = 0.125
    assert results.write(forced, tmp_path).name == "h200_as_sm_80_forward.json"
    assert results.write(own, tmp_path).name == "h200_forward.json"
    assert [record for _, record in results.stored(tmp_path)] == [own, forced]
    assert results.device_of(forced) == "NVIDIA H200 as sm_80"
    assert "0.12" not in readme.section(tmp_path, tmp_path)  # README is of the kernels that the GPU gets


def test_another_devices_results_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cpu_forward.json"
    path.write_text(json.dumps(record_of("NVIDIA H200")), encoding="utf-8")
    with pytest.raises(ValueError, match="holds results of NVIDIA H200, not of a CPU"):
        results.write(record_of(None), tmp_path)
    assert results.read(path)["gpu"] == "NVIDIA H200"


def test_committed_results_are_records() -> None:
    for path in RESULTS.glob("*.json"):
        results.read(path)
    assert {"h200_forward.json", "h200_backward.json"} <= {path.name for path, _ in results.stored(RESULTS)}


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_what_the_results_give() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert readme.regenerate(text, RESULTS, REPOSITORY) == text, "run: cuflash bench --update-readme"


def test_update_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of GPUs, in place of what stood between the markers; a second time changes nothing."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True)
    for record in (record_of("NVIDIA H200"), record_of(None), record_of("Tesla T4", "gqa_forward")):
        longer = {**record["rows"][0], "length": 4_096, "q_len": 4_096, "CUDNN_ATTENTION": 1.6}
        record["rows"].append(longer)
        results.write(record, folder)
    Path("README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    assert cli.main(["bench", "--update-readme"]) == 0
    text = Path("README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n{readme.BEGIN}\n\n| forward, TFLOP/s (ratio to cuDNN) | 96 | 4,096 |\n")
    assert "| head_dim 16, causal | 2 (2.00) | 2 (1.25) |" in text
    assert "| forward, 2 x 4,096, 4/2 heads of 16, causal | 2 | 1.6 |" in text
    assert text.endswith(f"\n\n</details>\n\n{readme.END}\nafter\n")
    assert "old" not in text
    assert "a CPU" not in text
    assert {path.name for path in folder.glob("*.png")} == {"h200_forward.png", "t4_gqa_forward.png"}
    assert all(f"({path.as_posix()})" in text for path in folder.glob("*.png"))
    assert cli.main(["bench", "--update-readme"]) == 0
    assert Path("README.md").read_text(encoding="utf-8") == text


def test_readme_in_short(tmp_path: Path) -> None:
    record = record_of("NVIDIA H200")
    record["rows"].append({**record["rows"][0], "cuflash": 8.0})
    results.write(record, tmp_path)
    results.write(record_of("NVIDIA H200", "gqa_forward"), tmp_path)
    text = "\n".join((*readme.SHORT, readme.BEGIN, readme.END))
    found = readme.regenerate(text, tmp_path, tmp_path)
    _, after = readme.around(found, readme.SHORT)
    sentence = found.removesuffix(after).removeprefix(readme.SHORT[0]).strip()
    assert sentence.endswith("NVIDIA H200, times cuDNN's in geometric mean: forward 4.00 (2 problems, 2.00 to 8.00).")
    assert readme.regenerate(found, tmp_path, tmp_path) == found


WHOLE = f"{readme.BEGIN}\n{readme.END}\n"


@pytest.mark.parametrize("text", ["", readme.BEGIN, f"{readme.END}\n{readme.BEGIN}\n", f"{readme.SHORT[0]}\n{WHOLE}"])
def test_a_readme_without_markers_is_left_alone(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(text, encoding="utf-8")
    assert cli.main(["bench", "--update-readme", "--suite", "decode", "--device", "cpu"]) == 2
    assert "README.md" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert Path("README.md").read_text(encoding="utf-8") == text


def test_a_folder_without_gpu_results_makes_no_section(tmp_path: Path) -> None:
    results.write(record_of(None), tmp_path)
    with pytest.raises(ValueError, match="holds no results of a GPU"):
        readme.section(tmp_path, tmp_path)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_plots_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PEERS", OURS_AND_STANDARD)
    assert cli.main(["bench", "--suite", "memory", "--device", "cpu", "--json", str(tmp_path), "--plots"]) == 0
    assert (tmp_path / "cpu_memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_marks_what_ran_out_of_memory() -> None:
    record = record_of("NVIDIA H200", "memory")
    longer = {**record["rows"][0], "length": 4_096, "missing": {"MATH": "out of memory: CUDA", "xformers": "too long"}}
    record["rows"].append(longer)
    figure = plots.draw({**record, "unit": "MiB"})
    marks = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert marks.keys() == {"cuflash", "CUDNN_ATTENTION", "MATH: out of memory"}
    assert list(marks["MATH: out of memory"].get_xdata()) == [4_096]
    assert list(marks["cuflash"].get_xdata()) == [96, 4_096]


def test_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert cli.main(["bench", "--plots", "--json", str(tmp_path / "there")]) == 2
    assert "cuflash[demo]" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


def test_a_base_install_measures(tmp_path: Path) -> None:
    """Without rich, matplotlib, torch and JAX; the NumPy backend beside standard attention."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'torch', 'jax'])); "
    program = blocked + "from cuflash.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["bench", "--suite", "decode", "--device", "cpu", "--json", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", program, *options], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = results.read(tmp_path / "cpu_decode.json")["rows"]
    assert results.contestants(row) == ["cuflash", "standard"]


def test_no_gpu_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "gpu_obstacle", lambda: "there is none")
    monkeypatch.setattr(command, "SUITES", {"none": lambda reduced: ()})
    assert command.run(command.Settings(suites=("none",), json=str(tmp_path))) == 0
    assert "On the CPU (there is none)" in capsys.readouterr().out
