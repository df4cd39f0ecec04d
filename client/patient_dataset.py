"""The site's store: scans on the canonical grid, under keyed hashes, and who is held out.

Layout of the store's folder (0700)::

    site.key                32 secret bytes (0600), made once; its commitment is recorded before round 1
    grid.json               conditions, labels and canonical grid that the scans were imported for
    scans/HASH.safetensors  one scan: image, mask, and its row of the table as metadata

A scan and its row are one file, written to the side and renamed: an import that is killed leaves whole
scans, and the next import of the same source goes on with the rest. Neither the hospital's patient ids nor
the names of its files are in the store: patients, scans and contents appear as HMAC-SHA256 under the site's
key (DESIGN section 9, item 4, for the rule of who is held out).
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.ingest.quality import CheckedScan
from client.ingest.scan import ScanEntry
from shared.canonical import canonical_json, digest, framed, parse_json
from shared.checkpoint import load_tensors, save_tensors
from shared.errors import MalformedMessageError, SiteError
from shared.study_plan import DataClause
from shared.volumes.canonical_grid import CanonicalGrid, CanonicalScan

KEY_BYTES = 32

_FORMAT = "lacuna/site-scan/v1"


class StoreError(SiteError):
    """The store is missing, in use, damaged, or was filled for another grid."""


@dataclass(frozen=True, kw_only=True)
class StoredScan:
    """One row of the store's table.

    Attributes:
        scan_key: Keyed hash of the image's content (hexadecimal); the file's name.
        patient_key: Keyed hash of the hospital's patient id (hexadecimal).
        condition: Condition of the scan.
        mask_hmac: Keyed hash of the original mask's content (hexadecimal).
        holdout_draw: Number in [0, 1) from the keyed hash of the patient id; held out when below the share.
        label_voxels, lost_label_voxels: See :class:`CanonicalScan`.
        covariates: (name, value) of the plan's covariates that the scan has, ordered by name.
    """

    scan_key: str
    patient_key: str
    condition: str
    mask_hmac: str
    holdout_draw: float
    label_voxels: int
    lost_label_voxels: int
    covariates: tuple[tuple[str, str], ...] = ()


def is_held_out(site_key: bytes, patient_id: str, share: float) -> bool:
    """Whether a patient is held out: HMAC(site key, "holdout" || patient id) < share, as a number in [0, 1).

    Independent for each patient: nobody's role depends on who else is in the data.
    """
    return holdout_draw(site_key, patient_id) < share


def holdout_draw(site_key: bytes, patient_id: str) -> float:
    """The first 53 bits of the keyed hash, as a number in [0, 1)."""
    return (int.from_bytes(_hmac(site_key, "holdout", patient_id.encode())[:8], "big") >> 11) / 2.0**53


def _hmac(site_key: bytes, purpose: str, message: bytes) -> bytes:
    return hmac.digest(site_key, framed(f"lacuna/site/{purpose}/v1", message), "sha256")


class SiteStore:
    """A site's imported scans. Open it with :meth:`create` once, then with :meth:`open`."""

    def __init__(self, root: Path, site_key: bytes) -> None:
        self.root = root
        self._site_key = site_key

    def __repr__(self) -> str:
        return f"SiteStore({str(self.root)!r})"

    @classmethod
    def create(cls, root: Path) -> SiteStore:
        """Make the folder and the site key. Raises StoreError if there is a key already."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700)
        key = os.urandom(KEY_BYTES)
        partial = root / f".site.key.{os.getpid()}.partial"
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key)
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, root / "site.key")  # fails, rather than replaces, if there is one
        except FileExistsError as error:
            raise StoreError(f"{root}: there is a site key already") from error
        finally:
            partial.unlink(missing_ok=True)
        (root / "scans").mkdir(exist_ok=True, mode=0o700)
        return cls(root, key)

    @classmethod
    def open(cls, root: Path) -> SiteStore:
        """Raises StoreError: there is no store, or others can read its key."""
        path = root / "site.key"
        try:
            if path.stat().st_mode & 0o077:
                raise StoreError(f"{path}: others can read it", remedy=f"chmod 600 {path}")
            key = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"{root}: no site store ({error.strerror})", remedy="make one with `lacuna site init`"
            ) from error
        if len(key) != KEY_BYTES:
            raise StoreError(f"{path}: {len(key)} bytes are not a site key of {KEY_BYTES}")
        return cls(root, key)

    @property
    def key_commitment(self) -> str:
        """Hexadecimal digest of the site key, to be recorded before round 1: it fixes who is held out."""
        return digest("lacuna/site-key-commitment/v1", self._site_key).hex()

    def canary_coins(self, plan_digest: bytes, count: int) -> tuple[bytes, tuple[bool, ...]]:
        """(nonce of 32 bytes, fair coins) of a plan's in-run canaries; secret, and the same at every call."""
        coins = (
            bool(_hmac(self._site_key, "canary-coin", plan_digest + index.to_bytes(4, "big"))[0] & 1)
            for index in range(count)
        )
        return _hmac(self._site_key, "canary-nonce", plan_digest), tuple(coins)

    def patient_key(self, patient_id: str) -> str:
        """What stands for a patient everywhere behind the import."""
        return _hmac(self._site_key, "patient", patient_id.encode()).hex()

    def bind(self, clause: DataClause) -> CanonicalGrid:
        """Fix conditions, labels and grid at the first import.

        Raises:
            StoreError: the store was filled for other ones.
        """
        grid = CanonicalGrid.from_clause(clause)
        value = {
            "format": "lacuna/site-grid/v1",
            "conditions": list(clause.conditions),
            "labels": list(clause.labels),
            "grid_shape": list(grid.shape),
            "spacing_mm": [float(step) for step in grid.spacing_mm],
            "intensity_percentiles": [float(share) for share in grid.percentiles],
        }
        if clause.covariates:
            value["covariates"] = [covariate.model_dump(mode="json") for covariate in clause.covariates]
        path = self.root / "grid.json"
        if path.exists():
            before = parse_json(path.read_bytes(), what=str(path))
            if canonical_json(before) != canonical_json(value):
                differ = sorted(key for key in {*value, *before} if before.get(key) != value.get(key))
                raise StoreError(
                    f"{self.root}: its scans were imported for another plan (other {', '.join(differ)})",
                    remedy="use a store of its own for each study, and import again",
                )
            return grid
        partial = self.root / f".grid.json.{os.getpid()}.partial"
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.replace(path)
        return grid

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Hold the store for an import. Raises StoreError if another process does."""
        descriptor = os.open(self.root / ".import.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(f"{self.root}: another import is at work") from error
            for left in (self.root / "scans").glob(".*.partial"):
                left.unlink()  # of an import that was killed: we hold the lock
            yield
        finally:
            os.close(descriptor)

    def scans(self) -> list[StoredScan]:
        """All rows, ordered by scan key. Raises StoreError naming a damaged file."""
        return [self._row(path) for path in sorted((self.root / "scans").glob("*.safetensors"))]

    def members(self, holdout_share: float) -> list[StoredScan]:
        """Scans of the patients who train."""
        return [scan for scan in self.scans() if scan.holdout_draw >= holdout_share]

    def held_out(self, holdout_share: float) -> list[StoredScan]:
        """Scans of the patients who are never trained on, for the audit."""
        return [scan for scan in self.scans() if scan.holdout_draw < holdout_share]

    def table(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.DataFrame(
            [scan.__dict__ for scan in self.scans()], columns=list(StoredScan.__annotations__)
        )

    def read(self, scan: StoredScan) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Image_DHW (float32 in [0, 1]) and mask_DHW (uint8) of a scan. Raises StoreError."""
        path = self._path(scan.scan_key)
        try:
            tensors, _ = load_tensors(path)
            return tensors["image"], tensors["mask"]
        except (MalformedMessageError, KeyError) as error:
            raise StoreError(f"{path}: damaged ({error})", remedy="remove it and import again") from error

    def add(self, entry: ScanEntry, scan: CanonicalScan, checked: CheckedScan) -> StoredScan:
        """Write one scan and its row, atomically."""
        row = self._describe(entry, checked.content_sha256, checked.mask_sha256, scan)
        path = self._path(row.scan_key)
        metadata = {
            "format": _FORMAT,
            "patient_key": row.patient_key,
            "condition": row.condition,
            "mask_hmac": row.mask_hmac,
            "holdout": row.holdout_draw.hex(),
            "label_voxels": str(row.label_voxels),
            "lost_label_voxels": str(row.lost_label_voxels),
        }
        if row.covariates:
            metadata["covariates"] = canonical_json(dict(row.covariates)).decode()
        save_tensors(path, {"image": scan.image_DHW, "mask": scan.mask_DHW}, metadata)
        return row

    def series_key(self, series_uid: str) -> str:
        """What stands for a DICOM series in the inbox beside the store."""
        return _hmac(self._site_key, "series", series_uid.encode()).hex()

    def scan_key(self, content_sha256: bytes) -> str:
        return _hmac(self._site_key, "scan", content_sha256).hex()

    def conflict(self, stored: StoredScan, entry: ScanEntry, mask_sha256: bytes) -> str | None:
        """How a stored scan differs from what the source now says of it; None if it does not."""
        differ = []
        if stored.patient_key != self.patient_key(entry.patient_id):
            differ.append("patient")
        if stored.condition != entry.condition:
            differ.append("condition")
        if stored.covariates != tuple(sorted(entry.covariates.items())):
            differ.append("covariates")
        if stored.mask_hmac != _hmac(self._site_key, "mask", mask_sha256).hex():
            differ.append("mask")
        return ", ".join(differ) or None

    def _describe(
        self, entry: ScanEntry, content_sha256: bytes, mask_sha256: bytes, scan: CanonicalScan
    ) -> StoredScan:
        return StoredScan(
            scan_key=self.scan_key(content_sha256),
            patient_key=self.patient_key(entry.patient_id),
            condition=entry.condition,
            mask_hmac=_hmac(self._site_key, "mask", mask_sha256).hex(),
            holdout_draw=holdout_draw(self._site_key, entry.patient_id),
            label_voxels=scan.label_voxels,
            lost_label_voxels=scan.lost_label_voxels,
            covariates=tuple(sorted(entry.covariates.items())),
        )

    def _path(self, scan_key: str) -> Path:
        return self.root / "scans" / f"{scan_key}.safetensors"

    def _row(self, path: Path) -> StoredScan:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}")
            return StoredScan(
                scan_key=path.stem,
                patient_key=metadata["patient_key"],
                condition=metadata["condition"],
                mask_hmac=metadata["mask_hmac"],
                holdout_draw=float.fromhex(metadata["holdout"]),
                label_voxels=int(metadata["label_voxels"]),
                lost_label_voxels=int(metadata["lost_label_voxels"]),
                covariates=tuple(sorted(_covariates(metadata.get("covariates", "{}")).items())),
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StoreError(f"{path}: damaged ({error})", remedy="remove it and import again") from error


def _covariates(text: str) -> dict[str, str]:
    value = parse_json(text.encode(), what="covariates")
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError("covariates are not names with values")
    return value
