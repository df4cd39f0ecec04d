"""A coordinator and hospitals on loopback, as service units start them, and a service manager. (No tests.)

What stands where::

    hospital i: agent (no interface) -- unix socket -- courier -- SuperNode -- nginx (adds the certificate)
                                                                                 |
                                                                         link i (a relay in user space)
                                                                                 |
    coordinator: SuperExec (ServerApp) -- SuperLink -- nginx (certificates, Fleet API)

Files are the product's (``lacuna ... perimeter``), commands and delays those of ``deploy/systemd``.
Everything runs under one user: separate users and namespaces are the subject of ``test_real_topology.py``.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.site_home import SiteHome
from client.site_network import SiteNetwork
from deploy.local_consortium import network_namespace_command
from deploy.perimeter import Limits, write_coordinator_perimeter, write_site_perimeter
from deploy.supervised import RunningProcess, SupervisedProcesses
from server.coordinator_home import CoordinatorHome
from tests.deploy.link_relay import LinkRelay
from tests.loopback_ports import free_port

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 240.0


@dataclass
class Service:
    """One unit. ``restart_s`` is its RestartSec; ``clock_s`` what libfaketime adds to its clock."""

    argv: list[str]
    env: dict[str, str]
    restart_s: float
    clock_s: int = 0
    due: float | None = field(default=None, repr=False)
    family: set[int] = field(default_factory=set, repr=False)
    starts: int = 0
    stopped: bool = False
    disk_full: bool = False


class LoopbackServices:
    """Start on entering, gone on leaving.

    Args:
        out: Where every person's ``LACUNA_HOME`` is (``coordinator``, one by site name).
        sites: Names of the hospitals; each has a certificate installed.
        agent: Argument list of a site's agent, by position and socket.
        environment: By site name, for its agent.
        seed: Of the links' dice.
    """

    def __init__(
        self,
        out: Path,
        sites: Sequence[str],
        *,
        agent: Callable[[int, Path], list[str]],
        environment: Callable[[str], dict[str, str]],
        sockets: Path,
        port: int,
        seed: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.out, self.sites, self.port = out, tuple(sites), port
        self._agent, self._environment, self._sockets, self._say = agent, environment, sockets, say
        self.superlink_port = free_port()
        self.links = [LinkRelay(port, seed=seed * 1000 + i) for i in range(len(sites))]
        self.services: dict[str, Service] = {}
        self._processes: SupervisedProcesses | None = None
        self._isolate = network_namespace_command() or ()

    def __enter__(self) -> LoopbackServices:
        self.logs.mkdir(exist_ok=True, mode=0o700)
        self._processes = SupervisedProcesses()
        try:
            self._define_coordinator()
            for name in ("superlink", "superexec", "perimeter"):
                self.start(name)
            self.until(lambda: answers(self.superlink_port), "the SuperLink does not listen")
            self.until(lambda: answers(self.port), "the perimeter does not listen")
            self.register()
            for i in range(len(self.sites)):
                self._define_hospital(i)
                for part in HOSPITAL:
                    self.start(f"{part} {i}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.close()
            self._processes = None
        for link in self.links:
            link.close()

    # places

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    @property
    def folder(self) -> Path:
        return self.out / "coordinator-etc"

    @property
    def coordinator_folders(self) -> tuple[Path, ...]:
        """What the coordinator's machine holds beside ``LACUNA_HOME``."""
        return (
            self.folder,
            self.database.parent,
            self.out / "run" / "superlink",
            self.out / "run" / "superexec",
        )

    @property
    def operator_home(self) -> Path:
        return self.folder / "operator"

    @property
    def database(self) -> Path:
        return self.out / "superlink" / "superlink.db"

    def socket(self, i: int) -> Path:
        return self._sockets / f"{i}" / "agent.sock"

    def log(self, name: str) -> Path:
        return self.logs / f"{name.replace(' ', '-')}.log"

    # services

    def start(self, name: str) -> None:
        """Start a unit that does not run, with its clock as it is now."""
        service, folder = self.services[name], self.out / "run" / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        clock = wrong_clock(service.clock_s) if service.clock_s else {}
        self._supervised.start(
            name,
            service.argv,
            log=self.log(name),
            cwd=folder,
            env={
                **_clean_environment(),
                "HOME": str(folder),
                "FLWR_HOME": str(folder),
                **service.env,
                **clock,
            },
        )
        if service.disk_full:
            self.fill_disk(name, full=True)
        service.starts += 1
        service.due, service.stopped, service.family = None, False, set()

    def stop(self, name: str) -> None:
        """As ``systemctl stop``: SIGTERM, SIGKILL where that is not enough, the whole control group."""
        service = self.services[name]
        service.stopped = True
        self._note_families()
        if self.runs(name):
            self._supervised.stop(name)
        self._end_family(service)

    def stop_at_once(self, name: str) -> None:
        """The plug is pulled: SIGKILL for the whole control group, and the manager is gone too."""
        service = self.services[name]
        service.stopped = True
        self._note_families()
        if self.runs(name):
            os.kill(self.main_pid(name), signal.SIGKILL)
        self._end_family(service)
        self.until(lambda: not self.runs(name), f"{name} does not die", timeout_s=20)

    def kill_process(self, pid: int) -> None:
        """SIGKILL one process of these services."""
        if self._is_ours(pid):
            os.kill(pid, signal.SIGKILL)

    def kill(self, name: str) -> None:
        """SIGKILL a unit's main process; the manager starts it again after its time."""
        if not self.runs(name):
            raise ProcessLookupError(f"{name} does not run")
        self._note_families()
        os.kill(self.main_pid(name), signal.SIGKILL)

    def tick(self) -> list[str]:
        """What the service manager does: units that died are started again. Returns their names."""
        self._note_families()
        now, started = time.monotonic(), []
        for name, service in self.services.items():
            if service.stopped or not service.starts or self._supervised.exit_code(name) is None:
                continue
            if service.due is None:
                self._end_family(service)
                service.due = now + service.restart_s
            elif now >= service.due:
                self.start(name)
                started.append(name)
        return started

    def main_pid(self, name: str) -> int:
        return self._supervised.pid_of(name)

    def runs(self, name: str) -> bool:
        service = self.services[name]
        return service.starts > 0 and self._supervised.exit_code(name) is None

    def descendant(self, name: str, program: str) -> int | None:
        """Of a unit: the process of that program, or None at this moment."""
        for process in self._supervised.processes():
            if process.name == name and _program(process) == program:
                return process.pid
        return None

    def pids(self, name: str) -> list[int]:
        return [process.pid for process in self._supervised.processes() if process.name == name]

    def signal(self, name: str, number: int) -> None:
        """To every process of a unit."""
        for pid in self.pids(name):
            _signal(pid, number)

    def fill_disk(self, name: str, *, full: bool) -> None:
        """While it is full, no process of the unit can write to a file (RLIMIT_FSIZE of live processes).

        A unit that is started meanwhile finds the disk full, a moment after its start.
        """
        self.services[name].disk_full = full
        limit = 0 if full else resource.RLIM_INFINITY
        for pid in self.pids(name):
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            except ProcessLookupError:
                continue

    def register(self) -> None:
        """The operator's ``lacuna coordinator register-nodes``."""
        self.operate("register-nodes", "--flwr-home", str(self.operator_home))

    def operate(self, *words: str) -> str:
        """A ``lacuna coordinator`` command, as the operator. Raises OperationFailedError."""
        done = subprocess.run(
            [str(BIN / "python"), "-m", "deploy.cli", "coordinator", *words],
            env={
                **_clean_environment(),
                "LACUNA_HOME": str(self.out / "coordinator"),
                "PYTHONPATH": str(REPOSITORY),
            },
            cwd=self.out, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            raise OperationFailedError(f"coordinator {words[0]}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def until(self, holds: Callable[[], bool], otherwise: str, *, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"{otherwise}; see {self.logs}")
            time.sleep(0.2)

    # definitions

    def write_coordinator_perimeter(self) -> None:
        """The operator's ``lacuna coordinator perimeter``."""
        write_coordinator_perimeter(
            CoordinatorHome(self.out / "coordinator" / "coordinator"), self.folder,
            listen=f"127.0.0.1:{self.port}", superlink_port=self.superlink_port,
            # All hospitals have one address here.
            limits=Limits(connections=512, requests_per_s=200, burst=500),
        )  # fmt: skip
        self.database.parent.mkdir(exist_ok=True, mode=0o700)

    def _define_coordinator(self) -> None:
        self.write_coordinator_perimeter()
        own, driver = self.folder / "superlink", self.folder / "superexec"
        self._define("superlink", [
            str(BIN / "python"), "-m", "deploy.superlink",
            "--host", "127.0.0.1", "--port", str(self.superlink_port),
            "--ssl-ca-certfile", str(own / "ca.pem"), "--ssl-certfile", str(own / "superlink.pem"),
            "--ssl-keyfile", str(own / "superlink.key"), "--enable-supernode-auth", "--isolation", "process",
            "--superexec-auth-secret-file", str(own / "superexec.secret"),
            "--database", str(self.database), "--disable-runtime-dependency-installation",
        ], restart_s=5)  # fmt: skip
        self._define("superexec", [
            str(BIN / "flower-superexec"), "--root-certificates", str(driver / "superlink-ca.pem"),
            "--runtime-api-address", f"127.0.0.1:{self.superlink_port}",
            "--superexec-auth-secret-file", str(driver / "superexec.secret"),
        ], restart_s=5, env={"LACUNA_HOME": str(self.out / "coordinator")})  # fmt: skip
        self._define_nginx("perimeter", self.folder / "perimeter" / "nginx.conf")

    def _define_hospital(self, i: int) -> None:
        name, inner, node = self.sites[i], free_port(), free_port()
        folder = self.out / f"{name}-etc"
        write_site_perimeter(
            SiteNetwork(SiteHome(self.out / name / "site")), folder, listen=f"127.0.0.1:{inner}",
            address=f"127.0.0.1:{self.links[i].port}", node_port=node, socket=str(self.socket(i)),
        )  # fmt: skip
        self._define_nginx(f"site perimeter {i}", folder / "perimeter" / "nginx.conf")
        own = folder / "supernode"
        values = dict(line.split("=", 1) for line in (own / "supernode.env").read_text().splitlines())
        self._define(f"supernode {i}", [
            str(BIN / "flower-supernode"), "--superlink", values["LACUNA_PERIMETER"],
            "--root-certificates", str(own / "perimeter-ca.pem"),
            "--auth-supernode-private-key", str(own / "node.key"),
            "--isolation", "process", "--superexec-auth-secret-file", str(own / "superexec.secret"),
            "--host", "127.0.0.1", "--port", values["LACUNA_NODE_PORT"],
            "--node-config", values["LACUNA_NODE_CONFIG"],
        ], restart_s=20)  # fmt: skip
        self._define(f"courier {i}", [
            str(BIN / "flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{node}",
            "--superexec-auth-secret-file", str(folder / "courier" / "superexec.secret"),
        ], restart_s=5)  # fmt: skip
        argv = [*self._isolate, *self._agent(i, self.socket(i))]
        self._define(f"agent {i}", argv, restart_s=15, env=self._environment(name))

    def _define_nginx(self, name: str, configuration: Path) -> None:
        prefix = self.out / "run" / name.replace(" ", "-") / "prefix"
        prefix.mkdir(parents=True, exist_ok=True, mode=0o700)
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin") or "nginx"
        own = ["-g", "user root;"] if os.geteuid() == 0 else []
        argv = [program, "-e", "stderr", "-p", f"{prefix}/", "-c", str(configuration), *own]
        self._define(name, argv, restart_s=5)

    def _define(
        self, name: str, argv: list[str], *, restart_s: float, env: Mapping[str, str] | None = None
    ) -> None:
        self.services[name] = Service(argv, dict(env or {}), restart_s)

    # control groups

    def _note_families(self) -> None:
        running: dict[str, set[int]] = {}
        for process in self._supervised.processes():
            running.setdefault(process.name, set()).add(process.pid)
        for name, pids in running.items():
            self.services[name].family = pids

    def _end_family(self, service: Service) -> None:
        """What a dead unit left behind: systemd ends the whole control group."""
        for pid in service.family:
            if self._is_ours(pid):
                _signal(pid, signal.SIGKILL)
        service.family = set()

    def _is_ours(self, pid: int) -> bool:
        """Whether a process descends from the supervisor: an id may have been given to a stranger since."""
        while pid > 1:
            if pid == self._supervised.pid:
                return True
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
            except OSError:
                return False
            pid = int(stat.rpartition(")")[2].split()[1])
        return False

    @property
    def _supervised(self) -> SupervisedProcesses:
        assert self._processes is not None, "the services were started"
        return self._processes


class OperationFailedError(Exception):
    """A command of the operator's did not succeed; in the command's own words."""


HOSPITAL = ("site perimeter", "agent", "courier", "supernode")


def libfaketime() -> Path | None:
    """Where Debian's package libfaketime has its library for programs with threads."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def wrong_clock(seconds: int) -> dict[str, str]:
    """Environment of a process whose wall clock is off; what measures durations stays right."""
    library = libfaketime()
    assert library is not None, "libfaketime is installed where clocks are to be wrong"
    return {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+d}", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _program(process: RunningProcess) -> str:
    """Name of the program; console scripts run as ``python .../flwr-clientapp``."""
    names = [Path(part).name for part in process.argv[:2]]
    return next((name for name in names if not name.startswith("python")), "")


def _clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {
        **kept,
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', os.defpath)}",
    }  # fmt: skip
