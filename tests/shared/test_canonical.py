"""Canonical bytes: one form a value, strict parsing, framing that cannot be confused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.canonical import canonical_json, digest, framed, parse_json
from shared.errors import LacunaError, MalformedMessageError

PARTS = st.lists(st.binary(max_size=12), max_size=4)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}',
        '{"x":{"a":1,"a":1}}',
        "NaN",
        '{"a":Infinity}',
        "[-Infinity]",
        "1e999",
        '{"a":-1e400}',
        "{",
        "",
        "[1,]",
        "\ufeff{}",
        "1 2",
        "[" * 200_000,
        "9" * 10_000,
    ],
)
def test_what_is_not_strict_json_is_refused(text: str) -> None:
    with pytest.raises(MalformedMessageError, match="the document"):
        parse_json(text.encode(), what="the document")


def test_bytes_that_are_no_utf8_and_oversized_documents_are_refused() -> None:
    with pytest.raises(MalformedMessageError):
        parse_json(b'"\xff"', what="x")
    with pytest.raises(MalformedMessageError, match="bound of 3 bytes"):
        parse_json(b"1234", what="x", max_bytes=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, {1: 2}, {1, 2}, b"x", "\ud800"])
def test_values_without_canonical_form_are_refused(value: object) -> None:
    with pytest.raises(MalformedMessageError):
        canonical_json(value)


def test_known_canonical_bytes() -> None:
    """RFC 8785, section 3.2.2 and 3.2.3: numbers as ECMAScript writes them, keys by UTF-16."""
    value = {"\u20ac": 1e30, "\r": [4.50, 2e-3, 0.000000000000000000000000001], "1": True, "\U0001f600": None}
    expected = '{"\\r":[4.5,0.002,1e-27],"1":true,"\u20ac":1e+30,"\U0001f600":null}'
    assert canonical_json(value) == expected.encode()


@given(st.binary(max_size=200))
def test_parsing_any_bytes_gives_a_value_or_the_projects_error(data: bytes) -> None:
    try:
        parse_json(data, what="x")
    except LacunaError as error:
        assert isinstance(error, MalformedMessageError)


@given(st.sampled_from(["a", "ab", "lacuna/x/v1"]), PARTS, st.sampled_from(["a", "ab", "lacuna/x/v1"]), PARTS)
def test_framing_is_injective(domain: str, parts: list[bytes], other: str, others: list[bytes]) -> None:
    same = (domain, parts) == (other, others)
    assert (framed(domain, *parts) == framed(other, *others)) is same


def test_moving_a_boundary_or_the_domain_changes_the_digest() -> None:
    assert digest("d", b"ab", b"c") != digest("d", b"a", b"bc") != digest("d", b"abc")
    assert digest("d", b"") != digest("d")
    assert digest("da", b"b") != digest("d", b"ab")
    assert digest("d", b"xy") == hashlib.sha256(bytes(7) + b"\1d" + bytes(7) + b"\2xy").digest()
