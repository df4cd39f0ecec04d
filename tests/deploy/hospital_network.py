"""A coordinator and hospitals on one machine, each in a network namespace of its own, as root. (No tests.)

What stands where::

    outside ----- internet (a bridge) ----- coordinator: nginx 8443, SuperLink on loopback, SuperExec
                       |
                  hospital i: nginx (adds the certificate)
                       |
                  hospital i, inner: SuperNode, courier          hospital i, agent: no interface
                                        `----- unix socket -----'

Every part has a user of its own, without capabilities. Files are the product's: perimeters written by
``lacuna ... perimeter``, commands as in the service units. Containers and systemd cannot be run everywhere;
the same separation is made here with ``ip netns`` and ``setpriv``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.site_home import SiteHome
from client.site_network import SiteNetwork
from deploy.perimeter import Limits, write_coordinator_perimeter, write_site_perimeter
from deploy.supervised import SupervisedProcesses
from server.coordinator_home import CoordinatorHome
from server.study_store import StudyStore

PREFIX = "lac"
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DRIVER, SUPERLINK, DOOR, STRANGER = 62011, 62012, 62014, 62099
PORT, SUPERLINK_PORT, INNER_PORT, NODE_PORT = 8443, 23900, 9443, 9094
COORDINATOR_IP = "10.77.0.1"
START_S = 240.0
RESTARTS, RESTART_S = 5, 20.0


def unmet() -> str | None:
    """Why this machine cannot do it, or None."""
    if os.geteuid() != 0:
        return "network namespaces and users need root"
    for program, package in (
        ("ip", "iproute2"), ("setpriv", "util-linux"), ("nginx", "nginx"), ("nft", "nftables"),
    ):  # fmt: skip
        if shutil.which(program, path=f"/usr/sbin:/sbin:{os.environ['PATH']}") is None:
            return f"{program} is not installed (Debian: apt-get install {package})"
    probe = subprocess.run(["ip", "netns", "add", f"{PREFIX}probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", f"{PREFIX}probe"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "network namespaces are not permitted"


@dataclass(frozen=True)
class HospitalUsers:
    """Uids of one hospital's parts; ``group`` is shared by agent and courier."""

    index: int

    @property
    def group(self) -> int:
        return 62100 + 100 * self.index

    @property
    def agent(self) -> int:
        return self.group + 1

    @property
    def courier(self) -> int:
        return self.group + 2

    @property
    def node(self) -> int:
        return self.group + 3

    @property
    def perimeter(self) -> int:
        return self.group + 4


class HospitalNetwork:
    """Start on entering, gone on leaving: processes first, then namespaces.

    Args:
        out: Where every person's ``LACUNA_HOME`` is (``coordinator``, one by site name); made passable.
        sites: Names of the hospitals; each has a certificate installed.
        study: What the agents serve.
    """

    def __init__(self, out: Path, sites: Sequence[str], *, study: str, limits: Limits | None = None) -> None:
        self.out, self.sites, self.study = out, tuple(sites), study
        self.run_folder = out / "run"
        self._limits = limits
        self._processes: SupervisedProcesses | None = None
        self._namespaces: list[str] = []
        self._offsets: dict[str, int] = {}
        tag = f"{PREFIX}{os.getpid()}"
        self.coordinator, self.internet, self.outside = f"{tag}c", f"{tag}w", f"{tag}x"
        self.hospital = [f"{tag}h{i}" for i in range(len(sites))]
        self.inner = [f"{tag}n{i}" for i in range(len(sites))]
        self.agent = [f"{tag}a{i}" for i in range(len(sites))]
        self.users = [HospitalUsers(i) for i in range(len(sites))]

    def __enter__(self) -> HospitalNetwork:
        try:
            self._make_namespaces()
            self._processes = SupervisedProcesses()
            self._start_coordinator()
            for i in range(len(self.sites)):
                self.start_hospital(i)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.close()
            self._processes = None
        for name in reversed(self._namespaces):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._namespaces.clear()

    # addresses and places

    def hospital_ip(self, i: int) -> str:
        return f"10.77.0.{10 + i}"

    def inner_ip(self, i: int) -> str:
        """Of the hospital's nginx, on the side of its SuperNode."""
        return f"10.77.{100 + i}.1"

    def node_ip(self, i: int) -> str:
        return f"10.77.{100 + i}.2"

    def socket(self, i: int) -> Path:
        return self.run_folder / f"agent{i}" / "agent.sock"

    def site_folder(self, i: int) -> Path:
        return self.out / f"{self.sites[i]}-etc"

    @property
    def folder(self) -> Path:
        return self.out / "coordinator-etc"

    @property
    def coordinator_home(self) -> CoordinatorHome:
        return CoordinatorHome(self.out / "coordinator" / "coordinator")

    def site_home(self, i: int) -> SiteHome:
        return SiteHome(self.out / self.sites[i] / "site")

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    # running things

    def inside(
        self,
        namespace: str,
        uid: int,
        argv: Sequence[str],
        *,
        gid: int | None = None,
        groups: Sequence[int] = (),
    ) -> list[str]:
        """A command in a namespace, as a user without capabilities."""
        supplementary = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
        drop = ["setpriv", "--reuid", str(uid), "--regid", str(gid or uid), *supplementary,
                "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]  # fmt: skip
        return ["ip", "netns", "exec", namespace, "sh", "-c", _visible_interpreter(), "sh", *drop, *argv]

    def run(
        self, namespace: str, uid: int, argv: Sequence[str], *, env: dict[str, str] | None = None,
        groups: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        return subprocess.run(
            self.inside(namespace, uid, argv, groups=groups),
            env={**_environment(), **(env or {})},
            cwd="/", capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(
        self, name: str, namespace: str, uid: int, argv: Sequence[str], *, gid: int | None = None,
        groups: Sequence[int] = (), env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        assert self._processes is not None
        home = self._own(self.run_folder / name, uid)
        self.log(name).parent.mkdir(exist_ok=True)
        self._offsets[name] = self.log(name).stat().st_size if self.log(name).exists() else 0
        self._processes.start(
            name,
            self.inside(namespace, uid, argv, gid=gid, groups=groups),
            log=self.log(name),
            cwd=home,
            env={**_environment(), "HOME": str(home), "FLWR_HOME": str(home), **(env or {})},
        )

    def pid(self, name: str) -> int:
        assert self._processes is not None
        return self._processes.pid_of(name)

    def exit_code(self, name: str) -> int | None:
        assert self._processes is not None
        return self._processes.exit_code(name)

    def stop(self, name: str) -> None:
        assert self._processes is not None
        self._processes.stop(name)

    def await_log(self, name: str, words: str, *, timeout_s: float = START_S) -> None:
        """Wait until a process has written something since it was started."""

        def written() -> bool:
            return words.encode() in self.log(name).read_bytes()[self._offsets[name] :]

        self.until(written, f"{name} did not say {words!r}", watching=name, timeout_s=timeout_s)

    def until(
        self,
        holds: Callable[[], bool],
        otherwise: str,
        *,
        watching: str | None = None,
        timeout_s: float = START_S,
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            dead = watching is not None and self.exit_code(watching) is not None
            if dead or time.monotonic() > deadline:
                tail = "" if watching is None else self.log(watching).read_text(errors="replace")[-2000:]
                raise AssertionError(f"{otherwise}{' (it ended)' if dead else ''}\n{tail}")
            time.sleep(0.2)

    # the operator

    def operate(self, *words: str) -> dict[str, object]:
        """A ``lacuna coordinator`` command with --json, as the operator, on the coordinator's machine."""
        done = self.run(
            self.coordinator, DRIVER, [str(BIN / "python"), "-m", "deploy.cli", "coordinator", *words],
            env={"LACUNA_HOME": str(self.out / "coordinator"), "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout)) if "--json" in words else {"said": done.stdout}

    @property
    def operator_home(self) -> Path:
        return self.folder / "operator"

    def own_coordinator(self) -> None:
        """What was written as root, by commands of a test, belongs to the operator again."""
        _chown(self.out / "coordinator", DRIVER, DRIVER)

    def write_perimeter(self) -> None:
        """Anew from the roster; nginx takes it up."""
        write_coordinator_perimeter(
            self.coordinator_home, self.folder,
            listen=f"{COORDINATOR_IP}:{PORT}", superlink_port=SUPERLINK_PORT,
            users=tuple(map(str, (DOOR, DRIVER, SUPERLINK))), limits=self._limits,
        )  # fmt: skip
        owners = {"perimeter": DOOR, "superlink": SUPERLINK, "superexec": DRIVER, "operator": DRIVER}
        for part, uid in owners.items():
            _chown(self.folder / part, uid, uid)
        self.own_coordinator()

    def reload(self) -> None:
        os.kill(self.pid("perimeter"), 1)

    def launch(self, verb: str = "launch") -> str:
        store = StudyStore(self.coordinator_home.study(self.study))
        store.events()  # the database is there, and the operator's, before anybody else looks at it
        store.close()
        self.own_coordinator()
        answer = self.operate(verb, "--study", self.study, "--flwr-home", str(self.operator_home), "--json")
        return str(answer["run_id"])

    def wait(self, *, timeout_s: float) -> str:
        """Until the study's run has finished or failed; returns the last event's kind."""
        store = StudyStore(self.coordinator_home.study(self.study))
        try:
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                ended = [kind for _, _, kind, _ in store.events() if kind in ("run_finished", "run_failed")]
                if ended:
                    return ended[-1]
                time.sleep(2)
            return "timeout"
        finally:
            store.close()

    # parts

    def _start_coordinator(self) -> None:
        self.out.chmod(0o711)
        self.run_folder.mkdir(exist_ok=True, mode=0o711)
        self.write_perimeter()
        subprocess.run(
            ["ip", "netns", "exec", self.coordinator, "nft", "-f", str(self.folder / "coordinator.nft")],
            check=True, capture_output=True,
        )  # fmt: skip
        own = self.folder / "superlink"
        self.start("superlink", self.coordinator, SUPERLINK, [
            str(BIN / "python"), "-m", "deploy.superlink",
            "--host", "127.0.0.1", "--port", str(SUPERLINK_PORT),
            "--ssl-ca-certfile", str(own / "ca.pem"), "--ssl-certfile", str(own / "superlink.pem"),
            "--ssl-keyfile", str(own / "superlink.key"), "--enable-supernode-auth", "--isolation", "process",
            "--superexec-auth-secret-file", str(own / "superexec.secret"),
            "--database", str(self.run_folder / "superlink" / "superlink.db"),
            "--disable-runtime-dependency-installation",
        ])  # fmt: skip
        self.await_log("superlink", "Uvicorn running")
        driver = self.folder / "superexec"
        self.start("superexec", self.coordinator, DRIVER, [
            str(BIN / "flower-superexec"), "--root-certificates", str(driver / "superlink-ca.pem"),
            "--runtime-api-address", f"127.0.0.1:{SUPERLINK_PORT}",
            "--superexec-auth-secret-file", str(driver / "superexec.secret"),
        ], env={"LACUNA_HOME": str(self.out / "coordinator")})  # fmt: skip
        self._nginx("perimeter", self.coordinator, DOOR, self.folder / "perimeter" / "nginx.conf")
        self.operate("register-nodes", "--flwr-home", str(self.operator_home))

    def start_hospital(self, i: int) -> None:
        users, folder = self.users[i], self.site_folder(i)
        write_site_perimeter(
            SiteNetwork(self.site_home(i)), folder, listen=f"{self.inner_ip(i)}:{INNER_PORT}",
            node_port=NODE_PORT, socket=str(self.socket(i)), agent_uid=users.agent,
        )  # fmt: skip
        for part, uid in (
            ("perimeter", users.perimeter),
            ("supernode", users.node),
            ("courier", users.courier),
        ):
            _chown(folder / part, uid, uid)
        self._nginx(f"perimeter{i}", self.hospital[i], users.perimeter, folder / "perimeter" / "nginx.conf")
        self.start_agent(i)
        own = folder / "supernode"
        values = dict(line.split("=", 1) for line in (own / "supernode.env").read_text().splitlines())
        command = [
            str(BIN / "flower-supernode"), "--superlink", values["LACUNA_PERIMETER"],
            "--root-certificates", str(own / "perimeter-ca.pem"),
            "--auth-supernode-private-key", str(own / "node.key"),
            "--isolation", "process", "--superexec-auth-secret-file", str(own / "superexec.secret"),
            "--host", "127.0.0.1", "--port", values["LACUNA_NODE_PORT"],
            "--node-config", values["LACUNA_NODE_CONFIG"],
        ]  # fmt: skip
        self.start(f"courier{i}", self.inner[i], users.courier, [
            str(BIN / "flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{NODE_PORT}",
            "--superexec-auth-secret-file", str(folder / "courier" / "superexec.secret"),
        ], groups=[users.group])  # fmt: skip
        # As the service unit does: after a kill Flower refuses the key until the old heartbeat lapses.
        for _ in range(RESTARTS):
            self.start(f"supernode{i}", self.inner[i], users.node, command)
            try:
                self.await_log(f"supernode{i}", "SuperNode ID")
                return
            except AssertionError:
                time.sleep(RESTART_S)
        raise AssertionError(f"{self.log(f'supernode{i}').read_text(errors='replace')[-2000:]}")

    def start_agent(self, i: int) -> None:
        users, name = self.users[i], self.sites[i]
        for path in (self.out / name, self.out / "counters" / name):
            _chown(path, users.agent, users.group)
        directory = self._own(self.socket(i).parent, users.agent, users.group)
        directory.chmod(0o750)
        self.start(f"agent-process{i}", self.agent[i], users.agent, [
            str(BIN / "python"), "-m", "deploy.cli", "site", "serve", self.study,
            "--socket", str(self.socket(i)), "--group", str(users.group), "--allow-uid", str(users.courier),
            "--threads", "1",
        ], gid=users.group, env={
            "LACUNA_HOME": str(self.out / name), "LACUNA_COUNTER_DIR": str(self.out / "counters" / name),
            "PYTHONPATH": str(REPOSITORY),
        })  # fmt: skip
        self.until(self.socket(i).exists, "the agent does not listen", watching=f"agent-process{i}")

    def _nginx(self, name: str, namespace: str, uid: int, configuration: Path) -> None:
        prefix = self.run_folder / name
        (prefix / "nginx.pid").unlink(missing_ok=True)
        argv = ["/usr/sbin/nginx", "-e", "stderr", "-p", f"{prefix}/", "-c", str(configuration)]
        self.start(name, namespace, uid, argv)
        self.until((prefix / "nginx.pid").exists, "nginx does not start", watching=name)

    def _own(self, path: Path, uid: int, gid: int | None = None) -> Path:
        path.mkdir(exist_ok=True, mode=0o700)
        os.chown(path, uid, gid or uid)
        return path

    # namespaces

    def _make_namespaces(self) -> None:
        _remove_left_over()
        names = (self.internet, self.coordinator, self.outside, *self.hospital, *self.inner, *self.agent)
        for name in names:
            _ip("netns", "add", name)
            self._namespaces.append(name)
            if name not in self.agent:
                _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self.internet, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.internet, "link", "set", "br0", "up")
        self._plug(self.coordinator, COORDINATOR_IP, 0)
        self._plug(self.outside, "10.77.0.99", 1)
        for i in range(len(self.sites)):
            self._plug(self.hospital[i], self.hospital_ip(i), 10 + i)
            _ip("-n", self.hospital[i], "link", "add", "inner", "type", "veth", "peer", "name", "eth0",
                "netns", self.inner[i])  # fmt: skip
            for name, link, address in (
                (self.hospital[i], "inner", self.inner_ip(i)), (self.inner[i], "eth0", self.node_ip(i)),
            ):  # fmt: skip
                _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
                _ip("-n", name, "link", "set", link, "up")
            # Whatever tries to get out is sent to the perimeter's machine, which forwards nothing.
            _ip("-n", self.inner[i], "route", "add", "default", "via", self.inner_ip(i))

    def _plug(self, name: str, address: str, number: int) -> None:
        port = f"p{number}"
        _ip("-n", self.internet, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self.internet, "link", "set", port, "master", "br0", "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("netns", "exec", name, "sysctl", "-qw", "net.ipv4.ip_forward=0")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _remove_left_over() -> None:
    """Namespaces of a test that was killed."""
    for name in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split():
        found = re.match(rf"{PREFIX}(\d+)[a-z]", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {
        **kept,
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25", "PYTHONUNBUFFERED": "1",
        "LOGNAME": "lacuna", "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "MPLCONFIGDIR": tempfile.gettempdir(),
    }  # fmt: skip


def _visible_interpreter() -> str:
    """Shell that shows Python to other users where it lies in a home that they may not enter.

    `ip netns exec` gives every process mounts of its own: what is hidden is replaced by an empty folder in
    which the interpreter alone is mounted.
    """
    script = 'exec "$@"'
    base = Path(os.path.realpath(sys.executable)).parents[1]
    closed = [parent for parent in reversed(base.parents) if not parent.stat().st_mode & 0o001]
    if closed:
        top = closed[0]
        script = (
            f"mount -t tmpfs tmpfs /mnt && mkdir /mnt/p && mount --bind {base} /mnt/p && "
            f"mount -t tmpfs -o mode=755 tmpfs {top} && mkdir -p {base} && mount --move /mnt/p {base} && "
            f"umount /mnt && {script}"
        )
    return script


def _chown(root: Path, uid: int, gid: int) -> None:
    subprocess.run(["chown", "-R", f"{uid}:{gid}", str(root)], check=True)
