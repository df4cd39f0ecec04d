"""Putting an agent together for ``lacuna site serve``: ledger, workbench, protocol, listener."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from client.agent_service import AgentServer, MutualTls
from client.patient_dataset import SiteStore
from client.reservations import check_room
from client.site_agent import MECHANISM_FILE, SiteAgent, log_to
from client.site_home import SiteHome
from privacy.dp.execution_plan import check_plan
from privacy.ledger import Ledger
from privacy.secret_random import SecretRandom
from shared.errors import LedgerError, SiteError, UsageError
from shared.structured_log import log_events_to

COMMITMENT = "site-key-commitment"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where to listen and what to compute on. ``tls`` is (host:port, certificate, key, authority).

    ``gradients``, ``microbatch``, ``draws_per_pass`` and ``bfloat16`` are
    :class:`privacy.dp.patient_gradients.Performance` by names that need no torch.
    """

    socket_path: Path
    group: str | None = None
    allowed_uids: frozenset[int] = frozenset()
    tls: tuple[str, Path, Path, Path] | None = None
    device: str = "cpu"
    threads: int | None = None
    gradients: str = "engine"
    microbatch: int | None = None
    draws_per_pass: int | None = None
    bfloat16: bool = False


class ServingAgent:
    """A running agent. Leaving the context stops it and closes its ledger."""

    def __init__(self, resources: ExitStack, address: str, ledger: Ledger) -> None:
        self._resources = resources
        self._ledger = ledger
        self.address = address

    def check_storage(self) -> None:
        """For whoever keeps it running: an agent whose ledger's disk failed serves nothing more until it is
        started again, which a service manager does. One whose ledger others contradict stays as it is.

        Raises:
            LedgerError: the disk failed.
        """
        if self._ledger.storage_failed:
            raise LedgerError(
                "the ledger could not be written, so nothing more is served; the study's agent.log says why",
                remedy="make room on the disk, then start the site agent again (the service unit does)",
            )

    def __enter__(self) -> ServingAgent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()


def open_ledger(home: SiteHome) -> Ledger:
    """The site's ledger, as ``lacuna site init`` made it; never begun again. Raises LedgerError."""
    if not home.ledger_path.exists():
        raise LedgerError(
            f"the ledger {home.ledger_path} is missing: what this site has spent is not known",
            remedy="restore the newest copy of the ledger; without it, retire this site's key and budget",
        )
    return Ledger.open(home.ledger_path, key=home.identity(), counter_path=home.counter_path)


def serve_study(
    home: SiteHome,
    study_id: str,
    options: ServeOptions,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> ServingAgent:
    """Check everything, load scans and networks, and start to listen.

    Raises:
        LacunaError: the plan breaks the policy or cannot keep its promise, the ledger is in use or damaged,
            or has no room for the attempts that the plan has left, scans are missing, the address cannot be
            served.
    """
    package = home.approved_plan(study_id)
    home.policy().check(package.plan, own_site=home.site_id, own_key=home.identity().verify_key)
    execution = check_plan(package.plan)
    with ExitStack() as resources:
        resources.callback(log_to(home.study(study_id) / "agent.log"))
        resources.callback(log_events_to(home.study(study_id) / "agent.jsonl"))
        ledger = resources.enter_context(open_ledger(home))
        check_room(package.plan, policy=home.policy(), entries=ledger.entries())
        _commit_to_site_key(home, study_id, ledger)
        from client.canaries import CanaryCoins, commit_to_canaries
        from client.mechanism_audit import audit_for_plan
        from client.workbench import SiteWorkbench, performance, set_threads
        from privacy.dp.second_accountant import check_planned_epsilon

        set_threads(options.threads)
        check_planned_epsilon(execution)
        audit_for_plan(
            package,
            site_id=home.site_id,
            key=home.identity(),
            path=home.study(study_id) / MECHANISM_FILE,
            device=options.device,
            progress=progress,
        )
        store = SiteStore.open(home.store_path(study_id))
        commit_to_canaries(CanaryCoins.of_store(store, package.plan, site_id=home.site_id), ledger)
        workbench = SiteWorkbench(
            home=home,
            package=package,
            secret=SecretRandom(),
            device=options.device,
            progress=progress,
            performance=performance(
                options.gradients,
                microbatch=options.microbatch,
                draws_per_pass=options.draws_per_pass,
                bfloat16=options.bfloat16,
            ),
        )
        agent = SiteAgent(
            home=home,
            package=package,
            key=home.identity(),
            ledger=ledger,
            workbench=workbench,
            entropy=SecretRandom(),
        )
        server = AgentServer(agent.handle)
        if options.tls is None:
            # The agent's own user may ask how it is.
            uids = options.allowed_uids | {os.geteuid()}
            server.listen_unix(options.socket_path, allowed_uids=uids, group=options.group)
            address = str(options.socket_path)
        else:
            host, _, port = options.tls[0].rpartition(":")
            if not port.isdigit():
                raise UsageError(f"--listen takes HOST:PORT, not {options.tls[0]!r}")
            _, certificate, key, authority = options.tls
            bound = server.listen_tls(
                host, int(port), MutualTls(certificate=certificate, key=key, client_authority=authority)
            )
            address = f"{host}:{bound}"
        resources.enter_context(server)
        return ServingAgent(resources.pop_all(), address, ledger)


def _commit_to_site_key(home: SiteHome, study_id: str, ledger: Ledger) -> None:
    """Record, before round 1, the commitment to the key that decides who is held out."""
    commitment = SiteStore.open(home.store_path(study_id)).key_commitment
    recorded = [
        entry.body["details"].get("commitment")
        for entry in ledger.entries()
        if entry.kind == COMMITMENT and entry.body["details"].get("study_id") == study_id
    ]
    if not recorded:
        ledger.record(COMMITMENT, {"study_id": study_id, "commitment": commitment})
    elif recorded[0] != commitment:
        raise SiteError(
            f"the store of study {study_id!r} has another key than the ledger committed to",
            remedy="put the study's first store back: who is held out must not change during a study",
        )
