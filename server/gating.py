"""From a finished run to a signed decision, and from approvals to a bundle: files in, files out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from privacy.compliance.approval_check import check_plan_approval
from privacy.compliance.approvals import approval_file_name
from privacy.compliance.release_log import LogEntry
from privacy.ledger_chain import PREDICATE_TYPE as LEDGER_PREDICATE
from privacy.ledger_chain import LedgerHead, read_export
from server.release.bundle import ReleasedBundle, ReleaseEvidence, bundle_sha256, write_bundle
from server.release.gate import GateDecision, GateInputs, evaluate_gate, sign_decision
from server.release.log import append_withdrawal, now_utc
from server.study_store import StudyStore
from shared.attestation import open_statement
from shared.canonical import parse_json
from shared.errors import CoordinatorError, LacunaError, PeerError, RefusedError
from shared.home import write_private
from shared.identity import SigningKey
from shared.plan_package import hash_file
from shared.study_plan import SITE_EVIDENCE


def decide(store: StudyStore, key: SigningKey) -> GateDecision:
    """Evaluate the gate over what is in the store, sign and keep the decision.

    Raises:
        CoordinatorError: there is no candidate yet, or a decision was signed and a bundle released.
    """
    package = store.package()
    if not store.candidate_path.exists():
        raise CoordinatorError(
            "there is no candidate to judge: no audit was completed",
            remedy="lacuna coordinator status, then resume",
        )
    if store.bundle_path.exists():
        raise CoordinatorError(f"study {package.plan.study_id!r} is released already: {store.bundle_path}")
    at = now_utc()
    decision = evaluate_gate(
        GateInputs(
            at=at,
            plan=package.plan,
            plan_envelope=package.envelope,
            ledgers=_by_site(store.evidence / "ledgers"),
            verdicts=_by_site(store.evidence / "verdicts"),
            site_evidence={kind: _by_site(store.evidence / kind) for kind in SITE_EVIDENCE},
            candidate_sha256=hash_file(store.candidate_path),
            autoencoder_sha256=hash_file(package.autoencoder),
            attempts=store.attempts(),
            plan_approvals=_by_site(store.plan_approvals) or None,
            seen_heads=_seen_heads(store),
        )
    )
    write_private(store.decision_path, sign_decision(decision, key, at=at))
    return decision


def keep_approval(store: StudyStore, data: bytes) -> Path:
    """Check whose approval it is and keep it. Raises EvidenceError (a PeerError)."""
    path = store.approvals / approval_file_name(data, plan=store.package().plan)
    store.approvals.mkdir(exist_ok=True, mode=0o700)
    write_private(path, data)
    return path


def keep_plan_approval(store: StudyStore, data: bytes) -> str:
    """Check which site approved the signed plan, and keep its approval. Returns the site's id.

    Raises:
        RefusedError: it is no approval of this plan by a site of its roster.
    """
    plan = store.package().plan
    for entry in plan.roster.sites:
        try:
            check_plan_approval(data, plan=plan, site_id=entry.site_id)
        except LacunaError:
            continue
        store.plan_approvals.mkdir(exist_ok=True, mode=0o700)
        write_private(store.plan_approvals / f"{entry.site_id}.dsse.json", data)
        return entry.site_id
    raise RefusedError(
        f"this is no approval of the signed plan of study {plan.study_id!r} by one of its sites",
        remedy="ask the site for the file that `lacuna site approve PLAN --out FILE` wrote",
    )


def keep_ledger(store: StudyStore, data: bytes) -> str:
    """Check which site's ledger it is, and keep it as evidence. Returns the site's id.

    For a site whose agent can no longer be asked: the ledger comes as a file in its place.

    Raises:
        RefusedError: it is no ledger signed by a site of the roster, or an older copy than the one at hand.
    """
    plan = store.package().plan
    for entry in plan.roster.sites:
        try:
            open_statement(data, key=entry.verify_key, predicate_type=LEDGER_PREDICATE, what="ledger")
        except LacunaError:
            continue
        kept = store.evidence / "ledgers" / f"{entry.site_id}.dsse.json"
        seen = list(_seen_heads(store).get(entry.site_id, ()))
        if kept.exists():
            seen.append(read_export(kept.read_bytes(), entry.verify_key).head)
        try:
            read_export(data, entry.verify_key, known_heads=seen, what=f"ledger of {entry.site_id}")
        except LacunaError as error:
            raise RefusedError(
                f"ledger of {entry.site_id}: {error.message}",
                remedy=f"ask {entry.site_id} to run `lacuna site export-ledger` again",
            ) from error
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(kept, data)
        return entry.site_id
    raise RefusedError(
        f"this is no ledger that a site of study {plan.study_id!r} signed",
        remedy="ask the site for the file that `lacuna site export-ledger --out FILE` wrote",
    )


def release(store: StudyStore, key: SigningKey, *, license_text: str | None = None) -> ReleasedBundle:
    """Write the bundle, or refuse with every reason."""
    package = store.package()
    if not store.decision_path.exists():
        raise CoordinatorError("the gate has not decided yet", remedy="lacuna coordinator gate")
    approvals = [path.read_bytes() for path in sorted(store.approvals.glob("*.json"))]
    return write_bundle(
        store.bundle_path,
        ReleaseEvidence(
            plan=package.plan,
            plan_envelope=package.envelope,
            ledgers=_by_site(store.evidence / "ledgers"),
            verdicts=_by_site(store.evidence / "verdicts"),
            site_evidence={kind: _by_site(store.evidence / kind) for kind in SITE_EVIDENCE},
            decision=store.decision_path.read_bytes(),
            approvals=approvals,
            plan_approvals=_by_site(store.plan_approvals),
        ),
        autoencoder=package.autoencoder,
        candidate=store.candidate_path,
        plausibility=package.plausibility,
        segmenter=package.segmenter,
        key=key,
        at=now_utc(),
        license_text=license_text,
        log_path=store.log_path,
    )


def withdraw(store: StudyStore, key: SigningKey, *, reason: str) -> LogEntry:
    """Withdraw the study's released bundle: a signed entry in the release log, which is never undone.

    The bundle itself stays as it is; whoever verifies it with the log at hand is told, with the reason.

    Raises:
        CoordinatorError: nothing was released, it is withdrawn already, the reason is empty, or the log does
            not verify.
    """
    study_id = store.package().plan.study_id
    if not store.bundle_path.exists():
        raise CoordinatorError(f"nothing of study {study_id!r} was released, so there is nothing to withdraw")
    return append_withdrawal(
        store.log_path,
        bundle_sha256=bundle_sha256(store.bundle_path),
        study_id=study_id,
        key=key,
        at=now_utc(),
        reason=reason,
    )


def _by_site(folder: Path) -> Mapping[str, bytes]:
    return {
        path.name.removesuffix(".dsse.json"): path.read_bytes() for path in sorted(folder.glob("*.dsse.json"))
    }


def _seen_heads(store: StudyStore) -> dict[str, list[LedgerHead]]:
    if not store.receipts_path.exists():
        return {}
    try:
        value = parse_json(store.receipts_path.read_bytes(), what="receipts.json")
        return {site: [LedgerHead.from_dict(head)] for site, head in value["heads"].items()}
    except (PeerError, KeyError, TypeError, AttributeError) as error:
        raise CoordinatorError(f"{store.receipts_path} is damaged: {error}") from error
