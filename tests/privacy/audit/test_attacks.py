"""Secondary attacks: against the papers' own formulas, and on a denoiser that has memorised, exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small_plan import plan_document, small_plan
from torch import Tensor, nn

from privacy.audit.attacks import PatientImages, encode_patients, secondary_scores, usual_attacks
from privacy.audit.bounds import auc
from privacy.audit.gradient_norm import gradient_norm
from privacy.audit.membership import AttackNoise, attack_losses
from privacy.audit.trajectory_attacks import pia, secmi, sima
from shared.errors import UsageError
from shared.model.diffusion import RECTIFIED_FLOW, Diffusion, VPrediction, per_sample_loss
from shared.model.guidance import GuidedVelocity
from shared.study_plan import InvalidPlanError, SecondaryAttackClause, load_plan_toml, parse_plan

SHAPE = (2, 4, 4, 4)
DIGEST = b"d" * 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Scans:
    patient_key: str
    latents_SCDHW: Tensor
    conditions_S: Tensor


def patients(n: int, *, seed: int, like: Tensor | None = None) -> list[Scans]:
    """Patients with one or two scans; smooth blobs of a low-dimensional family."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(99))
    found = []
    for i in range(n):
        z = torch.einsum("sk,kcdhw->scdhw", 0.4 * torch.randn((1 + i % 2, 6), generator=generator), basis)
        z = z + 0.2 * torch.randn(z.shape, generator=generator)
        conditions = torch.full((z.shape[0],), i % 2)
        found.append(Scans(patient_key=f"{seed}-{i}", latents_SCDHW=z, conditions_S=conditions))
    return found


class Memorised(nn.Module):
    """The exact velocity field of the empirical law of some latents: E[n - z | z_t = x] = (x - E[z | x]) / t.

    What a denoiser without protection converges to. A temperature scales it, so that it has a parameter.
    """

    null_index = 2

    def __init__(self, training: list[Scans]) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("z_NE", torch.cat([p.latents_SCDHW for p in training]).flatten(1))

    def forward(self, z_BCDHW: Tensor, t_B: Tensor, condition_B: Tensor) -> Tensor:
        x_BE, t = z_BCDHW.flatten(1), t_B.clamp_min(1e-3)[:, None]
        squared_BN = torch.cdist(x_BE, (1.0 - t_B[0]) * self.z_NE).square()
        if t_B.unique().numel() > 1:
            squared_BN = torch.stack(
                [
                    torch.cdist(x[None], (1.0 - s) * self.z_NE)[0].square()
                    for x, s in zip(x_BE, t_B, strict=True)
                ]
            )
        weights_BN = torch.softmax(-self.temperature * squared_BN / (2.0 * t**2), dim=1)
        return ((x_BE - weights_BN @ self.z_NE) / t).view_as(z_BCDHW)


class MemorisedCurve(nn.Module):
    """The same for v-prediction: v = alpha E[n | z_t] - sigma E[z | z_t]."""

    null_index = 2
    diffusion = VPrediction(1.5)

    def __init__(self, training: list[Scans]) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.register_buffer("z_NE", torch.cat([p.latents_SCDHW for p in training]).flatten(1))

    def forward(self, z_BCDHW: Tensor, level_B: Tensor, condition_B: Tensor) -> Tensor:
        x_BE = z_BCDHW.flatten(1)
        alpha, sigma = (part[:, None].clamp_min(1e-3) for part in self.diffusion.weights(level_B))
        squared_BN = (x_BE[:, None] - alpha[:, :, None] * self.z_NE[None]).square().sum(dim=2)
        weights_BN = torch.softmax(-self.temperature * squared_BN / (2.0 * sigma**2), dim=1)
        data_BE = weights_BN @ self.z_NE
        return (alpha * (x_BE - alpha * data_BE) / sigma - sigma * data_BE).view_as(z_BCDHW)


class Smooth(nn.Module):
    """A field without structure, not linear in anything; conditions matter."""

    null_index = 2

    def __init__(self, diffusion: Diffusion = RECTIFIED_FLOW) -> None:
        super().__init__()
        self.diffusion = diffusion
        torch.manual_seed(3)
        self.table = nn.Embedding(3, 2)
        self.layer = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, z_BCDHW: Tensor, t_B: Tensor, condition_B: Tensor) -> Tensor:
        shift = self.table(condition_B)[:, :, None, None, None] * (1.0 + t_B.view(-1, 1, 1, 1, 1))
        out: Tensor = torch.tanh(self.layer(z_BCDHW) + shift)
        return out


def clause(attack: str, **choices: Any) -> SecondaryAttackClause:
    usual = {a.attack: a for a in usual_attacks(guidance_scale=3.0)}
    return SecondaryAttackClause(**{**usual[attack].model_dump(), "guidance_scale": 1.0, **choices})


def scores(attack: SecondaryAttackClause, network: nn.Module, who: list[Scans], **options: Any) -> np.ndarray:
    options.setdefault("public_denoiser", network)
    return secondary_scores(attack, network, who, plan_digest=DIGEST, **options)


ATTACKS = ("sima", "pia", "secmi", "gradient_norm", "loss")


# The papers' formulas, for any (alpha, sigma): x_t = alpha z + sigma n. Rectified flow: alpha = 1 - t,
# sigma = t, v = n - z; v-prediction: alpha = cos(pi t / 2), sigma = sin(pi t / 2), v = alpha n - sigma z.
DIFFUSIONS = pytest.mark.parametrize("diffusion", [RECTIFIED_FLOW, VPrediction()], ids=str)


def paper_weights(diffusion: Diffusion, t: float) -> tuple[float, float]:
    if isinstance(diffusion, VPrediction):
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    return 1 - t, t


def paper_noise(field: Smooth, x: Tensor, t: float, condition: Tensor) -> Tensor:
    alpha, sigma = paper_weights(field.diffusion, t)
    velocity = field(x, torch.full((x.shape[0],), t, dtype=torch.float64), condition)
    data = alpha * x - sigma * velocity if isinstance(field.diffusion, VPrediction) else x - t * velocity
    return (x - alpha * data) / sigma


@DIFFUSIONS
@torch.no_grad()
def test_secmi_is_the_papers_t_error(diffusion: Diffusion) -> None:
    """Duan et al., equations 6 to 8, in the variables of DDIM: y = x / alpha, p = sigma / alpha."""
    field, z = Smooth(diffusion).double(), torch.randn((3, *SHAPE), dtype=torch.float64)
    condition, times = torch.tensor([0, 1, 1]), (0.1, 0.25, 0.4, 0.5)

    def ddim(x: Tensor, t: float, to: float) -> Tensor:
        (alpha, sigma), (alpha_to, sigma_to) = paper_weights(diffusion, t), paper_weights(diffusion, to)
        moved = x / alpha + (sigma_to / alpha_to - sigma / alpha) * paper_noise(field, x, t, condition)
        return alpha_to * moved

    x = z
    for t, to in itertools.pairwise(times[:-1]):
        x = ddim(x, t, to)
    back = ddim(ddim(x, times[-2], times[-1]), times[-1], times[-2])
    expected = (back - x).square().flatten(1).mean(dim=1)
    assert torch.allclose(secmi(field, z, condition, times, 2), expected, rtol=1e-9)


@DIFFUSIONS
@torch.no_grad()
def test_pia_and_sima_are_the_papers_distances(diffusion: Diffusion) -> None:
    field, z = Smooth(diffusion).double(), torch.randn((2, *SHAPE), dtype=torch.float64)
    condition, (first, second) = torch.tensor([0, 1]), (0.05, 0.3)
    alpha, sigma = paper_weights(diffusion, second)
    start = paper_noise(field, z, first, condition)
    moved = paper_noise(field, alpha * z + sigma * start, second, condition)
    expected = ((moved - start) ** 4).flatten(1).mean(dim=1)
    assert torch.allclose(pia(field, z, condition, (first, second), 4), expected, rtol=1e-8)
    expected = (paper_noise(field, alpha * z, second, condition) ** 4).flatten(1).mean(dim=1)
    assert torch.allclose(sima(field, z, condition, (second,), 4), expected, rtol=1e-8)


@pytest.mark.parametrize("kind", [Memorised, MemorisedCurve])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_memorising_denoiser_gives_its_patients_away(attack: str, kind: type[Memorised]) -> None:
    members, held_out = patients(12, seed=1), patients(12, seed=2)
    leaky, public = kind(members), kind(patients(12, seed=3))
    found = [scores(clause(attack), leaky, group, public_denoiser=public) for group in (members, held_out)]
    least = 0.85 if attack == "gradient_norm" else 0.95  # it has one parameter to pull at
    assert auc(*found) > least
    # On the wrong side the same figures are worth as little as they are worth much here.
    wrong = clause(attack, member_side="high")
    found = [scores(wrong, leaky, group, public_denoiser=public) for group in (members, held_out)]
    assert auc(*found) < 1 - least


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_score_depends_on_its_own_patient_alone(attack: str) -> None:
    who, network = patients(5, seed=4), Smooth()
    calls: list[tuple[str, int, int]] = []
    together = scores(
        clause(attack), network, who, public_denoiser=Smooth(), progress=lambda *facts: calls.append(facts)
    )
    alone = [scores(clause(attack), network, [patient], public_denoiser=Smooth())[0] for patient in who]
    assert np.array_equal(together, np.array(alone))
    assert [done for _, done, _ in calls] == [1, 2, 3, 4, 5] and calls[0][2] == 5
    by_one = scores(clause(attack), network, who, public_denoiser=Smooth(), batch_size=1)
    assert np.allclose(by_one, together, rtol=1e-4, atol=1e-6)
    assert scores(clause(attack), network, []).shape == (0,)


def test_the_loss_attack_is_the_primary_one_without_guidance() -> None:
    members, candidate, public = patients(3, seed=5), Memorised(patients(4, seed=6)), Smooth()
    attack = clause("loss")
    noise = AttackNoise.from_plan_digest(
        DIGEST, timesteps=attack.timesteps, draws_per_timestep=2, latent_shape=SHAPE
    )
    primary = attack_losses(public, candidate, members, loss=per_sample_loss, noise=noise).score_P
    assert np.array_equal(scores(attack, candidate, members, public_denoiser=public), primary)


def test_a_calibrated_attack_cannot_tell_a_model_from_itself() -> None:
    network, who = Smooth(), patients(4, seed=7)
    for attack in ATTACKS:
        assert np.abs(scores(clause(attack, calibrated=True), network, who)).max() == 0.0
    for training in (True, False):
        scores(clause("sima"), network.train(training), who)
        assert network.training is training


@torch.no_grad()
def test_guidance_is_the_samplers() -> None:
    network, z = Smooth(), torch.randn((2, *SHAPE))
    t, condition, null = torch.full((2,), 0.4), torch.tensor([0, 1]), torch.tensor([2, 2])
    plain, none = network(z, t, condition), network(z, t, null)
    assert torch.equal(GuidedVelocity(network, 1.0)(z, t, condition), plain)
    assert torch.allclose(GuidedVelocity(network, 0.0)(z, t, condition), none, atol=1e-6)
    assert torch.allclose(GuidedVelocity(network, 3.0)(z, t, condition), none + 3 * (plain - none))
    with pytest.raises(UsageError, match="null class"):
        GuidedVelocity(nn.Identity(), 2.0)


@pytest.mark.parametrize("attack", ATTACKS)
def test_guidance_changes_the_figures_of_a_conditional_model(attack: str) -> None:
    """Of the same side where it memorised the unconditional part as well."""
    network, who = Smooth(), patients(4, seed=8)
    plain = scores(clause(attack), network, who, public_denoiser=Memorised(who))
    guided = scores(clause(attack, guidance_scale=3.0), network, who, public_denoiser=Memorised(who))
    assert np.isfinite(guided).all() and np.abs(guided - plain).min() > 0


@pytest.mark.parametrize("norm", [1, 2, 4])
def test_gradient_norm_is_that_of_one_backward_pass(norm: int) -> None:
    network, patient = Smooth().requires_grad_(False), patients(2, seed=9)[1]
    noise = AttackNoise.from_plan_digest(
        DIGEST, timesteps=(0.2, 0.7), draws_per_timestep=3, latent_shape=SHAPE
    )
    found = gradient_norm(
        network, patient.latents_SCDHW, patient.conditions_S, noise=noise, loss=per_sample_loss, norm=norm,
        batch_size=5,
    )  # fmt: skip
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    network.requires_grad_(True)
    z = patient.latents_SCDHW.repeat_interleave(6, dim=0)
    loss = per_sample_loss(
        network, z, patient.conditions_S.repeat_interleave(6), noise.t_R.repeat(2),
        noise.noise_RCDHW.repeat(2, 1, 1, 1, 1),
    ).mean()  # fmt: skip
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
    assert found == pytest.approx(float(gradient.double().norm(norm)), rel=1e-4)


def test_images_are_encoded_scan_by_scan() -> None:
    class Halving(nn.Module):
        def encode(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor:
            assert image_B1DHW.shape[0] == mask_BDHW.shape[0] == 1
            return torch.cat([image_B1DHW, mask_BDHW[:, None].float()], dim=1)[..., ::2, ::2, ::2]

    image, mask = torch.rand(3, 1, 8, 8, 8), torch.ones(3, 8, 8, 8, dtype=torch.int64)
    patient = PatientImages(
        patient_key="p", image_S1DHW=image, mask_SDHW=mask, conditions_S=torch.tensor([0, 1, 1])
    )
    assert repr(patient) == "PatientImages(<private>)"
    (encoded,) = encode_patients(Halving(), [patient])
    assert encoded.latents_SCDHW.shape == (3, 2, 4, 4, 4)
    assert np.isfinite(scores(clause("pia"), Smooth(), [encoded])).all()


# The plan fixes every choice.


def test_a_plan_without_secondary_attacks_keeps_its_digest() -> None:
    document = plan_document()
    plan = parse_plan(document, what="old")
    assert b"secondary_attacks" not in plan.canonical()
    document["audit"]["secondary_attacks"] = []
    assert parse_plan(document, what="new").digest() == plan.digest()
    attack = {"attack": "sima", "timesteps": [0.2]}
    document["audit"]["secondary_attacks"] = [attack]
    assert parse_plan(document, what="other").digest() != plan.digest()


def test_secondary_attacks_travel_through_toml(tmp_path: Any) -> None:
    attacks = [attack.model_dump(mode="json") for attack in usual_attacks(guidance_scale=2.5)]
    plan = small_plan(audit__secondary_attacks=attacks)
    assert len({attack.attack_id for attack in plan.audit.secondary_attacks}) == len(attacks) == 9
    (tmp_path / "plan.toml").write_text(plan.to_toml())
    assert load_plan_toml(tmp_path / "plan.toml").digest() == plan.digest()


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ({"attack": "sima", "timesteps": [0.3, 0.2]}, "timesteps ascend"),
        ({"attack": "sima", "timesteps": [1.2]}, "timesteps ascend"),
        ({"attack": "pia", "timesteps": [0.2]}, "at least 2"),
        ({"attack": "secmi", "timesteps": [0.1, 0.2], "draws_per_timestep": 2}, "draws no noise"),
        ({"attack": "loss", "timesteps": [0.2], "norm": 4}, "norm is 2"),
        ({"attack": "sima", "timesteps": [0.2], "pooled_weight": 4}, "edges are given"),
        ({"attack": "sima", "timesteps": [0.2], "edges": [0.1]}, "edges are given"),
        ({"attack": "guess", "timesteps": [0.2]}, "attack"),
        ({"attack": "sima", "timesteps": [0.2], "norm": 3}, "norm"),
    ],
)  # fmt: skip
def test_an_attack_that_is_no_attack_is_refused(attack: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidPlanError, match=words):
        small_plan(audit__secondary_attacks=[attack])


def test_an_attack_twice_is_refused() -> None:
    twice = [{"attack": "sima", "timesteps": [0.2]}] * 2
    with pytest.raises(InvalidPlanError, match="twice"):
        small_plan(audit__secondary_attacks=twice)
