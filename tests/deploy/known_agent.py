"""A real site agent on a unix socket whose arithmetic is a known vector; for comparing transports.

python known_agent.py SITE_HOME STUDY SOCKET POSITION

Where the file that ``KNOWN_AGENT_HOLD`` names exists, a training step notes so beside it (``.holding``) and
does not end before the file is gone: whoever wants to kill the agent before its upload has the time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from known_workbench import KnownWorkbench

from client.agent_service import AgentServer
from client.serving import open_ledger
from client.site_agent import SiteAgent
from client.site_home import SiteHome
from privacy.secret_random import SecretRandom
from shared.plan_package import open_plan_package


def hold() -> None:
    gate = Path(os.environ.get("KNOWN_AGENT_HOLD", "/nonexistent"))
    while gate.exists():
        gate.with_suffix(".holding").touch()
        time.sleep(0.1)


def main(root: str, package_root: str, socket: str, position: str) -> None:
    home = SiteHome(Path(root))
    package = open_plan_package(Path(package_root))
    directory = home.study(package.plan.study_id)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    workbench = KnownWorkbench(package, directory, int(position))
    workbench.before_upload = hold
    with open_ledger(home) as ledger:
        agent = SiteAgent(
            home=home,
            package=package,
            key=home.identity(),
            ledger=ledger,
            workbench=workbench,
            entropy=SecretRandom(),
        )
        server = AgentServer(agent.handle)
        Path(socket).parent.mkdir(exist_ok=True, mode=0o700)
        server.listen_unix(Path(socket))
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        with server:
            stopped.wait()


main(*sys.argv[1:])
