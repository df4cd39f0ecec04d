"""Conditions and covariates, and the number that stands for them everywhere behind names. No torch.

A scan's condition and covariates travel as one integer, the class index: with n conditions, c the condition's
position (n: none given), and r_k a covariate's row (0: unknown, then its s_k values),

    index = c + (n + 1) (r_1 + (s_1 + 1) (r_2 + (s_2 + 1) (...))).

So a study without covariates has the positions of its conditions, and n, "nothing is given", is the null
class of guidance in every study. The denoiser takes the index apart again and adds up one embedding for each
part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import UsageError
from shared.study_plan import UNKNOWN_COVARIATE, CovariateClause, DataClause


@dataclass(frozen=True)
class ConditionTable:
    """Condition names in the plan's order, and the plan's covariates.

    Raises:
        UsageError: no name, an empty name, or the same name twice.
    """

    names: tuple[str, ...]
    covariates: tuple[CovariateClause, ...] = ()

    def __post_init__(self) -> None:
        if not self.names or any(not name for name in self.names) or len(set(self.names)) != len(self.names):
            raise UsageError(f"conditions must be distinct, non-empty names, not {self.names}")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_clause(cls, clause: DataClause) -> ConditionTable:
        """The table of a plan."""
        return cls(clause.conditions, clause.covariates)

    @property
    def null_index(self) -> int:
        """The null class: neither condition nor covariates given."""
        return len(self.names)

    @property
    def covariate_sizes(self) -> tuple[int, ...]:
        """Number of values of each covariate, unknown not counted."""
        return tuple(covariate.size for covariate in self.covariates)

    def class_index(self, condition: str, covariates: Mapping[str, str]) -> int:
        """The integer of a condition with covariates; those that are not named are unknown.

        Raises:
            UsageError: no such condition or covariate, or not a value of it.
        """
        surplus = set(covariates) - {covariate.name for covariate in self.covariates}
        if surplus:
            names = ", ".join(covariate.name for covariate in self.covariates) or "none"
            raise UsageError(
                f"no such covariate: {', '.join(sorted(surplus))}", remedy=f"the study's covariates: {names}"
            )
        index = 0
        for covariate in reversed(self.covariates):
            row = covariate.row(covariates.get(covariate.name, UNKNOWN_COVARIATE))
            index = index * (covariate.size + 1) + row
        return index * (len(self.names) + 1) + self.index_of(condition)

    def covariate_rows(self, index: int) -> tuple[int, ...]:
        """Row of each covariate in a class index, in the plan's order."""
        rest, rows = index // (len(self.names) + 1), []
        for size in self.covariate_sizes:
            rows.append(rest % (size + 1))
            rest //= size + 1
        return tuple(rows)

    def index_of(self, name: str) -> int:
        """Position of a condition.

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
        """Condition at a position.

        Raises:
            UsageError: the row stands for no condition.
        """
        if not 0 <= index < len(self.names):
            raise UsageError(f"row {index} stands for no condition of {self.names}")
        return self.names[index]
