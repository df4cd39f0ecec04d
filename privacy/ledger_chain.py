"""The ledger's chain, its signed heads and its exports: pure, without files.

Each entry's hash covers the ledger's id, the entry's number, the hash of the entry before and the digest of
its body's canonical JSON, so that a changed, removed, reordered or transplanted entry breaks the chain at a
place that can be named. Bodies hold 16 random bytes: a body's digest can be shown to others, who then check
that one head continues another (:mod:`privacy.ledger_continuity`), and tells them nothing about the body.
Only the site can sign heads and exports; only somebody who has seen an earlier head can tell that a site
shows an old or a rewritten ledger.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from privacy.dp.accounting import EpsilonReport, PrivacyEvent, View, epsilon
from shared.attestation import Statement, Subject, open_statement, sign_statement
from shared.canonical import DIGEST_BYTES, canonical_json, digest
from shared.errors import MalformedMessageError, PeerError
from shared.identity import SIGNATURE_BYTES, BadSignatureError, SigningKey, VerifyKey

OPENED = "opened"
CHARGE = "charge"
ATTEMPT = "attempt"
ENDED = "study-ended"

FORMAT = "lacuna/ledger/v2"
"""Stands in the first entry. Version 1 had no salt in its bodies and hashed them without a digest between."""
SALT_BYTES = 16
GENESIS_HASH = bytes(DIGEST_BYTES)
PREDICATE_TYPE = "ledger/v1"
_BODY_DOMAIN = "lacuna/ledger-body/v2"
_ENTRY_DOMAIN = "lacuna/ledger-entry/v2"
_HEAD_DOMAIN = "lacuna/ledger-head/v1"

Fault = Literal["malformed", "forged", "changed", "removed", "reordered", "truncated", "rewritten"]


class LedgerTamperedError(PeerError):
    """A ledger or its export does not verify. ``fault`` says how, ``sequence`` where (None: as a whole)."""

    def __init__(self, fault: Fault, message: str, *, sequence: int | None = None) -> None:
        super().__init__(f"{fault}: {message}")
        self.fault: Fault = fault
        self.sequence = sequence


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One entry. ``sequence`` counts from 1; hashes are 32 bytes."""

    sequence: int
    body: dict[str, Any]
    previous_hash: bytes
    entry_hash: bytes

    @classmethod
    def genesis(cls, *, ledger_id: str, key: VerifyKey, time: str, salt: bytes) -> LedgerEntry:
        """The first entry: names the ledger and the key that signs for it. ``salt``: 16 random bytes."""
        body = {
            "kind": OPENED,
            "format": FORMAT,
            "ledger_id": ledger_id,
            "site_key": key.hex(),
            "time": time,
            "salt": salt.hex(),
        }
        return cls(
            sequence=1, body=body, previous_hash=GENESIS_HASH,
            entry_hash=chain_hash(ledger_id, 1, GENESIS_HASH, body_digest(body)),
        )  # fmt: skip

    @classmethod
    def chain(cls, previous: LedgerEntry, *, ledger_id: str, body: dict[str, Any]) -> LedgerEntry:
        """The entry after ``previous``. The body has a ``salt`` of 16 random bytes in hex."""
        sequence = previous.sequence + 1
        return cls(
            sequence=sequence, body=body, previous_hash=previous.entry_hash,
            entry_hash=chain_hash(ledger_id, sequence, previous.entry_hash, body_digest(body)),
        )  # fmt: skip

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def event(self) -> PrivacyEvent:
        """The event of a charge. Raises MalformedMessageError for other entries."""
        if self.kind != CHARGE:
            raise MalformedMessageError(f"entry {self.sequence} is no charge")
        return PrivacyEvent.from_dict(self.body.get("event"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "body": self.body,
            "previous_hash": self.previous_hash.hex(),
            "entry_hash": self.entry_hash.hex(),
        }

    @classmethod
    def from_dict(cls, value: Any) -> LedgerEntry:
        """Parse :meth:`to_dict`'s form. Raises MalformedMessageError; verifies nothing."""
        if not isinstance(value, dict) or set(value) != {"sequence", "body", "previous_hash", "entry_hash"}:
            raise MalformedMessageError("a ledger entry has other fields than it must have")
        sequence, body = value["sequence"], value["body"]
        if isinstance(sequence, bool) or not isinstance(sequence, int) or not isinstance(body, dict):
            raise MalformedMessageError("a ledger entry is malformed")
        return cls(
            sequence=sequence,
            body=body,
            previous_hash=_hex(value["previous_hash"], DIGEST_BYTES),
            entry_hash=_hex(value["entry_hash"], DIGEST_BYTES),
        )


@dataclass(frozen=True, kw_only=True)
class LedgerHead:
    """The state of a ledger, signed by its site: travels in key messages, witnesses and receipts."""

    ledger_id: str
    length: int
    entry_hash: bytes
    signature: bytes

    @classmethod
    def sign(cls, key: SigningKey, *, ledger_id: str, length: int, entry_hash: bytes) -> LedgerHead:
        parts = _head_parts(ledger_id, length, entry_hash)
        return cls(
            ledger_id=ledger_id, length=length, entry_hash=entry_hash,
            signature=key.sign(_HEAD_DOMAIN, *parts),
        )  # fmt: skip

    def verify(self, key: VerifyKey) -> None:
        """Raises BadSignatureError unless ``key`` signed this head."""
        key.verify(self.signature, _HEAD_DOMAIN, *_head_parts(self.ledger_id, self.length, self.entry_hash))

    def to_dict(self) -> dict[str, Any]:
        return {
            "ledger_id": self.ledger_id,
            "length": self.length,
            "entry_hash": self.entry_hash.hex(),
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_dict(cls, value: Any) -> LedgerHead:
        """Parse :meth:`to_dict`'s form. Raises MalformedMessageError; does not verify the signature."""
        if not isinstance(value, dict) or set(value) != {"ledger_id", "length", "entry_hash", "signature"}:
            raise MalformedMessageError("a ledger head has other fields than it must have")
        length = value["length"]
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length < 2**53:
            raise MalformedMessageError("a ledger head's length is not a number of entries")
        return cls(
            ledger_id=_hex(value["ledger_id"], 16).hex(),
            length=length,
            entry_hash=_hex(value["entry_hash"], DIGEST_BYTES),
            signature=_hex(value["signature"], SIGNATURE_BYTES),
        )


@dataclass(frozen=True, kw_only=True)
class LedgerExport:
    """A verified export."""

    ledger_id: str
    entries: tuple[LedgerEntry, ...]
    head: LedgerHead


def spent(
    entries: Iterable[LedgerEntry],
    *,
    delta: float,
    view: View = "world",
    study_id: str | None = None,
    also: Iterable[PrivacyEvent] = (),
) -> EpsilonReport:
    """Epsilon of all charges among ``entries`` (of one study, or of all) and of the events ``also``."""
    events = [
        entry.event
        for entry in entries
        if entry.kind == CHARGE and (study_id is None or entry.body.get("study_id") == study_id)
    ]
    return epsilon([*events, *also], delta, view=view)


def ended_studies(entries: Iterable[LedgerEntry]) -> frozenset[str]:
    """Studies that the site ended: they charge nothing any more."""
    return frozenset(str(entry.body["study_id"]) for entry in entries if entry.kind == ENDED)


def check_chain(entries: Sequence[LedgerEntry], *, key: VerifyKey) -> str:
    """Verify a chain from its first entry on.

    Returns:
        The ledger's id.

    Raises:
        LedgerTamperedError: names the first entry that is changed, removed or out of order.
    """
    if not entries:
        raise LedgerTamperedError("removed", "a ledger has at least the entry that opened it")
    first = entries[0].body
    ledger_id = first.get("ledger_id")
    if first.get("kind") != OPENED and entries[0].sequence == 1:
        raise LedgerTamperedError("changed", "entry 1 does not open a ledger", sequence=1)
    if first.get("kind") == OPENED and first.get("format") != FORMAT:
        raise LedgerTamperedError("changed", f"entry 1 does not open a ledger of {FORMAT}", sequence=1)
    previous_hash = GENESIS_HASH
    for expected, entry in enumerate(entries, start=1):
        _check_entry(entries, entry, expected, previous_hash, str(ledger_id))
        previous_hash = entry.entry_hash
    if first.get("site_key") != key.hex():
        raise LedgerTamperedError("forged", "the ledger was opened with another key than this site's")
    return str(ledger_id)


def _check_entry(
    entries: Sequence[LedgerEntry], entry: LedgerEntry, expected: int, previous_hash: bytes, ledger_id: str
) -> None:
    if entry.sequence != expected:
        fault: Fault = "reordered" if any(e.sequence == expected for e in entries) else "removed"
        raise LedgerTamperedError(
            fault, f"entry {expected} is not where it belongs (found {entry.sequence})", sequence=expected
        )
    if not isinstance(entry.body.get("kind"), str) or (entry.kind == OPENED) != (expected == 1):
        raise LedgerTamperedError("changed", f"entry {expected} has no proper kind", sequence=expected)
    if not _is_salt(entry.body.get("salt")):
        raise LedgerTamperedError("changed", f"entry {expected} has no proper salt", sequence=expected)
    if entry.entry_hash != chain_hash(ledger_id, expected, entry.previous_hash, body_digest(entry.body)):
        raise LedgerTamperedError("changed", f"entry {expected} does not have its hash", sequence=expected)
    if entry.previous_hash != previous_hash:
        raise LedgerTamperedError(
            "changed", f"entry {expected} does not continue entry {expected - 1}", sequence=expected
        )


def check_seen_head(entries: Sequence[LedgerEntry], seen: LedgerHead, *, ledger_id: str) -> None:
    """Check that a verified chain continues a head that was seen before.

    Raises:
        LedgerTamperedError: ``truncated`` if the chain is shorter, ``rewritten`` if it is another one.
    """
    if seen.ledger_id != ledger_id:
        raise LedgerTamperedError("rewritten", "the head seen before is of another ledger")
    if seen.length > len(entries):
        raise LedgerTamperedError(
            "truncated", f"the ledger has {len(entries)} entries, {seen.length} were seen before: an old copy"
        )
    if entries[seen.length - 1].entry_hash != seen.entry_hash:
        raise LedgerTamperedError(
            "rewritten", f"entry {seen.length} is not the one that was seen before", sequence=seen.length
        )


def export_statement(entries: Sequence[LedgerEntry], head: LedgerHead, key: SigningKey) -> bytes:
    """The signed export: a DSSE envelope whose predicate holds every entry and the head."""
    return sign_statement(
        Statement(
            predicate_type=PREDICATE_TYPE,
            subjects=(Subject(name=f"ledger/{head.ledger_id}", sha256=head.entry_hash.hex()),),
            predicate={"entries": [entry.to_dict() for entry in entries], "head": head.to_dict()},
        ),
        key,
    )


def read_export(
    data: bytes, key: VerifyKey, *, known_heads: Iterable[LedgerHead] = (), what: str = "ledger export"
) -> LedgerExport:
    """Verify an export.

    Args:
        data: The file's bytes.
        key: The site's key, from the plan's roster.
        known_heads: Heads of this site that the reader has receipts of. Without any, an old export cannot be
            told from a new one.

    Raises:
        LedgerTamperedError: names what is wrong, and the entry where there is one.
    """
    try:
        statement = open_statement(data, key=key, predicate_type=PREDICATE_TYPE, what=what)
    except BadSignatureError as error:
        _name_broken_entry(data, key)
        raise LedgerTamperedError("forged", str(error)) from error
    except MalformedMessageError as error:
        raise LedgerTamperedError("malformed", str(error)) from error
    try:
        predicate = statement.predicate
        if set(predicate) != {"entries", "head"} or not isinstance(predicate["entries"], list):
            raise MalformedMessageError(f"{what}: not a ledger")
        entries = tuple(LedgerEntry.from_dict(value) for value in predicate["entries"])
        head = LedgerHead.from_dict(predicate["head"])
        ledger_id = check_chain(entries, key=key)
        _check_charges(entries)
    except MalformedMessageError as error:
        raise LedgerTamperedError("malformed", str(error)) from error
    try:
        head.verify(key)
    except BadSignatureError as error:
        raise LedgerTamperedError("forged", f"{what}: its head is not signed by this site") from error
    check_seen_head(entries, head, ledger_id=ledger_id)
    if head.length != len(entries) or statement.subjects != (
        Subject(name=f"ledger/{ledger_id}", sha256=head.entry_hash.hex()),
    ):
        raise LedgerTamperedError("changed", f"{what}: head and subject are not those of its last entry")
    for known in known_heads:
        try:
            known.verify(key)
        except BadSignatureError as error:
            raise LedgerTamperedError("forged", "a receipt's head is not signed by this site") from error
        check_seen_head(entries, known, ledger_id=ledger_id)
    return LedgerExport(ledger_id=ledger_id, entries=entries, head=head)


def _name_broken_entry(data: bytes, key: VerifyKey) -> None:
    """Where a signature does not verify, say which entry broke the chain, if one did. Trusts nothing."""
    try:
        payload = json.loads(base64.b64decode(json.loads(data)["payload"]))
        entries = [LedgerEntry.from_dict(value) for value in payload["predicate"]["entries"]]
        check_chain(entries, key=key)
    except (MalformedMessageError, ValueError, KeyError, TypeError, RecursionError):
        return


def _check_charges(entries: Iterable[LedgerEntry]) -> None:
    seen = set()
    for entry in entries:
        if entry.kind != CHARGE:
            continue
        entry.event  # noqa: B018 (parses, and raises for a malformed event)
        attempt = (entry.body.get("study_id"), entry.body.get("attempt"))
        if not isinstance(attempt[0], str) or isinstance(attempt[1], bool) or not isinstance(attempt[1], int):
            raise MalformedMessageError(f"entry {entry.sequence}: a charge without study or attempt")
        if attempt in seen:
            raise MalformedMessageError(f"entry {entry.sequence} charges an attempt a second time")
        seen.add(attempt)


def body_digest(body: dict[str, Any]) -> bytes:
    """32 bytes for an entry's body; hides the body from whoever does not know its salt."""
    return digest(_BODY_DOMAIN, canonical_json(body))


def chain_hash(ledger_id: str, sequence: int, previous_hash: bytes, body: bytes) -> bytes:
    """An entry's hash (32 bytes) from the hash before it and the digest of its body."""
    try:
        return digest(_ENTRY_DOMAIN, ledger_id.encode(), sequence.to_bytes(8, "big"), previous_hash, body)
    except OverflowError as error:
        raise MalformedMessageError("a ledger entry's number is out of range") from error


def _is_salt(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{2 * SALT_BYTES}}}", value) is not None


def _head_parts(ledger_id: str, length: int, entry_hash: bytes) -> tuple[bytes, bytes, bytes]:
    return ledger_id.encode(), length.to_bytes(8, "big"), entry_hash


def _hex(value: Any, size: int) -> bytes:
    try:
        raw = bytes.fromhex(value)
    except (ValueError, TypeError) as error:
        raise MalformedMessageError("hex digits expected") from error
    if len(raw) != size or raw.hex() != value:
        raise MalformedMessageError(f"{2 * size} lower-case hex digits expected")
    return raw
