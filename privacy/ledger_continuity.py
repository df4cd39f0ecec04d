"""Ledgers that peers hold one another to: what a site shows of its ledger in its signed key messages.

With the head of its chain a site shows the digests of its latest entries' bodies, and the heads of its
peers' ledgers that it has seen. From that

- a peer checks that the head *continues* the one it saw before: from the hash that it remembers it computes
  the chain forward over the digests shown, and must arrive at the head. SHA-256 being collision resistant, no
  other history leads there. An old copy does not pass, however far it was made to grow;
- the site itself learns what others have seen of its own ledger, under its own signature. A site whose ledger
  and witness were restored from an old copy stops, whoever carries the messages.

The digests say how many entries there are, which the head says anyway, and nothing else: bodies hold 16
random bytes. What is shown fits into the bound of a key message. A peer that is further behind than the
digests reach is led there in steps: it refuses, but remembers an intermediate head (``catch_up``), and says
so in its next message. A peer that has seen nothing of a site takes the first head as it is.

Not covered: entries after the last head that an honest peer saw (at most those of one attempt), and a site
that nobody honest has heard of.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from privacy.ledger import Ledger
from privacy.ledger_chain import ATTEMPT, LedgerEntry, LedgerHead, body_digest, chain_hash
from shared.canonical import DIGEST_BYTES, canonical_json
from shared.errors import MalformedMessageError, PeerError
from shared.identity import BadSignatureError, SigningKey, VerifyKey

MAX_SHOWN_BYTES = 64 * 1024
"""Bound of the canonical form, as in :mod:`privacy.secagg.message_fields`."""
MAX_LINKS = 1024
_MAX_SITES = 100


class LedgerNotLinkedError(PeerError):
    """A peer's head cannot be followed from the one seen before; its next message may lead further."""


@dataclass(frozen=True, kw_only=True)
class LedgerSegment:
    """Digests of the bodies of consecutive entries, from entry ``base`` + 1 up to that of ``head``."""

    base: int
    links: tuple[bytes, ...]
    head: LedgerHead

    @classmethod
    def cut(
        cls, entries: Sequence[LedgerEntry], *, ledger_id: str, key: SigningKey, base: int, limit: int
    ) -> LedgerSegment:
        """The ``limit`` entries after the first ``base``, or as many as there are."""
        end = min(len(entries), base + limit)
        last = entries[end - 1]
        return cls(
            base=base,
            links=tuple(body_digest(entry.body) for entry in entries[base:end]),
            head=LedgerHead.sign(key, ledger_id=ledger_id, length=end, entry_hash=last.entry_hash),
        )

    def reaches(self, seen: LedgerHead) -> bool:
        """Whether it can lead from ``seen`` to its head."""
        return self.base <= seen.length <= self.head.length

    def follow(self, seen: LedgerHead) -> bool:
        """Whether it does: the chain from ``seen`` over the digests arrives at the head."""
        entry_hash = seen.entry_hash
        for sequence in range(seen.length + 1, self.head.length + 1):
            link = self.links[sequence - 1 - self.base]
            entry_hash = chain_hash(seen.ledger_id, sequence, entry_hash, link)
        return self.head.ledger_id == seen.ledger_id and entry_hash == self.head.entry_hash

    def to_dict(self) -> dict[str, Any]:
        return {
            "head": self.head.to_dict(),
            "base": self.base,
            "links": base64.b64encode(b"".join(self.links)).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, value: Any) -> LedgerSegment:
        """Parse :meth:`to_dict`'s form. Raises MalformedMessageError; verifies no signature."""
        if not isinstance(value, dict) or set(value) != {"head", "base", "links"}:
            raise MalformedMessageError("a ledger segment has other fields than it must have")
        head, base = LedgerHead.from_dict(value["head"]), value["base"]
        try:
            raw = base64.b64decode(value["links"], validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise MalformedMessageError("a ledger segment's links are not base64") from error
        count, rest = divmod(len(raw), DIGEST_BYTES)
        if isinstance(base, bool) or not isinstance(base, int) or rest or count > MAX_LINKS:
            raise MalformedMessageError("a ledger segment is malformed")
        if base < 0 or base + count != head.length:
            raise MalformedMessageError("a ledger segment does not end at its head")
        links = tuple(raw[start : start + DIGEST_BYTES] for start in range(0, len(raw), DIGEST_BYTES))
        return cls(base=base, links=links, head=head)


@dataclass(frozen=True, kw_only=True)
class ShownLedger:
    """What a key message says about ledgers: the signer's own, and the heads of others that it has seen."""

    latest: LedgerSegment
    catch_up: LedgerSegment | None
    seen: Mapping[str, LedgerHead]

    @property
    def head(self) -> LedgerHead:
        return self.latest.head

    def to_dict(self) -> dict[str, Any]:
        return {
            "latest": self.latest.to_dict(),
            "catch_up": None if self.catch_up is None else self.catch_up.to_dict(),
            "seen": {site_id: head.to_dict() for site_id, head in self.seen.items()},
        }

    @classmethod
    def from_dict(cls, value: Any) -> ShownLedger:
        """Parse :meth:`to_dict`'s form. Raises MalformedMessageError; verifies no signature."""
        if not isinstance(value, dict) or set(value) != {"latest", "catch_up", "seen"}:
            raise MalformedMessageError("what is shown of a ledger has other fields than it must have")
        seen, catch_up = value["seen"], value["catch_up"]
        if not isinstance(seen, dict) or len(seen) > _MAX_SITES:
            raise MalformedMessageError("heads seen are not an object of at most 100 sites")
        return cls(
            latest=LedgerSegment.from_dict(value["latest"]),
            catch_up=None if catch_up is None else LedgerSegment.from_dict(catch_up),
            seen={str(site_id): LedgerHead.from_dict(head) for site_id, head in seen.items()},
        )


class LedgerContinuity:
    """One site's end of it, for one study. The furthest head of each peer is kept in the ledger's database.

    Args:
        ledger: The site's own, open.
        site_id: This site.
        key: Its identity.
        peers: Identity keys of all sites of the plan, by site id.
    """

    def __init__(
        self, ledger: Ledger, *, site_id: str, key: SigningKey, peers: Mapping[str, VerifyKey]
    ) -> None:
        self._ledger = ledger
        self._site_id = site_id
        self._key = key
        self._peers = {peer: identity for peer, identity in peers.items() if peer != site_id}
        self._acknowledged: dict[str, int] = {}
        """Entries of this ledger that each peer said it has seen, since this process began."""
        self._present: frozenset[str] = frozenset()
        """Who of them was in the last attempt."""

    def show(self) -> dict[str, Any]:
        """What goes into this site's next key message, as a JSON object of at most 64 KiB."""
        entries = self._ledger.entries()
        seen = {peer: head for peer, head in self._ledger.peer_heads().items() if self._is_of(peer, head)}
        bare = ShownLedger(latest=self._segment(entries, len(entries), 0), catch_up=None, seen=seen)
        left = MAX_SHOWN_BYTES - len(canonical_json(bare.to_dict())) - 1024
        limit = min(MAX_LINKS, left // (2 * 44))
        furthest_back = max(len(entries) - limit, 0)
        never_heard_of = _first_shown(entries)
        known = [self._acknowledged.get(peer, never_heard_of) for peer in self._peers]
        base = min((length for length in known if length >= furthest_back), default=furthest_back)
        behind = min((self._acknowledged[peer] for peer in self._present), default=base)
        shown = ShownLedger(
            latest=self._segment(entries, base, limit),
            catch_up=self._segment(entries, behind, limit) if behind < base else None,
            seen=seen,
        )
        return shown.to_dict()

    def accept(self, shown: Mapping[str, Mapping[str, Any]]) -> None:
        """Check what all sites of an attempt showed, before anything is dealt to them.

        Heads that continue what was seen before are kept, also where another site's does not.

        Raises:
            LedgerError: a peer has seen this site's own ledger further, or otherwise: it is an old copy. The
                ledger is closed for good.
            LedgerNotLinkedError: a peer's head is too far from the one seen to be followed in one step.
            PeerError: a peer's ledger went back, or does not continue the one it showed before; or it shows
                a head that this site never signed.
        """
        parsed = {peer: ShownLedger.from_dict(value) for peer, value in shown.items() if peer in self._peers}
        acknowledged = self._checked_own(parsed)
        known = self._ledger.peer_heads()
        faults: list[PeerError] = []
        kept: dict[str, tuple[LedgerHead, VerifyKey]] = {}
        for peer, theirs in parsed.items():
            try:
                kept[peer] = (self._followed(peer, theirs, known.get(peer)), self._peers[peer])
            except _CatchUpError as error:
                kept[peer] = (error.head, self._peers[peer])
                faults.append(error)
            except PeerError as error:
                faults.append(error)
        self._ledger.record_peer_heads(kept)
        self._acknowledged |= acknowledged
        self._present = frozenset(acknowledged)
        if faults:
            raise min(faults, key=lambda fault: isinstance(fault, LedgerNotLinkedError))

    def _checked_own(self, parsed: Mapping[str, ShownLedger]) -> dict[str, int]:
        """How many entries of this site's ledger each peer has seen; all are in it."""
        lengths = {}
        for peer, theirs in parsed.items():
            own = theirs.seen.get(self._site_id)
            if own is None:
                continue
            try:
                own.verify(self._key.verify_key)
            except BadSignatureError as error:
                raise PeerError(f"site {peer!r} shows a head that this site never signed") from error
            self._ledger.check_own_head(own)
            lengths[peer] = own.length
        return lengths

    def _followed(self, peer: str, theirs: ShownLedger, seen: LedgerHead | None) -> LedgerHead:
        key, head = self._peers[peer], theirs.head
        head.verify(key)
        if seen is None:
            return head
        if head.ledger_id != seen.ledger_id or head.length < seen.length:
            raise PeerError(
                f"site {peer!r} shows a ledger of {head.length} entries, after one of {seen.length}: "
                "an old or a second copy"
            )
        for segment in (theirs.latest, theirs.catch_up):
            if segment is None or not segment.reaches(seen):
                continue
            segment.head.verify(key)
            if not segment.follow(seen):
                raise PeerError(
                    f"the ledger of site {peer!r}, {segment.head.length} entries, does not continue the one "
                    f"of {seen.length} entries that it showed before: an old copy that grew, or a second one"
                )
            if segment is theirs.latest:
                return head
            raise _CatchUpError(peer, segment.head)
        raise LedgerNotLinkedError(
            f"site {peer!r} does not show how its ledger of {head.length} entries continues the one of "
            f"{seen.length} entries that was seen before"
        )

    def _segment(self, entries: Sequence[LedgerEntry], base: int, limit: int) -> LedgerSegment:
        return LedgerSegment.cut(
            entries, ledger_id=self._ledger.ledger_id, key=self._key, base=base, limit=limit
        )

    def _is_of(self, peer: str, head: LedgerHead) -> bool:
        """Whether a remembered head is that of the site with this id *in this study*."""
        if peer not in self._peers:
            return False
        try:
            head.verify(self._peers[peer])
        except PeerError:
            return False
        return True


class _CatchUpError(LedgerNotLinkedError):
    """Progress, but not all the way: ``head`` is the intermediate one that was reached."""

    def __init__(self, peer: str, head: LedgerHead) -> None:
        super().__init__(
            f"the ledger of site {peer!r} is followed up to entry {head.length}, not yet further"
        )
        self.head = head


def _first_shown(entries: Sequence[LedgerEntry]) -> int:
    """Number of the first entry whose head may have been shown: heads are shown with attempts."""
    return next((entry.sequence for entry in entries if entry.kind == ATTEMPT), len(entries))
