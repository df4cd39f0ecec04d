"""Epsilons: closed form, known values, composition, closeness, and agreement of independent accountants."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import norm

from privacy.dp.accounting import (
    PrivacyEvent,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)
from privacy.dp.closeness import continuous_std, rounding_divergence, sum_divergence, tail_probability
from privacy.dp.second_accountant import agreed_epsilon, prv_epsilon
from privacy.dp.sensitivity import clipped_sum_sensitivity
from shared.errors import MalformedMessageError, UsageError


def event(sigma: float, *, q: float = 1.0, steps: int = 1, tau: float = 0.0) -> PrivacyEvent:
    return PrivacyEvent(
        kind="gaussian/v1",
        sampling_rate=q,
        steps=steps,
        noise_multiplier_world=sigma,
        noise_multiplier_colluding=sigma / 2,
        max_divergence=tau,
    )


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.67, 5.0])
@pytest.mark.parametrize("delta", [1e-4, 1e-5, 1e-9])
def test_closed_form_is_the_gaussian_trade_off(mu: float, delta: float) -> None:
    found = gaussian_epsilon(mu, delta)
    exact = norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu)
    assert exact == pytest.approx(delta, rel=1e-3)
    assert gaussian_delta(found, mu) == pytest.approx(delta, rel=1e-6)
    assert gaussian_mu(found, delta) == pytest.approx(mu, rel=1e-6)


def test_known_values_of_the_design() -> None:
    """DESIGN section 5: delta 1e-4, q = 0.1, 1000 steps, epsilon 8: PLD sigma 1.872, RDP 1.997; section 3:
    two sites at epsilon 8 (delta 1e-5) give 19.1, mu adding up."""
    assert epsilon([event(1.872, q=0.1)] * 1000, 1e-4).pld == pytest.approx(8.0, rel=2e-3)
    assert epsilon([event(1.997, q=0.1, steps=1000)], 1e-4).rdp == pytest.approx(8.0, rel=5e-3)
    assert gaussian_epsilon(2 * gaussian_mu(8.0, 1e-5), 1e-5) == pytest.approx(19.1, rel=2e-2)


def test_full_participation_agrees_with_the_closed_form_to_a_percent() -> None:
    events = [event(3.8)] * 36 + [event(2.7)] * 2
    report = epsilon(events, 1e-5)
    mu = math.sqrt(36 / 3.8**2 + 2 / 2.7**2)
    assert report.mu == pytest.approx(mu)
    assert report.reported == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-2)
    assert report.closed_form is not None and report.reported >= max(report.pld, report.closed_form)
    assert report.rdp > report.reported


def test_steps_are_attempts() -> None:
    assert epsilon([event(4.0, steps=12)], 1e-5).reported == epsilon([event(4.0)] * 12, 1e-5).reported


def test_the_past_is_not_forgotten() -> None:
    """The trap of a PrivacyEngine made anew each round: epsilon of n rounds is not that of the last one."""
    one, fifty = epsilon([event(5.0)], 1e-5).reported, epsilon([event(5.0)] * 50, 1e-5).reported
    assert fifty > 5 * one


def test_rate_and_empty_steps_count() -> None:
    sampled, full = epsilon([event(1.5, q=0.1, steps=50)], 1e-5), epsilon([event(1.5, steps=50)], 1e-5)
    assert sampled.reported < full.reported
    assert epsilon([], 1e-5).reported == 0


def test_views() -> None:
    world = epsilon([event(4.0)], 1e-5).reported
    assert epsilon([event(4.0)], 1e-5, view="all_others_collude").reported == pytest.approx(
        epsilon([event(2.0)], 1e-5).reported
    )
    assert epsilon([event(4.0)], 1e-5, view="all_others_collude").reported > world


def test_divergence_costs_epsilon() -> None:
    plain, far = epsilon([event(4.0)], 1e-5), epsilon([event(4.0, tau=0.05)], 1e-5)
    assert far.reported >= plain.reported + 0.1


def test_unprotected_is_infinite() -> None:
    assert epsilon([event(4.0), PrivacyEvent.unprotected()], 1e-5).reported == math.inf


@pytest.mark.parametrize("q", [0.1, 0.25])
def test_prv_agrees_below_full_participation(q: float) -> None:
    events = [event(3.0, q=q, steps=100), event(4.0)]
    larger, report = agreed_epsilon(events, 1e-5)
    assert larger == pytest.approx(report.reported, rel=1e-2, abs=0.02)
    assert prv_epsilon([PrivacyEvent.unprotected()], 1e-5) == math.inf


def test_events_travel_as_json_and_nothing_else_parses() -> None:
    whole = event(3.0, q=0.5, steps=7, tau=1e-20)
    assert PrivacyEvent.from_dict(whole.to_dict()) == whole
    assert PrivacyEvent.from_dict(PrivacyEvent.unprotected().to_dict()) == PrivacyEvent.unprotected()
    good = whole.to_dict()
    for name, value in [
        ("kind", "gaussian/v2"), ("steps", 0), ("steps", 1.5), ("steps", True), ("sampling_rate", 0),
        ("sampling_rate", 1.1), ("noise_multiplier_world", -1), ("noise_multiplier_colluding", "3"),
        ("max_divergence", -1), ("extra", 1), ("kind", "unprotected/v1"),
    ]:  # fmt: skip
        with pytest.raises(MalformedMessageError):
            PrivacyEvent.from_dict({**good, name: value})


def test_torch_stays_out() -> None:
    program = (
        "import sys; import privacy.ledger, privacy.dp.execution_plan, privacy.dp.calibration, "
        "privacy.dp.noise, privacy.dp.patient_sampling; "
        "print([m for m in ('torch', 'opacus', 'monai', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def discrete_pmf(std: float, half: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * std**2))
    return weights / weights.sum()


@pytest.mark.parametrize(("std", "shift"), [(4.0, 1), (4.0, 5), (5.7, 3)])
def test_integer_noise_is_as_private_as_its_continuous_figure(std: float, shift: int) -> None:
    """delta(epsilon) of one discrete Gaussian, summed over the integers, against closeness.py."""
    half = 300
    p = discrete_pmf(std, half)
    q = np.roll(p, shift)
    for eps in (0.1, 0.5, 1.0, 2.0, 4.0):
        exact = np.maximum(p - math.exp(eps) * q, 0).sum()
        tau = rounding_divergence(std)
        assert exact <= math.exp(tau) * gaussian_delta(eps - 2 * tau, shift / continuous_std(std)) + 1e-15


def test_sum_of_shares_is_close_to_one_gaussian() -> None:
    """Exact convolution at a scale where the bound is visible (0.7 steps), Theorem 12 of Kairouz et al."""
    share, shares, half = 0.7, 3, 40
    p = discrete_pmf(share, half)
    total = np.convolve(np.convolve(p, p), p)
    one = discrete_pmf(share * math.sqrt(shares), 3 * half)
    middle = slice(3 * half - 8, 3 * half + 9)
    worst = np.abs(np.log(total[middle] / one[middle])).max()
    assert 0 < worst <= sum_divergence(share, shares)
    assert sum_divergence(4.0, 3) < 1e-60


def test_tail_bound_is_a_bound() -> None:
    p = discrete_pmf(4.0, 200)
    assert p[200 + 12 :].sum() * 2 <= tail_probability(12, 4.0)
    assert tail_probability(-1, 4.0) == 1.0 and tail_probability(5, 0.0) == 0.0


def test_sensitivity_counts_the_grid() -> None:
    """Found by search: a patient moves every coordinate by one step with a gradient of almost no norm."""
    fine = clipped_sum_sensitivity(clip=1.0, grid_step=2.0**-30, dimension=10_000)
    assert 1.0 < fine.l2 < 1.0 + 1e-4
    coarse = clipped_sum_sensitivity(clip=1.0, grid_step=0.25, dimension=10_000)
    assert coarse.l2 >= 1.0 + 0.25 * 100
    others = np.full(10_000, 0.5 * 0.25 - 1e-9)
    patient = np.full(10_000, 2e-9)
    moved = 0.25 * np.linalg.norm(np.rint((others + patient) / 0.25) - np.rint(others / 0.25))
    assert np.linalg.norm(patient) < 1e-6 and moved == 25.0 <= coarse.l2


def test_floating_point_bound_holds_against_exact_arithmetic() -> None:
    """float64 running sums of clipped float32 vectors against math.fsum, well inside the bound."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 200)).astype(np.float32).astype(np.float64) * 1e3
    clip = 1.0
    total = np.zeros(200)
    factors = [min(1.0, clip / np.linalg.norm(row)) for row in rows]
    for factor, row in zip(factors, rows, strict=True):
        total += factor * row
    exact = np.array([math.fsum(f * r for f, r in zip(factors, column, strict=True)) for column in rows.T])
    bound = clipped_sum_sensitivity(clip=clip, grid_step=1e-9, dimension=200, max_patients=500)
    assert np.linalg.norm(total - exact) <= bound.summation / 2
    with pytest.raises(UsageError):
        clipped_sum_sensitivity(clip=1.0, grid_step=1.0, dimension=2**62)
