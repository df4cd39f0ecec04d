"""Our secure aggregation between real state machines in one process, every message through its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.secagg.messages import ShareRequest, UploadRequest
from privacy.secagg.server_rounds import ServerAttempt
from privacy.secagg.session import AttemptId
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secret_random import SecretRandom
from shared.identity import SigningKey
from shared.study_plan import default_threshold
from shared.wire import Envelope, decode, encode

STUDY = "ab" * 32
HASHES = {"weights_hash": bytes(32), "request_hash": bytes(32)}


def wired(envelope: Envelope) -> Envelope:
    """The envelope after its way through bytes."""
    return decode(encode(envelope))


class OurConsortium:
    """n sites and a server in one attempt; c = 1 and the default threshold."""

    def __init__(self, n_sites: int, length: int, *, modulus_bits: int = 32) -> None:
        self.names = [f"site-{index}" for index in range(n_sites)]
        identities = {name: SigningKey.generate() for name in self.names}
        self.roster = tuple((name, identities[name].verify_key) for name in self.names)
        self.parameters = ProtocolParameters(
            n_sites=n_sites,
            threshold=default_threshold(n_sites, 1),
            max_colluding=1,
            modulus_bits=modulus_bits,
        )
        self.attempt = AttemptId(
            study_digest=STUDY, run_id="1", round=1, attempt=1, purpose="train", vector_length=length
        )
        self.sites = {
            name: SiteSecureAggregation(
                site_id=name,
                key=identities[name],
                roster=self.roster,
                parameters=self.parameters,
                study_digest=STUDY,
                register_attempt=lambda _: None,
                entropy=SecretRandom(),
            )
            for name in self.names
        }
        self.server = ServerAttempt(self.attempt, roster=self.roster, parameters=self.parameters)

    def advertise(self) -> dict[str, ShareRequest]:
        """All keys; what the server then asks each site."""
        for name, request in self.server.build_advertise_requests().items():
            reply = self.sites[name].advertise(request, dict)
            self.server.accept(name, wired(reply.to_envelope()))
        return self.server.build_share_requests()

    def share(self, requests: dict[str, ShareRequest]) -> dict[str, UploadRequest]:
        """All shares; what the server then asks each site."""
        for name, request in requests.items():
            self.server.accept(name, wired(self.sites[name].share(request).to_envelope()))
        return self.server.build_upload_requests(**HASHES)

    def upload(self, name: str, request: UploadRequest, vector: NDArray[np.int64]) -> Envelope:
        """One site's upload, as the server receives it."""
        return wired(self.sites[name].upload(request, vector, **HASHES).to_envelope())

    def unmask(self) -> dict[str, Any]:
        """Replies of all survivors, nobody having dropped."""
        self.server.close_uploads()
        replies = {}
        for name, request in self.server.build_unmask_requests().items():
            replies[name] = self.sites[name].unmask(request)
            self.server.accept(name, wired(replies[name].to_envelope()))
        return replies
