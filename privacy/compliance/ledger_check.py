"""The officer's own reading of a site's ledger export: signature, chain, charges.

Apart from :mod:`privacy.ledger_chain`, which writes them: the chain's hashes are recomputed here from the
definition (SHA-256 over length-prefixed domain, ledger id, number, previous hash, and the SHA-256 of the
canonical body under a domain of its own). Where an export does not verify, the first entry that is forged,
changed, removed, repeated or out of order is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from privacy.compliance.dsse import (
    EvidenceError,
    canonical,
    decode_base64,
    open_signed,
    strict_json,
    verify_signature,
)

LEDGER_PREDICATE = "ledger/v1"
LEDGER_FORMAT = "lacuna/ledger/v2"
BODY_DOMAIN = "lacuna/ledger-body/v2"
ENTRY_DOMAIN = "lacuna/ledger-entry/v2"
HEAD_DOMAIN = "lacuna/ledger-head/v1"
_CHARGE_FIELDS = {
    "kind", "study_id", "plan_sha256", "run_id", "purpose", "round", "attempt", "event", "time", "salt",
}  # fmt: skip
_EVENT_FIELDS = {
    "kind",
    "sampling_rate",
    "steps",
    "noise_multiplier_world",
    "noise_multiplier_colluding",
    "max_divergence",
}


@dataclass(frozen=True, kw_only=True)
class ChargedEvent:
    """What one charge says was spent; see ``privacy.dp.accounting.PrivacyEvent`` for the meaning."""

    kind: str
    sampling_rate: float
    steps: int
    noise_multiplier_world: float
    noise_multiplier_colluding: float
    max_divergence: float


@dataclass(frozen=True, kw_only=True)
class ChargeEntry:
    """One charge. ``sequence`` is the entry's number in the ledger, from 1."""

    sequence: int
    study_id: str
    plan_sha256: str
    run_id: str
    purpose: str
    round: int
    attempt: int
    event: ChargedEvent


@dataclass(frozen=True, kw_only=True)
class NoteEntry:
    """An entry that charges nothing, such as a commitment; ``details`` is what the site wrote."""

    sequence: int
    kind: str
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SeenHead:
    """A head of a ledger that somebody else keeps a receipt of; hashes and signature in hex."""

    ledger_id: str
    length: int
    entry_hash: str
    signature: str

    @classmethod
    def parse(cls, value: Any) -> SeenHead:
        """Parse the JSON form of a head. Raises EvidenceError."""
        if not isinstance(value, dict) or set(value) != {"ledger_id", "length", "entry_hash", "signature"}:
            raise EvidenceError("a ledger head has other fields than it must have")
        if type(value["length"]) is not int or not 1 <= value["length"] < 2**53:
            raise EvidenceError("a ledger head's length is not a number of entries")
        for name, size in (("ledger_id", 32), ("entry_hash", 64), ("signature", 128)):
            text = value[name]
            if not isinstance(text, str) or len(text) != size or not set(text) <= set("0123456789abcdef"):
                raise EvidenceError(f"a ledger head's {name} is malformed")
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class CheckedLedger:
    """A ledger whose signature and chain were verified. ``entry_hashes`` are hex, oldest first."""

    ledger_id: str
    site_key: str
    charges: tuple[ChargeEntry, ...]
    entry_hashes: tuple[str, ...]
    notes: tuple[NoteEntry, ...] = ()

    @property
    def length(self) -> int:
        return len(self.entry_hashes)

    def studies(self) -> tuple[str, ...]:
        """Studies with a charge, in the order of their first."""
        return tuple(dict.fromkeys(charge.study_id for charge in self.charges))

    def of_study(self, study_id: str) -> tuple[ChargeEntry, ...]:
        return tuple(charge for charge in self.charges if charge.study_id == study_id)


def open_ledger(data: bytes, *, key: str, what: str, seen: Iterable[SeenHead] = ()) -> CheckedLedger:
    """Verify an export under the site's key.

    Args:
        data: The export's bytes.
        key: The site's key, 64 hex digits.
        what: Name for errors.
        seen: Receipts: heads of this site's ledger that others saw. Without any, an old copy of a ledger
            cannot be told from a new one.

    Raises:
        EvidenceError: names what is wrong and, where there is one, the entry.
    """
    try:
        statement = open_signed(data, key=key, predicate_type=LEDGER_PREDICATE, what=what)
    except EvidenceError as error:
        fault = _fault_inside(data)
        raise EvidenceError(f"{error.message}{f'; {fault}' if fault else ''}") from error
    predicate = statement.predicate
    if set(predicate) != {"entries", "head"} or not isinstance(predicate["entries"], list):
        raise EvidenceError(f"{what}: not a ledger")
    fault = chain_fault(predicate["entries"])
    if fault is not None:
        raise EvidenceError(f"{what}: {fault}")
    entries = predicate["entries"]
    opened = entries[0]["body"]
    if opened.get("site_key") != key:
        raise EvidenceError(f"{what}: forged: the ledger was opened with another key than this site's")
    ledger_id = str(opened["ledger_id"])
    head = SeenHead.parse(predicate["head"])
    hashes = tuple(str(entry["entry_hash"]) for entry in entries)
    fault = head_fault(entries, predicate["head"])
    if fault is not None:
        raise EvidenceError(f"{what}: {fault}")
    if statement.subjects != {f"ledger/{ledger_id}": hashes[-1]}:
        raise EvidenceError(f"{what}: its subject is not its last entry")
    ledger = CheckedLedger(
        ledger_id=ledger_id,
        site_key=key,
        charges=_charges(entries, what),
        entry_hashes=hashes,
        notes=_notes(entries),
    )
    for receipt in (head, *seen):
        check_seen(ledger, receipt, what=what)
    return ledger


def check_seen(ledger: CheckedLedger, seen: SeenHead, *, what: str) -> None:
    """Check that a ledger continues a head that its site signed earlier. Raises EvidenceError."""
    verify_signature(
        key=ledger.site_key,
        signature=bytes.fromhex(seen.signature),
        message=_framed(
            HEAD_DOMAIN,
            seen.ledger_id.encode(),
            seen.length.to_bytes(8, "big"),
            bytes.fromhex(seen.entry_hash),
        ),
        what=f"{what}: head at {seen.length} entries",
    )
    if seen.ledger_id != ledger.ledger_id:
        raise EvidenceError(
            f"{what}: the site signed heads of two ledgers; this is not the one that peers saw"
        )
    if seen.length > ledger.length:
        raise EvidenceError(
            f"{what}: removed: {ledger.length} entries, but its site had signed {seen.length}: an old copy"
        )
    if ledger.entry_hashes[seen.length - 1] != seen.entry_hash:
        raise EvidenceError(f"{what}: changed: entry {seen.length} is not the one that peers saw")


def chain_fault(entries: Any) -> str | None:
    """What is wrong with a list of entries, naming the first bad one; None if the chain holds.

    Signatures are not looked at here.
    """
    if not isinstance(entries, list) or not entries:
        return "removed: the ledger has no entry"
    numbers = []
    for place, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or set(entry) != {"sequence", "body", "previous_hash", "entry_hash"}:
            return f"changed: entry {place} is malformed"
        if type(entry["sequence"]) is not int or not isinstance(entry["body"], dict):
            return f"changed: entry {place} is malformed"
        numbers.append(entry["sequence"])
    for place, number in enumerate(numbers, start=1):
        if number != place:
            if numbers.count(number) > 1:
                return f"repeated: entry {number} stands in the ledger twice"
            if place in numbers:
                return f"reordered: entry {number} stands where entry {place} belongs"
            return f"removed: entry {place} is missing"
    ledger_id = entries[0]["body"].get("ledger_id")
    if entries[0]["body"].get("kind") != "opened" or not isinstance(ledger_id, str):
        return "changed: entry 1 does not open a ledger"
    if entries[0]["body"].get("format") != LEDGER_FORMAT:
        return f"changed: entry 1 does not open a ledger of {LEDGER_FORMAT}"
    previous = "0" * 64
    for place, entry in enumerate(entries, start=1):
        if place > 1 and entry["body"].get("kind") == "opened":
            return f"changed: entry {place} opens a ledger inside a ledger"
        try:
            expected = entry_hash(ledger_id, place, entry["previous_hash"], entry["body"])
        except (ValueError, TypeError):
            return f"changed: entry {place} is malformed"
        salt = entry["body"].get("salt")
        if not isinstance(salt, str) or len(salt) != 32 or not set(salt) <= set("0123456789abcdef"):
            return f"changed: entry {place} has no proper salt"
        if expected != entry["entry_hash"]:
            return f"changed: entry {place} does not have its hash"
        if entry["previous_hash"] != previous:
            return f"changed: entry {place} does not continue entry {place - 1}"
        previous = expected
    return None


def head_fault(entries: list[dict[str, Any]], head: Any) -> str | None:
    """What is missing or too much in a whole chain, by the head that came with it; None if nothing is.

    The head's signature is not looked at here.
    """
    if not isinstance(head, dict) or type(head.get("length")) is not int:
        return "changed: the head is malformed"
    counted, found = head["length"], len(entries)
    if counted > found:
        return f"removed: entry {found + 1} is missing at the end, the head counts {counted} entries"
    if counted < found:
        return f"added: the head counts {counted} entries, entry {counted + 1} is not among them"
    if head.get("ledger_id") != entries[0]["body"]["ledger_id"]:
        return "changed: the head is of another ledger"
    if head.get("entry_hash") != entries[-1]["entry_hash"]:
        return f"changed: entry {found} is not the one that the head is of"
    return None


def entry_hash(ledger_id: str, sequence: int, previous_hash: str, body: dict[str, Any]) -> str:
    """Hex hash of one entry, from its definition. Raises ValueError or TypeError for malformed parts."""
    message = _framed(
        ENTRY_DOMAIN,
        ledger_id.encode(),
        sequence.to_bytes(8, "big"),
        bytes.fromhex(previous_hash),
        hashlib.sha256(_framed(BODY_DOMAIN, canonical(body).encode())).digest(),
    )
    return hashlib.sha256(message).hexdigest()


def _framed(domain: str, *parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in (domain.encode("ascii"), *parts))


def _charges(entries: list[dict[str, Any]], what: str) -> tuple[ChargeEntry, ...]:
    charges: list[ChargeEntry] = []
    seen: set[tuple[str, int]] = set()
    for entry in entries:
        body = entry["body"]
        if body.get("kind") != "charge":
            continue
        where = f"{what}: entry {entry['sequence']}"
        if set(body) != _CHARGE_FIELDS or body["purpose"] not in ("train", "audit"):
            raise EvidenceError(f"{where}: malformed charge")
        if not all(isinstance(body[name], str) for name in ("study_id", "plan_sha256", "run_id")):
            raise EvidenceError(f"{where}: malformed charge")
        if not all(type(body[name]) is int and body[name] >= 0 for name in ("round", "attempt")):
            raise EvidenceError(f"{where}: malformed charge")
        attempt = (body["study_id"], body["attempt"])
        if attempt in seen:
            raise EvidenceError(f"{where}: attempt {attempt[1]} is charged a second time")
        seen.add(attempt)
        charges.append(
            ChargeEntry(
                sequence=entry["sequence"],
                event=_event(body["event"], where),
                **{name: body[name] for name in _CHARGE_FIELDS - {"kind", "event", "time", "salt"}},
            )
        )
    return tuple(charges)


def _notes(entries: list[dict[str, Any]]) -> tuple[NoteEntry, ...]:
    return tuple(
        NoteEntry(sequence=entry["sequence"], kind=entry["body"]["kind"], details=entry["body"]["details"])
        for entry in entries
        if isinstance(entry["body"].get("details"), dict) and isinstance(entry["body"].get("kind"), str)
    )


def _event(value: Any, where: str) -> ChargedEvent:
    if not isinstance(value, dict) or set(value) != _EVENT_FIELDS:
        raise EvidenceError(f"{where}: malformed privacy event")
    numbers = {name: value[name] for name in _EVENT_FIELDS - {"kind", "steps"}}
    if type(value["steps"]) is not int or any(type(n) not in (int, float) for n in numbers.values()):
        raise EvidenceError(f"{where}: malformed privacy event")
    event = ChargedEvent(kind=value["kind"], steps=value["steps"], **numbers)
    if event.kind == "unprotected/v1":
        return event
    if event.kind != "gaussian/v1":
        raise EvidenceError(f"{where}: privacy event of unknown kind {str(event.kind)[:40]!r}")
    if not (
        0 < event.sampling_rate <= 1
        and 1 <= event.steps <= 10**9
        and event.noise_multiplier_world > 0
        and event.noise_multiplier_colluding > 0
        and event.max_divergence >= 0
    ):
        raise EvidenceError(f"{where}: privacy event with numbers out of range")
    return event


def _fault_inside(data: bytes) -> str | None:
    """Best effort, for an export whose signature fails: which entry was touched."""
    try:
        envelope = strict_json(data, what="export")
        payload = strict_json(decode_base64(envelope["payload"], what="export"), what="export")
        entries, head = payload["predicate"]["entries"], payload["predicate"]["head"]
        return chain_fault(entries) or head_fault(entries, head)
    except (EvidenceError, KeyError, TypeError, IndexError):
        return None
