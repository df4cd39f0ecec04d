"""The attack of ``python -m tests.benchmarks known_break``, over the few seeds around the right one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from tests.benchmarks import known_break, seed_search  # noqa: E402


def test_the_first_words_are_those_of_numpy() -> None:
    indices = np.arange(5, seed_search.SEEDS, seed_search.SEEDS // 50, dtype=np.uint32)
    seeds = seed_search.seeds_from_index(indices)
    first, second = seed_search.first_two_outputs(seeds)
    for index, seed, one, two in zip(indices, seeds, first, second, strict=True):
        drawn = np.random.RandomState(int(seed)).randint(0, 2**32 - 1, 2, dtype=np.int64)
        assert drawn.tolist() == [one, two]
        assert seed_search.index_of_seed(int(seed)) == index


def test_a_curious_server_opens_flowers_masks_and_finds_nothing_in_ours(monkeypatch) -> None:
    """The pair mask's seed is noted when a client expands it, and only its neighbourhood is searched."""
    folded: list[int] = []
    real = known_break.pseudo_rand_gen

    def noted(seed: bytes, num_range: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        folded.append(int(np.bitwise_xor.reduce(np.frombuffer(seed, dtype="<u4"))))
        return real(seed, num_range, shapes)

    module = sys.modules["flwr.client.mod.secure_aggregation.secaggplus_mod"]
    monkeypatch.setattr(module, "pseudo_rand_gen", noted)
    view = known_break.curious_view()
    self_seed, pair_seed = folded[0], folded[1]
    assert pair_seed & 0x80808080 == 0, "28 bits at most"
    near = max(0, seed_search.index_of_seed(pair_seed) - 20_000)
    found = known_break.search(view, fits=known_break.fits_flower, start=near, stop=near + 40_000)
    assert found.seed == pair_seed != self_seed
    assert found.plain is not None
    examples, _ = known_break.opened_update(found.plain)
    assert round(examples) == known_break.EXAMPLES
    assert known_break.worst_error(found.plain) < 1e-4

    masked, truth, control = known_break.our_view()
    np.testing.assert_array_equal(control, truth)
    ours = known_break.search(masked, fits=known_break.fits_ours, start=near, stop=near + 40_000)
    assert ours.seed is None


def test_swapped_keys_open_flower_and_are_refused_by_ours() -> None:
    assert known_break.worst_error(known_break.swapped_keys_view()) < 1e-4
    assert known_break.our_refusal_of_swapped_keys() == "bad_key_signature"
