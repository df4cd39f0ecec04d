"""Corrupted ledgers against ``lacuna compliance budget``: none is accepted, and what was done is named.

Three hands: somebody without the key changes bytes, or entries, of an export; the site itself signs entries
that do not hold together. What a site rewrites from some entry on, with every hash and signature in order, is
seen by those alone who kept a head; tests of that are here too.
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from release_study import Study, attempt_records, make_ledger

from deploy.cli.main import main
from privacy.ledger_chain import (
    LedgerEntry,
    LedgerHead,
    body_digest,
    chain_hash,
    export_statement,
    read_export,
)
from shared.attestation import Statement, Subject, sign_statement
from shared.exit_codes import ExitCode
from shared.identity import SigningKey
from shared.plan_package import write_plan_package

FILES_A_CALL = 250
Entries = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """``data`` in place of the export. ``named`` matches what the command must say of it."""

    kind: str
    data: bytes
    named: str


class Corruptor:
    """Draws corruptions of one export, all of them seeded."""

    def __init__(self, study: Study, other: bytes, *, seed: int) -> None:
        self.data = study.inputs.ledgers["alpha"]
        self.key, self._stranger = study.keys["alpha"], study.keys["beta"]
        self._other = payload(other)["predicate"]["entries"]
        self._rng = random.Random(seed)
        self._drawings: list[Callable[[], Corruption]] = [
            self._bytes, self._entry, self._site_signs_entry, self._signature, self._head,
        ]  # fmt: skip

    def draw(self) -> Corruption:
        while True:
            corruption = self._rng.choice(self._drawings)()
            if corruption.data != self.data:
                return corruption

    def _bytes(self) -> Corruption:
        """Flips, insertions, deletions, blocks moved, the end cut off: anywhere in the file."""
        rng, data = self._rng, bytearray(self.data)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            at = rng.randrange(len(data))
            match rng.randrange(6):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at:at] = rng.randbytes(rng.randrange(1, 5))
                case 2:
                    del data[at : at + rng.randrange(1, 200)]
                case 3:
                    data[at : at + 1] = rng.choice([b" ", b"\n", b"0", b"=", b"A", b"{"])
                case 4:
                    del data[max(1, at) :]
                case 5:
                    block = data[at : at + 64]
                    del data[at : at + 64]
                    place = rng.randrange(len(data) + 1)
                    data[place:place] = block
            if not data:
                data = bytearray(b"{")
        return Corruption(kind="bytes", data=bytes(data), named=".")

    def _entry(self) -> Corruption:
        """Somebody without the key: entry and signature are both named."""
        kind, entries, named = self._broken_chain()
        value = payload(self.data)
        value["predicate"]["entries"] = entries
        return Corruption(
            kind=f"{kind}, not signed", data=with_payload(self.data, value),
            named=f"signature does not verify.*{named}",
        )  # fmt: skip

    def _site_signs_entry(self) -> Corruption:
        kind, entries, named = self._broken_chain()
        value = payload(self.data)["predicate"]
        value["entries"] = entries
        return Corruption(kind=f"{kind}, signed by the site", data=self._signed(value), named=named)

    def _broken_chain(self) -> tuple[str, Entries, str]:
        """A chain that does not hold, and how that must be named."""
        rng = self._rng
        entries: Entries = payload(self.data)["predicate"]["entries"]
        place = rng.randrange(len(entries))
        number = place + 1
        match rng.randrange(8):
            case 0:
                del entries[place]
                last = number > len(entries)
                return "removed", entries, f"removed: entry {number} is missing" + (" at the end" * last)
            case 1:
                moved = rng.choice([i for i in range(len(entries)) if i != place])
                entries.insert(moved, entries.pop(place))
                return (
                    "reordered",
                    entries,
                    f"reordered: entry \\d+ stands where entry {min(place, moved) + 1}",
                )
            case 2:
                entries.insert(rng.randrange(place, len(entries)) + 1, json.loads(json.dumps(entries[place])))
                return "repeated", entries, f"repeated: entry {number} stands"
            case 3:
                stranger = json.loads(json.dumps(rng.choice(self._other)))
                entries[place] = {**stranger, "sequence": number}
                return "from another ledger", entries, f"changed: entry ({number}|{number + 1}|2) "
            case 4:
                field = rng.choice(["previous_hash", "entry_hash"])
                entries[place][field] = self._changed(entries[place][field])
                return "hash changed", entries, f"changed: entry {number} "
            case 5:
                entries[place]["sequence"] = rng.choice([0, -1, 10**6, True, "1", 1.5])
                return "number changed", entries, f"(removed|changed): entry ({number}|\\d+) is"
            case 6:
                number = rng.randrange(2, len(entries))
                return "spliced", spliced(entries, number), f"changed: entry {number} does not continue"
            case _:
                self._change_body(entries[place]["body"])
                return "body changed", entries, f"changed: entry {number} "

    def _change_body(self, body: dict[str, Any]) -> None:
        """One field of a body, or of the event inside; or a field more, or one less."""
        rng = self._rng
        owner = body
        if isinstance(body.get("event"), dict) and rng.random() < 0.6:
            owner = body["event"]
        name = rng.choice(sorted(owner))
        match rng.randrange(4):
            case 0:
                del owner[name]
            case 1:
                owner["comment"] = "by hand"
            case _:
                owner[name] = self._changed(owner[name])

    def _changed(self, value: Any) -> Any:
        rng = self._rng
        if isinstance(value, bool) or value is None:
            return 1
        if isinstance(value, int | float):
            candidates = [value + 1, value * 10 + 3, 0, -value - 1, None, str(value), 1e300]
            return rng.choice([c for c in candidates if c != value or isinstance(c, str)])
        if isinstance(value, str):
            at = rng.randrange(len(value)) if value else 0
            flipped = "0" if value[at : at + 1] != "0" else "1"
            return rng.choice([value[:at] + flipped + value[at + 1 :], value + "0", value[:-1] or "x", 7, []])
        return rng.choice([None, [], "x", 3])

    def _signature(self) -> Corruption:
        """A signature that is not the site's over this payload."""
        rng, envelope = self._rng, json.loads(self.data)
        value = payload(self.data)
        signature = base64.b64decode(envelope["signatures"][0]["sig"])
        match rng.randrange(4):
            case 0:
                forged = rng.randbytes(64)
            case 1:
                forged = bytes([signature[0] ^ (1 << rng.randrange(8))]) + signature[1:]
            case 2:
                theirs = json.loads(sign_statement(statement(value["predicate"]), self._stranger))
                forged = base64.b64decode(theirs["signatures"][0]["sig"])
            case _:
                forged = signature[32:] + signature[:32]
        envelope["signatures"][0]["sig"] = base64.b64encode(forged).decode()
        return Corruption(
            kind="forged signature", data=rfc8785.dumps(envelope), named="signature does not verify"
        )

    def _head(self) -> Corruption:
        """The site signs the whole, but its head is not the one of these entries, or not its own."""
        rng, value = self._rng, payload(self.data)["predicate"]
        head = value["head"]
        match rng.randrange(5):
            case 0:
                head["length"] += rng.choice([1, 2, 50])
                named = "removed: entry \\d+ is missing at the end"
            case 1:
                head["length"] -= 1
                named = "added: .*entry \\d+ is not among them"
            case 2:
                head["entry_hash"] = rng.randbytes(32).hex()
                named = "changed: entry \\d+ is not the one that the head is of"
            case 3:
                head["signature"] = rng.randbytes(64).hex()
                named = "head at \\d+ entries: the signature does not verify"
            case _:
                theirs = LedgerHead.sign(
                    self._stranger, ledger_id=head["ledger_id"], length=head["length"],
                    entry_hash=bytes.fromhex(head["entry_hash"]),
                )  # fmt: skip
                value["head"] = theirs.to_dict()
                named = "head at \\d+ entries: the signature does not verify"
        return Corruption(kind="head", data=self._signed(value), named=named)

    def _signed(self, predicate: dict[str, Any]) -> bytes:
        try:
            return sign_statement(statement(predicate), self.key)
        except Exception:  # what has no canonical form cannot be signed either
            return self.data


def spliced(entries: Entries, number: int) -> Entries:
    """Without one entry, the later ones renumbered and each hashed anew: only the links give it away."""
    ledger_id = entries[0]["body"]["ledger_id"]
    rest = entries[: number - 1] + entries[number:]
    for place, entry in enumerate(rest[number - 1 :], start=number):
        entry["sequence"] = place
        entry["entry_hash"] = chain_hash(
            ledger_id, place, bytes.fromhex(entry["previous_hash"]), body_digest(entry["body"])
        ).hex()
    return rest


def payload(data: bytes) -> dict[str, Any]:
    value = json.loads(base64.b64decode(json.loads(data)["payload"]))
    assert isinstance(value, dict)
    return value


def with_payload(data: bytes, value: dict[str, Any]) -> bytes:
    envelope = json.loads(data)
    envelope["payload"] = base64.b64encode(rfc8785.dumps(value)).decode()
    return rfc8785.dumps(envelope)


def statement(predicate: dict[str, Any]) -> Statement:
    head = predicate["head"]
    return Statement(
        predicate_type="ledger/v1",
        subjects=(Subject(name=f"ledger/{head['ledger_id']}", sha256=head["entry_hash"]),),
        predicate=predicate,
    )


@pytest.fixture(scope="module")
def package(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan_package(
        tmp_path_factory.mktemp("package") / "plan", study.plan, key=study.coordinator,
        autoencoder=study.autoencoder, prior=study.prior,
    ).root  # fmt: skip


@pytest.fixture(scope="module")
def other(study: Study, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Another ledger of the same site."""
    root = tmp_path_factory.mktemp("other") / "alpha"
    return make_ledger(root, study.keys["alpha"], study.plan, attempt_records())


@pytest.fixture
def officer(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[Any, list[dict[str, Any]]]]]:
    """Runs ``lacuna compliance budget`` on files with these contents; exit code and one row a file."""

    def check(contents: list[bytes], *words: str) -> tuple[Any, list[dict[str, Any]]]:
        paths = []
        for place, content in enumerate(contents):
            paths.append(tmp_path / f"{place}.json")
            paths[-1].write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            main(["compliance", "budget", *map(str, paths), "--plan", str(package), "--json", *words])
        shown = capsys.readouterr()
        assert "bug:" not in shown.err, shown.err
        return stop.value.code, json.loads(shown.out)

    yield check


def corrupt(study: Study, other: bytes, officer: Any, *, count: int, seed: int) -> None:
    corruptor = Corruptor(study, other, seed=seed)
    kinds: dict[str, int] = {}
    for start in range(0, count, FILES_A_CALL):
        drawn = [corruptor.draw() for _ in range(min(FILES_A_CALL, count - start))]
        code, rows = officer([corruption.data for corruption in drawn])
        assert code == ExitCode.PEER_MISBEHAVED
        assert len(rows) == len(drawn)
        for corruption, row in zip(drawn, rows, strict=True):
            kinds[corruption.kind] = kinds.get(corruption.kind, 0) + 1
            assert row["fault"] and row["epsilon_world"] is None, (corruption.kind, row)
            assert re.search(corruption.named, row["fault"], re.DOTALL), (corruption.kind, row["fault"])
    assert len(kinds) == 19 and min(kinds.values()) >= count / 250, kinds


def test_the_untouched_export_is_accepted(study: Study, officer: Any) -> None:
    code, (row,) = officer([study.inputs.ledgers["alpha"]])
    assert code == 0 and row["site"] == "alpha" and row["freshness"] == "unchecked"


def test_five_hundred_corruptions_are_refused_by_name(study: Study, other: bytes, officer: Any) -> None:
    corrupt(study, other, officer, count=500, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_corruptions_are_refused_by_name(study: Study, other: bytes, officer: Any) -> None:
    corrupt(study, other, officer, count=10_000, seed=2)


def rewritten(data: bytes, key: SigningKey, *, at: int, keep: int | None = None) -> bytes:
    """What a site that cheats can make: other charges from entry ``at`` on, hashes and signatures right."""
    export = read_export(data, key.verify_key)
    entries = list(export.entries[: at - 1])
    for old in export.entries[at - 1 : keep]:
        body = json.loads(json.dumps(old.body))
        if "event" in body:
            body["event"]["noise_multiplier_world"] *= 100
        entries.append(LedgerEntry.chain(entries[-1], ledger_id=export.ledger_id, body=body))
    head = LedgerHead.sign(
        key, ledger_id=export.ledger_id, length=len(entries), entry_hash=entries[-1].entry_hash
    )
    return export_statement(entries, head, key)


def test_a_rewritten_or_old_copy_is_named_by_a_kept_head_and_unchecked_without(
    study: Study, officer: Any, tmp_path: Path
) -> None:
    data, key = study.inputs.ledgers["alpha"], study.keys["alpha"]
    whole = read_export(data, key.verify_key)
    receipts = tmp_path / "receipts"
    receipts.write_bytes(rfc8785.dumps({"heads": {"alpha": whole.head.to_dict()}}))
    for at in (2, 5, len(whole.entries)):
        for keep, named in ((None, "is not the one that peers saw"), (at - 1, "an old copy")):
            fake = rewritten(data, key, at=at, keep=keep)
            _, (row,) = officer([fake])
            assert row["fault"] or row["freshness"] == "unchecked"
            if fake == data or (
                keep is None and not any(e.kind == "charge" for e in whole.entries[at - 1 :])
            ):
                continue
            code, (row,) = officer([fake], "--heads", str(receipts))
            assert code == ExitCode.PEER_MISBEHAVED and named in row["fault"], (at, keep, row)
    code, (row,) = officer([data], "--heads", str(receipts))
    assert code == 0 and row["freshness"] == "1 receipts continued"


def test_freshness_is_said_to_be_unchecked_in_words(
    study: Study, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "alpha.json"
    path.write_bytes(study.inputs.ledgers["alpha"])
    with pytest.raises(SystemExit) as stop:
        main(["compliance", "budget", str(path), "--plan", str(package)])
    assert stop.value.code == 0
    assert "Freshness is unchecked" in " ".join(capsys.readouterr().out.split())
