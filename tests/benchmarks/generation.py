"""``generate`` of 100 ``tiny`` volumes with both pictures: CPU seconds by part, against the bare networks.

The peer is the networks' own forward passes in the same batches, without anything around them: no noise, no
checks, no files, no pictures. Networks have fresh weights, which cost what trained ones do; such make no
plausible scan, so the checks run on every sample and refuse none.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared import generation
from shared.volumes.plausibility import PlausibilityRanges, write_ranges
from tests.shared.known_bundle import make_bundle

COUNT, BATCH, STEPS = 100, 8, 30
PARTS = ("sample_latents", "faults", "write_sample", "contact_sheet", "surface_sheet")


def run(count: int = COUNT) -> str:
    """The table."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "bundle", preset="tiny")
        metadata = generation.read_metadata(bundle)
        write_ranges(
            bundle / generation.PLAUSIBILITY_FILE,
            PlausibilityRanges(labels=metadata.labels, required=(), scans=8, low={}, high={}),
        )
        spent: dict[str, float] = defaultdict(float)
        kept = {name: getattr(generation, name) for name in PARTS}
        started, wall = _cpu(), time.perf_counter()
        try:
            for name, function in kept.items():
                setattr(generation, name, _timed(function, name, spent))
            generation.generate_volumes(
                bundle_dir=bundle, condition="rare", count=count, seed=1, out_dir=Path(folder) / "out",
                batch_size=BATCH, steps=STEPS,
            )  # fmt: skip
        finally:
            for name, function in kept.items():
                setattr(generation, name, function)
        total, wall = _cpu() - started, time.perf_counter() - wall
        networks = _networks_alone(bundle, count)
    rows = [(name.replace("_", " "), seconds) for name, seconds in spent.items()]
    rows.append(("the rest (decoding, loading)", total - sum(spent.values())))
    lines = [f"{count} tiny volumes, {STEPS} steps, batches of {BATCH}, {torch.get_num_threads()} threads"]
    lines += [f"  {name:<30} {seconds:7.1f} CPU s" for name, seconds in rows]
    lines += [
        f"  {'all':<30} {total:7.1f} CPU s, {wall:.1f} s on the clock",
        f"  {'peer: the networks alone':<30} {networks:7.1f} CPU s; ratio {total / networks:.2f}",
    ]
    return "\n".join(lines)


def _networks_alone(bundle: Path, count: int) -> float:
    generator = generation.load_generator(bundle)
    shape = generator.denoiser.preset.latent_shape(generator.metadata.grid_shape)
    z_BCDHW = torch.zeros((BATCH, *shape))
    level_B, condition_B = torch.full((BATCH,), 0.5), torch.zeros(BATCH, dtype=torch.int64)
    started = _cpu()
    with torch.no_grad():
        for _ in range(-(-count // BATCH)):
            for _ in range(STEPS):
                generator.denoiser(z_BCDHW, level_B, condition_B)
            generator.autoencoder.decode(z_BCDHW)
    return _cpu() - started


def _timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = _cpu()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += _cpu() - started

    return call


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
