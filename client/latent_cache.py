"""Latents of a site's scans, computed once with the plan's public autoencoder and kept on the site's disk.

A latent is as secret as the scan it comes from: the autoencoder is public, so whoever has the one has nearly
the other. The cache lives in the site's own folder and never leaves it.

Layout::

    AUTOENCODER-GRID/       first 16 hexadecimal digits of the autoencoder's SHA-256 and of the grid's digest
        SCAN.safetensors    z [C, D, H, W], float32; metadata with all that it was computed from

A cached latent is used only where everything that it depends on is the same: the autoencoder's file, the
weights actually in memory, the grid, and the stored scan. Folders of other autoencoders are removed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.patient_dataset import SiteStore, StoredScan
from privacy.dp.patients import PatientScans
from shared.checkpoint import load_tensors, save_tensors
from shared.errors import MalformedMessageError, SiteError
from shared.model.conditioning import ConditionTable
from shared.volumes.canonical_grid import CanonicalGrid

_FORMAT = "lacuna/latent/v1"


class Encoder(Protocol):
    """What is needed of :class:`shared.model.autoencoder.LatentAutoencoder`."""

    def encode(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor:
        """Latents z_BCDHW of images in [0, 1] and integer masks."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...


class LatentError(SiteError):
    """The autoencoder is not the one that the cache was filled with, or its latents are not usable."""


class LatentCache:
    """Latents of one autoencoder on one grid.

    Args:
        root: Folder of the cache; made with mode 0700.
        autoencoder: In the state in which it encodes (no dropout, no batch statistics).
        autoencoder_sha256: Hexadecimal SHA-256 of its file, as in the plan.
        grid: The plan's canonical grid.
        device: Where to encode.
    """

    def __init__(
        self,
        root: Path,
        *,
        autoencoder: Encoder,
        autoencoder_sha256: str,
        grid: CanonicalGrid,
        device: str = "cpu",
    ) -> None:
        self._autoencoder = autoencoder
        self._facts = {
            "format": _FORMAT,
            "autoencoder_sha256": autoencoder_sha256,
            "weights_sha256": weights_sha256(autoencoder),
            "grid": grid.digest().hex(),
        }
        self._device = device
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700)
        self.folder = root / f"{autoencoder_sha256[:16]}-{self._facts['grid'][:16]}"
        for other in root.iterdir():
            if other.is_dir() and other != self.folder:
                shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True, mode=0o700)

    def patients(
        self,
        store: SiteStore,
        scans: Sequence[StoredScan],
        *,
        table: ConditionTable,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[PatientScans]:
        """Latents of scans, grouped by patient; missing ones are encoded, each alone.

        Never in batches: kernels for batches of different sizes round differently, and then a patient's
        latents, and all that is clipped or counted later, would depend on who else is in the store.

        Args:
            store: Where the scans are.
            scans: Which ones; for instance ``store.members(share)``.
            table: The plan's; its class indices become ``conditions_S``.
            progress: Called as ("encoding", done, total) after each scan.

        Returns:
            One entry for each patient, ordered by patient key; scans within, by scan key.

        Raises:
            LatentError: the autoencoder changed under the same hash, or gives values that are not finite.
            StoreError: a stored scan is damaged.
        """
        latents = {scan.scan_key: z for scan in scans if (z := self._cached(scan)) is not None}
        missing = [scan for scan in scans if scan.scan_key not in latents]
        for done, scan in enumerate(missing, start=1):
            z_CDHW = self._encode(store, scan)
            save_tensors(self._path(scan), {"z": z_CDHW}, {**self._facts, **_scan_facts(scan)})
            latents[scan.scan_key] = z_CDHW
            if progress is not None:
                progress("encoding", done, len(missing))
        groups: dict[str, list[StoredScan]] = defaultdict(list)
        for scan in sorted(scans, key=lambda row: (row.patient_key, row.scan_key)):
            groups[scan.patient_key].append(scan)
        return [
            PatientScans(
                patient_key=patient,
                latents_SCDHW=torch.from_numpy(np.stack([latents[scan.scan_key] for scan in group])),
                conditions_S=torch.tensor(
                    [table.class_index(scan.condition, dict(scan.covariates)) for scan in group]
                ),
            )
            for patient, group in groups.items()
        ]

    def _path(self, scan: StoredScan) -> Path:
        return self.folder / f"{scan.scan_key}.safetensors"

    def _cached(self, scan: StoredScan) -> NDArray[np.float32] | None:
        path = self._path(scan)
        if not path.exists():
            return None
        try:
            tensors, metadata = load_tensors(path)
            z_CDHW: NDArray[np.float32] = tensors["z"]
        except (MalformedMessageError, KeyError):
            return None  # cut short by a crash of the machine: encode again
        if metadata.get("weights_sha256") != self._facts["weights_sha256"] and (
            metadata.get("autoencoder_sha256") == self._facts["autoencoder_sha256"]
        ):
            raise LatentError(
                f"{self.folder}: another autoencoder was cached under the same hash",
                remedy="load the autoencoder that the plan names, or remove this folder",
            )
        if metadata != {**self._facts, **_scan_facts(scan)} or z_CDHW.ndim != 4:
            return None
        return z_CDHW

    def _encode(self, store: SiteStore, scan: StoredScan) -> NDArray[np.float32]:
        image_DHW, mask_DHW = store.read(scan)
        image_11DHW = torch.from_numpy(image_DHW)[None, None].to(self._device)
        mask_1DHW = torch.from_numpy(mask_DHW.astype(np.int64))[None].to(self._device)
        with torch.no_grad():
            z_CDHW = self._autoencoder.encode(image_11DHW, mask_1DHW)[0].float().cpu().numpy()
        if not np.isfinite(z_CDHW).all():
            raise LatentError("the autoencoder gives latents that are not finite")
        return np.ascontiguousarray(z_CDHW)


def weights_sha256(module: Encoder) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's state, hexadecimal."""
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        state.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def _scan_facts(scan: StoredScan) -> dict[str, str]:
    """The keyed hashes of image and mask: a scan imported again with another mask gets another latent."""
    return {"scan_key": scan.scan_key, "mask_hmac": scan.mask_hmac}
