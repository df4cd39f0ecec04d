"""The engine layer by layer: each form of each contraction, late rows, shared layers, what it refuses.

The peer is always autograd, one patient at a time, over the whole network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from privacy.dp.book_keeping import BookKeeping
from privacy.dp.clipping import add_scaled, clip_factors, squared_norms
from privacy.dp.layer_gradients import (
    Form,
    UnsupportedLayerError,
    convolution_form,
    convolution_weight,
    equal_portion,
    rows_in_parameter_layout,
)
from privacy.dp.microbatch_gradients import ClippedTotal, DirectRows, LateRows, MicrobatchGradients

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
DTYPES = [torch.float32, torch.float64]


def by_autograd(network: nn.Module, x_B: Tensor, patients: int) -> list[dict[str, Tensor]]:
    """The definition: each patient's mean loss, one backward pass a patient."""
    draws = len(x_B) // patients
    found = []
    for patient in range(patients):
        loss = losses(network, x_B[patient * draws : (patient + 1) * draws]).mean()
        names, trained = zip(*network.named_parameters(), strict=True)
        found.append(dict(zip(names, torch.autograd.grad(loss, trained), strict=True)))
    return found


def losses(network: nn.Module, x_B: Tensor) -> Tensor:
    """One loss a sample, with a gradient that differs from sample to sample and place to place."""
    output = network(x_B)
    weights = torch.linspace(0.5, 1.5, output[0].numel(), dtype=output.dtype).view(output.shape[1:])
    return (output * weights).square().flatten(1).mean(dim=1)


def by_engine(network: nn.Module, x_B: Tensor, patients: int) -> MicrobatchGradients:
    params = list(network.named_parameters())
    book = BookKeeping(network, params, patients)
    with book.hooked() as called:
        torch.autograd.backward(losses(called, x_B).sum() / (len(x_B) // patients))
        return book.collect()


def assert_exact(network: nn.Module, x_B: Tensor, patients: int, dtype: torch.dtype) -> MicrobatchGradients:
    """Each parameter of each patient, its norm, and the clipped sum, to the tolerance of the layer's norm."""
    found = by_engine(network, x_B, patients)
    expected = by_autograd(network, x_B, patients)
    norms_P = found.squared_norms().sqrt()
    wanted_total = []
    for patient, of_patient in enumerate(expected):
        row = found.row(patient)
        at = 0
        for name, grad in of_patient.items():
            piece = row[at : at + grad.numel()]
            at += grad.numel()
            error = (piece - grad.flatten()).norm()
            assert error <= TOLERANCE[dtype] * (grad.norm() + 1e-3 * row.norm()), name
        whole = torch.cat([grad.flatten() for grad in of_patient.values()]).double()
        assert abs(norms_P[patient] - whole.norm()) <= TOLERANCE[dtype] * whole.norm()
        wanted_total.append(whole * min(1.0, float(0.5 * norms_P[0] / whole.norm())))
    total = ClippedTotal(torch.zeros(at, dtype=torch.float64))
    pieces = list(found.pieces)
    found.add_scaled(total, clip_factors(norms_P**2, float(0.5 * norms_P[0])))
    wanted = torch.stack(wanted_total).sum(dim=0)
    assert (total.vector() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    return MicrobatchGradients(pieces)


class Positions(nn.Module):
    """Channels last for layers that want them so, and back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class Looked(nn.Module):
    """An embedding of numbers read off the input, as a scan's condition is."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6, **options)

    def forward(self, x: Tensor) -> Tensor:
        # Away from zero, where a later tanh has no slope and a padded row's gradient would vanish anyway.
        return self.table((x[:, 0, 0, 0, :3] * 100).long().abs() % 5) + 1.0


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv 3^3": lambda: nn.Conv3d(4, 6, 3, padding=1),
    "conv 3^3 strided": lambda: nn.Conv3d(4, 6, 3, stride=2, padding=1),
    "conv 3^3 unpadded": lambda: nn.Conv3d(4, 6, 3),
    "conv 1^3": lambda: nn.Conv3d(4, 6, 1),
    "conv 1^3 strided": lambda: nn.Conv3d(4, 6, 1, stride=2),
    "conv uneven": lambda: nn.Conv3d(4, 6, (3, 1, 2), padding=(1, 0, 1), stride=(1, 2, 1)),
    "conv dilated": lambda: nn.Conv3d(4, 6, 3, dilation=2, padding=2),
    "conv grouped": lambda: nn.Conv3d(4, 6, 3, groups=2, padding=1, bias=False),
    "conv same": lambda: nn.Conv3d(4, 6, 2, padding="same"),
    "conv reflected": lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="reflect"),
    "conv transposed": lambda: nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "linear": lambda: Positions(nn.Linear(4, 6)),
    "linear few positions": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 60, 40)),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: Positions(nn.LayerNorm(4)),
    "embedding": Looked,
    "embedding padded": lambda: Looked(padding_idx=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_exact(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    for patients, draws in ((1, 1), (1, 4), (3, 1), (3, 4)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = nn.Sequential(LAYERS[name](), nn.Tanh()).to(dtype)
        x_B = torch.randn((patients * draws, 4, 5, 4, 3), generator=generator).to(dtype)
        assert_exact(network, x_B, patients, dtype)


@pytest.mark.parametrize("form", ["grouped", "unfolded", "shifted", "pointwise"])
@pytest.mark.parametrize("patients", [2, 3])
def test_forms_of_a_convolution_agree(form: Form, patients: int) -> None:
    """Also those that a CPU never picks. In bfloat16 the products are not rounded a second time."""
    kinds = [{"kernel_size": 3, "padding": 1}, {"kernel_size": 3}, {"kernel_size": 1}]
    kinds += [{"kernel_size": (3, 1, 2), "padding": (1, 0, 0)}, {"kernel_size": 3, "stride": 2}]
    generator = torch.Generator().manual_seed(4)
    for kind in kinds:
        if (form == "shifted" and "stride" in kind) or (form == "pointwise" and kind["kernel_size"] != 1):
            continue
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
            if form == "grouped" and dtype == torch.bfloat16:
                continue
            conv = nn.Conv3d(5, 6, **kind)
            x_B = torch.randn((patients * 2, 5, 6, 7, 5), generator=generator).to(dtype)
            g_B = torch.randn(conv(x_B.float()).shape, generator=generator).to(dtype)
            exact = [
                rows_in_parameter_layout(*convolution_weight(conv.to(d), x.to(d), g.to(d), patients, form=f))
                for d, x, g, f in (
                    (torch.float64, x_B, g_B, "each"),
                    (dtype, x_B, g_B, form),
                )
            ]
            assert (exact[0] - exact[1]).norm() <= tolerance * exact[0].norm(), (kind, dtype)


def test_forms_are_chosen_by_shape_alone() -> None:
    conv, strided = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, stride=2)
    choose = convolution_form
    assert choose(conv, patients=1, positions=9999, device="cpu") == "each"
    assert choose(conv, patients=8, positions=512, device="cpu") == "grouped"
    assert choose(conv, patients=8, positions=64, device="cpu") == "unfolded"
    assert choose(conv, patients=8, positions=4096, device="cuda") == "shifted"
    assert choose(strided, patients=8, positions=4096, device="cuda") == "unfolded"
    assert choose(nn.Conv3d(4, 4, 1), patients=8, positions=64, device="cpu") == "pointwise"


class Deep(nn.Module):
    """Wide layers on few positions: their inputs and gradients are fewer numbers than their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 48, 3, stride=2, padding=1)
        self.deep = nn.Conv3d(48, 48, 3, padding=1)
        self.down = nn.Conv3d(48, 64, 3, stride=2, padding=1)
        self.wide = nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.deep(torch.tanh(self.conv(x))))
        return self.wide(torch.tanh(self.down(h)).flatten(2).mean(dim=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_late_rows_are_exact_and_used_where_they_are_smaller(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = Deep().to(dtype)
        x_B = torch.randn(4 * 2, 4, 4, 4, 4, dtype=dtype)
    pieces = assert_exact(network, x_B, 4, dtype).pieces
    late = {name for (name, _), piece in zip(network.named_parameters(), pieces, strict=True)
            if isinstance(piece, LateRows)}  # fmt: skip
    assert late == {"conv.weight", "deep.weight", "down.weight", "wide.weight"}
    more = by_engine(network, torch.randn(4 * 2, 4, 16, 16, 16, dtype=dtype), 4).pieces
    assert not isinstance(more[0], LateRows)
    assert not any(isinstance(piece, LateRows) for piece in assert_exact(network, x_B, 1, dtype).pieces)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_used_twice_has_the_norm_of_its_sum(dtype: torch.dtype) -> None:
    """Also where the first use was kept for late: Gram matrices of one use do not know the other."""

    class Twice(Deep):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.deep(torch.tanh(self.conv(x))))
            h = torch.tanh(self.deep(h[..., :1]) + h)
            return self.wide(torch.tanh(self.down(h)).flatten(2).mean(dim=2))

    with torch.random.fork_rng():
        torch.manual_seed(6)
        assert_exact(Twice().to(dtype), torch.randn(3 * 2, 4, 4, 4, 4, dtype=dtype), 3, dtype)


def test_tied_parameters_have_the_norm_of_their_sum() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = nn.Sequential(nn.Flatten(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 60)).double()
        network[3].weight = network[1].weight
        assert_exact(network, torch.randn(6, 1, 5, 4, 3, dtype=torch.float64), 3, torch.float64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_exact(reentrant: bool) -> None:
    class Checkpointed(Deep):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.conv(x))
            h = checkpoint(lambda y: torch.tanh(self.deep(y)), h, use_reentrant=reentrant)
            return self.wide(torch.tanh(self.down(h)).flatten(2).mean(dim=2))

    with torch.random.fork_rng():
        torch.manual_seed(8)
        network = Checkpointed().double()
        x_B = torch.randn(3 * 2, 4, 4, 4, 4, dtype=torch.float64)
    expected = by_autograd(network, x_B, 3) if not reentrant else by_autograd(deep_like(network), x_B, 3)
    found = by_engine(network, x_B, 3)
    for patient, of_patient in enumerate(expected):
        whole = torch.cat([grad.flatten() for grad in of_patient.values()])
        assert (found.row(patient) - whole).norm() <= 1e-10 * whole.norm()


def deep_like(network: nn.Module) -> Deep:
    plain = Deep().double()
    plain.load_state_dict(network.state_dict())
    return plain


def test_inputs_changed_in_place_are_refused_and_outputs_may_be() -> None:
    class InputChanged(Deep):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1.0
            h = self.conv(y)
            y += 1.0
            return self.wide(torch.tanh(self.down(torch.tanh(self.deep(h)))).flatten(2).mean(dim=2))

    with pytest.raises(UnsupportedLayerError, match=r"conv\.weight.*in place"):
        by_engine(InputChanged(), torch.randn(2, 4, 4, 4, 4), 2)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        network = nn.Sequential(nn.Conv3d(4, 6, 3), nn.ReLU(inplace=True), nn.Conv3d(6, 4, 1)).double()
        assert_exact(network, torch.randn(4, 4, 5, 4, 3, dtype=torch.float64), 2, torch.float64)


class Overridden(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.bias.sum()


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.MultiheadAttention(4, 1), "MultiheadAttention"),
        (Overridden(4, 4), "Overridden"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizationList"),
        (nn.BatchNorm3d(4), "batch normalisation"),
        (nn.PReLU(), "PReLU"),
    ],
)
def test_layers_without_a_rule_are_named_before_anything_runs(layer: nn.Module, named: str) -> None:
    network = nn.Sequential(layer)
    with pytest.raises(UnsupportedLayerError, match=named):
        BookKeeping(network, list(network.named_parameters()), 2)


def test_an_embedding_that_mixes_samples_is_refused() -> None:
    for options in ({"scale_grad_by_freq": True}, {"max_norm": 1.0}):
        with pytest.raises(UnsupportedLayerError, match="mixes samples"):
            by_engine(Looked(**options), torch.rand(4, 4, 5, 4, 3), 2)


def test_a_layer_called_with_other_rows_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.linear(torch.ones(1, 3))

    with pytest.raises(UnsupportedLayerError, match=r"linear\.weight.*2 patients"):
        by_engine(Shared(), torch.randn(4, 4, 5, 4, 3), 2)


def test_what_is_added_never_exceeds_what_was_measured() -> None:
    """Late rows that come out longer than their Gram norm said are shortened; others are left alone."""
    rows_Pn = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    late = LateRows(slice(0, 2), lambda some: (rows_Pn[some], None), torch.tensor([1.0, 0.25, 0.0]).double())
    for patient, norm in ((0, 1.0), (1, 0.5), (2, 0.0)):
        total = ClippedTotal(torch.zeros(2, dtype=torch.float64))
        factors = torch.zeros(3, dtype=torch.float64)
        factors[patient] = 1.0
        late.add_scaled(total, factors)
        assert abs(float(total.vector().norm()) - norm) < 1e-7


def test_factors_and_sums_of_rows_that_are_not_finite() -> None:
    rows_Pn = torch.tensor([[1.0, 2.0], [float("inf"), 1.0], [float("nan"), 1.0], [0.0, 0.0], [3e38, 3e38]])
    norms_P = squared_norms(rows_Pn)
    factors_P = clip_factors(norms_P, 1.0)
    assert factors_P.tolist() == [1 / 5**0.5, 0.0, 0.0, 0.0, pytest.approx(1 / (3e38 * 2**0.5))]
    total = torch.zeros(2, dtype=torch.float64)
    add_scaled(total, rows_Pn[:4], factors_P[:4])
    assert torch.equal(total, rows_Pn[0].double() * factors_P[0])


def test_a_total_may_change_between_layouts() -> None:
    rows_Pn = torch.arange(12.0).view(2, 6)
    factors = torch.ones(2, dtype=torch.float64)
    layout = ((2, 3), (1, 0))
    total = ClippedTotal(torch.zeros(6, dtype=torch.float64))
    expected = torch.zeros(6, dtype=torch.float64)
    for chosen in (layout, layout, None, layout):
        DirectRows(slice(0, 6), rows_Pn, chosen).add_scaled(total, factors)
        expected += rows_in_parameter_layout(rows_Pn, chosen).sum(dim=0)
    assert torch.equal(total.vector(), expected)


def test_portions_are_equal() -> None:
    assert [equal_portion(8, limit) for limit in (0, 1, 3, 5, 8, 99)] == [1, 1, 2, 4, 8, 8]
    assert equal_portion(7, 6) == 1
