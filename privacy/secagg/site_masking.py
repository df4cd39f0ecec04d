"""Stage SHARED: shares were dealt; the site checks what its peers dealt to it, and masks its vector once."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import ClassVar

from privacy.secagg.keys import (
    SHARE_BYTES,
    AttemptKeys,
    UnsealingError,
    pair_mask_key,
    self_mask_key,
    share_commitment,
    unseal_share,
)
from privacy.secagg.masking import IntVector, masked_residues, to_pieces
from privacy.secagg.messages import DealtShare, KeyAdvertisement, UploadReply, UploadRequest
from privacy.secagg.reasons import AggregationRefusedError, RefusalReason
from privacy.secagg.site_state import SiteState
from privacy.secagg.site_unmasking import HeldShares, UploadedState
from privacy.secagg.statements import UploadStatement, UploadTerms
from privacy.secagg.transitions import SiteStage
from shared.errors import InternalError
from shared.identity import BadSignatureError


@dataclass(kw_only=True)
class SharedState(SiteState):
    """The keys of all sites are verified and bound together; this site's secrets are still needed."""

    stage: ClassVar[SiteStage] = SiteStage.SHARED
    secrets: AttemptKeys = field(repr=False)
    keys: dict[str, KeyAdvertisement]
    """Verified keys of all sites of the key set, in roster order."""
    key_set: bytes
    checked: tuple[UploadRequest, bytes, bytes, HeldShares] | None = field(default=None, repr=False)
    """The request that was checked last, with both hashes: its shares are not opened again at the upload."""

    def check(self, request: UploadRequest, *, weights_hash: bytes, request_hash: bytes) -> HeldShares:
        """Everything that must hold before this site computes, charges or masks.

        Returns:
            (seed share, mask-key share) of each peer, opened and as its dealer committed to them.

        Raises:
            AggregationRefusedError: OTHER_SITE, WRONG_WEIGHTS, WRONG_REQUEST, SELF_NOT_AMONG_PEERS,
                PEER_WITHOUT_KEYS, TOO_FEW_PEERS, BAD_SHARE_SIGNATURE, SHARES_DO_NOT_FIT.
        """
        last = self.checked
        if last is not None and last[0] is request and last[1:3] == (weights_hash, request_hash):
            return last[3]
        if request.site_id != self.site_id:
            raise AggregationRefusedError(RefusalReason.OTHER_SITE, "the request is for another site")
        if not hmac.compare_digest(request.weights_hash, weights_hash):
            raise AggregationRefusedError(
                RefusalReason.WRONG_WEIGHTS, "the weights are not those that the request names"
            )
        if not hmac.compare_digest(request.request_hash, request_hash):
            raise AggregationRefusedError(
                RefusalReason.WRONG_REQUEST, "the work is not the one that the request names"
            )
        peers = set(request.peers)
        if self.site_id not in peers:
            raise AggregationRefusedError(RefusalReason.SELF_NOT_AMONG_PEERS, "the peers leave this site out")
        for peer in peers:
            if peer not in self.keys:
                raise AggregationRefusedError(
                    RefusalReason.PEER_WITHOUT_KEYS, f"{peer[:64]} has no keys in this attempt", peer=peer
                )
        if len(peers) != len(request.peers) or len(peers) < self.threshold:
            raise AggregationRefusedError(
                RefusalReason.TOO_FEW_PEERS,
                f"{len(peers)} peers are fewer than the threshold {self.threshold}",
            )
        held = {share.dealer: self._open(share) for share in request.shares}
        self._forget_checked()
        self.checked = (request, weights_hash, request_hash, held)
        return held

    def check_vector(self, vector: IntVector) -> None:
        """Raises InternalError: the vector to mask is not int64[vector_length]."""
        if vector.shape != (self.session.attempt.vector_length,) or vector.dtype.str[1:] != "i8":
            raise InternalError(f"the vector to mask is not int64[{self.session.attempt.vector_length}]")

    def mask(
        self, request: UploadRequest, held: HeldShares, vector: IntVector
    ) -> tuple[UploadedState, UploadReply]:
        """Mask a checked vector, sign the terms of a checked request, and forget what masked it.

        This state must not be used again, whatever happens: its secrets are gone.
        """
        peers = self.session.roster.ordered(held)
        terms = UploadTerms(
            session=self.session,
            key_set=self.key_set,
            peers=peers,
            weights_hash=request.weights_hash,
            request_hash=request.request_hash,
        ).digest()
        plus, minus = self._mask_keys(peers, terms)
        self.checked = None
        masked = masked_residues(vector, self.session.parameters.modulus_bits, plus, minus)
        self.wipe()
        statement = UploadStatement(session=self.session, site_id=self.site_id, terms=terms)
        reply = UploadReply(
            attempt=request.attempt,
            site_id=self.site_id,
            signature=statement.sign(self.key),
            masked=to_pieces(masked),
        )
        state = UploadedState(
            site_id=self.site_id, key=self.key, session=self.session, peers=peers, terms=terms, held=held
        )
        return state, reply

    def wipe(self) -> None:
        self.secrets.wipe()
        self._forget_checked()

    def _forget_checked(self) -> None:
        if self.checked is not None:
            for pair in self.checked[3].values():
                for share in pair:
                    share[:] = bytes(len(share))
        self.checked = None

    def _mask_keys(self, peers: tuple[str, ...], terms: bytes) -> tuple[list[bytes], list[bytes]]:
        plus = [self_mask_key(self.session, self.site_id, self.secrets.seed)]
        minus: list[bytes] = []
        for peer in peers:
            if peer == self.site_id:
                continue
            first, second = self.session.roster.ordered((peer, self.site_id))
            agreed = self.secrets.agree_on_masks(self.keys[peer].mask_public)
            mask_key = pair_mask_key(agreed, terms=terms, first=first, second=second)
            (plus if first == self.site_id else minus).append(mask_key)
        return plus, minus

    def _open(self, share: DealtShare) -> tuple[bytearray, bytearray]:
        """(seed share, mask-key share) that a peer dealt to this site."""
        dealer = share.dealer
        try:
            share.statement(self.session, self.key_set).verify(share.signature)
        except BadSignatureError as error:
            raise AggregationRefusedError(
                RefusalReason.BAD_SHARE_SIGNATURE, f"the share of {dealer} is not signed by it", peer=dealer
            ) from error
        agreed = self.secrets.agree_on_shares(self.keys[dealer].share_public)
        try:
            plaintext = unseal_share(
                agreed, share.ciphertext, key_set=self.key_set, dealer=dealer, recipient=self.site_id
            )
        except UnsealingError as error:
            raise AggregationRefusedError(
                RefusalReason.SHARES_DO_NOT_FIT, f"the share that {dealer} signed does not open", peer=dealer
            ) from error
        pieces = (bytearray(plaintext[:SHARE_BYTES]), bytearray(plaintext[SHARE_BYTES:]))
        expected = (("seed", share.seed_share_commitment), ("key", share.key_share_commitment))
        for piece, (kind, commitment) in zip(pieces, expected, strict=True):
            actual = share_commitment(self.session, kind, dealer, self.site_id, bytes(piece))
            if not hmac.compare_digest(actual, commitment):
                raise AggregationRefusedError(
                    RefusalReason.SHARES_DO_NOT_FIT,
                    f"the share that {dealer} dealt is not the one it committed to",
                    peer=dealer,
                )
        return pieces
