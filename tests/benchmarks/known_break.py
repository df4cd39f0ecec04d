"""Flower's SecAgg+ opened by a curious server, and by one that swaps keys; then the same attacks on ours.

The curious server follows the protocol. One of three hospitals drops between sharing keys and uploading, so
the server rightly learns the others' self masks and the missing one's pair masks; one pair mask is left on
the victim's vector, and its generator has 2^28 seeds (:mod:`seed_search`). In ours the server gets the same,
from a colluding hospital where ours does not reveal it, so that one pair mask is left there too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)
from numpy.typing import NDArray

from privacy.secagg.keys import agree, pair_mask_key, public_key, self_mask_key
from privacy.secagg.masking import apply_streams, centre, from_bytes
from privacy.secagg.messages import UploadReply
from privacy.secagg.reasons import AggregationRefusedError
from privacy.secagg.session import Roster, Session
from privacy.secagg.shamir import combine_shares as combine_our_shares
from privacy.secagg.statements import UploadTerms, key_set_digest
from tests.benchmarks.flower_secagg import (
    CLIPPING_RANGE,
    MAX_WEIGHT,
    MODULUS,
    TARGET_RANGE,
    FlowerClient,
    FlowerServer,
)
from tests.benchmarks.our_secagg import HASHES, OurConsortium
from tests.benchmarks.seed_search import SEEDS, Words, fitting_seeds

SHAPES: list[tuple[int, ...]] = [(64, 32), (64,)]
EXAMPLES = 137
VICTIM, PEER, MISSING = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search over seeds gave. ``plain`` is the opened vector, None where no seed fits."""

    seed: int | None
    plain: NDArray[np.int64] | None
    tried: int
    passed_two_words: int
    seconds: float


def search(
    masked: Words,
    *,
    fits: Callable[[Words], NDArray[np.bool_]],
    start: int = 0,
    stop: int = SEEDS,
) -> Search:
    """The seed whose stream leaves a plain vector; all seeds of the range are tried, found or not."""
    started, seed, plain, passed = time.perf_counter(), None, None, 0
    for candidate, sign in fitting_seeds((int(masked[0]), int(masked[1])), fits=fits, start=start, stop=stop):
        passed += 1
        stream = pseudo_rand_gen(candidate.to_bytes(4, "little"), MODULUS, [(len(masked),)])[0]
        opened = masked - np.uint32(sign & 0xFFFFFFFF) * stream.astype(np.uint32)
        if fits(opened).all():
            seed, plain = candidate, opened.astype(np.int64)
    return Search(
        seed=seed,
        plain=plain,
        tried=stop - start,
        passed_two_words=passed,
        seconds=time.perf_counter() - started,
    )


# -- Flower ----------------------------------------------------------------------------------------------


def hospital_updates() -> dict[int, list[NDArray[np.float32]]]:
    """Updates of three hospitals, of the size that weights change in a round."""
    generator = np.random.default_rng(7)
    return {
        node: [generator.normal(0, 0.05, shape).astype(np.float32) for shape in SHAPES]
        for node in (VICTIM, PEER, MISSING)
    }


def flower_consortium() -> FlowerServer:
    updates = hospital_updates()
    clients = [FlowerClient(node, update, num_examples=EXAMPLES) for node, update in updates.items()]
    server = FlowerServer(clients, threshold=2)
    server.set_up()
    return server


def fits_flower(words: Words) -> NDArray[np.bool_]:
    """Flower's plain words are weights and quantized coordinates, 0 to 2^22."""
    return words <= np.uint32(TARGET_RANGE)


def curious_view() -> Words:
    """The victim's vector with one pair mask left, from what an honest run gives the server."""
    server = flower_consortium()
    for node in server.clients:
        server.share_keys(node, server.public_keys)
    masked = {node: server.collect(node) for node in (VICTIM, PEER)}
    shares = server.unmask([VICTIM, PEER], [MISSING])
    shapes = [part.shape for part in masked[VICTIM]]
    self_mask = pseudo_rand_gen(combine_shares(shares[VICTIM]), MODULUS, shapes)
    agreed = generate_shared_key(
        bytes_to_private_key(combine_shares(shares[MISSING])),
        bytes_to_public_key(server.public_keys[VICTIM][0]),
    )
    pair_mask = pseudo_rand_gen(agreed, MODULUS, shapes)
    left = [part - own + pair for part, own, pair in zip(masked[VICTIM], self_mask, pair_mask, strict=True)]
    return _flat(left)


def swapped_keys_view() -> NDArray[np.int64]:
    """The victim's plain words, from a server that gives it keys of its own making for both peers."""
    server = flower_consortium()
    own = {peer: (generate_key_pairs(), generate_key_pairs()) for peer in (PEER, MISSING)}
    told = {
        VICTIM: server.public_keys[VICTIM],
        **{
            peer: (public_key_to_bytes(mask[1]), public_key_to_bytes(sealing[1]))
            for peer, (mask, sealing) in own.items()
        },
    }
    mask_public, share_public = (bytes_to_public_key(key) for key in server.public_keys[VICTIM])
    seed_shares = []
    for peer, ciphertext in server.share_keys(VICTIM, told).items():
        agreed = generate_shared_key(own[peer][1][0], share_public)
        seed_shares.append(share_keys_plaintext_separate(decrypt(agreed, ciphertext))[2])
        forged = share_keys_plaintext_concat(peer, VICTIM, b"anything", b"anything")
        server.shares_for[VICTIM][peer] = encrypt(agreed, forged)
    masked = server.collect(VICTIM)
    shapes = [part.shape for part in masked]
    streams = [pseudo_rand_gen(combine_shares(seed_shares), MODULUS, shapes)]
    pairs = [
        pseudo_rand_gen(generate_shared_key(mask[0], mask_public), MODULUS, shapes)
        for mask, _ in own.values()
    ]
    left = _flat(masked) - _flat(streams[0]) + sum((_flat(pair) for pair in pairs[1:]), _flat(pairs[0]))
    return left.astype(np.int64)


def opened_update(plain: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
    """(number of examples, update) from Flower's plain words, by Flower's own dequantization."""
    ratio = float(plain[0]) / TARGET_RANGE
    weighted = dequantize([plain[1:]], CLIPPING_RANGE, TARGET_RANGE)[0]
    return ratio * MAX_WEIGHT, weighted / ratio


def worst_error(plain: NDArray[np.int64]) -> float:
    """Largest difference to the hospital's true update."""
    truth = np.concatenate([part.ravel() for part in hospital_updates()[VICTIM]])
    return float(np.abs(opened_update(plain)[1] - truth).max())


def _flat(parts: list[NDArray[np.int64]]) -> Words:
    return np.concatenate([part.ravel() for part in parts]).astype(np.uint32)


# -- ours ------------------------------------------------------------------------------------------------


def our_view() -> tuple[Words, NDArray[np.int64], NDArray[np.int64]]:
    """(victim's vector with one pair mask left, its true vector, what the mask's own key would open).

    The server has all mask seeds, as after any round, and the third site colludes: it tells the private half
    of its mask key.
    """
    length = 1 + sum(int(np.prod(shape)) for shape in SHAPES)
    group = OurConsortium(3, length)
    victim, peer, colluder = group.names
    generator = np.random.default_rng(7)
    vectors = {name: np.rint(generator.normal(0, 1e4, length)).astype(np.int64) for name in group.names}
    share_requests = group.advertise()
    keys = {item.site_id: item for item in share_requests[victim].keys}
    secrets = {name: _mask_private(group, name) for name in group.names}
    upload_requests = group.share(share_requests)
    replies = {name: group.upload(name, upload_requests[name], vectors[name]) for name in group.names}
    for name, reply in replies.items():
        group.server.accept(name, reply)
    revealed = group.unmask()
    roster = Roster(group.roster, group.parameters)
    session = Session(attempt=group.attempt, roster=roster, parameters=group.parameters)
    shares = {
        roster.shamir_index(holder): item.value
        for holder, reply in revealed.items()
        for item in reply.shares
        if item.owner == victim
    }
    seed = combine_our_shares(shares, threshold=group.parameters.threshold)
    key_set = key_set_digest(session, [item.statement(session) for item in keys.values()])
    terms = UploadTerms(session=session, key_set=key_set, peers=tuple(group.names), **HASHES).digest()

    def pair_key(private: bytes, other: str) -> bytes:
        agreed = agree(private, keys[victim].mask_public)
        return pair_mask_key(agreed, terms=terms, first=victim, second=other)

    masked = from_bytes(b"".join(UploadReply.from_envelope(replies[victim]).masked), 32).copy()
    known = [self_mask_key(session, victim, seed), pair_key(secrets[colluder], colluder)]
    apply_streams(masked, [], known)
    control = masked.copy()
    apply_streams(control, [], [pair_key(secrets[peer], peer)])
    return masked, vectors[victim], centre(control)


def fits_ours(words: Words) -> NDArray[np.bool_]:
    """As narrow as Flower's: plain words are within 2^21 of zero, here within 50,000."""
    return words + np.uint32(TARGET_RANGE // 2) <= np.uint32(TARGET_RANGE)


def our_refusal_of_swapped_keys() -> str:
    """The reason with which a site refuses keys of the server's making."""
    group = OurConsortium(3, 8)
    request = group.advertise()[group.names[0]]
    forged = [
        replace(item, mask_public=public_key(bytes([i + 1]) * 32)) for i, item in enumerate(request.keys)
    ]
    try:
        group.sites[group.names[0]].share(replace(request, keys=(request.keys[0], *forged[1:])))
    except AggregationRefusedError as refusal:
        return str(refusal.reason)
    return "not refused"


def _mask_private(group: OurConsortium, name: str) -> bytes:
    prepared = group.sites[name]._prepared
    assert prepared is not None
    return prepared.secrets.mask_private


# -- both ------------------------------------------------------------------------------------------------


def run() -> str:
    """Both attacks on both, over all 2^28 seeds, on one core."""
    lines = [f"opening one hospital's update of {sum(int(np.prod(s)) for s in SHAPES):,} parameters", ""]
    found = search(curious_view(), fits=fits_flower)
    lines.append("Flower SecAgg+, curious server, one of three hospitals drops before its upload:")
    if found.plain is None:
        lines.append(f"  not opened: no seed of {found.tried:,} fits ({found.seconds:.0f} s)")
    else:
        examples, _ = opened_update(found.plain)
        lines.append(
            f"  OPENED: seed {found.seed:#010x} of {found.tried:,} tried in {found.seconds:.0f} s; "
            f"{examples:.1f} scans (true: {EXAMPLES}), largest error {worst_error(found.plain):.1e}"
        )
    started = time.perf_counter()
    plain = swapped_keys_view()
    error, seconds = worst_error(plain), time.perf_counter() - started
    lines.append("Flower SecAgg+, server that swaps keys, unmodified clients:")
    lines.append(
        f"  {'OPENED' if error < 1e-3 else 'not opened'} in {seconds:.2f} s, largest error {error:.1e}"
    )
    masked, truth, control = our_view()
    ours = search(masked, fits=fits_ours)
    lines.append("Lacuna, the same search, all masks but one known to the server:")
    lines.append(
        f"  {'not opened' if ours.seed is None else 'OPENED'}: {ours.tried:,} seeds in {ours.seconds:.0f} s, "
        f"{ours.passed_two_words} fit two words, {0 if ours.seed is None else 1} fit all "
        f"{len(masked):,} (with the mask's own 256-bit key it opens: {np.array_equal(control, truth)})"
    )
    lines.append("Lacuna, server that swaps keys:")
    lines.append(f"  refused by the site: {our_refusal_of_swapped_keys()}")
    return "\n".join(lines)
