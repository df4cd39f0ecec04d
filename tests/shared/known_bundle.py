"""A release bundle with networks of known weights. (No tests of its own.)"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch

from server.release.monai_config import bundle_metadata, inference_config
from shared.model.autoencoder import build_autoencoder
from shared.model.denoiser import build_denoiser, parameter_subset
from shared.model.presets import PRESETS
from shared.model.weights import save_weights
from shared.study_plan import StudyPlan, parse_plan

GRID = (8, 16, 16)


def make_plan(trainable: str, preset: str = "micro") -> StudyPlan:
    keys = [f"{number:064x}" for number in range(1, 6)]
    sites = [{"site_id": f"site-{number}", "identity_key": keys[number]} for number in range(3)]
    return parse_plan(
        {
            "format": "lacuna/study-plan/v1",
            "study_id": "rare-lesion",
            "title": "",
            "roster": {"coordinator_key": keys[3], "officer_key": keys[4], "sites": sites},
            "data": {
                "conditions": ["common", "rare"],
                "rare_condition": "rare",
                "labels": ["organ", "lesion"],
                "grid_shape": list(GRID if preset == "micro" else PRESETS[preset].grid_shape),
                "spacing_mm": [4.0, 3.0, 2.0],
            },
            "model": {
                "preset": preset,
                "autoencoder_sha256": "0" * 64,
                "prior_sha256": "1" * 64,
                "trainable": trainable,
                "dimension": 1,
                "sampling_steps": 2,
            },
            "privacy": {
                "unit": "patient",
                "neighbouring": "add_or_remove_one_patient",
                "mode": "distributed",
                "epsilon": 8.0,
                "delta": 1e-5,
                "clip_norm": 1.0,
                "declared_patients": 30,
                "rounds": 1,
                "max_attempts": 4,
                "noise_multiplier": 3.0,
                "audit_noise_multiplier": 3.0,
            },
            "secure_aggregation": {
                "threshold": 3,
                "max_colluding": 1,
                "grid_step": 1e-4,
                "clamp_steps": 1000,
            },
            "audit": {"score_edges": [0.0], "control_edges": [0.0], "copy_distance": 1.0},
            "release": {"site_approvals": 1},
        },
        what="test plan",
    )


def make_bundle(root: Path, *, trainable: str = "all", preset: str = "micro") -> Path:
    """A bundle as the release lays it out, with networks of known weights."""
    plan = make_plan(trainable, preset)
    statement = base64.b64encode(b'{"predicate":{"at":"2026-01-02T03:04:05Z"}}').decode()
    metadata = bundle_metadata(plan, version="1.0.0", versions={}, digests={})
    for name, text in (
        ("configs/metadata.json", json.dumps(metadata)),
        ("configs/inference.json", json.dumps(inference_config(plan))),
        ("attestations/release.dsse.json", json.dumps({"payload": statement})),
        ("attestations/plan.json", "{}"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    denoiser = build_denoiser(PRESETS[preset], n_conditions=2, seed=1)
    if trainable == "low_rank":
        parameter_subset(denoiser, trainable)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh network ends in zeros, and would not heed its condition
        for parameter in denoiser.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    save_weights(
        build_autoencoder(PRESETS[preset], n_labels=2, seed=2), root / "models/autoencoder.safetensors", {}
    )
    save_weights(denoiser, root / "models/denoiser.safetensors", {})
    return root
