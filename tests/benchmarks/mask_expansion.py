"""Expanding one mask: ours (AES-256-CTR) against Flower's SecAgg+ generator, the same number of words.

Flower's function is called as its public package has it; it makes 64-bit words from a 32-bit seed.
"""

from __future__ import annotations

import os

from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from privacy.keystream import Keystream
from tests.benchmarks.measuring import median_seconds, ratio_table

WORDS = 3_000_000


def run() -> str:
    """The table of this run."""
    key = os.urandom(32)
    seconds = median_seconds(
        {
            "Lacuna, AES-256-CTR, uint32": lambda: Keystream(key).read_uint32(WORDS),
            "Flower SecAgg+, pseudo_rand_gen, int64": lambda: pseudo_rand_gen(key, 1 << 32, [(WORDS,)]),
        },
        repeats=5,
    )
    return ratio_table(f"one mask of {WORDS:,} words", seconds, base="Lacuna, AES-256-CTR, uint32")
