"""Names of conditions, and the rows of the embedding table that stand for them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

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
