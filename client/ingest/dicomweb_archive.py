"""A PACS by DICOMweb (PS3.18): QIDO-RS to find, WADO-RS to fetch, as objects are stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import requests
from dicomweb_client import DICOMwebClient

from client.ingest.pacs import NotRetrievedError, PacsError, RemoteSeries, object_file
from shared.errors import UsageError

TIMEOUT_S = 60
_STORED = (("application/dicom", "*"),)
_NO_ENTRY = (401, 403)
_FIELDS = [
    "Modality",
    "BodyPartExamined",
    "SeriesDescription",
    "SeriesNumber",
    "NumberOfSeriesRelatedInstances",
]
_TAGS = {
    "PatientID": "00100020", "StudyInstanceUID": "0020000D", "SeriesInstanceUID": "0020000E",
    "Modality": "00080060", "BodyPartExamined": "00180015", "SeriesDescription": "0008103E",
    "SeriesNumber": "00200011", "NumberOfSeriesRelatedInstances": "00201209",
}  # fmt: skip


class DicomWebArchive:
    """An archive at a DICOMweb address.

    Names and passwords come from ``~/.netrc`` as for every client built on ``requests``.

    Args:
        url: Root of the services, as ``https://pacs.hospital.example/dicom-web``.
        token_file: File with a bearer token.
        authority: Certificates (PEM) that the server's is checked against; None is the system's.
        certificate, key: Our own certificate and key (PEM), where the server asks for one.

    Raises:
        UsageError: the address or the token's file cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token_file: Path | None = None,
        authority: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is not an address of a DICOMweb service (https://...)")
        session = _Session()
        if authority is not None:
            session.verify = str(authority)
        if certificate is not None:
            session.cert = str(certificate) if key is None else (str(certificate), str(key))
        if token_file is not None:
            try:
                token = token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"token file {token_file} cannot be read: {error}") from error
            session.headers["Authorization"] = f"Bearer {token}"
        self._url = url
        with self._translated():
            self._client = DICOMwebClient(url, session=session, timeout=TIMEOUT_S)
        self._client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=250)

    def find(self, patient_id: str | None, modalities: frozenset[str]) -> Iterable[RemoteSeries]:
        """Series by way of the studies, which every server can answer; see :class:`Archive`."""
        filters = {} if patient_id is None else {"PatientID": patient_id}
        with self._translated():
            studies = self._client.search_for_studies(
                search_filters=filters, fields=["PatientID"], get_remaining=True
            )
            for study in studies:
                found = self._client.search_for_series(
                    _value(study, "StudyInstanceUID"), fields=_FIELDS, get_remaining=True
                )
                for series in found:
                    yield RemoteSeries.described(partial(_value, study), partial(_value, series))

    def fetch(self, series: RemoteSeries, folder: Path) -> None:
        """See :class:`Archive`."""
        with self._translated(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                objects = self._client.iter_series(series.study_uid, series.series_uid, media_types=_STORED)
                for dataset in objects:
                    path = folder / object_file(str(dataset.get("SOPInstanceUID")))
                    dataset.save_as(path, enforce_file_format=True)
            except requests.HTTPError as error:
                status = 0 if error.response is None else error.response.status_code
                if status in _NO_ENTRY:
                    raise
                raise NotRetrievedError(f"the archive answered with status {status}") from error
            except (ValueError, AttributeError, KeyError, TypeError, EOFError) as error:
                raise NotRetrievedError(f"what arrived is no DICOM object ({error})") from error

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except requests.HTTPError as error:
            status = 0 if error.response is None else error.response.status_code
            refused = "does not let us in" if status in _NO_ENTRY else "answers with an error"
            raise PacsError(
                f"{self._url}: the archive {refused} (status {status})",
                remedy="check the address, and the name and password in ~/.netrc or the token file",
            ) from error
        except requests.RequestException as error:
            raise PacsError(
                f"{self._url}: the archive cannot be used ({type(error).__name__})",
                remedy="check address and network, then import again: what was fetched is kept",
            ) from error


class _Session(requests.Session):  # type: ignore[misc] # requests is not typed
    """A session whose own authority counts, and not REQUESTS_CA_BUNDLE, where one was given."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        own = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, own, cert)


def _value(answer: dict[str, Any], keyword: str) -> str:
    """First value of an attribute in DICOM JSON (PS3.18, F.2); empty where there is none."""
    values = answer.get(_TAGS[keyword], {}).get("Value") or [""]
    return str(values[0]).strip()
