"""A real PACS on loopback: Orthanc from Debian, with DICOMweb, on free ports. (No tests of its own.)"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from loopback_ports import free_ports

PROGRAM = Path("/usr/sbin/Orthanc")
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Orthanc:
    """A running server.

    Attributes:
        web: Address of its REST interface; DICOMweb is under ``/dicom-web``.
        dimse: ``AET@HOST:PORT``.
    """

    def __init__(self, http_port: int, dicom_port: int, user: tuple[str, str] | None) -> None:
        self.web = f"http://127.0.0.1:{http_port}"
        self.dicomweb = f"{self.web}/dicom-web"
        self.dimse = f"ORTHANC@127.0.0.1:{dicom_port}"
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.auth = user

    def store(self, paths: Iterable[Path]) -> list[Path]:
        """Upload files; returns those that Orthanc does not take."""
        refused = []
        for path in paths:
            reply = self._session.post(f"{self.web}/instances", data=path.read_bytes(), timeout=60)
            if reply.status_code != 200 or reply.json()["Status"] not in ("Success", "AlreadyStored"):
                refused.append(path)
        return refused

    def answers(self) -> bool:
        try:
            return self._session.get(f"{self.web}/system", timeout=1).status_code == 200
        except requests.RequestException:
            return False


@contextmanager
def running_orthanc(
    folder: Path, *, user: tuple[str, str] | None = None, **options: object
) -> Iterator[Orthanc]:
    """Start Orthanc and stop it; ``options`` go into its configuration.

    ``user`` is a name and a password that its HTTP side asks for.

    Skip, with the reason, where it is not installed; fail where LACUNA_REQUIRE_SERVERS forbids that.
    """
    if not PROGRAM.exists() or not DICOMWEB.exists():
        reason = "no Orthanc (Debian: apt-get install orthanc orthanc-dicomweb)"
        if os.environ.get("LACUNA_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    http_port, dicom_port = free_ports(2)
    configuration = {
        "Name": "test", "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(DICOMWEB)], "HttpPort": http_port, "DicomPort": dicom_port, "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False, "AuthenticationEnabled": user is not None, "DicomAlwaysAllowGet": True,
        "DicomAlwaysAllowFind": True, "DicomCheckCalledAet": True, "DicomThreadsCount": 2,
        "HttpBindAddresses": ["127.0.0.1"], "StableAge": 1, "RegisteredUsers": dict([user] if user else []),
        **options,
    }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration))
    server = Orthanc(http_port, dicom_port, user)
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen([PROGRAM, str(path)], stdout=log, stderr=log, cwd=folder)
        try:
            deadline = time.monotonic() + 60
            while not server.answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"Orthanc does not start: {(folder / 'orthanc.log').read_text()[-2000:]}")
                time.sleep(0.05)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=60)
