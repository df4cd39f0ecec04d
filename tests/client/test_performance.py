"""Performance settings of a site: from the command line's names to what the trainer gets."""

from __future__ import annotations

import pytest
import torch

from client.workbench import performance
from privacy.dp.patient_gradients import Performance
from shared.errors import UsageError


def test_names_become_settings() -> None:
    chosen = performance("functorch", microbatch=3, draws_per_pass=2, bfloat16=True)
    expected = Performance(backend="functorch", microbatch=3, draws_per_pass=2, autocast=torch.bfloat16)
    assert chosen == expected
    assert performance("engine", microbatch=None, draws_per_pass=None, bfloat16=False) == Performance()


def test_a_setting_that_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="backend"):
        performance("jax", microbatch=None, draws_per_pass=None, bfloat16=False)
