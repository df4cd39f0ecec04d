"""Membership figure from the white box: the norm of one patient's gradient.

A sample that a network was fitted to has a small loss and pulls little at its weights (Nasr, Shokri and
Houmansadr, S&P 2019, for classifiers; Pang et al., "White-box Membership Inference Attacks against Diffusion
Models", PoPETs 2025). Here the gradient is that of the patient's mean loss over scans, timesteps and the
audit's public noises, with respect to all parameters of the network: what training clips, on noises that it
did not draw.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from privacy.audit.membership import AttackNoise, LossPerSample
from shared.errors import UsageError


def gradient_norm(
    network: nn.Module,
    z_SCDHW: Tensor,
    condition_S: Tensor,
    *,
    noise: AttackNoise,
    loss: LossPerSample,
    norm: int = 2,
    batch_size: int = 32,
) -> float:
    """l_p norm of the gradient of one patient's mean loss over all parameters. The network is left as it was.

    Args:
        z_SCDHW, condition_S: The patient's scans, on the network's device.
        noise: Timesteps and noises, the same for every patient.
        norm: p.
        batch_size: Rows of a backward pass; gradients add up, the result does not depend on it but for
            rounding.

    Raises:
        UsageError: the network has no parameters.
    """
    parameters = list(network.parameters())
    if not parameters:
        raise UsageError("a network without parameters has no gradient")
    t_R, noise_RCDHW = noise.t_R.to(z_SCDHW.device), noise.noise_RCDHW.to(z_SCDHW.device)
    rows = z_SCDHW.shape[0] * t_R.shape[0]
    totals = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in parameters]
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        for start in range(0, rows, batch_size):
            index_B = torch.arange(start, min(start + batch_size, rows), device=z_SCDHW.device)
            scan_B, row_B = index_B // t_R.shape[0], index_B % t_R.shape[0]
            with torch.enable_grad():
                loss_B = loss(network, z_SCDHW[scan_B], condition_S[scan_B], t_R[row_B], noise_RCDHW[row_B])
                found = torch.autograd.grad(loss_B.sum() / rows, parameters, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    power = sum(float(total.abs().pow(norm).sum()) for total in totals)
    return float(power ** (1.0 / norm))
