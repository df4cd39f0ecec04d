"""The global model as the server sees it: one flat vector, its optimizer, and its moving average.

What arrives is the exact integer sum over the survivors of one attempt, already private; everything here
is post-processing of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privacy.secagg.masking import SignedVector
from shared.checkpoint import load_tensors, save_tensors
from shared.errors import CoordinatorError, MalformedMessageError
from shared.study_plan import StudyPlan

Vector = NDArray[np.float32]

CHUNK = 1 << 18
"""Coordinates that are converted at a time."""


class GlobalModel:
    """Weights float32 [d], Adam (Kingma and Ba 2015, as in ``torch.optim``), EMA of the weights.

    In mode ``distributed`` the sum is one of clipped gradients: divided by the declared number of
    patients times q, a public constant, it is the average gradient that Adam steps along. In modes
    ``local`` and ``unprotected`` it is one of weight deltas: divided by the number of survivors it is
    added to the weights (FedAvg, McMahan et al. 2017, every site with equal weight).

    Args:
        plan: The signed plan.
        initial: Starting weights [d].

    Raises:
        CoordinatorError: the vector does not have the plan's dimension.
    """

    def __init__(self, plan: StudyPlan, initial: Vector) -> None:
        if initial.shape != (plan.model.dimension,):
            raise CoordinatorError(
                f"the prior gives {initial.shape} trainable parameters, the plan says {plan.model.dimension}"
            )
        self._plan = plan
        self._weights = torch.from_numpy(initial.astype(np.float32, copy=True)).requires_grad_()
        self._optimizer = torch.optim.Adam([self._weights], lr=plan.model.server_learning_rate)
        self._ema = self._weights.detach().clone()
        self.round = 0

    @property
    def weights(self) -> Vector:
        """A view that cannot be written to; it shows the model as it is, also after later rounds."""
        return _view(self._weights.detach())

    @property
    def ema(self) -> Vector:
        """Moving average that starts at the prior; the candidate for release. A view, as ``weights``."""
        return _view(self._ema)

    def apply(self, total: SignedVector, *, n_survivors: int) -> None:
        """Take one round's unmasked sum, in grid steps [d]. Memory: one float32 vector beside the sum.

        Raises:
            CoordinatorError: the result would not be finite; the weights are unchanged.
        """
        privacy = self._plan.privacy
        distributed = privacy.mode == "distributed"
        divisor = privacy.declared_patients * privacy.sampling_rate if distributed else float(n_survivors)
        average = self._average(total, divisor)
        del total
        if distributed:
            # Adam's step is bounded by the learning rate where the gradient is finite.
            self._check_finite(average)
            self._weights.grad = torch.from_numpy(average)
            self._optimizer.step()
            self._weights.grad = None
        else:
            average += self.weights
            self._check_finite(average)
            with torch.no_grad():
                self._weights.copy_(torch.from_numpy(average))
        self.round += 1
        self._ema.lerp_(self._weights.detach(), 1 - self._plan.model.ema_decay)

    def _average(self, total: SignedVector, divisor: float) -> Vector:
        """total times the grid step over the divisor, float32 [d]; in float64 a chunk at a time."""
        average = np.empty(len(total), dtype=np.float32)
        for start in range(0, len(total), CHUNK):
            chunk = total[start : start + CHUNK].astype(np.float64) * self._plan.secure_aggregation.grid_step
            with np.errstate(over="ignore"):
                average[start : start + CHUNK] = chunk / divisor
        return average

    @staticmethod
    def _check_finite(vector: Vector) -> None:
        if not (np.isfinite(vector.min()) and np.isfinite(vector.max())):
            raise CoordinatorError("the step would make weights that are not finite; it is not taken")

    def save(self, path: Path, metadata: dict[str, str]) -> str:
        """Write weights, optimizer state and EMA; returns the file's SHA-256."""
        state = self._optimizer.state.get(self._weights, {})
        zeros = torch.zeros_like(self._ema)
        tensors: dict[str, NDArray[Any]] = {
            "weights": self.weights,
            "ema": self.ema,
            "adam.exp_avg": state.get("exp_avg", zeros).numpy(),
            "adam.exp_avg_sq": state.get("exp_avg_sq", zeros).numpy(),
            "adam.step": np.array([float(state.get("step", 0.0))], dtype=np.float32),
        }
        return save_tensors(
            path,
            tensors,
            {**metadata, "round": str(self.round), "plan_sha256": self._plan.digest().hex()},
        )

    @classmethod
    def restore(cls, plan: StudyPlan, path: Path) -> GlobalModel:
        """Read a checkpoint.

        Raises:
            CoordinatorError: it is damaged, or of another plan.
        """
        try:
            tensors, metadata = load_tensors(path)
        except MalformedMessageError as error:
            raise CoordinatorError(f"checkpoint is damaged: {error.message}") from error
        if metadata.get("plan_sha256") != plan.digest().hex():
            raise CoordinatorError(f"checkpoint {path} belongs to another plan")
        shape = (plan.model.dimension,)
        for name in ("weights", "ema", "adam.exp_avg", "adam.exp_avg_sq"):
            if name not in tensors or tensors[name].shape != shape or not np.isfinite(tensors[name]).all():
                raise CoordinatorError(f"checkpoint {path} is damaged: tensor {name!r}")
        step_1 = tensors.get("adam.step", np.zeros(0))
        if step_1.shape != (1,) or not 0 <= step_1[0] < np.inf or not metadata.get("round", "").isdecimal():
            raise CoordinatorError(f"checkpoint {path} is damaged: its step or round")
        model = cls(plan, tensors["weights"])
        model._ema = torch.from_numpy(tensors["ema"].copy())
        model.round = int(metadata["round"])
        step = float(step_1[0])
        if step > 0:
            model._optimizer.state[model._weights] = {
                "step": torch.tensor(step),
                "exp_avg": torch.from_numpy(tensors["adam.exp_avg"].copy()),
                "exp_avg_sq": torch.from_numpy(tensors["adam.exp_avg_sq"].copy()),
            }
        return model


def _view(tensor: torch.Tensor) -> Vector:
    view: Vector = tensor.numpy().view()
    view.flags.writeable = False
    return view
