"""The one intensity normalisation, used wherever a scan enters a network: by the volume itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import SiteError

PERCENTILES = (0.5, 99.5)
"""The default of a plan's ``intensity_percentiles``."""


def normalise_intensity(
    image: NDArray[Any], percentiles: tuple[float, float] = PERCENTILES
) -> NDArray[np.float32]:
    """Map two percentiles of a volume to 0 and 1, and clip. Depends on this volume alone.

    Args:
        image: Any shape, finite.

    Returns:
        float32 of the same shape in [0, 1]; a constant volume becomes zero.

    Raises:
        SiteError: the volume is empty or holds NaN or infinity.
    """
    if image.size == 0 or not np.isfinite(image).all():
        raise SiteError("the volume is empty or holds NaN or infinite voxels", remedy="check the scan's file")
    low, high = np.percentile(image, percentiles)
    if not high > low:
        return np.zeros(image.shape, dtype=np.float32)
    scaled: NDArray[np.float64] = np.clip((image.astype(np.float64) - low) / (high - low), 0.0, 1.0)
    return scaled.astype(np.float32)
