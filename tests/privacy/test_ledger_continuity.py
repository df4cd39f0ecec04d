"""Peers follow one another's ledgers: growth passes; old copies, second copies and gaps are named.

Real ledgers on disk; what each site shows goes through its canonical bytes, as in a key message.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privacy.ledger import Ledger
from privacy.ledger_chain import LedgerHead, body_digest, chain_hash
from privacy.ledger_continuity import (
    MAX_SHOWN_BYTES,
    LedgerContinuity,
    LedgerNotLinkedError,
    LedgerSegment,
    ShownLedger,
)
from privacy.secagg.message_fields import MAX_LEDGER_HEAD_BYTES
from shared.canonical import canonical_json
from shared.errors import LedgerError, MalformedMessageError, PeerError
from shared.identity import SigningKey

NAMES = ("alpha", "beta", "gamma")


class Trio:
    """Three sites with a ledger each; ``attempt`` plays one attempt's key messages among them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys = {name: SigningKey.generate() for name in NAMES}
        self.ledgers: dict[str, Ledger] = {}
        self.ends: dict[str, LedgerContinuity] = {}
        self.number = 0
        for name in NAMES:
            (root / name).mkdir()
            self.start(name, create=True)

    def start(self, name: str, *, create: bool = False) -> None:
        if name in self.ledgers:
            self.ledgers[name].close()
        self.ledgers[name] = Ledger.open(
            self.root / name / "l", key=self.keys[name], counter_path=self.root / name / "w", create=create
        )
        self.ends[name] = LedgerContinuity(
            self.ledgers[name],
            site_id=name,
            key=self.keys[name],
            peers={peer: key.verify_key for peer, key in self.keys.items()},
        )

    def copy(self, name: str) -> Path:
        """An old copy of ledger and witness, taken now."""
        target = self.root / f"old-{name}"
        shutil.copytree(self.root / name, target, dirs_exist_ok=True)
        return target

    def restore(self, name: str, copy: Path) -> None:
        self.ledgers[name].close()
        shutil.copytree(copy, self.root / name, dirs_exist_ok=True)
        self.start(name)

    def grow(self, name: str, entries: int) -> None:
        for number in range(entries):
            self.ledgers[name].record("note", {"number": number})

    def shown(self, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
        self.number += 1
        for name in names:
            self.ledgers[name].register_attempt("study", self.number)
        return {name: json.loads(canonical_json(self.ends[name].show())) for name in names}

    def attempt(self, names: tuple[str, ...] = NAMES) -> dict[str, Exception | None]:
        """What each of them says to the key messages of all of them."""
        shown = self.shown(names)
        verdicts: dict[str, Exception | None] = {}
        for name in names:
            try:
                self.ends[name].accept(shown)
                verdicts[name] = None
            except (PeerError, LedgerError) as error:
                verdicts[name] = error
        return verdicts


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    trio = Trio(tmp_path)
    yield trio
    for ledger in trio.ledgers.values():
        ledger.close()


def all_well(verdicts: dict[str, Exception | None]) -> bool:
    return all(error is None for error in verdicts.values())


def test_growing_ledgers_follow_each_other_also_over_restarts(trio: Trio) -> None:
    for step in range(5):
        assert all_well(trio.attempt())
        trio.grow("alpha", step)
    trio.start("beta")
    assert all_well(trio.attempt())
    for name in NAMES:
        others = {peer: trio.ledgers[peer].head() for peer in NAMES if peer != name}
        assert trio.ledgers[name].peer_heads() == others


def test_what_is_shown_is_hashes_and_counts_alone(trio: Trio) -> None:
    """Of two bodies that differ in a guessable field alone, a digest does not tell which it is."""
    trio.ledgers["alpha"].record("note", {"study": "other-study-of-this-hospital"})
    trio.attempt()
    shown = trio.shown()["alpha"]
    assert "other-study" not in json.dumps(shown)
    assert set(shown["latest"]) == {"head", "base", "links"}
    salts = [entry.body["salt"] for entry in trio.ledgers["alpha"].entries()]
    assert len(set(salts)) == len(salts) and all(len(bytes.fromhex(salt)) == 16 for salt in salts)
    entry = trio.ledgers["alpha"].entries()[1]
    assert body_digest(entry.body) != body_digest({**entry.body, "salt": "00" * 16})


@pytest.mark.parametrize("grown", [0, 1, 2, 3, 50])
def test_an_old_copy_is_noticed_however_far_it_grew(trio: Trio, grown: int) -> None:
    """By both peers, and by the site itself once it hears from one of them."""
    trio.attempt()
    copy = trio.copy("beta")
    trio.grow("beta", 3)
    trio.attempt()
    trio.restore("beta", copy)
    trio.grow("beta", grown)
    verdicts = trio.attempt()
    for peer in ("alpha", "gamma"):
        assert isinstance(verdicts[peer], PeerError)
        assert "old" in str(verdicts[peer]) and "'beta'" in str(verdicts[peer])
    assert isinstance(verdicts["beta"], LedgerError)
    with pytest.raises(LedgerError, match="nothing may be sent"):
        trio.ledgers["beta"].register_attempt("study", 1000)


def test_a_site_that_makes_up_a_history_is_noticed(trio: Trio) -> None:
    """With its own key it can sign any head; no digests lead there from the one seen."""
    trio.attempt()
    copy = trio.copy("beta")
    trio.grow("beta", 2)
    trio.attempt()
    seen = trio.ledgers["alpha"].peer_heads()["beta"]
    trio.restore("beta", copy)
    trio.grow("beta", 9)
    honest = ShownLedger.from_dict(trio.shown()["beta"])
    rng = random.Random(5)
    for _ in range(50):
        base = rng.randrange(honest.head.length)
        links = [body_digest(entry.body) for entry in trio.ledgers["beta"].entries()[base:]]
        for place in range(len(links)):
            if rng.random() < 0.3:
                links[place] = rng.randbytes(32)
        lie = replace(honest, latest=LedgerSegment(base=base, links=tuple(links), head=honest.head))
        with pytest.raises(PeerError):
            trio.ends["alpha"].accept({"beta": lie.to_dict()})
        assert trio.ledgers["alpha"].peer_heads()["beta"] == seen


def test_a_head_that_this_site_never_signed_does_not_stop_it(trio: Trio) -> None:
    """A peer cannot make a site believe that its own ledger is old."""
    trio.attempt()
    shown = trio.shown()
    own = trio.ledgers["beta"].head()
    for key in (trio.keys["alpha"], SigningKey.generate()):
        lie = LedgerHead.sign(key, ledger_id=own.ledger_id, length=own.length + 5, entry_hash=bytes(32))
        changed = {**shown["alpha"], "seen": {**shown["alpha"]["seen"], "beta": lie.to_dict()}}
        with pytest.raises(PeerError, match="never signed"):
            trio.ends["beta"].accept({**shown, "alpha": changed})
    trio.ends["beta"].accept(shown)


def test_one_peers_fault_does_not_hide_anothers_head(trio: Trio) -> None:
    trio.attempt()
    copy = trio.copy("beta")
    trio.attempt()
    trio.restore("beta", copy)
    trio.attempt()
    heads = trio.ledgers["alpha"].peer_heads()
    assert heads["gamma"] == trio.ledgers["gamma"].head()


def test_a_peer_that_was_away_follows_within_the_window(trio: Trio) -> None:
    trio.attempt()
    for _ in range(4):
        assert all_well(trio.attempt(("alpha", "gamma")))
        trio.grow("alpha", 20)
    assert all_well(trio.attempt())


def test_a_far_gap_is_closed_in_steps_and_accuses_nobody(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of 6 digests a message in place of several hundred; beta missed 30 entries of alpha."""
    monkeypatch.setattr("privacy.ledger_continuity.MAX_LINKS", 6)
    trio.attempt()
    for _ in range(6):
        trio.grow("alpha", 4)
        assert all_well(trio.attempt(("alpha", "gamma")))
    assert trio.ledgers["alpha"].head().length - trio.ledgers["beta"].peer_heads()["alpha"].length == 30
    verdicts = []
    for _ in range(24):
        verdicts.append(trio.attempt())
        if all_well(verdicts[-1]):
            break
    assert all_well(verdicts[-1]) and 3 < len(verdicts) < 24
    for verdict in verdicts:
        assert verdict["alpha"] is None and verdict["gamma"] is None
        assert verdict["beta"] is None or isinstance(verdict["beta"], LedgerNotLinkedError)
    assert trio.ledgers["beta"].peer_heads()["alpha"] == trio.ledgers["alpha"].head()


def test_a_peer_that_always_shows_an_ancient_head_delays_nobody(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privacy.ledger_continuity.MAX_LINKS", 6)
    trio.attempt()
    ancient = trio.shown()["gamma"]["seen"]
    for _ in range(6):
        trio.grow("alpha", 3)
        shown = trio.shown()
        shown["gamma"]["seen"] = ancient
        trio.ends["alpha"].accept(shown)
        trio.ends["beta"].accept(shown)
    assert trio.ledgers["beta"].peer_heads()["alpha"].length > ancient["alpha"]["length"] + 18


def test_what_is_shown_fits_the_key_message_for_a_hundred_sites(tmp_path: Path) -> None:
    """1,500 entries, 99 peers with the longest ids: still within the protocol's bound."""
    assert MAX_SHOWN_BYTES == MAX_LEDGER_HEAD_BYTES
    key, peers = SigningKey.generate(), {}
    clock_heads = {}
    for i in range(99):
        name, theirs = f"{i:02d}".ljust(63, "x"), SigningKey.generate()
        peers[name] = theirs.verify_key
        head = LedgerHead.sign(theirs, ledger_id=f"{i:032x}", length=2**40, entry_hash=bytes(32))
        clock_heads[name] = (head, theirs.verify_key)
    with Ledger.open(tmp_path / "l", key=key, counter_path=tmp_path / "w", create=True) as ledger:
        ledger.record_peer_heads(clock_heads)
        ledger.register_attempt("study", 1)
        entries = list(ledger.entries())
        for number in range(2, 1500):
            body = {"kind": "attempt", "study_id": "study", "attempt": number, "salt": "ab" * 16}
            entries.append(type(entries[0]).chain(entries[-1], ledger_id=ledger.ledger_id, body=body))
        ledger._entries = entries
        end = LedgerContinuity(ledger, site_id="own", key=key, peers=peers)
        shown = ShownLedger.from_dict(end.show())
        assert len(shown.seen) == 99
        assert 250 < len(shown.latest.links) < 700
        assert len(canonical_json(shown.to_dict())) <= MAX_SHOWN_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"latest": None},
        {"seen": []},
        {"seen": {"beta": {}}},
        {"catch_up": 3},
        {"latest": {"links": "*"}},
        {"latest": {"links": "AAAA"}},
        {"latest": {"base": -1}},
        {"latest": {"base": True}},
        {"latest": {"base": 0}},
        {"more": 1},
    ],
)
def test_malformed_shows_are_refused_as_such(trio: Trio, change: dict[str, Any]) -> None:
    trio.grow("alpha", 2)
    trio.attempt()
    shown = trio.shown()["alpha"]
    for name, value in change.items():
        shown[name] = {**shown[name], **value} if name == "latest" and value else value
    with pytest.raises(MalformedMessageError):
        trio.ends["beta"].accept({"alpha": shown})


def test_the_chain_is_the_definition(trio: Trio) -> None:
    """Following digests gives the very hashes that the ledger has."""
    trio.grow("alpha", 3)
    entries, ledger_id = trio.ledgers["alpha"].entries(), trio.ledgers["alpha"].ledger_id
    previous = bytes(32)
    for entry in entries:
        previous = chain_hash(ledger_id, entry.sequence, previous, body_digest(entry.body))
        assert previous == entry.entry_hash
