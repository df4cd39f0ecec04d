"""An in-memory consortium: real sites, real server, every message through its bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.secagg.messages import REQUESTS, Reply, Request
from privacy.secagg.reasons import Component
from privacy.secagg.server_rounds import ServerAttempt
from privacy.secagg.session import AttemptId
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secret_random import SecretRandom
from shared.identity import SigningKey
from shared.study_plan import default_threshold
from shared.wire import Envelope, decode, encode

for folder in (Path(__file__).parent, Path(__file__).parents[2]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

STUDY = "ab" * 32
WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32


def through_bytes(request: Request) -> Request:
    """The request as it is parsed at its receiver."""
    envelope = decode(encode(request.to_envelope()))
    return REQUESTS[envelope.kind].from_envelope(envelope)


class Consortium:
    """n sites and what they keep; ``register`` is what survives a restart of each."""

    def __init__(
        self,
        n: int = 3,
        c: int = 1,
        t: int | None = None,
        *,
        bits: int = 32,
        length: int = 5,
        study: str = STUDY,
    ) -> None:
        t = default_threshold(n, c) if t is None else t
        self.parameters = ProtocolParameters(n_sites=n, threshold=t, max_colluding=c, modulus_bits=bits)
        self.names = [f"site-{index}" for index in range(n)]
        self.identities = {name: SigningKey.generate() for name in self.names}
        self.roster = tuple((name, self.identities[name].verify_key) for name in self.names)
        self.length, self.study = length, study
        self.register: dict[str, list[int]] = {name: [] for name in self.names}
        self.entropy = SecretRandom()
        self.arrived: Callable[[Request], Request] = through_bytes
        self.sites: dict[str, SiteSecureAggregation] = {}
        for name in self.names:
            self.restart(name)

    def restart(self, name: str) -> SiteSecureAggregation:
        """A new process for a site: only its identity and the attempt register are left."""
        recorded = self.register[name]

        def register(number: int) -> None:
            assert number > max(recorded, default=0)
            recorded.append(number)

        self.sites[name] = SiteSecureAggregation(
            site_id=name,
            key=self.identities[name],
            roster=self.roster,
            parameters=self.parameters,
            study_digest=self.study,
            register_attempt=register,
            entropy=self.entropy,
            last_attempt=max(recorded, default=0),
        )
        return self.sites[name]

    def attempt(self, number: int = 1, **changes: Any) -> AttemptId:
        fields: dict[str, Any] = {
            "study_digest": self.study,
            "run_id": "7",
            "round": number,
            "attempt": number,
            "purpose": "train",
            "vector_length": self.length,
        }
        return AttemptId(**{**fields, **changes})

    def server(self, number: int = 1, **changes: Any) -> ServerAttempt:
        return ServerAttempt(self.attempt(number, **changes), roster=self.roster, parameters=self.parameters)

    def vector(self, name: str) -> np.ndarray:
        """A power of two for each site, with a sign, so that double counting shows."""
        index = self.names.index(name)
        value = (1 << index) if index < 30 else index
        return np.array([value if place % 2 == 0 else -value for place in range(self.length)], dtype=np.int64)

    def expected(self, names: Iterable[str]) -> np.ndarray:
        return sum((self.vector(name) for name in names), np.zeros(self.length, dtype=np.int64))

    def ask(
        self, name: str, request: Request, *, weights: bytes = WEIGHTS, vector: np.ndarray | None = None
    ) -> Envelope:
        """A request through its bytes to the site, and the reply's envelope through its bytes."""
        site = self.sites[name]
        parsed: Any = self.arrived(request)
        kind = request.KIND
        reply: Reply
        if kind == "secagg_advertise":
            reply = site.advertise(parsed, lambda: {"length": 0, "entry": "00" * 32})
        elif kind == "secagg_share":
            reply = site.share(parsed)
        elif kind == "secagg_upload":
            value = self.vector(name) if vector is None else vector
            reply = site.upload(parsed, value, weights_hash=weights, request_hash=WORK)
        elif kind == "secagg_confirm":
            reply = site.confirm(parsed)
        else:
            reply = site.unmask(parsed)
        return decode(encode(reply.to_envelope()))

    def exchange(
        self, server: ServerAttempt, requests: dict[str, Any], *, without: Iterable[str] = ()
    ) -> None:
        for name, request in requests.items():
            if name not in set(without):
                server.accept(name, self.ask(name, request))

    def until(
        self, component: Component, server: ServerAttempt | None = None, number: int = 1
    ) -> ServerAttempt:
        """Run an attempt up to (not including) the named component, nobody dropping."""
        server = server or self.server(number)
        if component is Component.ADVERTISE:
            return server
        self.exchange(server, server.build_advertise_requests())
        if component is Component.SHARE:
            return server
        self.exchange(server, server.build_share_requests())
        if component is Component.UPLOAD:
            return server
        self.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
        return server

    def complete(
        self,
        server: ServerAttempt,
        *,
        no_keys: Iterable[str] = (),
        no_shares: Iterable[str] = (),
        no_upload: Iterable[str] = (),
        no_confirm: Iterable[str] = (),
        no_unmask: Iterable[str] = (),
    ) -> np.ndarray:
        """A whole attempt in which the named sites fall silent from the named component on."""
        silent = set(no_keys)
        self.exchange(server, server.build_advertise_requests(), without=silent)
        silent |= set(no_shares)
        self.exchange(server, server.build_share_requests(), without=silent)
        silent |= set(no_upload)
        self.exchange(server, server.build_upload_requests(WEIGHTS, WORK), without=silent)
        server.close_uploads()
        silent |= set(no_confirm)
        if server.needs_confirmation:
            self.exchange(server, server.build_confirm_requests(), without=silent)
        silent |= set(no_unmask)
        self.exchange(server, server.build_unmask_requests(), without=silent)
        return server.total()


@pytest.fixture
def consortium() -> type[Consortium]:
    return Consortium
