"""The ledger: durable before it returns, never forgets, names every tampering, and fails closed."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privacy.dp.accounting import PrivacyEvent, epsilon, gaussian_epsilon
from privacy.ledger import Budget, Charge, Ledger, RepeatedAttemptError, read_ledger
from privacy.ledger_chain import (
    LedgerEntry,
    LedgerHead,
    LedgerTamperedError,
    export_statement,
    read_export,
    spent,
)
from shared.errors import BudgetExceededError, LacunaError, LedgerError, PeerError, UsageError
from shared.identity import SigningKey

DELTA = 1e-5
NO_CAP = Budget(epsilon=None, delta=DELTA)


def fixed_clock() -> datetime:
    return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def gaussian(sigma: float, *, steps: int = 1) -> PrivacyEvent:
    return PrivacyEvent(
        kind="gaussian/v1",
        sampling_rate=1.0,
        steps=steps,
        noise_multiplier_world=sigma,
        noise_multiplier_colluding=sigma / math.sqrt(2),
    )


def charge(attempt: int, *, study: str = "study-a", sigma: float = 10.0, purpose: str = "train") -> Charge:
    return Charge(
        study_id=study,
        plan_sha256="ab" * 32,
        purpose="audit" if purpose == "audit" else "train",
        round=attempt,
        attempt=attempt,
        event=gaussian(sigma),
    )


class Site:
    """A ledger's files and key in a folder."""

    def __init__(self, folder: Path) -> None:
        self.key = SigningKey.generate()
        self.path = folder / "ledger.sqlite"
        self.counter = folder / "witness" / "head.json"
        self.counter.parent.mkdir()

    def open(self, *, create: bool = False) -> Ledger:
        return Ledger.open(
            self.path, key=self.key, counter_path=self.counter, create=create, clock=fixed_clock
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_charges_survive_and_compose(site: Site) -> None:
    with site.open(create=True) as ledger:
        for attempt in range(1, 6):
            head = ledger.reserve(charge(attempt), NO_CAP)
        assert head == ledger.head() and head.length == 6
    with site.open() as ledger:
        assert ledger.head() == head
        assert ledger.charged_attempts("study-a") == (1, 2, 3, 4, 5)
        report = ledger.spent(delta=DELTA)
    expected = gaussian_epsilon(math.sqrt(5) / 10, DELTA)
    assert report.reported == pytest.approx(expected, rel=1e-2)
    assert report.reported >= expected
    first = read_ledger(site.path, key=site.key.verify_key)[1].body
    assert first["study_id"] == "study-a" and first["time"] == "2026-01-02T03:04:05+00:00"


def test_budget_is_a_wall_over_all_studies(site: Site) -> None:
    cap = Budget(epsilon=epsilon([gaussian(3.0)] * 4, DELTA).reported + 1e-9, delta=DELTA)
    with site.open(create=True) as ledger:
        ledger.reserve(charge(1, sigma=3.0), cap)
        ledger.reserve(charge(1, study="study-b", sigma=3.0), cap)
        ledger.reserve(charge(2, sigma=3.0, purpose="audit"), cap)
        ledger.reserve(charge(2, study="study-b", sigma=3.0), cap)
        before = ledger.head()
        with pytest.raises(BudgetExceededError, match="cap"):
            ledger.reserve(charge(3, sigma=50.0), cap)
        assert ledger.head() == before
        assert ledger.spent(delta=DELTA, study_id="study-b").n_events == 2
        with pytest.raises(BudgetExceededError):
            ledger.reserve(charge(4, sigma=1e6), Budget(epsilon=2.0, delta=DELTA, view="all_others_collude"))


def test_unprotected_is_charged_as_infinite(site: Site) -> None:
    event = PrivacyEvent.unprotected()
    attempt = Charge(
        study_id="s", plan_sha256="00" * 32, purpose="train", round=1, attempt=1, event=event, run_id="7"
    )
    with site.open(create=True) as ledger:
        with pytest.raises(BudgetExceededError):
            ledger.reserve(attempt, Budget(epsilon=1e9, delta=DELTA))
        ledger.reserve(attempt, NO_CAP)
        assert ledger.spent(delta=DELTA).reported == math.inf


def test_attempts_are_charged_once_and_at_most_so_many(site: Site) -> None:
    with site.open(create=True) as ledger:
        ledger.reserve(charge(1), NO_CAP, max_attempts=2)
        with pytest.raises(RepeatedAttemptError):
            ledger.reserve(charge(1, purpose="audit"), NO_CAP)
        ledger.reserve(charge(2), NO_CAP, max_attempts=2)
        with pytest.raises(BudgetExceededError, match="all 2"):
            ledger.reserve(charge(3), NO_CAP, max_attempts=2)
        ledger.reserve(charge(3, purpose="audit"), NO_CAP, max_attempts=2)
        assert ledger.charged_attempts("study-a", purpose="train") == (1, 2)


def test_registered_attempts_only_grow(site: Site) -> None:
    with site.open(create=True) as ledger:
        ledger.register_attempt("study-a", 4)
        ledger.register_attempt("study-b", 1)
    with site.open() as ledger:
        for number in (4, 3, 0):
            with pytest.raises(RepeatedAttemptError):
                ledger.register_attempt("study-a", number)
        ledger.register_attempt("study-a", 5)
        assert ledger.last_registered_attempt("study-a") == 5
        assert ledger.last_registered_attempt("study-c") is None


def test_notes_cannot_pass_for_charges(site: Site) -> None:
    with site.open(create=True) as ledger:
        ledger.record("plan-approved", {"plan_sha256": "ab" * 32})
        for kind in ("charge", "attempt", "opened", "", "Plan"):
            with pytest.raises(UsageError):
                ledger.record(kind, {})
        assert ledger.spent(delta=DELTA).reported == 0


def test_second_agent_is_refused(site: Site) -> None:
    with site.open(create=True) as ledger:
        with pytest.raises(LedgerError, match="in use"):
            site.open()
        program = textwrap.dedent(
            f"""
            from pathlib import Path
            from privacy.ledger import Ledger
            from shared.identity import SigningKey
            Ledger.open(Path({str(site.path)!r}), key=SigningKey.generate(),
                        counter_path=Path({str(site.counter)!r}))
            """
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "in use by another process" in done.stderr
        assert len(read_ledger(site.path, key=site.key.verify_key)) == 1
        ledger.reserve(charge(1), NO_CAP)
    site.open().close()


def test_entries_cannot_be_updated_or_deleted_in_sql(site: Site) -> None:
    with site.open(create=True) as ledger:
        ledger.reserve(charge(1), NO_CAP)
    connection = sqlite3.connect(site.path)
    for statement in ("UPDATE entries SET body = x'00'", "DELETE FROM entries", "DELETE FROM peer_heads"):
        if "peer_heads" in statement:
            connection.execute("INSERT INTO peer_heads (peer, head) VALUES ('x', x'00')")
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("fault", ["changed", "removed last", "removed middle", "swapped", "opened by other"])
def test_tampered_database_does_not_open(site: Site, fault: str) -> None:
    with site.open(create=True) as ledger:
        for attempt in range(1, 5):
            ledger.reserve(charge(attempt), NO_CAP)
    connection = sqlite3.connect(site.path)
    connection.executescript("DROP TRIGGER entries_keep_changed; DROP TRIGGER entries_keep_removed;")
    key = site.key
    if fault == "changed":
        connection.execute(
            "UPDATE entries SET body ="
            " CAST(replace(CAST(body AS TEXT), '\"round\":2', '\"round\":9') AS BLOB)"
        )
    elif fault == "removed last":
        connection.execute("DELETE FROM entries WHERE sequence = 5")
    elif fault == "removed middle":
        connection.execute("DELETE FROM entries WHERE sequence = 3")
    elif fault == "swapped":
        connection.executescript(
            "UPDATE entries SET sequence = 99 WHERE sequence = 3;"
            "UPDATE entries SET sequence = 3 WHERE sequence = 4;"
            "UPDATE entries SET sequence = 4 WHERE sequence = 99;"
        )
    else:
        key = SigningKey.generate()
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError):
        Ledger.open(site.path, key=key, counter_path=site.counter)


def test_old_copy_is_noticed(site: Site) -> None:
    with site.open(create=True) as ledger:
        ledger.reserve(charge(1), NO_CAP)
    old_ledger, old_witness = site.path.read_bytes(), site.counter.read_bytes()
    with site.open() as ledger:
        ledger.reserve(charge(2), NO_CAP)
        ledger.reserve(charge(3), NO_CAP)
        newest = ledger.head()
    new_ledger, new_witness = site.path.read_bytes(), site.counter.read_bytes()
    site.path.write_bytes(old_ledger)
    with pytest.raises(LedgerError, match="old copy"):
        site.open()
    site.path.write_bytes(new_ledger)
    site.counter.write_bytes(old_witness)
    with pytest.raises(LedgerError, match="behind the ledger"):
        site.open()
    site.counter.unlink()
    with pytest.raises(LedgerError, match="witness"):
        site.open()
    site.counter.write_bytes(new_witness[:-3])
    with pytest.raises(LedgerError):
        site.open()
    # Both restored together: this machine alone cannot tell, a peer's receipt can.
    site.path.write_bytes(old_ledger)
    site.counter.write_bytes(old_witness)
    with site.open() as ledger:
        with pytest.raises(LedgerError, match="peer has seen"):
            ledger.check_own_head(newest)
        with pytest.raises(LedgerError, match="closed"):
            ledger.reserve(charge(4), NO_CAP)


def test_crash_between_commit_and_witness_is_accepted(site: Site) -> None:
    with site.open(create=True) as ledger:
        ledger.reserve(charge(1), NO_CAP)
        witness = site.counter.read_bytes()
        ledger.reserve(charge(2), NO_CAP)
    site.counter.write_bytes(witness)
    with site.open() as ledger:
        assert ledger.charged_attempts("study-a") == (1, 2)
    assert json.loads(site.counter.read_bytes())["length"] == 3


def test_forked_history_beside_the_witness_is_refused(site: Site) -> None:
    """Same length, other entries, all hashes right: only the witness knows."""
    with site.open(create=True) as ledger:
        base = site.path.read_bytes()
        ledger.reserve(charge(1, sigma=1.0), NO_CAP)
        witness = site.counter.read_bytes()
    site.path.write_bytes(base)
    with _open_fresh(site, site.counter.with_name("other.json")) as ledger:
        ledger.reserve(charge(1, sigma=100.0), NO_CAP)
    site.counter.write_bytes(witness)
    with pytest.raises(LedgerError, match="rewritten"):
        site.open()


def _open_fresh(site: Site, witness: Path) -> Ledger:
    """Open with a witness made for the database as it is (as an attacker with the key could)."""
    entry = read_ledger(site.path, key=site.key.verify_key)[-1]
    head = LedgerHead.sign(
        site.key,
        ledger_id=read_ledger_id(site),
        length=entry.sequence,
        entry_hash=entry.entry_hash,
    )
    witness.write_text(json.dumps(head.to_dict()))
    return Ledger.open(site.path, key=site.key, counter_path=witness)


def test_full_disk_stops_everything(site: Site) -> None:
    with site.open(create=True) as ledger:
        ledger.reserve(charge(1), NO_CAP)
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="full"):
            ledger.record("filler", {"text": "x" * 40_000})
        with pytest.raises(LedgerError, match="nothing may be sent"):
            ledger.reserve(charge(2), NO_CAP)
        assert ledger.storage_failed
    with site.open() as ledger:
        assert ledger.charged_attempts("study-a") == (1,)
        assert not ledger.storage_failed
    assert not ledger.storage_failed, "closed on purpose"


def test_unwritable_witness_stops_everything(site: Site) -> None:
    with site.open(create=True) as ledger:
        site.counter.with_name(site.counter.name + ".new").mkdir()
        with pytest.raises(LedgerError, match="witness"):
            ledger.reserve(charge(1), NO_CAP)
        with pytest.raises(LedgerError):
            ledger.reserve(charge(2), NO_CAP)
        assert ledger.storage_failed


def test_locked_database_stops_everything(site: Site) -> None:
    with site.open(create=True) as ledger:
        other = sqlite3.connect(site.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            ledger.reserve(charge(1), NO_CAP)
        other.execute("ROLLBACK")
        other.close()


def test_changed_or_replaced_under_our_feet(site: Site) -> None:
    with site.open(create=True) as ledger:
        other = sqlite3.connect(site.path)
        other.execute("INSERT INTO entries VALUES (2, x'00', zeroblob(32), zeroblob(32))")
        other.commit()
        other.close()
        with pytest.raises(LedgerError, match="somebody else"):
            ledger.reserve(charge(1), NO_CAP)


def test_replaced_file_is_noticed(site: Site) -> None:
    with site.open(create=True) as ledger:
        copy = site.path.with_name("copy")
        copy.write_bytes(site.path.read_bytes())
        copy.replace(site.path)
        with pytest.raises(LedgerError, match="replaced"):
            ledger.reserve(charge(1), NO_CAP)
        assert not ledger.storage_failed, "to be looked at by a person: it must not be opened again by itself"


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated", "bytes"])
def test_corrupt_file_is_refused(site: Site, damage: str) -> None:
    with site.open(create=True) as ledger:
        for attempt in range(1, 30):
            ledger.record("note", {"attempt": attempt, "text": "x" * 500})
    data = bytearray(site.path.read_bytes())
    if damage == "garbage":
        data = bytearray(os.urandom(8192))
    elif damage == "empty":
        data = bytearray()
    elif damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2 : len(data) // 2 + 600] = bytes(600)
    site.path.write_bytes(data)
    with pytest.raises(LedgerError):
        site.open()


def export_of(site: Site, n_charges: int) -> tuple[bytes, LedgerHead]:
    with site.open(create=True) as ledger:
        for attempt in range(1, n_charges + 1):
            ledger.reserve(charge(attempt), NO_CAP)
        target = site.path.with_name("export.json")
        head = ledger.export(target)
    return target.read_bytes(), head


def test_export_reads_back(site: Site) -> None:
    data, head = export_of(site, 4)
    export = read_export(data, site.key.verify_key, known_heads=[head])
    assert export.head == head and len(export.entries) == 5
    assert spent(export.entries, delta=DELTA).mu == pytest.approx(0.2)
    assert spent(export.entries, delta=DELTA, view="all_others_collude").mu == pytest.approx(0.2 * 2**0.5)
    with pytest.raises(LedgerTamperedError, match="forged"):
        read_export(data, SigningKey.generate().verify_key)


def test_one_flipped_byte_is_never_accepted(site: Site) -> None:
    data, _ = export_of(site, 6)
    original = json.loads(data)
    rng = random.Random(1)
    for _ in range(400):
        place = rng.randrange(len(data))
        broken = bytearray(data)
        broken[place] ^= 1 << rng.randrange(8)
        if json.dumps(_parsed(bytes(broken))) == json.dumps(original):
            continue
        with pytest.raises(LedgerTamperedError):
            read_export(bytes(broken), site.key.verify_key)


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_tampered_entry_is_named(site: Site) -> None:
    data, _ = export_of(site, 6)
    envelope = json.loads(data)
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["predicate"]["entries"][3]["body"]["event"]["noise_multiplier_world"] = 1000
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    with pytest.raises(LedgerTamperedError, match="entry 4") as caught:
        read_export(json.dumps(envelope).encode(), site.key.verify_key)
    assert caught.value.fault == "changed" and caught.value.sequence == 4


def read_ledger_id(site: Site) -> str:
    return str(read_ledger(site.path, key=site.key.verify_key)[0].body["ledger_id"])


def _resigned(site: Site, entries: list[LedgerEntry]) -> bytes:
    """What a site that cheats with its own key can sign."""
    head = LedgerHead.sign(
        site.key,
        ledger_id=read_ledger_id(site),
        length=len(entries),
        entry_hash=entries[-1].entry_hash,
    )
    return export_statement(entries, head, site.key)


def test_a_site_that_signs_a_broken_chain_is_named(site: Site) -> None:
    data, _ = export_of(site, 6)
    entries = list(read_export(data, site.key.verify_key).entries)
    for fault, wrong in (
        ("removed", entries[:3] + entries[4:]),
        ("reordered", [*entries[:3], entries[4], entries[3], *entries[5:]]),
        ("removed", entries[1:]),
    ):
        with pytest.raises(LedgerTamperedError) as caught:
            read_export(_resigned(site, wrong), site.key.verify_key)
        assert caught.value.fault == fault and caught.value.sequence is not None
    with pytest.raises(LedgerTamperedError, match="malformed"):
        double = LedgerEntry.chain(entries[-1], ledger_id=read_ledger_id(site), body=dict(entries[1].body))
        read_export(_resigned(site, [*entries, double]), site.key.verify_key)


def test_truncated_or_rewritten_exports_need_a_receipt_and_get_named(site: Site) -> None:
    data, head = export_of(site, 6)
    entries = list(read_export(data, site.key.verify_key).entries)
    old = _resigned(site, entries[:4])
    read_export(old, site.key.verify_key)
    with pytest.raises(LedgerTamperedError) as caught:
        read_export(old, site.key.verify_key, known_heads=[head])
    assert caught.value.fault == "truncated"
    ledger_id = read_ledger_id(site)
    rewritten = entries[:3]
    for entry in entries[3:]:
        body = {**entry.body, "event": gaussian(1000.0).to_dict()}
        rewritten.append(LedgerEntry.chain(rewritten[-1], ledger_id=ledger_id, body=body))
    cheap = _resigned(site, rewritten)
    read_export(cheap, site.key.verify_key)
    with pytest.raises(LedgerTamperedError) as caught:
        read_export(cheap, site.key.verify_key, known_heads=[head])
    assert caught.value.fault == "rewritten"


def test_peer_heads_only_grow(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    folder.mkdir()
    peer = Site(folder)
    with peer.open(create=True) as theirs:
        first = theirs.head()
        second = theirs.reserve(charge(1), NO_CAP)
    key = peer.key.verify_key
    with site.open(create=True) as ledger:
        ledger.record_peer_heads({"peer": (second, key)})
        ledger.record_peer_heads({"peer": (second, key)})
        with pytest.raises(PeerError, match="old or a second copy"):
            ledger.record_peer_heads({"peer": (first, key)})
        fork = LedgerHead.sign(peer.key, ledger_id=second.ledger_id, length=2, entry_hash=bytes(32))
        with pytest.raises(PeerError, match="differ"):
            ledger.record_peer_heads({"peer": (fork, key)})
        with pytest.raises(PeerError):
            ledger.record_peer_heads({"peer": (second, SigningKey.generate().verify_key)})
    with site.open() as ledger:
        assert ledger.peer_heads() == {"peer": second}


@pytest.mark.parametrize("value", [None, {}, {"length": 1}, [], {"ledger_id": "x", "length": True}])
def test_malformed_heads_and_events_raise_our_error(value: object) -> None:
    for parse in (LedgerHead.from_dict, LedgerEntry.from_dict, PrivacyEvent.from_dict):
        with pytest.raises(LacunaError):
            parse(value)


CRASHING_SITE = """
import sys, threading
from pathlib import Path
from privacy.dp.accounting import PrivacyEvent
from privacy.ledger import Budget, Charge, Ledger
from shared.identity import SigningKey
folder = Path(sys.argv[1])
ledger = Ledger.open(folder / "l", key=SigningKey.load(folder / "key"), counter_path=folder / "w",
                     create=not (folder / "l").exists())
event = PrivacyEvent(kind="gaussian/v1", sampling_rate=1.0, steps=1, noise_multiplier_world=50.0,
                     noise_multiplier_colluding=50.0)
start = max(ledger.charged_attempts("s"), default=0) + 1
for attempt in range(start, start + 10000):
    ledger.reserve(Charge(study_id="s", plan_sha256="00" * 32, purpose="train", round=1, attempt=attempt,
                          event=event), Budget(epsilon=None, delta=1e-5))
    sys.stdout.write(f"{attempt}\\n")
    sys.stdout.flush()
"""


def test_killed_process_never_undercounts(tmp_path: Path) -> None:
    """SIGKILL at a random moment: all that was sent (printed) is charged, and the ledger opens again."""
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    sent: set[int] = set()
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", CRASHING_SITE, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(random.randrange(2, 12)):
            sent.add(int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        sent.update(int(line) for line in process.stdout.read().split())
        process.wait()
        process.stdout.close()
        with Ledger.open(tmp_path / "l", key=key, counter_path=tmp_path / "w") as ledger:
            charged = set(ledger.charged_attempts("s"))
        assert sent <= charged
        assert len(charged) <= len(sent) + 4


def test_requests_come_from_other_threads(tmp_path: Path) -> None:
    """The agent opens the ledger in one thread and serves from others, one at a time."""
    with Ledger.open(
        tmp_path / "l.sqlite", key=SigningKey.generate(), counter_path=tmp_path / "w", create=True
    ) as ledger:
        worker = threading.Thread(target=ledger.register_attempt, args=("study", 1))
        worker.start()
        worker.join()
        assert ledger.last_registered_attempt("study") == 1
