"""The officer's reading of ledgers: against the sites' own code, against tampering, against old copies."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from release_study import SITES, Study, attempt_records, make_ledger
from rich.console import Console

from privacy.compliance.budget import budget, read_receipts
from privacy.compliance.dsse import EvidenceError
from privacy.compliance.epsilon import gaussian_epsilon, spent_epsilon
from privacy.compliance.ledger_check import ChargedEvent, SeenHead, chain_fault, check_seen, open_ledger
from privacy.compliance.report import print_budget, print_decision, print_verification
from privacy.compliance.verify import verify_bundle
from privacy.dp.accounting import PrivacyEvent, epsilon
from privacy.ledger import Budget, Charge, Ledger
from privacy.ledger_chain import LedgerHead, read_export
from shared.attestation import Statement, Subject, sign_statement


def opened(study: Study, data: bytes | None = None, **options: Any) -> Any:
    key = study.keys["alpha"].verify_key.hex()
    return open_ledger(data or study.inputs.ledgers["alpha"], key=key, what="ledger of alpha", **options)


def entries_of(data: bytes) -> list[dict[str, Any]]:
    payload = json.loads(base64.b64decode(json.loads(data)["payload"]))
    entries: list[dict[str, Any]] = payload["predicate"]["entries"]
    return entries


def resigned(study: Study, change: Callable[[list[dict[str, Any]]], Any]) -> bytes:
    """The site itself signs changed entries, with the head as it was."""
    data = study.inputs.ledgers["alpha"]
    payload = json.loads(base64.b64decode(json.loads(data)["payload"]))
    predicate = payload["predicate"]
    change(predicate["entries"])
    (subject,) = payload["subject"]
    statement = Statement(
        predicate_type="ledger/v1",
        subjects=(Subject(name=subject["name"], sha256=subject["digest"]["sha256"]),),
        predicate=predicate,
    )
    return sign_statement(statement, study.keys["alpha"])


def unsigned(data: bytes, change: Callable[[list[dict[str, Any]]], Any]) -> bytes:
    """Somebody without the key changes entries."""
    envelope = json.loads(data)
    payload = json.loads(base64.b64decode(envelope["payload"]))
    change(payload["predicate"]["entries"])
    envelope["payload"] = base64.b64encode(rfc8785.dumps(payload)).decode()
    return rfc8785.dumps(envelope)


def swap(entries: list[dict[str, Any]]) -> None:
    entries[3], entries[4] = entries[4], entries[3]


def cheapen(entries: list[dict[str, Any]]) -> None:
    entries[3]["body"]["event"]["noise_multiplier_world"] *= 10


CHANGES: list[tuple[str, Callable[[list[dict[str, Any]]], Any], str]] = [
    ("changed", cheapen, "changed: entry 4 does not have its hash"),
    ("removed", lambda e: e.pop(3), "removed: entry 4 is missing"),
    ("reordered", swap, "reordered: entry 5 stands where entry 4 belongs"),
    ("repeated", lambda e: e.insert(4, dict(e[3])), "repeated: entry 4"),
    ("no opening", lambda e: e[0]["body"].update(kind="note"), "changed: entry 1"),
    ("empty", lambda e: e.clear(), "removed"),
]


def test_same_charges_as_the_sites_own_reader(study: Study) -> None:
    own = opened(study)
    theirs = read_export(study.inputs.ledgers["alpha"], study.keys["alpha"].verify_key)
    assert own.ledger_id == theirs.ledger_id
    assert list(own.entry_hashes) == [entry.entry_hash.hex() for entry in theirs.entries]
    charges = [entry for entry in theirs.entries if entry.kind == "charge"]
    assert [(c.attempt, c.purpose, c.round) for c in own.charges] == [
        (e.body["attempt"], e.body["purpose"], e.body["round"]) for e in charges
    ]
    assert len(own.charges) == 6 and own.studies() == ("rare-lesion",)


@pytest.mark.parametrize(("change", "named"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_tampered_entries_are_named_with_and_without_a_new_signature(
    study: Study, change: Callable[[list[dict[str, Any]]], Any], named: str
) -> None:
    with pytest.raises(EvidenceError, match=named):
        opened(study, resigned(study, change))
    with pytest.raises(EvidenceError, match=named) as caught:
        opened(study, unsigned(study.inputs.ledgers["alpha"], change))
    assert "signature does not verify" in caught.value.message


def test_entries_cut_off_at_the_end_are_named(study: Study) -> None:
    with pytest.raises(EvidenceError, match="removed: entry 8 is missing at the end"):
        opened(study, resigned(study, lambda entries: entries.pop()))


def test_every_field_of_every_entry_is_under_the_chain(study: Study) -> None:
    entries = entries_of(study.inputs.ledgers["alpha"])
    assert chain_fault(entries) is None
    for index, entry in enumerate(entries):
        for name, value in entry["body"].items():
            for bad in (None, "x", 10**6):
                if bad != value:
                    changed = json.loads(json.dumps(entries))
                    changed[index]["body"][name] = bad
                    assert chain_fault(changed) is not None, (index, name)


def test_old_and_forked_ledgers_show_against_receipts(study: Study, tmp_path: Path) -> None:
    key = study.keys["alpha"]
    fresh = opened(study)
    with Ledger.open(
        study.root / "sites/alpha/ledger.sqlite", key=key, counter_path=study.root / "sites/alpha/counter"
    ) as ledger:
        head = ledger.head()
    check_seen(fresh, SeenHead.parse(head.to_dict()), what="ledger")
    later = LedgerHead.sign(key, ledger_id=fresh.ledger_id, length=99, entry_hash=b"\1" * 32)
    with pytest.raises(EvidenceError, match="an old copy"):
        opened(study, seen=[SeenHead.parse(later.to_dict())])
    fork = LedgerHead.sign(key, ledger_id=fresh.ledger_id, length=3, entry_hash=b"\1" * 32)
    with pytest.raises(EvidenceError, match="entry 3 is not the one that peers saw"):
        opened(study, seen=[SeenHead.parse(fork.to_dict())])
    forged = LedgerHead.sign(study.keys["beta"], ledger_id=fresh.ledger_id, length=3, entry_hash=b"\1" * 32)
    with pytest.raises(EvidenceError, match="signature does not verify"):
        opened(study, seen=[SeenHead.parse(forged.to_dict())])


@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize("noise", [1.5, 6.0])
def test_epsilon_agrees_with_the_sites_accounting(rate: float, noise: float) -> None:
    event = PrivacyEvent(
        kind="gaussian/v1",
        sampling_rate=rate,
        steps=30,
        noise_multiplier_world=noise,
        noise_multiplier_colluding=noise / math.sqrt(2),
        max_divergence=1e-7,
    )
    charged = ChargedEvent(**event.to_dict())
    for view, observer in (("world", "world"), ("all_others_collude", "colluding")):
        theirs = epsilon([event] * 3, 1e-5, view=view).reported  # type: ignore[arg-type]
        own = spent_epsilon([charged] * 3, delta=1e-5, observer=observer).reported  # type: ignore[arg-type]
        assert own == pytest.approx(theirs, rel=0.01)


def test_closed_form_is_the_textbooks() -> None:
    """mu = 1.67 is epsilon 8 at delta 1e-5 (two figures of the design)."""
    assert gaussian_epsilon(1.67, 1e-5) == pytest.approx(8.0, rel=0.01)
    assert gaussian_epsilon(1e-6, 1e-5) == 0.0


def test_unprotected_is_infinite_and_nothing_is_zero() -> None:
    event = ChargedEvent(**PrivacyEvent.unprotected().to_dict())
    assert math.isinf(spent_epsilon([event], delta=1e-5, observer="world").reported)
    assert spent_epsilon([], delta=1e-5, observer="world").reported == 0.0


@pytest.fixture
def files(study: Study, tmp_path: Path) -> list[Path]:
    for site in SITES:
        (tmp_path / f"{site}.json").write_bytes(study.inputs.ledgers[site])
    return [tmp_path / f"{site}.json" for site in SITES]


def test_budget_rows_and_gate_agree(study: Study, files: list[Path]) -> None:
    rows = budget(files, plan=study.plan)
    spending = study.decide().spending
    assert [row.site for row in rows] == list(SITES)
    for row, spent in zip(rows, spending, strict=True):
        assert row.epsilon_world == pytest.approx(spent.epsilon_world, rel=0.01)
        assert row.epsilon_colluding == pytest.approx(spent.epsilon_colluding, rel=0.01)
        assert (row.train_attempts, row.audit_attempts, row.freshness) == (5, 1, "unchecked")


def test_budget_without_a_plan_names_the_key_and_with_one_refuses_strangers(
    study: Study, tmp_path: Path, files: list[Path]
) -> None:
    (row,) = budget(files[:1])
    assert row.site == f"key {study.keys['alpha'].verify_key.hex()[:16]}" and not row.fault
    stranger = make_ledger(tmp_path / "x", study.keys["officer"], study.plan, attempt_records())
    (tmp_path / "x.json").write_bytes(stranger)
    (row,) = budget([tmp_path / "x.json"], plan=study.plan)
    assert "forged" in row.fault and row.epsilon_world is None


def test_budget_names_faults_and_goes_on(study: Study, files: list[Path], tmp_path: Path) -> None:
    files[1].write_bytes(unsigned(study.inputs.ledgers["beta"], swap))
    rows = budget([*files, tmp_path / "missing.json"], plan=study.plan)
    assert [bool(row.fault) for row in rows] == [False, True, False, True]
    assert "reordered: entry 5" in rows[1].fault
    console = Console(file=io.StringIO(), width=200)
    print_budget(rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "reordered" in text and "rare-lesion" in text and "Freshness is unchecked" in text


def test_budget_with_receipts(study: Study, files: list[Path], tmp_path: Path) -> None:
    key = study.keys["alpha"]
    ledger = opened(study)
    good = LedgerHead.sign(
        key, ledger_id=ledger.ledger_id, length=4, entry_hash=bytes.fromhex(ledger.entry_hashes[3])
    )
    later = LedgerHead.sign(key, ledger_id=ledger.ledger_id, length=40, entry_hash=b"\1" * 32)
    receipts = tmp_path / "receipts.json"
    receipts.write_bytes(rfc8785.dumps({"heads": {"alpha": [good.to_dict()]}}))
    rows = budget(files, plan=study.plan, heads=read_receipts([receipts]))
    assert [row.freshness for row in rows] == ["1 receipts continued", "no receipt", "no receipt"]
    receipts.write_bytes(rfc8785.dumps({"heads": {"alpha": later.to_dict()}}))
    rows = budget(files, plan=study.plan, heads=read_receipts([receipts]))
    assert "an old copy" in rows[0].fault
    receipts.write_bytes(b"[]")
    with pytest.raises(EvidenceError, match="not a receipts file"):
        read_receipts([receipts])


def test_several_studies_in_one_ledger_get_a_sum(study: Study, tmp_path: Path) -> None:
    key = study.keys["alpha"]
    event = PrivacyEvent(
        kind="gaussian/v1", sampling_rate=1.0, steps=1,
        noise_multiplier_world=4.0, noise_multiplier_colluding=3.0,
    )  # fmt: skip
    with Ledger.open(tmp_path / "l.sqlite", key=key, counter_path=tmp_path / "c", create=True) as ledger:
        for number, name in enumerate(("one", "two")):
            charge = Charge(
                study_id=name, plan_sha256="0" * 64, purpose="train", round=1, attempt=number, event=event
            )
            ledger.reserve(charge, Budget(epsilon=None, delta=1e-5))
        ledger.export(tmp_path / "l.json")
    one, two, both = budget([tmp_path / "l.json"], delta=1e-6)
    assert (one.study_id, two.study_id, both.study_id) == ("one", "two", "(all studies)")
    assert one.epsilon_world == pytest.approx(gaussian_epsilon(1 / 4, 1e-6), rel=0.01)
    assert both.epsilon_world == pytest.approx(gaussian_epsilon(math.sqrt(2) / 4, 1e-6), rel=0.01)
    assert both.train_attempts == 2


def test_prints_of_decision_and_verification_lead_with_the_conclusion(study: Study, bundle: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    report = verify_bundle(bundle)
    print_verification(report, console)
    print_decision(study.decide().to_dict(), console)
    print_decision(study.decide(verdicts={}).to_dict(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("This bundle passes every check that was made.")
    assert "files have the released SHA-256" in text and "coordinator key" in text
    assert "RELEASE: all 27 conditions hold." in text
    assert "REFUSED:" in text and "no-veto" in text
