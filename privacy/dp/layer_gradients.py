"""A layer's gradient for each patient, from its input and the gradient of its output.

A microbatch holds P patients with K draws each, patient after patient, so that a patient's gradient of a
weight is one contraction over its K draws and all positions: as many multiplications as the plain weight
gradient of the same samples, and it takes its place (book-keeping, Bu et al. 2023, section 3). For
convolutions several forms compute the same; :func:`convolution_form` picks by public shape alone:

- ``each``: the plain weight gradient, patient by patient;
- ``grouped``: patients as the groups of one grouped convolution (Rochette, Manoel, Tramel 2019);
- ``unfolded``: batched matrix products of unfolded inputs, positions first, for few positions;
- ``shifted``: one batched matrix product for each kernel row on shifted views of the padded input, with no
  unfolding but along the last axis: for GPUs.

Rows come out in a layout that suits the form; :func:`in_parameter_layout` brings it into the parameter's.

Shape suffixes: B = P K samples, C and O channels in and out, L positions, n numbers of a weight, T kernel
taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import InternalError

Form = Literal["each", "grouped", "unfolded", "shifted", "pointwise"]
Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""(shape, permutation): ``row.view(shape).permute(permutation)`` is the parameter."""

GROUPED_MIN_POSITIONS = 256
"""CPU: from this many positions (over a patient's draws) a grouped convolution beats unfolding (measured: 1.1
to 1.4 against 2.0 to 2.7 times the plain weight gradient at 512 positions, 4.9 against 1.8 at 64)."""

SHIFTED_MIN_POSITIONS = 1024
UNFOLDED_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Patients are unfolded in portions of at most this size (at least one patient)."""


class UnsupportedLayerError(InternalError):
    """A trained parameter has no proper gradient for each patient. The network or the subset must change."""


def convolution_form(module: nn.Module, *, patients: int, positions: int, device: str) -> Form:
    """How a convolution's per-patient weight gradients are computed.

    Args:
        module: Any of torch's convolutions.
        patients: P.
        positions: Output positions of one patient, over all its draws.
        device: Kind of device, ``cpu`` or ``cuda``.
    """
    conv = cast(Any, module)
    if patients == 1:
        return "each"
    if conv.transposed or conv.groups != 1 or len(conv.kernel_size) != 3 or set(conv.dilation) != {1}:
        return "each"
    if set(conv.kernel_size) == {1} and set(conv.stride) == {1} and not any(_padding(conv)):
        return "pointwise"
    if device == "cpu":
        return "grouped" if positions >= GROUPED_MIN_POSITIONS else "unfolded"
    return "shifted" if set(conv.stride) == {1} and positions >= SHIFTED_MIN_POSITIONS else "unfolded"


def in_parameter_layout(row: Tensor, layout: Layout | None) -> Tensor:
    """One patient's (or the sum's) numbers, flat, in the order of the parameter."""
    return rows_in_parameter_layout(row[None], layout)[0]


def rows_in_parameter_layout(rows_Pn: Tensor, layout: Layout | None) -> Tensor:
    """The same for the rows of all patients."""
    if layout is None:
        return rows_Pn
    shape, permutation = layout
    patients = rows_Pn.shape[0]
    by_axis = rows_Pn.view(patients, *shape).permute(0, *(1 + axis for axis in permutation))
    return by_axis.reshape(patients, -1)


def _padding(conv: Any) -> tuple[int, ...]:
    """Symmetric zero padding that the contraction applies itself; other padding is applied beforehand."""
    return (0,) * len(conv.kernel_size) if pads_beforehand(conv) else tuple(conv.padding)


def pads_beforehand(conv: Any) -> bool:
    """Whether the input is padded (reflected, wrapped, unevenly) before it is contracted."""
    return bool(conv.padding_mode != "zeros" or isinstance(conv.padding, str))


def matmul(a_Pij: Tensor, b_Pjk: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Batched product with a result in float32 (or float64): 16-bit factors are not rounded a second time."""
    if a_Pij.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(a_Pij, b_Pjk) if out is None else torch.bmm(a_Pij, b_Pjk, out=out)
    if a_Pij.device.type != "cuda":
        return matmul(a_Pij.float(), b_Pjk.float(), out=out)
    product = torch.bmm(a_Pij, b_Pjk, out_dtype=torch.float32)
    return product if out is None else out.copy_(product)


def equal_portion(patients: int, limit: int) -> int:
    """The largest divisor of P that is at most ``limit`` (at least 1).

    Portions of one size: where a patient stands in a microbatch decides no kernel, hence no bit, of its
    gradient.
    """
    return next(size for size in range(max(1, min(limit, patients)), 0, -1) if patients % size == 0)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of sums over positions: at least float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def convolution_weight(
    module: nn.Module, x_B: Tensor, g_B: Tensor, patients: int, *, form: Form | None = None
) -> tuple[Tensor, Layout | None]:
    """Rows [P, n] of a convolution's weight, and their layout (None: the parameter's).

    Args:
        module: Conv1d to Conv3d or a transposed one.
        x_B: Its input [B, C, ...].
        g_B: Gradient of its output [B, O, ...], in the precision in which the layer was computed.
        patients: P, which divides B.
        form: Another than :func:`convolution_form`'s choice (for tests and measurements).
    """
    conv = cast(Any, module)
    x_B = x_B.to(g_B.dtype)
    if pads_beforehand(conv):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x_B = F.pad(x_B, conv._reversed_padding_repeated_twice, mode=mode)
    draws = x_B.shape[0] // patients
    if form is None:
        positions = draws * g_B[0, 0].numel()
        form = convolution_form(module, patients=patients, positions=positions, device=g_B.device.type)
    match form:
        case "unfolded":
            return _unfolded(conv, x_B, g_B, patients)
        case "shifted":
            return _shifted(conv, x_B, g_B, patients)
        case "pointwise":
            return _pointwise(x_B, g_B, patients), None
        case "grouped":
            x, g = (_patients_to_channels(t, patients) for t in (x_B, g_B))
            return _weight_gradient(conv, x, g, patients).view(patients, -1).to(sum_dtype(g)), None
        case _:
            samples = (slice(at, at + draws) for at in range(0, len(x_B), draws))
            rows = [_weight_gradient(conv, x_B[some], g_B[some], 1).flatten() for some in samples]
            return torch.stack(rows).to(sum_dtype(g_B)), None


def _weight_gradient(conv: Any, x_B: Tensor, g_B: Tensor, groups: int) -> Tensor:
    """torch's own weight gradient; the values of the weight that it is given are not read."""
    ones = len(conv.kernel_size)
    weight = conv.weight
    shape = (weight.shape[0] * groups, *weight.shape[1:])
    empty = torch.empty(shape, dtype=g_B.dtype, device=g_B.device)
    result: Tensor = torch.ops.aten.convolution_backward(
        g_B, x_B, empty, None, conv.stride, _padding(conv), conv.dilation, conv.transposed,
        conv.output_padding if conv.transposed else (0,) * ones, conv.groups * groups, (False, True, False),
    )[1]  # fmt: skip
    return result


def _patients_to_channels(t_B: Tensor, patients: int) -> Tensor:
    """[P K, C, ...] to [K, P C, ...]."""
    draws, shape = t_B.shape[0] // patients, t_B.shape[1:]
    by_draw = t_B.reshape(patients, draws, *shape).transpose(0, 1)
    return by_draw.reshape(draws, patients * shape[0], *shape[1:])


def _pointwise(x_B: Tensor, g_B: Tensor, patients: int) -> Tensor:
    """Kernel 1: one product for each draw, added up."""
    draws, c, o = x_B.shape[0] // patients, x_B.shape[1], g_B.shape[1]
    x_PKCL, g_PKOL = x_B.reshape(patients, draws, c, -1), g_B.reshape(patients, draws, o, -1)
    rows_POC = matmul(g_PKOL[:, 0], x_PKCL[:, 0].transpose(1, 2))
    for k in range(1, draws):
        rows_POC += matmul(g_PKOL[:, k], x_PKCL[:, k].transpose(1, 2))
    return rows_POC.view(patients, -1)


def unfold_positions_first(module: nn.Module, x_B: Tensor, patients: int) -> Tensor:
    """Unfolded input of a 3D convolution, [P, K L, T C]: taps and channels that each output position sees."""
    conv = cast(Any, module)
    draws, c = x_B.shape[0] // patients, x_B.shape[1]
    pd, ph, pw = _padding(conv)
    x_BDHWC = F.pad(x_B.movedim(1, -1), (0, 0, pw, pw, ph, ph, pd, pd))
    windows = x_BDHWC
    for axis, (kernel, stride) in enumerate(zip(conv.kernel_size, conv.stride, strict=True)):
        windows = windows.unfold(1 + axis, kernel, stride)
    # [B, Do, Ho, Wo, C, kd, kh, kw] with the channels last, where they are contiguous in memory.
    windows = windows.movedim(4, -1)
    return windows.reshape(patients, draws * windows[0, ..., 0, 0, 0, 0].numel(), -1, c).flatten(2)


def positions_first(g_B: Tensor, patients: int) -> Tensor:
    """[P K, O, ...] to [P, K L, O] (a view where K is 1)."""
    draws, o = g_B.shape[0] // patients, g_B.shape[1]
    g_PKOL = g_B.reshape(patients, draws, o, -1)
    return g_PKOL[:, 0].transpose(1, 2) if draws == 1 else g_PKOL.transpose(2, 3).reshape(patients, -1, o)


def _unfolded(conv: Any, x_B: Tensor, g_B: Tensor, patients: int) -> tuple[Tensor, Layout]:
    taps, c, o = conv.weight[0, 0].numel(), x_B.shape[1], g_B.shape[1]
    draws = x_B.shape[0] // patients
    positions = draws * g_B[0, 0].numel()
    portion_bytes = UNFOLDED_BYTES.get(g_B.device.type, UNFOLDED_BYTES["cpu"])
    portion = equal_portion(patients, portion_bytes // (positions * taps * c * x_B.element_size()))
    rows = torch.empty(patients, o, taps * c, dtype=sum_dtype(g_B), device=g_B.device)
    for start in range(0, patients, portion):
        end = start + portion
        samples = slice(start * draws, end * draws)
        unfolded = unfold_positions_first(conv, x_B[samples], end - start)
        g_PLO = positions_first(g_B[samples], end - start)
        matmul(g_PLO.transpose(1, 2), unfolded, out=rows[start:end])
    return rows.view(patients, -1), ((o, *conv.kernel_size, c), (0, 4, 1, 2, 3))


def _shifted(conv: Any, x_B: Tensor, g_B: Tensor, patients: int) -> tuple[Tensor, Layout]:
    """Flat rows (d, h, w) of the padded input, each with the kw neighbours along w beside it; the taps (a, b)
    of the other two axes are the same rows from a later start. The output's gradient stands on the same
    grid, zero where there is no output.
    """
    draws, c, o = x_B.shape[0] // patients, x_B.shape[1], g_B.shape[1]
    kd, kh, kw = conv.kernel_size
    pd, ph, pw = _padding(conv)
    do, ho, wo = g_B.shape[2:]
    dp, hp = x_B.shape[2] + 2 * pd, x_B.shape[3] + 2 * ph
    period = dp * hp * wo
    x_BDHWC = F.pad(x_B.movedim(1, -1), (0, 0, pw, pw, ph, ph, pd, pd))
    x_PLc = x_BDHWC.unfold(3, kw, 1).movedim(4, -1).reshape(patients, draws * period, kw * c)
    g_BDHWO = F.pad(g_B.movedim(1, -1), (0, 0, 0, 0, 0, hp - ho, 0, dp - do))
    length = draws * period - ((kd - 1) * hp + kh - 1) * wo
    g_POL = g_BDHWO.reshape(patients, draws * period, o)[:, :length].transpose(1, 2)
    rows = torch.empty(patients, kd * kh, o, kw * c, dtype=sum_dtype(g_B), device=g_B.device)
    for a in range(kd):
        for b in range(kh):
            start = (a * hp + b) * wo
            matmul(g_POL, x_PLc[:, start : start + length], out=rows[:, a * kh + b])
    return rows.view(patients, -1), ((kd, kh, o, kw, c), (2, 4, 0, 1, 3))


def channel_sums(g_B: Tensor, patients: int) -> Tensor:
    """Rows [P, O] of a convolution's bias."""
    draws, o = g_B.shape[0] // patients, g_B.shape[1]
    return g_B.reshape(patients, draws, o, -1).sum(dim=(1, 3), dtype=sum_dtype(g_B))


def linear_weight(x_B: Tensor, g_B: Tensor, patients: int) -> Tensor:
    """Rows [P, n] of a Linear layer's weight."""
    x_PLC, g_PLO = linear_positions(x_B, g_B, patients)
    return matmul(g_PLO.transpose(1, 2), x_PLC).view(patients, -1)


def linear_positions(x_B: Tensor, g_B: Tensor, patients: int) -> tuple[Tensor, Tensor]:
    """Input [P, K L, C] and output gradient [P, K L, O]."""
    g_PLO = g_B.reshape(patients, -1, g_B.shape[-1])
    return x_B.to(g_B.dtype).reshape(patients, -1, x_B.shape[-1]), g_PLO


def group_norm_scale(module: nn.GroupNorm, x_B: Tensor, g_B: Tensor, patients: int) -> Tensor:
    """Rows [P, C] of GroupNorm's scale."""
    b, c = x_B.shape[:2]
    dtype = sum_dtype(g_B)
    positions = x_B[0, 0].numel()
    normal = torch.native_group_norm(
        x_B.to(dtype).contiguous(), None, None, b, c, positions, module.num_groups, module.eps
    )[0]
    dot = matmul(g_B.to(dtype).reshape(b * c, 1, positions), normal.view(b * c, positions, 1))
    return dot.view(patients, -1, c).sum(dim=1)


def layer_norm_scale(module: nn.LayerNorm, x_B: Tensor, g_B: Tensor, patients: int) -> Tensor:
    """Rows [P, n] of LayerNorm's scale."""
    dtype = sum_dtype(g_B)
    normal = F.layer_norm(x_B.to(dtype), module.normalized_shape, eps=module.eps)
    return (g_B.to(dtype) * normal).reshape(patients, -1, module.weight.numel()).sum(dim=1)


def trailing_sums(g_B: Tensor, numel: int, patients: int) -> Tensor:
    """Rows [P, n] of a bias that is added along the last axes (Linear, LayerNorm)."""
    return g_B.reshape(patients, -1, numel).sum(dim=1, dtype=sum_dtype(g_B))


def embedding_rows(module: nn.Embedding, index_B: Tensor, g_B: Tensor, patients: int) -> Tensor:
    """Rows [P, n] of an embedding table: one-hot products, deterministic on every device."""
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise UnsupportedLayerError("an Embedding with max_norm or scale_grad_by_freq mixes samples")
    index_PL = index_B.reshape(patients, -1)
    dtype = sum_dtype(g_B)
    hot_PLR = F.one_hot(index_PL, module.num_embeddings).to(dtype)
    if module.padding_idx is not None:
        hot_PLR[..., module.padding_idx] = 0
    g_PLD = g_B.to(dtype).reshape(patients, index_PL.shape[1], -1)
    return matmul(hot_PLR.transpose(1, 2), g_PLD).reshape(patients, -1)


Rows = tuple[Tensor, Layout | None]
LayerGradient = Callable[[Any, str, Tensor, Tensor, int], Rows]
"""(module, name of its parameter, input, output gradient, P) to rows [P, n] and their layout."""


def _convolution(module: Any, name: str, x_B: Tensor, g_B: Tensor, patients: int) -> Rows:
    if name == "bias":
        return channel_sums(g_B, patients), None
    with _convolution_precision(g_B.device.type):
        return convolution_weight(module, x_B, g_B, patients)


@contextmanager
def _convolution_precision(device: str) -> Iterator[None]:
    """Matrix products that stand for a convolution may use TF32 where convolutions may."""
    if device != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _linear(module: Any, name: str, x_B: Tensor, g_B: Tensor, patients: int) -> Rows:
    if name == "bias":
        return trailing_sums(g_B, module.out_features, patients), None
    return linear_weight(x_B, g_B, patients), None


def _group_norm(module: Any, name: str, x_B: Tensor, g_B: Tensor, patients: int) -> Rows:
    if name == "bias":
        return channel_sums(g_B, patients), None
    return group_norm_scale(module, x_B, g_B, patients), None


def _layer_norm(module: Any, name: str, x_B: Tensor, g_B: Tensor, patients: int) -> Rows:
    if name == "bias":
        return trailing_sums(g_B, module.bias.numel(), patients), None
    return layer_norm_scale(module, x_B, g_B, patients), None


def _embedding(module: Any, _name: str, x_B: Tensor, g_B: Tensor, patients: int) -> Rows:
    return embedding_rows(module, x_B, g_B, patients), None


LAYER_GRADIENTS: dict[type[nn.Module], LayerGradient] = {
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.ConvTranspose3d: _convolution,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


def layer_gradient(module: nn.Module) -> LayerGradient:
    """The rule for a layer whose forward is torch's own.

    Raises:
        UnsupportedLayerError: another kind of layer, or a subclass that computes something else.
    """
    for kind, rule in LAYER_GRADIENTS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    raise UnsupportedLayerError(
        f"no per-patient gradient is known for a layer of type {type(module).__name__}"
    )
