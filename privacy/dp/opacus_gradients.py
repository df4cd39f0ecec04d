"""Per-patient gradients from Opacus' per-sample gradients: the second implementation, to compare with.

``GradSampleModule`` hooks each layer and keeps a gradient for every sample (its registered samplers, or
functorch for all of them); they are summed over a patient's draws. It costs 2 to 4 times a plain step, holds
all samples' gradients of a microbatch, and shares no rule with :mod:`privacy.dp.book_keeping`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from privacy.dp.layer_gradients import UnsupportedLayerError
from privacy.dp.microbatch_gradients import DirectRows, MicrobatchGradients

_PARAMETER_ATTRIBUTES = ("grad_sample", "_forward_counter", "_current_grad_sample")
_MODULE_ATTRIBUTES = ("activations", "max_batch_len", "ft_compute_sample_grad", "autograd_grad_sample_hooks")


class OpacusGradients:
    """Per-patient gradients of one network and list of trained parameters, for microbatches of one size.

    Args:
        network: Wrapped within :meth:`hooked` alone; in training mode, or Opacus skips its layers.
        params: Trained parameters in the order of the vector.
        patients: P; a batch has P K samples, patient after patient.
        functorch: Compute every layer's gradients by functorch, not by Opacus' own samplers.
    """

    def __init__(
        self,
        network: nn.Module,
        params: Sequence[tuple[str, nn.Parameter]],
        *,
        patients: int,
        functorch: bool,
    ) -> None:
        self._network, self._params = network, list(params)
        self._patients, self._functorch = patients, functorch
        self._wrapped: GradSampleModule | None = None

    @contextmanager
    def hooked(self) -> Iterator[GradSampleModule]:
        """The wrapped network; afterwards nothing of Opacus is left on it.

        Raises:
            UnsupportedLayerError: Opacus refuses the network.
        """
        trained = {id(p) for _, p in self._params}
        for p in self._network.parameters():
            p.requires_grad_(id(p) in trained)
        try:
            self._wrapped = GradSampleModule(
                self._network, loss_reduction="sum", strict=True, force_functorch=self._functorch
            )
            with warnings.catch_warnings():
                # torch warns wherever a layer's input needs no gradient, as the first layer's never does.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                warnings.filterwarnings("ignore", message="In CPU autocast")
                yield self._wrapped
        except NotImplementedError as error:
            raise UnsupportedLayerError(f"Opacus refuses the network: {error}") from error
        finally:
            if self._wrapped is not None:
                self._wrapped.remove_hooks()
                self._wrapped = None
            self._clean()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Plain autograd within :meth:`hooked`."""
        assert self._wrapped is not None
        self._wrapped.disable_hooks()
        try:
            yield
        finally:
            self._wrapped.enable_hooks()

    def collect(self) -> MicrobatchGradients:
        """Sum each parameter's per-sample gradients over a patient's draws, and drop them.

        Raises:
            UnsupportedLayerError: names a parameter that has none.
        """
        pieces = []
        start = 0
        for name, p in self._params:
            place = slice(start, start + p.numel())
            pieces.append(DirectRows(place, self._rows(name, p)))
            start = place.stop
            p.grad = None
            p.grad_sample = None  # type: ignore[attr-defined]
        return MicrobatchGradients(pieces)

    def _rows(self, name: str, p: nn.Parameter) -> Tensor:
        found = getattr(p, "grad_sample", None)
        if isinstance(found, list):
            found = torch.stack(found).sum(dim=0)
        if not isinstance(found, Tensor) or found.shape[1:] != p.shape or found.shape[0] % self._patients:
            raise UnsupportedLayerError(
                f"parameter {name!r} has no gradient for each sample: its layer was not called with one row "
                "per sample, or not at all"
            )
        return found.reshape(self._patients, -1, p.numel()).sum(dim=1)

    def _clean(self) -> None:
        for p in self._network.parameters():
            for name in _PARAMETER_ATTRIBUTES:
                p.__dict__.pop(name, None)
        for module in self._network.modules():
            for name in _MODULE_ATTRIBUTES:
                module.__dict__.pop(name, None)
