"""Envelopes and securesystemslib, which is not ours: it reads what we sign, we read what it signs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from release_study import SITES, Study
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from privacy.compliance.dsse import IN_TOTO_PAYLOAD, IN_TOTO_STATEMENT, PREDICATES, EvidenceError, open_signed
from shared.attestation import open_statement
from shared.canonical import canonical_json
from shared.identity import BadSignatureError, SigningKey, VerifyKey


def their_key(key_hex: str) -> SSlibKey:
    return SSlibKey(key_hex, "ed25519", "ed25519", {"public": key_hex})


def test_every_envelope_of_a_released_bundle_verifies_with_securesystemslib(
    study: Study, bundle: Path, log: Path
) -> None:
    signers = {
        "plan.dsse.json": "coordinator",
        "gate-decision.dsse.json": "coordinator",
        "release.dsse.json": "coordinator",
        "approvals/officer.dsse.json": "officer",
        "approvals/site-alpha.dsse.json": "alpha",
        "approvals/site-beta.dsse.json": "beta",
        **{f"{kind}/{s}.dsse.json": s for kind in ("ledgers", "verdicts", "plan-approvals") for s in SITES},
    }
    root = bundle / "attestations"
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.dsse.json")}
    assert set(found) == set(signers)
    found["release log"], signers["release log"] = log.read_bytes().splitlines()[0], "coordinator"
    stranger = their_key(SigningKey.generate().verify_key.hex())
    for name, data in found.items():
        envelope = Envelope.from_dict(json.loads(data))
        key = study.keys[signers[name]].verify_key.hex()
        assert set(envelope.verify([their_key(key), stranger], 1)) == {key}, name
        statement = json.loads(envelope.payload)
        assert statement["_type"] == IN_TOTO_STATEMENT and statement["predicateType"].startswith(PREDICATES)
        envelope.payload = envelope.payload.replace(b'"predicate"', b'"predicatE"')
        with pytest.raises(VerificationError):
            envelope.verify([their_key(key)], 1)


def test_what_securesystemslib_signs_both_our_readers_read() -> None:
    private = Ed25519PrivateKey.generate()
    key_hex = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    signer = CryptoSigner(private, SSlibKey.from_crypto(private.public_key(), keyid=key_hex))
    payload = {
        "_type": IN_TOTO_STATEMENT,
        "subject": [{"name": "candidate", "digest": {"sha256": "7" * 64}}],
        "predicateType": PREDICATES + "verdict/v1",
        "predicate": {"n": 3, "words": "\u00e9"},
    }
    envelope = Envelope(canonical_json(payload), IN_TOTO_PAYLOAD, {})
    envelope.sign(signer)
    data = canonical_json(envelope.to_dict())
    ours = open_statement(data, key=VerifyKey.from_hex(key_hex), predicate_type="verdict/v1", what="it")
    officers = open_signed(data, key=key_hex, predicate_type="verdict/v1", what="it")
    assert ours.predicate == officers.predicate == payload["predicate"]
    assert officers.subjects == {"candidate": "7" * 64}
    envelope.payload = envelope.payload.replace(b'"n":3', b'"n":4')
    changed = canonical_json(envelope.to_dict())
    with pytest.raises(BadSignatureError):
        open_statement(changed, key=VerifyKey.from_hex(key_hex), predicate_type="verdict/v1", what="it")
    with pytest.raises(EvidenceError, match="does not verify"):
        open_signed(changed, key=key_hex, predicate_type="verdict/v1", what="it")
