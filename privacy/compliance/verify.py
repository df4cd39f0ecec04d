"""``lacuna compliance verify``: everything in a release bundle, checked offline by the officer.

No torch, no server code, no network. Envelopes, ledgers, epsilons and the gate's conditions go through
code of the officer's own (see :mod:`privacy.compliance.dsse`, :mod:`privacy.compliance.ledger_check`,
:mod:`privacy.compliance.epsilon`, :mod:`privacy.compliance.recheck`); only the plan's schema is read with
:mod:`shared.study_plan`. Every check is listed with its result, also when an earlier one failed.

What this cannot tell without help from outside: whether the coordinator's key is the right one (give
``trusted_coordinator``), whether the bundle was withdrawn (give the release log), and whether a ledger is the
newest one (give receipts).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.compliance.approval_check import ApprovalCount, check_approvals, open_decision
from privacy.compliance.dsse import EvidenceError, SignedStatement, open_signed, sha256_hex, strict_json
from privacy.compliance.ledger_check import SeenHead
from privacy.compliance.recheck import (
    Check,
    Evidence,
    OpenedEvidence,
    recheck_conditions,
    required_conditions,
)
from privacy.compliance.release_log import LogEntry, LogHead, read_log_file
from privacy.compliance.validity import check_in_force
from shared.errors import LacunaError
from shared.identity import VerifyKey
from shared.study_plan import SITE_EVIDENCE, StudyPlan, parse_plan

RELEASE = "attestations/release.dsse.json"
DECISION = "attestations/gate-decision.dsse.json"
PLAN = "attestations/plan.json"
PLAN_SIGNATURE = "attestations/plan.dsse.json"
AUTOENCODER = "models/autoencoder.safetensors"
DENOISER = "models/denoiser.safetensors"
METADATA = "configs/metadata.json"
PLAUSIBILITY = "configs/plausibility.json"
SEGMENTER = "models/segmenter.safetensors"
MODEL_CARD = "docs/README.md"
REQUIRED_FILES = (
    AUTOENCODER,
    DENOISER,
    METADATA,
    "configs/inference.json",
    MODEL_CARD,
    PLAN,
    PLAN_SIGNATURE,
    DECISION,
)
MAX_FILES = 2000
MAX_SMALL_FILE_BYTES = 32 * 1024 * 1024
_OF_SITE = re.compile(
    rf"attestations/({'|'.join(('ledgers', 'verdicts', 'plan-approvals', *SITE_EVIDENCE))})/"
    r"([a-z0-9][a-z0-9-]{0,62})\.dsse\.json"
)


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """Every check. ``bundle_sha256`` and ``study_id`` are empty where they could not be read."""

    path: Path
    checks: tuple[Check, ...]
    bundle_sha256: str
    study_id: str
    coordinator_fingerprint: str

    @property
    def passed(self) -> bool:
        """No check failed; unchecked ones are listed and do not count as failed."""
        return bool(self.checks) and not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "fail")

    @property
    def unchecked(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "unchecked")

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "passed": self.passed,
            "study_id": self.study_id,
            "bundle_sha256": self.bundle_sha256,
            "coordinator_fingerprint": self.coordinator_fingerprint,
            "checks": [check.to_dict() for check in self.checks],
        }


@dataclass(frozen=True, kw_only=True)
class Examination:
    """A bundle as it was verified: the report, and what was opened on the way, for whoever shows figures.

    What could not be read is None, or left out of ``files``; the report says why.

    Attributes:
        files: Bundle path to bytes, weights left out.
        log_entries: Entries of the release log about this bundle; None where no log was given or it failed.
    """

    report: VerificationReport
    plan: StudyPlan | None
    decision: SignedStatement | None
    evidence: OpenedEvidence | None
    approvals: ApprovalCount | None
    files: Mapping[str, bytes]
    log_entries: tuple[LogEntry, ...] | None


def verify_bundle(
    path: Path,
    *,
    trusted_coordinator: str | None = None,
    log: Path | None = None,
    log_at_least: LogHead | None = None,
    seen_heads: Mapping[str, Sequence[SeenHead]] | None = None,
) -> VerificationReport:
    """Check a bundle. Never raises for what is in it: every fault is a failed check that names it.

    Args:
        path: The bundle's folder.
        trusted_coordinator: The coordinator's key (64 hex digits) or fingerprint (``SHA256:...``), obtained
            by another way than this bundle.
        log: The coordinator's release log; a bundle that is withdrawn, or not in it, then fails.
        log_at_least: Head of that log that was seen earlier.
        seen_heads: Receipts of ledger heads, by site id.
    """
    return examine_bundle(
        path,
        trusted_coordinator=trusted_coordinator,
        log=log,
        log_at_least=log_at_least,
        seen_heads=seen_heads,
    ).report


def examine_bundle(
    path: Path,
    *,
    trusted_coordinator: str | None = None,
    log: Path | None = None,
    log_at_least: LogHead | None = None,
    seen_heads: Mapping[str, Sequence[SeenHead]] | None = None,
) -> Examination:
    """:func:`verify_bundle`, keeping what was opened. Never raises for what is in the bundle."""
    run = _Verification(path)
    for step in (run.read_files, run.read_release, run.read_plan):
        run.guard(step)
    run.guard(lambda: run.check_anchor(trusted_coordinator))
    if run.plan is None:
        run.add("evidence", "fail", "the plan cannot be read, so nothing that rests on it can be checked")
    else:
        run.guard(run.check_site_files)
        run.guard(run.check_decision)
        run.guard(lambda: run.check_evidence(seen_heads or {}))
        run.guard(run.check_approvals)
        run.guard(run.check_metadata)
    run.guard(lambda: run.check_log(log, log_at_least))
    return Examination(
        report=run.report(),
        plan=run.plan,
        decision=run.decision,
        evidence=run.evidence,
        approvals=run.approvals,
        files=run.small,
        log_entries=run.log_entries,
    )


class _Verification:
    """One pass over one bundle; collects checks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checks: list[Check] = []
        self.digests: dict[str, str] = {}
        self.small: dict[str, bytes] = {}
        self.plan: StudyPlan | None = None
        self.decision: SignedStatement | None = None
        self.evidence: OpenedEvidence | None = None
        self.approvals: ApprovalCount | None = None
        self.log_entries: tuple[LogEntry, ...] | None = None
        self.release_bytes = b""

    def add(self, name: str, status: Any, detail: str) -> None:
        self.checks.append(Check(name=name, status=status, detail=detail))

    def guard(self, step: Any) -> None:
        """Run a step; whatever it raises becomes a failed check."""
        name = getattr(step, "__name__", "check").replace("check_", "").replace("read_", "").replace("_", " ")
        try:
            step()
        except LacunaError as error:
            self.add(name if name != "<lambda>" else "check", "fail", error.message)
        except Exception as error:  # evidence is foreign: fail closed
            self.add(name, "fail", f"cannot be checked: {type(error).__name__}: {error}"[:300])

    def read_files(self) -> None:
        """Hash every file; refuse links and everything that is no plain file."""
        if not self.path.is_dir():
            raise EvidenceError(f"{self.path} is not a folder")
        strange = []
        for number, entry in enumerate(sorted(self.path.rglob("*"))):
            if number > MAX_FILES:
                raise EvidenceError(f"more than {MAX_FILES} files: not a release bundle")
            name = entry.relative_to(self.path).as_posix()
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                strange.append(f"{name} is not a plain file")
            elif entry.is_dir():
                if not any(entry.iterdir()):
                    strange.append(f"{name}/ is an empty folder")
            else:
                self.digests[name] = _hash(entry)
                if not name.startswith("models/") and entry.stat().st_size <= MAX_SMALL_FILE_BYTES:
                    self.small[name] = entry.read_bytes()
        missing = [name for name in (*REQUIRED_FILES, RELEASE) if name not in self.digests]
        faults = strange + [f"{name} is missing" for name in missing]
        self.add(
            "layout", "fail" if faults else "pass", "; ".join(faults) or f"{len(self.digests)} plain files"
        )

    def need(self, name: str) -> bytes:
        if name not in self.small:
            raise EvidenceError(f"{name}: missing or too large")
        return self.small[name]

    def read_plan(self) -> None:
        data = self.need(PLAN)
        value = strict_json(data, what=PLAN)
        if not isinstance(value, dict):
            raise EvidenceError(f"{PLAN}: not a study plan")
        plan = parse_plan(value, what=PLAN)
        if plan.canonical() != data:
            raise EvidenceError(f"{PLAN}: not in canonical form")
        self.plan = plan
        coordinator = plan.roster.coordinator_key
        try:
            statement = open_signed(
                self.need(PLAN_SIGNATURE), key=coordinator, predicate_type="plan/v1", what=PLAN_SIGNATURE
            )
            if statement.predicate.get("plan_sha256") != plan.digest().hex() or list(
                statement.subjects.values()
            ) != [sha256_hex(data)]:
                raise EvidenceError(f"{PLAN_SIGNATURE}: it signs another plan than plan.json (plan altered)")
            self.add("plan", "pass", f"study {plan.study_id}, {plan.n_sites} sites, signed by coordinator")
        except EvidenceError as error:
            self.add("plan", "fail", error.message)
        self._check_release(coordinator)

    def read_release(self) -> None:
        """Only what needs no key; the signature follows once the plan names the coordinator."""
        self.release_bytes = self.need(RELEASE)

    def _check_release(self, coordinator: str) -> None:
        try:
            statement = open_signed(
                self.release_bytes, key=coordinator, predicate_type="release/v1", what=RELEASE
            )
        except EvidenceError as error:
            self.add("release statement", "fail", error.message)
            return
        assert self.plan is not None
        predicate = statement.predicate
        faults = []
        if predicate.get("plan_sha256") != self.plan.digest().hex():
            faults.append("it is about another plan")
        if predicate.get("decision_sha256") != self.digests.get(DECISION):
            faults.append("it rests on another gate decision")
        if predicate.get("candidate_sha256") != self.digests.get(DENOISER):
            faults.append("it releases another candidate than models/denoiser.safetensors")
        try:
            check_in_force(self.plan, predicate.get("at"), what="release")
        except EvidenceError as error:
            faults.append(error.message)
        if predicate.get("synthetic") is not True:
            faults.append("it does not state that samples are synthetic")
        self.add("release statement", "fail" if faults else "pass", _joined(RELEASE, faults, "signed"))
        for name in sorted(set(statement.subjects) | (set(self.digests) - {RELEASE})):
            expected, found = statement.subjects.get(name), self.digests.get(name)
            if expected is None:
                self.add(f"file {name}", "fail", "not part of the release: an extra file")
            elif found is None:
                self.add(f"file {name}", "fail", "missing")
            elif expected != found:
                self.add(f"file {name}", "fail", "changed: its SHA-256 is not the released one")
            else:
                self.add(f"file {name}", "pass", f"sha256 {found[:16]}")

    def check_anchor(self, trusted: str | None) -> None:
        if self.plan is None:
            self.add("coordinator key", "fail", "the plan that names it cannot be read")
            return
        key = VerifyKey.from_hex(self.plan.roster.coordinator_key)
        if trusted is None:
            self.add(
                "coordinator key",
                "unchecked",
                f"taken from the bundle itself: {key.fingerprint}; compare it with one you got another way",
            )
        elif trusted in (key.hex(), key.fingerprint):
            self.add("coordinator key", "pass", f"the one given: {key.fingerprint}")
        else:
            self.add("coordinator key", "fail", f"wrong coordinator: the bundle's key is {key.fingerprint}")

    def _by_site(self, kind: str) -> dict[str, bytes]:
        found = {}
        for name, data in self.small.items():
            match = _OF_SITE.fullmatch(name)
            if match and match[1] == kind:
                found[match[2]] = data
        return found

    def check_site_files(self) -> None:
        """Every attestation has a place that is known."""
        known = {PLAN, PLAN_SIGNATURE, DECISION, RELEASE}
        strange = [
            name
            for name in self.digests
            if name.startswith("attestations/")
            and name not in known
            and not _OF_SITE.fullmatch(name)
            and not re.fullmatch(r"attestations/approvals/[a-z0-9-]{1,80}\.dsse\.json", name)
        ]
        if strange:
            self.add("attestation names", "fail", f"unknown attestations: {', '.join(strange[:5])}")

    def check_decision(self) -> None:
        assert self.plan is not None
        self.decision = decision = open_decision(self.need(DECISION), plan=self.plan)
        predicate = decision.predicate
        faults = []
        if predicate.get("decision") != "release":
            faults.append(f"the gate said {str(predicate.get('decision'))[:40]!r}")
        listed = {c.get("name"): c for c in predicate.get("conditions", []) if isinstance(c, dict)}
        absent = [name for name in required_conditions(self.plan) if name not in listed]
        if absent:
            faults.append(f"conditions left out: {', '.join(absent)}")
        failed = [str(name) for name, entry in listed.items() if entry.get("passed") is not True]
        if failed:
            faults.append(f"failed conditions: {', '.join(failed)}")
        if predicate.get("candidate_sha256") != self.digests.get(DENOISER):
            faults.append("it is about another candidate (changed after the audit?)")
        self.add("gate decision", "fail" if faults else "pass", _joined(DECISION, faults, "release, signed"))
        differing = [
            name for name, digest in sorted(decision.subjects.items()) if self.digests.get(name) != digest
        ]
        evidence = {PLAN, PLAN_SIGNATURE, AUTOENCODER, DENOISER} | {
            name for name in self.digests if _OF_SITE.fullmatch(name)
        }
        unnamed = sorted(evidence - set(decision.subjects))
        faults = [f"{name} is not the one that the gate saw, or is missing" for name in differing]
        faults += [f"{name} was not before the gate" for name in unnamed]
        self.add(
            "gate evidence",
            "fail" if faults else "pass",
            "; ".join(faults) or f"{len(decision.subjects)} files are those that the gate saw",
        )

    def check_evidence(self, seen_heads: Mapping[str, Sequence[SeenHead]]) -> None:
        assert self.plan is not None
        self.evidence = opened = OpenedEvidence(
            Evidence(
                plan=self.plan,
                plan_envelope=self.small.get(PLAN_SIGNATURE, b""),
                plan_approvals=self._by_site("plan-approvals"),
                ledgers=self._by_site("ledgers"),
                verdicts=self._by_site("verdicts"),
                site_evidence={kind: self._by_site(kind) for kind in SITE_EVIDENCE},
                decision={} if self.decision is None else self.decision.predicate,
                candidate_sha256=self.digests.get(DENOISER, ""),
                autoencoder_sha256=self.digests.get(AUTOENCODER, ""),
                seen_heads=seen_heads,
            )
        )
        if not any(seen_heads.values()):
            self.add(
                "ledger receipts", "unchecked", "not given: an old copy of a ledger would not be noticed"
            )
        for site in opened.sites:
            ledger = opened.ledgers.get(site)
            if ledger is None:
                self.add(f"ledger {site}", "fail", opened.faults[f"ledger {site}"])
            else:
                self.add(f"ledger {site}", "pass", f"signed, chain of {ledger.length} entries recomputed")
        for site in opened.sites:
            fault = opened.faults.get(f"verdict {site}")
            if fault:
                self.add(f"verdict {site}", "fail", fault)
            elif site in opened.verdicts:
                self.add(f"verdict {site}", "pass", "signed by its site, about this plan")
        self.checks.extend(recheck_conditions(opened))
        self._check_figures(opened)

    def _check_figures(self, opened: OpenedEvidence) -> None:
        """The figures that people read (decision, model card) are those recomputed here."""
        card = self.small.get(MODEL_CARD, b"").decode("utf-8", errors="replace")
        stated = {} if self.decision is None else self.decision.predicate
        rows = {r.get("site_id"): r for r in stated.get("spending", []) if isinstance(r, dict)}
        faults = []
        try:
            spent = opened.spent
        except LacunaError as error:
            self.add("figures", "fail", f"epsilons cannot be recomputed: {error.message}")
            return
        for site, pair in spent.items():
            row = rows.get(site, {})
            for name, figure in zip(("epsilon_world", "epsilon_colluding"), pair, strict=True):
                if not _agree(row.get(name), figure.to_json()):
                    faults.append(
                        f"{site}: {name} is stated as {row.get(name)}, recomputed {figure.to_json()}"
                    )
            counts = [sum(c.purpose == p for c in opened.charges(site)) for p in ("train", "audit")]
            shown = [f"{row[n]:.2f}" for n in ("epsilon_world", "epsilon_colluding") if _number(row.get(n))]
            line = f"| {site} | {counts[0]} | {counts[1]} | {' | '.join(shown)} |"
            if line not in card:
                faults.append(f"{MODEL_CARD} does not show the budget of {site} as recomputed")
        self.add(
            "figures",
            "fail" if faults else "pass",
            "; ".join(faults[:5]) or "epsilons in decision and model card agree with the ledgers to 1%",
        )

    def check_approvals(self) -> None:
        assert self.plan is not None
        given = {n: d for n, d in sorted(self.small.items()) if n.startswith("attestations/approvals/")}
        self.approvals = count = check_approvals(self.need(DECISION), given.values(), plan=self.plan)
        faults = [] if count.sufficient else [f"{count.figure}; needed: {count.bound}"]
        faults += count.rejected
        self.add("approvals", "fail" if faults else "pass", "; ".join(faults) or count.figure)

    def check_metadata(self) -> None:
        """configs/metadata.json repeats the plan; it must repeat it truly."""
        assert self.plan is not None
        plan = self.plan
        try:
            stated = json.loads(self.need(METADATA))["lacuna"]
        except (ValueError, KeyError, TypeError) as error:
            raise EvidenceError(f"{METADATA}: not the metadata of a release bundle") from error
        expected: dict[str, Any] = {
            "study_id": plan.study_id,
            "plan_sha256": plan.digest().hex(),
            "candidate_sha256": self.digests.get(DENOISER),
            "decision_sha256": self.digests.get(DECISION),
            "preset": plan.model.preset,
            "conditions": list(plan.data.conditions),
            "labels": list(plan.data.labels),
            "grid_shape": list(plan.data.grid_shape),
            "spacing_mm": list(plan.data.spacing_mm),
            "sampling_steps": plan.model.sampling_steps,
            "guidance_scale": plan.model.guidance_scale,
            "synthetic": True,
            "privacy": {
                "unit": plan.privacy.unit,
                "neighbouring": plan.privacy.neighbouring,
                "mode": plan.privacy.mode,
                "epsilon": plan.privacy.epsilon,
                "delta": plan.privacy.delta,
            },
        }
        if plan.data.covariates or "covariates" in stated:
            expected["covariates"] = [c.model_dump(mode="json") for c in plan.data.covariates]
        if self.digests.get(PLAUSIBILITY) != plan.data.plausibility_sha256:
            expected["plausibility"] = PLAUSIBILITY
        if self.digests.get(SEGMENTER) != plan.data.segmenter_sha256:
            expected["segmenter"] = SEGMENTER
        if plan.data.modality or "modality" in stated:
            expected["modality"] = plan.data.modality
        faults = [name for name, value in expected.items() if stated.get(name) != value]
        self.add(
            "metadata",
            "fail" if faults else "pass",
            f"{METADATA} differs from plan or weights in: {', '.join(faults)}"
            if faults
            else "as in the plan",
        )

    def check_log(self, log: Path | None, at_least: LogHead | None) -> None:
        if log is None:
            self.add("release log", "unchecked", "not given: a withdrawal would not be noticed")
            return
        bundle = sha256_hex(self.release_bytes)
        try:
            about = [e for e in read_log_file(log, at_least=at_least) if e.bundle_sha256 == bundle]
        except EvidenceError as error:
            self.add("release log", "fail", error.message)
            return
        self.log_entries = tuple(about)
        withdrawn = [entry for entry in about if entry.kind == "withdrawal"]
        coordinator = None if self.plan is None else self.plan.roster.coordinator_key
        if withdrawn:
            entry = withdrawn[0]
            self.add("release log", "fail", f"withdrawn on {entry.at}: {entry.reason}")
        elif not any(entry.kind == "release" and entry.signer == coordinator for entry in about):
            self.add(
                "release log", "fail", "this bundle is not in the log: never released by this coordinator"
            )
        else:
            self.add("release log", "pass", f"released on {about[0].at}, not withdrawn")

    def report(self) -> VerificationReport:
        fingerprint = ""
        if self.plan is not None:
            fingerprint = VerifyKey.from_hex(self.plan.roster.coordinator_key).fingerprint
        return VerificationReport(
            path=self.path,
            checks=tuple(self.checks),
            bundle_sha256=sha256_hex(self.release_bytes) if self.release_bytes else "",
            study_id="" if self.plan is None else self.plan.study_id,
            coordinator_fingerprint=fingerprint,
        )


def _hash(file: Path) -> str:
    state = hashlib.sha256()
    with file.open("rb") as handle:
        while piece := handle.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def _joined(name: str, faults: list[str], good: str) -> str:
    return f"{name}: {'; '.join(faults)}" if faults else good


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _agree(stated: Any, found: Any) -> bool:
    if _number(stated) and _number(found):
        return bool(abs(stated - found) <= 0.01 * max(abs(stated), abs(found)) + 1e-3)
    return bool(stated == found)
