"""A folder of NIfTI scans with its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.ingest.manifest import ManifestError, read_manifest
from client.ingest.scan import Listing

MANIFEST_NAME = "manifest.csv"


@dataclass(frozen=True, kw_only=True)
class NiftiFolder:
    """Scans listed by ``manifest.csv`` in a folder, or by a manifest of another name.

    Attributes:
        path: The folder, or the manifest itself.
        covariates: Names of covariates that the manifest may have as columns.
    """

    path: Path
    covariates: tuple[str, ...] = ()

    def listing(self, conditions: Sequence[str]) -> Listing:
        """Scans and problems of the manifest. Raises ManifestError, see :func:`read_manifest`."""
        manifest = self.path / MANIFEST_NAME if self.path.is_dir() else self.path
        if not manifest.is_file():
            raise ManifestError(
                f"{manifest}: there is no manifest",
                remedy=f"write {MANIFEST_NAME} with the columns patient, scan, condition, mask",
            )
        return read_manifest(manifest, conditions, self.covariates)
