"""What one site spends in an attempt: ours, Flower's SecAgg+ client, and the floor, in one fresh process.

Run as ``python -m tests.benchmarks.secagg_site_cost PARAMETERS SITES [PEER]``; prints one JSON object. The
process is pinned to one core, and every figure is processor time, so that neither threads nor other work on
the machine shift a ratio. The other sites exist as far as the protocol needs them: their keys and shares are
real, their vectors do not exist.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)
from numpy.typing import NDArray

from privacy.dp.quantization import quantize
from privacy.secagg import site_masking
from privacy.secagg.masking import to_pieces
from privacy.secagg.messages import ShareReply, ShareRequest, UnmaskRequest, UploadRequest
from privacy.secagg.site_keys import AdvertisedState
from privacy.secagg.statements import UploadStatement, key_set_digest
from tests.benchmarks.flower_secagg import FlowerClient, FlowerServer
from tests.benchmarks.our_secagg import HASHES, OurConsortium, wired

CHUNK_WORDS = 1 << 15
GRID_STEP = 2.0**-12
CLAMP_STEPS = 1 << 20


def floor_seconds(parameters: int, masks: int) -> float:
    """Expanding masks with AES-256-CTR and as many additions, nothing else: a plain loop, in cache."""
    total = np.zeros(parameters, dtype=np.uint32)
    zeros, buffer = bytes(4 * CHUNK_WORDS), bytearray(4 * CHUNK_WORDS + 15)
    words = np.frombuffer(buffer, dtype=np.uint32, count=CHUNK_WORDS)
    ciphers = [Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))) for _ in range(masks)]
    started = time.process_time()
    streams = [cipher.encryptor() for cipher in ciphers]
    for start in range(0, parameters, CHUNK_WORDS):
        chunk = total[start : start + CHUNK_WORDS]
        size = len(chunk)
        for stream in streams:
            stream.update_into(zeros if size == CHUNK_WORDS else zeros[: 4 * size], buffer)
            np.add(chunk, words[:size], out=chunk)
    return time.process_time() - started


@contextmanager
def timed(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add up the processor time of one function."""
    real: Callable[..., Any] = getattr(owner, name)

    def run(*arguments: Any, **named: Any) -> Any:
        started = time.process_time()
        try:
            return real(*arguments, **named)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - started

    with patch.object(owner, name, run):
        yield


def our_costs(parameters: int, n_sites: int, values: NDArray[np.float64], turns: int) -> dict[str, float]:
    """Seconds of quantization, of the vector (masks, additions, pieces), of everything else; bytes sent."""
    group = OurConsortium(n_sites, parameters)
    name = group.names[0]
    site, sent = group.sites[name], 0
    advertise = group.server.build_advertise_requests()
    started = time.process_time()
    envelope = site.advertise(advertise[name], dict).to_envelope()
    keys = time.process_time() - started
    sent += _size(envelope)
    group.server.accept(name, wired(envelope))
    for other in group.names[1:]:
        group.server.accept(other, wired(group.sites[other].advertise(advertise[other], dict).to_envelope()))
    offered = group.server.build_share_requests()[name]
    started = time.process_time()
    dealt = site.share(offered)
    keys += time.process_time() - started
    sent += _size(dealt.to_envelope())
    request = UploadRequest(
        attempt=group.attempt, site_id=name, **HASHES, shares=_shares_for(group, name, offered, dealt)
    )
    quantized: list[float] = []
    for _ in range(turns):
        started = time.process_time()
        vector = quantize(values, grid_step=GRID_STEP, clamp_steps=CLAMP_STEPS)
        quantized.append(time.process_time() - started)
    masks: list[float] = []
    real = site_masking.masked_residues

    def several_turns(*arguments: Any) -> Any:
        for _ in range(turns):
            started = time.process_time()
            masked = real(*arguments)
            to_pieces(masked)
            masks.append(time.process_time() - started)
        return masked

    with patch.object(site_masking, "masked_residues", several_turns):
        started = time.process_time()
        site.check_upload(request, **HASHES)  # as the agent does before it charges
        reply = site.upload(request, vector, **HASHES)
        keys += time.process_time() - started - sum(masks)
    sent += _size(reply.to_envelope())
    # The others' uploads are signed, not made: what this site reveals does not depend on their vectors.
    state = site._open
    assert state is not None
    signed = []
    for other in group.names:
        statement = UploadStatement(session=state.session, site_id=other, terms=state.terms)
        signed.append((other, statement.sign(group.sites[other]._key)))
    unmask = UnmaskRequest(attempt=group.attempt, uploads=tuple(signed), confirmations=())
    started = time.process_time()
    revealed = site.unmask(unmask).to_envelope()
    keys += time.process_time() - started
    sent += _size(revealed)
    return {"quantize": min(quantized), "vector": min(masks), "keys": keys, "bytes": sent}


def _shares_for(group: OurConsortium, name: str, offered: ShareRequest, dealt: ShareReply) -> Any:
    """What each site deals to one: sealed and signed as ever, of values that nobody will put together."""
    keys = {item.site_id: item for item in offered.keys}
    shares = [share for share in dealt.shares if share.recipient == name]
    for other in group.names[1:]:
        state = group.sites[other]._prepared
        assert isinstance(state, AdvertisedState)
        key_set = key_set_digest(state.session, [item.statement(state.session) for item in keys.values()])
        shares.append(state._seal(keys[name], (os.urandom(32), os.urandom(32)), key_set))
    return tuple(shares)


def flower_costs(parameters: int, n_sites: int) -> dict[str, float]:
    """Seconds and bytes of one of Flower's clients, through its public mod.

    Its peers are key pairs and one ciphertext each, made with Flower's primitives.
    """
    spent: dict[str, float] = {}
    peers = {node: (generate_key_pairs(), generate_key_pairs()) for node in range(2, n_sites + 1)}
    client = FlowerClient(1, [np.full(parameters, 0.01, dtype=np.float32)], num_examples=100)
    server = FlowerServer([client], threshold=n_sites // 2 + 1, n_clients=n_sites)
    with timed(client, "answer", spent):
        server.set_up()
        own = bytes_to_public_key(server.public_keys[1][1])
        for node, (mask, sealing) in peers.items():
            server.public_keys[node] = (public_key_to_bytes(mask[1]), public_key_to_bytes(sealing[1]))
            share = share_keys_plaintext_concat(node, 1, bytes(40), bytes(40))
            server.shares_for[node] = {}
            server.shares_for[1][node] = encrypt(generate_shared_key(sealing[0], own), share)
        dealt = server.share_keys(1, server.public_keys)
        keys = spent["answer"]
        masked = server.collect_bytes(1)
        vector = spent["answer"] - keys
        sent = sum(len(item) for item in (*masked, *server.public_keys[1], *dealt.values()))
        del masked
        everybody = {Key.ACTIVE_NODE_ID_LIST: list(server.public_keys), Key.DEAD_NODE_ID_LIST: list[int]()}
        reply = client.answer(Stage.UNMASK, everybody)
        keys = spent["answer"] - vector
        sent += sum(len(share) for share in reply[Key.SHARE_LIST])
    return {"vector": vector, "keys": keys, "bytes": float(sent)}


def least(turns: list[dict[str, float]]) -> dict[str, float]:
    """The least of each figure."""
    return {name: min(turn[name] for turn in turns) for name in turns[0]}


def _size(envelope: Any) -> int:
    from shared.wire import encode_header

    return 8 + len(encode_header(envelope)) + sum(len(blob) for blob in envelope.blobs)


def main(parameters: int, n_sites: int, peer: bool) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    peer_turns = 3 if parameters * n_sites <= 100_000_000 else 1
    turns = 5 if parameters * n_sites <= 200_000_000 else 3
    values = np.random.default_rng(1).normal(0.0, 0.5, parameters)
    floors = [floor_seconds(parameters, n_sites) for _ in range(turns)]
    ours = least([our_costs(parameters, n_sites, values, turns) for _ in range(peer_turns)])
    del values
    gc.collect()
    result: dict[str, Any] = {
        "parameters": parameters,
        "sites": n_sites,
        "ours": ours,
        "floor": min(floors),
        "flower": least([flower_costs(parameters, n_sites) for _ in range(peer_turns)]) if peer else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "no-peer" not in sys.argv[3:])
