"""Masks against their dense form, which is checked against the definition, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.masking import Mask, causal, full, window

LENGTHS = st.integers(0, 12)
BOUNDS = st.none() | st.integers(0, 14)
BANDS = st.builds(window, BOUNDS, BOUNDS)
# Positions may be offset for one part of a sequence, and bounds negative; a band of negative width is empty.
SHIFTED_BANDS = st.builds(lambda left, width: window(left, width - left), st.integers(-8, 8), st.integers(-2, 6))
MASKS = BANDS | SHIFTED_BANDS | st.builds(lambda band: causal() & band, BANDS)


def by_definition(mask: Mask, q_len: int, kv_len: int) -> np.ndarray:
    dense = np.zeros((q_len, kv_len), dtype=bool)
    for q_index in range(q_len):
        for kv_pos in range(kv_len):
            q_pos = q_index + kv_len - q_len
            not_before = mask.left is None or q_pos - mask.left <= kv_pos
            not_after = mask.right is None or kv_pos <= q_pos + mask.right
            dense[q_index, kv_pos] = not_before and not_after
    return dense


def spanned(keep: np.ndarray) -> tuple[int, int] | None:
    """The first and one past the last True, None where there is none."""
    places = np.flatnonzero(keep)
    return (int(places[0]), int(places[-1]) + 1) if places.size else None


@st.composite
def part(draw: st.DrawFn, length: int) -> tuple[int, int]:
    """A part [start, stop) of an axis that has at least one element."""
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


def test_pictures():
    def picture(mask: Mask, q_len: int, kv_len: int) -> list[str]:
        return ["".join("X" if keep else "." for keep in row) for row in mask.dense(q_len, kv_len)]

    assert picture(full(), 2, 3) == ["XXX", "XXX"]
    assert picture(causal(), 3, 3) == ["X..", "XX.", "XXX"]
    assert picture(causal(), 2, 4) == ["XXX.", "XXXX"]
    assert picture(causal(), 4, 2) == ["..", "..", "X.", "XX"]
    assert picture(window(1, 0), 4, 4) == ["X...", "XX..", ".XX.", "..XX"]
    assert picture(window(0, 1), 2, 4) == ["..XX", "...X"]
    assert picture(causal() & window(1, 5), 3, 3) == ["X..", "XX.", ".XX"]


@given(MASKS, LENGTHS, LENGTHS)
def test_dense_is_the_definition(mask: Mask, q_len: int, kv_len: int):
    np.testing.assert_array_equal(mask.dense(q_len, kv_len), by_definition(mask, q_len, kv_len))


@given(MASKS, LENGTHS, LENGTHS)
def test_allowed_is_the_dense_form_at_positions(mask: Mask, q_len: int, kv_len: int):
    dense = mask.dense(q_len, kv_len)
    for q_index in range(q_len):
        allowed = mask.allowed(np.array(q_index + kv_len - q_len), np.arange(kv_len))
        np.testing.assert_array_equal(allowed, dense[q_index])


@given(MASKS, MASKS, LENGTHS, LENGTHS)
def test_and_is_the_intersection(a: Mask, b: Mask, q_len: int, kv_len: int):
    both = a.dense(q_len, kv_len) & b.dense(q_len, kv_len)
    np.testing.assert_array_equal((a & b).dense(q_len, kv_len), both)
    assert a & b == b & a
    assert a & full() == a


@given(MASKS, LENGTHS, LENGTHS)
def test_count(mask: Mask, q_len: int, kv_len: int):
    assert mask.count(q_len, kv_len) == mask.dense(q_len, kv_len).sum()


def test_count_of_a_long_sequence():
    length = 1 << 17
    assert causal().count(length, length) == length * (length + 1) // 2


@given(st.data(), MASKS, st.integers(1, 12), LENGTHS)
def test_kv_range_spans_what_any_query_attends_to(data: st.DataObject, mask: Mask, q_len: int, kv_len: int):
    q_start, q_stop = data.draw(part(q_len))
    start, stop = mask.kv_range(q_start, q_stop, q_len, kv_len)
    assert 0 <= start <= stop <= kv_len
    expected = spanned(mask.dense(q_len, kv_len)[q_start:q_stop].any(axis=0))
    assert (start, stop) == expected if expected else start == stop


@given(st.data(), MASKS, st.integers(1, 12), LENGTHS)
def test_kv_range_unmasked_spans_what_all_queries_attend_to(data: st.DataObject, mask: Mask, q_len: int, kv_len: int):
    q_start, q_stop = data.draw(part(q_len))
    start, stop = mask.kv_range_unmasked(q_start, q_stop, q_len, kv_len)
    assert 0 <= start <= stop <= kv_len
    expected = spanned(mask.dense(q_len, kv_len)[q_start:q_stop].all(axis=0))
    assert (start, stop) == expected if expected else start == stop


@given(st.data(), MASKS, LENGTHS, st.integers(1, 12))
def test_q_range_spans_the_queries_that_attend_to_any_key(data: st.DataObject, mask: Mask, q_len: int, kv_len: int):
    kv_start, kv_stop = data.draw(part(kv_len))
    start, stop = mask.q_range(kv_start, kv_stop, q_len, kv_len)
    assert 0 <= start <= stop <= q_len
    expected = spanned(mask.dense(q_len, kv_len)[:, kv_start:kv_stop].any(axis=1))
    assert (start, stop) == expected if expected else start == stop


def test_a_mask_is_a_value():
    assert causal() == window(None, 0) == Mask(right=0)
    assert len({causal(), window(None, 0), full()}) == 2
    with pytest.raises(AttributeError):
        causal().right = 1
