"""A whole consortium on one machine: SuperLink, SuperNodes and site agents as separate processes.

It is what ``lacuna demo`` runs on, and the tests that kill processes. All Flower processes speak TLS on
loopback ports that were free, the SuperLink authenticates SuperNodes and keeps its state in SQLite. Each
agent runs without any network where the system lets us make an empty network namespace;
:attr:`LocalConsortium.agents_isolated` says whether. What it does not show is the separation by user:
agents, SuperNodes and couriers all run under the uid of whoever starts it.

Everything runs under a supervisor (:mod:`deploy.supervisor`), so nothing outlives the consortium: not
after an exception, not after Ctrl-C, not when its process is killed. Nothing global is used (a private
``FLWR_HOME`` per process, sockets in a directory of its own), so consortia can run side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deploy.consortium_keys import ServerCertificate, make_server_certificate
from deploy.flower_commands import FlowerCommands, flower_answer, flower_executable
from deploy.superlink_health import superlink_answers
from deploy.supervised import RunningProcess, SupervisedProcesses
from shared.errors import CoordinatorError, SiteError
from shared.node_keys import NodeKey, make_node_key

FLOWER_APP = Path(__file__).parent / "flower_app"
CONNECTION = "lacuna"
"""Name of the SuperLink connection in ``config.toml``."""

START_TIMEOUT_S = 180.0
REJOIN_TIMEOUT_S = 120.0
"""Flower refuses a SuperNode that comes back until the old one's heartbeat lapses: up to 60 s."""

LOST_AFTER_S = 5.0
"""A run whose ServerApp process is gone for this long is lost, though Flower notices much later."""

Kind = Literal["superlink", "supernode", "agent", "serverapp", "clientapp"]
RunValue = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class SiteProcess:
    """How one site's agent is served.

    Args:
        site_id: For names of logs and keys.
        command: Argument list; ``{socket}`` stands for the path at which the agent has to listen.
        env: Added to the environment.
    """

    site_id: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a Flower run ended.

    ``status`` is Flower's (``finished:completed``, ``finished:failed``, ``finished:stopped``), or
    ``serverapp_lost``, ``superlink_lost`` where the process died, or ``timeout``.
    """

    run_id: str
    status: str
    details: str
    elapsed_s: float

    @property
    def completed(self) -> bool:
        return self.status == "finished:completed"


class LocalConsortium:
    """Starts on entering the context, ends on leaving it.

    Args:
        home: Folder for keys, database and logs; made with mode 0700.
        sites: One agent and one SuperNode each.
        app: The Flower app to submit.
        isolate_agents: Run agents in an empty network namespace where the system permits.
        keep_alive: While :meth:`wait` runs, restart SuperNodes and agents that died, as systemd would.
        progress: Told in a few words what happens.

    Raises:
        CoordinatorError, SiteError: a process does not start; the message names its log.
    """

    def __init__(
        self,
        home: Path,
        sites: Sequence[SiteProcess],
        *,
        app: Path = FLOWER_APP,
        isolate_agents: bool = True,
        keep_alive: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.home = home.absolute()
        self.sites = tuple(sites)
        self._app = app.absolute()
        self._keep_alive = keep_alive
        self._progress = progress
        self._network_namespace = network_namespace_command() if isolate_agents else None
        self._keys: list[NodeKey] = []
        self._flower = FlowerCommands(self.home)
        self._node_ids: list[int | None] = [None] * len(self.sites)
        self._port = 0
        self._processes: SupervisedProcesses | None = None
        self._certificate: ServerCertificate | None = None
        self.socket_directory = Path()

    # -- life ------------------------------------------------------------------------------------------

    def __enter__(self) -> LocalConsortium:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start everything and return when all SuperNodes are connected and all agents listen."""
        for folder in (self.home, self.keys_directory, self.log_directory):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket_directory = Path(tempfile.mkdtemp(prefix="lacuna-", dir=_short_directory()))
        self._processes = SupervisedProcesses(remove_at_end=[self.socket_directory])
        try:
            for index in range(len(self.sites)):
                self._start_agent(index)
            self._certificate = make_server_certificate_once(self.keys_directory)
            self._start_superlink_on_a_free_port()
            self._write_flower_config()
            self._keys = [
                make_node_key(self.keys_directory, f"supernode-{site.site_id}") for site in self.sites
            ]
            self._register(range(len(self.sites)))
            offsets = [self._start_supernode(index) for index in range(len(self.sites))]
            for index, offset in enumerate(offsets):
                self._await_supernode(index, offset)
            for index in range(len(self.sites)):
                self._await_agent(index)
        except BaseException:
            self.close()
            raise
        self._progress(f"{len(self.sites)} sites are connected; agents: {self.isolation}")

    def close(self) -> None:
        """End all processes. May be called twice."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    # -- what is where ---------------------------------------------------------------------------------

    @property
    def agents_isolated(self) -> bool:
        """Whether agents run in a network namespace without interfaces."""
        return self._network_namespace is not None

    @property
    def isolation(self) -> str:
        if self._network_namespace is not None:
            return "without network (" + " ".join(self._network_namespace) + ")"
        return "with this machine's network (no network namespace is permitted or wanted here)"

    @property
    def keys_directory(self) -> Path:
        return self.home / "keys"

    @property
    def flwr_home(self) -> Path:
        """``FLWR_HOME`` of the coordinator's ``flwr`` command."""
        return self._flower.home_of("flwr")

    @property
    def log_directory(self) -> Path:
        return self.home / "logs"

    @property
    def node_ids(self) -> list[int]:
        """Flower's node ids, in the order of the sites."""
        return [node_id for node_id in self._node_ids if node_id is not None]

    def log(self, kind: Kind, index: int = 0) -> Path:
        """The log of a process. A ServerApp has none of its own: ask :meth:`serverapp_log`."""
        return self.log_directory / f"{self._name(kind, index)}.log"

    def socket(self, index: int) -> Path:
        """Where the agent of a site listens."""
        return self.socket_directory / f"{index}" / "agent.sock"

    def pids(self) -> list[int]:
        """Process ids of everything that runs, the supervisor included."""
        running = self._running()
        return [running.pid, *(process.pid for process in running.processes())]

    def pid_of(self, kind: Kind, index: int = 0) -> int | None:
        """Process id, or None if no such process runs at this moment."""
        if kind == "serverapp":
            return self._descendant("superlink", "flwr-serverapp")
        if kind == "clientapp":
            return self._descendant(self._name("supernode", index), "flwr-clientapp")
        name = self._name(kind, index)
        return self._running().pid_of(name) if self._running().exit_code(name) is None else None

    # -- faults and their repair -----------------------------------------------------------------------

    def kill(self, kind: Kind, index: int = 0) -> None:
        """SIGKILL one process. Its own children are left to find out, as after a crash."""
        pid = self.pid_of(kind, index)
        if pid is None:
            raise CoordinatorError(f"no {kind} {index} is running")
        os.kill(pid, signal.SIGKILL)
        while self.pid_of(kind, index) == pid:
            time.sleep(0.05)

    def restart_agent(self, index: int, *, wait: bool = True) -> None:
        self._end(self._name("agent", index))
        self._start_agent(index)
        if wait:
            self._await_agent(index)

    def restart_supernode(self, index: int, *, new_identity: bool = False) -> None:
        """Start a SuperNode again and wait until the SuperLink has taken it.

        With its old key it is refused until the old heartbeat lapses (up to 60 s), and keeps its node id.
        With a new identity the old node is unregistered and a new key registered: it is back in a few
        seconds, under another node id, and whatever was on its way to the old one fails at once.
        """
        self._end(self._name("supernode", index))
        if new_identity:
            self._flower.run("supernode", "unregister", str(self._node_ids[index]), CONNECTION)
            name = self._keys[index].private.name
            self._keys[index] = make_node_key(self.keys_directory, name)
            self._register([index])
        deadline = time.monotonic() + REJOIN_TIMEOUT_S
        while True:
            offset = self._start_supernode(index)
            try:
                self._await_supernode(index, offset)
                return
            except CoordinatorError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(3.0)

    def restart_superlink(self) -> None:
        """Start the SuperLink again, on its port and database. SuperNodes reconnect by themselves, within
        20 s; the run it carried has failed: submit a new one."""
        self._end("superlink")
        self._start_superlink()

    def revive(self) -> list[str]:
        """Start dead SuperNodes and agents again, without waiting. Returns their names.

        A SuperNode whose predecessor was killed is refused for a while and tried again at the next call.
        """
        revived = []
        for index in range(len(self.sites)):
            if self.pid_of("agent", index) is None:
                self._start_agent(index)
                revived.append(self._name("agent", index))
            if self.pid_of("supernode", index) is None:
                self._start_supernode(index)
                revived.append(self._name("supernode", index))
        return revived

    # -- runs ------------------------------------------------------------------------------------------

    def submit(self, run_config: Mapping[str, RunValue]) -> str:
        """``flwr run`` with this configuration; every key must be in the app's own. Returns the run id."""
        overrides = " ".join(f"{key}={_toml(value)}" for key, value in run_config.items())
        arguments = ["run", str(self._app), CONNECTION]
        answer = self._flower.run(*arguments, *(["--run-config", overrides] if overrides else []))
        run_id = str(answer["run-id"])
        self._progress(f"Flower run {run_id} submitted")
        return run_id

    def status(self, run_id: str) -> tuple[str, str]:
        """Flower's status of a run and its details. Costs about a second of CPU (``flwr list``)."""
        answer = self._flower.run("list", CONNECTION, "--run-id", run_id)
        run = answer["runs"][0]
        return str(run["status"]), str(run["status-details"])

    def stop_run(self, run_id: str) -> None:
        self._flower.run("stop", run_id, CONNECTION)

    def serverapp_log(self, run_id: str) -> str:
        """What the ServerApp wrote to its output, as the SuperLink keeps it."""
        return self._flower.text("log", run_id, CONNECTION, "--show")

    def wait(
        self,
        run_id: str,
        *,
        timeout_s: float,
        poll_s: float = 0.5,
        on_poll: Callable[[], None] = lambda: None,
    ) -> RunOutcome:
        """Wait until a run has ended, one way or another.

        Looks at processes, which is cheap, and asks Flower only when the ServerApp's process is gone.
        ``on_poll`` is called every ``poll_s``: to show progress, or to break something.
        """
        started = time.monotonic()
        gone_since: float | None = None

        def outcome(status: str, details: str) -> RunOutcome:
            return RunOutcome(
                run_id=run_id, status=status, details=details, elapsed_s=time.monotonic() - started
            )

        while time.monotonic() - started < timeout_s:
            on_poll()
            if self.pid_of("superlink") is None:
                return outcome("superlink_lost", f"the SuperLink died; see {self.log('superlink')}")
            if self.pid_of("serverapp") is not None:
                gone_since = None
            else:
                try:
                    status, details = self.status(run_id)
                except CoordinatorError as error:
                    if self.pid_of("superlink") is not None:
                        self._progress(f"the SuperLink did not say how run {run_id} is: {error.message}")
                    time.sleep(poll_s)
                    continue
                if status.startswith("finished"):
                    return outcome(status, details)
                # Only a run that Flower already called running can be lost: a pending one has no process.
                gone_since = (gone_since or time.monotonic()) if status == "running" else None
                lost = gone_since is not None and time.monotonic() - gone_since > LOST_AFTER_S
                if lost and self.pid_of("serverapp") is None:
                    self.stop_run(run_id)
                    return outcome("serverapp_lost", "the ServerApp's process died")
            if self._keep_alive:
                self.revive()
            time.sleep(poll_s)
        return outcome("timeout", f"the run had not ended after {timeout_s:.0f} s")

    def run(self, run_config: Mapping[str, RunValue], *, timeout_s: float) -> RunOutcome:
        """:meth:`submit` and :meth:`wait`."""
        return self.wait(self.submit(run_config), timeout_s=timeout_s)

    # -- processes -------------------------------------------------------------------------------------

    def _start_agent(self, index: int) -> None:
        site = self.sites[index]
        command = [part.replace("{socket}", str(self.socket(index))) for part in site.command]
        self._running().start(
            self._name("agent", index),
            [*(self._network_namespace or ()), *command],
            log=self.log("agent", index),
            cwd=self.home,
            env={**os.environ, "OMP_NUM_THREADS": "1", **site.env},
        )

    def _await_agent(self, index: int) -> None:
        def listening() -> bool:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(self.socket(index)))
                except (FileNotFoundError, ConnectionRefusedError):
                    return False
                return True

        if not self._await(self._name("agent", index), listening):
            raise SiteError(
                f"the agent of {self.sites[index].site_id} does not listen; see {self.log('agent', index)}"
            )

    def _start_superlink_on_a_free_port(self) -> None:
        for attempt in range(5):
            self._port = _free_port()
            try:
                self._start_superlink()
                return
            except CoordinatorError:
                # Somebody took the port between our look and Flower's bind.
                if attempt == 4:
                    raise
                self._end("superlink")

    def _start_superlink(self) -> None:
        certificate = self._certificate
        if certificate is None:
            raise CoordinatorError("the consortium was not started")
        self._running().start(
            "superlink",
            [
                flower_executable("flower-superlink"),
                *("--host", "127.0.0.1", "--port", str(self._port)),
                *("--ssl-ca-certfile", str(certificate.authority)),
                *("--ssl-certfile", str(certificate.certificate)),
                *("--ssl-keyfile", str(certificate.key)),
                "--enable-supernode-auth",
                *("--database", str(self.home / "superlink.db")),
                "--disable-runtime-dependency-installation",
            ],
            log=self.log("superlink"),
            cwd=self.home,
            env=self._flower.environment("superlink"),
        )
        if not self._await("superlink", self._superlink_answers):
            raise CoordinatorError(f"the SuperLink does not answer; see {self.log('superlink')}")

    def _superlink_answers(self) -> bool:
        return superlink_answers(self._port, self.keys_directory / "ca.pem")

    def _write_flower_config(self) -> None:
        self._flower.write_config(CONNECTION, self._port, self.keys_directory / "ca.pem")

    def _register(self, indices: Sequence[int]) -> None:
        """``flwr supernode register`` for several keys at once; each takes a second of CPU."""
        started = [
            (index, self._flower.start("supernode", "register", str(self._keys[index].public), CONNECTION))
            for index in indices
        ]
        for index, process in started:
            self._node_ids[index] = int(flower_answer(process)["node-id"])

    def _start_supernode(self, index: int) -> int:
        log = self.log("supernode", index)
        offset = log.stat().st_size if log.exists() else 0
        node_config = f"agent-socket={_toml(str(self.socket(index)))}"
        self._running().start(
            self._name("supernode", index),
            [
                flower_executable("flower-supernode"),
                *("--superlink", f"127.0.0.1:{self._port}"),
                *("--root-certificates", str(self.keys_directory / "ca.pem")),
                *("--auth-supernode-private-key", str(self._keys[index].private)),
                *("--host", "127.0.0.1", "--port", str(_free_port())),
                *("--node-config", node_config),
            ],
            log=log,
            cwd=self.home,
            env=self._flower.environment(self._name("supernode", index)),
        )
        return offset

    def _await_supernode(self, index: int, offset: int) -> None:
        log = self.log("supernode", index)

        def connected() -> bool:
            with log.open("rb") as file:
                file.seek(offset)
                return re.search(rb"SuperNode ID: \d+", file.read()) is not None

        if not self._await(self._name("supernode", index), connected):
            raise CoordinatorError(
                f"the SuperNode of {self.sites[index].site_id} is not connected; see {log}",
                remedy="after a kill, Flower refuses it until the old heartbeat lapses, up to 60 s",
            )

    def _await(self, name: str, ready: Callable[[], bool]) -> bool:
        """Wait until a process is ready; False if it ended, or is not ready in time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if ready():
                return True
            if self._running().exit_code(name) is not None:
                return False
            time.sleep(0.1)
        return False

    def _end(self, name: str) -> None:
        with contextlib.suppress(CoordinatorError):
            self._running().stop(name)

    def _running(self) -> SupervisedProcesses:
        if self._processes is None:
            raise CoordinatorError("the consortium is not running")
        return self._processes

    def _descendant(self, name: str, program: str) -> int | None:
        for process in self._running().processes():
            if process.name == name and _program(process) == program:
                return process.pid
        return None

    def _name(self, kind: Kind, index: int) -> str:
        return "superlink" if kind in ("superlink", "serverapp") else f"{kind}-{self.sites[index].site_id}"


def network_namespace_command() -> tuple[str, ...] | None:
    """The command prefix that gives a process an empty network namespace, or None where not permitted."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    for options in (
        ("--net",),
        ("--user", "--map-current-user", "--net"),
        ("--user", "--map-root-user", "--net"),
    ):
        probe = subprocess.run([unshare, *options, "true"], capture_output=True, check=False)
        if probe.returncode == 0:
            return (unshare, *options)
    return None


def make_server_certificate_once(folder: Path) -> ServerCertificate:
    """A new certificate for each start: SuperNodes and ``flwr`` read the authority from the same folder."""
    (folder / "superlink.key").unlink(missing_ok=True)
    return make_server_certificate(folder)


def _program(process: RunningProcess) -> str:
    """Name of the program; console scripts run as ``python .../flwr-clientapp``."""
    return next(
        (Path(part).name for part in process.argv[:2] if not Path(part).name.startswith("python")), ""
    )


def _short_directory() -> str:
    """A directory for sockets, whose paths have at most 100 bytes."""
    directory = tempfile.gettempdir()
    return directory if len(directory) <= 60 else "/tmp"  # noqa: S108


def _free_port() -> int:
    """A port nobody listens on, below the range from which the kernel gives out ports for connections."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _toml(value: RunValue) -> str:
    return json.dumps(value)
