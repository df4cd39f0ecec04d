"""A site's secrets: in no repr, wiped when an attempt closes, also where something of our own fails."""

from __future__ import annotations

import numpy as np
import pytest
from test_cheating_server import WEIGHTS, WORK, refused, uploaded

from privacy.secagg.messages import UnmaskRequest
from privacy.secagg.reasons import Component, RefusalReason
from shared.errors import InternalError


@pytest.fixture
def group(consortium):
    return consortium(4, 1, 3)


def test_a_vector_of_another_length_is_our_own_bug_and_changes_nothing(group):
    server = group.until(Component.UPLOAD)
    request = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    site = group.sites["site-0"]
    hashes = {"weights_hash": WEIGHTS, "request_hash": WORK}
    for wrong in (
        np.zeros(4, dtype=np.int64),
        np.zeros(5, dtype=np.float64),
        np.zeros((5, 1), dtype=np.int64),
    ):
        with pytest.raises(InternalError):
            site.upload(request, wrong, **hashes)
    assert site.upload(request, group.vector("site-0"), **hashes).masked_bytes == 20


def test_secrets_never_show_in_a_repr(group):
    server = uploaded(group)
    site = group.sites["site-0"]
    state = site._open
    pieces = [bytes(piece) for pair in state.held.values() for piece in pair]
    shown = repr(site) + repr(state) + repr(server.build_unmask_requests())
    reply = site.unmask(server_request(server, group))
    shown += repr(reply)
    assert all(piece.hex() not in shown and repr(piece)[2:-1] not in shown for piece in pieces)


def server_request(server, group):
    uploads = server._collections[Component.UPLOAD].signed(server.survivors)
    return UnmaskRequest(attempt=server.attempt, uploads=uploads, confirmations=())


def test_secrets_are_wiped_when_an_attempt_closes(group):
    server = group.until(Component.UPLOAD)
    secrets = group.sites["site-0"]._prepared.secrets
    assert secrets.seed != bytes(32)
    agreed = list(secrets._agreed.values())
    assert len(agreed) == 8 and all(any(secret) for secret in agreed)
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    assert secrets.seed == secrets.mask_private == secrets.share_private == bytes(32)
    assert not any(any(secret) for secret in agreed) and not secrets._agreed and not secrets._keys
    state = group.sites["site-0"]._open
    held = [piece for pair in state.held.values() for piece in pair]
    assert all(any(piece) for piece in held)
    group.sites["site-0"].abandon()
    assert not any(any(piece) for piece in held)
    assert group.sites["site-0"].open_attempt is None


def test_the_key_pair_dies_also_where_masking_fails(group, monkeypatch):
    server = group.until(Component.UPLOAD)
    request = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    secrets = group.sites["site-0"]._prepared.secrets

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr("privacy.secagg.site_masking.masked_residues", out_of_memory)
    hashes = {"weights_hash": WEIGHTS, "request_hash": WORK}
    with pytest.raises(MemoryError):
        group.sites["site-0"].upload(request, group.vector("site-0"), **hashes)
    assert secrets.seed == secrets.mask_private == bytes(32)
    refused(RefusalReason.ATTEMPT_CLOSED, group.sites["site-0"].check_upload, request, **hashes)
