"""A study in the steady state of two exchanges a round, one of whose sites dies and comes back.

The test plays the coordinator. It notes what left the dying site: an attempt counts as sent as soon as one
byte of the answer with its upload was received.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
from agent_trio import Trio
from crash_agent import serve
from crash_points import CrashPoints

from client import agent_link
from client.agent_link import METHOD, UnixAddress
from privacy.dp.accounting import epsilon
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import read_ledger
from privacy.ledger_chain import ATTEMPT, CHARGE, spent
from privacy.secagg.message_fields import write_attempt
from privacy.secagg.messages import AdvertiseReply, AdvertiseRequest, ShareReply, UploadReply
from privacy.secagg.server_rounds import ServerAttempt
from shared.agent_messages import EXCHANGE, REFUSED
from shared.errors import MalformedMessageError
from shared.wire import Envelope, decode, encode, pack, unpack

ROUNDS = 2
SET_UP = (AdvertiseReply.KIND, ShareReply.KIND)


AGENT = Path(__file__).parent / "crash_agent.py"
FOLDERS = (AGENT.parents[2], AGENT.parents[1], AGENT.parents[0])
"""What the agent's process imports from: the repository, the tests, and these tests."""


class SiteDiedError(Exception):
    """Site 0 is gone in the middle of an exchange. ``bytes_came``: part of its answer was received."""

    def __init__(self, *, bytes_came: bool) -> None:
        super().__init__("site-0 died")
        self.bytes_came = bytes_came


class CrashStudy(Trio):
    """Rounds 1 and 2, then the audit; attempts that a death spoils are tried again while the plan allows."""

    def __init__(self, root: Path, **changes: Any) -> None:
        super().__init__(root, **changes)
        self.sent: dict[int, str] = {}
        """Attempt and purpose of each upload of site 0 of which at least a byte left."""
        self.keys_left: set[int] = set()
        self.uploads_asked: list[list[Envelope]] = []
        self.deaths: list[tuple[int, int]] = []
        """(round, attempt) at which site 0 died."""
        self.finished = False

    def revive(self) -> None:
        """Start site 0 again, from its files alone."""
        raise NotImplementedError

    def deliver(self, parts: list[Envelope]) -> list[Envelope]:
        """One exchange with site 0. Raises SiteDiedError."""
        raise NotImplementedError

    def ask(self, i: int, *parts: Envelope) -> list[Envelope]:
        if i:
            return super().ask(i, *parts)
        asked = {part.body["attempt"]["attempt"]: part for part in parts if part.kind == "secagg_upload"}
        if asked:
            self.uploads_asked.append(list(parts))
        try:
            replies = self.deliver(list(parts))
        except SiteDiedError as death:
            if death.bytes_came:
                self.sent |= {number: part.body["attempt"]["purpose"] for number, part in asked.items()}
                self.keys_left |= {
                    part.body["attempt"]["attempt"] for part in parts if part.kind == AdvertiseRequest.KIND
                }
            raise
        for reply in replies:
            if reply.kind == UploadReply.KIND:
                number = reply.body["attempt"]["attempt"]
                self.sent[number] = reply.body["attempt"]["purpose"]
            elif reply.kind == AdvertiseReply.KIND:
                self.keys_left.add(reply.body["attempt"]["attempt"])
        return replies

    def run(self) -> None:
        """To the end of the study, or until no attempt is left."""
        done, audited = 0, False
        prepared: ServerAttempt | None = None
        failures = 0
        privacy = self.plan.privacy
        left = {"train": privacy.max_attempts, "audit": privacy.max_audit_attempts}
        while failures < 6 and not audited:
            task = self._task(done)
            if not left[task["purpose"]]:
                return
            try:
                attempt = prepared or self.set_up(**task)
                left[task["purpose"]] -= 1  # the others upload first, and are charged whatever becomes of it
                prepared = self._pair(attempt, done)
            except SiteDiedError:
                self.deaths.append((done + 1, self.last))
                failures += 1
                prepared = None
                self.revive()
                continue
            audited = attempt.attempt.purpose == "audit"
            done += not audited
        self.finished = audited

    def attempt_fields(self) -> dict[str, Any]:
        """An attempt of this study as a message has it."""
        return write_attempt(self.attempt_id())

    def _task(self, done: int) -> dict[str, Any]:
        return {"purpose": "train" if done < ROUNDS else "audit", "round_number": done + 1}

    def _pair(self, attempt: ServerAttempt, done: int) -> ServerAttempt | None:
        """Exchanges A and B of one round, with the keys and shares of the next attempt riding along."""
        following = None if done == ROUNDS else self.new_attempt(**self._task(done + 1))
        parts = self.uploads(attempt)
        if following is not None:
            for site, request in following.build_advertise_requests().items():
                parts[int(site[-1])].append(request.to_envelope())
        self._exchange(parts, attempt, following)
        attempt.close_uploads()
        parts = {
            int(site[-1]): [request.to_envelope()]
            for site, request in attempt.build_unmask_requests().items()
        }
        if following is not None:
            for site, share_request in following.build_share_requests().items():
                parts[int(site[-1])].append(share_request.to_envelope())
        self._exchange(parts, attempt, following)
        assert attempt.total().tolist() == [7] * attempt.attempt.vector_length
        return following

    def _exchange(
        self, parts: dict[int, list[Envelope]], attempt: ServerAttempt, following: ServerAttempt | None
    ) -> None:
        for i in (1, 2, 0):
            for reply in self.ask(i, *parts[i]):
                assert reply.kind != REFUSED, reply.body
                target = following if following is not None and reply.kind in SET_UP else attempt
                target.accept(f"site-{i}", reply)


class _Death(BaseException):
    """Not an Exception: the agent must not turn it into an answer."""


class InProcessStudy(CrashStudy):
    """Site 0 dies at a snapshot of its files, by an exception that nothing catches; they are put back.

    Args:
        root: Folder of all sites.
        points: Installed already.
    """

    def __init__(self, root: Path, points: CrashPoints) -> None:
        self.points = points
        self.points.die = self._die
        self._snapshot = root / "snapshot"
        super().__init__(root)

    def deliver(self, parts: list[Envelope]) -> list[Envelope]:
        bytes_came = False
        try:
            with self.points.watching():
                reply = self.agents[0].handle(pack(EXCHANGE, parts))
                self.points.reach("before-answer")
                bytes_came = True
                self.points.reach("mid-answer")
                self.points.reach("after-answer")
        except _Death as death:
            raise SiteDiedError(bytes_came=bytes_came) from death
        return unpack(reply)

    def _die(self) -> None:
        home = self.homes[0]
        shutil.rmtree(self._snapshot, ignore_errors=True)
        shutil.copytree(home.root, self._snapshot / "home")
        shutil.copy(home.counter_path, self._snapshot / "counter")
        raise _Death

    def revive(self) -> None:
        home = self.homes[0]
        self.ledgers[0].close()
        shutil.rmtree(home.root)
        shutil.copytree(self._snapshot / "home", home.root)
        shutil.copy(self._snapshot / "counter", home.counter_path)
        self.agents[0] = self.start(0)


class AgentProcesses:
    """Starts site agents as processes of their own, and ends those that are left.

    They are forked from a process that has the agent's modules and nothing else: importing them anew takes
    seconds, the agent milliseconds.
    """

    def __init__(self) -> None:
        self.running: list[BaseProcess] = []
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([AGENT.stem])

    def start(self, **order: Any) -> BaseProcess:
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (*FOLDERS, *sys.path)))):
            process = self._context.Process(target=serve, args=(order,))
            process.start()
        self.running.append(process)
        return process

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.join()


class ProcessStudy(CrashStudy):
    """Site 0 is a process of its own behind gRPC on a unix socket, and dies of SIGKILL or of ``os._exit``.

    Args:
        root: Folder of all sites; short, since a socket lies in it.
        processes: Where site 0 is started.
        point, passage: Where it dies; None: it does not.
        how: ``kill`` or ``exit``.
        counters: LACUNA_COUNTER_DIR of site 0.
        late: Broken on purpose: it charges when its answer has left.
    """

    def __init__(
        self,
        root: Path,
        processes: AgentProcesses,
        *,
        point: str | None = None,
        passage: int = 1,
        how: str = "kill",
        late: bool = False,
        counters: str,
    ) -> None:
        self._processes = processes
        self._address = UnixAddress(path=root / "s")
        super().__init__(root)
        self.ledgers[0].close()
        self._order = {
            "how": how,
            "late": late,
            "counters": counters,
            "plan": self.plan.model_dump(mode="json"),
            "home": str(self.homes[0].root),
            "socket": str(self._address.path),
        }
        self._process = processes.start(**self._order, point=point, passage=passage)
        self.exit_codes: list[int] = []

    def deliver(self, parts: list[Envelope]) -> list[Envelope]:
        received = bytearray()
        self._until_it_listens()
        try:
            with agent_link._channel(self._address) as channel:
                frame = encode(pack(EXCHANGE, parts))
                for chunk in channel.stream_stream(METHOD)(agent_link._chunks(frame), timeout=60):
                    received += chunk
            return unpack(decode(bytes(received)))
        except (grpc.RpcError, MalformedMessageError) as error:
            raise SiteDiedError(bytes_came=bool(received)) from error

    def _until_it_listens(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self._address.path))
                return
            time.sleep(0.005)
        raise AssertionError("the agent does not listen")

    def revive(self) -> None:
        self._process.join(timeout=60)
        assert self._process.exitcode is not None, "the agent is expected to be dead"
        self.exit_codes.append(self._process.exitcode)
        self._address.path.unlink(missing_ok=True)
        self._process = self._processes.start(**self._order, point=None, passage=0)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        super().close()


def check_recovered(study: CrashStudy) -> None:
    """What the design promises of a site that died: its ledger covers what left, and nothing is used twice.

    Raises:
        AssertionError: the ledger undercounts, or a recorded attempt number is served again.
    """
    home = study.homes[0]
    entries = read_ledger(home.ledger_path, key=home.identity().verify_key)
    charged = {entry.body["attempt"]: entry.body["purpose"] for entry in entries if entry.kind == CHARGE}
    assert study.sent.items() <= charged.items(), f"sent {study.sent}, charged {charged}"
    execution = ExecutionPlan.from_study_plan(study.plan)
    events = {"train": execution.training_event(), "audit": execution.audit_event()}
    delta = study.plan.privacy.delta
    left = epsilon([events[purpose] for purpose in study.sent.values()], delta).reported
    assert spent(entries, delta=delta).reported >= left
    recorded = {entry.body["attempt"] for entry in entries if entry.kind == ATTEMPT}
    assert study.keys_left <= recorded, f"keys left for {study.keys_left}, recorded {recorded}"
    for number in sorted(recorded):
        attempt = {**study.attempt_fields(), "attempt": number}
        (reply,) = study.deliver([Envelope("secagg_advertise", {"attempt": attempt})])
        assert (reply.kind, reply.body.get("reason")) == (REFUSED, "attempt_not_new")
    for parts in study.uploads_asked:
        (reply, *_) = study.deliver(parts)
        assert (reply.kind, reply.body.get("reason")) == (REFUSED, "attempt_closed")
