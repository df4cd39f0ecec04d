"""Shamir's secret sharing of 32-byte secrets, 16 bytes at a time (pycryptodome, GF(2^128)).

Any t shares give the secret; fewer say nothing about it (Shamir 1979). pycryptodome draws the
polynomials from the operating system's generator.
"""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

SECRET_BYTES = 32
_BLOCK_BYTES = 16


def split_secret(secret: bytes, *, threshold: int, n_shares: int) -> list[bytes]:
    """``n_shares`` shares of 32 bytes each; element i belongs to index i + 1."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes")
    shares = [bytearray() for _ in range(n_shares)]
    for start in range(0, SECRET_BYTES, _BLOCK_BYTES):
        block = bytes(secret[start : start + _BLOCK_BYTES])
        for index, part in Shamir.split(threshold, n_shares, block, ssss=False):
            shares[index - 1] += part
    return [bytes(share) for share in shares]


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
    secret = b""
    for start in range(0, SECRET_BYTES, _BLOCK_BYTES):
        block = [(index, bytes(share[start : start + _BLOCK_BYTES])) for index, share in chosen]
        secret += Shamir.combine(block, ssss=False)
    return secret
