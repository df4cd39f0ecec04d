"""Names of conditions, the rows of the embedding table that stand for them, and guidance by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.errors import UsageError


@dataclass(frozen=True)
class ConditionTable:
    """Condition names in the plan's order; row ``len(names)`` is the null class of guidance.

    Raises:
        UsageError: no name, an empty name, or the same name twice.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or any(not name for name in self.names) or len(set(self.names)) != len(self.names):
            raise UsageError(f"conditions must be distinct, non-empty names, not {self.names}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def null_index(self) -> int:
        """Row of the null class ("no condition given")."""
        return len(self.names)

    def index_of(self, name: str) -> int:
        """Row of a condition.

        Raises:
            UsageError: the table has no such condition.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise UsageError(
                f"no such condition: {name!r}", remedy=f"the study's conditions are {', '.join(self.names)}"
            ) from None

    def name_of(self, index: int) -> str:
        """Condition of a row.

        Raises:
            UsageError: the row stands for no condition.
        """
        if not 0 <= index < len(self.names):
            raise UsageError(f"row {index} stands for no condition of {self.names}")
        return self.names[index]


class GuidedVelocity(nn.Module):
    """A velocity field under classifier-free guidance (Ho and Salimans 2022): v_0 + s (v_c - v_0).

    Args:
        denoiser: Takes (z_BCDHW, level_B, condition_B); ``denoiser.null_index`` is its null class.
        scale: s. 1 is the conditional field itself (one pass), 0 the unconditional one.

    Raises:
        UsageError: a scale other than 1 for a network without a null class.
    """

    def __init__(self, denoiser: nn.Module, scale: float) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        null_index = getattr(denoiser, "null_index", None)
        if scale != 1.0 and not isinstance(null_index, int):
            raise UsageError("guidance needs a denoiser with a null class (null_index)")
        self._null_index = null_index if isinstance(null_index, int) else -1

    def forward(self, z_BCDHW: Tensor, level_B: Tensor, condition_B: Tensor) -> Tensor:
        """Velocity v_BCDHW."""
        velocity_BCDHW: Tensor = self.denoiser(z_BCDHW, level_B, condition_B)
        if self.scale == 1.0:
            return velocity_BCDHW
        null_B = torch.full_like(condition_B, self._null_index)
        null_BCDHW: Tensor = self.denoiser(z_BCDHW, level_B, null_B)
        return null_BCDHW + self.scale * (velocity_BCDHW - null_BCDHW)
