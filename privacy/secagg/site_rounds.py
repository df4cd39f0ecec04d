"""A site's side of secure aggregation: checks everything, and reveals each secret at most once.

Double masking after Bonawitz et al. (CCS 2017), with the rules of DESIGN section 6. Pure: no clock, no
network, no storage; randomness and the durable attempt register are passed in. Every refusal is an
:class:`AggregationRefusedError` with a reason from a closed enum, raised before any state changes.

At most one attempt is prepared (keys advertised, perhaps shares dealt) and one open (uploaded, not yet
unmasked). In one exchange the order is: upload(k) before advertise(k + 1), unmask(k) before share(k + 1);
advertising replaces what is prepared, uploading closes what is open.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from privacy.secagg.keys import (
    AttemptKeys,
    WeakKeyError,
    agree,
    pair_mask_key,
    seal_share,
    seed_commitment,
    self_mask_key,
    share_commitment,
)
from privacy.secagg.masking import IntVector, apply_streams, encode, to_bytes
from privacy.secagg.message_fields import read_ledger_head
from privacy.secagg.messages import (
    AdvertiseReply,
    AdvertiseRequest,
    ConfirmReply,
    ConfirmRequest,
    DealtShare,
    KeyAdvertisement,
    RevealedShare,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
)
from privacy.secagg.reasons import AggregationRefusedError, Component, RefusalReason
from privacy.secagg.session import AttemptId, Roster, Session
from privacy.secagg.shamir import split_secret
from privacy.secagg.site_attempt import TRANSITIONS, SiteAttempt
from privacy.secagg.statements import (
    KeyStatement,
    RevealStatement,
    ShareStatement,
    SurvivorStatement,
    UploadStatement,
    UploadTerms,
    key_set_digest,
)
from privacy.secagg.survivor_rules import require_enough, require_self, require_within_peers
from privacy.secagg.thresholds import InvalidThresholdError, ProtocolParameters
from privacy.secret_random import SecretRandom
from shared.canonical import canonical_json
from shared.errors import InternalError
from shared.identity import BadSignatureError, SigningKey, VerifyKey


class SiteSecureAggregation:
    """The state machine of one site in one study.

    Args:
        site_id: This site's id in the roster.
        key: Its identity; the roster must name this key.
        roster: Sites and identity keys in the order of the signed plan.
        parameters: n, t, c, modulus, from the signed plan.
        study_digest: The plan's digest in hex.
        register_attempt: Makes an attempt number durable before it returns; raises where the number is
            not larger than every one recorded before.
        entropy: Secret randomness for keys and seeds.
        last_attempt: Largest number recorded by an earlier process; smaller and equal ones are refused.

    Raises:
        InvalidThresholdError: roster and parameters do not fit, or the roster has another key for us.
    """

    def __init__(
        self,
        *,
        site_id: str,
        key: SigningKey,
        roster: Sequence[tuple[str, VerifyKey]],
        parameters: ProtocolParameters,
        study_digest: str,
        register_attempt: Callable[[int], None],
        entropy: SecretRandom,
        last_attempt: int = 0,
    ) -> None:
        self._roster = Roster(roster, parameters)
        if site_id not in self._roster or self._roster.key(site_id) != key.verify_key:
            raise InvalidThresholdError(f"the roster does not name {site_id} with this site's identity key")
        self._site_id = site_id
        self._key = key
        self._parameters = parameters
        self._study_digest = study_digest
        self._register_attempt = register_attempt
        self._entropy = entropy
        self._last_attempt = last_attempt
        self._prepared: SiteAttempt | None = None
        self._open: SiteAttempt | None = None

    def __repr__(self) -> str:
        return (
            f"SiteSecureAggregation({self._site_id}, prepared={self.prepared_attempt}, "
            f"open={self.open_attempt}, last={self._last_attempt})"
        )

    @property
    def prepared_attempt(self) -> int | None:
        return None if self._prepared is None else self._prepared.number

    @property
    def open_attempt(self) -> int | None:
        return None if self._open is None else self._open.number

    @property
    def last_attempt(self) -> int:
        """Largest attempt number that this site has recorded."""
        return self._last_attempt

    def abandon(self) -> None:
        """Close whatever is prepared or open, for good."""
        for item in (self._prepared, self._open):
            if item is not None:
                item.close()
        self._prepared = self._open = None

    def advertise(
        self, request: AdvertiseRequest, show_ledger: Callable[[], dict[str, Any]]
    ) -> AdvertiseReply:
        """Make fresh keys for an attempt; its number is durable before they exist.

        Args:
            request: The server's message.
            show_ledger: What peers are shown of this site's ledger, asked for when the number is in it.

        Raises:
            AggregationRefusedError: WRONG_STUDY, ATTEMPT_NOT_NEW.
            LacunaError: whatever ``register_attempt`` raises.
        """
        session = self._session(request.attempt)
        number = request.attempt.attempt
        if number <= self._last_attempt:
            raise AggregationRefusedError(
                RefusalReason.ATTEMPT_NOT_NEW,
                f"attempt {number} is not above {self._last_attempt}, the last one recorded here",
            )
        self._register_attempt(number)
        self._last_attempt = number
        head = read_ledger_head(show_ledger())
        if self._prepared is not None:
            self._prepared.close()
        secrets = AttemptKeys(self._entropy)
        statement = KeyStatement(
            session=session,
            site_id=self._site_id,
            mask_public=secrets.mask_public,
            share_public=secrets.share_public,
            seed_commitment=seed_commitment(session, self._site_id, secrets.seed),
            ledger_head=canonical_json(head),
        )
        keys = KeyAdvertisement(
            site_id=self._site_id,
            mask_public=statement.mask_public,
            share_public=statement.share_public,
            seed_commitment=statement.seed_commitment,
            ledger_head=head,
            signature=statement.sign(self._key),
        )
        self._prepared = SiteAttempt(session=session, secrets=secrets, own_keys=keys)
        return AdvertiseReply(attempt=request.attempt, keys=keys)

    def share(
        self,
        request: ShareRequest,
        accept_ledgers: Callable[[Mapping[str, Mapping[str, Any]]], None] = lambda _: None,
    ) -> ShareReply:
        """Verify all keys of the attempt, then deal shares of this site's two secrets to their owners.

        Args:
            request: The server's message.
            accept_ledgers: Called with what each site shows of its ledger, under its verified signature,
                before anything is dealt; what it raises ends the request.

        Raises:
            AggregationRefusedError: WRONG_STUDY, UNKNOWN_ATTEMPT, ATTEMPT_CLOSED, ATTEMPT_CHANGED,
                OUT_OF_ORDER, UNKNOWN_SITE, TOO_FEW_PEERS, SELF_NOT_AMONG_PEERS, OWN_KEYS_CHANGED,
                BAD_KEY_SIGNATURE, KEY_USED_TWICE, WEAK_KEY.
        """
        state = self._locate(request.attempt, Component.SHARE)
        keys, key_set = self._verified_keys(state, request.keys)
        accept_ledgers({site_id: item.ledger_head for site_id, item in keys.items()})
        secrets, n = state.secrets, self._parameters.n_sites
        seed_shares = split_secret(secrets.seed, threshold=self._parameters.threshold, n_shares=n)
        key_shares = split_secret(secrets.mask_private, threshold=self._parameters.threshold, n_shares=n)
        dealt = []
        for recipient, theirs in keys.items():
            position = self._roster.position(recipient)
            pair = (seed_shares[position], key_shares[position])
            statement = ShareStatement(
                session=state.session,
                site_id=self._site_id,
                recipient=recipient,
                key_set=key_set,
                ciphertext=seal_share(
                    agree(secrets.share_private, theirs.share_public),
                    pair[0] + pair[1],
                    key_set=key_set,
                    dealer=self._site_id,
                    recipient=recipient,
                ),
                seed_share_commitment=share_commitment(
                    state.session, "seed", self._site_id, recipient, pair[0]
                ),
                key_share_commitment=share_commitment(
                    state.session, "key", self._site_id, recipient, pair[1]
                ),
            )
            dealt.append(
                DealtShare(
                    dealer=self._site_id,
                    recipient=recipient,
                    ciphertext=statement.ciphertext,
                    seed_share_commitment=statement.seed_share_commitment,
                    key_share_commitment=statement.key_share_commitment,
                    signature=statement.sign(self._key),
                )
            )
        state.keys, state.key_set = keys, key_set
        state.advance(Component.SHARE)
        return ShareReply(attempt=request.attempt, site_id=self._site_id, shares=tuple(dealt))

    def check_upload(self, request: UploadRequest, *, weights_hash: bytes, request_hash: bytes) -> None:
        """All checks of :meth:`upload`, without changing anything: for use before computing or charging.

        Args:
            request: The server's message.
            weights_hash: Hash that *this site* computed over the weights it was given.
            request_hash: Hash that *this site* computed over everything else it was asked to do.

        Raises:
            AggregationRefusedError: WRONG_STUDY, UNKNOWN_ATTEMPT, ATTEMPT_CLOSED, ATTEMPT_CHANGED,
                OUT_OF_ORDER, OTHER_SITE, WRONG_WEIGHTS, WRONG_REQUEST, SELF_NOT_AMONG_PEERS,
                PEER_WITHOUT_KEYS, TOO_FEW_PEERS, BAD_SHARE_SIGNATURE, SHARES_DO_NOT_FIT.
        """
        self._accepted_shares(request, weights_hash, request_hash)

    def upload(
        self, request: UploadRequest, vector: IntVector, *, weights_hash: bytes, request_hash: bytes
    ) -> UploadReply:
        """Mask the vector (int64[vector_length]) and sign the terms. Happens once per attempt.

        Opening this attempt closes an earlier open one for good. The caller has charged the ledger.

        Raises:
            AggregationRefusedError: as :meth:`check_upload`.
            InternalError: the vector has another length or type; the attempt stays as it was.
        """
        state, held = self._accepted_shares(request, weights_hash, request_hash)
        if vector.shape != (request.attempt.vector_length,) or vector.dtype.str[1:] != "i8":
            raise InternalError(f"the vector to mask is not int64[{request.attempt.vector_length}]")
        peers = self._roster.ordered(held)
        terms = UploadTerms(
            session=state.session,
            key_set=state.key_set,
            peers=peers,
            weights_hash=weights_hash,
            request_hash=request_hash,
        ).digest()
        if self._open is not None:
            self._open.close()
        self._open, self._prepared = state, None
        state.peers, state.terms, state.held = peers, terms, held
        state.advance(Component.UPLOAD)
        masked = encode(vector, self._parameters.modulus_bits)
        plus, minus = self._mask_keys(state)
        apply_streams(masked, plus, minus)
        state.secrets.wipe()
        statement = UploadStatement(session=state.session, site_id=self._site_id, terms=terms)
        return UploadReply(
            attempt=request.attempt,
            site_id=self._site_id,
            signature=statement.sign(self._key),
            masked=to_bytes(masked),
        )

    def confirm(self, request: ConfirmRequest) -> ConfirmReply:
        """After a drop: sign the one survivor set that this site will ever accept for the attempt.

        Raises:
            AggregationRefusedError: WRONG_STUDY, UNKNOWN_ATTEMPT, ATTEMPT_CLOSED, ATTEMPT_CHANGED,
                OUT_OF_ORDER, the three on survivor sets, BAD_UPLOAD_SIGNATURE, NOBODY_DROPPED.
        """
        state = self._locate(request.attempt, Component.CONFIRM)
        survivors = self._checked_survivors(state, request.uploads)
        if survivors == state.peers:
            raise AggregationRefusedError(
                RefusalReason.NOBODY_DROPPED, "all peers survived: there is nothing to confirm"
            )
        state.confirmed = survivors
        state.advance(Component.CONFIRM)
        statement = SurvivorStatement(
            session=state.session, site_id=self._site_id, terms=state.terms, survivors=survivors
        )
        return ConfirmReply(
            attempt=request.attempt, site_id=self._site_id, signature=statement.sign(self._key)
        )

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """Reveal one share of each peer, mask seed for survivors, mask key for the dropped; then forget.

        Raises:
            AggregationRefusedError: WRONG_STUDY, UNKNOWN_ATTEMPT, ATTEMPT_CLOSED, ATTEMPT_CHANGED,
                OUT_OF_ORDER, the three on survivor sets, BAD_UPLOAD_SIGNATURE, SECOND_SURVIVOR_SET,
                SURVIVORS_NOT_CONFIRMED, TOO_FEW_CONFIRMATIONS, BAD_CONFIRMATION.
        """
        state = self._locate(request.attempt, Component.UNMASK)
        survivors = self._checked_survivors(state, request.uploads)
        if state.confirmed is not None and survivors != state.confirmed:
            raise AggregationRefusedError(
                RefusalReason.SECOND_SURVIVOR_SET, "this site signed another survivor set for this attempt"
            )
        if survivors != state.peers:
            if state.confirmed is None:
                raise AggregationRefusedError(
                    RefusalReason.SURVIVORS_NOT_CONFIRMED, "this site has not signed this survivor set"
                )
            self._check_confirmations(state, survivors, request.confirmations)
        shares = tuple(
            RevealedShare(owner=peer, kind="seed", value=bytes(state.held[peer][0]))
            if peer in survivors
            else RevealedShare(owner=peer, kind="key", value=bytes(state.held[peer][1]))
            for peer in state.peers
        )
        statement = RevealStatement(
            session=state.session,
            site_id=self._site_id,
            terms=state.terms,
            survivors=survivors,
            shares=tuple(item.value for item in shares),
        )
        reply = UnmaskReply(
            attempt=request.attempt,
            site_id=self._site_id,
            shares=shares,
            signature=statement.sign(self._key),
        )
        state.close()
        self._open = None
        return reply

    def _session(self, attempt: AttemptId) -> Session:
        if attempt.study_digest != self._study_digest:
            raise AggregationRefusedError(
                RefusalReason.WRONG_STUDY, "the message belongs to a plan that this site does not serve here"
            )
        return Session(attempt=attempt, roster=self._roster, parameters=self._parameters)

    def _locate(self, attempt: AttemptId, component: Component) -> SiteAttempt:
        session = self._session(attempt)
        for state in (self._prepared, self._open):
            if state is not None and state.number == attempt.attempt:
                if state.session.attempt != session.attempt:
                    raise AggregationRefusedError(
                        RefusalReason.ATTEMPT_CHANGED,
                        f"attempt {attempt.attempt} was begun with another run, round, purpose or length",
                    )
                if (state.stage, component) not in TRANSITIONS:
                    raise AggregationRefusedError(
                        RefusalReason.OUT_OF_ORDER, f"{component} does not follow {state.stage}"
                    )
                return state
        if attempt.attempt <= self._last_attempt:
            raise AggregationRefusedError(
                RefusalReason.ATTEMPT_CLOSED, f"the secrets of attempt {attempt.attempt} are gone for good"
            )
        raise AggregationRefusedError(
            RefusalReason.UNKNOWN_ATTEMPT, f"attempt {attempt.attempt} was never prepared here"
        )

    def _verified_keys(
        self, state: SiteAttempt, offered: Sequence[KeyAdvertisement]
    ) -> tuple[dict[str, KeyAdvertisement], bytes]:
        by_site = {item.site_id: item for item in offered}
        for site_id in by_site:
            if site_id not in self._roster:
                raise AggregationRefusedError(
                    RefusalReason.UNKNOWN_SITE,
                    f"{site_id[:64]} is not in the roster of the plan",
                    peer=site_id,
                )
        if len(by_site) != len(offered) or len(by_site) < self._parameters.threshold:
            raise AggregationRefusedError(
                RefusalReason.TOO_FEW_PEERS,
                f"keys of {len(by_site)} sites are fewer than the threshold {self._parameters.threshold}",
            )
        if self._site_id not in by_site:
            raise AggregationRefusedError(RefusalReason.SELF_NOT_AMONG_PEERS, "the keys leave this site out")
        if by_site[self._site_id] != state.own_keys:
            raise AggregationRefusedError(RefusalReason.OWN_KEYS_CHANGED, "these are not this site's keys")
        keys = {site_id: by_site[site_id] for site_id in self._roster.ordered(by_site)}
        statements = [item.statement(state.session) for item in keys.values()]
        for item, statement in zip(keys.values(), statements, strict=True):
            try:
                statement.verify(item.signature)
            except BadSignatureError as error:
                raise AggregationRefusedError(
                    RefusalReason.BAD_KEY_SIGNATURE,
                    f"the keys of {item.site_id} are not signed by it for this attempt",
                    peer=item.site_id,
                ) from error
        seen: set[bytes] = set()
        for item in keys.values():
            if {item.mask_public, item.share_public} & seen or item.mask_public == item.share_public:
                raise AggregationRefusedError(
                    RefusalReason.KEY_USED_TWICE, f"a key of {item.site_id} stands twice", peer=item.site_id
                )
            seen |= {item.mask_public, item.share_public}
            try:
                agree(state.secrets.mask_private, item.mask_public)
                agree(state.secrets.share_private, item.share_public)
            except WeakKeyError as error:
                raise AggregationRefusedError(
                    RefusalReason.WEAK_KEY, f"a key of {item.site_id} is of small order", peer=item.site_id
                ) from error
        return keys, key_set_digest(state.session, statements)

    def _accepted_shares(
        self, request: UploadRequest, weights_hash: bytes, request_hash: bytes
    ) -> tuple[SiteAttempt, dict[str, tuple[bytearray, bytearray]]]:
        state = self._locate(request.attempt, Component.UPLOAD)
        if request.site_id != self._site_id:
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
        if self._site_id not in peers:
            raise AggregationRefusedError(RefusalReason.SELF_NOT_AMONG_PEERS, "the peers leave this site out")
        for peer in peers:
            if peer not in state.keys:
                raise AggregationRefusedError(
                    RefusalReason.PEER_WITHOUT_KEYS, f"{peer[:64]} has no keys in this attempt", peer=peer
                )
        if len(peers) != len(request.peers) or len(peers) < self._parameters.threshold:
            raise AggregationRefusedError(
                RefusalReason.TOO_FEW_PEERS,
                f"{len(peers)} peers are fewer than the threshold {self._parameters.threshold}",
            )
        return state, {share.dealer: state.open_share(share, self._site_id) for share in request.shares}

    def _mask_keys(self, state: SiteAttempt) -> tuple[list[bytes], list[bytes]]:
        plus = [self_mask_key(state.session, self._site_id, state.secrets.seed)]
        minus: list[bytes] = []
        for peer in state.peers:
            if peer == self._site_id:
                continue
            first, second = self._roster.ordered((peer, self._site_id))
            agreed = agree(state.secrets.mask_private, state.keys[peer].mask_public)
            mask_key = pair_mask_key(agreed, terms=state.terms, first=first, second=second)
            (plus if first == self._site_id else minus).append(mask_key)
        return plus, minus

    def _checked_survivors(self, state: SiteAttempt, uploads: Sequence[tuple[str, bytes]]) -> tuple[str, ...]:
        survivors = [site_id for site_id, _ in uploads]
        require_self(survivors, self._site_id)
        require_within_peers(survivors, state.peers)
        require_enough(set(survivors), self._parameters.threshold)
        for site_id, signature in uploads:
            try:
                UploadStatement(session=state.session, site_id=site_id, terms=state.terms).verify(signature)
            except BadSignatureError as error:
                raise AggregationRefusedError(
                    RefusalReason.BAD_UPLOAD_SIGNATURE,
                    f"{site_id} did not sign an upload on the same peers, keys, weights and request",
                    peer=site_id,
                ) from error
        return self._roster.ordered(survivors)

    def _check_confirmations(
        self, state: SiteAttempt, survivors: tuple[str, ...], confirmations: Sequence[tuple[str, bytes]]
    ) -> None:
        if len({site_id for site_id, _ in confirmations}) < self._parameters.threshold:
            raise AggregationRefusedError(
                RefusalReason.TOO_FEW_CONFIRMATIONS,
                f"fewer than {self._parameters.threshold} sites signed this survivor set",
            )
        for site_id, signature in confirmations:
            try:
                if site_id not in survivors:
                    raise BadSignatureError(f"{site_id[:64]} is not a survivor")
                SurvivorStatement(
                    session=state.session, site_id=site_id, terms=state.terms, survivors=survivors
                ).verify(signature)
            except BadSignatureError as error:
                raise AggregationRefusedError(
                    RefusalReason.BAD_CONFIRMATION,
                    f"{site_id[:64]} did not sign this survivor set",
                    peer=site_id,
                ) from error
