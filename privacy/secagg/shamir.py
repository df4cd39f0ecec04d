"""Shamir's secret sharing (1979) of 32-byte secrets over GF(2^128), 16 bytes at a time.

Any t shares give the secret; fewer say nothing about it. Shares are those of pycryptodome's
``Crypto.Protocol.SecretSharing`` (the polynomial of a secret's block b is b + c_1 x + ... + c_(t-1) x^(t-1),
a site's share its value at the site's index, the field that of x^128 + x^7 + x^2 + x + 1), and the tests hold
both against each other. It is not used here because at 100 sites it takes longer than all masks of a model of
four million parameters. Coefficients come from the operating system's generator. What the arithmetic branches
on are indices and weights, which are public; secrets are only shifted and added.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

SECRET_BYTES = 32
_BLOCK_BYTES = 16
_LANE_BYTES = 32
_BLOCK_BITS = 8 * _BLOCK_BYTES
_MODULUS = (1 << 128) | 0b10000111
_LOW = sum(((1 << _BLOCK_BITS) - 1) << lane for lane in (0, 8 * _LANE_BYTES))
"""A secret is worked on as one integer: its two blocks in lanes wide enough for a product."""


def split_secret(secret: bytes, *, threshold: int, n_shares: int) -> list[bytes]:
    """``n_shares`` shares of 32 bytes each; element i belongs to index i + 1.

    Raises:
        ValueError: the secret has not 32 bytes, or not 1 <= threshold <= n_shares.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes")
    if not 1 <= threshold <= n_shares:
        raise ValueError(f"{n_shares} shares cannot have a threshold of {threshold}")
    coefficients = [_to_lanes(random_coefficients()) for _ in range(threshold - 1)]
    coefficients.append(_to_lanes(secret))
    shares = []
    for index in range(1, n_shares + 1):
        value = 0
        for coefficient in coefficients:
            value = _times(value, index) ^ coefficient
        shares.append(_from_lanes(value))
    return shares


def combine_shares(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """The 32-byte secret from at least ``threshold`` shares by index (1-based); the lowest t are used.

    Raises:
        ValueError: too few shares, an index below 1, or a share of another length.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares are fewer than the threshold {threshold}")
    chosen = sorted(shares.items())[:threshold]
    if any(index < 1 or len(share) != SECRET_BYTES for index, share in chosen):
        raise ValueError(f"a share has an index from 1 on and {SECRET_BYTES} bytes")
    weights = _weights_at_zero(tuple(index for index, _ in chosen))
    secret = 0
    for (_, share), weight in zip(chosen, weights, strict=True):
        secret ^= _times(_to_lanes(share), weight)
    return _from_lanes(secret)


def random_coefficients() -> bytes:
    """One coefficient for each block."""
    return os.urandom(SECRET_BYTES)


@functools.lru_cache(maxsize=16)
def _weights_at_zero(indices: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights for the value at zero, from different indices."""
    weights = []
    for index in indices:
        above = below = 1
        for other in indices:
            if other != index:
                above, below = _times(above, other), _times(below, index ^ other)
        weights.append(_times(above, _inverse(below)))
    return tuple(weights)


def _to_lanes(blocks: bytes) -> int:
    first, second = blocks[:_BLOCK_BYTES], blocks[_BLOCK_BYTES:]
    return int.from_bytes(first + bytes(_LANE_BYTES - _BLOCK_BYTES) + second, "big")


def _from_lanes(value: int) -> bytes:
    data = value.to_bytes(_LANE_BYTES + _BLOCK_BYTES, "big")
    return data[:_BLOCK_BYTES] + data[_LANE_BYTES:]


def _times(lanes: int, factor: int) -> int:
    """Each lane times one element of the field."""
    product = 0
    while factor:
        if factor & 1:
            product ^= lanes
        lanes <<= 1
        factor >>= 1
    while above := (product >> _BLOCK_BITS) & _LOW:
        product = (product & _LOW) ^ above ^ (above << 1) ^ (above << 2) ^ (above << 7)
    return product


def _inverse(element: int) -> int:
    """The element times which it is one: extended Euclid over GF(2)[x]. ``element`` is not zero."""
    remainder, divisor = _MODULUS, element
    left, factor = 0, 1
    while divisor != 1:
        shift = remainder.bit_length() - divisor.bit_length()
        if shift < 0:
            remainder, divisor, left, factor = divisor, remainder, factor, left
            continue
        remainder ^= divisor << shift
        left ^= factor << shift
    return factor
