"""What every state of an attempt at a site has in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from privacy.secagg.session import Session
from privacy.secagg.transitions import SiteStage
from shared.identity import SigningKey


@dataclass(kw_only=True)
class SiteState:
    """One attempt at one site, at one stage. Secrets never show in the repr."""

    stage: ClassVar[SiteStage]
    site_id: str
    key: SigningKey = field(repr=False)
    session: Session

    @property
    def number(self) -> int:
        """The attempt's number."""
        return self.session.attempt.attempt

    @property
    def threshold(self) -> int:
        """t of the plan that this site approved."""
        return self.session.parameters.threshold

    def wipe(self) -> None:
        """Overwrite whatever is secret: the attempt is over for this site."""
        raise NotImplementedError
