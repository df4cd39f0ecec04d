"""Per-patient gradients by book-keeping: one forward, one backward pass, each weight gradient formed once.

During the pass no parameter asks autograd for a gradient, so the backward pass computes only what layers hand
to one another. Hooks give each layer's input and output gradient to :mod:`privacy.dp.layer_gradients`, whose
per-patient contraction takes the place of the weight gradient that autograd would have formed (book-keeping:
Bu, Wang, Zha, Karypis, "Differentially private optimization on large model at small cost", ICML 2023). For
each weight the microbatch keeps whichever is smaller (mixed ghost clipping, after Bu, Mao, Xu, NeurIPS 2022,
section 4):

- its rows, P n numbers; their norm is measured directly; or
- the layer's input and output gradient. The squared norm then comes from two Gram matrices over a patient's
  positions and draws, sum_{st} <x_s, x_t> <g_s, g_t>, and the rows are formed when factors are known, a few
  patients at a time.

Formal guarantee: rows formed late are measured again when they are added
(:class:`privacy.dp.microbatch_gradients.LateRows`), so that the bound of :mod:`privacy.dp.sensitivity` holds
for either kind, however the Gram matrices were rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from privacy.dp.layer_gradients import (
    LayerGradient,
    Layout,
    Rows,
    UnsupportedLayerError,
    convolution_weight,
    layer_gradient,
    linear_positions,
    linear_weight,
    pads_beforehand,
    positions_first,
    rows_in_parameter_layout,
    unfold_positions_first,
)
from privacy.dp.microbatch_gradients import DirectRows, LateRows, MicrobatchGradients

MAX_GRAM_SHARE = 0.5
"""A Gram matrix is formed only where it costs at most this share of the contraction's multiplications."""


@dataclass(frozen=True)
class _Use:
    """One call of a layer: what its parameters' gradients are made of."""

    module: nn.Module
    x_B: Tensor
    g_B: Tensor


@dataclass
class _Parameter:
    """A trained parameter, its place in the vector, and what the microbatch has left for it."""

    name: str
    start: int
    shape: torch.Size
    owners: int = 0
    layout: Layout | None = None
    rows_Pn: Tensor | None = None
    late: _Use | None = None
    late_norms_P: Tensor | None = None
    seen: bool = False

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + self.numel)


@dataclass(frozen=True)
class _Layer:
    rule: LayerGradient
    trained: list[tuple[str, _Parameter]] = field(default_factory=list)


class BookKeeping:
    """Per-patient gradients of one network and list of trained parameters, for microbatches of one size.

    Args:
        network: Hooked within :meth:`hooked` alone.
        params: Trained parameters in the order of the vector.
        patients: P, patients of a microbatch; a batch has P K samples, patient after patient.

    Raises:
        UnsupportedLayerError: a trained parameter's layer is not supported, or a layer mixes samples.
    """

    def __init__(self, network: nn.Module, params: Sequence[tuple[str, nn.Parameter]], patients: int) -> None:
        self.network, self._patients, self._paused = network, patients, False
        self._order: list[_Parameter] = []
        self._layers: dict[nn.Module, _Layer] = {}
        by_id: dict[int, _Parameter] = {}
        start = 0
        for name, p in params:
            by_id[id(p)] = _Parameter(name, start, p.shape)
            self._order.append(by_id[id(p)])
            start += p.numel()
        self._dimension = start
        self._trained = set(by_id)
        for path, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UnsupportedLayerError(
                    f"layer {path!r} is a batch normalisation: it mixes patients and keeps private statistics"
                )
            owned = [(name, by_id[id(p)]) for name, p in module._parameters.items() if id(p) in by_id]
            if owned:
                try:
                    layer = _Layer(layer_gradient(module), owned)
                except UnsupportedLayerError as error:
                    raise UnsupportedLayerError(f"parameter {owned[0][1].name!r}: {error}") from error
                self._layers[module] = layer
                for _, parameter in owned:
                    parameter.owners += 1

    @contextmanager
    def hooked(self) -> Iterator[nn.Module]:
        """The network with hooks and without parameters that ask for gradients; afterwards as before."""
        flags = [(p, p.requires_grad) for p in self.network.parameters()]
        handles = [
            module.register_forward_hook(self._called, with_kwargs=True, always_call=False)
            for module in self._layers
        ]
        for p, _ in flags:
            p.requires_grad_(False)
        try:
            yield self.network
        finally:
            for handle in handles:
                handle.remove()
            for p, flag in flags:
                p.requires_grad_(flag)
            self._forget()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Plain autograd within :meth:`hooked`: trained parameters ask for gradients, hooks keep nothing."""
        trained = [p for p in self.network.parameters() if id(p) in self._trained]
        self._paused = True
        for p in trained:
            p.requires_grad_(True)
        try:
            yield
        finally:
            self._paused = False
            for p in trained:
                p.requires_grad_(False)

    def _called(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if self._paused or not torch.is_grad_enabled():
            return None
        x_B = args[0] if args else next(iter(kwargs.values()))
        first = not output.requires_grad
        if first:
            # Nothing before this layer trains: the backward pass ends here. What follows may work in place,
            # which a leaf does not allow.
            output = output.detach().requires_grad_().clone()
        output.register_hook(  # type: ignore[no-untyped-call]
            partial(self._arrived, module, x_B.detach(), x_B._version)
        )
        return output if first else None

    @torch.no_grad()
    def _arrived(self, module: nn.Module, x_B: Tensor, version: int, g_B: Tensor) -> None:
        layer = self._layers[module]
        if x_B._version != version:
            raise UnsupportedLayerError(
                f"the input of the layer of parameter {layer.trained[0][1].name!r} was changed in place later"
            )
        if x_B.shape[0] % self._patients or g_B.shape[0] % self._patients:
            raise UnsupportedLayerError(
                f"the layer of parameter {layer.trained[0][1].name!r} was called with {x_B.shape[0]} rows, "
                f"not with the same number for each of {self._patients} patients"
            )
        with torch.autocast(g_B.device.type, enabled=False):
            for name, parameter in layer.trained:
                self._deposit(_Use(module, x_B, g_B), layer.rule, name, parameter)

    def _deposit(self, use: _Use, rule: LayerGradient, name: str, parameter: _Parameter) -> None:
        if not parameter.seen and parameter.owners == 1 and name == "weight" and self._late_is_smaller(use):
            parameter.late, parameter.late_norms_P = use, self._gram_norms(use)
            parameter.seen = True
            return
        if parameter.late is not None:
            # A second use of the layer: the norm of a sum needs the sum.
            earlier, parameter.late, parameter.late_norms_P = parameter.late, None, None
            self._add_rows(parameter, *rule(earlier.module, name, earlier.x_B, earlier.g_B, self._patients))
        self._add_rows(parameter, *rule(use.module, name, use.x_B, use.g_B, self._patients))

    @staticmethod
    def _add_rows(parameter: _Parameter, rows_Pn: Tensor, layout: Layout | None) -> None:
        parameter.seen = True
        if parameter.rows_Pn is None:
            parameter.rows_Pn, parameter.layout = rows_Pn, layout
            return
        if parameter.layout != layout:
            parameter.rows_Pn = rows_in_parameter_layout(parameter.rows_Pn, parameter.layout)
            rows_Pn, parameter.layout = rows_in_parameter_layout(rows_Pn, layout), None
        parameter.rows_Pn = parameter.rows_Pn + rows_Pn

    def _late_is_smaller(self, use: _Use) -> bool:
        """Decided by shapes alone: the Gram matrix is cheap, and input and gradient are fewer numbers."""
        module = use.module
        if self._patients == 1 or not isinstance(module, nn.Linear | nn.Conv3d):
            return False
        conv = isinstance(module, nn.Conv3d)
        if conv and (module.groups != 1 or module.dilation != (1, 1, 1) or pads_beforehand(module)):
            return False
        channels_out = module.weight.shape[0]
        n = module.weight.numel()
        fan_in = n // channels_out
        positions = use.g_B.numel() // channels_out // self._patients
        kept = (use.x_B.numel() + use.g_B.numel()) // self._patients
        return kept < n and positions * (1 / fan_in + 1 / channels_out) <= MAX_GRAM_SHARE

    def _gram_norms(self, use: _Use) -> Tensor:
        """Squared norm of each patient's weight gradient, float64 [P], without forming it."""
        x_B = use.x_B.to(use.g_B.dtype)
        if isinstance(use.module, nn.Linear):
            x_PLC, g_PLO = linear_positions(x_B, use.g_B, self._patients)
        else:
            x_PLC = unfold_positions_first(use.module, x_B, self._patients)
            g_PLO = positions_first(use.g_B, self._patients)
        x_PLC, g_PLO = x_PLC.to(torch.float64), g_PLO.to(torch.float64)
        x_PLL, g_PLL = (torch.bmm(t, t.transpose(1, 2)) for t in (x_PLC, g_PLO))
        return (x_PLL * g_PLL).sum(dim=(1, 2)).clamp_(min=0.0)

    def collect(self) -> MicrobatchGradients:
        """What the backward pass left; the book is empty afterwards.

        Raises:
            UnsupportedLayerError: a trained parameter's layer was never called, or nothing came back to it.
        """
        if unseen := [parameter.name for parameter in self._order if not parameter.seen]:
            self._forget()
            raise UnsupportedLayerError(
                f"parameter {unseen[0]!r} has no gradient for each sample: its layer was not called, or the "
                "loss does not depend on it"
            )
        found = MicrobatchGradients([self._piece(parameter) for parameter in self._order])
        self._forget()
        return found

    def _piece(self, parameter: _Parameter) -> DirectRows | LateRows:
        if parameter.late is None or parameter.late_norms_P is None:
            assert parameter.rows_Pn is not None
            return DirectRows(parameter.place, parameter.rows_Pn, parameter.layout)
        use = parameter.late
        draws = use.g_B.shape[0] // self._patients

        def form(patients: slice) -> Rows:
            count = patients.stop - patients.start
            samples = slice(patients.start * draws, patients.stop * draws)
            x_B, g_B = use.x_B[samples], use.g_B[samples]
            if isinstance(use.module, nn.Linear):
                return linear_weight(x_B, g_B, count), None
            return convolution_weight(use.module, x_B, g_B, count, form="unfolded")

        return LateRows(parameter.place, form, parameter.late_norms_P)

    def _forget(self) -> None:
        for parameter in self._order:
            parameter.rows_Pn, parameter.late, parameter.late_norms_P = None, None, None
            parameter.seen = False
