"""Both perimeters as real nginx processes on loopback, around a server that says what reached it.

(No tests of its own.) Everything is made by the product: authority, certificates, configuration.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from loopback_ports import free_port

from client.site_home import SiteHome, init_site
from client.site_network import SiteNetwork
from client.site_policy import save_policy
from deploy.perimeter import Limits, write_coordinator_perimeter, write_site_perimeter
from server.coordinator_home import CoordinatorHome
from shared.node_keys import node_key_header
from shared.site_certificate import sign_certificate


def find_program(name: str, package: str) -> str:
    """Skip, with the reason, where it is missing; fail where LACUNA_REQUIRE_SERVERS forbids that."""
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if program is None:
        reason = f"{name} is not installed (Debian: apt-get install {package})"
        if os.environ.get("LACUNA_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return program


class EchoSuperLink:
    """A TLS server on loopback in the SuperLink's place; it answers with what it was asked, and counts."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.seen: list[str] = []
        self.status = 200
        seen, echo = self.seen, self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                seen.append(self.path)
                answer = json.dumps({"path": self.path, "bytes": len(body)}).encode()
                self.send_response(echo.status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._folder = folder
        self._handler = Handler

    def start(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._folder / "superlink.pem", self._folder / "superlink.key")
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Nginx:
    """nginx with one configuration. A prefix of its own takes logs and temporary files."""

    def __init__(self, configuration: Path, prefix: Path) -> None:
        prefix.mkdir(exist_ok=True)
        program = find_program("nginx", "nginx")
        self._command = [program, "-e", "stderr", "-p", f"{prefix}/", "-c", str(configuration)]
        if os.geteuid() == 0:
            self._command += [
                "-g",
                "user root;",
            ]  # the prefix is root's; elsewhere nginx has a user of its own
        self.prefix = prefix

    def check(self) -> None:
        done = subprocess.run([*self._command, "-t"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def start(self, port: int) -> None:
        self.check()
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self._process.poll() is None, (self.prefix / "error.log").read_text()
            assert time.monotonic() < deadline, "nginx does not listen"
            time.sleep(0.05)

    def reload(self) -> None:
        """New workers, from the configuration as it is now; returns when the old ones are gone."""

        def workers() -> set[str]:
            text = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
            return set(text.split())

        before = workers()
        subprocess.run([*self._command, "-s", "reload"], check=True, capture_output=True)
        deadline = time.monotonic() + 20
        while workers() & before or not workers():
            assert time.monotonic() < deadline, "the old workers stay"
            time.sleep(0.05)

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.prefix / "access.jsonl").read_text().splitlines()]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@dataclass
class Site:
    """One enrolled hospital."""

    network: SiteNetwork
    folder: Path
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.network.home.site_id


class PerimeterPair:
    """A coordinator's perimeter with an echo behind it, and enrolled sites with theirs."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, limits: Limits | None = None) -> None:
        self.root, self._monkeypatch, self._limits = root, monkeypatch, limits
        self.port = free_port()
        self.home = CoordinatorHome(root / "coordinator")
        self.home.init("study")
        self.home.authority.create(address=f"127.0.0.1:{self.port}")
        self.folder = root / "perimeter"
        self.superlink = EchoSuperLink(self.folder / "superlink")
        self.write()
        self.superlink.start()
        self.nginx = Nginx(self.folder / "perimeter" / "nginx.conf", root / "prefix")
        self.nginx.start(self.port)
        self._sites: list[Nginx] = []

    def write(self, *, limits: Limits | None = None) -> tuple[str, ...]:
        return write_coordinator_perimeter(
            self.home,
            self.folder,
            listen=f"127.0.0.1:{self.port}",
            superlink_port=self.superlink.port,
            limits=limits or self._limits,
        )

    def enrol(self, name: str) -> Site:
        self._monkeypatch.setenv("LACUNA_COUNTER_DIR", str(self.root / "counters" / name))
        home = SiteHome(self.root / name / "site")
        init_site(home, name=name)
        pinned = home.policy().pinned("coordinator", self.home.key().verify_key.fingerprint)
        save_policy(pinned, home.policy_path)
        network = SiteNetwork(home)
        request = network.request()
        self.home.enrol("study", request, fingerprint=home.identity().verify_key.fingerprint)
        network.install(sign_certificate(self.home.certify(request), self.home.key()))
        site = Site(network, self.root / f"{name}-perimeter", free_port())
        write_site_perimeter(network, site.folder, listen=f"127.0.0.1:{site.port}")
        public = network.node_key.with_suffix(".pub").read_text()
        site.headers = {"flwr-public-key": node_key_header(public)}
        return site

    def start_site(self, site: Site) -> Nginx:
        nginx = Nginx(site.folder / "perimeter" / "nginx.conf", self.root / f"{site.name}-prefix")
        nginx.start(site.port)
        self._sites.append(nginx)
        return nginx

    def stop(self) -> None:
        for nginx in self._sites:
            nginx.stop()
        self.nginx.stop()
        self.superlink.stop()


def certificate_context(
    authority: Path, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority))
    if certificate is not None and key is not None:
        context.load_cert_chain(certificate, key)
    return context


def ask(
    port: int,
    context: ssl.SSLContext,
    path: str,
    *,
    method: str = "POST",
    body: bytes = b"",
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one request."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()
