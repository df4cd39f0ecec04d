"""Frames: how messages travel between ServerApp, courier and site agent.

A frame is one :class:`Envelope`: a kind, a small JSON body and binary blobs. Its bytes are::

    b"LCN1" | u32 header length | canonical JSON header | blob 0 | blob 1 | ...

where the header is ``{"body": ..., "kind": ..., "sizes": [bytes of each blob]}``. All sizes are bounded
before anything is allocated, and nothing may follow the last blob. See ``shared/WIRE_FORMAT.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from shared.canonical import canonical_json, digest, parse_json
from shared.errors import MalformedMessageError

MAGIC = b"LCN1"
MAX_HEADER_BYTES = 8 * 1024 * 1024
MAX_BLOBS = 4096
MAX_FRAME_BYTES = 4 * 1024 * 1024 * 1024
KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
Blob: TypeAlias = bytes | memoryview
"""Raw bytes. What was read is bytes; what is about to be sent may be a view (of single bytes) of an array."""


@dataclass(frozen=True)
class Envelope:
    """One message: ``kind`` names its schema, ``body`` is JSON, ``blobs`` are raw bytes.

    The blobs are left out of the repr: they may hold secrets.
    """

    kind: str
    body: dict[str, Any]
    blobs: tuple[Blob, ...] = field(default=(), repr=False)

    def digest(self, domain: str) -> bytes:
        """32-byte digest over kind, body and all blobs."""
        return digest(domain, self.kind.encode(), canonical_json(self.body), *self.blobs)


def encode(envelope: Envelope) -> bytes:
    """Bytes of one envelope. Raises MalformedMessageError if it breaks a bound."""
    header = encode_header(envelope)
    return b"".join([MAGIC, len(header).to_bytes(4, "big"), header, *envelope.blobs])


def encode_header(envelope: Envelope) -> bytes:
    """The canonical JSON header alone: what travels beside blobs that a transport carries by itself."""
    _check_kind(envelope.kind)
    if len(envelope.blobs) > MAX_BLOBS:
        raise MalformedMessageError(f"{len(envelope.blobs)} blobs exceed the bound of {MAX_BLOBS}")
    header = canonical_json(
        {"kind": envelope.kind, "body": envelope.body, "sizes": [len(blob) for blob in envelope.blobs]}
    )
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedMessageError(f"header of {len(header)} bytes exceeds {MAX_HEADER_BYTES} bytes")
    return header


def decode(data: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> Envelope:
    """Parse one frame.

    Raises:
        MalformedMessageError: any byte is wrong, missing or left over, or a bound is broken.
    """
    if len(data) > max_bytes:
        raise MalformedMessageError(f"frame of {len(data)} bytes exceeds the bound of {max_bytes} bytes")
    if len(data) < 8 or data[:4] != MAGIC:
        raise MalformedMessageError("not a Lacuna frame: wrong first bytes")
    header_length = int.from_bytes(data[4:8], "big")
    if header_length > MAX_HEADER_BYTES or 8 + header_length > len(data):
        raise MalformedMessageError("frame is truncated, or its header is too long")
    view = memoryview(data)
    blobs: list[bytes] = []
    offset = 8 + header_length
    header = bytes(view[8:offset])
    for size in _sizes(_header(header)):
        blobs.append(bytes(view[offset : offset + size]))
        offset += size
    if offset != len(data):
        raise MalformedMessageError("frame length does not match its header")
    return decode_parts(header, blobs)


def decode_parts(header: bytes, blobs: Sequence[bytes]) -> Envelope:
    """Envelope from a header and blobs that travelled apart. Raises MalformedMessageError."""
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedMessageError(f"header of {len(header)} bytes exceeds {MAX_HEADER_BYTES} bytes")
    parsed = _header(header)
    if _sizes(parsed) != [len(blob) for blob in blobs]:
        raise MalformedMessageError("blob sizes do not match the header")
    return Envelope(kind=parsed["kind"], body=parsed["body"], blobs=tuple(blobs))


def to_carried(envelope: Envelope) -> tuple[dict[str, bytes | int], dict[str, bytes]]:
    """The envelope for a transport of named values: (header and number of blobs, blobs by index).

    Empty blobs are left out, because such transports (Flower's arrays) do not carry them.
    """
    blobs = {str(index): bytes(blob) for index, blob in enumerate(envelope.blobs) if blob}
    return {"header": encode_header(envelope), "blobs": len(envelope.blobs)}, blobs


def from_carried(values: Mapping[str, object], blobs: Mapping[str, bytes]) -> Envelope:
    """The inverse of :func:`to_carried`. Raises MalformedMessageError."""
    if set(values) != {"header", "blobs"}:
        raise MalformedMessageError("a message's frame record has the fields header and blobs")
    header, count = values["header"], values["blobs"]
    if not isinstance(header, bytes) or not isinstance(count, int) or not 0 <= count <= MAX_BLOBS:
        raise MalformedMessageError("a message's frame record is malformed")
    names = [str(index) for index in range(count)]
    if not set(blobs) <= set(names):
        raise MalformedMessageError("a message has blobs of unknown names")
    return decode_parts(header, [blobs.get(name, b"") for name in names])


def pack(kind: str, parts: Sequence[Envelope], body: dict[str, Any] | None = None) -> Envelope:
    """Several envelopes in one, for an exchange that carries more than one message."""
    index = [{"kind": part.kind, "body": part.body, "blobs": len(part.blobs)} for part in parts]
    return Envelope(
        kind=kind,
        body={**(body or {}), "parts": index},
        blobs=tuple(blob for part in parts for blob in part.blobs),
    )


def unpack(envelope: Envelope) -> list[Envelope]:
    """The inverse of :func:`pack`. Raises MalformedMessageError."""
    index = envelope.body.get("parts")
    if not isinstance(index, list) or len(index) > MAX_BLOBS:
        raise MalformedMessageError(f"{envelope.kind}: no list of parts")
    parts: list[Envelope] = []
    offset = 0
    for entry in index:
        if not isinstance(entry, dict) or set(entry) != {"kind", "body", "blobs"}:
            raise MalformedMessageError(f"{envelope.kind}: malformed part")
        count = entry["blobs"]
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_BLOBS:
            raise MalformedMessageError(f"{envelope.kind}: malformed number of blobs")
        if not isinstance(entry["body"], dict) or not isinstance(entry["kind"], str):
            raise MalformedMessageError(f"{envelope.kind}: malformed part")
        _check_kind(entry["kind"])
        blobs = envelope.blobs[offset : offset + count]
        if len(blobs) != count:
            raise MalformedMessageError(f"{envelope.kind}: blobs are missing")
        parts.append(Envelope(kind=entry["kind"], body=entry["body"], blobs=blobs))
        offset += count
    if offset != len(envelope.blobs):
        raise MalformedMessageError(f"{envelope.kind}: blobs are left over")
    return parts


def _check_kind(kind: str) -> None:
    if not KIND.fullmatch(kind):
        raise MalformedMessageError("an envelope's kind is 1 to 64 of a-z, 0-9 and _")


def _header(header: bytes) -> dict[str, Any]:
    parsed = parse_json(header, what="frame header", max_bytes=MAX_HEADER_BYTES)
    if not isinstance(parsed, dict) or set(parsed) != {"kind", "body", "sizes"}:
        raise MalformedMessageError("frame header has wrong fields")
    if not isinstance(parsed["kind"], str) or not isinstance(parsed["body"], dict):
        raise MalformedMessageError("frame header has fields of wrong types")
    _check_kind(parsed["kind"])
    return parsed


def _sizes(header: dict[str, Any]) -> list[int]:
    sizes = header["sizes"]
    if not isinstance(sizes, list) or len(sizes) > MAX_BLOBS:
        raise MalformedMessageError("frame header has a malformed list of sizes")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_FRAME_BYTES:
            raise MalformedMessageError("frame header has a malformed blob size")
    return sizes
