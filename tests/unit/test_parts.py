"""Few queries over many keys: which calls have thread blocks share the keys, and how they divide them. No GPU."""

from __future__ import annotations

from typing import Any

import pytest

from cuflash import arrays, plans, tuning
from cuflash.arrays import Signature
from cuflash.cuda.flat import flat
from cuflash.cuda.launch import Machine, Step
from cuflash.cuda.toolchain import Target

OPTIONS = {
    "causal": False,
    "window_size": None,
    "scale": None,
    "softcap": None,
    "dropout_p": 0.0,
    "seeded": False,
    "deterministic": False,
    "allow_tf32": False,
    "layout": "bshd",
    "backend": None,
}


def _array(*shape: int, dtype: str = "bfloat16") -> Signature:
    return plans.contiguous(arrays.Signature(shape, (), dtype, "cuda:0", True))


def _machine(arch: str = "sm_90a", multiprocessors: int = 132) -> Machine:
    target = Target.named(arch)
    return Machine(target, multiprocessors, tuning.SHARED_MEMORY[target.path])


def _steps(
    q: tuple[int, ...], kv: tuple[int, ...], machine: Machine, extras: dict[str, Signature], **options: Any
) -> tuple[list[Step], dict[str, int]]:
    given = [extras.get(name) for name in plans.INPUTS[3:]]
    plan = plans.forward(_array(*q), _array(*kv), _array(*kv), *given, *(OPTIONS | options).values())
    launches, workspace = plan.steps(machine)[0]
    return list(launches), workspace


@pytest.mark.parametrize("window", [None, (3_000, 0), (None, 0)])
@pytest.mark.parametrize("kv_len", [1_024, 1_500, 65_536, 1_000_003])
@pytest.mark.parametrize("q_len", [1, 5, 64])
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 32, 8), (7, 12, 12), (64, 8, 1)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a"])
def test_every_key_is_in_one_part(
    arch: str, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, window: Any
) -> None:
    machine = _machine(arch)
    q, kv = (batch, q_len, heads, 128), (batch, kv_len, kv_heads, 128)
    (first, *rest), workspace = _steps(q, kv, machine, {}, window_size=window)
    rows = q_len * heads // kv_heads
    if rows > 16 and batch * heads >= machine.multiprocessors:
        assert not first.spec.parts
        assert not rest
        return
    assert first.spec.parts
    assert [step.kernel for step in (first, *rest)] == ["forward_portable", "forward_combine"]
    parts, tiles = first.values["parts"], first.values["part_tiles"]
    cols = first.tile.cols
    start = 0 if window is None or window[0] is None else max(0, kv_len - q_len - window[0])
    visited = -(-kv_len // cols) - start // cols
    assert 1 <= parts <= tuning.MOST_PARTS
    assert (parts - 1) * tiles < visited + 1  # one more where the first tile of the whole range is cut
    assert visited <= parts * tiles
    assert parts == 1 or tiles >= 4
    assert first.blocks == batch * kv_heads * -(-rows // first.tile.rows) * parts
    assert rest[0].blocks == batch * heads * q_len
    assert workspace == {"partial": 4 * parts * batch * heads * q_len * (2 + 128)}


def test_one_query_fills_the_gpu() -> None:
    (first, _), _ = _steps((1, 1, 32, 128), (1, 65_536, 8, 128), _machine(), {})
    assert 2 * 132 <= first.blocks <= 3 * 132
    assert 2 * (first.shared_bytes + 1024) <= tuning.SHARED_MEMORY[900]


@pytest.mark.parametrize(
    ("q", "kv", "extras", "options"),
    [
        ((1, 65, 2, 64), (1, 4_096, 2, 64), {}, {}),
        ((1, 1, 2, 64), (1, 1_023, 2, 64), {}, {}),
        ((1, 1, 2, 64), (1, 4_096, 2, 64), {}, {"window_size": (500, 0)}),
        ((1, 1, 2, 64), (1, 4_096, 2, 64), {}, {"dropout_p": 0.1, "seeded": True}),
        ((1, 1, 2, 64), (1, 4_096, 2, 64), {"bias": _array(1, 4_096, dtype="float32")}, {}),
        ((1, 1, 2, 64), (1, 4_096, 2, 64), {"mask": _array(1, 4_096, dtype="bool")}, {}),
        (
            (3, 2, 64),
            (4_096, 2, 64),
            {name: _array(4, dtype="int32") for name in ("cu_seqlens_q", "cu_seqlens_k")},
            {},
        ),
        ((0, 1, 2, 64), (0, 4_096, 2, 64), {}, {}),
    ],
)
def test_other_calls_take_the_kernels_of_before(
    q: tuple[int, ...], kv: tuple[int, ...], extras: dict[str, Signature], options: dict[str, Any]
) -> None:
    launches, _ = _steps(q, kv, _machine(), extras, **options)
    assert not any(step.spec.parts or step.kernel == "forward_combine" for step in launches)


def test_a_flat_entry_writes_the_parts_and_the_next_one_the_results() -> None:
    sinks = {"sinks": _array(8, dtype="float32")}
    launches, workspace = _steps((1, 1, 8, 64), (1, 4_096, 2, 64), _machine(), sinks)
    names = {"q", "k", "v", "out", "lse", "sinks", *workspace}
    first, second = (flat(step, names) for step in launches)
    assert first.writes == ("partial",)
    assert second.reads == ("sinks", "partial")
    assert second.writes == ("out", "lse")
