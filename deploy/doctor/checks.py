"""Checks that both sides share: each says what it found, and how to mend it.

A check never changes anything and never raises: what cannot be looked at is a finding of its own.
"""

from __future__ import annotations

import ctypes
import http.client
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from shared.errors import LacunaError

State = Literal["good", "look", "bad"]

WARN_DAYS = 30
MIN_FREE_BYTES = 5 * 2**30
CLOCK_AHEAD_S, CLOCK_BEHIND_S = 5.0, 300.0
"""Flower's SuperLink refuses a SuperNode whose clock is further ahead or behind (1.41, node_auth)."""

STA_UNSYNC = 0x40
"""Of adjtimex(2): the clock is not synchronised."""

CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of a doctor: ``mend`` says what to do where ``state`` is not good."""

    name: str
    state: State
    found: str
    mend: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def good(name: str, found: str) -> Finding:
    return Finding(name=name, state="good", found=found)


def look(name: str, found: str, mend: str) -> Finding:
    return Finding(name=name, state="look", found=found, mend=mend)


def bad(name: str, found: str, mend: str) -> Finding:
    return Finding(name=name, state="bad", found=found, mend=mend)


def examine(checks: Iterable[tuple[str, Callable[[], Finding]]]) -> list[Finding]:
    """Run checks one after another; what one of them raises becomes its finding."""
    found = []
    for name, check in checks:
        try:
            found.append(check())
        except LacunaError as error:
            found.append(bad(name, error.message, error.remedy or "see deploy/OPERATING.md"))
        except OSError as error:
            found.append(
                bad(
                    name,
                    f"cannot be looked at: {error}",
                    "run the doctor as root: each part has its user",
                )
            )
    return found


def expiry(
    name: str, not_after: datetime, *, mend: str, now: datetime, warn_days: int = WARN_DAYS
) -> Finding:
    """How long something holds."""
    left = (not_after - now).total_seconds() / 86_400
    words = f"until {not_after:%Y-%m-%d}, {left:.0f} days"
    if left <= 0:
        return bad(name, f"ended on {not_after:%Y-%m-%d}", mend)
    return look(name, words, mend) if left < warn_days else good(name, words)


def versions() -> Finding:
    """Lacuna, Flower and Python of this installation."""
    try:
        flower = version("flwr")
    except PackageNotFoundError:
        return bad("versions", "Flower is not installed", "install lacuna with the extra of your role")
    words = f"lacuna {version('lacuna')}, flwr {flower}"
    if not flower.startswith("1.41."):
        return bad("versions", words, "install flwr 1.41, with the versions of constraints.txt")
    return good("versions", words)


def disk(path: Path) -> Finding:
    """Room where the state is."""
    free = shutil.disk_usage(path).free
    words = f"{free / 2**30:.1f} GiB free in {path}"
    if free < MIN_FREE_BYTES:
        mend = (
            f"make room: at least {MIN_FREE_BYTES // 2**30} GiB; a full disk stops the study, not the budget"
        )
        return bad("disk", words, mend)
    return good("disk", words)


def port(name: str, host: str, number: int, *, mend: str) -> Finding:
    """Whether somebody listens."""
    try:
        with socket.create_connection((host, number), timeout=CONNECT_TIMEOUT_S):
            return good(name, f"{host}:{number} is open")
    except OSError as error:
        return bad(name, f"{host}:{number}: {error.strerror or error}", mend)


def clock_offset_s(host: str, number: int, context: ssl.SSLContext, server_name: str) -> float:
    """Seconds that this machine's clock is ahead of a server's, by its HTTP date. Raises OSError."""
    connection = http.client.HTTPSConnection(host, number, timeout=CONNECT_TIMEOUT_S, context=context)
    try:
        raw = socket.create_connection((host, number), timeout=CONNECT_TIMEOUT_S)
        connection.sock = context.wrap_socket(raw, server_hostname=server_name)
        before = datetime.now(UTC)
        connection.request("GET", "/")
        answer = connection.getresponse()
        after = datetime.now(UTC)
        date = answer.headers.get("date")
        if date is None:
            raise OSError("the server's answer has no date")
        middle = before + (after - before) / 2
        return (middle - parsedate_to_datetime(date)).total_seconds()
    finally:
        connection.close()


def clock(offset_s: float) -> Finding:
    """Whether Flower takes this clock. HTTP dates have whole seconds."""
    words = f"{abs(offset_s):.0f} s {'ahead of' if offset_s >= 0 else 'behind'} the coordinator's"
    mend = "let both machines keep time: systemd-timesyncd or chrony"
    if offset_s > CLOCK_AHEAD_S or offset_s < -CLOCK_BEHIND_S:
        return bad("clock", f"{words}; Flower refuses this SuperNode", mend)
    return look("clock", words, mend) if abs(offset_s) > 2 else good("clock", words)


class _Timex(ctypes.Structure):
    """``struct timex`` of adjtimex(2); what follows ``status`` is not read."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("max_error_us", ctypes.c_long),
        ("estimated_error_us", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def clock_error_s() -> float | None:
    """How far this machine's clock may be off, as the kernel was told by whoever keeps it (adjtimex(2)).

    None where nobody does: no NTP client, or one that reaches no server. Raises OSError.
    """
    now = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(now)) < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return None if now.status & STA_UNSYNC else now.max_error_us / 1e6


def synchronised() -> Finding:
    """Whether somebody keeps this machine's clock. Hospitals' clocks are compared with it."""
    error_s = clock_error_s()
    mend = "let this machine keep time: systemd-timesyncd or chrony; Flower refuses a SuperNode 5 s ahead"
    if error_s is None:
        return look("clock", "nobody keeps it (the kernel calls it not synchronised)", mend)
    words = f"synchronised, at most {error_s:.1f} s off"
    return look("clock", words, mend) if error_s > CLOCK_AHEAD_S else good("clock", words)


def gpu(device: str) -> Finding:
    """The GPU that the agent is to use, by the driver's own tool."""
    if not device.startswith("cuda"):
        return good("device", f"{device}; no GPU is asked for")
    program = shutil.which("nvidia-smi")
    if program is None:
        mend = "install the NVIDIA driver, or serve with --device cpu"
        return bad("device", "nvidia-smi is not there", mend)
    query = [program, "--query-gpu=name,memory.free", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode != 0:
        return bad("device", done.stderr.strip()[:200] or "nvidia-smi failed", "mend the driver (nvidia-smi)")
    return good("device", done.stdout.strip().replace("\n", "; "))


def report(findings: Iterable[Finding]) -> dict[str, Any]:
    """For ``--json``: the findings, and whether nothing is bad."""
    listed = list(findings)
    return {
        "findings": [finding.to_dict() for finding in listed],
        "fit": all(finding.state != "bad" for finding in listed),
    }
