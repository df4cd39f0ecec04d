"""Why a message is refused, a reply is not used, or an attempt is aborted: closed enums.

No reason depends on private data: each follows from public fields of messages, from signatures, or from
the order in which messages arrived.
"""

from __future__ import annotations

from enum import StrEnum

from shared.errors import PeerError, ProtocolRefusedError


class Component(StrEnum):
    """The five request-and-reply pairs of one attempt, in their order."""

    ADVERTISE = "advertise"
    SHARE = "share"
    UPLOAD = "upload"
    CONFIRM = "confirm"
    UNMASK = "unmask"


class RefusalReason(StrEnum):
    """Why a site refuses a request."""

    WRONG_STUDY = "wrong_study"
    ATTEMPT_NOT_NEW = "attempt_not_new"
    UNKNOWN_ATTEMPT = "unknown_attempt"
    ATTEMPT_CLOSED = "attempt_closed"
    ATTEMPT_CHANGED = "attempt_changed"
    OUT_OF_ORDER = "out_of_order"
    OTHER_SITE = "other_site"
    UNKNOWN_SITE = "unknown_site"
    TOO_FEW_PEERS = "too_few_peers"
    SELF_NOT_AMONG_PEERS = "self_not_among_peers"
    OWN_KEYS_CHANGED = "own_keys_changed"
    BAD_KEY_SIGNATURE = "bad_key_signature"
    KEY_USED_TWICE = "key_used_twice"
    WEAK_KEY = "weak_key"
    PEER_WITHOUT_KEYS = "peer_without_keys"
    BAD_SHARE_SIGNATURE = "bad_share_signature"
    SHARES_DO_NOT_FIT = "shares_do_not_fit"
    WRONG_WEIGHTS = "wrong_weights"
    WRONG_REQUEST = "wrong_request"
    SELF_NOT_AMONG_SURVIVORS = "self_not_among_survivors"
    SURVIVOR_NOT_A_PEER = "survivor_not_a_peer"
    TOO_FEW_SURVIVORS = "too_few_survivors"
    BAD_UPLOAD_SIGNATURE = "bad_upload_signature"
    NOBODY_DROPPED = "nobody_dropped"
    SECOND_SURVIVOR_SET = "second_survivor_set"
    SURVIVORS_NOT_CONFIRMED = "survivors_not_confirmed"
    TOO_FEW_CONFIRMATIONS = "too_few_confirmations"
    BAD_CONFIRMATION = "bad_confirmation"


class FaultReason(StrEnum):
    """Why the server does not use a site's reply; the site counts as dropped from there on."""

    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    MALFORMED = "malformed"
    NOT_ASKED = "not_asked"
    REPEATED = "repeated"
    LATE = "late"
    OTHER_ATTEMPT = "other_attempt"
    OTHER_SITE = "other_site"
    BAD_SIGNATURE = "bad_signature"
    KEY_USED_TWICE = "key_used_twice"
    WEAK_KEY = "weak_key"
    WRONG_RECIPIENTS = "wrong_recipients"
    WRONG_LENGTH = "wrong_length"
    WRONG_SHARES = "wrong_shares"
    BAD_DEALER = "bad_dealer"


class AbortReason(StrEnum):
    """Why an attempt ends without a total. What sites charged for it stays charged."""

    TOO_FEW_KEYS = "too_few_keys"
    TOO_FEW_SHARES = "too_few_shares"
    TOO_FEW_UPLOADS = "too_few_uploads"
    TOO_FEW_CONFIRMATIONS = "too_few_confirmations"
    TOO_FEW_REVEALED_SHARES = "too_few_revealed_shares"
    BAD_DEALER = "bad_dealer"


class AggregationRefusedError(ProtocolRefusedError):
    """A site refuses a request. ``peer`` names the site whose contribution is at fault, where one is."""

    def __init__(self, reason: RefusalReason, message: str, *, peer: str | None = None) -> None:
        super().__init__(reason, message)
        self.peer = peer


class BadReplyError(PeerError):
    """The server cannot use this site's reply; the attempt goes on as if the site had dropped."""

    def __init__(self, site_id: str, component: Component, reason: FaultReason, message: str) -> None:
        super().__init__(f"{site_id}, {component}: {reason}: {message}")
        self.site_id = site_id
        self.component = component
        self.reason = reason


class AttemptAbortedError(PeerError):
    """The attempt is over and nothing is unmasked. ``peer`` names a bad dealer, where that is the cause."""

    def __init__(self, reason: AbortReason, message: str, *, peer: str | None = None) -> None:
        super().__init__(f"{reason}: {message}", remedy="open a new attempt; it is charged again")
        self.reason = reason
        self.peer = peer
