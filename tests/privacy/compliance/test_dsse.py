"""The officer's reader against the signer, against rfc8785, and against tampering."""

from __future__ import annotations

import base64
import json

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.compliance.dsse import EvidenceError, canonical, open_signed, strict_json
from shared.attestation import Statement, Subject, sign_statement
from shared.identity import SigningKey

KEY = SigningKey.generate()
KEY_HEX = KEY.verify_key.hex()

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


def envelope(predicate: dict[str, object] | None = None) -> bytes:
    statement = Statement(
        predicate_type="verdict/v1",
        subjects=(Subject(name="a", sha256="0" * 64),),
        predicate={"x": 1.5, "unicode": "\u00e9\U0001f600"} if predicate is None else predicate,
    )
    return sign_statement(statement, KEY)


def read(data: bytes) -> object:
    return open_signed(data, key=KEY_HEX, predicate_type="verdict/v1", what="it")


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_own_canonical_form_is_that_of_rfc8785(value: object) -> None:
    assert canonical(value).encode() == rfc8785.dumps(value)


@pytest.mark.parametrize(
    "number", [0.0, -0.0, 1e21, 1e20, 1.5e-7, 1e-6, 5e-324, 1.7976931348623157e308, 123456.789, -1e-7, 100.0]
)
def test_own_number_format_at_the_edges(number: float) -> None:
    assert canonical(number).encode() == rfc8785.dumps(number)


def test_reads_what_the_signer_signs() -> None:
    statement = open_signed(envelope(), key=KEY_HEX, predicate_type="verdict/v1", what="it")
    assert statement.subjects == {"a": "0" * 64}
    assert statement.predicate["x"] == 1.5
    assert statement.signer == KEY_HEX


def test_every_single_byte_matters() -> None:
    data = envelope({"x": 1})
    for position in range(len(data)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(data)
            changed[position] ^= flip
            with pytest.raises(EvidenceError):
                read(bytes(changed))


def test_truncated_extended_or_reformatted_is_refused() -> None:
    data = envelope()
    for bad in (b"", data[:-1], data + b"\n", b" " + data, json.dumps(json.loads(data), indent=1).encode()):
        with pytest.raises(EvidenceError):
            read(bad)


def test_stray_bits_of_base64_are_refused() -> None:
    value = json.loads(envelope())
    signature = value["signatures"][0]["sig"]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twisted = signature[:-3] + alphabet[alphabet.index(signature[-3]) ^ 1] + "=="
    assert base64.b64decode(twisted) == base64.b64decode(signature)
    value["signatures"][0]["sig"] = twisted
    with pytest.raises(EvidenceError, match="stray bits"):
        read(rfc8785.dumps(value))


def test_wrong_signer_type_and_second_signature_are_named() -> None:
    with pytest.raises(EvidenceError, match="wrong signer"):
        open_signed(envelope(), key="0" * 64, predicate_type="verdict/v1", what="it")
    with pytest.raises(EvidenceError, match="expected 'ledger/v1'"):
        open_signed(envelope(), key=KEY_HEX, predicate_type="ledger/v1", what="it")
    value = json.loads(envelope())
    value["signatures"] *= 2
    with pytest.raises(EvidenceError, match="exactly one"):
        read(rfc8785.dumps(value))


@pytest.mark.parametrize(
    "text", [b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a": 1}', b"[NaN]", b"[1.0]", b'["\\u0061"]', b"\xff"]
)
def test_json_outside_the_canonical_form_is_refused(text: bytes) -> None:
    with pytest.raises(EvidenceError):
        strict_json(text, what="it")
