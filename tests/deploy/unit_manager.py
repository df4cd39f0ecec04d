"""``systemctl`` of a machine that has no systemd: it starts what the unit files say. (No tests.)

    python unit_manager.py init                       process 1 of a machine: starts nothing, buries the dead
    python unit_manager.py systemctl WORDS...         enable --now, start, restart, reload, stop, status, ...
    python unit_manager.py journalctl -u UNIT

Of a unit it takes user and groups, environment, what is started before, capabilities, own folders,
``PrivateNetwork``, ``ProtectSystem=strict``, ``PrivateTmp``, ``InaccessiblePaths`` and the rules of restart.
System call filters, devices, ``IPAddressDeny`` and limits of memory are not made.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
STATE = Path("/run/unit-manager")
STOP_S = 20.0

CONFINED = """set -e
mount --make-rprivate /
keep="$1"; hide="$2"; shift 2
for path in $keep; do mount --bind "$path" "$path"; done
mount -t tmpfs -o mode=1777 tmpfs /tmp
for path in $hide; do
    if [ -d "$path" ]; then mount -t tmpfs -o mode=000 tmpfs "$path"
    elif [ -e "$path" ]; then mount --bind /dev/null "$path"; fi
done
while read -r _ _ _ _ point _; do
    case " $keep /tmp " in *" $point "*) continue;; esac
    case "$point" in /proc*|/sys*|/dev*) continue;; esac
    mount -o remount,bind,ro "$point" 2>/dev/null || true
done < /proc/self/mountinfo
exec "$@"
"""
"""The unit's view of the file system: read-only but for its own folders."""


class Unit:
    """One unit file, for one instance."""

    def __init__(self, name: str) -> None:
        self.name = name if name.endswith(".service") else f"{name}.service"
        stem, _, rest = self.name.partition("@")
        self.instance = rest.removesuffix(".service") if rest else ""
        path = UNITS / (f"{stem}@.service" if rest else self.name)
        if not path.is_file():
            sys.exit(f"Unit {self.name} not found.")
        self._settings: dict[str, list[str]] = {}
        for line in path.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self._settings.setdefault(key.strip(), []).append(value.strip().replace("%i", self.instance))

    def all(self, key: str) -> list[str]:
        return " ".join(self._settings.get(key, [])).split()

    def one(self, key: str, otherwise: str = "") -> str:
        return self._settings.get(key, [otherwise])[-1]

    @property
    def log(self) -> Path:
        return STATE / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        return STATE / f"{self.name}.pid"

    def environment(self) -> dict[str, str]:
        found = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for line in self._settings.get("Environment", []):
            found |= dict(word.partition("=")[::2] for word in shlex.split(line))
        for name in self._settings.get("EnvironmentFile", []):
            path = Path(name.lstrip("-"))
            if not path.exists():
                if name.startswith("-"):
                    continue
                raise FileNotFoundError(f"Failed to load environment files: {path}")
            for line in path.read_text().splitlines():
                if "=" in line and not line.startswith("#"):
                    key, _, value = line.partition("=")
                    found[key] = shlex.split(value)[0] if value[:1] in ("'", '"') else value
        return found

    def command(self) -> list[str]:
        """As the user without capabilities, in namespaces of its own."""
        user = pwd.getpwnam(self.one("User"))
        group = grp.getgrnam(self.one("Group", user.pw_name)).gr_gid
        members = {entry.gr_gid for entry in grp.getgrall() if user.pw_name in entry.gr_mem}
        more = sorted(members | {grp.getgrnam(name).gr_gid for name in self.all("SupplementaryGroups")})
        folders = []
        for kind, root, mode in (("State", "/var/lib", "0700"), ("Runtime", "/run", "0755")):
            for name in self.all(f"{kind}Directory"):
                folder = Path(root, name)
                folder.mkdir(exist_ok=True)
                folder.chmod(int(self.one(f"{kind}DirectoryMode", mode), 8))
                os.chown(folder, user.pw_uid, group)
                folders.append(str(folder))
        kept = [f"+{name.removeprefix('CAP_').lower()}" for name in self.all("CapabilityBoundingSet")]
        ambient = ["--ambient-caps=" + ",".join(kept)] if kept else []
        hidden = [path.lstrip("-") for path in self.all("InaccessiblePaths")]
        values = self.environment()
        words = [
            re.sub(r"\$\{(\w+)\}|\$MAINPID", lambda found: values[found[1]], word)
            for word in self.one("ExecStart").split()
        ]
        return [
            "unshare", "--mount", *(["--net"] if self.one("PrivateNetwork") == "yes" else []),
            "sh", "-c", CONFINED, "sh", " ".join(folders), " ".join(hidden),
            "setpriv", "--reuid", str(user.pw_uid), "--regid", str(group),
            *(["--groups", ",".join(map(str, more))] if more else ["--clear-groups"]),
            f"--bounding-set={','.join(['-all', *kept])}", f"--inh-caps={','.join(['-all', *kept])}",
            *ambient,
            "--no-new-privs", *words,
        ]  # fmt: skip

    def started(self) -> subprocess.Popen[bytes]:
        for line in self._settings.get("ExecStartPre", []):
            subprocess.run(line.lstrip("+").split(), check=True)
        return subprocess.Popen(
            self.command(),
            env=self.environment(),
            cwd="/",
            umask=int(self.one("UMask", "0022"), 8),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def starts_again(self, code: int) -> bool:
        if str(code) in self.all("RestartPreventExitStatus"):
            return False
        return {"always": True, "on-failure": code != 0}.get(self.one("Restart"), False)


def look_after(unit: Unit) -> None:
    """Start it, and start it again as it says; until SIGTERM. Runs in a process of its own."""
    STATE.mkdir(exist_ok=True)
    log = os.open(unit.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(log, number)
    running: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        for process in running:
            process.send_signal(getattr(signal, unit.one("KillSignal", "SIGTERM")))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            _kill_session(process.pid)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    while True:
        try:
            running = [unit.started()]
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{unit.name}: {error}", flush=True)
            code = 1
        else:
            unit.pid_file.write_text(f"{os.getpid()} {running[0].pid}")
            code = running[0].wait()
            _kill_session(running[0].pid)
            print(f"{unit.name}: Main process exited, code={code}", flush=True)
        running = []
        if not unit.starts_again(code):
            unit.pid_file.unlink(missing_ok=True)
            os._exit(0)
        time.sleep(float(unit.one("RestartSec", "0.1")))


def _kill_session(leader: int) -> None:
    """What a unit's main process left behind."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = int(path.read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def start(unit: Unit) -> None:
    if _pids(unit):
        return
    if os.fork() == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        look_after(unit)


def stop(unit: Unit) -> None:
    pids = _pids(unit)
    if not pids:
        return
    os.kill(pids[0], signal.SIGTERM)
    deadline = time.monotonic() + STOP_S + 5
    while Path(f"/proc/{pids[0]}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    unit.pid_file.unlink(missing_ok=True)


def _pids(unit: Unit) -> list[int]:
    """Of the process that looks after it, and its main process."""
    if not unit.pid_file.exists():
        return []
    pids = [int(word) for word in unit.pid_file.read_text().split()]
    return pids if Path(f"/proc/{pids[0]}").exists() else []


def systemctl(words: list[str]) -> int:
    options = {word for word in words if word.startswith("-")}
    verb, *names = [word for word in words if not word.startswith("-")]
    if unknown := options - {"--now", "--no-pager"}:
        sys.exit(f"systemctl: {unknown} is not known here")
    if verb == "daemon-reload" or (verb == "disable" and names == ["nginx"]):
        return 0
    for name in names:
        unit = Unit(name)
        match verb:
            case "enable" | "start":
                if verb == "start" or "--now" in options:
                    start(unit)
            case "disable" | "stop":
                if verb == "stop" or "--now" in options:
                    stop(unit)
            case "restart":
                stop(unit)
                start(unit)
            case "reload":
                pids = _pids(unit)
                if not pids:
                    sys.exit(f"{unit.name} is not active, cannot reload.")
                reload = unit.one("ExecReload").replace("$MAINPID", str(pids[1])).split()
                if not reload or subprocess.run(reload, check=False).returncode != 0:
                    sys.exit(f"{unit.name}: cannot be reloaded")
            case "status" | "is-active":
                print(f"{unit.name}: {'active (running)' if _pids(unit) else 'inactive (dead)'}")
                if not _pids(unit):
                    return 3
            case _:
                sys.exit(f"systemctl: {verb} is not known here")
    return 0


def journalctl(words: list[str]) -> int:
    for name in words[words.index("-u") + 1 : words.index("-u") + 2]:
        print(Unit(name).log.read_text(errors="replace"))
    return 0


def bury() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.5)


if __name__ == "__main__":
    match sys.argv[1]:
        case "init":
            bury()
        case "systemctl":
            sys.exit(systemctl(sys.argv[2:]))
        case "journalctl":
            sys.exit(journalctl(sys.argv[2:]))
