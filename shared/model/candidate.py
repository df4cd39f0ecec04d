"""The public prior, the privately trained vector, and the candidate that they make together.

Server and sites build the candidate's file with this code from the same prior and the same vector, byte
for byte, so that a site's verdict names the file that is released and not one that the server shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.model.conditioning import ConditionTable
from shared.model.denoiser import Denoiser, NamedParameters, assign_trained, build_denoiser, parameter_subset
from shared.model.presets import preset_named
from shared.model.weights import load_weights, save_weights
from shared.study_plan import StudyPlan


def load_prior(plan: StudyPlan, prior: Path) -> tuple[Denoiser, NamedParameters]:
    """The public prior's network, and the parameters that train privately in canonical order.

    Raises:
        UsageError, MalformedMessageError, CoordinatorError: preset or file do not fit.
    """
    denoiser = build_denoiser(
        preset_named(plan.model.preset),
        n_conditions=len(plan.data.conditions),
        covariate_sizes=ConditionTable.from_clause(plan.data).covariate_sizes,
    )
    load_weights(denoiser, prior)
    return denoiser, parameter_subset(denoiser, plan.model.trainable)


def candidate_network(plan: StudyPlan, prior: Path, vector: NDArray[np.float32]) -> Denoiser:
    """The network that prior and vector make: what is audited is what is written."""
    denoiser, parameters = load_prior(plan, prior)
    assign_trained(denoiser, parameters, vector)
    return denoiser


def write_candidate(plan: StudyPlan, prior: Path, vector: NDArray[np.float32], path: Path) -> str:
    """Write the candidate's weights (float32) and return the file's hex SHA-256.

    Adapters of ``low_rank`` are kept apart, not merged: a product of matrices would differ between
    machines in its last bits, and with it the hash.
    """
    denoiser = candidate_network(plan, prior, vector)
    return save_weights(denoiser, path, {"plan_sha256": plan.digest().hex()})


def load_candidate(plan: StudyPlan, path: Path) -> Denoiser:
    """The network of a candidate's file."""
    return load_denoiser(
        path,
        preset=plan.model.preset,
        n_conditions=len(plan.data.conditions),
        covariate_sizes=ConditionTable.from_clause(plan.data).covariate_sizes,
        trainable=plan.model.trainable,
    )


def load_denoiser(
    path: Path, *, preset: str, n_conditions: int, trainable: str, covariate_sizes: Sequence[int] = ()
) -> Denoiser:
    """A released denoiser in evaluation mode, from what a bundle's metadata says of it."""
    denoiser = build_denoiser(
        preset_named(preset), n_conditions=n_conditions, covariate_sizes=covariate_sizes
    )
    if trainable == "low_rank":
        parameter_subset(denoiser, trainable)
    load_weights(denoiser, path)
    return denoiser.requires_grad_(False).eval()
