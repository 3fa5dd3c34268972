"""Philox against Random123's known answers, and the mask of P as a pure function of seed and place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.dropout import keep_mask, limit, philox4x32, threshold

ONES = 0xFFFFFFFF

# counter, key, result: kat_vectors of Random123, philox 4x32 with 7 and with 10 rounds
KNOWN_ANSWERS_7 = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key, rounds=10)) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS_7)
def test_known_answers_of_seven_rounds(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_arrays_of_counters():
    counters, keys, expected = zip(*KNOWN_ANSWERS_7[:1] * 3, strict=True)
    words = philox4x32(tuple(np.array(counters).T), keys[0])
    np.testing.assert_array_equal(np.stack(words, axis=1), expected)


def rotated(word: int, bits: int) -> int:
    return word * 2**bits % 2**32 + word // 2 ** (32 - bits)


def one_element(seed: int, dropout_p: float, batch: int, head: int, q_index: int, kv_index: int) -> bool:
    """The scheme of cuflash.dropout, spelt out for one element of P: what every kernel must draw too."""
    a, s, g = q_index // 16, q_index // 8 % 2, q_index % 8
    b, t, c, u = kv_index // 64, kv_index // 8 % 8, kv_index // 2 % 4, kv_index % 2
    w0, w1, w2, w3 = map(int, philox4x32((8 * a + g, 4 * b + c, head, batch), (seed % 2**32, seed // 2**32)))
    mixed = (w0 ^ rotated(w2, 4), w1 ^ rotated(w3, 4), w2 ^ rotated(w1, 4), w3 ^ rotated(w0, 4))
    word = (w0, w1, w2, w3, *mixed)[2 * (t // 2) + s]
    if t % 2:
        word = rotated(word, 8)
    number = (word // 2**16 if u else word) % 2**15
    dropped = round(32768 * dropout_p)
    return number < 32768 - dropped if dropped > 16384 else number >= dropped


@pytest.mark.parametrize("dropout_p", [0.4, 0.8])
def test_the_scheme_element_by_element(dropout_p: float):
    seed, place = 0xA4093822299F31D0, (3, 5)
    mask = keep_mask(seed, dropout_p, *place, 30, 70, 0, 150)
    expected = [[one_element(seed, dropout_p, *place, q, kv) for kv in range(150)] for q in range(30, 70)]
    np.testing.assert_array_equal(mask, expected)


WHOLE = keep_mask(2**64 - 1, 0.3, 7, 2, 0, 90, 0, 75)


@given(st.tuples(st.integers(0, 90), st.integers(0, 90)), st.tuples(st.integers(0, 75), st.integers(0, 75)))
def test_any_part_is_cut_from_the_whole(rows: tuple[int, int], cols: tuple[int, int]):
    (q_start, q_stop), (kv_start, kv_stop) = sorted(rows), sorted(cols)
    mask = keep_mask(2**64 - 1, 0.3, 7, 2, q_start, q_stop, kv_start, kv_stop)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, WHOLE[q_start:q_stop, kv_start:kv_stop])


def test_far_places():
    far = 2**24
    mask = keep_mask(1, 0.5, 10**6, 10**4, far - 20, far, far - 20, far)
    expected = [[one_element(1, 0.5, 10**6, 10**4, q, kv) for kv in range(far - 20, far)] for q in range(far - 20, far)]
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.001, 0.1, 0.5, 0.5001, 0.9, 0.99, 0.999])
def test_keep_rate(dropout_p: float):
    mask = keep_mask(0, dropout_p, 0, 0, 0, 1024, 0, 1024)
    deviation = math.sqrt(max(dropout_p * (1 - dropout_p), 1e-12) / mask.size)
    # five standard deviations, and the rounding of the draw to 2^-15
    assert abs(mask.mean() - (1 - dropout_p)) < 5 * deviation + 2**-16


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.99])
def test_every_seed_keeps_its_share(dropout_p: float):
    seeds, size = 200, 128
    shares = np.array([keep_mask(seed, dropout_p, 0, 0, 0, size, 0, size).mean() for seed in range(seeds)])
    kept = 1 - threshold(dropout_p) / 32768
    # a share's variance, of elements of which each is correlated with two others
    variance = kept * (1 - kept) / size**2 * (1 + 2 * CORRELATION)
    assert abs(shares.mean() - kept) < 5 * math.sqrt(variance / seeds)
    assert abs(shares.var() / variance - 1) < 5 * math.sqrt((2 + 1 / (kept * (1 - kept) * size**2)) / seeds)


@pytest.mark.parametrize("dropout_p", [0.01, 0.2, 0.5, 0.9])
def test_every_element_keeps_its_share_over_seeds(dropout_p: float):
    seeds = 4000
    counts = sum(keep_mask(seed, dropout_p, 0, 0, 0, 16, 0, 32).astype(int) for seed in range(seeds))
    kept = 1 - threshold(dropout_p) / 32768
    # of 512 elements none beyond six standard deviations
    assert abs(counts - seeds * kept).max() < 6 * math.sqrt(seeds * kept * (1 - kept))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_rows_and_columns_are_as_different_as_chance_makes_them(dropout_p: float, axis: int):
    counts = keep_mask(0, dropout_p, 0, 0, 0, 1024, 0, 1024).sum(axis=axis)
    # the variance of 1024 binomial counts, within five of its standard deviations, sqrt(2 / 1024) (more for rare drops)
    expected = 1024 * dropout_p * (1 - dropout_p)
    assert abs(counts.var() / expected - 1) < 5 * math.sqrt((2 + 1 / expected) / 1024)


def test_threshold():
    assert threshold(0.0) == 0
    assert threshold(0.5) == 16384
    assert threshold(0.1) == 3277
    assert keep_mask(5, 0.0, 0, 0, 0, 64, 0, 64).all()


def test_the_rarer_outcome_is_drawn():
    assert limit(0.0) == (0, False)
    assert limit(0.1) == (3277, False)
    assert limit(0.5) == (16384, False)
    assert limit(0.5 + 2**-15) == (16383, True)
    assert limit(0.9) == (3277, True)
    assert limit(math.nextafter(1, 0)) == (0, True)
    assert not keep_mask(5, math.nextafter(1, 0), 0, 0, 0, 64, 0, 64).any()


# Of two elements of a counter that share a byte, the largest correlation over all dropout_p, at 129 / 32768.
CORRELATION = 1 / 257


def correlation_of_sharers(below: int) -> float:
    """The correlation of two numbers' being below a limit, where a random byte is the lower one of the first number
    and, its upper bit aside, the upper one of the second. The other bytes of both are random too."""
    upper, lower = divmod(below, 256)
    byte = np.arange(256)
    first = (upper + (byte < lower)) / 128  # the probability that the first is below, given the byte
    second = (byte % 128 < upper) + (byte % 128 == upper) * lower / 256
    share = below / 32768
    return ((first * second).mean() - share**2) / (share * (1 - share))


def test_the_largest_correlation():
    correlations = [correlation_of_sharers(below) for below in range(1, 16385)]
    assert min(correlations) > -1e-12
    assert max(correlations) == pytest.approx(CORRELATION)
    assert correlations[threshold(0.5) - 1] == 0


@pytest.mark.parametrize("dropout_p", [129 / 32768, 0.1, 0.2, 0.5, 0.8])
def test_correlations_of_the_elements_of_a_counter(dropout_p: float):
    size = 2048
    mask = keep_mask(0, dropout_p, 0, 0, 0, size, 0, 2 * size)
    blocks = mask.reshape(size // 16, 2, 8, 2 * size // 64, 8, 4, 2)  # a, s, g, b, t, c, u
    elements = blocks.transpose(1, 4, 6, 0, 2, 3, 5).reshape(32, -1)  # [(s, t, u), counter]
    # By s and t // 2 a word, and in that by t % 2 and u the upper byte, as its number in the word. The lower byte of
    # each is the one before.
    upper_byte = np.array([[1, 3], [0, 2]])
    word = np.arange(32) // 4
    upper = np.tile(upper_byte.ravel(), 8)
    shares = (word[:, None] == word) & ((upper[:, None] - upper) % 2 == 1)
    expected = np.where(shares, correlation_of_sharers(limit(dropout_p)[0]), np.eye(32))
    # of 496 pairs none beyond six standard deviations
    assert abs(np.corrcoef(elements) - expected).max() < 6 / math.sqrt(elements.shape[1])


@pytest.mark.parametrize(("dropout_p", "times"), [(0.1, 1.3), (0.5, 1.02)])
def test_three_elements_of_two_words_and_their_mixture(dropout_p: float, times: float):
    """How often all three are dropped, of what independent ones are."""
    size = 4096
    drops = ~keep_mask(0, dropout_p, 0, 0, 0, size, 0, size)
    blocks = drops.reshape(size // 16, 2, 8, size // 64, 4, 2, 4, 2)  # a, s, g, b, t // 2, t % 2, c, u
    words = blocks.transpose(4, 1, 5, 7, 0, 2, 3, 6).reshape(8, 4, -1).astype(np.float32)  # [word, element, counter]
    counters, p = words.shape[2], round(32768 * dropout_p) / 32768
    most = 0.0
    for mixture, (one, other) in zip(words[4:], ((0, 2), (1, 3), (2, 1), (3, 0)), strict=True):
        both = (words[one][:, None] * words[other]).reshape(16, -1)
        most = max(most, float((both @ mixture.T).max()) / counters / p**3)
    assert most < times + 4 / math.sqrt(counters * p**3)


MASKS_THAT_DIFFER = {
    "seed, low word": (1, 0, 0),
    "seed, high word": (2**32, 0, 0),
    "batch": (0, 1, 0),
    "head": (0, 0, 1),
    "batch and head": (0, 1, 1),
}


@pytest.mark.parametrize("name", MASKS_THAT_DIFFER)
def test_independent_of_every_other(name: str):
    seed, batch, head = MASKS_THAT_DIFFER[name]
    size = 512
    first = keep_mask(0, 0.5, 0, 0, 0, size, 0, size)
    other = keep_mask(seed, 0.5, batch, head, 0, size, 0, size)
    # of independent masks half the elements agree, within five standard deviations
    assert abs((first == other).mean() - 0.5) < 5 * 0.5 / size


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (8, 0), (0, 8), (8, 8), (16, 0), (0, 16), (0, 24), (0, 32)])
def test_neighbours_are_independent(step: tuple[int, int]):
    size = 512
    mask = keep_mask(0, 0.5, 0, 0, 0, size + 16, 0, size + 32)
    shifted = mask[step[0] : step[0] + size, step[1] : step[1] + size]
    assert abs((mask[:size, :size] == shifted).mean() - 0.5) < 5 * 0.5 / size
