"""A Spec and a Tile are values, and their text is the whole cache key: every field in it, by name, in order."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from cuflash.masking import causal
from cuflash.spec import DTYPES, Problem, Spec, Tile

SPEC = Spec(dtype="bfloat16", head_dim=128, head_dim_v=64, bounded_right=True, sinks=True)
TILE = Tile(rows=128, cols=64, stages=2)


def initialisers(text: str) -> dict[str, str]:
    """name -> value of `.name = value,` lines."""
    lines = [line for line in text.splitlines() if line.startswith("    .")]
    return dict(line.removeprefix("    .").removesuffix(",").split(" = ") for line in lines)


@pytest.mark.parametrize(
    ("value", "first", "expected"),
    [
        (
            SPEC,
            "constexpr Spec SPEC{",
            {
                "dtype": "Dtype::bfloat16",
                "head_dim": "128",
                "head_dim_v": "64",
                "bounded_left": "false",
                "bounded_right": "true",
                "softcap": "false",
                "alibi": "false",
                "sinks": "true",
                "packed": "false",
                "dropout": "false",
                "deterministic": "false",
            },
        ),
        (TILE, "constexpr Tile TILE{", {"rows": "128", "cols": "64", "stages": "2"}),
    ],
)
def test_render(value: Spec | Tile, first: str, expected: dict[str, str]):
    text = value.render()
    assert text.splitlines()[0] == first
    assert text.endswith("};\n")
    rendered = initialisers(text)
    assert {name: rendered[name] for name in expected} == expected
    # C++ wants designated initialisers in the order of declaration
    assert list(rendered) == [field.name for field in fields(value)]


@pytest.mark.parametrize("value", [SPEC, TILE], ids=["Spec", "Tile"])
def test_every_field_is_in_the_text(value: Spec | Tile):
    for field in fields(value):
        before = getattr(value, field.name)
        if isinstance(before, str):
            after: object = next(dtype for dtype in DTYPES if dtype != before)
        else:
            after = not before if isinstance(before, bool) else before + 1
        changed = replace(value, **{field.name: after})
        assert initialisers(changed.render())[field.name] != initialisers(value.render())[field.name]


def test_equal_specs_have_equal_text():
    assert replace(SPEC).render() == SPEC.render()
    assert len({SPEC, replace(SPEC)}) == 1


def test_values_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        SPEC.head_dim = 64
    with pytest.raises(TypeError):
        Tile(128, 64)


def test_group_of_a_problem():
    problem = Problem(
        spec=SPEC,
        mask=causal(),
        batch=1,
        heads=8,
        kv_heads=2,
        q_len=5,
        kv_len=7,
        scale=1.0,
        softcap=None,
        dropout_p=0.0,
        seed=0,
    )
    assert problem.group == 4
