"""The primitives once more, written from ``shared/WIRE_FORMAT.md`` and the RFCs, with no code of ours.

Slow and plain on purpose: hashlib, hmac, whole numbers, and pycryptodome for block ciphers and Ed25519, where
the protocol uses ``cryptography``. The vectors come from here, so code that agrees with them agrees with a
second implementation.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from Crypto.Cipher import AES, ChaCha20_Poly1305
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa


def framed(domain: str, *parts: bytes) -> bytes:
    """Each piece with its 8-byte big-endian length, the domain first."""
    return b"".join(len(piece).to_bytes(8, "big") + piece for piece in (domain.encode(), *parts))


def digest(domain: str, *parts: bytes) -> bytes:
    return hashlib.sha256(framed(domain, *parts)).digest()


def plain_json(value: Any) -> bytes:
    """RFC 8785 for ASCII text and small whole numbers, which is all that the vectors have."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, 32 bytes."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5: the Montgomery ladder."""
    p = 2**255 - 19
    k = int.from_bytes(scalar, "little") & ~7 & ~(1 << 255) | (1 << 254)
    u = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3 = 1, 0, u, 1
    for bit in range(254, -1, -1):
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a, c * b
        aa, bb = a * a, b * b
        e = aa - bb
        new = (aa * bb % p, e * (aa + 121665 * e) % p, (da + cb) ** 2 % p, u * (da - cb) ** 2 % p)
        x2, z2, x3, z3 = new
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def x25519_public(scalar: bytes) -> bytes:
    return x25519(scalar, (9).to_bytes(32, "little"))


def keystream(key: bytes, size: int) -> bytes:
    """AES-256-CTR from counter block 0 (NIST SP 800-38A)."""
    cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0)
    return bytes(cipher.encrypt(bytes(size)))


def words(stream: bytes, bits: int) -> list[int]:
    """Little-endian words."""
    size = bits // 8
    return [int.from_bytes(stream[i : i + size], "little") for i in range(0, len(stream), size)]


def apply_masks(
    residues: Sequence[int], plus: Sequence[bytes], minus: Sequence[bytes], bits: int
) -> list[int]:
    """Residues with the streams of ``plus`` added and those of ``minus`` subtracted."""
    total = list(residues)
    for key, sign in [(key, 1) for key in plus] + [(key, -1) for key in minus]:
        stream = words(keystream(key, len(total) * bits // 8), bits)
        total = [(value + sign * word) % 2**bits for value, word in zip(total, stream, strict=True)]
    return total


def centred(residue: int, bits: int) -> int:
    return residue - 2**bits if residue >= 2 ** (bits - 1) else residue


def residue_bytes(residues: Sequence[int], bits: int) -> bytes:
    return b"".join(residue.to_bytes(bits // 8, "little") for residue in residues)


def seal(key: bytes, plaintext: bytes, context: bytes) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439) with the nonce zero: ciphertext, then tag."""
    cipher = ChaCha20_Poly1305.new(key=key, nonce=bytes(12))
    cipher.update(context)
    ciphertext, tag = cipher.encrypt_and_digest(plaintext)
    return bytes(ciphertext + tag)


def _times(a: int, b: int) -> int:
    """Product in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        a <<= 1
        if a >> 128:
            a ^= (1 << 128) | 0x87
        b >>= 1
    return result


def _inverse(a: int) -> int:
    """a^(2^128 - 2)."""
    result, power = 1, a
    for _ in range(127):
        power = _times(power, power)
        result = _times(result, power)
    return result


def shamir_share(index: int, secret: bytes, coefficients: Sequence[Sequence[bytes]]) -> bytes:
    """One share; ``coefficients`` are those of x^(t-1) ... x^1, for each block of 16 bytes of the secret."""
    share = b""
    for block, higher in enumerate(coefficients):
        value = 0
        for coefficient in (*higher, secret[16 * block : 16 * block + 16]):
            value = _times(value, index) ^ int.from_bytes(coefficient, "big")
        share += value.to_bytes(16, "big")
    return share


def shamir_secret(shares: Mapping[int, bytes]) -> bytes:
    """Lagrange interpolation at zero, all shares taken."""
    secret = b""
    for start in (0, 16):
        value = 0
        for index, share in shares.items():
            above, below = int.from_bytes(share[start : start + 16], "big"), 1
            for other in shares:
                if other != index:
                    above, below = _times(above, other), _times(below, index ^ other)
            value ^= _times(above, _inverse(below))
        secret += value.to_bytes(16, "big")
    return secret


def quantized(value: float, grid_step: float, clamp_steps: int | None) -> int:
    """Nearest whole number of steps, ties to even, of the binary64 quotient."""
    quotient = value / grid_step
    if quotient != quotient or quotient in (float("inf"), float("-inf")):
        return 0
    steps = round(Fraction(quotient))
    return steps if clamp_steps is None else max(-clamp_steps, min(clamp_steps, steps))


def verify_ed25519(public: bytes, signature: bytes, message: bytes) -> bool:
    """RFC 8032, by pycryptodome."""
    key = eddsa.import_public_key(public)
    try:
        eddsa.new(key, "rfc8032").verify(message, signature)
    except ValueError:
        return False
    return True


def ed25519_public(seed: bytes) -> bytes:
    return bytes(ECC.construct(curve="Ed25519", seed=seed).public_key().export_key(format="raw"))
