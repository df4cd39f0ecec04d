"""The release bundle: MONAI layout, attestations, model card. Written whole or not at all.

Nothing is released unless the gate's decision says so, the approvals that the plan asks for are there, every
piece of evidence is the one that the decision names by hash, and the officer's own checker
(:mod:`privacy.compliance.verify`) passes on the finished folder before it gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy.compliance.approvals import (
    DECISION_NAME,
    ApprovalCount,
    approval_file_name,
    check_approvals,
    failed_conditions,
    open_decision,
)
from privacy.compliance.dsse import EvidenceError, SignedStatement, sha256_hex
from privacy.compliance.validity import check_in_force
from privacy.compliance.verify import verify_bundle
from server.release.gate_evidence import site_evidence_files
from server.release.log import append_release
from server.release.model_card import model_card
from server.release.monai_config import BUNDLE_FORMAT, bundle_metadata, inference_config, software_versions
from shared.attestation import Statement, Subject, sign_statement
from shared.checkpoint import file_sha256
from shared.errors import CoordinatorError, RefusedError
from shared.identity import SigningKey
from shared.study_plan import StudyPlan

RELEASE_PREDICATE = "release/v1"
RELEASE_NAME = "attestations/release.dsse.json"
AUTOENCODER_NAME = "models/autoencoder.safetensors"
PLAUSIBILITY_NAME = "configs/plausibility.json"
SEGMENTER_NAME = "models/segmenter.safetensors"
DENOISER_NAME = "models/denoiser.safetensors"


class ReleaseRefusedError(RefusedError):
    """The bundle is not written; the message names each reason."""


@dataclass(frozen=True, kw_only=True)
class ReleaseEvidence:
    """Everything that was signed on the way to a release, as bytes; maps are by site id."""

    plan: StudyPlan
    plan_envelope: bytes
    ledgers: Mapping[str, bytes]
    verdicts: Mapping[str, bytes]
    decision: bytes
    approvals: Sequence[bytes]
    plan_approvals: Mapping[str, bytes] = field(default_factory=dict)
    site_evidence: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """Bundle path to bytes, approvals and release statement left out."""
        return {
            "attestations/plan.json": self.plan.canonical(),
            "attestations/plan.dsse.json": self.plan_envelope,
            **{f"attestations/plan-approvals/{s}.dsse.json": d for s, d in self.plan_approvals.items()},
            **{f"attestations/ledgers/{s}.dsse.json": d for s, d in self.ledgers.items()},
            **{f"attestations/verdicts/{s}.dsse.json": d for s, d in self.verdicts.items()},
            **site_evidence_files(self.site_evidence),
            DECISION_NAME: self.decision,
        }


@dataclass(frozen=True, kw_only=True)
class ReleasedBundle:
    """Where the bundle is; ``bundle_sha256`` (of its release statement) identifies it everywhere."""

    path: Path
    bundle_sha256: str


def write_bundle(
    path: Path,
    evidence: ReleaseEvidence,
    *,
    autoencoder: Path,
    candidate: Path,
    plausibility: Path | None = None,
    segmenter: Path | None = None,
    key: SigningKey,
    at: str,
    version: str = "1.0.0",
    license_text: str | None = None,
    log_path: Path | None = None,
) -> ReleasedBundle:
    """Write a release bundle.

    Args:
        path: The bundle's folder; must not exist.
        evidence: Plan, ledgers, verdicts, decision, approvals.
        autoencoder: Weights that the plan names by hash; go in as they are.
        candidate: Weights that were audited; go in as they are.
        plausibility: Ranges that the plan names by hash; None where it names none.
        segmenter: The same of the segmenter's weights.
        key: The coordinator's.
        at: Time of the release, ``2026-01-31T12:00:00Z``.
        version: The bundle's version.
        license_text: Content of ``LICENSE``; without it the bundle states none.
        log_path: Release log to append to, before the bundle gets its name.

    Raises:
        ReleaseRefusedError: names every reason (decision, approvals, evidence or weights that do not match).
        CoordinatorError: the path exists, the key is not the coordinator's, or a file cannot be written.
        EvidenceError: the decision itself does not verify.
    """
    plan = evidence.plan
    if key.verify_key.hex() != plan.roster.coordinator_key:
        raise CoordinatorError("a bundle is signed with the coordinator's key that the plan names")
    if path.exists():
        raise CoordinatorError(f"{path} exists already; a released bundle is never overwritten")
    decision = open_decision(evidence.decision, plan=plan)
    approvals = check_approvals(evidence.decision, evidence.approvals, plan=plan)
    reasons = _objections(
        evidence,
        decision,
        approvals,
        autoencoder=autoencoder,
        candidate=candidate,
        public={PLAUSIBILITY_NAME: plausibility, SEGMENTER_NAME: segmenter},
        at=at,
    )
    if reasons:
        raise ReleaseRefusedError(
            "no release:\n  - " + "\n  - ".join(reasons),
            remedy="nothing overrules these; mend what is named, and let the gate decide anew where needed",
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write_content(part, evidence, decision, approvals, version=version, license_text=license_text)
        (part / "models").mkdir()
        shutil.copyfile(autoencoder, part / AUTOENCODER_NAME)
        shutil.copyfile(candidate, part / DENOISER_NAME)
        for name, file in ((PLAUSIBILITY_NAME, plausibility), (SEGMENTER_NAME, segmenter)):
            if file is not None:
                shutil.copyfile(file, part / name)
        statement = _release_statement(part, decision, at=at)
        release = sign_statement(statement, key)
        (part / RELEASE_NAME).write_bytes(release)
        report = verify_bundle(part, trusted_coordinator=plan.roster.coordinator_key)
        if not report.passed:
            raise ReleaseRefusedError(
                "no release: the finished bundle does not pass the officer's checks:\n  - "
                + "\n  - ".join(f"{check.name}: {check.detail}" for check in report.failed)
            )
        _sync(part)
        if log_path is not None:
            append_release(
                log_path, bundle_sha256=sha256_hex(release), study_id=plan.study_id, key=key, at=at
            )
        part.rename(path)
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return ReleasedBundle(path=path, bundle_sha256=sha256_hex(release))


def bundle_sha256(path: Path) -> str:
    """What identifies a bundle everywhere: SHA-256 of its release statement. Raises MalformedMessageError."""
    return file_sha256(path / RELEASE_NAME)


def _objections(
    evidence: ReleaseEvidence,
    decision: SignedStatement,
    approvals: ApprovalCount,
    *,
    autoencoder: Path,
    candidate: Path,
    public: Mapping[str, Path | None],
    at: str,
) -> list[str]:
    """Every reason against this release, in words."""
    reasons = []
    failed = failed_conditions(decision.predicate)
    if decision.predicate.get("decision") != "release" or failed:
        reasons.append(f"the gate refused: {', '.join(failed) or 'decision is not release'}")
    if not approvals.sufficient:
        reasons.append(f"approvals: {approvals.figure}; needed: {approvals.bound}")
        reasons.extend(approvals.rejected)
    given = {name: sha256_hex(data) for name, data in evidence.files().items() if name != DECISION_NAME} | {
        AUTOENCODER_NAME: file_sha256(autoencoder),
        DENOISER_NAME: file_sha256(candidate),
    }
    for name in sorted(set(given) | set(decision.subjects)):
        if name not in given:
            reasons.append(f"{name}: the gate decided on it, but it is not here")
        elif name not in decision.subjects:
            reasons.append(f"{name}: the gate's decision does not name it")
        elif given[name] != decision.subjects[name]:
            reasons.append(f"{name}: not the one that the gate decided on")
    try:
        check_in_force(evidence.plan, at, what="release")
    except EvidenceError as error:
        reasons.append(error.message)
    data = evidence.plan.data
    named = {PLAUSIBILITY_NAME: data.plausibility_sha256, SEGMENTER_NAME: data.segmenter_sha256}
    for name, file in public.items():
        brought = None if file is None else file_sha256(file)
        if brought != named[name]:
            reasons.append(f"{name}: {'not' if brought else 'missing, it is'} what the plan names")
    if given[AUTOENCODER_NAME] != evidence.plan.model.autoencoder_sha256:
        reasons.append(f"{AUTOENCODER_NAME}: not the autoencoder that the plan names")
    return reasons


def _write_content(
    part: Path,
    evidence: ReleaseEvidence,
    decision: SignedStatement,
    approvals: ApprovalCount,
    *,
    version: str,
    license_text: str | None,
) -> None:
    plan = evidence.plan
    files = evidence.files()
    for approval in evidence.approvals:
        if check_approvals(evidence.decision, [approval], plan=plan).rejected:
            continue
        name = f"attestations/approvals/{approval_file_name(approval, plan=plan)}"
        files.setdefault(name, approval)
    metadata = bundle_metadata(
        plan,
        version=version,
        versions=software_versions(),
        digests={
            "plan_sha256": plan.digest().hex(),
            "candidate_sha256": decision.subjects[DENOISER_NAME],
            "decision_sha256": decision.sha256,
        },
    )
    files["configs/metadata.json"] = _readable(metadata)
    files["configs/inference.json"] = _readable(inference_config(plan))
    files["docs/README.md"] = model_card(plan, decision.predicate, approvals).encode()
    if license_text is not None:
        files["LICENSE"] = license_text.encode()
    for name, data in files.items():
        target = part / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _release_statement(part: Path, decision: SignedStatement, *, at: str) -> Statement:
    names = sorted(str(file.relative_to(part)) for file in part.rglob("*") if file.is_file())
    return Statement(
        predicate_type=RELEASE_PREDICATE,
        subjects=tuple(Subject(name=name, sha256=file_sha256(part / name)) for name in names),
        predicate={
            "format": BUNDLE_FORMAT,
            "study_id": decision.predicate["study_id"],
            "plan_sha256": decision.predicate["plan_sha256"],
            "candidate_sha256": decision.subjects[DENOISER_NAME],
            "decision_sha256": decision.sha256,
            "synthetic": True,
            "at": at,
        },
    )


def _readable(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sync(root: Path) -> None:
    """Every file on disk before the folder gets its name."""
    for file in root.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
