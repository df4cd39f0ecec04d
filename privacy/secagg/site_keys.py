"""Stage ADVERTISED: a site has shown its keys; it checks the others' and deals shares of its secrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from privacy.secagg.keys import (
    AttemptKeys,
    WeakKeyError,
    seal_share,
    seed_commitment,
    share_commitment,
)
from privacy.secagg.messages import DealtShare, KeyAdvertisement
from privacy.secagg.reasons import AggregationRefusedError, RefusalReason
from privacy.secagg.session import Session
from privacy.secagg.shamir import split_secret
from privacy.secagg.site_masking import SharedState
from privacy.secagg.site_state import SiteState
from privacy.secagg.statements import KeyStatement, ShareStatement, key_set_digest
from privacy.secagg.transitions import SiteStage
from privacy.secret_random import SecretRandom
from shared.canonical import canonical_json
from shared.identity import BadSignatureError, SigningKey

VerifiedKeys = dict[str, KeyAdvertisement]


@dataclass(kw_only=True)
class AdvertisedState(SiteState):
    """Keys exist and were signed; nothing of the other sites is known yet."""

    stage: ClassVar[SiteStage] = SiteStage.ADVERTISED
    secrets: AttemptKeys = field(repr=False)
    own_keys: KeyAdvertisement

    @classmethod
    def begin(
        cls,
        *,
        site_id: str,
        key: SigningKey,
        session: Session,
        entropy: SecretRandom,
        ledger_head: dict[str, Any],
    ) -> AdvertisedState:
        """Fresh keys and seed for an attempt whose number is durable already."""
        secrets = AttemptKeys(entropy)
        statement = KeyStatement(
            session=session,
            site_id=site_id,
            mask_public=secrets.mask_public,
            share_public=secrets.share_public,
            seed_commitment=seed_commitment(session, site_id, secrets.seed),
            ledger_head=canonical_json(ledger_head),
        )
        own_keys = KeyAdvertisement(
            site_id=site_id,
            mask_public=statement.mask_public,
            share_public=statement.share_public,
            seed_commitment=statement.seed_commitment,
            ledger_head=ledger_head,
            signature=statement.sign(key),
        )
        return cls(site_id=site_id, key=key, session=session, secrets=secrets, own_keys=own_keys)

    def verify_keys(self, offered: Sequence[KeyAdvertisement]) -> VerifiedKeys:
        """All keys of the attempt, in roster order, each signed by its site for this attempt.

        Raises:
            AggregationRefusedError: UNKNOWN_SITE, TOO_FEW_PEERS, SELF_NOT_AMONG_PEERS, OWN_KEYS_CHANGED,
                BAD_KEY_SIGNATURE, KEY_USED_TWICE, WEAK_KEY.
        """
        by_site = {item.site_id: item for item in offered}
        self._check_sites(by_site, len(offered))
        keys = {site_id: by_site[site_id] for site_id in self.session.roster.ordered(by_site)}
        for item in keys.values():
            try:
                item.statement(self.session).verify(item.signature)
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
                self.secrets.agree_on_masks(item.mask_public)
                self.secrets.agree_on_shares(item.share_public)
            except WeakKeyError as error:
                raise AggregationRefusedError(
                    RefusalReason.WEAK_KEY, f"a key of {item.site_id} is of small order", peer=item.site_id
                ) from error
        return keys

    def deal(self, keys: VerifiedKeys) -> tuple[SharedState, tuple[DealtShare, ...]]:
        """Share both secrets among all sites of the roster; each site with keys gets its own, sealed."""
        key_set = key_set_digest(self.session, [item.statement(self.session) for item in keys.values()])
        n = self.session.parameters.n_sites
        seed_shares = split_secret(self.secrets.seed, threshold=self.threshold, n_shares=n)
        key_shares = split_secret(self.secrets.mask_private, threshold=self.threshold, n_shares=n)
        dealt = []
        for recipient in keys:
            position = self.session.roster.position(recipient)
            pair = (seed_shares[position], key_shares[position])
            dealt.append(self._seal(keys[recipient], pair, key_set))
        state = SharedState(
            site_id=self.site_id,
            key=self.key,
            session=self.session,
            secrets=self.secrets,
            keys=keys,
            key_set=key_set,
        )
        return state, tuple(dealt)

    def wipe(self) -> None:
        self.secrets.wipe()

    def _check_sites(self, by_site: VerifiedKeys, offered: int) -> None:
        for site_id in by_site:
            if site_id not in self.session.roster:
                raise AggregationRefusedError(
                    RefusalReason.UNKNOWN_SITE,
                    f"{site_id[:64]} is not in the roster of the plan",
                    peer=site_id,
                )
        if len(by_site) != offered or len(by_site) < self.threshold:
            raise AggregationRefusedError(
                RefusalReason.TOO_FEW_PEERS,
                f"keys of {len(by_site)} sites are fewer than the threshold {self.threshold}",
            )
        if self.site_id not in by_site:
            raise AggregationRefusedError(RefusalReason.SELF_NOT_AMONG_PEERS, "the keys leave this site out")
        if by_site[self.site_id] != self.own_keys:
            raise AggregationRefusedError(RefusalReason.OWN_KEYS_CHANGED, "these are not this site's keys")

    def _seal(self, theirs: KeyAdvertisement, pair: tuple[bytes, bytes], key_set: bytes) -> DealtShare:
        recipient = theirs.site_id
        statement = ShareStatement(
            session=self.session,
            site_id=self.site_id,
            recipient=recipient,
            key_set=key_set,
            ciphertext=seal_share(
                self.secrets.agree_on_shares(theirs.share_public),
                pair[0] + pair[1],
                key_set=key_set,
                dealer=self.site_id,
                recipient=recipient,
            ),
            seed_share_commitment=share_commitment(self.session, "seed", self.site_id, recipient, pair[0]),
            key_share_commitment=share_commitment(self.session, "key", self.site_id, recipient, pair[1]),
        )
        return DealtShare(
            dealer=self.site_id,
            recipient=recipient,
            ciphertext=statement.ciphertext,
            seed_share_commitment=statement.seed_share_commitment,
            key_share_commitment=statement.key_share_commitment,
            signature=statement.sign(self.key),
        )
