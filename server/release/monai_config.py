"""The MONAI side of a release bundle: ``configs/metadata.json`` and ``configs/inference.json``.

Layout and fields follow the MONAI Bundle Specification and the metadata of the model zoo's generative
bundles. One deviation is on purpose: weights are ``safetensors``, so there is no pickled ``model.pt``.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from shared.model.presets import preset_named
from shared.study_plan import StudyPlan

METADATA_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
BUNDLE_FORMAT = "lacuna/release-bundle/v1"
SYNTHETIC_STATEMENT = (
    "Every volume made with this bundle is synthetic. It shows no patient, and it must be labelled as "
    "synthetic wherever it goes. Not for diagnosis."
)


def software_versions() -> dict[str, str]:
    """Installed versions of the packages that a bundle needs; packages that are absent are left out."""
    versions: dict[str, str] = {}
    for name in ("monai", "torch", "numpy", "einops", "safetensors", "nibabel", "lacuna"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def bundle_metadata(
    plan: StudyPlan, *, version: str, versions: dict[str, str], digests: dict[str, str]
) -> dict[str, Any]:
    """Content of ``configs/metadata.json``.

    Args:
        plan: The study's plan.
        version: The bundle's version, ``1.0.0``.
        versions: From :func:`software_versions`.
        digests: Hex SHA-256 by name: ``plan_sha256`` (the plan's digest), ``candidate_sha256``,
            ``decision_sha256``.
    """
    privacy = plan.privacy
    required = {key: value for key, value in versions.items() if key not in ("monai", "torch", "numpy")}
    n_labels = len(plan.data.labels)
    volume = {
        "type": "image",
        "num_channels": 1,
        "spatial_shape": list(plan.data.grid_shape),
        "is_patch_data": False,
    }
    return {
        "schema": METADATA_SCHEMA,
        "version": version,
        "changelog": {version: f"release of study {plan.study_id}"},
        "monai_version": versions.get("monai", "unknown"),
        "pytorch_version": versions.get("torch", "unknown"),
        "numpy_version": versions.get("numpy", "unknown"),
        "required_packages_version": required,
        "name": f"{plan.study_id} generator",
        "task": "Synthesis of labelled 3D scans, conditional on a class",
        "description": (
            f"{plan.title or plan.study_id}: a latent diffusion model that makes an image and its "
            f"segmentation mask together, trained by {plan.n_sites} sites under patient-level differential "
            "privacy"
        ),
        "authors": f"the sites of study {plan.study_id}: "
        + ", ".join(site.site_id for site in plan.roster.sites),
        "copyright": f"Copyright (c) the sites of study {plan.study_id}",
        "data_source": "simulated scans" if plan.data.simulated else "scans held by the sites; never pooled",
        "data_type": "nibabel",
        "image_classes": "synthetic image in [0, 1] with a label mask",
        "label_classes": {"0": "background"}
        | {str(index): name for index, name in enumerate(plan.data.labels, start=1)},
        "pred_classes": "synthetic",
        "intended_use": "Research on methods. Not for diagnosis, and no evidence about any real patient.",
        "references": [],
        "network_data_format": {
            "inputs": {
                "condition": {
                    "type": "tabular",
                    "format": "classes",
                    "num_channels": 1,
                    "spatial_shape": [],
                    "dtype": "int64",
                    "value_range": [0, len(plan.data.conditions) - 1],
                    "is_patch_data": False,
                    "channel_def": {"0": "row of the condition, see conditions"},
                }
            },
            "outputs": {
                "image": {
                    **volume,
                    "format": "magnitude",
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "channel_def": {"0": "image"},
                },
                "mask": {
                    **volume,
                    "format": "segmentation",
                    "dtype": "uint8",
                    "value_range": [0, n_labels],
                    "channel_def": {"0": "label"},
                },
            },
        },
        "lacuna": {
            "format": BUNDLE_FORMAT,
            "study_id": plan.study_id,
            "synthetic": True,
            "synthetic_statement": SYNTHETIC_STATEMENT,
            "preset": plan.model.preset,
            "conditions": list(plan.data.conditions),
            "rare_condition": plan.data.rare_condition,
            "labels": list(plan.data.labels),
            **_optional(plan),
            "n_labels": n_labels,
            "n_conditions": len(plan.data.conditions),
            "grid_shape": list(plan.data.grid_shape),
            "spacing_mm": list(plan.data.spacing_mm),
            "sampling_steps": plan.model.sampling_steps,
            "guidance_scale": plan.model.guidance_scale,
            "trained_parameters": plan.model.trainable,
            "privacy": {
                "unit": privacy.unit,
                "neighbouring": privacy.neighbouring,
                "mode": privacy.mode,
                "epsilon": privacy.epsilon,
                "delta": privacy.delta,
            },
            **digests,
        },
    }


def _optional(plan: StudyPlan) -> dict[str, Any]:
    """What only some plans have."""
    covariates = [covariate.model_dump(mode="json") for covariate in plan.data.covariates]
    modality = plan.data.modality
    return ({"covariates": covariates} if covariates else {}) | ({"modality": modality} if modality else {})


def inference_config(plan: StudyPlan) -> dict[str, Any]:
    """Content of ``configs/inference.json``: a MONAI bundle config that builds networks and sampler.

    ``python -m monai.bundle run run --config_file configs/inference.json --bundle_root .`` with Lacuna
    installed gives the list of (image, mask) tensors; ``lacuna generate`` also writes and marks files.
    """
    preset_named(plan.model.preset)
    weights = "shared.model.weights.load_weights"
    return {
        "imports": ["$from pathlib import Path"],
        "bundle_root": ".",
        "condition": plan.data.conditions.index(plan.data.rare_condition),
        "count": 1,
        "seed": 0,
        "preset": {"_target_": "shared.model.presets.preset_named", "name": plan.model.preset},
        "autoencoder": {
            "_target_": "shared.model.autoencoder.build_autoencoder",
            "preset": "@preset",
            "n_labels": len(plan.data.labels),
        },
        "denoiser": {
            "_target_": "shared.model.denoiser.build_denoiser",
            "preset": "@preset",
            "n_conditions": len(plan.data.conditions),
            **({"covariate_sizes": [c.size for c in plan.data.covariates]} if plan.data.covariates else {}),
        },
        "load_autoencoder": {
            "_target_": weights,
            "module": "@autoencoder",
            "path": "$Path(@bundle_root) / 'models' / 'autoencoder.safetensors'",
        },
        "load_denoiser": {
            "_target_": weights,
            "module": "@denoiser",
            "path": "$Path(@bundle_root) / 'models' / 'denoiser.safetensors'",
        },
        "sampler": {
            "_target_": "shared.model.sampling.generate_volumes",
            "_requires_": ["@load_autoencoder", "@load_denoiser"],
            "autoencoder": "@autoencoder",
            "denoiser": "@denoiser",
            "condition": "@condition",
            "count": "@count",
            "seed": "@seed",
            "grid_shape": list(plan.data.grid_shape),
            "steps": plan.model.sampling_steps,
            "guidance_scale": plan.model.guidance_scale,
        },
        "run": ["$list(@sampler)"],
    }
