"""An Orthanc that wants a password by HTTP and TLS by C-GET: who has them is let in, others are told."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import certifi
import numpy as np
import pytest
import requests
from dicom_series import Series, blob
from orthanc_server import Orthanc, running_orthanc

from client.ingest.dicom_volume import DicomSeries
from client.ingest.dicomweb_archive import DicomWebArchive
from client.ingest.dimse_archive import DimseArchive
from client.ingest.pacs import Archive, PacsError
from shared.certificates import (
    issue_server_certificate,
    issue_site_certificate,
    make_authority,
    new_key,
    to_pem,
)
from shared.errors import UsageError
from shared.private_keys import save_private_key

PASSWORD = "correct horse"  # of a server on loopback that lives for seconds


class Locked:
    """The server, its authority's certificate, and a pair of ours that the authority signed."""

    def __init__(self, server: Orthanc, keys: Path, series: Series) -> None:
        self.server, self.series = server, series
        self.authority = keys / "ca.pem"
        self.certificate, self.key = keys / "engineer.pem", keys / "engineer.key"


def make_keys(root: Path) -> None:
    """One authority; a certificate for the server on loopback, and one for the engineer."""
    now, valid_for = datetime.now(UTC), timedelta(days=1)
    authority = make_authority("test hospital", now=now, valid_for=valid_for)
    keys = {"orthanc": new_key(), "engineer": new_key()}
    public = {name: key.public_key() for name, key in keys.items()}
    certificates = {
        "orthanc": issue_server_certificate(
            authority, public["orthanc"], hosts=("127.0.0.1",), now=now, valid_for=valid_for
        ),
        "engineer": issue_site_certificate(
            authority, public["engineer"], name="engineer", now=now, valid_for=valid_for
        ),
    }
    (root / "ca.pem").write_bytes(to_pem(authority.certificate))
    for name, key in keys.items():
        save_private_key(key, root / f"{name}.key")
        (root / f"{name}.pem").write_bytes(to_pem(certificates[name]))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    root = tmp_path_factory.mktemp("locked")
    (root / "orthanc").mkdir()
    make_keys(root)
    series = Series(voxels=blob((6, 16, 16))[0])
    with running_orthanc(
        root / "orthanc",
        user=("engineer", PASSWORD),
        DicomTlsEnabled=True,
        DicomTlsCertificate=str(root / "orthanc.pem"),
        DicomTlsPrivateKey=str(root / "orthanc.key"),
        DicomTlsTrustedCertificates=str(root / "ca.pem"),
    ) as server:
        assert server.store(series.write(root / "series")) == []
        yield Locked(server, root, series)


def netrc(path: Path, password: str) -> Path:
    path.write_text(f"machine 127.0.0.1 login engineer password {password!r}\n".replace("'", '"'))
    path.chmod(0o600)
    return path


def fetched(archive: Archive, folder: Path, series: Series) -> np.ndarray:
    folder.mkdir()
    (remote,) = archive.find(series.patient_id, frozenset())
    archive.fetch(remote, folder)
    return DicomSeries(series_uid=series.uid, paths=tuple(folder.iterdir())).read().volume.voxels_DHW


def test_dicomweb_with_a_password_from_netrc(
    locked: Locked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(netrc(tmp_path / "netrc", PASSWORD)))
    archive = DicomWebArchive(locked.server.dicomweb)
    np.testing.assert_array_equal(fetched(archive, tmp_path / "in", locked.series), locked.series.voxels)


@contextmanager
def behind_tls(locked: Locked) -> Iterator[str]:
    """The archive's DICOMweb behind a TLS proxy, as hospitals have it; yields its address."""

    class Forward(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name: self.headers[name] for name in ("Accept", "Authorization") if self.headers[name]}
            reply = requests.get(f"{locked.server.web}{self.path}", headers=headers, timeout=60)
            self.send_response(reply.status_code)
            self.send_header("Content-Type", reply.headers["Content-Type"])
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        locked.authority.with_name("orthanc.pem"), locked.authority.with_name("orthanc.key")
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Forward) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}/dicom-web"
        finally:
            server.shutdown()
            thread.join()


def test_https_trusts_the_authority_that_was_named_and_no_other(
    locked: Locked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(netrc(tmp_path / "netrc", PASSWORD)))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certifi.where())  # must not take the place of ours
    with behind_tls(locked) as address:
        archive = DicomWebArchive(address, authority=locked.authority)
        np.testing.assert_array_equal(fetched(archive, tmp_path / "in", locked.series), locked.series.voxels)
        with pytest.raises(PacsError, match="SSLError"):
            list(DicomWebArchive(address).find(None, frozenset()))


def test_a_wrong_password_or_token_is_said(
    locked: Locked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(netrc(tmp_path / "netrc", "wrong")))
    token = tmp_path / "token"
    token.write_text("abc\n")
    for archive in (
        DicomWebArchive(locked.server.dicomweb),
        DicomWebArchive(locked.server.dicomweb, token_file=token),
    ):
        with pytest.raises(PacsError, match="does not let us in") as refusal:
            list(archive.find(None, frozenset()))
        assert "netrc" in str(refusal.value.remedy) and "wrong" not in refusal.value.diagnostics()


def test_c_get_with_tls_and_our_certificate(locked: Locked, tmp_path: Path) -> None:
    archive = DimseArchive(
        locked.server.dimse, authority=locked.authority, certificate=locked.certificate, key=locked.key
    )
    np.testing.assert_array_equal(fetched(archive, tmp_path / "in", locked.series), locked.series.voxels)


def test_c_get_without_tls_or_a_certificate_is_refused(locked: Locked, tmp_path: Path) -> None:
    for archive in (
        DimseArchive(locked.server.dimse),
        DimseArchive(locked.server.dimse, authority=locked.authority),
    ):
        with pytest.raises(PacsError, match="archive"):
            list(archive.find(None, frozenset()))
    with pytest.raises(UsageError, match="cannot be used"):
        DimseArchive(locked.server.dimse, authority=tmp_path / "nowhere.pem")
    with pytest.raises(UsageError, match="cannot be read"):
        DicomWebArchive(locked.server.dicomweb, token_file=tmp_path / "nowhere")
