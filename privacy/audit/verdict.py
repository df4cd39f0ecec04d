"""The verdict: a pure function of the plan, the pooled noised counts and who contributed. No torch.

The gate and the compliance officer compute it again from the same numbers. Accounting is the guarantee; an
audit can only refute it. So the best outcome is "no violation found, at this power", and the word "private"
stands in no verdict.

One significance level (``audit.significance``) is split before anything is looked at: evenly over the
attempts that the plan allows, then half to the primary attack and an eighth to each of the other four tests.
Where the plan pools secondary attacks they get half of the primary attack's share, evenly; where it has
in-run canaries, an eighth of everything is theirs. Sites have no tests of their own to split it over: their
counts are added up before anything is tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy import stats

from privacy.audit.bounds import Interval, gaussian_auc_ceiling, mann_whitney_p_value
from privacy.audit.counts import CountsLayout, PooledCounts, pooled_noise_std
from privacy.audit.pooled_auc import NoisedHistograms, pooled_auc_interval, pooled_power
from shared.errors import MalformedMessageError, UsageError
from shared.study_plan import AuditClause, StudyPlan

Status = Literal["pass", "fail", "invalid"]
Outcome = Literal["no_violation_found", "violation", "invalid"]

CONDITIONS = (
    "membership_attack",
    "power",
    "control_public_loss",
    "control_members",
    "control_planted_leak",
    "copies",
)
SECONDARY = "secondary_attacks"
"""One more condition, the last, where the plan pools secondary attacks."""

_SHARES = {
    "membership_attack": 1 / 2,
    "control_public_loss": 1 / 8,
    "control_members": 1 / 8,
    "control_planted_leak": 1 / 8,
    "copies": 1 / 8,
}
_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class PlantedLeak:
    """Result of the planted-leak control. It depends on the candidate and public seeds alone: it is public.

    Attributes:
        auc: AUC of the primary attack, planted samples against fresh ones.
        n_planted, n_fresh: Group sizes; 0 where the control could not run.
    """

    auc: float
    n_planted: int
    n_fresh: int

    def p_value(self) -> float:
        """Of "the pipeline cannot tell planted samples from fresh ones"; 1 where it could not run."""
        if min(self.n_planted, self.n_fresh) < 1 or not 0.0 <= self.auc <= 1.0:
            return 1.0
        return mann_whitney_p_value(self.auc, self.n_planted, self.n_fresh)

    def to_dict(self) -> dict[str, Any]:
        return {"auc": self.auc, "n_planted": self.n_planted, "n_fresh": self.n_fresh}

    @classmethod
    def from_dict(cls, value: Any) -> PlantedLeak:
        """Raises MalformedMessageError."""
        if not isinstance(value, dict) or set(value) != {"auc", "n_planted", "n_fresh"}:
            raise MalformedMessageError("planted leak: exactly auc, n_planted and n_fresh are expected")
        counts = (value["n_planted"], value["n_fresh"])
        if any(type(n) is not int or not 0 <= n <= 64 for n in counts):
            raise MalformedMessageError("planted leak: group sizes are integers from 0 to 64")
        auc = _number(value["auc"], "planted leak: auc")
        if not 0.0 <= auc <= 1.0:
            raise MalformedMessageError("planted leak: auc lies between 0 and 1")
        return cls(auc=auc, n_planted=value["n_planted"], n_fresh=value["n_fresh"])


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition with its figure and bound, in words that a gate can print.

    ``figure``, ``low`` and ``high`` are None where the numbers carry no figure.
    """

    name: str
    status: Status
    figure: float | None
    low: float | None
    high: float | None
    bound: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "figure": self.figure,
            "low": self.low,
            "high": self.high,
            "bound": self.bound,
            "text": self.text,
        }


@dataclass(frozen=True, kw_only=True)
class PooledVerdict:
    """Every condition, in the order of :data:`CONDITIONS`, and their conjunction."""

    conditions: tuple[Condition, ...]

    @property
    def outcome(self) -> Outcome:
        statuses = {condition.status for condition in self.conditions}
        if "fail" in statuses:
            return "violation"
        return "invalid" if "invalid" in statuses else "no_violation_found"

    @property
    def passed(self) -> bool:
        """True only if every condition holds; an invalid audit has not passed."""
        return self.outcome == "no_violation_found"

    @property
    def summary(self) -> str:
        """One line; names each condition that does not hold."""
        if self.passed:
            power = self.condition("power").figure
            return f"no violation found, at this power ({power or 0.0:.2f})"
        broken = [f"{c.name}: {c.text}" for c in self.conditions if c.status != "pass"]
        head = "violation found" if self.outcome == "violation" else "audit invalid, which is not a pass"
        return f"{head}: " + "; ".join(broken)

    def condition(self, name: str) -> Condition:
        """Raises UsageError for an unknown name."""
        for condition in self.conditions:
            if condition.name == name:
                return condition
        raise UsageError(f"a verdict has no condition {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON; numbers are rounded to 5 digits, so that a recomputation elsewhere gives the same."""
        return {
            "outcome": self.outcome,
            "summary": self.summary,
            "conditions": [condition.to_dict() for condition in self.conditions],
        }

    @classmethod
    def from_dict(cls, value: Any) -> PooledVerdict:
        """Strict inverse of :meth:`to_dict`. Raises MalformedMessageError."""
        try:
            verdict = cls(conditions=tuple(_condition_from(item) for item in value["conditions"]))
        except (KeyError, TypeError) as error:
            raise MalformedMessageError("verdict: not of the form that Lacuna writes") from error
        names = tuple(c.name for c in verdict.conditions)
        if names not in (CONDITIONS, (*CONDITIONS, SECONDARY)) or verdict.to_dict() != value:
            raise MalformedMessageError("verdict: conditions missing, or outcome and conditions disagree")
        return verdict


def level_share(clause: AuditClause, condition: str) -> float:
    """The share of ``audit.significance`` that one test gets, before the split over attempts.

    Of ``secondary_attacks`` each attack is a test of its own; ``canaries`` is the one-run test of all sites'
    in-run canaries.
    """
    pooled, of_canaries = len(clause.pooled_attacks), 1 / 8
    if condition == "canaries":
        return of_canaries
    share = _SHARES["membership_attack" if condition == SECONDARY else condition]
    if condition == SECONDARY:
        share /= 2.0 * max(pooled, 1)
    elif condition == "membership_attack" and pooled:
        share /= 2.0
    return share * (1.0 - of_canaries) if clause.canaries_per_site else share


def level_of_test(plan: StudyPlan, condition: str) -> float:
    """The significance of one test of one audit attempt."""
    return plan.audit.significance * level_share(plan.audit, condition) / plan.privacy.max_audit_attempts


def compute_verdict(
    plan: StudyPlan, pooled_counts: Sequence[int], survivors: Sequence[str], *, planted_leak: PlantedLeak
) -> PooledVerdict:
    """Judge a candidate.

    Args:
        plan: The approved plan.
        pooled_counts: Sum of the survivors' noised count vectors (layout: :class:`CountsLayout`).
        survivors: Site ids whose vectors are in the sum.
        planted_leak: The public control's result at the site that signs.

    Raises:
        UsageError: the counts or survivors do not fit the plan.
    """
    roster = {entry.site_id for entry in plan.roster.sites}
    if len(set(survivors)) != len(survivors) or not set(survivors) <= roster:
        raise UsageError("the survivors of the audit are not distinct sites of the plan's roster")
    if len(survivors) < plan.secure_aggregation.threshold:
        raise UsageError(f"{len(survivors)} survivors are fewer than the plan's threshold")
    pooled = CountsLayout.from_plan(plan).read(
        pooled_counts, noise_std=pooled_noise_std(plan, len(survivors))
    )
    conditions: tuple[Condition, ...] = (
        _attack(plan, pooled),
        _power(plan, pooled),
        _control(plan, "control_public_loss", pooled.public_loss, "plain loss on the public model"),
        _control(plan, "control_members", pooled.member_halves, "members against members"),
        _planted(plan, planted_leak),
        _copies(plan, pooled),
    )
    if plan.audit.pooled_attacks:
        conditions += (_secondary(plan, pooled),)
    return PooledVerdict(conditions=conditions)


def attack_bound(plan: StudyPlan) -> float:
    """AUC that the interval's low end must not exceed: the plan's, or the mechanism's own ceiling.

    Nor may its high end lie below 1 minus that: who ranks members last tells them apart as well. Each end has
    the level of the test: a true AUC on one bound is so far from the other that chance hardly crosses that
    one too (simulated in the tests).
    """
    return min(plan.audit.max_auc, gaussian_auc_ceiling(plan.privacy.epsilon, plan.privacy.delta))


def _tells_apart(interval: Interval, bound: float) -> tuple[bool, str]:
    """Whether an attack's interval lies beyond the bound on either side; and its figures in words."""
    words = _auc_words(interval)
    if interval.high < 1.0 - bound:
        return True, f"{words}; its upper end is below {1.0 - bound:.3f}: members rank last, as telling"
    above = interval.low > bound
    return above, f"{words}; its lower end {'is above' if above else 'is not above'} {bound:.3f}"


def _attack(plan: StudyPlan, pooled: PooledCounts) -> Condition:
    bound = attack_bound(plan)
    interval = pooled_auc_interval(pooled.attack, error=level_of_test(plan, "membership_attack"))
    if interval is None:
        return _no_figure(plan, "membership_attack", bound)
    failed, text = _tells_apart(interval, bound)
    return _condition("membership_attack", "fail" if failed else "pass", interval, bound, text)


def _secondary(plan: StudyPlan, pooled: PooledCounts) -> Condition:
    """The pooled secondary attack whose interval tells most; each has its own share of the significance.

    They only add reasons to refuse: where noise leaves one without a figure, power is the primary attack's.
    """
    bound, found = attack_bound(plan), []
    for attack, histograms in zip(plan.audit.pooled_attacks, pooled.secondary, strict=True):
        interval = pooled_auc_interval(histograms, error=level_of_test(plan, SECONDARY))
        if interval is not None:
            found.append((max(interval.low, 1.0 - interval.high), attack.attack_id, interval))
    if not found:
        text = "no secondary attack carries a figure under the noise"
        return Condition(
            name=SECONDARY, status="pass", figure=None, low=None, high=None, bound=_rounded(bound), text=text
        )
    _, attack_id, interval = max(found, key=lambda item: item[:2])
    failed, text = _tells_apart(interval, bound)
    text = f"{attack_id}, the most telling of {len(found)} with a figure: {text}"
    return _condition(SECONDARY, "fail" if failed else "pass", interval, bound, text)


def _auc_words(interval: Interval) -> str:
    """The figure and its interval; the interval alone where that says nothing."""
    if _says_nothing(interval):
        return "AUC anywhere from 0 to 1, too few patients for a figure"
    return f"AUC {interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _says_nothing(auc: Interval) -> bool:
    return auc.low <= 0.0 and auc.high >= 1.0


def _power(plan: StudyPlan, pooled: PooledCounts) -> Condition:
    clause = plan.audit
    power = pooled_power(
        pooled.attack,
        true_auc=clause.power_at_auc,
        bound=attack_bound(plan),
        error=level_of_test(plan, "membership_attack"),
    )
    enough = power >= clause.min_power
    text = (
        f"power {power:.2f} against an attack of AUC {clause.power_at_auc:g}, at least {clause.min_power:g}"
    )
    if not enough:
        accepted = clause.low_power == "accept"
        text += " is asked: too blind; the plan " + ("accepts that" if accepted else "refuses that")
    return Condition(
        name="power",
        status="pass" if enough or clause.low_power == "accept" else "invalid",
        figure=_rounded(power),
        low=None,
        high=None,
        bound=clause.min_power,
        text=text,
    )


def _control(plan: StudyPlan, name: str, histograms: NoisedHistograms, what: str) -> Condition:
    interval = pooled_auc_interval(histograms, error=level_of_test(plan, name) / 2.0)
    if interval is None:
        return _no_figure(plan, name, 0.5)
    by_chance = interval.low <= 0.5 <= interval.high
    text = f"{what}: {_auc_words(interval)} "
    text += "has 0.5 within" if by_chance else "excludes 0.5: the audit itself is broken"
    return _condition(name, "pass" if by_chance else "invalid", interval, 0.5, text)


def _planted(plan: StudyPlan, planted: PlantedLeak) -> Condition:
    level = level_of_test(plan, "control_planted_leak")
    p_value = planted.p_value()
    seen = p_value <= level
    text = f"planted leak: AUC {planted.auc:.3f} on {planted.n_planted} planted and {planted.n_fresh} fresh"
    text += " samples, seen" if seen else " samples, NOT seen: the attack is blind"
    return Condition(
        name="control_planted_leak",
        status="pass" if seen else "invalid",
        figure=_rounded(p_value),
        low=None,
        high=None,
        bound=_rounded(level),
        text=text,
    )


def _copies(plan: StudyPlan, pooled: PooledCounts) -> Condition:
    most = plan.audit.max_copied_patients
    z = float(stats.norm.isf(level_of_test(plan, "copies")))
    low, high = pooled.copied - z * pooled.copied_std, pooled.copied + z * pooled.copied_std
    if plan.audit.copy_samples == 0:
        text = "copies were not looked for: the plan asks for no samples"
        return Condition(
            name="copies", status="pass", figure=None, low=None, high=None, bound=most, text=text
        )
    failed = low > most
    text = f"{pooled.copied:.1f} patients copied ({low:.1f} to {high:.1f}, noise included); "
    text += f"the lower end {'is above' if failed else 'is not above'} {most}"
    if pooled.copied_std > 0:
        text += f"; {math.ceil(most + z * pooled.copied_std)} copied patients would be noticed half the time"
    interval = Interval(estimate=pooled.copied, low=low, high=high, error=level_of_test(plan, "copies"))
    return _condition("copies", "fail" if failed else "pass", interval, most, text)


def _no_figure(plan: StudyPlan, name: str, bound: float) -> Condition:
    accepted = plan.audit.low_power == "accept"
    text = "too few patients for any figure; the plan " + ("accepts that" if accepted else "refuses that")
    status: Status = "pass" if accepted else "invalid"
    return Condition(
        name=name, status=status, figure=None, low=None, high=None, bound=_rounded(bound), text=text
    )


def _condition(name: str, status: Status, interval: Interval, bound: float, text: str) -> Condition:
    return Condition(
        name=name,
        status=status,
        figure=None if name != "copies" and _says_nothing(interval) else _rounded(interval.estimate),
        low=_rounded(interval.low),
        high=_rounded(interval.high),
        bound=_rounded(bound),
        text=text,
    )


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MalformedMessageError(f"{what}: a finite number is expected")
    return float(value)


def _condition_from(value: Any) -> Condition:
    figures = {
        name: None if value[name] is None else _number(value[name], f"verdict: {name}")
        for name in ("figure", "low", "high")
    }
    name, status, text = value["name"], value["status"], value["text"]
    if status not in ("pass", "fail", "invalid") or not isinstance(name, str) or not isinstance(text, str):
        raise MalformedMessageError("verdict: a condition has no known status")
    bound = _number(value["bound"], "verdict: bound")
    return Condition(name=name, status=status, bound=bound, text=text, **figures)
