"""Pretrained pairs that ship with the project. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.canonical import parse_json
from shared.checkpoint import file_sha256
from shared.errors import UsageError
from shared.plan_package import COPY_EMBEDDING_FILE, PLAUSIBILITY_FILE, SEGMENTER_FILE

_ROOT = Path(__file__).parent / "pretrained"

AUTOENCODER_FILE = "autoencoder.safetensors"
PRIOR_FILE = "prior.safetensors"
RECIPE_FILE = "recipe.json"
RANGES_FILE = PLAUSIBILITY_FILE
"""Ranges that the public volumes lie in (:mod:`shared.volumes.plausibility`); older pairs have none."""


@dataclass(frozen=True, kw_only=True)
class PretrainedPair:
    """A public autoencoder, a public prior, and how they came about.

    Attributes:
        autoencoder_path: safetensors, half precision.
        prior_path: safetensors, half precision.
        copy_embedding_path: The same of the copy check's embedding; None where the recipe names none.
        segmenter_path: The same of the segmenter.
        recipe: The parsed ``recipe.json``: data, seeds, schedules, losses, hashes.
    """

    autoencoder_path: Path
    prior_path: Path
    copy_embedding_path: Path | None = None
    segmenter_path: Path | None = None
    recipe: dict[str, Any]


def read_pair(directory: Path) -> PretrainedPair:
    """The pair in a directory, its files checked against the recipe's hashes.

    Raises:
        UsageError: a file is missing, or is not the one that the recipe describes.
        MalformedMessageError: the recipe is not JSON.
    """
    paths = {name: directory / name for name in (AUTOENCODER_FILE, PRIOR_FILE, RECIPE_FILE)}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise UsageError(
            f"{directory} holds no pretrained pair ({', '.join(missing)} missing)",
            remedy="make one with lacuna coordinator pretrain",
        )
    recipe = parse_json(paths[RECIPE_FILE].read_bytes(), what=str(paths[RECIPE_FILE]))
    expected = recipe.get("sha256", {}) if isinstance(recipe, dict) else {}
    optional = {
        name: directory / name if name in expected else None for name in (COPY_EMBEDDING_FILE, SEGMENTER_FILE)
    }
    for name in [
        AUTOENCODER_FILE,
        PRIOR_FILE,
        *(name for name, path in optional.items() if path is not None),
    ]:
        path = directory / name
        if not path.is_file() or expected.get(name) != file_sha256(path):
            raise UsageError(
                f"{path} is not the file that {RECIPE_FILE} describes",
                remedy="pretrain again, or restore the file",
            )
    return PretrainedPair(
        autoencoder_path=paths[AUTOENCODER_FILE],
        prior_path=paths[PRIOR_FILE],
        copy_embedding_path=optional[COPY_EMBEDDING_FILE],
        segmenter_path=optional[SEGMENTER_FILE],
        recipe=recipe,
    )


def shipped_pair(preset_name: str) -> PretrainedPair:
    """The pair that ships for a preset (``micro``, for the simulated volumes).

    Raises:
        UsageError: none ships for that preset.
    """
    if preset_name not in {path.name for path in _ROOT.iterdir() if path.is_dir()}:
        raise UsageError(
            f"no pretrained pair ships for preset {preset_name!r}",
            remedy="make one from public volumes with lacuna coordinator pretrain",
        )
    return read_pair(_ROOT / preset_name)
