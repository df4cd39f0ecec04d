"""What a site says of its in-run canaries (``canary-opening/v1``), and what all sites prove. No torch.

Before round 1 a site commits to its coins in its ledger; after the audit it opens them, with the score of
every canary, in or out. None of it is a function of patients beyond the candidate, which is released by a
private mechanism, and coins, which are independent of patients. So opening it costs no budget: for each fixed
draw of the coins the training has the guarantee, hence for the pair of coins and candidate too. Scores can be
computed again by whoever has plan and candidate.

The test is that of :mod:`privacy.audit.one_run`, over all sites together. Scores are split in two groups
where they separate best; the higher group is guessed to be in. A guess may use all scores, but no coin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from privacy.audit.one_run import (
    gaussian_claim_refuted,
    one_run_epsilon,
    one_run_gaussian_epsilon,
    one_run_p_value,
    one_run_power,
)
from privacy.audit.verdict import level_of_test
from privacy.dp.accounting import gaussian_mu
from shared.canonical import digest
from shared.errors import MalformedMessageError, PeerError
from shared.study_plan import StudyPlan

PREDICATE_TYPE = "canary-opening/v1"
COMMITMENT_KIND = "canary-commitment"
"""Kind of the ledger's entry; its details are ``study_id``, ``count``, ``commitment``."""

POWER_AT_ACCURACY = 0.9
"""Power is stated for a leak in which so many guesses are right, each by itself."""

_FIELDS = {
    "study_id", "plan_sha256", "candidate_sha256", "attempt", "site_id", "nonce", "coins", "scores",
}  # fmt: skip
_HEX = set("0123456789abcdef")


class CanaryMismatchError(PeerError):
    """An opening is not about this plan, or not what the site committed to."""


def coin_commitment(plan_digest: bytes, site_id: str, nonce: bytes, coins: Iterable[bool]) -> str:
    """Hex commitment to the coins; ``nonce`` (32 secret bytes) hides them."""
    drawn = bytes(coins)
    return digest("lacuna/canary-commitment/v1", plan_digest, site_id.encode(), nonce, drawn).hex()


@dataclass(frozen=True, kw_only=True)
class CanaryOpening:
    """Fields of the predicate.

    Attributes:
        nonce: 64 hex digits.
        coins: Whether each canary was trained on.
        scores: Primary attack; higher speaks for "in". None where it was not finite.
    """

    study_id: str
    plan_sha256: str
    candidate_sha256: str
    attempt: int
    site_id: str
    nonce: str
    coins: tuple[bool, ...]
    scores: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "study_id": self.study_id,
            "plan_sha256": self.plan_sha256,
            "candidate_sha256": self.candidate_sha256,
            "attempt": self.attempt,
            "site_id": self.site_id,
            "nonce": self.nonce,
            "coins": list(self.coins),
            "scores": list(self.scores),
        }

    @classmethod
    def from_dict(cls, value: Any) -> CanaryOpening:
        """Strict inverse of :meth:`to_dict`. Raises MalformedMessageError."""
        if not isinstance(value, dict) or set(value) != _FIELDS:
            raise MalformedMessageError("canary opening: fields missing or unknown")
        for name in ("study_id", "plan_sha256", "candidate_sha256", "site_id"):
            if not isinstance(value[name], str) or not 1 <= len(value[name]) <= 200:
                raise MalformedMessageError(f"canary opening: {name} is not a short text")
        nonce, coins, scores = value["nonce"], value["coins"], value["scores"]
        if not isinstance(nonce, str) or len(nonce) != 64 or not set(nonce) <= _HEX:
            raise MalformedMessageError("canary opening: the nonce is not 64 hex digits")
        if not isinstance(coins, list) or not all(type(coin) is bool for coin in coins):
            raise MalformedMessageError("canary opening: coins are true or false")
        if not isinstance(scores, list) or len(scores) != len(coins):
            raise MalformedMessageError("canary opening: one score for each coin is expected")
        for score in scores:
            number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
            if score is not None and not number:
                raise MalformedMessageError("canary opening: a score is a finite number or missing")
        if type(value["attempt"]) is not int:
            raise MalformedMessageError("canary opening: attempt is an integer")
        return cls(
            study_id=value["study_id"],
            plan_sha256=value["plan_sha256"],
            candidate_sha256=value["candidate_sha256"],
            attempt=value["attempt"],
            site_id=value["site_id"],
            nonce=nonce,
            coins=tuple(coins),
            scores=tuple(None if score is None else float(score) for score in scores),
        )

    def check(self, plan: StudyPlan, *, committed: str | None) -> None:
        """Is this about the plan's canaries at a site of it, and what ``committed`` (hex) commits to?

        Raises:
            CanaryMismatchError: says what is wrong.
        """
        who = f"the canaries of {self.site_id!r}"
        if self.study_id != plan.study_id or self.plan_sha256 != plan.digest().hex():
            raise CanaryMismatchError(f"{who} belong to another plan")
        if len(self.coins) != plan.audit.canaries_per_site:
            raise CanaryMismatchError(
                f"{who}: {len(self.coins)} of them, the plan has {plan.audit.canaries_per_site}"
            )
        if committed is None:
            raise CanaryMismatchError(f"{who}: the ledger commits to no coins before the first charge")
        made = coin_commitment(plan.digest(), self.site_id, bytes.fromhex(self.nonce), self.coins)
        if made != committed:
            raise CanaryMismatchError(f"{who}: these are not the coins that the ledger committed to")


@dataclass(frozen=True, kw_only=True)
class CanaryVerdict:
    """The one-run test over all sites' canaries.

    Attributes:
        n_canaries, n_guesses, n_correct: Over all sites.
        refuted: Whether the plan's promise is refuted at the test's level.
        epsilon_low: Lower bound on epsilon, at the plan's delta, that the guesses prove.
        epsilon_most: What they would prove if all were right.
        power: Probability to refute the promise if each guess is right with POWER_AT_ACCURACY.
    """

    n_canaries: int
    n_guesses: int
    n_correct: int
    refuted: bool
    epsilon_low: float
    epsilon_most: float
    power: float

    @property
    def text(self) -> str:
        """For the gate's list."""
        found = (
            f"{self.n_correct} of {self.n_guesses} coins guessed, which proves epsilon {self.epsilon_low:.2f}"
        )
        if self.refuted:
            return f"{found}: more than the promise allows"
        blind = f"; all right would prove {self.epsilon_most:.2f}; power {self.power:.2f} if "
        return f"{found}{blind}{100 * POWER_AT_ACCURACY:.0f}% were right"


def canary_verdict(plan: StudyPlan, openings: Mapping[str, CanaryOpening]) -> CanaryVerdict:
    """Judge the openings (by site) together.

    With every patient in every step of mode ``distributed`` or ``local`` the promise is a Gaussian curve and
    is tested as one; else as its (epsilon, delta). Mode ``unprotected`` promises nothing: never refuted.
    """
    level = level_of_test(plan, "canaries")
    guessed = _guesses(openings)
    right, total = sum(guess == coin for guess, coin in guessed), len(guessed)
    privacy = plan.privacy
    if privacy.epsilon is None or total == 0:
        return CanaryVerdict(
            n_canaries=total, n_guesses=total, n_correct=right, refuted=False,
            epsilon_low=0.0, epsilon_most=0.0, power=0.0,
        )  # fmt: skip
    promised, delta = privacy.epsilon, privacy.delta
    if privacy.sampling_rate == 1:
        bound, mu = one_run_gaussian_epsilon, gaussian_mu(promised, delta)

        def refuted(n_correct: int) -> bool:
            return gaussian_claim_refuted(n_correct, total, total, mu=mu, error=level)
    else:
        bound = one_run_epsilon

        def refuted(n_correct: int) -> bool:
            p = one_run_p_value(n_correct, total, total, epsilon=promised, delta=delta)
            return p <= level

    return CanaryVerdict(
        n_canaries=total,
        n_guesses=total,
        n_correct=right,
        refuted=refuted(right),
        epsilon_low=bound(right, total, total, delta=delta, error=level),
        epsilon_most=bound(total, total, total, delta=delta, error=level),
        power=one_run_power(total, refuted, accuracy=POWER_AT_ACCURACY),
    )


def _guesses(openings: Mapping[str, CanaryOpening]) -> list[tuple[bool, bool]]:
    """(guess, coin) of every canary: split by the largest variance between the groups (Otsu 1979).

    Between a quarter and three quarters are guessed to be in, as fair coins have it but for small numbers.
    A score that is not finite counts as the lowest; ties are broken by site and number.
    """
    pooled = [
        (score, site, index, coin)
        for site, opening in openings.items()
        for index, (coin, score) in enumerate(zip(opening.coins, opening.scores, strict=True))
    ]
    lowest = min((score for score, *_ in pooled if score is not None), default=0.0)
    ordered = sorted((lowest if score is None else score, *rest) for score, *rest in pooled)
    scores, n = np.array([score for score, *_ in ordered], dtype=np.float64), len(ordered)
    cuts = range(max(1, math.ceil(n / 4)), max(1, math.floor(3 * n / 4)) + 1)

    def spread(cut: int) -> float:
        return cut * (n - cut) * float(scores[cut:].mean() - scores[:cut].mean()) ** 2

    cut = max(cuts, key=spread) if n > 1 else 0
    return [(place >= cut, bool(coin)) for place, (*_, coin) in enumerate(ordered)]


def canary_outlook(plan: StudyPlan) -> str:
    """What the plan's in-run canaries can find at all, before any training."""
    count = plan.audit.canaries_per_site
    nothing = CanaryOpening(
        study_id=plan.study_id, plan_sha256="", candidate_sha256="", attempt=0, site_id="", nonce="",
        coins=(True,) * count, scores=(0.0,) * count,
    )  # fmt: skip
    verdict = canary_verdict(plan, {entry.site_id: nothing for entry in plan.roster.sites})
    return (
        f"{verdict.n_canaries} in-run canaries: all guessed right would prove epsilon "
        f"{verdict.epsilon_most:.2f}, the plan promises {plan.privacy.epsilon}; power {verdict.power:.2f} "
        f"against a leak in which {100 * POWER_AT_ACCURACY:.0f}% are"
    )
