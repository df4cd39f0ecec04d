"""An Orthanc that wants a password by HTTP and TLS by C-GET: who has them is let in, others are told."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
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
    save_key,
    to_pem,
)
from shared.errors import UsageError

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
        save_key(key, root / f"{name}.key")
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
