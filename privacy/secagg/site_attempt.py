"""One attempt as a site holds it: its stage, its secrets, and what it was given."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from enum import StrEnum

from privacy.secagg.keys import (
    SHARE_BYTES,
    AttemptKeys,
    UnsealingError,
    agree,
    share_commitment,
    unseal_share,
)
from privacy.secagg.messages import DealtShare, KeyAdvertisement
from privacy.secagg.reasons import AggregationRefusedError, Component, RefusalReason
from privacy.secagg.session import Session
from shared.identity import BadSignatureError


class Stage(StrEnum):
    """Where an attempt stands at a site. There is no way back, and CLOSED has no secrets left."""

    ADVERTISED = "advertised"
    SHARED = "shared"
    UPLOADED = "uploaded"
    CONFIRMED = "confirmed"
    CLOSED = "closed"


TRANSITIONS: dict[tuple[Stage, Component], Stage] = {
    (Stage.ADVERTISED, Component.SHARE): Stage.SHARED,
    (Stage.SHARED, Component.UPLOAD): Stage.UPLOADED,
    (Stage.UPLOADED, Component.CONFIRM): Stage.CONFIRMED,
    (Stage.UPLOADED, Component.UNMASK): Stage.CLOSED,
    (Stage.CONFIRMED, Component.UNMASK): Stage.CLOSED,
}
"""All that a site ever does: every other pair of stage and component is refused as out of order."""


@dataclass(kw_only=True)
class SiteAttempt:
    """State of one attempt at one site. Secrets never show in the repr."""

    session: Session
    secrets: AttemptKeys = field(repr=False)
    own_keys: KeyAdvertisement
    stage: Stage = Stage.ADVERTISED
    keys: dict[str, KeyAdvertisement] = field(default_factory=dict)
    """Verified keys of all sites of the key set, in roster order."""
    key_set: bytes = b""
    peers: tuple[str, ...] = ()
    """P, in roster order, once uploaded."""
    terms: bytes = b""
    """Digest of the upload terms, once uploaded."""
    held: dict[str, tuple[bytearray, bytearray]] = field(default_factory=dict, repr=False)
    """(seed share, mask-key share) of each peer, once uploaded."""
    confirmed: tuple[str, ...] | None = None
    """The survivor set that this site signed."""

    @property
    def number(self) -> int:
        return self.session.attempt.attempt

    def advance(self, component: Component) -> None:
        self.stage = TRANSITIONS[self.stage, component]

    def close(self) -> None:
        """Forget all secrets, for good."""
        self.secrets.wipe()
        for pair in self.held.values():
            for share in pair:
                share[:] = bytes(len(share))
        self.held.clear()
        self.stage = Stage.CLOSED

    def open_share(self, share: DealtShare, site_id: str) -> tuple[bytearray, bytearray]:
        """(seed share, mask-key share) that a peer dealt to this site.

        Raises:
            AggregationRefusedError: the dealer did not sign it, or what it signed does not fit: named.
        """
        dealer = share.dealer
        try:
            share.statement(self.session, self.key_set).verify(share.signature)
        except BadSignatureError as error:
            raise AggregationRefusedError(
                RefusalReason.BAD_SHARE_SIGNATURE, f"the share of {dealer} is not signed by it", peer=dealer
            ) from error
        agreed = agree(self.secrets.share_private, self.keys[dealer].share_public)
        try:
            plaintext = unseal_share(
                agreed, share.ciphertext, key_set=self.key_set, dealer=dealer, recipient=site_id
            )
        except UnsealingError as error:
            raise AggregationRefusedError(
                RefusalReason.SHARES_DO_NOT_FIT, f"the share that {dealer} signed does not open", peer=dealer
            ) from error
        pieces = (bytearray(plaintext[:SHARE_BYTES]), bytearray(plaintext[SHARE_BYTES:]))
        expected = (("seed", share.seed_share_commitment), ("key", share.key_share_commitment))
        for piece, (kind, commitment) in zip(pieces, expected, strict=True):
            actual = share_commitment(self.session, kind, dealer, site_id, bytes(piece))
            if not hmac.compare_digest(actual, commitment):
                raise AggregationRefusedError(
                    RefusalReason.SHARES_DO_NOT_FIT,
                    f"the share that {dealer} dealt is not the one it committed to",
                    peer=dealer,
                )
        return pieces
