"""A PACS by the classic DICOM protocol (PS3.4, C): C-FIND to find, C-GET to fetch.

C-GET sends objects back on the connection that asked for them, so the archive needs no address of ours, and
no port of the hospital's engineer is open to anybody. Objects are written byte by byte as they came.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
)

from client.ingest.pacs import NotRetrievedError, PacsError, RemoteSeries, object_file
from shared.errors import UsageError

TIMEOUT_S = 60
MAX_CONTEXTS = 127
"""Presentation contexts of one association, less the one for C-GET (PS3.8, 9.3.2.2)."""

SYNTAXES = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian,
    RLELossless, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless,
    JPEGLSNearLossless, JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K,
)  # fmt: skip
"""Transfer syntaxes that the import can decode; offered one to a context, so each object comes as stored."""

_PENDING = (0xFF00, 0xFF01)
_ADDRESS = re.compile(r"(?P<title>[^@]{1,16})@(?P<host>[^@:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


class DimseArchive:
    """An archive at an application entity.

    Args:
        address: ``AET@HOST:PORT``.
        own_title: Our own application entity title, as the archive knows it.
        authority: Certificates (PEM) that the archive's is checked against; None is no TLS.
        certificate, key: Our own certificate and key (PEM), with ``authority``.

    Raises:
        UsageError: the address or a certificate cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        own_title: str = "LACUNA",
        authority: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        parsed = _ADDRESS.fullmatch(address)
        if parsed is None or not 0 < int(parsed["port"]) < 65536:
            raise UsageError(f"{address!r} is not the address of an archive: AET@HOST:PORT")
        self._address = address
        self._title, self._host, self._port = parsed["title"], parsed["host"].strip("[]"), int(parsed["port"])
        self._own_title = own_title
        self._tls: tuple[ssl.SSLContext, str] | None = None
        if authority is None:
            return
        try:
            context = ssl.create_default_context(cafile=authority)
            if certificate is not None:
                context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"certificates for {address} cannot be used: {error}") from error
        self._tls = (context, self._host)

    def find(self, patient_id: str | None, modalities: frozenset[str]) -> Iterable[RemoteSeries]:
        """Studies first, then the series of each, as hierarchical archives want it; see :class:`Archive`."""
        if patient_id is not None and re.search(r"[*?\\]", patient_id):
            raise UsageError(f"patient id {patient_id!r} has a character that is a wildcard in C-FIND")
        entity = self._entity()
        entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
        with self._association(entity) as association:
            studies = self._ask(
                association, "STUDY", PatientID=patient_id or "", StudyInstanceUID="", ModalitiesInStudy=""
            )
            for study in studies:
                present = {str(one).upper() for one in _several(study.get("ModalitiesInStudy"))}
                if modalities and present and not present & {one.upper() for one in modalities}:
                    continue
                for series in self._ask(
                    association, "SERIES", StudyInstanceUID=study.StudyInstanceUID, SeriesInstanceUID="",
                    Modality="", BodyPartExamined="", SeriesDescription="", SeriesNumber="",
                    NumberOfSeriesRelatedInstances="",
                ):  # fmt: skip
                    yield RemoteSeries.described(partial(_text, study), partial(_text, series))

    def fetch(self, series: RemoteSeries, folder: Path) -> None:
        """See :class:`Archive`."""
        classes = self._classes(series)
        entity = self._entity()
        entity.add_requested_context(StudyRootQueryRetrieveInformationModelGet)
        apart = len(classes) * len(SYNTAXES) <= MAX_CONTEXTS
        for class_uid in classes:
            for syntaxes in [[one] for one in SYNTAXES] if apart else [list(SYNTAXES)]:
                entity.add_requested_context(class_uid, syntaxes)
        failures: list[str] = []

        def keep(event: Any) -> int:
            try:
                name = object_file(str(event.request.AffectedSOPInstanceUID))
                (folder / name).write_bytes(event.encoded_dataset())
            except (OSError, NotRetrievedError) as error:
                failures.append(str(error))
                return 0xA700  # out of resources (PS3.4, B.2.3)
            return 0x0000

        roles = [build_role(class_uid, scp_role=True) for class_uid in classes]
        query = Dataset()
        query.QueryRetrieveLevel = "SERIES"
        query.StudyInstanceUID = series.study_uid
        query.SeriesInstanceUID = series.series_uid
        with self._association(entity, roles=roles, handlers=[(evt.EVT_C_STORE, keep)]) as association:
            last = None
            for status, _ in association.send_c_get(query, StudyRootQueryRetrieveInformationModelGet):
                last = status
        if failures:
            raise PacsError(f"an object cannot be kept: {failures[0]}")
        if not last:
            raise PacsError(f"{self._address}: the archive broke the connection off")
        if last.Status != 0x0000:
            failed = last.get("NumberOfFailedSuboperations")
            said = f"status 0x{last.Status:04X}" + (f", {failed} objects failed" if failed else "")
            raise NotRetrievedError(f"the archive answered with {said}")

    def _classes(self, series: RemoteSeries) -> list[str]:
        """SOP classes of a series' objects: only what is negotiated can be sent."""
        entity = self._entity()
        entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
        with self._association(entity) as association:
            answers = self._ask(
                association, "IMAGE", StudyInstanceUID=series.study_uid, SeriesInstanceUID=series.series_uid,
                SOPInstanceUID="", SOPClassUID="",
            )  # fmt: skip
        classes = sorted({str(answer.get("SOPClassUID") or "") for answer in answers} - {""})
        if not classes:
            raise NotRetrievedError("the archive names no objects of it")
        return classes

    def _entity(self) -> Any:
        entity = AE(ae_title=self._own_title)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT_S
        entity.connection_timeout = 15
        return entity

    @contextmanager
    def _association(self, entity: Any, *, roles: Any = None, handlers: Any = None) -> Iterator[Any]:
        association = entity.associate(
            self._host, self._port, ae_title=self._title, ext_neg=roles, evt_handlers=handlers,
            tls_args=self._tls,
        )  # fmt: skip
        if not association.is_established:
            what = "rejects us" if association.is_rejected else "cannot be reached"
            raise PacsError(
                f"{self._address}: the archive {what}",
                remedy=f"check address and titles (we call ourselves {self._own_title}), then import again",
            )
        try:
            yield association
        finally:
            if association.is_established:
                association.release()

    def _ask(self, association: Any, level: str, **keys: str) -> list[Any]:
        query = Dataset()
        query.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(query, keyword, value)
        answers = []
        for status, answer in association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
            if not status:
                raise PacsError(f"{self._address}: the archive broke the connection off")
            if status.Status in _PENDING and answer is not None:
                answers.append(answer)
            elif status.Status != 0x0000:
                raise PacsError(f"{self._address}: the archive answers C-FIND with 0x{status.Status:04X}")
        return answers


def _text(answer: Any, keyword: str) -> str:
    value = answer.get(keyword)
    return "" if value is None else str(value).strip()


def _several(value: Any) -> list[Any]:
    if value in (None, ""):
        return []
    return [value] if isinstance(value, str) else list(value)
