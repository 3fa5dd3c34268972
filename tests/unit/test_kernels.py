"""Every kernel compiles for every architecture without spills, local memory or too much shared memory. No GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cuflash import UnsupportedError, tuning
from cuflash.cuda import jit, launch, toolchain
from cuflash.cuda.precompile import jobs_of
from cuflash.cuda.toolchain import Target, resources
from cuflash.spec import Spec, Tile
from tests.gpu.compilation import allowed_spills

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
HARMLESS = "(C7519)"  # a wgmma.fence that ptxas adds where there was one
HEAD_DIMS = (64, 128, 192, 256)  # the upper ends of the tile table's ranges
PLAIN = Spec(dtype="bfloat16", head_dim=64, head_dim_v=64)
EVERYTHING = {
    "bounded_left": True,
    "bounded_right": True,
    "softcap": True,
    "alibi": True,
    "sinks": True,
    "packed": True,
    "dropout": True,
}
DENSE: dict[str, dict[str, bool]] = {
    "bias": {"bias": True},
    "mask": {"mask": True, "bounded_right": True},
    "mask, everything": {**EVERYTHING, "packed": False, "mask": True},
    "everything": {**EVERYTHING, "packed": False, "bias": True, "mask": True},
    "everything, in order": {**EVERYTHING, "packed": False, "bias": True, "mask": True, "deterministic": True},
}


def _spec(dtype: str, head_dim: int, head_dim_v: int | None = None, **options: bool) -> Spec:
    return Spec(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v or head_dim, **options)


@functools.cache  # several tests meet the same kernel
def _faults(job: tuple) -> list[str]:
    """What ptxas reports of one kernel that must not be."""
    name, spec, tile, target = job
    ((entry, used),) = resources(jit.compile_variant(*job).log).items()
    assert entry == name
    spilled = max(used.spill_bytes, used.stack_bytes)
    shared = used.shared_bytes + tuning.shared_bytes(name, spec, tile)
    faults = {
        f"{used.spill_bytes} bytes of spills, {used.stack_bytes} of local memory": spilled > allowed_spills(job),
        f"{shared} bytes of shared memory": shared > tuning.SHARED_MEMORY[target.path],
        f"{used.registers * 32 * tile.warps} registers a block": used.registers * 32 * tile.warps > 65_536,
        f"advisories {used.advisories}": [line for line in used.advisories if HARMLESS not in line],
    }
    return [f"{name} {target.arch} {spec} {tile}: {fault}" for fault, present in faults.items() if present]


def _check(jobs: list[tuple]) -> None:
    assert jobs
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for found in pool.map(_faults, dict.fromkeys(jobs)) for fault in found]
    assert not faults, "\n".join(faults)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", ARCHS)
def test_every_option_at_once(arch: str) -> None:
    target = Target.named(arch)
    dtypes = ("float16",) if arch == "sm_75" else ("bfloat16", "float32")
    specs = [_spec(dtype, dim, **EVERYTHING) for dtype, dim in product(dtypes, HEAD_DIMS)]
    _check([job for spec in specs for job in jobs_of(spec, target)])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_plain_and_causal(arch: str, dtype: str) -> None:
    specs = [_spec(dtype, dim, bounded_right=causal) for dim, causal in product(HEAD_DIMS, (False, True))]
    _check([job for spec in specs for job in jobs_of(spec, Target.named(arch))])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", ARCHS)
def test_parts_with_every_option(arch: str) -> None:
    options = {**EVERYTHING, "packed": False, "dropout": False}
    dtypes = ("float16",) if arch == "sm_75" else ("bfloat16", "float32")
    specs = [_spec(dtype, dim, **options) for dtype, dim in product(dtypes, HEAD_DIMS)]
    jobs = [job for spec in specs for job in jobs_of(spec, Target.named(arch))]
    _check([job for job in jobs if job[1].parts or job[0] == "forward_combine"])


@pytest.mark.usefixtures("compiler")
def test_other_dims_alignments_and_tf32() -> None:
    target = Target.named("sm_80")
    jobs = jobs_of(_spec("bfloat16", 72, 40, bounded_right=True), target)
    jobs += jobs_of(_spec("float16", 136, 8), target)
    jobs += jobs_of(_spec("float32", 8, 200), target)
    jobs += jobs_of(_spec("bfloat16", 33, 65, bounded_right=True), target, vector=2)
    jobs += jobs_of(_spec("float32", 33, 65, bounded_right=True), target, vector=4)
    jobs += jobs_of(_spec("float32", 128, allow_tf32=True), target)
    jobs += jobs_of(_spec("float16", 40), Target.named("sm_75"), vector=2)
    _check(jobs)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("how", DENSE)
@pytest.mark.parametrize("arch", ARCHS)
def test_bias_and_mask(arch: str, how: str) -> None:
    target = Target.named(arch)
    dtypes = ("float16",) if arch == "sm_75" else ("bfloat16", "float32")
    specs = [_spec(dtype, dim, **DENSE[how]) for dtype, dim in product(dtypes, HEAD_DIMS)]
    jobs = [job for spec in specs for job in jobs_of(spec, target)]
    assert not any("hopper" in name for name, *_ in jobs)
    _check([job for job in jobs if job[1].bias or job[1].mask])


@pytest.mark.usefixtures("compiler")
def test_bias_and_mask_of_other_dims_and_alignments() -> None:
    target = Target.named("sm_80")
    jobs = jobs_of(_spec("bfloat16", 72, 40, bias=True, deterministic=True), target)
    jobs += jobs_of(_spec("float32", 200, 8, bias=True, mask=True, deterministic=True), target)
    jobs += jobs_of(_spec("bfloat16", 33, 65, bias=True, mask=True), target, vector=2)
    jobs += jobs_of(_spec("float32", 33, 250, bias=True, deterministic=True), target, vector=4)
    jobs += jobs_of(_spec("float32", 128, bias=True, allow_tf32=True), target)
    jobs += jobs_of(_spec("float16", 40, mask=True), Target.named("sm_75"), vector=2)
    _check(jobs)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options", [{"bounded_right": True}, {"dropout": True}, {"bounded_right": True, "dropout": True}, {**EVERYTHING}]
)
def test_hopper_forward(options: dict[str, bool], packed: bool) -> None:
    target = Target.named("sm_90a")
    dims = [*product(HEAD_DIMS, repeat=2), (8, 40), (96, 136), (200, 72)]
    specs = [_spec("bfloat16", dim, dim_v, **options | {"packed": packed}) for dim, dim_v in dims]
    _check([job for spec in specs for job in jobs_of(spec, target) if job[0] in ("forward_hopper", "forward_list")])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bounded_left": True, "bounded_right": True},
        {"bounded_right": True, "alibi": True, "sinks": True},
        {"bounded_right": True, "softcap": True},
        {"bounded_right": True, "dropout": True},
        {**EVERYTHING},
    ],
)
def test_hopper_backward(options: dict[str, bool], packed: bool, dtype: str) -> None:
    specs = [_spec(dtype, dim, **options | {"packed": packed}) for dim in (40, *HEAD_DIMS)]
    jobs = [job for spec in specs for job in jobs_of(spec, Target.named("sm_90a"))]
    _check([job for job in jobs if job[0].startswith(("backward_hopper", "backward_finish", "backward_list"))])


@pytest.mark.usefixtures("compiler")
def test_unit_kernels_of_the_primitives_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sources"
    shutil.copytree(Path(__file__).parents[2] / "cuda_src", folder)
    shutil.copy(Path(__file__).parents[1] / "gpu" / "primitives.cu", folder)
    monkeypatch.setattr(jit, "_source_folder", lambda: folder)
    for head_dim, cols in ((64, 80), (256, 128)):
        tile = Tile(rows=64, cols=cols, stages=3)
        used = resources(
            jit.compile_variant("primitives", _spec("float16", head_dim), tile, Target.named("sm_90a")).log
        )
        assert len(used) == 7
        assert not any(kernel.spill_bytes or kernel.advisories for kernel in used.values())


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("path", [750, 800])
def test_forced_paths_compile_for_a_newer_gpu(path: int) -> None:
    jobs = jobs_of(_spec("float16", 128, **EVERYTHING), Target("sm_90a", path))
    _check(jobs)


@pytest.mark.usefixtures("compiler")
def test_params_are_packed_as_the_kernels_read_them() -> None:
    target = Target.named("sm_80")
    spec = _spec("bfloat16", 64, bias=True)
    text = jit.source("backward_bias", spec, tuning.tile_of("backward_bias", spec, target.path, 16))
    checks = [f"static_assert(sizeof(Params) == {launch.PARAMS_STRUCT.size});"]
    checks += ["#pragma nv_diag_suppress 1427"]  # offsetof in a struct with bases
    for name, offset in launch.PARAMS_OFFSETS.items():
        checks.append(f"static_assert(__builtin_offsetof(Params, {name}) == {offset});")
    toolchain.compile_cubin(text + "\n".join(checks), target, name="params.cu")
    with pytest.raises(toolchain.KernelCompileError, match="static assertion failed"):
        toolchain.compile_cubin(text + checks[0].replace("==", "!="), target, name="params.cu")
    spec = tuning.kernel_spec("backward_prepare", spec)
    text = jit.source("backward_prepare", spec, tuning.tile_of("backward_prepare", spec, target.path, 16))
    size = launch.PARAMS_OFFSETS["bias.data"]
    toolchain.compile_cubin(f"{text}static_assert(sizeof(Params) == {size});", target, name="params.cu")


@pytest.mark.parametrize("dense", [{}, {"bias": True}, {"bias": True, "deterministic": True}, {"mask": True}])
def test_every_head_dim_has_a_tile_that_fits(dense: dict[str, bool]) -> None:
    counts: Counter[str] = Counter()
    for path, limit in tuning.SHARED_MEMORY.items():
        dtypes = ("float16",) if path < 800 else ("float16", "bfloat16", "float32")
        for dtype, head_dim, head_dim_v in product(dtypes, range(1, 257, 5), (1, 8, 64, 128, 129, 192, 256)):
            for lean, backward in ((False, False), (False, True), (True, True)):
                spec = _spec(dtype, head_dim, head_dim_v, lean=lean, **dense)
                if backward:
                    spec = tuning.served(spec, path)
                tiles = tuning.tiles_of(tuning.kernels_of(spec, backward=backward), spec, path, 16)
                for name, tile in tiles.items():
                    assert tuning.shared_bytes(name, tuning.kernel_spec(name, spec), tile) <= limit
                    assert path >= 800 or tile.stages == 1
                    counts[name] += 1
                if "backward_finish" in tiles:
                    assert tiles["backward_finish"].rows == tiles["backward_portable"].rows
    expected = {"forward_portable", "backward_prepare", "backward_portable", "backward_portable_dq"}
    if not dense:
        expected.add("backward_finish")
    elif "bias" in dense:
        expected.add("backward_bias")
    assert set(counts) == expected


@pytest.mark.parametrize(
    ("fields", "sums"),
    [
        ({}, True),
        ({"packed": True, "sinks": True, "bounded_left": True}, True),
        ({"lean": True}, False),
        ({"deterministic": True}, False),
        ({"softcap": True}, False),
        ({"alibi": True}, False),
        ({"dropout": True}, False),
        ({"bias": True}, False),
        ({"mask": True}, False),
    ],
)
def test_which_portable_backward_sums_dq(fields: dict[str, bool], sums: bool) -> None:
    """In one kernel where registers and shared memory suffice and nobody asks for the same bits or less memory."""
    spec = tuning.served(_spec("bfloat16", 128, **fields), 800)
    assert spec.lean != sums
    names = tuning.kernels_of(spec, backward=True)
    assert ("backward_finish" in names, "backward_portable_dq" in names) == (sums, not sums)


def test_where_no_portable_backward_sums_dq() -> None:
    assert tuning.served(_spec("float32", 64), 800).lean
    assert tuning.served(_spec("bfloat16", 256), 860).lean  # 64 queries and keys do not fit
    assert not tuning.served(_spec("bfloat16", 256), 800).lean
    assert not tuning.served(_spec("float16", 64), 750).lean
    assert tuning.served(_spec("float16", 64), 750, shared_limit=40_000).lean


@pytest.mark.parametrize("how", [{}, {"deterministic": True}, {"lean": True}, {"softcap": True}])
def test_every_aligned_head_dim_has_a_hopper_backward_that_fits(how: dict[str, bool]) -> None:
    for head_dim in range(8, 257, 8):
        spec = _spec("bfloat16", head_dim, **how)
        if not tuning.has_hopper(spec, backward=True):
            assert head_dim > 128
            assert spec.softcap
            continue
        names = tuning.kernels_of(spec, backward=True, hopper=True)
        assert names[0] == "backward_prepare"
        for name in names:
            known = tuning.kernel_spec(name, spec)
            tile = tuning.tile_of(name, known, 900, 16)
            assert tuning.shared_bytes(name, known, tile) <= tuning.SHARED_MEMORY[900]
    assert not tuning.has_hopper(_spec("bfloat16", 64, 128), backward=True)
    assert not tuning.has_hopper(_spec("bfloat16", 60), backward=True)


@pytest.mark.parametrize("options", [{}, {"dropout": True}, {"packed": True}])
def test_every_aligned_head_dim_has_a_hopper_tile_that_fits(options: dict[str, bool]) -> None:
    for head_dim, head_dim_v in product(range(8, 257, 8), repeat=2):
        spec = _spec("float16", head_dim, head_dim_v, **options)
        assert tuning.has_hopper(spec, backward=False)
        tile = tuning.tile_of("forward_hopper", spec, 900, 16)
        assert tuning.shared_bytes("forward_hopper", spec, tile) <= tuning.SHARED_MEMORY[900]
        assert tile.cols in (32, 64, 80, 96, 112, 128)  # the products that cuda_src/wgmma.cuh has
        assert tile.cols >= (64 if spec.dropout else 80) or head_dim_v > 192  # with dropout multiples of 32
        assert tile.cols % 32 == 0 or not spec.dropout
    for spec in (_spec("float16", 68), _spec("float16", 64, 33), _spec("float16", 264), _spec("float32", 64)):
        assert not tuning.has_hopper(spec, backward=False)


@pytest.mark.parametrize(
    ("head_dim", "path", "shared_limit", "warps", "blocks"),
    [
        (192, 800, None, 4, 2),
        (256, 800, None, 8, 1),
        (256, 800, tuning.SHARED_MEMORY[900], 4, 2),  # a Hopper GPU that takes the older path
        (256, 900, None, 4, 2),
        (256, 860, None, 4, 1),  # no room for eight warps
    ],
)
def test_a_wide_forward_has_eight_warps_on_a_multiprocessor(
    head_dim: int, path: int, shared_limit: int | None, warps: int, blocks: int
) -> None:
    """Two thread blocks of four where its shared memory takes two, else one of eight."""
    tile = tuning.tile_of("forward_portable", _spec("bfloat16", head_dim), path, 16, shared_limit)
    assert (tile.warps, tile.blocks) == (warps, blocks)


def test_shared_memory_sums() -> None:
    spec = _spec("bfloat16", 128)
    tile = tuning.tile_of("forward_portable", spec, 800, 16)
    row = 128 * 2 + 16  # a row of 128 bfloat16 and its padding
    assert tuning.shared_bytes("forward_portable", spec, tile) == row * (tile.rows + 2 * tile.stages * tile.cols)
    for lean in (True, False):
        spec = _spec("bfloat16", 128, lean=lean)
        tile = tuning.tile_of("backward_portable", spec, 800, 16)
        tiles = 2 * tile.stages if lean else tile.stages + 1  # of Q and LSE, and of dO and D
        expected = 2 * row * tile.cols + tiles * (row + 4) * tile.rows
        if not lean:  # P and dS
            assert tile.split > 1
            expected += 2 * tile.cols * (2 * tile.rows + 16)
        assert tuning.shared_bytes("backward_portable", spec, tile) == expected
    spec = _spec("bfloat16", 136, 72)  # panels of 64 columns: as 192 and 128
    tile = tuning.tile_of("forward_hopper", spec, 900, 16)
    # Of the next Q there is room for one warpgroup's half, and a slot has 16 bytes of barriers and 16 of its task.
    assert (tile.q_slots, tile.rows, tile.cols) == (2, 128, 128)
    expected = 2 * (192 * 64 * tile.q_slots + 2 * (192 + 128) * tile.cols) + 32 * (tile.q_slots + 2)
    assert tuning.shared_bytes("forward_hopper", spec, tile) == expected


def test_a_spec_is_reduced_to_what_a_kernel_depends_on() -> None:
    everything = _spec("bfloat16", 64, deterministic=True, **EVERYTHING)
    assert tuning.kernel_spec("backward_prepare", everything) == _spec("bfloat16", 64, packed=True)
    assert not tuning.kernel_spec("backward_portable_dq", everything).sinks
    assert not tuning.kernel_spec("backward_portable_dq", everything).deterministic
    with_bias = _spec("bfloat16", 64, deterministic=True, bias=True)
    assert tuning.kernel_spec("backward_portable_dq", with_bias) == with_bias
    assert not tuning.has_hopper(with_bias, backward=False)
    assert tuning.kernel_spec("backward_hopper", everything).lean  # registers do not suffice for dQ too
    assert tuning.kernel_spec("forward_portable", everything).sinks


@pytest.mark.parametrize("options", [{}, {"dropout": True}, {"bounded_right": True, "dropout": True}, EVERYTHING])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tasks_are_listed_in_the_tiles_of_the_kernel_that_takes_them(head_dim: int, options: dict[str, bool]) -> None:
    spec = _spec("bfloat16", head_dim, **options | {"packed": True})
    for backward, side in ((False, "rows"), (True, "cols")):  # tiles of queries, of keys
        if not tuning.has_hopper(spec, backward=backward):
            continue
        names = tuning.kernels_of(spec, backward=backward, hopper=True)
        place = names.index("backward_list" if backward else "forward_list")
        tiles = tuning.tiles_of(names, spec, 900, 16)
        listed, taken = (tiles[name] for name in names[place : place + 2])
        assert getattr(listed, side) == getattr(taken, side)
        dense = tuning.kernels_of(replace(spec, packed=False), backward=backward, hopper=True)
        assert dense == tuple(name for name in names if not name.endswith("_list"))


@pytest.mark.parametrize(
    ("spec", "path", "named"),
    [
        (_spec("float64", 64), 900, "float64"),
        (_spec("bfloat16", 64), 750, "bfloat16"),
        (_spec("float32", 64), 750, "float32"),
        (_spec("float16", 264), 900, "264"),
        (_spec("float16", 64, 300), 900, "300"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(spec: Spec, path: int, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        tuning.check_supported(spec, path)


def test_the_series_of_tanh_is_as_exact_as_its_comment_says() -> None:
    """TanhSeries of cuda_src/forward_hopper.cu, in float32 and in the order of the kernel."""
    text = Path(__file__).parents[2].joinpath("cuda_src", "forward_hopper.cu").read_text(encoding="utf-8")
    found = re.search(r"LIMIT = (\S+)f, a = (\S+)f, b = (\S+)f, c = (\S+)f;", text)
    assert found
    limit, a, b, c = (np.float32(number) for number in found.groups())
    for cap, scale in ((30.0, 0.125), (50.0, 0.088), (2.0, 1.0)):
        factor = np.float32(scale / cap)
        scores = np.linspace(-limit / factor, limit / factor, 100_001, dtype=np.float32)
        square, unit = limit * limit, factor * factor
        v = scores * scores - square / unit
        c0, c1 = factor * (a + square * (b + square * c)), factor * unit * (b + 2 * square * c)
        tanh = scores * (c0 + v * (c1 + v * (factor * unit * unit * c)))
        assert np.abs(tanh - np.tanh(scores.astype(np.float64) * factor)).max() < 2.2e-7
