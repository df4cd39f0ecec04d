"""The contour integral against closed forms, against two other accountants, and as the second that counts."""

from __future__ import annotations

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

from privacy.compliance import epsilon as officer
from privacy.compliance.dsse import EvidenceError
from privacy.compliance.ledger_check import ChargedEvent
from privacy.dp import accounting, second_accountant
from privacy.dp.accounting import AccountantsDisagreeError, PrivacyEvent, epsilon, gaussian_epsilon
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.saddle_point import Groups, saddle_point_epsilon
from privacy.dp.second_accountant import agreed_epsilon, check_planned_epsilon


def event(sigma: float, *, q: float, steps: int = 1) -> PrivacyEvent:
    return PrivacyEvent(
        kind="gaussian/v1", sampling_rate=q, steps=steps,
        noise_multiplier_world=sigma, noise_multiplier_colluding=sigma / math.sqrt(2), max_divergence=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.67, 5.0, 20.0])
@pytest.mark.parametrize("delta", [1e-4, 1e-5, 1e-9])
def test_full_participation_is_the_closed_form(mu: float, delta: float) -> None:
    """Also composed of unequal parts, mu adding up in squares."""
    exact = gaussian_epsilon(mu, delta)
    assert saddle_point_epsilon(((1.0, 1 / mu, 1),), delta) == pytest.approx(exact, rel=1e-9)
    parts = ((1.0, math.sqrt(2) / mu, 1), (1.0, 2 / mu, 2))
    assert saddle_point_epsilon(parts, delta) == pytest.approx(exact, rel=1e-9)


def single_step_delta(found: float, q: float, sigma: float) -> float:
    """Hockey-stick of removing: the half line where (1 - q) Q + q P exceeds e^epsilon Q, written out."""
    edge = sigma**2 * math.log((math.exp(found) - 1 + q) / q) + 0.5
    mixture = (1 - q) * norm.sf(edge / sigma) + q * norm.sf((edge - 1) / sigma)
    return float(mixture - math.exp(found) * norm.sf(edge / sigma))


@pytest.mark.parametrize(("q", "sigma"), [(0.5, 2.0), (0.1, 1.0), (0.01, 5.0), (0.9, 3.0)])
def test_one_sampled_step_is_exact(q: float, sigma: float) -> None:
    found = saddle_point_epsilon(((q, sigma, 1),), 1e-5)
    assert found is not None
    assert single_step_delta(found, q, sigma) == pytest.approx(1e-5, rel=1e-6)


SAMPLED: list[Groups] = [
    ((0.1, 1.872, 1000),),
    ((0.1, 1.872, 1000), (1.0, 4.0, 2)),
    ((0.25, 3.0, 100), (1.0, 4.0, 2)),
    ((0.5, 1.74, 24),),
    ((0.01, 1.0, 1000),),
    ((0.001, 0.8, 10_000),),
    ((0.9, 3.0, 30),),
    ((0.5, 2.0, 3),),
    ((0.02, 0.6, 50), (0.3, 20.0, 24)),
]


@pytest.mark.parametrize("groups", SAMPLED, ids=str)
def test_it_agrees_with_privacy_loss_distributions(groups: Groups) -> None:
    """PLD rounds upward; the two stay within 5e-4 of one another, relative (2e-3 is tolerated)."""
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    for q, sigma, steps in groups:
        gaussian = GaussianDpEvent(sigma)
        accountant.compose(gaussian if q == 1 else PoissonSampledDpEvent(q, gaussian), steps)
    pld = float(accountant.get_epsilon(1e-5))
    found = saddle_point_epsilon(groups, 1e-5)
    assert found == pytest.approx(pld, rel=5e-4)
    assert found is not None and found <= pld * (1 + 1e-4)


def test_where_it_would_take_too_long_it_gives_no_figure() -> None:
    assert saddle_point_epsilon(((0.001, 2.0, 2),), 1e-5) is None
    report = epsilon([event(2.0, q=0.001, steps=2)], 1e-5)
    assert report.second is None and report.reported == report.pld < report.rdp


@pytest.mark.parametrize("view", ["world", "all_others_collude"])
def test_the_larger_of_two_tight_figures_counts_at_the_site_and_at_the_officer(view: str) -> None:
    """One share of noise is left where all others collude; the coins stay the site's own secret."""
    events = [event(2.5, q=0.25)] * 30 + [event(4.0, q=1.0)] * 2
    report = epsilon(events, 1e-5, view=view)  # type: ignore[arg-type]
    assert report.closed_form is None and report.saddle_point is not None
    assert (
        report.reported
        == max(report.pld, report.saddle_point)
        == pytest.approx(report.saddle_point, rel=1e-3)
    )
    charged = [
        ChargedEvent(
            kind=e.kind, sampling_rate=e.sampling_rate, steps=e.steps, max_divergence=e.max_divergence,
            noise_multiplier_world=e.noise_multiplier_world,
            noise_multiplier_colluding=e.noise_multiplier_colluding,
        )
        for e in events
    ]  # fmt: skip
    spent = officer.spent_epsilon(charged, delta=1e-5, observer="world" if view == "world" else "colluding")
    assert spent.second_is == "saddle point" and spent.reported == max(spent.first, spent.second)
    assert spent.reported == pytest.approx(report.reported, rel=1e-3)
    if view == "all_others_collude":
        alone = [event(e.noise_multiplier_colluding, q=e.sampling_rate) for e in events]
        assert report.reported == pytest.approx(epsilon(alone, 1e-5).reported)
        assert report.reported > epsilon(events, 1e-5).reported


def test_the_larger_one_counts_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [event(2.6, q=0.25)] * 30
    pld = epsilon(events, 1e-5).pld
    monkeypatch.setattr(accounting, "saddle_point_epsilon", lambda *_: 1.001 * pld)
    monkeypatch.setattr(officer, "saddle_point_epsilon", lambda *_: 1.001 * pld)
    accounting._compose.cache_clear()
    officer._two_accountants.cache_clear()
    assert epsilon(events, 1e-5).reported == pytest.approx(1.001 * pld)
    charged = ChargedEvent(
        kind="gaussian/v1", sampling_rate=0.25, steps=30, max_divergence=0.0,
        noise_multiplier_world=2.6, noise_multiplier_colluding=2.6,
    )  # fmt: skip
    assert officer.spent_epsilon([charged], delta=1e-5, observer="world").reported == pytest.approx(
        1.001 * pld
    )
    accounting._compose.cache_clear()
    officer._two_accountants.cache_clear()


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_accountants_further_apart_than_tolerated_give_no_figure(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr(
        accounting, "saddle_point_epsilon", lambda *a: factor * (saddle_point_epsilon(*a) or 0)
    )
    monkeypatch.setattr(officer, "saddle_point_epsilon", lambda *a: factor * (saddle_point_epsilon(*a) or 0))
    with pytest.raises(AccountantsDisagreeError):
        epsilon([event(2.7, q=0.25)] * 30, 1e-5)
    charged = ChargedEvent(
        kind="gaussian/v1", sampling_rate=0.25, steps=30, max_divergence=0.0,
        noise_multiplier_world=2.7, noise_multiplier_colluding=2.7,
    )  # fmt: skip
    with pytest.raises(EvidenceError, match="disagree"):
        officer.spent_epsilon([charged], delta=1e-5, observer="world")


def sampled_plan(q: float) -> ExecutionPlan:
    return propose_privacy(
        mode="distributed", epsilon=8.0, delta=1e-5, clip_norm=0.5, rounds=10, n_sites=3, threshold=3,
        max_colluding=1, dimension=20_000, declared_patients=60, sampling_rate=q,
    ).execution  # fmt: skip


def test_a_plan_is_calibrated_for_the_larger_figure_and_three_accountants_agree_on_it() -> None:
    execution = sampled_plan(0.25)
    planned = execution.planned_epsilon()
    assert planned.saddle_point is not None
    assert 7.98 <= planned.reported <= 8.0
    check_planned_epsilon(execution)
    events = [execution.training_event()] * execution.max_attempts + [execution.audit_event()] * 2
    larger, _ = agreed_epsilon(events, execution.delta, view="all_others_collude")
    assert larger > planned.reported


def test_a_site_does_not_serve_a_plan_on_which_accountants_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus is told another rate than is charged."""
    execution = sampled_plan(0.25)
    original = second_accountant.PRVAccountant.get_epsilon

    def wrong(self: object, *rest: object, **options: object) -> object:
        self.history = [(s, min(1.0, 1.1 * q), n) for s, q, n in self.history]  # type: ignore[attr-defined]
        return original(self, *rest, **options)

    monkeypatch.setattr(second_accountant.PRVAccountant, "get_epsilon", wrong)
    with pytest.raises(AccountantsDisagreeError, match="PRV"):
        check_planned_epsilon(execution)
