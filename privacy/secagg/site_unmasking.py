"""Stages UPLOADED and CONFIRMED: which survivor set a site helps to unmask, and what it then reveals.

The three conditions on a survivor set are in :mod:`privacy.secagg.survivor_rules`; this module adds that
every member of U uploaded under the same terms, that U differs from P only where this site and t members of
U signed it, and that shares are revealed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from privacy.secagg.messages import (
    ConfirmReply,
    ConfirmRequest,
    RevealedShare,
    UnmaskReply,
    UnmaskRequest,
)
from privacy.secagg.reasons import AggregationRefusedError, RefusalReason
from privacy.secagg.site_state import SiteState
from privacy.secagg.statements import RevealStatement, SurvivorStatement, UploadStatement
from privacy.secagg.survivor_rules import require_enough, require_self, require_within_peers
from privacy.secagg.transitions import SiteStage
from shared.identity import BadSignatureError

HeldShares = dict[str, tuple[bytearray, bytearray]]
"""(seed share, mask-key share) of each peer."""

SignedSites = Sequence[tuple[str, bytes]]


@dataclass(kw_only=True)
class MaskedState(SiteState):
    """A masked vector has left; what is secret from here on are the shares held for the peers."""

    peers: tuple[str, ...]
    """P, in roster order."""
    terms: bytes
    """Digest of the upload terms."""
    held: HeldShares = field(repr=False)

    def wipe(self) -> None:
        for pair in self.held.values():
            for share in pair:
                share[:] = bytes(len(share))
        self.held.clear()

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """One share of each peer: mask seed for survivors, mask key for the dropped. The caller closes."""
        survivors = self.checked_survivors(request.uploads)
        self.check_released(survivors, request.confirmations)
        shares = tuple(
            RevealedShare(owner=peer, kind="seed", value=bytes(self.held[peer][0]))
            if peer in survivors
            else RevealedShare(owner=peer, kind="key", value=bytes(self.held[peer][1]))
            for peer in self.peers
        )
        statement = RevealStatement(
            session=self.session,
            site_id=self.site_id,
            terms=self.terms,
            survivors=survivors,
            shares=tuple(item.value for item in shares),
        )
        return UnmaskReply(
            attempt=request.attempt,
            site_id=self.site_id,
            shares=shares,
            signature=statement.sign(self.key),
        )

    def checked_survivors(self, uploads: SignedSites) -> tuple[str, ...]:
        """U in roster order, if it keeps the three conditions and each member signed the same terms.

        Raises:
            AggregationRefusedError: SELF_NOT_AMONG_SURVIVORS, SURVIVOR_NOT_A_PEER, TOO_FEW_SURVIVORS,
                BAD_UPLOAD_SIGNATURE.
        """
        survivors = [site_id for site_id, _ in uploads]
        require_self(survivors, self.site_id)
        require_within_peers(survivors, self.peers)
        require_enough(set(survivors), self.threshold)
        for site_id, signature in uploads:
            try:
                UploadStatement(session=self.session, site_id=site_id, terms=self.terms).verify(signature)
            except BadSignatureError as error:
                raise AggregationRefusedError(
                    RefusalReason.BAD_UPLOAD_SIGNATURE,
                    f"{site_id} did not sign an upload on the same peers, keys, weights and request",
                    peer=site_id,
                ) from error
        return self.session.roster.ordered(survivors)

    def check_released(self, survivors: tuple[str, ...], confirmations: SignedSites) -> None:
        """Whether shares may be released for this survivor set."""
        raise NotImplementedError


@dataclass(kw_only=True)
class UploadedState(MaskedState):
    """No survivor set was signed: shares go out for U = P, and for nothing else."""

    stage: ClassVar[SiteStage] = SiteStage.UPLOADED

    def confirm(self, request: ConfirmRequest) -> tuple[ConfirmedState, ConfirmReply]:
        """Sign the one survivor set that this site will ever accept for the attempt.

        Raises:
            AggregationRefusedError: as :meth:`checked_survivors`, and NOBODY_DROPPED.
        """
        survivors = self.checked_survivors(request.uploads)
        if survivors == self.peers:
            raise AggregationRefusedError(
                RefusalReason.NOBODY_DROPPED, "all peers survived: there is nothing to confirm"
            )
        statement = SurvivorStatement(
            session=self.session, site_id=self.site_id, terms=self.terms, survivors=survivors
        )
        state = ConfirmedState(
            site_id=self.site_id,
            key=self.key,
            session=self.session,
            peers=self.peers,
            terms=self.terms,
            held=self.held,
            survivors=survivors,
        )
        signature = statement.sign(self.key)
        return state, ConfirmReply(attempt=request.attempt, site_id=self.site_id, signature=signature)

    def check_released(self, survivors: tuple[str, ...], confirmations: SignedSites) -> None:
        """Raises AggregationRefusedError: SURVIVORS_NOT_CONFIRMED."""
        if survivors != self.peers:
            raise AggregationRefusedError(
                RefusalReason.SURVIVORS_NOT_CONFIRMED, "this site has not signed this survivor set"
            )


@dataclass(kw_only=True)
class ConfirmedState(MaskedState):
    """This site signed one survivor set: shares go out for that set, against t signatures of its members."""

    stage: ClassVar[SiteStage] = SiteStage.CONFIRMED
    survivors: tuple[str, ...]
    """The U that it signed."""

    def check_released(self, survivors: tuple[str, ...], confirmations: SignedSites) -> None:
        """Raises AggregationRefusedError: SECOND_SURVIVOR_SET, TOO_FEW_CONFIRMATIONS, BAD_CONFIRMATION."""
        if survivors != self.survivors:
            raise AggregationRefusedError(
                RefusalReason.SECOND_SURVIVOR_SET, "this site signed another survivor set for this attempt"
            )
        if len({site_id for site_id, _ in confirmations}) < self.threshold:
            raise AggregationRefusedError(
                RefusalReason.TOO_FEW_CONFIRMATIONS,
                f"fewer than {self.threshold} sites signed this survivor set",
            )
        for site_id, signature in confirmations:
            try:
                if site_id not in survivors:
                    raise BadSignatureError(f"{site_id[:64]} is not a survivor")
                SurvivorStatement(
                    session=self.session, site_id=site_id, terms=self.terms, survivors=survivors
                ).verify(signature)
            except BadSignatureError as error:
                raise AggregationRefusedError(
                    RefusalReason.BAD_CONFIRMATION,
                    f"{site_id[:64]} did not sign this survivor set",
                    peer=site_id,
                ) from error
