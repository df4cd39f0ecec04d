"""The gradients of one microbatch's patients, in pieces: norms first, then their clipped sum.

A piece covers some coordinates of the vector, for all P patients. Pieces may keep their numbers in another
order than the parameter's (:data:`privacy.dp.layer_gradients.Layout`); the sum is brought back into the
parameter's order once, at the end (:meth:`ClippedTotal.vector`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from privacy.dp.clipping import add_scaled, squared_norms
from privacy.dp.layer_gradients import (
    Layout,
    Rows,
    equal_portion,
    in_parameter_layout,
    rows_in_parameter_layout,
)

LATE_BYTES = {"cpu": 32 * 2**20, "cuda": 2**29}
"""Rows that are formed late are formed for as many patients at a time as fit into this (at least one)."""


@dataclass
class ClippedTotal:
    """A float64 sum [d] that grows by microbatches."""

    sum_d: Tensor
    _layouts: dict[int, tuple[int, Layout | None]] = field(default_factory=dict)

    def part(self, place: slice, layout: Layout | None) -> tuple[Tensor, bool]:
        """The piece's coordinates, and whether they are kept in the piece's order (else: the parameter's)."""
        _, kept = self._layouts.setdefault(place.start, (place.stop, layout))
        if kept != layout and kept is not None:
            self.sum_d[place] = in_parameter_layout(self.sum_d[place].clone(), kept)
            self._layouts[place.start] = (place.stop, None)
            kept = None
        return self.sum_d[place], kept == layout

    def vector(self) -> Tensor:
        """The sum in the order of the parameters; later additions start from there."""
        for start, (stop, layout) in self._layouts.items():
            if layout is not None:
                self.sum_d[start:stop] = in_parameter_layout(self.sum_d[start:stop], layout)
        self._layouts.clear()
        return self.sum_d


@dataclass(frozen=True)
class DirectRows:
    """Gradients that are there: rows [P, n]."""

    place: slice
    rows_Pn: Tensor
    layout: Layout | None = None

    def squared_norms(self) -> Tensor:
        """Float64 [P]."""
        return squared_norms(self.rows_Pn)

    def add_scaled(self, total: ClippedTotal, factors_P: Tensor) -> None:
        """Add factors times rows."""
        part_n, same = total.part(self.place, self.layout)
        rows_Pn = self.rows_Pn if same else rows_in_parameter_layout(self.rows_Pn, self.layout)
        add_scaled(part_n, rows_Pn, factors_P)

    def row(self, patient: int) -> Tensor:
        """One patient's numbers in the parameter's order, [n]."""
        return in_parameter_layout(self.rows_Pn[patient], self.layout)


@dataclass(frozen=True)
class LateRows:
    """Gradients whose norms are known and whose rows are formed when they are added.

    Formal guarantee: what is added for a patient has norm at most factor times the norm reported by
    :meth:`squared_norms`: the rows' own norm is measured, and longer rows are shortened to it.
    """

    place: slice
    form: Callable[[slice], Rows]
    squared_norms_P: Tensor

    def squared_norms(self) -> Tensor:
        """Float64 [P]."""
        return self.squared_norms_P

    def add_scaled(self, total: ClippedTotal, factors_P: Tensor) -> None:
        """Form rows for a few patients at a time and add factors times rows."""
        n, patients = self.place.stop - self.place.start, len(factors_P)
        portion = equal_portion(patients, LATE_BYTES.get(factors_P.device.type, LATE_BYTES["cpu"]) // (4 * n))
        for start in range(0, patients, portion):
            some = slice(start, start + portion)
            rows_Pn, layout = self.form(some)
            excess_P = self.squared_norms_P[some] / squared_norms(rows_Pn)
            shorten_P = torch.where(torch.isfinite(excess_P), excess_P.sqrt().clamp(max=1.0), 0.0)
            DirectRows(self.place, rows_Pn, layout).add_scaled(total, factors_P[some] * shorten_P)

    def row(self, patient: int) -> Tensor:
        """As :meth:`DirectRows.row`."""
        rows_Pn, layout = self.form(slice(patient, patient + 1))
        return in_parameter_layout(rows_Pn[0], layout)


class MicrobatchGradients:
    """Gradients of the mean losses of P patients."""

    def __init__(self, pieces: Sequence[DirectRows | LateRows]) -> None:
        self.pieces = list(pieces)

    def squared_norms(self) -> Tensor:
        """Squared norm of each patient's gradient, float64 [P]; not finite where the gradient is not."""
        return torch.stack([piece.squared_norms() for piece in self.pieces]).sum(dim=0)

    def add_scaled(self, total: ClippedTotal, factors_P: Tensor) -> None:
        """total += sum over patients of factor times gradient, in float64; pieces are let go one by one."""
        while self.pieces:
            self.pieces.pop().add_scaled(total, factors_P)

    def row(self, patient: int) -> Tensor:
        """One patient's gradient [d], in the order of the parameters."""
        ordered = sorted(self.pieces, key=lambda piece: piece.place.start)
        return torch.cat([piece.row(patient) for piece in ordered])
