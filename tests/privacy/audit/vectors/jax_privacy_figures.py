"""Known answers of an independent public implementation: google-deepmind/jax_privacy, module ``auditing``.

    pip install --no-deps jax-privacy==2.0.0
    python tests/privacy/audit/vectors/jax_privacy_figures.py

writes ``jax_privacy_2.0.0.json`` beside this file. The module needs numpy, scipy and dp-accounting; it is
loaded by its path, so that JAX itself is not needed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE, VERSION = "jax-privacy", "2.0.0"
PATH = Path(__file__).with_name(f"jax_privacy_{VERSION}.json")

ONE_RUN = (
    (10, 10, 10), (30, 30, 30), (30, 20, 19), (24, 24, 12), (100, 100, 90), (100, 60, 58), (1000, 300, 280),
    (5000, 400, 391),
)  # fmt: skip
"""(canaries, guesses, right guesses)."""

COUNTS = ((50, 50, 0, 50), (40, 60, 3, 55), (90, 100, 10, 100), (20, 40, 19, 40), (700, 1000, 20, 1000))
"""(true positives, members, false positives, held-out)."""

DELTAS = (0.0, 1e-5, 1e-3)
ERRORS = (0.05, 0.01)


def installed() -> Any | None:
    """The module, of exactly this version; None where it is not installed."""
    try:
        found = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    if found.version != VERSION:
        return None
    path = Path(str(found.locate_file("jax_privacy/auditing.py")))
    spec = importlib.util.spec_from_file_location("jax_privacy_auditing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def figures(auditing: Any) -> dict[str, Any]:
    """Everything that the tests compare with."""
    one_run, one_run_gaussian, p_values, counts = [], [], [], []
    for canaries, guesses, right in ONE_RUN:
        for error in ERRORS:
            for delta in DELTAS:
                epsilon = float(auditing._epsilon_one_run(0.0, canaries, guesses, right, error, delta))
                one_run.append([canaries, guesses, right, error, delta, epsilon])
            epsilon = float(auditing._epsilon_one_run_fdp(0.0, canaries, guesses, right, error, 1e-5))
            one_run_gaussian.append([canaries, guesses, right, error, 1e-5, epsilon])
        for epsilon, delta in ((0.5, 0.0), (2.0, 1e-5), (4.0, 1e-2)):
            p = float(auditing._one_run_p_value(canaries, guesses, right, epsilon, delta))
            p_values.append([canaries, guesses, right, epsilon, delta, p])
    for tp, n_in, fp, n_out in COUNTS:
        auditor = auditing.CanaryScoreAuditor(
            in_canary_scores=np.r_[np.ones(tp), np.zeros(n_in - tp)],
            out_canary_scores=np.r_[np.ones(fp), np.zeros(n_out - fp)],
        )
        at_one = auditing.Explicit(threshold=0.5)
        for delta in DELTAS:
            epsilon = auditor.epsilon_clopper_pearson(0.05, delta, False, threshold_strategy=at_one)
            upper = float(auditing._clopper_pearson_upper(fp, n_out, 0.025))
            counts.append([tp, n_in, fp, n_out, delta, float(epsilon), upper])
    return {
        "source": f"{PACKAGE} {VERSION}, module auditing",
        "one_run": one_run,
        "one_run_gaussian": one_run_gaussian,
        "p_values": p_values,
        "counts": counts,
    }


if __name__ == "__main__":
    found = installed()
    if found is None:
        sys.exit(f"pip install --no-deps {PACKAGE}=={VERSION}")
    PATH.write_text(json.dumps(figures(found), indent=1) + "\n")
