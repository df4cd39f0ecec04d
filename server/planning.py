"""A new plan from what is enrolled, what is public, and a few decisions of the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from privacy.audit.proposal import (
    DEFAULT_POOLED_WEIGHT,
    RECOMMENDED_AUDIT_NOISE,
    SecondaryChoice,
    pool_attacks,
    propose_audit,
)
from privacy.dp.accounting import gaussian_mu
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import check_plan
from server.pretrain import recipe_covariates
from server.public_calibration import load_calibration
from shared.canonical import parse_json
from shared.errors import CoordinatorError, UsageError
from shared.model.denoiser import build_denoiser, parameter_subset
from shared.model.presets import preset_named
from shared.model.shipped import RANGES_FILE, read_pair
from shared.plan_package import hash_file
from shared.study_plan import Mode, RosterClause, StudyPlan, TrainableSubset, default_threshold, parse_plan

MAX_AUDIT_SHARE = 0.35


@dataclass(frozen=True, kw_only=True)
class PlanChoices:
    """What the coordinator decides; everything else follows. None: the default of the recipe or of Lacuna."""

    study_id: str
    title: str = ""
    mode: Mode = "distributed"
    epsilon: float | None = 8.0
    delta: float = 1e-5
    rounds: int = 30
    declared_patients: int = 100
    rare_condition: str
    trainable: TrainableSubset | None = None
    clip_norm: float | None = None
    server_learning_rate: float | None = None
    local_steps: int = 1
    local_learning_rate: float = 1e-3
    draws_per_patient: int = 4
    sampling_rate: float = 1.0
    max_colluding: int = 1
    threshold: int | None = None
    max_attempts: int | None = None
    copy_samples: int = 500
    mechanism_canaries: int = 1024
    canaries_per_site: int = 0
    secondary_attacks: SecondaryChoice = "all"
    pool_attacks: tuple[str, ...] = ()
    pooled_weight: int = DEFAULT_POOLED_WEIGHT
    min_power: float = 0.5
    low_power: Literal["refuse", "accept"] = "refuse"
    site_approvals: int | None = None
    simulated: bool = False
    modality: Literal["MR", "CT"] | None = None
    expires: date | None = None
    spacing_mm: tuple[float, float, float] | None = None


def draft_plan(choices: PlanChoices, *, roster: RosterClause, public: Path) -> StudyPlan:
    """Put a plan together and check that it keeps its promise.

    Args:
        roster: Sites, officer and coordinator with their keys.
        public: Folder with the public networks, ``recipe.json`` and ``calibration.json``.

    Raises:
        CoordinatorError, UsageError: naming what is missing or contradictory.
    """
    _check_choices(choices, n_sites=len(roster.sites))
    pair = read_pair(public)
    recipe = pair.recipe
    calibration = load_calibration(public)
    if choices.copy_samples > calibration["copy_samples"]:
        raise UsageError(
            f"the copy distance is calibrated for {calibration['copy_samples']} samples, "
            f"the audit would check {choices.copy_samples}: it would take patients for copied that are not",
            remedy="lacuna coordinator pretrain again, or --copy-samples",
        )
    preset = preset_named(str(recipe["preset"]))
    conditions = [str(name) for name in recipe["conditions"]]
    covariates, ranges = recipe_covariates(recipe), public / RANGES_FILE
    if choices.rare_condition not in conditions:
        raise UsageError(
            f"no condition {choices.rare_condition!r}: the networks know {', '.join(conditions)}"
        )
    advice = _advice(public)
    trainable = choices.trainable or advice.get("trainable") or "all"
    dimension = sum(
        parameter.numel()
        for _, parameter in parameter_subset(
            build_denoiser(
                preset,
                n_conditions=len(conditions),
                covariate_sizes=[covariate.size for covariate in covariates],
            ),
            trainable,
        )
    )
    clip_norm = choices.clip_norm or advice.get("clip_norm") or float(calibration["gradient_norms"][0])
    learning_rate = choices.server_learning_rate or advice.get("server_learning_rate") or 1e-3
    n_sites = len(roster.sites)
    threshold = choices.threshold or default_threshold(n_sites, choices.max_colluding)
    epsilon = None if choices.mode == "unprotected" else choices.epsilon
    proposed = propose_privacy(
        mode=choices.mode,
        epsilon=epsilon,
        delta=choices.delta,
        clip_norm=clip_norm,
        rounds=choices.rounds,
        n_sites=n_sites,
        threshold=threshold,
        max_colluding=choices.max_colluding,
        dimension=dimension,
        declared_patients=choices.declared_patients,
        sampling_rate=choices.sampling_rate,
        draws_per_patient=choices.draws_per_patient,
        local_steps=choices.local_steps,
        max_attempts=choices.max_attempts,
        audit_share=_audit_share(epsilon, choices.delta),
        local_learning_rate=choices.local_learning_rate,
    )
    guidance_scale = float(advice.get("guidance_scale", preset.guidance_scale))
    audit = propose_audit(
        calibration["public_losses"],
        copy_distance=float(calibration["copy_distance"]),
        false_copy_rate=float(calibration["false_copy_rate"]),
        declared_patients=choices.declared_patients,
        copy_samples=choices.copy_samples,
        noised=choices.mode != "unprotected",
        guidance_scale=guidance_scale,
        secondary=choices.secondary_attacks,
    ).model_copy(
        update={
            "min_power": choices.min_power,
            "low_power": choices.low_power,
            "mechanism_canaries": choices.mechanism_canaries if choices.mode == "distributed" else 0,
            "canaries_per_site": choices.canaries_per_site,
            "copy_embedding_sha256": None
            if pair.copy_embedding_path is None
            else hash_file(pair.copy_embedding_path),
        }
    )
    audit = pool_attacks(
        audit,
        choices.pool_attacks,
        public_figures=calibration.get("secondary_figures", {}),
        weight=choices.pooled_weight,
        noised=choices.mode != "unprotected",
    )
    plan = parse_plan(
        {
            "format": "lacuna/study-plan/v1",
            "study_id": choices.study_id,
            "title": choices.title or choices.study_id,
            **({} if choices.expires is None else {"expires": choices.expires.isoformat()}),
            "roster": roster.model_dump(mode="json"),
            "data": {
                "conditions": conditions,
                "rare_condition": choices.rare_condition,
                "labels": [str(name) for name in recipe["labels"]],
                "grid_shape": list(recipe["grid_shape"]),
                "spacing_mm": list(choices.spacing_mm or preset.spacing_mm),
                "covariates": [covariate.model_dump(mode="json") for covariate in covariates],
                "modality": choices.modality,
                "plausibility_sha256": hash_file(ranges) if ranges.exists() else None,
                "segmenter_sha256": None if pair.segmenter_path is None else hash_file(pair.segmenter_path),
                "simulated": choices.simulated,
            },
            "model": {
                "preset": preset.name,
                "autoencoder_sha256": hash_file(pair.autoencoder_path),
                "prior_sha256": hash_file(pair.prior_path),
                "trainable": trainable,
                "dimension": dimension,
                "server_learning_rate": learning_rate,
                "ema_decay": float(advice.get("ema_decay", 0.9)),
                "local_learning_rate": choices.local_learning_rate,
                "sampling_steps": preset.sampling_steps,
                "guidance_scale": guidance_scale,
            },
            "privacy": proposed.privacy.model_dump(mode="json"),
            "secure_aggregation": proposed.secure_aggregation.model_dump(mode="json"),
            "audit": audit.model_dump(mode="json"),
            "release": {"site_approvals": choices.site_approvals or max(1, threshold - 1)},
        },
        what="the proposed plan",
    )
    check_plan(plan)
    return plan


def _check_choices(choices: PlanChoices, *, n_sites: int) -> None:
    """Before anything is calibrated: a search for noise does not end for figures that make no sense."""
    protected = choices.mode != "unprotected"
    attempts, clip, rate = choices.max_attempts, choices.clip_norm, choices.server_learning_rate
    threshold = choices.threshold or default_threshold(n_sites, choices.max_colluding)
    for holds, clause in (
        (not protected or (choices.epsilon is not None and 0 < choices.epsilon <= 100), "epsilon: 0 to 100"),
        (0 < choices.delta < 1e-2, "delta: above 0 and below 0.01"),
        (1 <= choices.rounds <= 100_000, "rounds: 1 to 100000"),
        (choices.declared_patients >= 1, "declared_patients: at least 1"),
        (0 < choices.sampling_rate <= 1, "sampling_rate: above 0, at most 1"),
        (attempts is None or attempts >= choices.rounds, "max_attempts: not smaller than rounds"),
        (choices.local_steps >= 1, "local_steps: at least 1"),
        (choices.mode != "distributed" or choices.local_steps == 1, "local_steps: 1 in mode distributed"),
        (clip is None or 0 < clip <= 1e6, "clip_norm: above 0"),
        (rate is None or 0 < rate <= 10, "server_learning_rate: above 0, at most 10"),
        (0 <= choices.min_power <= 1, "min_power: 0 to 1"),
        (choices.max_colluding >= 1, "max_colluding: at least 1"),
        (1 <= choices.pooled_weight <= 16, "pooled_weight: 1 to 16"),
        (
            threshold <= n_sites < 2 * threshold - choices.max_colluding,
            f"threshold: above (n + c)/2 and at most n, for n = {n_sites} and c = {choices.max_colluding}",
        ),
    ):
        if not holds:
            raise UsageError(f"these choices make no plan: {clause}")


def _audit_share(epsilon: float | None, delta: float) -> float:
    """Share of mu^2 that two audit attempts at the recommended noise take, within reason."""
    if epsilon is None:
        return MAX_AUDIT_SHARE
    wanted = 2.0 / RECOMMENDED_AUDIT_NOISE**2 / gaussian_mu(epsilon, delta) ** 2
    return min(wanted, MAX_AUDIT_SHARE)


def _advice(public: Path) -> dict[str, Any]:
    """What was measured about private training for these networks; empty where nothing was."""
    recipe = parse_json((public / "recipe.json").read_bytes(), what="recipe.json")
    advice = recipe.get("private_training", {}) if isinstance(recipe, dict) else {}
    if not isinstance(advice, dict):
        raise CoordinatorError("recipe.json: private_training is not a table")
    chosen = advice.get("chosen", advice)
    return chosen if isinstance(chosen, dict) else {}
