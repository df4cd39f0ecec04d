"""``lacuna compliance budget``: what ledgers say was spent, per site and study, from the files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.compliance.dsse import MAX_EVIDENCE_BYTES, EvidenceError, strict_json
from privacy.compliance.epsilon import spent_epsilon
from privacy.compliance.ledger_check import SeenHead, open_ledger
from shared.errors import LacunaError
from shared.study_plan import StudyPlan

ALL_STUDIES = "(all studies)"
DEFAULT_DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """One study in one ledger, or a ledger that does not verify (then ``fault`` says why).

    Attributes:
        ledger: Name of the file.
        site: Site id where a plan named the key, else the first 16 digits of the key.
        study_id: The study, or ``(all studies)`` for the sum of a ledger with several.
        train_attempts, audit_attempts: Charges, also those of attempts that failed.
        epsilon_world: Against everybody, up to max_colluding sites included; None with a fault.
        epsilon_colluding: If all other sites collude.
        delta: For both.
        freshness: ``unchecked`` without receipts, else how many were continued.
    """

    ledger: str
    site: str
    study_id: str
    train_attempts: int
    audit_attempts: int
    epsilon_world: float | None
    epsilon_colluding: float | None
    delta: float
    freshness: str
    fault: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form; an infinite epsilon is the word ``infinite``."""

        def shown(value: float | None) -> Any:
            return "infinite" if value == float("inf") else value

        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "epsilon_world": shown(self.epsilon_world),
            "epsilon_colluding": shown(self.epsilon_colluding),
        }


def budget(
    ledgers: Sequence[Path],
    *,
    plan: StudyPlan | None = None,
    delta: float | None = None,
    heads: Mapping[str, Sequence[SeenHead]] | None = None,
) -> list[BudgetRow]:
    """Check ledger exports and add up what they charge.

    Args:
        ledgers: Export files (``ledger/v1``).
        plan: Names sites by their keys and gives delta. Without it each ledger is checked under the key it
            states itself: then it is whole, but whose it is stays open.
        delta: Overrides the plan's.
        heads: Receipts of ledger heads (:func:`read_receipts`); each applies to the ledger it names. None:
            freshness stays unchecked.

    Returns:
        For each ledger one row a study, and a sum where there are several; a ledger that is forged, changed,
        cut, reordered or older than a receipt gives one row with its fault. Never raises for a ledger.
    """
    at = delta if delta is not None else plan.privacy.delta if plan is not None else DEFAULT_DELTA
    names = {} if plan is None else {entry.identity_key: entry.site_id for entry in plan.roster.sites}
    seen = None if heads is None else [head for own in heads.values() for head in own]
    rows: list[BudgetRow] = []
    for path in ledgers:
        site = "unknown"
        try:
            data = read_evidence_file(path)
            key = stated_key(data, what=path.name)
            if plan is not None and key not in names:
                raise EvidenceError(f"{path.name}: forged: signed by a key that is no site of this study")
            site = names.get(key, f"key {key[:16]}")
            rows.extend(_rows(path.name, data, key, site, delta=at, heads=seen))
        except LacunaError as error:
            rows.append(
                BudgetRow(
                    ledger=path.name, site=site, study_id="", train_attempts=0, audit_attempts=0,
                    epsilon_world=None, epsilon_colluding=None, delta=at, freshness="", fault=error.message,
                )
            )  # fmt: skip
    return rows


def _rows(
    name: str, data: bytes, key: str, site: str, *, delta: float, heads: Sequence[SeenHead] | None
) -> list[BudgetRow]:
    ledger = open_ledger(data, key=key, what=name)
    own = [head for head in heads or () if head.ledger_id == ledger.ledger_id]
    ledger = open_ledger(data, key=key, what=name, seen=own)
    freshness = "unchecked" if heads is None else f"{len(own)} receipts continued" if own else "no receipt"
    rows = []
    studies: list[str | None] = list(ledger.studies())
    if len(studies) != 1:
        studies.append(None)
    for study in studies:
        charges = ledger.charges if study is None else ledger.of_study(study)
        events = [charge.event for charge in charges]
        rows.append(
            BudgetRow(
                ledger=name,
                site=site,
                study_id=ALL_STUDIES if study is None else study,
                train_attempts=sum(charge.purpose == "train" for charge in charges),
                audit_attempts=sum(charge.purpose == "audit" for charge in charges),
                epsilon_world=spent_epsilon(events, delta=delta, observer="world").reported,
                epsilon_colluding=spent_epsilon(events, delta=delta, observer="colluding").reported,
                delta=delta,
                freshness=freshness,
            )
        )
    return rows


def read_receipts(paths: Sequence[Path]) -> dict[str, list[SeenHead]]:
    """Heads of ledgers that peers saw, by site.

    A receipts file is canonical JSON ``{"heads": {SITE: HEAD or [HEAD, ...]}}``, where HEAD is
    ``{"ledger_id", "length", "entry_hash", "signature"}``. The heads carry their sites' signatures; the file
    itself needs none.

    Raises:
        EvidenceError: a file cannot be read, or is no receipts file.
    """
    heads: dict[str, list[SeenHead]] = {}
    for path in paths:
        value = strict_json(read_evidence_file(path), what=path.name)
        found = value.get("heads") if isinstance(value, dict) else None
        if not isinstance(found, Mapping):
            raise EvidenceError(f"{path.name}: not a receipts file")
        for site, entry in found.items():
            items = entry if isinstance(entry, list) else [entry]
            heads.setdefault(str(site), []).extend(SeenHead.parse(item) for item in items)
    return heads


def stated_key(data: bytes, *, what: str) -> str:
    """The key that an export says it is signed with; whether it is, comes next. Raises EvidenceError."""
    try:
        key = strict_json(data, what=what)["signatures"][0]["keyid"]
    except (KeyError, IndexError, TypeError) as error:
        raise EvidenceError(f"{what}: not a signed ledger export") from error
    if not isinstance(key, str) or len(key) != 64 or not set(key) <= set("0123456789abcdef"):
        raise EvidenceError(f"{what}: not a signed ledger export")
    return key


def read_evidence_file(path: Path) -> bytes:
    """Bytes of a file of bounded size. Raises EvidenceError."""
    try:
        if path.stat().st_size > MAX_EVIDENCE_BYTES:
            raise EvidenceError(f"{path.name}: larger than {MAX_EVIDENCE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read: {error.strerror}") from error
