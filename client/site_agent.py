"""The site agent: the hospital's own process, which decides what leaves.

Every request is checked against the plan that this site approved before anything is computed, and charged
to the ledger before anything derived from data leaves. The agent needs no network; messages reach it
through :mod:`client.agent_service`. It never raises into the transport: whatever is wrong becomes a
refusal with a reason from a closed list, and the details stay in the site's own log.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from client.audit_part import AuditPart
from client.site_home import SiteHome
from privacy.audit.canary_opening import CanaryOpening
from privacy.audit.counts import CountsLayout
from privacy.audit.site_evidence import sign_opening
from privacy.audit.verdict import PlantedLeak
from privacy.audit.verdict_statement import make_verdict_statement, sign_verdict
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import Budget, Charge, Ledger, Purpose, RepeatedAttemptError
from privacy.ledger_chain import export_statement
from privacy.ledger_continuity import LedgerContinuity, LedgerNotLinkedError
from privacy.secagg.messages import (
    AdvertiseRequest,
    ConfirmRequest,
    ShareRequest,
    UnmaskRequest,
    UploadRequest,
)
from privacy.secagg.session import AttemptId
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secret_random import SecretRandom
from shared.agent_messages import (
    EXCHANGE,
    EXCHANGE_REPLY,
    HELLO,
    VERDICT_REPLY,
    VERDICT_REQUEST,
    WORK,
    Hello,
    HelloReply,
    VerdictRequest,
    Work,
    compatible,
    own_version,
    refusal,
)
from shared.errors import (
    BudgetExceededError,
    LacunaError,
    LedgerError,
    MalformedMessageError,
    PeerError,
    ProtocolRefusedError,
    RefusedError,
)
from shared.home import write_private
from shared.identity import SigningKey
from shared.plan_package import PlanPackage
from shared.wire import Envelope, pack, unpack

log = logging.getLogger("lacuna.site")
events = logging.getLogger("lacuna.events.site")

MECHANISM_FILE = "mechanism-audit.dsse.json"
"""In the study's folder: this site's signed audit of its installation, where the plan asks for one."""


@dataclass(frozen=True, kw_only=True)
class AuditedCandidate:
    """What a site may say of its last audit: it depends on the candidate, public seeds, and coins of its own
    canaries alone."""

    attempt: int
    candidate_sha256: str
    planted_leak: PlantedLeak
    canaries: CanaryOpening | None = None


class Workbench(Protocol):
    """What computes on patients: scans, model and device. See :mod:`client.workbench`."""

    def training_vector(self, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        """One step's contribution in grid steps [d], noise share included."""

    def audit_vector(self, weights: NDArray[np.float32], *, attempt: int) -> NDArray[np.int64]:
        """The audit's counts [k], noise share included. Raw figures stay in the site's own files."""

    def last_audit(self) -> AuditedCandidate | None:
        """What the last audit was of, also after a restart."""


class RequestRefusedError(RefusedError):
    """The request is outside the approved plan. ``reason`` is what the other end is told."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SiteAgent:
    """Handles one request at a time for one study.

    Args:
        package: The plan package that this site approved.
        ledger: Open, exclusive.
        workbench: Computes on patients.
        entropy: Secret randomness of the protocol's keys.
        wall_clock: For the status file and the plan's last day (unix seconds).
    """

    def __init__(
        self,
        *,
        home: SiteHome,
        package: PlanPackage,
        key: SigningKey,
        ledger: Ledger,
        workbench: Workbench,
        entropy: SecretRandom,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan = package.plan
        self._site_id = home.site_id
        self._directory = home.study(self._plan.study_id)
        self._key = key
        self._ledger = ledger
        self._workbench = workbench
        self._execution = ExecutionPlan.from_study_plan(self._plan)
        self._counts_length = CountsLayout.from_plan(self._plan).length
        policy = home.policy()
        self._budget = Budget(epsilon=policy.max_total_epsilon, delta=policy.max_delta)
        if self._plan.privacy.mode == "unprotected":
            self._budget = Budget(epsilon=None, delta=policy.max_delta)
        self._clock = wall_clock
        self._lock = threading.Lock()
        self._secagg = SiteSecureAggregation(
            site_id=self._site_id,
            key=key,
            roster=tuple((s.site_id, s.verify_key) for s in self._plan.roster.sites),
            parameters=ProtocolParameters.from_plan(self._plan),
            study_digest=self._plan.digest().hex(),
            register_attempt=self._register_attempt,
            entropy=entropy,
            last_attempt=ledger.last_registered_attempt(self._plan.study_id) or 0,
        )
        self._continuity = LedgerContinuity(
            ledger,
            site_id=self._site_id,
            key=key,
            peers={entry.site_id: entry.verify_key for entry in self._plan.roster.sites},
        )
        self._say("serving", round=0)

    def handle(self, envelope: Envelope, peer: object = None) -> Envelope:
        """Answer one request; never raises."""
        with self._lock:
            return self._guarded(lambda: self._dispatch(envelope), envelope.kind)

    def _dispatch(self, envelope: Envelope) -> Envelope:
        if self._plan.expired(datetime.fromtimestamp(self._clock(), UTC).date()):
            raise RequestRefusedError("plan_expired", f"the plan expired on {self._plan.expires}")
        if envelope.kind == HELLO:
            return self._hello(Hello.from_envelope(envelope))
        if envelope.kind == EXCHANGE:
            return self._exchange(envelope)
        if envelope.kind == VERDICT_REQUEST:
            return self._verdict(VerdictRequest.from_envelope(envelope))
        raise RequestRefusedError("unknown_request", f"no request of kind {envelope.kind!r} is served")

    def _guarded(self, answer: Callable[[], Envelope], kind: str) -> Envelope:
        try:
            return answer()
        except Exception as error:
            reason, words = _what_to_tell(error)
            log.warning("refused %s: %s (%s)", kind, reason, error, exc_info=_unexpected(error))
            own = error.diagnostics() if isinstance(error, LedgerError | BudgetExceededError) else None
            self._say("refused", reason=reason, **({} if own is None else {"error": own}))
            return refusal(reason, words)

    # requests

    def _hello(self, hello: Hello) -> Envelope:
        if hello.plan_sha256 != self._plan.digest().hex():
            raise RequestRefusedError(
                "other_plan", "the request is for a plan that this site did not approve"
            )
        if not compatible(hello.version, own_version()):
            raise RequestRefusedError(
                "version_mismatch", f"this site has lacuna {own_version()}, the coordinator {hello.version}"
            )
        return HelloReply.sign(
            hello,
            site_id=self._site_id,
            last_attempt=self._ledger.last_registered_attempt(self._plan.study_id) or 0,
            version=own_version(),
            key=self._key,
        ).to_envelope()

    def _exchange(self, envelope: Envelope) -> Envelope:
        replies: list[Envelope] = []
        work: Work | None = None
        for part in unpack(envelope):
            if part.kind == WORK:
                try:
                    work = Work.from_envelope(part, dimension=self._plan.model.dimension)
                except LacunaError as error:
                    log.warning("refused work: %s", error)
                    work = None
                continue
            replies.append(self._guarded(partial(self._protocol, part, work), part.kind))
        return pack(EXCHANGE_REPLY, replies)

    def _protocol(self, part: Envelope, work: Work | None) -> Envelope:
        match part.kind:
            case AdvertiseRequest.KIND:
                request = AdvertiseRequest.from_envelope(part)
                affordable = partial(self._check_budget, request.attempt)
                return self._secagg.advertise(request, self._continuity.show, affordable).to_envelope()
            case ShareRequest.KIND:
                asked = ShareRequest.from_envelope(part)
                return self._secagg.share(asked, self._continuity.accept).to_envelope()
            case UploadRequest.KIND:
                return self._upload(UploadRequest.from_envelope(part), work)
            case ConfirmRequest.KIND:
                return self._secagg.confirm(ConfirmRequest.from_envelope(part)).to_envelope()
            case UnmaskRequest.KIND:
                return self._unmask(UnmaskRequest.from_envelope(part))
        raise RequestRefusedError("unknown_request", f"no part of kind {part.kind!r} is served")

    def _upload(self, request: UploadRequest, work: Work | None) -> Envelope:
        if work is None:
            raise RequestRefusedError("work_missing", "an upload was asked for without readable work")
        attempt = request.attempt
        if (work.attempt, work.round, work.purpose) != (attempt.attempt, attempt.round, attempt.purpose):
            raise RequestRefusedError("work_mismatch", "the work is for another attempt than the upload")
        self._check_plan_allows(work, attempt.vector_length)
        hashes = {"weights_hash": work.weights_hash(), "request_hash": work.request_hash()}
        self._secagg.check_upload(request, **hashes)
        self._ledger.reserve(
            self._charge(attempt), self._budget, max_attempts=self._max_attempts(attempt.purpose)
        )
        training = work.purpose == "train"
        self._say("training" if training else "auditing", round=work.round, attempt=work.attempt)
        if training:
            vector = self._workbench.training_vector(work.weights)
        else:
            vector = self._workbench.audit_vector(work.weights, attempt=work.attempt)
        reply = self._secagg.upload(request, vector, **hashes).to_envelope()
        if not training:
            part = AuditPart.of_upload(
                attempt=attempt.attempt, run_id=attempt.run_id, peers=request.peers, vector=vector
            )
            part.save(self._directory)
        self._say("uploaded", round=work.round, attempt=work.attempt)
        return reply

    def _unmask(self, request: UnmaskRequest) -> Envelope:
        reply = self._secagg.unmask(request).to_envelope()
        if request.attempt.purpose == "audit":
            part = AuditPart.load(self._directory)
            if part is not None and part.attempt == request.attempt.attempt:
                part.with_survivors(request.survivors).save(self._directory)
        return reply

    def _check_budget(self, attempt: AttemptId) -> None:
        """Refuse keys for an attempt that this site could not pay for: no peer computes in vain."""
        self._ledger.check_affordable(
            self._charge(attempt), self._budget, max_attempts=self._max_attempts(attempt.purpose)
        )

    def _charge(self, attempt: AttemptId) -> Charge:
        training = attempt.purpose == "train"
        return Charge(
            study_id=self._plan.study_id,
            plan_sha256=self._plan.digest().hex(),
            run_id=attempt.run_id,
            purpose=attempt.purpose,
            round=attempt.round,
            attempt=attempt.attempt,
            event=self._execution.training_event() if training else self._execution.audit_event(),
        )

    def _max_attempts(self, purpose: Purpose) -> int:
        privacy = self._plan.privacy
        return privacy.max_attempts if purpose == "train" else privacy.max_audit_attempts

    def _check_plan_allows(self, work: Work, vector_length: int) -> None:
        training = work.purpose == "train"
        if training and work.round > self._plan.privacy.rounds:
            raise RequestRefusedError(
                "round_outside_plan", f"the plan has {self._plan.privacy.rounds} rounds"
            )
        if vector_length != (self._plan.model.dimension if training else self._counts_length):
            raise RequestRefusedError("vector_outside_plan", "the vector's length is not the plan's")

    def _verdict(self, request: VerdictRequest) -> Envelope:
        audited = self._workbench.last_audit()
        if audited is None or (audited.attempt, audited.candidate_sha256) != (
            request.attempt,
            request.candidate_sha256,
        ):
            raise RequestRefusedError("candidate_not_audited", "this site did not audit that candidate")
        part = AuditPart.load(self._directory)
        if part is None or part.attempt != request.attempt:
            raise RequestRefusedError("candidate_not_audited", "this site put nothing into that audit")
        refused = part.refusal(
            run_id=request.run_id, survivors=request.survivors, pooled_counts=request.pooled_counts
        )
        if refused is not None:
            raise RequestRefusedError(*refused)
        try:
            statement = make_verdict_statement(
                self._plan,
                candidate_sha256=request.candidate_sha256,
                run_id=request.run_id,
                attempt=request.attempt,
                site_id=self._site_id,
                survivors=request.survivors,
                pooled_counts=request.pooled_counts,
                planted_leak=audited.planted_leak,
                veto=(self._directory / "veto").exists(),
            )
        except LacunaError as error:
            raise RequestRefusedError(
                "counts_outside_plan", "no verdict follows from these counts"
            ) from error
        part.with_signed(request.survivors, request.pooled_counts).save(self._directory)
        self._say("verdict signed", attempt=request.attempt)
        ledger = export_statement(self._ledger.entries(), self._ledger.head(), self._key)
        also = self._evidence_beside(audited)
        blobs = (sign_verdict(statement, self._key), ledger, *also.values())
        return Envelope(VERDICT_REPLY, {"site_id": self._site_id, "also": list(also)}, blobs)

    def _evidence_beside(self, audited: AuditedCandidate) -> dict[str, bytes]:
        """What the plan asks for beside the verdict (``SITE_EVIDENCE``); the gate says what is missing."""
        found = {}
        path = self._directory / MECHANISM_FILE
        if self._plan.audit.mechanism_canaries and path.exists():
            found["mechanism-audits"] = path.read_bytes()
        if self._plan.audit.canaries_per_site and audited.canaries is not None:
            found["canary-openings"] = sign_opening(audited.canaries, self._key)
        return found

    def _register_attempt(self, attempt: int) -> None:
        self._ledger.register_attempt(self._plan.study_id, attempt)

    def _say(self, state: str, **facts: Any) -> None:
        """Status for ``lacuna site status``: what the agent does, nothing about patients."""
        value = {"state": state, "at": self._clock(), **facts}
        events.info(state, extra={"facts": facts})
        try:
            write_private(self._directory / "status.json", json.dumps(value).encode(), durable=False)
        except OSError as error:
            log.warning("status cannot be written: %s", error.strerror)


def _what_to_tell(error: Exception) -> tuple[str, str]:
    """Reason and words for the other end; nothing in them comes from scans, paths or figures."""
    if isinstance(error, (ProtocolRefusedError, RequestRefusedError)):
        return error.reason, error.message
    if isinstance(error, MalformedMessageError):
        return "malformed", "the message does not parse"
    if isinstance(error, LedgerNotLinkedError):
        return (
            "ledger_not_linked",
            "another site's ledger is further than this site can follow in one attempt",
        )
    if isinstance(error, PeerError):
        return "peer_misbehaved", "what another site signed does not verify, or its ledger went back"
    if isinstance(error, RepeatedAttemptError):
        return "attempt_repeated", "this attempt was charged or registered before"
    if isinstance(error, BudgetExceededError):
        return "budget_exhausted", "the charge would pass this site's budget"
    if isinstance(error, LedgerError):
        return "ledger_unavailable", "this site's ledger is not available"
    return "site_error", "this site cannot serve the request; see its own log"


def _unexpected(error: Exception) -> bool:
    return not isinstance(error, LacunaError)


def log_to(path: Path) -> Callable[[], None]:
    """Write the agent's log to a private file, one line an event; what is returned ends that."""
    path.touch(mode=0o600, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def end() -> None:
        log.removeHandler(handler)
        handler.close()

    return end
