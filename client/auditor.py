"""The audit of one candidate at one hospital.

:func:`audit_candidate` gives two things: raw figures for the hospital's own people (``lacuna site audit``),
which never leave, and the vector of counts that leaves through secure aggregation, with noise and charged.
Nothing of either goes to logs or exceptions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from client.nearest_neighbours import Neighbour, nearest_neighbours
from privacy.audit.attacks import secondary_scores
from privacy.audit.bounds import (
    FloatArray,
    Interval,
    auc_interval,
    clopper_pearson,
    epsilon_lower_bound,
    mu_lower_bound,
    smallest_n_for_rate,
)
from privacy.audit.controls import PLANTED, member_coin, planted_leak
from privacy.audit.copies import Autoencoder, CopySpace, VolumeEmbedding, nearest_distances
from privacy.audit.counts import Counts, CountsLayout, PatientFigures
from privacy.audit.membership import (
    AttackLosses,
    AttackNoise,
    LossPerSample,
    Progress,
    ScansOfPatient,
    attack_losses,
)
from privacy.audit.pooled_auc import SMALLEST_GROUP, planned_power
from privacy.audit.verdict import SECONDARY, PlantedLeak, attack_bound, level_of_test
from shared.canonical import digest
from shared.errors import MalformedMessageError
from shared.model.conditioning import ConditionTable
from shared.model.denoiser import Denoiser
from shared.model.sampling import sample_latents
from shared.study_plan import StudyPlan

RATES = (0.001, 0.01, 0.05, 0.1)
"""False positive rates at which the true positive rate is shown, where enough patients are held out."""

_SAMPLING_BATCH = 32


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SecondaryFigures:
    """One secondary attack at one hospital. Private.

    Attributes:
        attack: Name, such as ``sima`` or ``pia, guidance 3``.
        auc: With interval; None where a group is too small for one.
        pooled: Whether its counts are in the vector that leaves.
        member_scores, held_out_scores: In the order of the audit's keys; higher speaks for membership.
    """

    attack: str
    auc: Interval | None
    pooled: bool
    member_scores: FloatArray
    held_out_scores: FloatArray

    def __repr__(self) -> str:
        return "SecondaryFigures(<private>)"

    def to_dict(self) -> dict[str, Any]:
        """JSON; numbers that are not finite become None."""
        return {
            "attack": self.attack,
            "auc": _interval_to_dict(self.auc),
            "pooled": self.pooled,
            "member_scores": _array_to_list(self.member_scores),
            "held_out_scores": _array_to_list(self.held_out_scores),
        }

    @classmethod
    def from_dict(cls, value: Any) -> SecondaryFigures:
        """Inverse of :meth:`to_dict`; what is wrong is told by :meth:`LocalAudit.from_dict`."""
        return cls(
            attack=str(value["attack"]),
            auc=_interval_from_dict(value["auc"]),
            pooled=bool(value["pooled"]),
            member_scores=_array_from_list(value["member_scores"]),
            held_out_scores=_array_from_list(value["held_out_scores"]),
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LocalAudit:
    """Raw figures of one hospital. Private: kept in its own home, shown to its own people, never sent.

    Attributes:
        attack, public_control, member_control: AUC with interval; None where a group is too small for one
            (:data:`privacy.audit.pooled_auc.SMALLEST_GROUP`).
        power: Of this hospital's own test against ``power_at_auc``, without noise.
        epsilon_lower_bound: What the attack's counts at the plan's edges prove; None without an interval.
        true_positive_rates: (false positive rate, share of members above that threshold), only where the
            number of held-out patients carries the rate.
        member_keys, held_out_keys: Keyed hashes of the patients, in the order of the arrays.
        member_scores, held_out_scores: Primary attack of each patient, for the site's own ROC.
        member_distances, held_out_distances: Distance of the nearest generated sample, same order.
        copied: Keyed hashes of members nearer than ``copy_distance``.
        counts: The vector that leaves, before noise: int64[k].
        neighbours: Members nearest to a sample, with pictures; empty in audits that kept none.
        secondary: The plan's secondary attacks, in its order.
        mu_lower_bound: What the same counts prove of a mechanism known to be Gaussian.
    """

    n_members: int
    n_held_out: int
    attack: Interval | None
    power: float
    epsilon_lower_bound: float | None
    true_positive_rates: tuple[tuple[float, float], ...]
    public_control: Interval | None
    member_control: Interval | None
    planted_leak: PlantedLeak
    member_keys: tuple[str, ...]
    held_out_keys: tuple[str, ...]
    member_scores: FloatArray
    held_out_scores: FloatArray
    member_distances: FloatArray
    held_out_distances: FloatArray
    copy_distance: float
    copied: tuple[str, ...]
    counts: Counts
    neighbours: tuple[Neighbour, ...] = ()
    secondary: tuple[SecondaryFigures, ...] = ()
    mu_lower_bound: float | None = None

    def __repr__(self) -> str:
        return "LocalAudit(<private>)"

    def to_dict(self) -> dict[str, Any]:
        """JSON; numbers that are not finite become None."""
        return {
            "format": "lacuna/local-audit/v1",
            "n_members": self.n_members,
            "n_held_out": self.n_held_out,
            "attack": _interval_to_dict(self.attack),
            "power": self.power,
            "epsilon_lower_bound": self.epsilon_lower_bound,
            "mu_lower_bound": self.mu_lower_bound,
            "true_positive_rates": [list(pair) for pair in self.true_positive_rates],
            "public_control": _interval_to_dict(self.public_control),
            "member_control": _interval_to_dict(self.member_control),
            "planted_leak": self.planted_leak.to_dict(),
            "member_keys": list(self.member_keys),
            "held_out_keys": list(self.held_out_keys),
            "member_scores": _array_to_list(self.member_scores),
            "held_out_scores": _array_to_list(self.held_out_scores),
            "member_distances": _array_to_list(self.member_distances),
            "held_out_distances": _array_to_list(self.held_out_distances),
            "copy_distance": self.copy_distance,
            "copied": list(self.copied),
            "counts": [int(count) for count in self.counts],
            "neighbours": [neighbour.to_dict() for neighbour in self.neighbours],
            "secondary": [figures.to_dict() for figures in self.secondary],
        }

    @classmethod
    def from_dict(cls, value: Any) -> LocalAudit:
        """Inverse of :meth:`to_dict`.

        Raises:
            MalformedMessageError: not such a document. The message quotes none of its figures.
        """
        try:
            if value["format"] != "lacuna/local-audit/v1":
                raise KeyError("format")
            arrays = {
                name: _array_from_list(value[name])
                for name in ("member_scores", "held_out_scores", "member_distances", "held_out_distances")
            }
            bound, mu = value["epsilon_lower_bound"], value.get("mu_lower_bound")
            return cls(
                n_members=int(value["n_members"]),
                n_held_out=int(value["n_held_out"]),
                attack=_interval_from_dict(value["attack"]),
                power=float(value["power"]),
                epsilon_lower_bound=None if bound is None else float(bound),
                mu_lower_bound=None if mu is None else float(mu),
                true_positive_rates=tuple(
                    (float(rate), float(share)) for rate, share in value["true_positive_rates"]
                ),
                public_control=_interval_from_dict(value["public_control"]),
                member_control=_interval_from_dict(value["member_control"]),
                planted_leak=PlantedLeak.from_dict(value["planted_leak"]),
                member_keys=tuple(str(key) for key in value["member_keys"]),
                held_out_keys=tuple(str(key) for key in value["held_out_keys"]),
                copy_distance=float(value["copy_distance"]),
                copied=tuple(str(key) for key in value["copied"]),
                counts=np.array([int(count) for count in value["counts"]], dtype=np.int64),
                neighbours=tuple(Neighbour.from_dict(item) for item in value.get("neighbours", [])),
                secondary=tuple(SecondaryFigures.from_dict(item) for item in value.get("secondary", [])),
                **arrays,
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise MalformedMessageError(
                "the stored audit is not of the form that Lacuna writes", remedy="run the audit again"
            ) from None


def audit_candidate(
    *,
    plan: StudyPlan,
    public_denoiser: Denoiser,
    candidate_denoiser: Denoiser,
    autoencoder: Autoencoder | None,
    copy_embedding: VolumeEmbedding | None = None,
    members: Sequence[ScansOfPatient],
    held_out: Sequence[ScansOfPatient],
    loss: LossPerSample | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LocalAudit:
    """Attack a candidate, run the controls, look for copies.

    Args:
        plan: The approved plan; edges, timesteps, noises and thresholds come from it.
        public_denoiser: The public prior that training started from.
        candidate_denoiser: The network that is to be released. Neither network is changed.
        autoencoder: The public autoencoder; None compares latents as they are.
        copy_embedding: The plan's embedding of volumes; None where it names none.
        members, held_out: This hospital's patients (``PatientScans``).
        loss: None is the loss of the candidate's own diffusion.
        progress: Called as (stage, done, total).

    Guarantee: adding or removing one patient moves ``counts`` by at most ``CountsLayout.sensitivity`` in L2.
    """
    clause, plan_digest = plan.audit, plan.digest()
    loss = loss or candidate_denoiser.diffusion.per_sample_loss
    seed = audit_seed(plan_digest, candidate_denoiser)
    latent_shape = candidate_denoiser.preset.latent_shape(plan.data.grid_shape)
    conditions_N = sampled_classes(plan, max(clause.copy_samples, 2 * PLANTED), seed=seed)
    samples_NCDHW = _generate(plan, candidate_denoiser, conditions_N, latent_shape, seed, progress)
    noise = AttackNoise.from_plan_digest(
        plan_digest,
        timesteps=clause.timesteps,
        draws_per_timestep=clause.draws_per_timestep,
        latent_shape=latent_shape,
    )
    planted = planted_leak(
        candidate_denoiser,
        samples_NCDHW,
        conditions_N,
        loss=loss,
        noise=noise,
        seed=seed,
        device=device,
        progress=progress,
    )
    losses, distances = [], []
    checked_NCDHW = samples_NCDHW[: clause.copy_samples]
    space = CopySpace(autoencoder=autoencoder, embedding=copy_embedding)
    embedding_NE = space.of_samples(checked_NCDHW.to(device)) if clause.copy_samples else None
    for group, stage in ((members, "members"), (held_out, "held out")):
        losses.append(
            attack_losses(
                public_denoiser,
                candidate_denoiser,
                group,
                loss=loss,
                noise=noise,
                device=device,
                stage=stage,
                progress=progress,
            )
        )
        distances.append(
            np.full(len(group), np.inf)
            if embedding_NE is None
            else nearest_distances(space, group, embedding_NE, device=device, progress=progress)
        )
    secondary = [
        [
            secondary_scores(
                attack,
                candidate_denoiser,
                group,
                public_denoiser=public_denoiser,
                plan_digest=plan_digest,
                loss=loss,
                device=device,
                stage=f"{attack.attack_id}, {stage}",
                progress=progress,
            )
            for group, stage in ((members, "members"), (held_out, "held out"))
        ]
        for attack in clause.secondary_attacks
    ]
    audit = _figures(plan, members, held_out, losses, distances, planted, secondary)
    if autoencoder is None or embedding_NE is None:
        return audit
    neighbours = nearest_neighbours(
        space, autoencoder, members, distances[0], checked_NCDHW, embedding_NE, device=device
    )
    return replace(audit, neighbours=neighbours)


def audit_seed(plan_digest: bytes, candidate_denoiser: Denoiser) -> int:
    """Public seed of the audit's samples, from the plan and the candidate's parameters: nobody chooses it."""
    weights = hashlib.sha256()
    for name, parameter in sorted(candidate_denoiser.named_parameters()):
        weights.update(digest("lacuna/audit-parameter/v1", name.encode()))
        weights.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return int.from_bytes(digest("lacuna/audit-seed/v1", plan_digest, weights.digest())[:6], "big")


def sampled_classes(plan: StudyPlan, count: int, *, seed: int) -> Tensor:
    """Class index of each sample of the audit, int64 [N], public.

    Conditions in turn. Of each covariate every value, and "unknown", is as probable: who generates may ask
    for any of them, and a network that keeps a patient may give it back for that patient's values alone.
    """
    table = ConditionTable.from_clause(plan.data)
    conditions_N = np.arange(count) % len(table)
    generator = np.random.Generator(np.random.Philox(seed))
    rows_N = np.zeros(count, dtype=np.int64)
    for size in reversed(table.covariate_sizes):
        rows_N = rows_N * (size + 1) + generator.integers(0, size + 1, count)
    return torch.from_numpy(rows_N * (len(table) + 1) + conditions_N)


def _generate(
    plan: StudyPlan,
    denoiser: Denoiser,
    conditions_N: Tensor,
    latent_shape: tuple[int, int, int, int],
    seed: int,
    progress: Progress | None,
) -> Tensor:
    parts = []
    for start in range(0, len(conditions_N), _SAMPLING_BATCH):
        condition_B = conditions_N[start : start + _SAMPLING_BATCH]
        parts.append(
            sample_latents(
                denoiser,
                condition_B,
                steps=plan.model.sampling_steps,
                guidance_scale=plan.model.guidance_scale,
                seed=seed,
                latent_shape=latent_shape,
                first_index=start,
            )
        )
        if progress is not None:
            progress("samples", start + len(condition_B), len(conditions_N))
    return torch.cat(parts)


def _figures(
    plan: StudyPlan,
    members: Sequence[ScansOfPatient],
    held_out: Sequence[ScansOfPatient],
    losses: Sequence[AttackLosses],
    distances: Sequence[FloatArray],
    planted: PlantedLeak,
    secondary: Sequence[Sequence[FloatArray]],
) -> LocalAudit:
    clause, plan_digest = plan.audit, plan.digest()
    layout = CountsLayout.from_plan(plan)
    member_keys = tuple(patient.patient_key for patient in members)
    held_out_keys = tuple(patient.patient_key for patient in held_out)
    coins = np.array([member_coin(key, plan_digest) for key in member_keys], dtype=bool)
    near = distances[0] < clause.copy_distance
    figures = [
        PatientFigures(
            member=group == 0,
            coin=group == 0 and bool(coins[index]),
            score=float(losses[group].score_P[index]),
            public_loss=float(losses[group].public_P[index]),
            copied=group == 0 and bool(near[index]),
            secondary=tuple(
                float(scores[group][index])
                for attack, scores in zip(clause.secondary_attacks, secondary, strict=True)
                if attack.pooled_weight
            ),
        )
        for group, patients in enumerate((members, held_out))
        for index in range(len(patients))
    ]
    scores = [group.score_P for group in losses]
    finite = [values[np.isfinite(values)] for values in scores]
    level = level_of_test(plan, "membership_attack")
    return LocalAudit(
        n_members=len(members),
        n_held_out=len(held_out),
        attack=_auc_or_none(scores[0], scores[1], level),
        power=_local_power(plan, len(finite[0]), len(finite[1])),
        epsilon_lower_bound=_proved_at_edges(
            plan, finite[0], finite[1], partial(epsilon_lower_bound, delta=plan.privacy.delta)
        ),
        mu_lower_bound=_proved_at_edges(plan, finite[0], finite[1], mu_lower_bound),
        true_positive_rates=_true_positive_rates(finite[0], finite[1]),
        public_control=_auc_or_none(
            -losses[0].public_P, -losses[1].public_P, level_of_test(plan, "control_public_loss") / 2
        ),
        member_control=_auc_or_none(
            scores[0][~coins], scores[0][coins], level_of_test(plan, "control_members") / 2
        ),
        planted_leak=planted,
        member_keys=member_keys,
        held_out_keys=held_out_keys,
        member_scores=scores[0],
        held_out_scores=scores[1],
        member_distances=distances[0],
        held_out_distances=distances[1],
        copy_distance=clause.copy_distance,
        copied=tuple(key for key, is_near in zip(member_keys, near, strict=True) if is_near),
        counts=layout.count(figures),
        secondary=tuple(
            SecondaryFigures(
                attack=attack.attack_id,
                auc=_auc_or_none(scores[0], scores[1], level_of_test(plan, SECONDARY)),
                pooled=attack.pooled_weight > 0,
                member_scores=scores[0],
                held_out_scores=scores[1],
            )
            for attack, scores in zip(clause.secondary_attacks, secondary, strict=True)
        ),
    )


def _auc_or_none(first: FloatArray, second: FloatArray, error: float) -> Interval | None:
    first, second = first[np.isfinite(first)], second[np.isfinite(second)]
    if min(first.size, second.size) < SMALLEST_GROUP:
        return None
    return auc_interval(first, second, error=error)


def _local_power(plan: StudyPlan, n_members: int, n_held_out: int) -> float:
    if min(n_members, n_held_out) < SMALLEST_GROUP:
        return 0.0
    return planned_power(
        edges=stats.norm.ppf(np.arange(1, 200) / 200),
        n_members=n_members,
        n_held_out=n_held_out,
        members_std=0.0,
        held_out_std=0.0,
        true_auc=plan.audit.power_at_auc,
        bound=attack_bound(plan),
        error=level_of_test(plan, "membership_attack"),
    )


def _proved_at_edges(
    plan: StudyPlan, members: FloatArray, held_out: FloatArray, bound: Callable[..., float]
) -> float | None:
    """The largest of a bound at the plan's edges, the error split over them."""
    if min(members.size, held_out.size) < SMALLEST_GROUP:
        return None
    edges = plan.audit.score_edges
    error = level_of_test(plan, "membership_attack") / len(edges)
    return max(
        bound(
            int((members >= edge).sum()),
            members.size,
            int((held_out >= edge).sum()),
            held_out.size,
            error=error,
        )
        for edge in edges
    )


def _true_positive_rates(members: FloatArray, held_out: FloatArray) -> tuple[tuple[float, float], ...]:
    rows = []
    ordered = np.sort(held_out)[::-1]
    for rate in RATES:
        if members.size == 0 or held_out.size < smallest_n_for_rate(rate):
            continue
        # The most held-out patients above the threshold whose exact upper bound stays at the rate.
        above = 0
        while clopper_pearson(above + 1, held_out.size, error=0.05).high <= rate:
            above += 1
        rows.append((rate, float((members > ordered[above]).mean())))
    return tuple(rows)


def _interval_to_dict(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {
        "estimate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "error": interval.error,
    }


def _interval_from_dict(value: Any) -> Interval | None:
    if value is None:
        return None
    return Interval(**{name: float(value[name]) for name in ("estimate", "low", "high", "error")})


def _array_to_list(values: FloatArray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _array_from_list(values: Any) -> FloatArray:
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)
