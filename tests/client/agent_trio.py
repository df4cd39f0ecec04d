"""Three real site agents with real ledgers and keys, driven message by message. No networks, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_plan import Keys, small_plan

from client.serving import open_ledger
from client.site_agent import AuditedCandidate, SiteAgent
from client.site_home import SiteHome, init_site
from privacy.audit.counts import CountsLayout
from privacy.audit.verdict import PlantedLeak
from privacy.ledger import Ledger
from privacy.ledger_chain import CHARGE
from privacy.secagg.reasons import Component
from privacy.secagg.server_rounds import ServerAttempt
from privacy.secagg.session import AttemptId
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secret_random import SecretRandom
from shared.agent_messages import EXCHANGE, REFUSED, Work
from shared.errors import ProtocolRefusedError
from shared.plan_package import PlanPackage
from shared.wire import Envelope, pack, unpack

PLANTED = PlantedLeak(auc=0.9, n_planted=16, n_fresh=16)


class WatchedWorkbench:
    """Calls ``watch`` before it answers; computes ``1 << position`` in each coordinate."""

    def __init__(self, counts_length: int, position: int) -> None:
        self._counts_length = counts_length
        self._value = 1 << position
        self.calls: list[str] = []
        self.watch: Callable[[], None] = lambda: None
        self.audited: AuditedCandidate | None = None

    def training_vector(self, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        self.calls.append("train")
        self.watch()
        return np.full(len(weights), self._value, dtype=np.int64)

    def audit_vector(self, weights: NDArray[np.float32], *, attempt: int) -> NDArray[np.int64]:
        self.calls.append("audit")
        self.watch()
        self.audited = AuditedCandidate(attempt=attempt, candidate_sha256="c" * 64, planted_leak=PLANTED)
        return np.full(self._counts_length, self._value, dtype=np.int64)

    def last_audit(self) -> AuditedCandidate | None:
        return self.audited


class Trio:
    """Homes, agents and ledgers of site-0, site-1 and site-2; the test plays the coordinator."""

    def __init__(self, root: Path, **changes: Any) -> None:
        os.environ["LACUNA_COUNTER_DIR"] = str(root / "counters")
        self.homes = [SiteHome(root / f"h{i}") for i in range(3)]
        for i, home in enumerate(self.homes):
            init_site(home, name=f"site-{i}")
        self.keys = Keys([home.identity() for home in self.homes])
        self.plan = small_plan(self.keys, **changes)
        self.package = PlanPackage(root=root / "plan", plan=self.plan, envelope=b"")
        self.length = CountsLayout.from_plan(self.plan).length
        self.benches = [WatchedWorkbench(self.length, i) for i in range(3)]
        self.ledgers: list[Ledger] = []
        self.agents = [self.start(i) for i in range(3)]
        self.weights = np.linspace(-1, 1, self.plan.model.dimension, dtype=np.float32)
        self.last = 0

    def start(self, i: int) -> SiteAgent:
        home = self.homes[i]
        home.study(self.plan.study_id).mkdir(exist_ok=True, mode=0o700)
        ledger = open_ledger(home)
        self.ledgers[i : i + 1] = [ledger]
        return SiteAgent(
            home=home,
            package=self.package,
            key=home.identity(),
            ledger=ledger,
            workbench=self.benches[i],
            entropy=SecretRandom(),
        )

    def restart(self, i: int) -> None:
        self.ledgers[i].close()
        self.agents[i] = self.start(i)

    def close(self) -> None:
        for ledger in self.ledgers:
            ledger.close()

    def charges(self, i: int = 0) -> list[tuple[str, int]]:
        return [
            (entry.body["purpose"], entry.body["attempt"])
            for entry in self.ledgers[i].entries()
            if entry.kind == CHARGE
        ]

    def status(self, i: int = 0) -> dict[str, Any]:
        value = json.loads((self.homes[i].study(self.plan.study_id) / "status.json").read_bytes())
        assert isinstance(value, dict)
        return value

    # playing the coordinator

    def ask(self, i: int, *parts: Envelope) -> list[Envelope]:
        """One exchange with one agent; the replies' parts."""
        return unpack(self.agents[i].handle(pack(EXCHANGE, parts)))

    def set_up(
        self, *, purpose: Any = "train", round_number: int = 1, vector_length: int | None = None
    ) -> ServerAttempt:
        """Keys and shares of a fresh attempt, delivered to all three."""
        server = self.new_attempt(purpose=purpose, round_number=round_number, vector_length=vector_length)
        for requests in (server.build_advertise_requests, server.build_share_requests):
            for site, request in requests().items():
                (reply,) = self.ask(int(site[-1]), request.to_envelope())
                if reply.kind == REFUSED:
                    raise ProtocolRefusedError(reply.body["reason"], f"{site} refused")
                server.accept(site, reply)
        return server

    def new_attempt(self, **changes: Any) -> ServerAttempt:
        """The coordinator's side of a fresh attempt."""
        self.last += 1
        return ServerAttempt(
            self.attempt_id(**changes),
            roster=tuple((s.site_id, s.verify_key) for s in self.plan.roster.sites),
            parameters=ProtocolParameters.from_plan(self.plan),
            invited=tuple(s.site_id for s in self.plan.roster.sites),
        )

    def attempt_id(
        self, *, purpose: Any = "train", round_number: int = 1, vector_length: int | None = None
    ) -> AttemptId:
        default = self.plan.model.dimension if purpose == "train" else self.length
        return AttemptId(
            study_digest=self.plan.digest().hex(),
            run_id="1",
            round=round_number,
            attempt=self.last,
            purpose=purpose,
            vector_length=vector_length or default,
        )

    def keys_and_shares(self) -> tuple[ServerAttempt, dict[int, Envelope]]:
        """A fresh attempt up to what each site answers when it is asked for shares; refusals included.

        A site that gives no keys answers with that refusal.
        """
        server = self.new_attempt()
        answers = {}
        for site, request in server.build_advertise_requests().items():
            (answers[int(site[-1])],) = self.ask(int(site[-1]), request.to_envelope())
            if answers[int(site[-1])].kind != REFUSED:
                server.accept(site, answers[int(site[-1])])
        if len(server.answered(Component.ADVERTISE)) == 3:
            for site, share_request in server.build_share_requests().items():
                (answers[int(site[-1])],) = self.ask(int(site[-1]), share_request.to_envelope())
        return server, answers

    def uploads(self, server: ServerAttempt, work: Work | None = None) -> dict[int, list[Envelope]]:
        """For each site its work and its upload request, as an honest coordinator would send them."""
        work = work or self.work(server)
        requests = server.build_upload_requests(
            weights_hash=work.weights_hash(), request_hash=work.request_hash()
        )
        return {
            int(site[-1]): [work.to_envelope(), request.to_envelope()] for site, request in requests.items()
        }

    def work(self, server: ServerAttempt, **changes: Any) -> Work:
        attempt = server.attempt
        fields: dict[str, Any] = {
            "attempt": attempt.attempt,
            "round": attempt.round,
            "purpose": attempt.purpose,
            "weights": self.weights,
        }
        return Work(**{**fields, **changes})

    def complete(self, **options: Any) -> tuple[ServerAttempt, NDArray[np.int64]]:
        """A whole attempt; its unmasked total."""
        server = self.set_up(**options)
        for i, parts in self.uploads(server).items():
            (reply,) = self.ask(i, *parts)
            server.accept(f"site-{i}", reply)
        server.close_uploads()
        for site, request in server.build_unmask_requests().items():
            (reply,) = self.ask(int(site[-1]), request.to_envelope())
            server.accept(site, reply)
        return server, server.total()
