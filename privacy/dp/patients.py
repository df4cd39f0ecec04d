"""One patient's latents at one site: the unit of privacy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.errors import UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class PatientScans:
    """All scans of one patient at this site; a patient never stands in two of these.

    Attributes:
        patient_key: Keyed hash of the patient's id; stays at the site.
        latents_SCDHW: One latent for each of the S >= 1 scans.
        conditions_S: The condition of each scan, int64.
    """

    patient_key: str
    latents_SCDHW: torch.Tensor
    conditions_S: torch.Tensor

    def __post_init__(self) -> None:
        n_scans = self.latents_SCDHW.shape[0] if self.latents_SCDHW.ndim == 5 else 0
        if n_scans < 1 or not self.latents_SCDHW.is_floating_point():
            raise UsageError("a patient has at least one scan: floating-point latents [S, C, D, H, W]")
        if self.conditions_S.shape != (n_scans,) or self.conditions_S.dtype != torch.int64:
            raise UsageError("a patient has one condition (int64) for each scan")

    def __repr__(self) -> str:
        return "PatientScans(<redacted>)"

    @property
    def n_scans(self) -> int:
        return int(self.latents_SCDHW.shape[0])
