"""A site agent for a process of its own, to be killed.

It serves a site over gRPC on a unix socket, real in everything but the patients' arithmetic.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent_trio import WatchedWorkbench
from crash_points import CrashPoints, charging_after_the_answer

from client import agent_service
from client.agent_service import AgentServer
from client.serving import open_ledger
from client.site_agent import SiteAgent
from client.site_home import SiteHome
from privacy.audit.counts import CountsLayout
from privacy.secret_random import SecretRandom
from shared.plan_package import PlanPackage
from shared.study_plan import parse_plan

CHUNK_BYTES = 256
"""An answer goes out in several pieces, so that the process can die between two of them."""


def serve(order: dict[str, Any]) -> None:
    """Serve a site until it dies where ``order`` says, or is killed."""
    os.environ["LACUNA_COUNTER_DIR"] = order["counters"]
    points = CrashPoints()
    points.die = {"kill": _kill_9, "exit": lambda: os._exit(1)}[order["how"]]
    if order["point"] is not None:
        points.arm(order["point"], order["passage"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(points.installed())
        if order["late"]:
            stack.enter_context(charging_after_the_answer(points))
        plan = parse_plan(order["plan"], what="plan")
        home = SiteHome(Path(order["home"]))
        agent = SiteAgent(
            home=home,
            package=PlanPackage(root=home.root / "plan", plan=plan, envelope=b""),
            key=home.identity(),
            ledger=open_ledger(home),
            workbench=WatchedWorkbench(CountsLayout.from_plan(plan).length, 0),
            entropy=SecretRandom(),
        )
        agent_service.CHUNK_BYTES = CHUNK_BYTES
        server = _DyingServer(agent.handle, points)
        server.listen_unix(Path(order["socket"]))
        server.start()
        with points.watching():
            threading.Event().wait()


class _DyingServer(AgentServer):
    def __init__(self, handle: Any, points: CrashPoints) -> None:
        self._points = points
        super().__init__(handle)

    def _exchange(self, chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for place, chunk in enumerate(super()._exchange(chunks, context)):
            if place == 0:
                self._points.reach("before-answer")
            yield chunk
            if place == 0:
                time.sleep(0.02)  # lets the piece reach the other end
                self._points.reach("mid-answer")
        time.sleep(0.02)
        self._points.reach("after-answer")


def _kill_9() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
