"""Machines as a hospital gets them: own files, network and processes, and a root shell. (No tests.)

Each machine is a set of namespaces on this one: what is written to ``/etc``, ``/var/lib``, ``/srv``, ``/run``
and a few more is its own and gone with it (overlays on a tmpfs); processes and interfaces too. Programs come
from this machine. It has no systemd: ``systemctl`` and ``journalctl`` are
:mod:`tests.deploy.unit_manager`, which starts what the unit files say, as their users.
"""

from __future__ import annotations

import os
import queue
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
OWN = ("/etc", "/opt", "/var/lib", "/srv", "/run", "/usr/lib/sysusers.d", "/usr/local", "/mnt", "/root")
APT_GET = """#!/bin/sh
# What is to be installed has to be here already.
for package in "$@"; do
    case $package in install|python3-venv) continue;; nftables) package=nft;; esac
    command -v "$package" >/dev/null || { echo "E: $package is not installed on this machine" >&2; exit 100; }
done
"""
START_S = 120.0
COMMAND_S = 1800.0


@dataclass(frozen=True)
class Typed:
    """What a shell said to a block of commands, and which of them failed."""

    output: str
    failed: tuple[str, ...]


class CommandFailedError(AssertionError):
    """A command of a block did not succeed; in its own words."""


class FreshMachine:
    """One machine and a root shell on it that keeps functions, variables and folder, as a person's does.

    Args:
        folder: For its overlays and its shell.
        bridge: Network namespace with the bridge ``br0``.
        address: Of its interface, in a /24.
    """

    def __init__(self, name: str, folder: Path, *, bridge: str, address: str) -> None:
        self.name, self.address = name, address
        self.folder = folder
        self.transcript: list[str] = []
        folder.mkdir(parents=True)
        ready = folder / "ready"
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child",
             "bash", "-c", self._set_up(ready)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )  # fmt: skip
        try:
            _until(ready.exists, f"{name} does not start", self._process)
            self._plug(bridge)
            self._shell = self._start_shell()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Process 1 dies, and with it everything that runs here, mounts and interfaces."""
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of process 1, as this machine's owner sees it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def path(self, inside: str) -> Path:
        """A file of the machine, seen from outside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def type(self, block: str, *, check: bool = True) -> Typed:
        """Type a block of commands into the shell.

        Raises:
            CommandFailedError: one of them failed, and ``check`` is asked for.
        """
        mark = secrets.token_hex(8)
        script = self.folder / "block"
        script.write_text(f"{block}\n")
        shell = self._shell
        assert shell.stdin is not None
        shell.stdin.write(f"source {script} </dev/null; echo '{mark}'\n".encode())
        shell.stdin.flush()
        lines = self._read_until(mark)
        failed = tuple(line.removeprefix("@failed ") for line in lines if line.startswith("@failed "))
        output = "\n".join(line for line in lines if not line.startswith("@failed "))
        self.transcript.append(f"{self.name}# {block.strip()}\n{output}")
        if failed and check:
            raise CommandFailedError(f"{self.name}: {'; '.join(failed)}\n{output[-4000:]}")
        return Typed(output, failed)

    # parts

    def _read_until(self, mark: str) -> list[str]:
        lines: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=COMMAND_S)
            except queue.Empty:
                raise CommandFailedError(
                    f"{self.name}: no end after {COMMAND_S:.0f} s: {lines[-20:]}"
                ) from None
            if line is None:
                raise CommandFailedError(f"{self.name}: the shell ended: {lines[-20:]}")
            if line.endswith(mark):
                return [*lines, *([line.removesuffix(mark)] if line != mark else [])]
            lines.append(line)

    def _start_shell(self) -> subprocess.Popen[bytes]:
        shell = subprocess.Popen(
            ["nsenter", "-t", str(self.pid), "--mount", "--net", "--pid", "bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                 "LANG": "C.UTF-8", "TERM": "dumb", "OMP_NUM_THREADS": "1", "SYSTEMD_OFFLINE": "1"},
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert shell.stdout is not None
            for line in shell.stdout:
                self._lines.put(line.decode(errors="replace").rstrip("\n"))
            self._lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        assert shell.stdin is not None
        shell.stdin.write(b"set -E -o pipefail; trap 'echo \"@failed $BASH_COMMAND ($?)\"' ERR; cd /root\n")
        return shell

    def _plug(self, bridge: str) -> None:
        port = f"p{secrets.token_hex(4)}"
        inside = ["nsenter", "-t", str(self.pid), "--net", "ip"]
        for words in (
            ["ip", "netns", "exec", bridge, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0",
             "netns", str(self.pid)],
            ["ip", "-n", bridge, "link", "set", port, "master", "br0", "up"],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "address", "add", f"{self.address}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
        ):  # fmt: skip
            subprocess.run(words, check=True, capture_output=True)

    def _set_up(self, ready: Path) -> str:
        environment, python = Path(sys.prefix), Path(os.path.realpath(sys.executable))
        kept = {environment, REPOSITORY, python.parents[1], self.folder.parent}
        kept |= {Path(entry) for entry in sys.path if Path(entry).is_dir()}
        return f"""set -e
mount --make-rprivate /
mount -t proc proc /proc
mkdir {self.folder}/own && mount -t tmpfs -o size=20g tmpfs {self.folder}/own
hidden={self.folder}/own/hidden; mkdir $hidden; n=0
keep() {{ n=$((n+1)); mkdir $hidden/$n && mount --rbind "$1" $hidden/$n; echo "$1" > $hidden/$n.path; }}
{"".join(f"keep {path}{chr(10)}" for path in sorted(kept) if str(path).startswith(OWN))}
for at in {" ".join(OWN)}; do
    [ -d $at ] || continue
    upper={self.folder}/own$at; mkdir -p $upper/u $upper/w
    chmod --reference=$at $upper/u
    if [ $at = /root ]; then mount -t tmpfs -o mode=711 tmpfs /root
    else mount -t overlay overlay -o lowerdir=$at,upperdir=$upper/u,workdir=$upper/w $at; fi
done
for file in $hidden/*.path; do
    [ -e $file ] || continue
    at=$(cat $file); mkdir -p $at && mount --rbind ${{file%.path}} $at
done
rm -rf /var/lib/lacuna* /etc/lacuna /srv/* 2>/dev/null || true
mkdir -p /opt/lacuna && mount --bind {environment} /opt/lacuna
mkdir -p /usr/local/sbin
for name in systemctl journalctl; do
    printf '#!/bin/sh\\nexec {python} {HERE}/unit_manager.py %s "$@"\\n' $name > /usr/local/sbin/$name
    chmod 755 /usr/local/sbin/$name
done
printf '%s' {shlex.quote(APT_GET)} > /usr/local/sbin/apt-get && chmod 755 /usr/local/sbin/apt-get
touch {ready}
exec {python} {HERE}/unit_manager.py init
"""


class MachineNetwork:
    """A bridge and machines on it. Gone on leaving."""

    SUBNET = "10.88.0"

    def __init__(self) -> None:
        # Not below pytest's own folder, which other users may not pass.
        self.folder = Path(tempfile.mkdtemp(prefix="lacuna-walk-"))
        self.folder.chmod(0o711)
        self._bridge = f"lacw{os.getpid()}"
        self.machines: list[FreshMachine] = []

    def __enter__(self) -> MachineNetwork:
        for words in (
            ["netns", "add", self._bridge],
            ["-n", self._bridge, "link", "add", "br0", "type", "bridge"],
            ["-n", self._bridge, "link", "set", "br0", "up"],
        ):
            subprocess.run(["ip", *words], check=True, capture_output=True)
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.close()
        subprocess.run(["ip", "netns", "del", self._bridge], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str) -> FreshMachine:
        address = f"{self.SUBNET}.{len(self.machines) + 1}"
        machine = FreshMachine(name, self.folder / name, bridge=self._bridge, address=address)
        self.machines.append(machine)
        return machine


def _until(holds: Callable[[], bool], otherwise: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(otherwise)
        time.sleep(0.1)
