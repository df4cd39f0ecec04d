"""A site that cheats is named: by its peers before they upload, or by the server before it is believed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privacy.secagg import keys as attempt_keys
from privacy.secagg import site_keys
from privacy.secagg.messages import AdvertiseReply, ShareReply, UnmaskReply, UploadReply
from privacy.secagg.reasons import (
    AbortReason,
    AggregationRefusedError,
    AttemptAbortedError,
    BadReplyError,
    Component,
    FaultReason,
    RefusalReason,
)
from privacy.secagg.statements import KeyStatement, RevealStatement
from shared.wire import Envelope

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32


@pytest.fixture
def group(consortium):
    return consortium(5, 1, 4)


def unusable(reason, action, *arguments):
    with pytest.raises(BadReplyError) as caught:
        action(*arguments)
    assert caught.value.reason == reason, str(caught.value)
    return caught.value


def asked(group, component):
    """A server about to receive a component's replies, and the requests."""
    server = group.until(component)
    build = {
        Component.ADVERTISE: server.build_advertise_requests,
        Component.SHARE: server.build_share_requests,
        Component.UPLOAD: lambda: server.build_upload_requests(WEIGHTS, WORK),
    }
    return server, build[component]()


def test_shares_that_do_not_open_name_the_dealer(group, monkeypatch):
    server, requests = asked(group, Component.SHARE)
    for name in group.names:
        with monkeypatch.context() as patch:
            if name == "site-2":
                patch.setattr(site_keys, "seal_share", lambda *_, **__: bytes(80))
            server.accept(name, group.ask(name, requests[name]))
    upload = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    with pytest.raises(AggregationRefusedError) as caught:
        group.ask("site-0", upload)
    assert (caught.value.reason, caught.value.peer) == (RefusalReason.SHARES_DO_NOT_FIT, "site-2")


def test_shares_other_than_committed_name_the_dealer(group, monkeypatch):
    server, requests = asked(group, Component.SHARE)
    for name in group.names:
        with monkeypatch.context() as patch:
            if name == "site-2":
                patch.setattr(site_keys, "share_commitment", lambda *_: bytes(32))
            server.accept(name, group.ask(name, requests[name]))
    upload = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    with pytest.raises(AggregationRefusedError) as caught:
        group.ask("site-0", upload)
    assert (caught.value.reason, caught.value.peer) == (RefusalReason.SHARES_DO_NOT_FIT, "site-2")


def deal_wrongly(group, monkeypatch, secret_name):
    """site-2 deals consistent, committed shares of a secret that is not the one it signed."""
    server, requests = asked(group, Component.SHARE)
    for name in group.names:
        with monkeypatch.context() as patch:
            if name == "site-2":
                wrong = property(lambda _: b"\x5a" * 32)
                patch.setattr(attempt_keys.AttemptKeys, secret_name, wrong)
            server.accept(name, group.ask(name, requests[name]))
    return server


def test_a_mask_seed_that_is_not_the_signed_one_names_the_dealer(group, monkeypatch):
    server = deal_wrongly(group, monkeypatch, "seed")
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    server.close_uploads()
    group.exchange(server, server.build_unmask_requests())
    with pytest.raises(AttemptAbortedError) as caught:
        server.total()
    assert (caught.value.reason, caught.value.peer) == (AbortReason.BAD_DEALER, "site-2")


def test_a_reconstructed_key_that_does_not_match_names_the_dealer(group, monkeypatch):
    server = deal_wrongly(group, monkeypatch, "mask_private")
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK), without=["site-2"])
    server.close_uploads()
    group.exchange(server, server.build_confirm_requests())
    group.exchange(server, server.build_unmask_requests())
    with pytest.raises(AttemptAbortedError) as caught:
        server.total()
    assert (caught.value.reason, caught.value.peer) == (AbortReason.BAD_DEALER, "site-2")
    assert server.faults[-1].site_id == "site-2"


def test_a_wrong_revealed_share_is_named_and_the_round_completes(group):
    server = group.until(Component.UPLOAD)
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    server.close_uploads()
    requests = server.build_unmask_requests()
    for name in group.names[1:]:
        server.accept(name, group.ask(name, requests[name]))
    reply = UnmaskReply.from_envelope(group.ask("site-0", requests["site-0"]))
    shares = (replace(reply.shares[0], value=bytes(32)), *reply.shares[1:])
    statement = RevealStatement(
        session=server._session,
        site_id="site-0",
        terms=server._collections[Component.UPLOAD].terms,
        survivors=server.survivors,
        shares=tuple(item.value for item in shares),
    )
    lie = replace(reply, shares=shares, signature=statement.sign(group.identities["site-0"]))
    error = unusable(FaultReason.WRONG_SHARES, server.accept_unmask, "site-0", lie)
    assert error.site_id == "site-0"
    np.testing.assert_array_equal(server.total(), group.expected(group.names))


def test_both_kinds_of_share_are_not_taken(group):
    server = group.until(Component.UPLOAD)
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    server.close_uploads()
    requests = server.build_unmask_requests()
    reply = UnmaskReply.from_envelope(group.ask("site-0", requests["site-0"]))
    shares = (replace(reply.shares[0], kind="key"), *reply.shares[1:])
    unusable(FaultReason.WRONG_SHARES, server.accept_unmask, "site-0", replace(reply, shares=shares))
    unusable(FaultReason.REPEATED, server.accept_unmask, "site-0", reply)


def test_keys_used_twice_or_of_small_order(group):
    server, requests = asked(group, Component.ADVERTISE)
    first = AdvertiseReply.from_envelope(group.ask("site-0", requests["site-0"]))
    server.accept_advertise("site-0", first)
    for name, mask_public, reason in (
        ("site-1", first.keys.mask_public, FaultReason.KEY_USED_TWICE),
        ("site-2", bytes(32), FaultReason.WEAK_KEY),
    ):
        keys = AdvertiseReply.from_envelope(group.ask(name, requests[name])).keys
        keys = replace(keys, site_id=name, mask_public=mask_public)
        statement: KeyStatement = keys.statement(server._session)
        keys = replace(keys, signature=statement.sign(group.identities[name]))
        unusable(reason, server.accept_advertise, name, replace(first, keys=keys))
    assert server.pending(Component.ADVERTISE) == ("site-3", "site-4")


def test_weak_key_is_refused_by_the_peers_too(group):
    server, requests = asked(group, Component.SHARE)
    request = requests["site-0"]
    keys = replace(request.keys[1], share_public=bytes(32))
    keys = replace(keys, signature=keys.statement(server._session).sign(group.identities["site-1"]))
    with pytest.raises(AggregationRefusedError) as caught:
        group.sites["site-0"].share(replace(request, keys=(request.keys[0], keys, *request.keys[2:])))
    assert (caught.value.reason, caught.value.peer) == (RefusalReason.WEAK_KEY, "site-1")


def test_unsigned_and_foreign_replies(group):
    server, requests = asked(group, Component.SHARE)
    reply = ShareReply.from_envelope(group.ask("site-0", requests["site-0"]))
    unusable(FaultReason.NOT_ASKED, server.accept_share, "nobody", reply)
    unusable(FaultReason.OTHER_SITE, server.accept_share, "site-1", reply)
    unusable(
        FaultReason.WRONG_RECIPIENTS, server.accept_share, "site-0", replace(reply, shares=reply.shares[1:])
    )
    server, requests = asked_again(group, 2)
    reply = ShareReply.from_envelope(group.ask("site-0", requests["site-0"]))
    shares = (replace(reply.shares[0], signature=bytes(64)), *reply.shares[1:])
    unusable(FaultReason.BAD_SIGNATURE, server.accept_share, "site-0", replace(reply, shares=shares))
    old = replace(reply, attempt=group.attempt(1))
    unusable(FaultReason.OTHER_ATTEMPT, server.accept_share, "site-3", replace(old, site_id="site-3"))


def asked_again(group, number):
    server = group.until(Component.SHARE, number=number)
    return server, server.build_share_requests()


def test_uploads_of_wrong_length_twice_or_late(group):
    server, requests = asked(group, Component.UPLOAD)
    replies = {
        name: UploadReply.from_envelope(group.ask(name, request)) for name, request in requests.items()
    }
    short = replace(replies["site-0"], masked=(replies["site-0"].masked[0][:-4],))
    unusable(FaultReason.WRONG_LENGTH, server.accept_upload, "site-0", short)
    for name in ("site-1", "site-2", "site-3"):
        server.accept_upload(name, replies[name])
    unusable(FaultReason.REPEATED, server.accept_upload, "site-1", replies["site-1"])
    unusable(
        FaultReason.BAD_SIGNATURE,
        server.accept_upload,
        "site-4",
        replace(replies["site-4"], signature=bytes(64)),
    )
    with pytest.raises(AttemptAbortedError):
        server.close_uploads()
    unusable(FaultReason.LATE, server.accept_upload, "site-4", replies["site-4"])


def test_a_bad_upload_counts_as_a_drop_and_the_rest_is_right(group):
    server, requests = asked(group, Component.UPLOAD)
    for name, request in requests.items():
        envelope = group.ask(name, request)
        if name == "site-2":
            envelope = replace(envelope, blobs=(envelope.blobs[0] + b"\x00",))
            unusable(FaultReason.WRONG_LENGTH, server.accept, name, envelope)
        else:
            server.accept(name, envelope)
    survivors = server.close_uploads()
    group.exchange(server, server.build_confirm_requests())
    group.exchange(server, server.build_unmask_requests())
    assert "site-2" not in survivors
    np.testing.assert_array_equal(server.total(), group.expected(survivors))


def test_malformed_replies_are_named(group):
    server, _ = asked(group, Component.SHARE)
    unusable(FaultReason.MALFORMED, server.accept, "site-0", Envelope(kind="nonsense", body={}))
    unusable(FaultReason.MALFORMED, server.accept, "site-1", Envelope(kind="secagg_share_reply", body={}))
    assert server.pending(Component.SHARE) == ("site-2", "site-3", "site-4")
    server.drop("site-4", Component.SHARE, FaultReason.UNREACHABLE, "no reply in time")
    assert server.pending(Component.SHARE) == ("site-2", "site-3")


def test_a_reply_that_was_never_asked_for(group):
    server, requests = asked(group, Component.SHARE)
    other = group.server(2)
    other.build_advertise_requests()
    reply = ShareReply.from_envelope(group.ask("site-0", requests["site-0"]))
    unusable(FaultReason.NOT_ASKED, other.accept_share, "site-0", reply)
    assert other.answered(Component.SHARE) == ()
    server.accept_share("site-0", reply)


def test_a_true_share_of_the_other_kind_is_not_taken(group):
    """It is as its dealer committed to it, and would make an honest dealer look like a bad one."""
    server = group.until(Component.UPLOAD)
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    server.close_uploads()
    request = server.build_unmask_requests()["site-0"]
    key_share = bytes(group.sites["site-0"]._open.held["site-1"][1])
    reply = UnmaskReply.from_envelope(group.ask("site-0", request))
    shares = tuple(
        replace(item, kind="key", value=key_share) if item.owner == "site-1" else item
        for item in reply.shares
    )
    statement = RevealStatement(
        session=server._session,
        site_id="site-0",
        terms=server._collections[Component.UPLOAD].terms,
        survivors=server.survivors,
        shares=tuple(item.value for item in shares),
    )
    lie = replace(reply, shares=shares, signature=statement.sign(group.identities["site-0"]))
    unusable(FaultReason.WRONG_SHARES, server.accept_unmask, "site-0", lie)
