"""The production path in one process: update, mask, sum, unmask, with every step open to the auditor.

Sites are real (:class:`privacy.dp.trainer.PatientTrainer`, each with secret randomness of its own, and
:class:`privacy.secagg.site_rounds.SiteSecureAggregation`), so is the server, and every message passes through
its bytes. Identities are made for the audit and thrown away: no key, ledger or attempt of a study is touched,
and nothing here has ever seen a patient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from privacy.audit.canaries import build_probe
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.patient_gradients import NamedParameters, PerSampleLoss
from privacy.dp.patient_sampling import TimestepDraw, uniform_timesteps
from privacy.dp.patients import PatientScans
from privacy.dp.trainer import PatientTrainer
from privacy.secagg.masking import from_bytes
from privacy.secagg.messages import (
    REQUESTS,
    AdvertiseRequest,
    ConfirmRequest,
    Reply,
    Request,
    ShareRequest,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
)
from privacy.secagg.server_rounds import ServerAttempt
from privacy.secagg.session import AttemptId
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secret_random import SecretRandom
from shared.identity import SigningKey
from shared.wire import Envelope, decode, encode

Progress = Callable[[str, int, int], None]
"""Called with (part, done, total). Nothing in an audit is private."""

ROUNDING_SHIFT = 0.75
"""Bound, in grid steps, on what rounding to the grid moves a projection on two coordinates (0.71), and on
the half step between an integer and its Gaussian."""

HEAD = {"length": 0, "entry": "00" * 32}
WEIGHTS_HASH, REQUEST_HASH = bytes(32), bytes([1]) * 32


@dataclass(frozen=True, kw_only=True)
class AuditSize:
    """How much is run. More finds smaller defects; the false-failure probability stays.

    Attributes:
        canaries: Over all sites together.
        empty_steps: Attempts in which nobody takes part.
        canary_steps: Attempts with canaries.
        signal_steps: Updates of each site with the smallest noise; ``sampled_signal_steps`` where q < 1.
        grid_pairs: Repetitions of the two neighbouring cohorts.
    """

    canaries: int = 1024
    empty_steps: int = 2
    canary_steps: int = 6
    signal_steps: int = 3
    sampled_signal_steps: int = 16
    grid_pairs: int = 4


@dataclass(frozen=True, kw_only=True)
class AuditedStep:
    """One attempt as only an audit sees it. Vectors are int64 [d], in grid steps.

    Attributes:
        shares: By site: what the site computed, noise included, before masking.
        masked: By survivor: the residues that it uploaded.
        survivors: Whose shares the server's sum holds.
        total: What the server unmasked.
    """

    shares: dict[str, NDArray[np.int64]]
    masked: dict[str, NDArray[np.unsignedinteger]]
    survivors: tuple[str, ...]
    total: NDArray[np.int64]


class AuditConsortium:
    """All sites of a plan, and its server, for attempts of one vector length.

    Args:
        execution: The plan's mechanism at the dimension of this consortium's network.
        site_ids: The plan's sites, in order.
        study_digest: Digest of the plan in hex.
        build: Makes a network, its trained parameters and its loss; once for each site.
        device: Torch device.
        draw_timesteps: How a site draws timesteps.
    """

    def __init__(
        self,
        execution: ExecutionPlan,
        site_ids: Sequence[str],
        *,
        study_digest: str,
        build: Callable[[], tuple[nn.Module, NamedParameters, PerSampleLoss]],
        device: str = "cpu",
        draw_timesteps: TimestepDraw = uniform_timesteps,
    ) -> None:
        self.execution, self.site_ids = execution, tuple(site_ids)
        self._digest, self._attempt = study_digest, 0
        self._parameters = ProtocolParameters(
            n_sites=execution.n_sites,
            threshold=execution.threshold,
            max_colluding=execution.max_colluding,
            modulus_bits=execution.modulus_bits,
        )
        keys = {site_id: SigningKey.generate() for site_id in self.site_ids}
        self._roster = tuple((site_id, keys[site_id].verify_key) for site_id in self.site_ids)
        self._trainers = {}
        self._secagg = {}
        for site_id in self.site_ids:
            network, parameters, loss = build()
            self._trainers[site_id] = PatientTrainer(
                network.to(device), parameters, loss, execution, SecretRandom(), device=device,
                draw_timesteps=draw_timesteps,
            )  # fmt: skip
            self._secagg[site_id] = SiteSecureAggregation(
                site_id=site_id,
                key=keys[site_id],
                roster=self._roster,
                parameters=self._parameters,
                study_digest=study_digest,
                register_attempt=lambda _: None,
                entropy=SecretRandom(),
            )

    def update(self, site_id: str, patients: Sequence[PatientScans]) -> NDArray[np.int64]:
        """One site's vector, int64 [d], noise included."""
        return self._trainers[site_id].distributed_update(patients)

    def step(self, cohorts: dict[str, list[PatientScans]], *, dropped: Collection[str] = ()) -> AuditedStep:
        """A whole attempt; ``dropped`` sites share keys and then never upload.

        Raises:
            AttemptAbortedError: fewer sites than the threshold are left.
        """
        self._attempt += 1
        attempt = AttemptId(
            study_digest=self._digest,
            run_id="mechanism-audit",
            round=self._attempt,
            attempt=self._attempt,
            purpose="train",
            vector_length=self.execution.dimension,
        )
        server = ServerAttempt(attempt, roster=self._roster, parameters=self._parameters)
        self._exchange(server, server.build_advertise_requests())
        self._exchange(server, server.build_share_requests())
        shares = {site_id: self.update(site_id, cohorts[site_id]) for site_id in self.site_ids}
        requests = server.build_upload_requests(WEIGHTS_HASH, REQUEST_HASH)
        masked = {}
        for site_id in self.site_ids:
            if site_id in dropped:
                continue
            envelope = self._answer(site_id, requests[site_id], shares[site_id])
            reply = UploadReply.from_envelope(envelope)
            masked[site_id] = from_bytes(b"".join(reply.masked), self._parameters.modulus_bits)
            server.accept(site_id, envelope)
        survivors = server.close_uploads()
        if server.needs_confirmation:
            self._exchange(server, server.build_confirm_requests())
        self._exchange(server, server.build_unmask_requests())
        return AuditedStep(
            shares=shares, masked=masked, survivors=survivors, total=server.total().astype(np.int64)
        )

    def _exchange(self, server: ServerAttempt, requests: Mapping[str, Request]) -> None:
        for site_id, request in requests.items():
            server.accept(site_id, self._answer(site_id, request))

    def _answer(self, site_id: str, request: Request, vector: NDArray[np.int64] | None = None) -> Envelope:
        envelope = decode(encode(request.to_envelope()))
        parsed = REQUESTS[envelope.kind].from_envelope(envelope)
        site = self._secagg[site_id]
        reply: Reply
        match parsed:
            case AdvertiseRequest():
                reply = site.advertise(parsed, lambda: dict(HEAD))
            case ShareRequest():
                reply = site.share(parsed)
            case UploadRequest():
                assert vector is not None
                reply = site.upload(parsed, vector, weights_hash=WEIGHTS_HASH, request_hash=REQUEST_HASH)
            case ConfirmRequest():
                reply = site.confirm(parsed)
            case UnmaskRequest():
                reply = site.unmask(parsed)
        return decode(encode(reply.to_envelope()))


def claimed_share_std(execution: ExecutionPlan) -> float:
    """sigma C / (sqrt(t - c) gamma), from the plan's numbers alone: standard deviation of one share in steps.

    Written out here, apart from the execution plan's own property, so that a defect there shows.
    """
    honest = execution.threshold - execution.max_colluding
    return execution.noise_multiplier * execution.clip / math.sqrt(honest) / execution.grid_step


def probe_rows(execution: ExecutionPlan, size: AuditSize) -> int:
    """Rows of the codebook: every canary's, a broken patient's for each site, and as many silent ones."""
    return 2 * size.canaries + execution.n_sites


def probe_consortium(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    rows: int,
    *,
    width: int,
    study_digest: str,
    device: str,
) -> AuditConsortium:
    """A consortium whose network is a codebook; everything else is the plan's."""
    return AuditConsortium(
        replace(execution, dimension=rows * width),
        site_ids,
        study_digest=study_digest,
        build=lambda: build_probe(rows, width),
        device=device,
    )
