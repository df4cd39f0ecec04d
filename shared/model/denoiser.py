"""Denoiser: MONAI's 3D ``DiffusionModelUNet``, class conditional, with a null class for guidance.

All normalisation is GroupNorm or LayerNorm, so that one patient's gradient never depends on another's scan;
``opacus.validators.ModuleValidator`` accepts it, and tests hold its per-sample gradients against batches of
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.networks.nets import DiffusionModelUNet
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.errors import UsageError
from shared.model.diffusion import Diffusion, diffusion_of
from shared.model.low_rank import insert_low_rank
from shared.model.presets import ModelPreset
from shared.model.public_network import seeded_initialisation

TIMESTEP_SCALE = 1000.0
"""The UNet's sinusoidal embedding expects timesteps of this range; ours are in [0, 1]."""

CONDITION_INIT_STD = 0.02


class ConditionEmbedding(nn.Module):
    """Sum of the embeddings of condition and covariates, times a constant gain.

    Args:
        n_rows: Conditions and the null class.
        dim: Length of an embedding.
        gain: The gain.
        covariate_sizes: Number of values of each covariate; each has one row more, for unknown.
    """

    def __init__(self, n_rows: int, dim: int, gain: float, covariate_sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.gain = gain
        self.n_rows = n_rows
        self.table = nn.Embedding(n_rows, dim)
        self.covariate_tables = nn.ModuleList(nn.Embedding(size + 1, dim) for size in covariate_sizes)
        for table in self._tables():
            nn.init.normal_(table.weight, std=CONDITION_INIT_STD / gain)

    def _tables(self) -> list[nn.Embedding]:
        covariates = [table for table in self.covariate_tables if isinstance(table, nn.Embedding)]
        return [self.table, *covariates]

    @torch.no_grad()
    def set_gain(self, gain: float) -> None:
        """Change the gain and scale the tables against it: the same function, another parametrisation."""
        for table in self._tables():
            table.weight.mul_(self.gain / gain)
        self.gain = gain

    def forward(self, class_B: Tensor) -> Tensor:
        """Embeddings of class indices (:mod:`shared.model.conditioning`), [B, dim]."""
        condition, *covariates = self._tables()
        if not covariates:
            rows: Tensor = condition(class_B)
            return rows * self.gain
        rows, rest_B = condition(class_B % self.n_rows), class_B // self.n_rows
        for table in covariates:
            rows = rows + table(rest_B % table.num_embeddings)
            rest_B = rest_B // table.num_embeddings
        return rows * self.gain


class Denoiser(nn.Module):
    """Velocity v(z_t, noise level, condition) on the preset's path (:mod:`shared.model.diffusion`).

    Args:
        preset: Architecture.
        n_conditions: Number of conditions; class index ``n_conditions`` is the null class.
        covariate_sizes: Number of values of each covariate.
    """

    def __init__(
        self, preset: ModelPreset, *, n_conditions: int, covariate_sizes: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        if not 1 <= n_conditions <= 1024:
            raise UsageError(f"{n_conditions} conditions: at least 1 and at most 1024")
        self.preset = preset
        self.n_conditions = n_conditions
        self.covariate_sizes = covariate_sizes
        self.unet = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=preset.latent_channels,
            out_channels=preset.latent_channels,
            num_res_blocks=preset.denoiser_res_blocks,
            channels=preset.denoiser_channels,
            attention_levels=preset.attention_levels,
            norm_num_groups=preset.norm_groups,
            num_head_channels=preset.head_channels,
            resblock_updown=preset.resblock_updown,
            num_class_embeds=n_conditions + 1,
        )
        self.unet.class_embedding = ConditionEmbedding(
            n_conditions + 1, preset.denoiser_channels[0] * 4, preset.condition_gain, covariate_sizes
        )

    @property
    def diffusion(self) -> Diffusion:
        """Path, target, loss and sampling step that belong to this network."""
        return diffusion_of(self.preset)

    @property
    def null_index(self) -> int:
        """Row of the null class."""
        return self.n_conditions

    def forward(self, z_BCDHW: Tensor, level_B: Tensor, condition_B: Tensor) -> Tensor:
        """Velocity v_BCDHW at noised latents, noise levels in [0, 1] and class indices (int64) [B]."""
        velocity: Tensor = self.unet(z_BCDHW, timesteps=level_B * TIMESTEP_SCALE, class_labels=condition_B)
        return velocity

    @torch.no_grad()
    def copy_condition(self, *, source: int, target: int) -> None:
        """Initialise one condition's row as another's: the start for a condition never seen in public."""
        table = self.unet.class_embedding.table.weight
        table[target] = table[source]

    @torch.no_grad()
    def forget_covariate(self, *, covariate: int, row: int) -> None:
        """Initialise a covariate's value as unknown: the start for a value never seen in public."""
        table = self.unet.class_embedding.covariate_tables[covariate].weight
        table[row] = table[0]


def build_denoiser(
    preset: ModelPreset, *, n_conditions: int, covariate_sizes: Sequence[int] = (), seed: int = 0
) -> Denoiser:
    """A freshly initialised denoiser; initialisation depends on the public seed alone."""
    with seeded_initialisation(seed):
        return Denoiser(preset, n_conditions=n_conditions, covariate_sizes=tuple(covariate_sizes))


PRIVATE_SUBSETS: tuple[str, ...] = ("all", "attention", "class_embedding", "conditioning", "low_rank")
"""Which parameters may train privately; a plan names one."""

NamedParameters = list[tuple[str, nn.Parameter]]


def parameter_subset(denoiser: Denoiser, name: str) -> NamedParameters:
    """Choose the parameters that train, and freeze all others.

    - ``all``: every parameter;
    - ``attention``: self-attention layers with their normalisation;
    - ``class_embedding``: the embeddings of conditions and covariates alone. A few hundred numbers, so that
      little noise is added up; the prior must be able to draw what the conditions differ in;
    - ``conditioning``: condition embedding, timestep MLP, and each residual block's projection of them;
    - ``low_rank``: adapters (:mod:`shared.model.low_rank`), inserted here where they are missing;
      ``merge_low_rank`` gives the plain network back.

    Call it before wrapping the network in Opacus' ``GradSampleModule``, which hooks only what trains.

    Returns:
        (name, parameter) in canonical order: sorted by name. Names and order depend on the preset alone.

    Raises:
        UsageError: there is no such subset.
    """
    if name not in PRIVATE_SUBSETS:
        raise UsageError(f"no such parameter subset: {name!r}", remedy=f"choose one of {PRIVATE_SUBSETS}")
    if name == "low_rank":
        insert_low_rank(denoiser, denoiser.preset.low_rank)
    chosen: NamedParameters = []
    for parameter_name, parameter in sorted(denoiser.named_parameters(), key=lambda item: item[0]):
        belongs = _belongs(parameter_name, name)
        parameter.requires_grad_(belongs)
        if belongs:
            chosen.append((parameter_name, parameter))
    return chosen


def _belongs(parameter_name: str, subset: str) -> bool:
    parts = set(parameter_name.split("."))
    match subset:
        case "attention":
            return bool(parts & {"attentions", "attention"})
        case "class_embedding":
            return "class_embedding" in parts
        case "conditioning":
            return bool(parts & {"class_embedding", "time_embed", "time_emb_proj"})
        case "low_rank":
            return bool(parts & {"down", "up"})
        case _:
            return True


@torch.no_grad()
def assign_trained(denoiser: Denoiser, params: NamedParameters, vector: NDArray[np.float32]) -> None:
    """:func:`assign` what a study trained, and leave the null class its public row.

    Every member's scan has a condition, so no gradient reaches the null class's row and all that a study adds
    to it is noise; guidance would carry that into every sample. Post-processing: it costs no privacy.

    Raises:
        UsageError: as :func:`assign`.
    """
    table = denoiser.unet.class_embedding.table.weight
    public = table[denoiser.null_index].clone()
    assign(params, vector)
    table[denoiser.null_index] = public


def flatten(params: NamedParameters) -> NDArray[np.float32]:
    """All values in the given order, float32 [d]."""
    if not params:
        return np.zeros(0, dtype=np.float32)
    return np.concatenate(
        [parameter.detach().cpu().numpy().ravel() for _, parameter in params], dtype=np.float32
    )


@torch.no_grad()
def assign(params: NamedParameters, vector: NDArray[Any]) -> None:
    """Inverse of :func:`flatten`.

    Raises:
        UsageError: the vector is not float [d] with finite values; the parameters are then unchanged.
    """
    d = sum(parameter.numel() for _, parameter in params)
    if vector.shape != (d,) or not np.isfinite(vector).all():
        raise UsageError(f"vector of shape {vector.shape}: expected {d} finite values")
    offset = 0
    for _, parameter in params:
        piece = np.ascontiguousarray(vector[offset : offset + parameter.numel()], dtype=np.float32)
        parameter.copy_(torch.tensor(piece).view_as(parameter))
        offset += parameter.numel()
