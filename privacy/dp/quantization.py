"""Real vectors to the plan's integer grid: what happens between clipping and noise.

The largest change that rounding makes is counted in :mod:`privacy.dp.sensitivity`; clamping is 1-Lipschitz
in each coordinate and adds nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 15
"""Coordinates that are converted at a time, so that they stay in the processor's cache."""


def quantize(
    values_d: NDArray[np.float64], *, grid_step: float, clamp_steps: int | None
) -> NDArray[np.int64]:
    """Nearest grid point of each coordinate (ties to even), in steps of the grid.

    Args:
        values_d: float64 [d]; what is not finite counts as zero.
        grid_step: Size of a step, in the units of the vector.
        clamp_steps: Largest magnitude in steps; None: no clamp (noise for the site's own eyes).

    Returns:
        int64 [d].
    """
    result_d = np.empty(len(values_d), dtype=np.int64)
    for start in range(0, len(values_d), CHUNK):
        steps = values_d[start : start + CHUNK] / grid_step
        np.rint(steps, out=steps)
        np.nan_to_num(steps, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        if clamp_steps is not None:
            np.clip(steps, -clamp_steps, clamp_steps, out=steps)
        result_d[start : start + CHUNK] = steps
    return result_d
