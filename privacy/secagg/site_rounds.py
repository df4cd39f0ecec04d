"""A site's side of secure aggregation: checks everything, and reveals each secret at most once.

Double masking after Bonawitz et al. (CCS 2017), with the rules of DESIGN section 6. Pure: no clock, no
network, no storage; randomness and the durable attempt register are passed in. Every refusal is an
:class:`AggregationRefusedError` with a reason from a closed enum, raised before any state changes.

The states themselves are :class:`AdvertisedState`, :class:`SharedState`, :class:`UploadedState` and
:class:`ConfirmedState`, each in the module of its round; :mod:`privacy.secagg.transitions` has their table.

At most one attempt is prepared (keys advertised, perhaps shares dealt) and one open (uploaded, not yet
unmasked). In one exchange the order is: upload(k) before advertise(k + 1), unmask(k) before share(k + 1);
advertising replaces what is prepared, uploading closes what is open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from privacy.secagg.masking import IntVector
from privacy.secagg.message_fields import read_ledger_head
from privacy.secagg.messages import (
    AdvertiseReply,
    AdvertiseRequest,
    ConfirmReply,
    ConfirmRequest,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
)
from privacy.secagg.reasons import AggregationRefusedError, Component, RefusalReason
from privacy.secagg.session import AttemptId, Roster, Session
from privacy.secagg.site_keys import AdvertisedState
from privacy.secagg.site_masking import SharedState
from privacy.secagg.site_state import SiteState
from privacy.secagg.site_unmasking import HeldShares, MaskedState, UploadedState
from privacy.secagg.thresholds import InvalidThresholdError, ProtocolParameters
from privacy.secagg.transitions import SITE_TRANSITIONS
from privacy.secret_random import SecretRandom
from shared.errors import InternalError
from shared.identity import SigningKey, VerifyKey

State = TypeVar("State", bound=SiteState)


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
        self._prepared: AdvertisedState | SharedState | None = None
        self._open: MaskedState | None = None

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
        self._close_prepared()
        self._close_open()

    def advertise(
        self,
        request: AdvertiseRequest,
        show_ledger: Callable[[], dict[str, Any]],
        check_affordable: Callable[[], None] = lambda: None,
    ) -> AdvertiseReply:
        """Make fresh keys for an attempt; its number is durable before they exist.

        Args:
            request: The server's message.
            show_ledger: What peers are shown of this site's ledger, asked for when the number is in it.
            check_affordable: Called for an attempt that is new, before its number is kept; what it raises
                ends the request.

        Raises:
            AggregationRefusedError: WRONG_STUDY, ATTEMPT_NOT_NEW.
            LacunaError: whatever ``check_affordable`` and ``register_attempt`` raise.
        """
        session = self._session(request.attempt)
        number = request.attempt.attempt
        if number <= self._last_attempt:
            raise AggregationRefusedError(
                RefusalReason.ATTEMPT_NOT_NEW,
                f"attempt {number} is not above {self._last_attempt}, the last one recorded here",
            )
        check_affordable()
        self._register_attempt(number)
        self._last_attempt = number
        head = read_ledger_head(show_ledger())
        self._close_prepared()
        state = AdvertisedState.begin(
            site_id=self._site_id, key=self._key, session=session, entropy=self._entropy, ledger_head=head
        )
        self._prepared = state
        return AdvertiseReply(attempt=request.attempt, keys=state.own_keys)

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
        state = self._at(AdvertisedState, request.attempt, Component.SHARE)
        keys = state.verify_keys(request.keys)
        accept_ledgers({site_id: item.ledger_head for site_id, item in keys.items()})
        self._prepared, dealt = state.deal(keys)
        return ShareReply(attempt=request.attempt, site_id=self._site_id, shares=dealt)

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
        self._checked_upload(request, weights_hash, request_hash)

    def upload(
        self, request: UploadRequest, vector: IntVector, *, weights_hash: bytes, request_hash: bytes
    ) -> UploadReply:
        """Mask the vector (int64[vector_length]) and sign the terms. Happens once per attempt.

        Opening this attempt closes an earlier open one for good. The caller has charged the ledger.

        Raises:
            AggregationRefusedError: as :meth:`check_upload`.
            InternalError: the vector has another length or type; the attempt stays as it was.
        """
        state, held = self._checked_upload(request, weights_hash, request_hash)
        state.check_vector(vector)
        self._close_open()
        self._prepared = None
        try:
            self._open, reply = state.mask(request, held, vector)
        finally:
            state.wipe()
        return reply

    def confirm(self, request: ConfirmRequest) -> ConfirmReply:
        """After a drop: sign the one survivor set that this site will ever accept for the attempt.

        Raises:
            AggregationRefusedError: WRONG_STUDY, UNKNOWN_ATTEMPT, ATTEMPT_CLOSED, ATTEMPT_CHANGED,
                OUT_OF_ORDER, the three on survivor sets, BAD_UPLOAD_SIGNATURE, NOBODY_DROPPED.
        """
        state = self._at(UploadedState, request.attempt, Component.CONFIRM)
        self._open, reply = state.confirm(request)
        return reply

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """Reveal one share of each peer, mask seed for survivors, mask key for the dropped; then forget.

        Raises:
            AggregationRefusedError: WRONG_STUDY, UNKNOWN_ATTEMPT, ATTEMPT_CLOSED, ATTEMPT_CHANGED,
                OUT_OF_ORDER, the three on survivor sets, BAD_UPLOAD_SIGNATURE, SECOND_SURVIVOR_SET,
                SURVIVORS_NOT_CONFIRMED, TOO_FEW_CONFIRMATIONS, BAD_CONFIRMATION.
        """
        state = self._at(MaskedState, request.attempt, Component.UNMASK)
        reply = state.unmask(request)
        self._close_open()
        return reply

    def _checked_upload(
        self, request: UploadRequest, weights_hash: bytes, request_hash: bytes
    ) -> tuple[SharedState, HeldShares]:
        state = self._at(SharedState, request.attempt, Component.UPLOAD)
        return state, state.check(request, weights_hash=weights_hash, request_hash=request_hash)

    def _session(self, attempt: AttemptId) -> Session:
        if attempt.study_digest != self._study_digest:
            raise AggregationRefusedError(
                RefusalReason.WRONG_STUDY, "the message belongs to a plan that this site does not serve here"
            )
        return Session(attempt=attempt, roster=self._roster, parameters=self._parameters)

    def _at(self, kind: type[State], attempt: AttemptId, component: Component) -> State:
        """The attempt that a request is about, if the table lets the component follow at its stage."""
        session = self._session(attempt)
        for state in (self._prepared, self._open):
            if state is None or state.number != attempt.attempt:
                continue
            if state.session.attempt != session.attempt:
                raise AggregationRefusedError(
                    RefusalReason.ATTEMPT_CHANGED,
                    f"attempt {attempt.attempt} was begun with another run, round, purpose or length",
                )
            if (state.stage, component) not in SITE_TRANSITIONS:
                raise AggregationRefusedError(
                    RefusalReason.OUT_OF_ORDER, f"{component} does not follow {state.stage}"
                )
            if not isinstance(state, kind):
                raise InternalError(f"{component} follows {state.stage} in the table, but not in the code")
            return state
        if attempt.attempt <= self._last_attempt:
            raise AggregationRefusedError(
                RefusalReason.ATTEMPT_CLOSED, f"the secrets of attempt {attempt.attempt} are gone for good"
            )
        raise AggregationRefusedError(
            RefusalReason.UNKNOWN_ATTEMPT, f"attempt {attempt.attempt} was never prepared here"
        )

    def _close_prepared(self) -> None:
        if self._prepared is not None:
            self._prepared.wipe()
        self._prepared = None

    def _close_open(self) -> None:
        if self._open is not None:
            self._open.wipe()
        self._open = None
