"""One full round with a drop, message by message, from fixed keys, and messages that must be refused.

The messages are the real state machines'. Key-set digest, terms and masked vectors are computed once more by
:mod:`reference` from the secrets; the test compares both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.secagg import shamir
from privacy.secagg.messages import (
    REQUESTS,
    ConfirmRequest,
    Reply,
    Request,
    ShareRequest,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
)
from privacy.secagg.server_rounds import ServerAttempt
from privacy.secagg.session import AttemptId
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secret_random import SecretRandom
from shared.identity import SigningKey, VerifyKey
from shared.wire import decode, encode

from . import reference as ref
from .documents import ATTEMPT, PARAMETERS, SITES, identities, material, session_parts

DROPPED = "gamma"
WEIGHTS_HASH, REQUEST_HASH = material("weights"), material("request")
LEDGER_HEAD = {"entry": "00" * 32, "length": 2}
VECTORS = {
    site: [(1 << i) * (-1) ** (i + place) for place in range(ATTEMPT["vector_length"])]
    for i, site in enumerate(SITES)
}
SECRETS = {
    site: [material(f"{site} {name}") for name in ("mask private", "share private", "seed")] for site in SITES
}


class RecordedSecrets(SecretRandom):
    """The recorded secrets, in the order in which a site draws them."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        super().__init__()
        self._recorded = list(secrets)

    def bytes(self, size: int) -> bytes:
        secret = self._recorded.pop(0)
        assert len(secret) == size
        return secret


def roster() -> tuple[tuple[str, VerifyKey], ...]:
    return tuple((site, identity(site).verify_key) for site in SITES)


def identity(site: str) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(identities()[site])))


def server() -> ServerAttempt:
    return ServerAttempt(AttemptId(**ATTEMPT), roster=roster(), parameters=ProtocolParameters(**PARAMETERS))


class RecordedSite:
    """A real site on recorded secrets: frame in, frame out."""

    def __init__(self, site: str) -> None:
        self._site = site
        self._protocol = SiteSecureAggregation(
            site_id=site,
            key=identity(site),
            roster=roster(),
            parameters=ProtocolParameters(**PARAMETERS),
            study_digest=ATTEMPT["study_digest"],
            register_attempt=lambda _: None,
            entropy=RecordedSecrets(SECRETS[site]),
        )

    def _coefficients(self) -> Iterator[bytes]:
        """Numbered by secret, then block, then power from the highest down."""
        higher = PARAMETERS["threshold"] - 1
        for start in itertools.count(0, 2 * higher):
            for i in range(start, start + higher):
                yield b"".join(material(f"{self._site} shamir {j}", 16) for j in (i, i + higher))

    def answer(self, frame: bytes) -> bytes:
        """Raises what the parsers and the state machine raise."""
        envelope = decode(frame)
        request: Any = REQUESTS[envelope.kind].from_envelope(envelope)
        reply: Reply
        match envelope.kind:
            case "secagg_advertise":
                reply = self._protocol.advertise(request, lambda: LEDGER_HEAD)
            case "secagg_share":
                with patch.object(shamir, "random_coefficients", partial(next, self._coefficients())):
                    reply = self._protocol.share(request)
            case "secagg_upload":
                vector = np.array(VECTORS[self._site], dtype=np.int64)
                hashes = {"weights_hash": WEIGHTS_HASH, "request_hash": REQUEST_HASH}
                reply = self._protocol.upload(request, vector, **hashes)
            case "secagg_confirm":
                reply = self._protocol.confirm(request)
            case _:
                reply = self._protocol.unmask(request)
        return encode(reply.to_envelope())


def whole_round() -> dict[str, Any]:
    """The document."""
    sites = {site: RecordedSite(site) for site in SITES}
    attempt = server()
    messages: list[dict[str, str]] = []
    asked: dict[str, dict[str, Any]] = {}

    def exchange(requests: dict[str, Any], *, lost: Sequence[str] = ()) -> None:
        for site, request in requests.items():
            frame = encode(request.to_envelope())
            kind = request.to_envelope().kind
            asked.setdefault(kind, {})[site] = request
            if site not in lost:
                reply = sites[site].answer(frame)
                messages.append({"site": site, "kind": kind, "request": frame.hex(), "reply": reply.hex()})
                attempt.accept(site, decode(reply))

    exchange(attempt.build_advertise_requests())
    exchange(attempt.build_share_requests())
    exchange(attempt.build_upload_requests(WEIGHTS_HASH, REQUEST_HASH), lost=[DROPPED])
    attempt.close_uploads()
    exchange(attempt.build_confirm_requests())
    exchange(attempt.build_unmask_requests())
    total = attempt.total()
    return {
        "format": "lacuna/secagg-vectors/round/v1",
        "attempt": ATTEMPT,
        "parameters": PARAMETERS,
        "identity_seeds": identities(),
        "secrets": {
            site: dict(zip(("mask_private", "share_private", "seed"), (s.hex() for s in drawn), strict=True))
            for site, drawn in SECRETS.items()
        },
        "ledger_head": LEDGER_HEAD,
        "weights_hash": WEIGHTS_HASH.hex(),
        "request_hash": REQUEST_HASH.hex(),
        "vectors": VECTORS,
        "dropped_before_upload": DROPPED,
        **_derived(),
        "messages": messages,
        "survivors": [site for site in SITES if site != DROPPED],
        "total": [
            sum(VECTORS[site][place] for site in SITES if site != DROPPED)
            for place in range(ATTEMPT["vector_length"])
        ],
        "unmasked": [int(value) for value in total],
        "negatives": {
            "refused_by_alpha": _refused_by_alpha(asked),
            "unused_by_the_server": _unused_by_the_server(messages),
        },
    }


def _derived() -> dict[str, Any]:
    """Key set, terms and masked vectors, from the secrets and the wire format alone."""
    session = session_parts()
    bits = PARAMETERS["modulus_bits"]
    public = {site: [ref.x25519_public(key) for key in SECRETS[site][:2]] for site in SITES}
    statements = [
        ref.digest(
            "lacuna/secagg/keys/v1",
            *session,
            site.encode(),
            *public[site],
            ref.digest("lacuna/secagg/seed/v1", *session, site.encode(), SECRETS[site][2]),
            ref.plain_json(LEDGER_HEAD),
        )
        for site in SITES
    ]
    key_set = ref.digest("lacuna/secagg/key-set/v1", *session, *statements)
    peers = ref.digest("lacuna/secagg/site-set/v1", *(site.encode() for site in SITES))
    hashes = (WEIGHTS_HASH, REQUEST_HASH)
    terms = ref.digest("lacuna/secagg/upload-terms/v1", *session, key_set, peers, *hashes)
    masked = {}
    for i, site in enumerate(SITES):
        info = ref.framed("lacuna/secagg/self-mask/v1", *session, site.encode())
        plus, minus = [ref.hkdf(SECRETS[site][2], info)], []
        for j, peer in enumerate(SITES):
            if peer != site:
                agreed = ref.x25519(SECRETS[site][0], public[peer][0])
                first, second = (site, peer) if i < j else (peer, site)
                info = ref.framed("lacuna/secagg/pair-mask/v1", terms, first.encode(), second.encode())
                (plus if i < j else minus).append(ref.hkdf(agreed, info))
        residues = [value % 2**bits for value in VECTORS[site]]
        masked[site] = ref.residue_bytes(ref.apply_masks(residues, plus, minus, bits), bits).hex()
    return {"key_set": key_set.hex(), "terms": terms.hex(), "masked": masked}


def _refused_by_alpha(asked: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """``after``: how many of alpha's messages come before; the reason is what must come out."""
    keys: ShareRequest = asked["secagg_share"]["alpha"]
    upload: UploadRequest = asked["secagg_upload"]["alpha"]
    confirm: ConfirmRequest = asked["secagg_confirm"]["alpha"]
    unmask: UnmaskRequest = asked["secagg_unmask"]["alpha"]
    own, beta, *others = keys.keys
    swapped = replace(beta, mask_public=ref.x25519_public(material("the coordinator's own key")))
    share = upload.shares[1]
    torn = replace(share, ciphertext=bytes([share.ciphertext[0] ^ 1]) + share.ciphertext[1:])
    cases: list[tuple[str, int, Request, str]] = [
        ("a key that beta did not sign", 1, replace(keys, keys=(own, swapped, *others)), "bad_key_signature"),
        ("two sites' keys", 1, replace(keys, keys=(own, beta)), "too_few_peers"),
        ("keys without alpha's", 1, replace(keys, keys=(beta, *others)), "self_not_among_peers"),
        ("upload before shares were dealt", 1, upload, "out_of_order"),
        ("other weights", 2, replace(upload, weights_hash=bytes(32)), "wrong_weights"),
        ("another site's request", 2, asked["secagg_upload"]["beta"], "other_site"),
        (
            "a changed share",
            2,
            replace(upload, shares=(upload.shares[0], torn, *upload.shares[2:])),
            "bad_share_signature",
        ),
        ("a set without alpha", 3, replace(confirm, uploads=confirm.uploads[1:]), "self_not_among_survivors"),
        ("a set of two", 3, replace(confirm, uploads=confirm.uploads[:2]), "too_few_survivors"),
        ("reveal without confirming", 3, unmask, "survivors_not_confirmed"),
        (
            "two confirmations",
            4,
            replace(unmask, confirmations=unmask.confirmations[:2]),
            "too_few_confirmations",
        ),
        ("a second confirmation", 4, confirm, "out_of_order"),
        ("the same reveal again", 5, unmask, "attempt_closed"),
        ("an attempt number again", 5, asked["secagg_advertise"]["alpha"], "attempt_not_new"),
    ]
    found = [
        {"why": why, "after": after, "request": encode(request.to_envelope()).hex(), "refused": reason}
        for why, after, request, reason in cases
    ]
    cut = encode(keys.to_envelope())[:-1].hex()
    return [*found, {"why": "a truncated frame", "after": 1, "request": cut, "refused": "malformed"}]


def _unused_by_the_server(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Beta's upload, changed; all messages before it were delivered."""
    before = next(i for i, m in enumerate(messages) if m["kind"] == "secagg_upload" and m["site"] == "beta")
    reply = UploadReply.from_envelope(decode(bytes.fromhex(messages[before]["reply"])))
    flipped = bytes([reply.signature[0] ^ 1]) + reply.signature[1:]
    cases = [
        ("a word is missing", replace(reply, masked=(reply.masked[0][:-4],)), "wrong_length"),
        ("another signature", replace(reply, signature=flipped), "bad_signature"),
        ("it speaks for alpha", replace(reply, site_id="alpha"), "other_site"),
        ("another attempt", replace(reply, attempt=replace(reply.attempt, attempt=6)), "other_attempt"),
    ]
    return [
        {
            "why": why,
            "site": "beta",
            "after": before,
            "reply": encode(item.to_envelope()).hex(),
            "fault": fault,
        }
        for why, item, fault in cases
    ]
