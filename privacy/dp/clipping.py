"""Norms, clip factors and sums of patients' gradients in binary64, a portion of coordinates at a time.

These three functions are where :mod:`privacy.dp.sensitivity` is made true: the norm is measured on the very
numbers that are added, both in binary64, whatever precision the numbers came from.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PORTION_NUMBERS = {"cpu": 2**18}
"""Numbers (patients times coordinates) brought to binary64 at a time: on a CPU they stay in its cache."""

DEFAULT_PORTION_NUMBERS = 2**24


def squared_norms(rows_Pn: Tensor) -> Tensor:
    """Sum of squares of each row, float64 [P]; not finite where a row is not."""
    total_P = torch.zeros(rows_Pn.shape[0], dtype=torch.float64, device=rows_Pn.device)
    for part_Pm, _ in _portions(rows_Pn):
        total_P += torch.linalg.vector_norm(part_Pm, dim=1).square_()
    return total_P


def clip_factors(squared_norms_P: Tensor, clip: float) -> Tensor:
    """min(1, C / norm) for each patient, float64 [P]; exactly 0 where the norm is 0 or not finite."""
    norms_P = squared_norms_P.sqrt()
    counts = torch.isfinite(norms_P) & (norms_P > 0)
    return torch.where(counts, (clip / norms_P).clamp(max=1.0), torch.zeros_like(norms_P))


def add_scaled(total_n: Tensor, rows_Pn: Tensor, factors_P: Tensor) -> None:
    """total += sum over patients of factor times row, in float64. A row with factor 0 counts as zeros."""
    for part_Pm, at in _portions(rows_Pn):
        # 0 times infinity is not 0. All rows go through it: no time tells which was not finite.
        part_Pm.nan_to_num_(0.0, 0.0, 0.0)
        total_n[at].addmv_(part_Pm.t(), factors_P)


def _portions(rows_Pn: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """(float64 copy [P, m], its place) of one portion of coordinates after another, in one buffer."""
    patients, n = rows_Pn.shape
    numbers = PORTION_NUMBERS.get(rows_Pn.device.type, DEFAULT_PORTION_NUMBERS)
    width = max(1, min(n, numbers // patients))
    buffer = torch.empty(patients * width, dtype=torch.float64, device=rows_Pn.device)
    for start in range(0, n, width):
        end = min(start + width, n)
        part = buffer[: patients * (end - start)].view(patients, end - start)
        yield part.copy_(rows_Pn[:, start:end]), slice(start, end)
