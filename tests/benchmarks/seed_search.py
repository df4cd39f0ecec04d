"""Trying all seeds of ``numpy.random.RandomState`` that Flower's mask generator can have.

``pseudo_rand_gen`` folds its key, 44 characters of base64, into 32 bits by exclusive or. Characters are
below 128, so bits 7, 15, 23 and 31 of the result are always zero: 2^28 seeds are left. Words of its stream
are raw outputs of MT19937 (Matsumoto and Nishimura 1998), and output i depends on the state's words i, i + 1
and i + 397 alone: 398 steps of the seeding recurrence decide about a seed. numpy does them for a block of
seeds at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

SEED_BITS = 28
SEEDS = 1 << SEED_BITS
BLOCK = 1 << 15
"""Seeds at a time: the two arrays of a block stay in the processor's second-level cache."""

Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint32]]
_MULTIPLIER = np.uint32(1812433253)
_TWIST = np.uint32(0x9908B0DF)


def seeds_from_index(index: Words) -> Words:
    """The index-th seed: 7 bits of the index in each byte."""
    spread = np.zeros_like(index)
    for byte in range(4):
        spread |= (index >> np.uint32(7 * byte) & np.uint32(0x7F)) << np.uint32(8 * byte)
    return spread


def index_of_seed(seed: int) -> int:
    """The inverse of :func:`seeds_from_index`."""
    return sum((seed >> 8 * byte & 0x7F) << 7 * byte for byte in range(4))


def first_two_outputs(seeds: Words) -> tuple[Words, Words]:
    """What ``RandomState(seed)`` gives first and second as 32-bit words, for each seed."""
    state, shifted = seeds.copy(), np.empty_like(seeds)
    kept: dict[int, Words] = {0: seeds}
    for position in range(1, 399):
        np.right_shift(state, np.uint32(30), out=shifted)
        np.bitwise_xor(state, shifted, out=state)
        np.multiply(state, _MULTIPLIER, out=state)
        np.add(state, np.uint32(position), out=state)
        if position in (1, 2, 397, 398):
            kept[position] = state.copy()
    return _output(kept[0], kept[1], kept[397]), _output(kept[1], kept[2], kept[398])


def _output(word: Words, following: Words, distant: Words) -> Words:
    joined = (word & np.uint32(0x80000000)) | (following & np.uint32(0x7FFFFFFF))
    y = distant ^ (joined >> np.uint32(1)) ^ np.where(joined & np.uint32(1), _TWIST, np.uint32(0))
    y ^= y >> np.uint32(11)
    y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
    y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
    return y ^ (y >> np.uint32(18))


def fitting_seeds(
    masked: tuple[int, int],
    *,
    fits: Callable[[Words], np.ndarray[tuple[int], np.dtype[np.bool_]]],
    start: int = 0,
    stop: int = SEEDS,
) -> Iterator[tuple[int, int]]:
    """(seed, sign) for which the first two masked words, less the mask with that sign, may be plain.

    Args:
        masked: Two words modulo 2^32, all other masks already removed.
        fits: Whether a word may be one of a plain vector.
        start, stop: Range of seed indices to try.
    """
    first, second = np.uint32(masked[0]), np.uint32(masked[1])
    for begin in range(start, stop, BLOCK):
        seeds = seeds_from_index(np.arange(begin, min(begin + BLOCK, stop), dtype=np.uint32))
        one, two = first_two_outputs(seeds)
        for sign, left, right in ((1, first - one, second - two), (-1, first + one, second + two)):
            for position in np.flatnonzero(fits(left) & fits(right)):
                yield int(seeds[position]), sign
