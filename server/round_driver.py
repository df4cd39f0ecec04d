"""The round driver: takes a study from its last checkpoint to signed verdicts, over any transport.

Steady state is two exchanges a round (DESIGN section 6, rule 6). Exchange A carries the weights and the
masked upload of attempt k, and the signed keys of attempt k + 1; exchange B carries the unmasking shares
of k and the encrypted shares of k + 1. Only where a site dropped does an exchange C come between them,
for the survivors' signatures. A first attempt, and any attempt after an abort, is set up by exchanges of
its own. The driver knows neither Flower nor gRPC: it runs over :class:`server.transport.Transport`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.audit.counts import CountsLayout
from privacy.audit.site_evidence import open_mechanism, open_opening
from privacy.audit.verdict_statement import VerdictMismatchError, open_verdict
from privacy.dp.execution_plan import check_plan
from privacy.ledger_chain import read_export
from privacy.ledger_continuity import ShownLedger
from server.attempt import Attempt, AttemptAbortedError, AttemptTask
from server.authority import CertificateAuthority
from server.exchange import Exchanger, Pace
from server.global_model import GlobalModel
from server.site_directory import SiteDirectory
from server.study_store import StudyStore
from server.transport import Transport
from shared.agent_messages import VERDICT_REPLY, VerdictRequest
from shared.canonical import canonical_json, parse_json
from shared.errors import CoordinatorError, LacunaError, MalformedMessageError, PeerError
from shared.home import write_private
from shared.identity import VerifyKey
from shared.model.candidate import load_prior, write_candidate
from shared.model.denoiser import flatten
from shared.study_plan import SITE_EVIDENCE
from shared.wire import Envelope

_OPENERS: dict[str, Callable[[bytes, VerifyKey, str], object]] = {
    "mechanism-audits": lambda data, key, site: open_mechanism(
        data, key=key, what=f"mechanism audit of {site}"
    ),
    "canary-openings": lambda data, key, site: open_opening(data, key=key, what=f"canary opening of {site}"),
}


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """How a run ended: rounds completed in all, and the sites whose verdicts are at hand."""

    rounds: int
    verdicts: tuple[str, ...]


class RoundDriver:
    """Drives one study in one Flower run.

    Args:
        transport: Where the sites are.
        store: The study's durable state; completed rounds are never run again.
        run_id: Of the Flower run; everything that is signed is bound to it.
    """

    def __init__(
        self,
        transport: Transport,
        store: StudyStore,
        *,
        run_id: str,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._store = store
        self._run_id = run_id
        self._pace = pace or Pace()
        self._clock = clock
        self._package = store.package()
        self._plan = self._package.plan
        check_plan(self._plan)
        self._directory = SiteDirectory(self._plan, transport, run_id=run_id)
        needed = self._plan.secure_aggregation.threshold
        self._exchanger = Exchanger(transport, self._directory, self._pace, needed=needed, clock=clock)
        self._model = self._load_model()

    @property
    def model(self) -> GlobalModel:
        return self._model

    def run(self) -> StudyOutcome:
        """Run all that is left of the study.

        Raises:
            CoordinatorError: fewer sites than the threshold answered for too long.
        """
        self._store.void_leftovers()
        self._event("run_started", run_id=self._run_id, round=self._model.round)
        prepared: Attempt | None = None
        while (task := self._next_task(ahead=0)) is not None:
            if prepared is None:
                prepared = self._set_up(task)
            following = self._next_task(ahead=1)
            self._leave_out_revoked_sites()
            self._look_for_missing_sites()
            attempt, prepared = prepared, None
            attempt.task.weights = self._weights_for(task)
            try:
                prepared = attempt.perform(following)
            except AttemptAbortedError as error:
                self._store.abort_attempt(attempt.number, error.message)
                self._event(
                    "attempt_aborted",
                    attempt=attempt.number,
                    round=task.round,
                    purpose=task.purpose,
                    reason=error.message,
                    lost=error.lost,
                )
                continue
            self._finish(attempt)
        verdicts = self._collect_verdicts()
        self._event("run_finished", round=self._model.round, verdicts=list(verdicts))
        return StudyOutcome(rounds=self._model.round, verdicts=verdicts)

    def _look_for_missing_sites(self) -> None:
        """Without waiting: a site that is back is invited to the attempt after the one that opens now."""
        self._directory.collect(clock=self._clock)
        if self._directory.missing():
            self._directory.probe(timeout_s=self._pace.hello_s, clock=self._clock)

    def _leave_out_revoked_sites(self) -> None:
        """What the coordinator revoked takes part in nothing any more; read anew before every attempt."""
        revoked = CertificateAuthority(self._store.root.parent).revoked_identities()
        for site in self._directory.exclude(revoked):
            self._event("site_revoked", site=site)

    # what comes next

    def _next_task(self, *, ahead: int) -> AttemptTask | None:
        """The attempt to make now (``ahead`` 0), or the one after it if that completes (1)."""
        privacy = self._plan.privacy
        charged = self._store.charged_attempts("train") + ahead
        round_number = self._model.round + 1 + ahead
        if round_number <= privacy.rounds and charged < privacy.max_attempts:
            return AttemptTask(round=round_number, purpose="train", vector_length=self._plan.model.dimension)
        if ahead:
            current = self._next_task(ahead=0)
            if current is None or current.purpose == "audit":
                return None
        if self._audit_completed() or self._store.charged_attempts("audit") >= privacy.max_audit_attempts:
            return None
        length = CountsLayout.from_plan(self._plan).length
        return AttemptTask(round=privacy.rounds + 1, purpose="audit", vector_length=length)

    def _audit_completed(self) -> bool:
        return any(record.status == "completed" for record in self._store.attempts("audit"))

    def _weights_for(self, task: AttemptTask) -> NDArray[np.float32]:
        return self._model.weights if task.purpose == "train" else self._model.ema

    # attempts

    def _set_up(self, task: AttemptTask) -> Attempt:
        """Wait for a quorum, then deliver keys and shares of a fresh attempt."""
        threshold = self._plan.secure_aggregation.threshold
        deadline = self._clock() + self._pace.quorum_s
        waiting_said = False
        failures, lost = 0, dict[str, str]()
        while True:
            self._leave_out_revoked_sites()
            self._directory.drop_lost_nodes()
            if self._directory.missing():
                self._directory.search(
                    timeout_s=self._pace.hello_s, poll_s=self._pace.poll_s, clock=self._clock
                )
            reachable = self._directory.reachable
            if len(reachable) >= threshold:
                attempt = self._new_attempt(task)
                try:
                    attempt.set_up(reachable)
                    return attempt
                except AttemptAbortedError as error:
                    failures, lost = failures + 1, lost | error.lost
                    self._store.void_attempt(attempt.number)
                    self._event(
                        "set_up_failed", attempt=attempt.number, reason=error.message, lost=error.lost
                    )
            elif not waiting_said:
                waiting_said = True
                missing = list(self._directory.missing())
                self._event(
                    "waiting_for_sites", missing=missing, other_versions=self._directory.other_versions
                )
            if self._clock() >= deadline:
                raise self._no_attempt(task, lost)
            # Every set-up that fails costs an entry in the ledgers of the sites that did answer.
            time.sleep(self._pace.poll_s * 2 ** min(failures, 6))

    def _no_attempt(self, task: AttemptTask, lost: Mapping[str, str]) -> CoordinatorError:
        """Why the study stops: who is missing, and who refuses for which reason."""
        reachable, threshold = len(self._directory.reachable), self._plan.secure_aggregation.threshold
        within = f"within {self._pace.quorum_s:g} s"
        rest = (
            f"missing: {', '.join(self._directory.missing()) or 'none'}; {self._model.round} of "
            f"{self._plan.privacy.rounds} rounds are completed and kept"
        )
        if not lost or reachable < threshold:
            return CoordinatorError(
                f"only {reachable} of the {threshold} sites needed answered {within}; {rest}",
                remedy="see that site agents and SuperNodes run, then lacuna coordinator resume",
            )
        refusals = ", ".join(f"{site}: {reason}" for site, reason in sorted(lost.items()))
        return CoordinatorError(
            f"no attempt of round {task.round} ({task.purpose}) could be prepared {within}; {threshold} "
            f"sites are needed, and there are refusals: {refusals}; {rest}",
            remedy="the sites that are named look at lacuna site status and at their own logs; when that is "
            "mended, lacuna coordinator resume",
        )

    def _new_attempt(self, task: AttemptTask) -> Attempt:
        number = self._store.prepare_attempt(
            run_id=self._run_id,
            round_number=task.round,
            purpose=task.purpose,
            above=self._directory.last_attempt,
        )
        return Attempt(
            plan=self._plan,
            run_id=self._run_id,
            number=number,
            task=task,
            exchanger=self._exchanger,
            directory=self._directory,
            new_attempt=self._new_attempt,
            on_open=self._opened,
            on_void=self._store.void_attempt,
            on_event=self._event,
        )

    def _opened(self, attempt: Attempt) -> None:
        self._store.open_attempt(attempt.number, attempt.participants)
        self._event(
            "attempt_opened",
            attempt=attempt.number,
            round=attempt.task.round,
            purpose=attempt.task.purpose,
            participants=list(attempt.participants),
        )

    def _finish(self, attempt: Attempt) -> None:
        survivors = attempt.survivors
        if attempt.task.purpose == "train":
            self._model.apply(attempt.take_total(), n_survivors=len(survivors))
            metadata = {"attempt": str(attempt.number), "survivors": ",".join(survivors)}
            self._model.save(self._store.checkpoint_path(self._model.round), metadata)
        else:
            self._write_candidate()
            record = {
                "attempt": attempt.number,
                "run_id": self._run_id,
                "survivors": list(survivors),
                "pooled_counts": [int(count) for count in attempt.take_total()],
            }
            self._write_json("audit.json", record)
        self._keep_receipts(attempt)
        self._store.complete_attempt(attempt.number, survivors)
        self._event(
            "round_completed" if attempt.task.purpose == "train" else "audit_completed",
            attempt=attempt.number,
            round=attempt.task.round,
            survivors=list(survivors),
        )

    def _keep_receipts(self, attempt: Attempt) -> None:
        """The longest signed ledger head of each site, for whoever checks ledgers later.

        Never replaced by a shorter one: that is how an old copy shows.
        """
        heads = (self._read_json("receipts.json") or {"heads": {}})["heads"]
        for site, shown in attempt.ledger_heads.items():
            try:
                head = ShownLedger.from_dict(shown).head
                head.verify(self._plan.site(site).verify_key)
            except PeerError as error:
                self._event("receipt_refused", site=site, reason=error.message)
                continue
            if site not in heads or head.length > heads[site]["length"]:
                heads[site] = head.to_dict()
        self._write_json("receipts.json", {"heads": heads})

    # model and verdicts

    def _load_model(self) -> GlobalModel:
        completed = self._store.completed_rounds()
        if completed:
            return GlobalModel.restore(self._plan, self._store.checkpoint_path(completed))
        _, parameters = load_prior(self._plan, self._package.prior)
        return GlobalModel(self._plan, flatten(parameters))

    def _write_candidate(self) -> str:
        return write_candidate(
            self._plan, self._package.prior, self._model.ema.copy(), self._store.candidate_path
        )

    def _collect_verdicts(self) -> tuple[str, ...]:
        """Ask every reachable site for its signed verdict and ledger; keep what verifies."""
        record = self._read_json("audit.json")
        if record is None:
            self._event("no_audit", reason="no audit attempt completed")
            return ()
        request = VerdictRequest(
            attempt=record["attempt"],
            run_id=record["run_id"],
            candidate_sha256=self._write_candidate(),
            survivors=tuple(record["survivors"]),
            pooled_counts=tuple(record["pooled_counts"]),
        )
        deadline = self._clock() + self._pace.quorum_s
        wanted = {entry.site_id for entry in self._plan.roster.sites}
        while missing := wanted - self._sites_with_verdict():
            self._directory.drop_lost_nodes()
            if self._directory.missing():
                self._directory.search(
                    timeout_s=self._pace.hello_s, poll_s=self._pace.poll_s, clock=self._clock
                )
            asked = {site: request.to_envelope() for site in self._directory.reachable if site in missing}
            if asked:
                lost = self._exchanger.send(asked, on_reply=partial(self._keep_verdict, request))
                if lost:
                    self._event("verdicts_missing", lost=lost)
            if self._sites_with_verdict() >= set(request.survivors) or self._clock() >= deadline:
                break
            time.sleep(self._pace.poll_s)
        return tuple(sorted(self._sites_with_verdict()))

    def _keep_verdict(self, request: VerdictRequest, site_id: str, reply: Envelope) -> None:
        """Keep a site's verdict and ledger, if they are about what was asked for and hold by themselves.

        Raises:
            MalformedMessageError, PeerError: something else; the gate could do nothing with it.
        """
        also = reply.body.get("also")
        if (
            reply.kind != VERDICT_REPLY
            or not isinstance(also, list)
            or also != [kind for kind in SITE_EVIDENCE if kind in also]
            or len(reply.blobs) != 2 + len(also)
        ):
            raise MalformedMessageError(f"{site_id} answered with a {reply.kind!r} in place of a verdict")
        key = self._plan.site(site_id).verify_key
        verdict, ledger, *beside = (bytes(blob) for blob in reply.blobs)
        statement = open_verdict(verdict, key=key, what=f"verdict of {site_id}")
        statement.check(self._plan)
        asked = (site_id, request.candidate_sha256, request.run_id, request.attempt)
        given = (statement.site_id, statement.candidate_sha256, statement.run_id, statement.attempt)
        if given != asked or (statement.survivors, statement.pooled_counts) != (
            request.survivors,
            request.pooled_counts,
        ):
            raise VerdictMismatchError(f"the verdict of {site_id} is not about the audit that was asked for")
        read_export(ledger, key, what=f"ledger of {site_id}")
        for kind, data in zip(also, beside, strict=True):
            _OPENERS[kind](data, key, site_id)
        # The verdict is written last: a site with one is not asked again.
        for folder, data in (*zip(also, beside, strict=True), ("ledgers", ledger), ("verdicts", verdict)):
            path = self._store.evidence / folder / f"{site_id}.dsse.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_private(path, data)
        self._event("verdict_received", site=site_id)

    def _sites_with_verdict(self) -> set[str]:
        return {
            path.name.removesuffix(".dsse.json")
            for path in (self._store.evidence / "verdicts").glob("*.dsse.json")
        }

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        self._store.evidence.mkdir(parents=True, exist_ok=True)
        write_private(self._store.evidence / name, canonical_json(value))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self._store.evidence / name
        if not path.exists():
            return None
        value = parse_json(path.read_bytes(), what=str(path))
        if not isinstance(value, dict):
            raise CoordinatorError(f"{path} is damaged")
        return value

    def _event(self, kind: str, **body: Any) -> None:
        self._store.record_event(kind, **body)


def run_study(
    transport: Transport, *, study_home: str, run_id: str, pace: Pace | None = None
) -> StudyOutcome:
    """What the ServerApp calls: drive the study in ``study_home`` over a transport."""
    store = StudyStore(Path(study_home))
    try:
        with store.exclusively():
            return RoundDriver(transport, store, run_id=run_id, pace=pace).run()
    except Exception as error:
        with suppress(LacunaError):
            store.record_event("run_failed", reason=str(error)[:500])
        raise
    finally:
        store.close()
