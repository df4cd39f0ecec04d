"""The signed statements of a bundle, numbered, for a report's appendix: whose, about what, and their text.

Every figure of a report names the statement that it comes from by these numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from privacy.compliance.approval_check import (
    APPROVAL_PREDICATE,
    DECISION_NAME,
    DECISION_PREDICATE,
    PLAN_APPROVAL_PREDICATE,
    PLAN_NAME,
    approval_file_name,
)
from privacy.compliance.dsse import EvidenceError, decode_base64, open_signed, sha256_hex, strict_json
from privacy.compliance.ledger_check import LEDGER_PREDICATE
from privacy.compliance.page import Verbatim
from shared.identity import VerifyKey
from shared.study_plan import SITE_EVIDENCE, StudyPlan

PLAN_SIGNATURE_NAME = "attestations/plan.dsse.json"
RELEASE_NAME = "attestations/release.dsse.json"
MAX_SHOWN_CHARACTERS = 400_000
"""Longest text of one statement in the appendix; a longer one is cut, and says so."""

MAX_SHOWN_IN_ALL = 8_000_000
"""Characters of all statements together: many of them are each cut shorter, so that a page can be opened."""

_OF_SITE = re.compile(
    r"attestations/(plan-approvals|ledgers|verdicts|mechanism-audits|canary-openings)/"
    r"([a-z0-9][a-z0-9-]{0,62})\.dsse\.json"
)
_KINDS = {
    "plan-approvals": ("Approval of the plan", PLAN_APPROVAL_PREDICATE),
    "ledgers": ("Privacy ledger", LEDGER_PREDICATE),
    "verdicts": ("Audit verdict", "verdict/v1"),
    "mechanism-audits": ("Mechanism audit", "mechanism-audit/v1"),
    "canary-openings": ("Coins of the in-run canaries", "canary-opening/v1"),
}
_ORDER = (
    PLAN_SIGNATURE_NAME,
    "plan-approvals",
    "ledgers",
    "verdicts",
    *SITE_EVIDENCE,
    DECISION_NAME,
    "approvals",
    RELEASE_NAME,
)


@dataclass(frozen=True, kw_only=True)
class ShownStatement:
    """One signed statement.

    Attributes:
        number: From 1; the page calls it S1, S2, ...
        file: Its path in the bundle.
        title: What it is, in words.
        signer: Who must have signed it.
        fingerprint: Of that signer's key; empty where the signer is nobody of the study.
        sha256: Of the file.
        fault: Empty where the signature verifies under that key.
        text: The statement, indented.
    """

    number: int
    file: str
    title: str
    signer: str
    fingerprint: str
    sha256: str
    fault: str
    text: Verbatim

    @property
    def anchor(self) -> str:
        return f"S{self.number}"


def bundle_statements(files: Mapping[str, bytes], plan: StudyPlan) -> tuple[ShownStatement, ...]:
    """Every envelope among a bundle's files, in the order of the study. Never raises for what is in them."""
    names = [name for name in files if name.startswith("attestations/") and name.endswith(".dsse.json")]
    names.sort(key=lambda name: (_place(name), name))
    bound = min(MAX_SHOWN_CHARACTERS, MAX_SHOWN_IN_ALL // max(len(names), 1))
    return tuple(_shown(number, name, files, plan, bound) for number, name in enumerate(names, start=1))


def _place(name: str) -> int:
    return next(
        (index for index, part in enumerate(_ORDER) if part in (name, name.split("/")[1])), len(_ORDER)
    )


def _shown(number: int, name: str, files: Mapping[str, bytes], plan: StudyPlan, bound: int) -> ShownStatement:
    data = files[name]
    title, signer, key, kind = _expected(name, data, plan)
    fault = ""
    if not key:
        fault = "it is signed by nobody of this study"
    else:
        try:
            open_signed(data, key=key, predicate_type=kind, what=name)
        except EvidenceError as error:
            fault = error.message
    text = _text(data)
    if name == PLAN_SIGNATURE_NAME and PLAN_NAME in files:
        text = f"{text}\n\nand {PLAN_NAME}, whose SHA-256 it signs:\n\n{_indented(files[PLAN_NAME])}"
    if len(text) > bound:
        text = f"{text[:bound]}\n[cut here: {len(text)} characters in all; see the file]"
    return ShownStatement(
        number=number,
        file=name,
        title=title,
        signer=signer,
        fingerprint=VerifyKey.from_hex(key).fingerprint if key else "",
        sha256=sha256_hex(data),
        fault=fault,
        text=Verbatim(text),
    )


def _expected(name: str, data: bytes, plan: StudyPlan) -> tuple[str, str, str, str]:
    """(title, signer in words, key, predicate type) that a file of this name must have."""
    coordinator = ("the coordinator", plan.roster.coordinator_key)
    if name == PLAN_SIGNATURE_NAME:
        return "The study plan", *coordinator, "plan/v1"
    if name == DECISION_NAME:
        return "The gate's decision", *coordinator, DECISION_PREDICATE
    if name == RELEASE_NAME:
        return "The release", *coordinator, "release/v1"
    keys = {entry.site_id: entry.identity_key for entry in plan.roster.sites}
    if (match := _OF_SITE.fullmatch(name)) and match[2] in keys:
        title, kind = _KINDS[match[1]]
        return f"{title}, {match[2]}", match[2], keys[match[2]], kind
    if name.startswith("attestations/approvals/"):
        try:
            who = approval_file_name(data, plan=plan)
        except EvidenceError:
            return "Approval of the release", "unknown", "", APPROVAL_PREDICATE
        site = who.removesuffix(".dsse.json").removeprefix("site-")
        if site in keys and who != "officer.dsse.json":
            return f"Approval of the release, {site}", site, keys[site], APPROVAL_PREDICATE
        officer = plan.roster.officer_key
        return (
            "Approval of the release, compliance officer",
            "the compliance officer",
            officer,
            APPROVAL_PREDICATE,
        )
    return "Unknown statement", "unknown", "", ""


def _text(data: bytes) -> str:
    try:
        payload = decode_base64(strict_json(data, what="it")["payload"], what="it")
        return _indented(payload)
    except (EvidenceError, KeyError, TypeError):
        return f"[not readable: {len(data)} bytes]"


def _indented(payload: bytes) -> str:
    try:
        value: Any = json.loads(payload)
    except (ValueError, RecursionError):
        return f"[not readable: {len(payload)} bytes]"
    return json.dumps(value, indent=1, ensure_ascii=False)
