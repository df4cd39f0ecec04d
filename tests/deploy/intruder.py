"""Tries things that must not work, wherever it is started, and says in a word what stopped each of them.

Runs by itself (``python intruder.py ACTIONS.json``), as whatever user in whatever namespace, and is also in
the hostile app bundle that a coordinator sends to hospitals. Standard library alone; no tests of its own.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 20.0


def perform(action: dict[str, Any]) -> str:
    """What came of one action: ``succeeded`` (bad), or what refused it."""
    try:
        return str(ACTIONS[action["do"]](action))
    except TimeoutError:
        return "timeout"
    except ssl.SSLError as error:
        return f"tls: {error.reason}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def connect(action: dict[str, Any]) -> str:
    with socket.create_connection((action["host"], action["port"]), timeout=5):
        return "succeeded"


def https(action: dict[str, Any]) -> str:
    connection = http.client.HTTPSConnection(
        action["host"], action["port"], timeout=TIMEOUT_S, context=_context(action)
    )
    try:
        body = b"x" * action.get("body_bytes", 0)
        try:
            connection.request(
                action.get("method", "POST"), action["path"], body=body, headers=action.get("headers", {})
            )
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            return "closed"
        answer = connection.getresponse()
        return _reason(answer.status, answer.read())
    except http.client.RemoteDisconnected:
        return "closed"
    finally:
        connection.close()


def plain(action: dict[str, Any]) -> str:
    with socket.create_connection((action["host"], action["port"]), timeout=TIMEOUT_S) as link:
        headers = {"Host": "x", "Content-Length": "0", **action.get("headers", {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        link.sendall(f"POST {action['path']} HTTP/1.1\r\n{lines}\r\n".encode())
        head, _, body = link.recv(65536).partition(b"\r\n\r\n")
        return _reason(int(head.split()[1]), body)


def slow(action: dict[str, Any]) -> str:
    """A request that begins and does not go on."""
    with _link(action) as link:
        link.sendall(_request(action, action.get("length", 0)) + b"x" if action["part"] == "body"
                     else b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")  # fmt: skip
        started, answer = time.monotonic(), b""
        try:
            while data := link.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        if b" 200 " in answer:
            return "succeeded"
        return "given_up" if time.monotonic() - started < TIMEOUT_S else "held"


def flood(action: dict[str, Any]) -> str:
    """Requests down eight connections, far faster than any SuperNode."""
    answers: list[bytes] = []

    def pour() -> None:
        with contextlib.suppress(OSError), _link(action) as link:
            for _ in range(20):
                link.sendall(_request(action, 0) * 25)
                answers.append(link.recv(1 << 20))
                if b"too_many" in answers[-1]:
                    return

    threads = [threading.Thread(target=pour) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "too_many" if any(b"too_many" in answer for answer in answers) else "succeeded"


def read(action: dict[str, Any]) -> str:
    path = Path(action["path"])
    if path.is_dir():
        list(path.iterdir())
    else:
        path.read_bytes()
    return "succeeded"


def write(action: dict[str, Any]) -> str:
    with Path(action["path"]).open("ab"):
        return "succeeded"


def signal(action: dict[str, Any]) -> str:
    os.kill(action["pid"], 0)
    return "succeeded"


def knock(action: dict[str, Any]) -> str:
    """Connect to a unix socket and see whether anybody answers there."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(TIMEOUT_S)
        link.connect(action["path"])
        try:
            link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            return "succeeded" if link.recv(1) else "closed"
        except (ConnectionResetError, BrokenPipeError):
            return "closed"


def run(action: dict[str, Any]) -> str:
    done = subprocess.run(
        action["argv"], env={**os.environ, **action.get("env", {})}, capture_output=True, text=True,
        check=False, timeout=180, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode == 0 and '"success": false' not in done.stdout:
        return "succeeded"
    words = done.stdout + done.stderr
    for reason in ("not_served", "certificate_missing", "Connection refused", "404", "403"):
        if reason in words:
            return reason.lower().replace(" ", "_")
    return "failed"


ACTIONS = {
    "connect": connect, "https": https, "plain": plain, "slow": slow, "flood": flood, "read": read,
    "write": write, "signal": signal, "knock": knock, "run": run,
}  # fmt: skip


def _context(action: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=action["ca"])
    if "certificate" in action:
        context.load_cert_chain(action["certificate"], action["key"])
    if action.get("old_tls"):
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def _link(action: dict[str, Any]) -> ssl.SSLSocket:
    raw = socket.create_connection((action["host"], action["port"]), timeout=TIMEOUT_S)
    return _context(action).wrap_socket(raw, server_hostname=action["host"])


def _request(action: dict[str, Any], length: int) -> bytes:
    headers = "".join(f"{name}: {value}\r\n" for name, value in action.get("headers", {}).items())
    return (
        f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n"
    ).encode()


def _reason(status: int, body: bytes) -> str:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if isinstance(value, dict) and "refused" in value:
        return str(value["refused"])
    return "succeeded" if status < 400 else f"http {status}"


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([perform(action) for action in wanted]))
