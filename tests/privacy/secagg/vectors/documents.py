"""Inputs and expected outputs of each primitive. Outputs come from :mod:`reference`, not from our code.

Inputs are hashes of labels, so nothing here is secret and nothing is chosen.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

from . import reference as ref

BITS = (32, 64)
ATTEMPT: dict[str, Any] = {
    "study_digest": "ab" * 32,
    "run_id": "run-7",
    "round": 3,
    "attempt": 5,
    "purpose": "train",
    "vector_length": 6,
}
PARAMETERS = {"n_sites": 4, "threshold": 3, "max_colluding": 1, "modulus_bits": 32}
SITES = ("alpha", "beta", "gamma", "delta")


def material(label: str, size: int = 32) -> bytes:
    """Bytes that anybody can derive: SHA-256 of the label, 32 at a time."""
    blocks = (hashlib.sha256(f"lacuna vectors v1: {label}/{i}".encode()).digest() for i in itertools.count())
    return b"".join(itertools.islice(blocks, -(-size // 32)))[:size]


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def session_parts() -> tuple[bytes, ...]:
    """What every signature and session-bound digest begins with."""
    keys = [part for site in SITES for part in (site.encode(), ref.ed25519_public(material(f"id {site}")))]
    return (
        bytes.fromhex(ATTEMPT["study_digest"]),
        ATTEMPT["run_id"].encode(),
        number(ATTEMPT["round"]),
        number(ATTEMPT["attempt"]),
        ATTEMPT["purpose"].encode(),
        number(ATTEMPT["vector_length"]),
        ref.digest("lacuna/secagg/roster/v1", *keys),
        ref.digest("lacuna/secagg/parameters/v1", ref.plain_json(PARAMETERS)),
    )


def identities() -> dict[str, str]:
    """Seeds of the sites' Ed25519 identities, in roster order."""
    return {site: material(f"id {site}").hex() for site in SITES}


def key_derivation() -> dict[str, Any]:
    """Agreement, commitments, the three derived keys, and what has to differ or be refused."""
    session = session_parts()
    seed, terms, key_set = material("seed"), material("terms"), material("key set")
    private, peer_private = material("mask key alpha"), material("mask key beta")
    agreed = ref.x25519(private, ref.x25519_public(peer_private))
    share, plaintext = material("share"), material("two shares", 64)
    sealing = ref.framed("lacuna/secagg/sealed-share/v1", key_set, b"alpha", b"beta")
    sealed = ref.seal(ref.hkdf(agreed, sealing), plaintext, sealing)

    def pair(first: str, second: str, bound: bytes = terms) -> str:
        info = ref.framed("lacuna/secagg/pair-mask/v1", bound, first.encode(), second.encode())
        return ref.hkdf(agreed, info).hex()

    def commitment(kind: str, owner: str, recipient: str) -> str:
        claims = (kind.encode(), owner.encode(), recipient.encode(), share)
        return ref.digest("lacuna/secagg/share-value/v1", *session, *claims).hex()

    self_info = ref.framed("lacuna/secagg/self-mask/v1", *session, b"alpha")
    return {
        "format": "lacuna/secagg-vectors/key-derivation/v1",
        "attempt": ATTEMPT,
        "parameters": PARAMETERS,
        "identity_seeds": identities(),
        "session_parts": [part.hex() for part in session],
        "agreement": {
            "private": private.hex(),
            "public": ref.x25519_public(private).hex(),
            "peer_private": peer_private.hex(),
            "peer_public": ref.x25519_public(peer_private).hex(),
            "agreed": agreed.hex(),
        },
        "seed": seed.hex(),
        "seed_commitment": ref.digest("lacuna/secagg/seed/v1", *session, b"alpha", seed).hex(),
        "self_mask_key": ref.hkdf(seed, self_info).hex(),
        "terms": terms.hex(),
        "pair_mask_key": {"first": "alpha", "second": "beta", "key": pair("alpha", "beta")},
        "share": share.hex(),
        "share_commitments": [
            {"kind": kind, "owner": owner, "recipient": to, "commitment": commitment(kind, owner, to)}
            for kind, owner, to in (
                ("seed", "alpha", "beta"), ("key", "alpha", "beta"), ("seed", "beta", "alpha"),
            )
        ],
        "sealed_share": {
            "key_set": key_set.hex(),
            "dealer": "alpha",
            "recipient": "beta",
            "plaintext": plaintext.hex(),
            "sealed": sealed.hex(),
        },
        "negatives": {
            "weak_public_keys": [
                bytes(32).hex(),
                (1).to_bytes(32, "little").hex(),
                (2**255 - 19).to_bytes(32, "little").hex(),
                "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            ],
            "other_pair_mask_keys": [
                {"first": "beta", "second": "alpha", "terms": terms.hex(), "key": pair("beta", "alpha")},
                {
                    "first": "alpha", "second": "beta", "terms": key_set.hex(),
                    "key": pair("alpha", "beta", key_set),
                },
            ],
            "not_sealed_shares": [
                {"why": "first bit", "sealed": (bytes([sealed[0] ^ 1]) + sealed[1:]).hex()},
                {"why": "last bit", "sealed": (sealed[:-1] + bytes([sealed[-1] ^ 1])).hex()},
                {"why": "truncated", "sealed": sealed[:-1].hex()},
                {"why": "empty", "sealed": ""},
            ],
        },
    }  # fmt: skip


def mask_expansion() -> dict[str, Any]:
    """Streams, and a vector with streams added and subtracted; also across the chunks of the expansion."""
    keys = [material(f"mask {i}") for i in range(3)]
    long = ref.keystream(keys[0], 4 * 300_000)
    cases = []
    for bits in BITS:
        edge = 2 ** (bits - 1)
        vector = [0, 1, -1, edge - 1, -edge, 123456789]
        residues = [value % 2**bits for value in vector]
        masked = ref.apply_masks(residues, keys[:2], keys[2:], bits)
        cases.append(
            {
                "modulus_bits": bits,
                "vector": vector,
                "plus": [key.hex() for key in keys[:2]],
                "minus": [keys[2].hex()],
                "masked": ref.residue_bytes(masked, bits).hex(),
            }
        )
    return {
        "format": "lacuna/secagg-vectors/mask-expansion/v1",
        "streams": [{"key": key.hex(), "bytes": 64, "stream": ref.keystream(key, 64).hex()} for key in keys],
        "long_stream": {
            "key": keys[0].hex(),
            "uint32_words": 300_000,
            "sha256": hashlib.sha256(long).hexdigest(),
        },
        "cases": cases,
        "negatives": {"keys_of_other_lengths": ["", keys[0][:16].hex(), keys[0][:31].hex()]},
    }


def shares() -> dict[str, Any]:
    """Shares on given polynomials, secrets from t of them, and what does not give the secret."""
    cases = []
    for t, n in ((2, 3), (3, 4), (5, 7), (51, 100)):
        secret = material(f"secret {t} of {n}")
        coefficients = [[material(f"{t} {n} {b} {i}", 16) for i in range(t - 1)] for b in (0, 1)]
        dealt = {index: ref.shamir_share(index, secret, coefficients) for index in range(1, n + 1)}
        some = list(range(n - t + 1, n + 1))
        few = some[1:]
        cases.append(
            {
                "threshold": t,
                "n_shares": n,
                "secret": secret.hex(),
                "coefficients": [[item.hex() for item in block] for block in coefficients],
                "shares": [dealt[index].hex() for index in range(1, n + 1)],
                "combined_from": some,
                "negatives": {
                    "too_few": few,
                    "too_few_interpolate_to": ref.shamir_secret({i: dealt[i] for i in few}).hex(),
                    "first_index_moved_to": n + 1,
                    "then_combines_to": ref.shamir_secret(
                        {n + 1 if i == some[0] else i: dealt[i] for i in some}
                    ).hex(),
                },
            }
        )
    return {"format": "lacuna/secagg-vectors/shares/v1", "cases": cases}


def quantization() -> dict[str, Any]:
    """Real numbers to the grid (as hexadecimal floats), to residues and bytes, to a sum and back."""
    values = [0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.1, -0.1, 3.1415926535, 1e-300, 1e6, -1e6]
    cases = []
    for grid_step, clamp in ((1.0, 1000), (0.0078125, 100_000), (0.001, 2**30), (1.0, None)):
        steps = [ref.quantized(value, grid_step, clamp) for value in values]
        cases.append(
            {
                "grid_step": grid_step.hex(),
                "clamp_steps": clamp,
                "values": [value.hex() for value in values],
                "steps": steps,
            }
        )
    sums = []
    for bits in BITS:
        edge = 2 ** (bits - 1)
        vectors = [[1, -1, edge - 1, -edge, 40], [2, -2, -5, 3, 2], [4, -4, 0, 0, -50]]
        residues = [[value % 2**bits for value in vector] for vector in vectors]
        total = [sum(column) % 2**bits for column in zip(*residues, strict=True)]
        sums.append(
            {
                "modulus_bits": bits,
                "vectors": vectors,
                "wire": [ref.residue_bytes(vector, bits).hex() for vector in residues],
                "total": [ref.centred(value, bits) for value in total],
            }
        )
    return {
        "format": "lacuna/secagg-vectors/quantization/v1",
        "cases": cases,
        "sums": sums,
        "negatives": {
            "not_finite_counts_as_zero": ["nan", "inf", "-inf"],
            "sum_beyond_the_range_wraps": {
                "modulus_bits": 32, "vectors": [[2**31 - 1], [1]], "total": [-(2**31)],
            },
            "wire_of_broken_length": {"modulus_bits": 32, "bytes": "010000"},
        },
    }  # fmt: skip
