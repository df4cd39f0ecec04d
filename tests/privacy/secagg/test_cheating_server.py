"""A server that cheats: each trick is refused with its reason, and an honest attempt then still works."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privacy.secagg.messages import (
    AdvertiseRequest,
    ConfirmRequest,
    ShareRequest,
    UnmaskRequest,
    UploadRequest,
)
from privacy.secagg.reasons import AggregationRefusedError, Component, RefusalReason
from privacy.secagg.session import Session
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.statements import SurvivorStatement
from privacy.secagg.thresholds import InvalidThresholdError, ProtocolParameters
from shared.errors import MalformedMessageError
from shared.identity import SigningKey
from shared.wire import decode, encode

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32


def refused(reason, action, *arguments, **named):
    with pytest.raises(AggregationRefusedError) as caught:
        action(*arguments, **named)
    assert caught.value.reason == reason, str(caught.value)
    return caught.value


def still_sound(group, number=50):
    np.testing.assert_array_equal(group.complete(group.server(number)), group.expected(group.names))


@pytest.fixture
def group(consortium):
    return consortium(4, 1, 3)


def share_request(group, number=1):
    return group.until(Component.SHARE, number=number).build_share_requests()["site-0"]


def uploaded(group, *, without=(), number=1):
    """A server after the uploads, closed."""
    server = group.until(Component.UPLOAD, number=number)
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK), without=without)
    server.close_uploads()
    return server


def test_swapped_key(group):
    request = share_request(group)
    swapped = replace(request.keys[1], mask_public=request.keys[2].mask_public)
    keys = (request.keys[0], swapped, *request.keys[2:])
    error = refused(RefusalReason.BAD_KEY_SIGNATURE, group.sites["site-0"].share, replace(request, keys=keys))
    assert error.peer == "site-1"
    assert len(group.sites["site-0"].share(request).shares) == 4
    still_sound(group)


@pytest.mark.parametrize("field", ["mask_public", "share_public", "seed_commitment", "ledger_head"])
def test_every_field_of_the_keys_is_signed(group, field):
    request = share_request(group)
    changed = {"length": 1} if field == "ledger_head" else SigningKey.generate().verify_key.raw
    keys = (*request.keys[:3], replace(request.keys[3], **{field: changed}))
    refused(RefusalReason.BAD_KEY_SIGNATURE, group.sites["site-0"].share, replace(request, keys=keys))


def test_key_of_another_round(group):
    old = share_request(group, 1)
    new = share_request(group, 2)
    keys = (new.keys[0], old.keys[1], *new.keys[2:])
    refused(RefusalReason.BAD_KEY_SIGNATURE, group.sites["site-0"].share, replace(new, keys=keys))
    still_sound(group)


def test_key_of_another_study(consortium, group):
    other = consortium(4, 1, 3, study="cd" * 32)
    other.identities, other.roster = group.identities, group.roster
    for name in other.names:
        other.restart(name)
    foreign, request = share_request(other), share_request(group)
    keys = (request.keys[0], *foreign.keys[1:])
    refused(RefusalReason.BAD_KEY_SIGNATURE, group.sites["site-0"].share, replace(request, keys=keys))
    refused(RefusalReason.WRONG_STUDY, group.sites["site-0"].share, foreign)
    still_sound(group)


def test_own_keys_replaced_by_older_ones(group):
    old, new = share_request(group, 1), share_request(group, 2)
    keys = (old.keys[0], *new.keys[1:])
    refused(RefusalReason.OWN_KEYS_CHANGED, group.sites["site-0"].share, replace(new, keys=keys))


def test_own_keys_left_out(group):
    request = share_request(group)
    left = replace(request, keys=request.keys[1:])
    refused(RefusalReason.SELF_NOT_AMONG_PEERS, group.sites["site-0"].share, left)
    still_sound(group)


def test_one_key_for_two_sites(group):
    """A peer that helps the server signs another peer's public key as its own."""
    request = share_request(group)
    copied = replace(request.keys[1], mask_public=request.keys[2].mask_public)
    session = group.sites["site-0"]._prepared.session
    copied = replace(copied, signature=copied.statement(session).sign(group.identities["site-1"]))
    keys = (request.keys[0], copied, *request.keys[2:])
    refused(RefusalReason.KEY_USED_TWICE, group.sites["site-0"].share, replace(request, keys=keys))
    still_sound(group)


def test_a_roster_with_another_key_for_this_site(group):
    key = SigningKey.generate()
    with pytest.raises(InvalidThresholdError, match="does not name site-0"):
        SiteSecureAggregation(
            site_id="site-0",
            key=key,
            roster=group.roster,
            parameters=group.parameters,
            study_digest=group.study,
            register_attempt=lambda _: None,
            entropy=group.entropy,
        )


def test_own_extra_site(group):
    request = share_request(group)
    extra = replace(request.keys[1], site_id="site-of-the-server")
    refused(
        RefusalReason.UNKNOWN_SITE,
        group.sites["site-0"].share,
        replace(request, keys=(*request.keys, extra)),
    )
    still_sound(group)


def test_one_site_twice_to_fill_the_roster(group):
    request = share_request(group)
    keys = (request.keys[0], request.keys[1], request.keys[1])
    refused(RefusalReason.TOO_FEW_PEERS, group.sites["site-0"].share, replace(request, keys=keys))
    with pytest.raises(MalformedMessageError):
        ShareRequest.from_envelope(replace(request, keys=keys).to_envelope())


def test_roster_shrunk_below_the_minimum(group):
    request = share_request(group)
    refused(RefusalReason.TOO_FEW_PEERS, group.sites["site-0"].share, replace(request, keys=request.keys[:2]))
    still_sound(group)


def test_peers_shrunk_below_the_minimum(group):
    server = group.until(Component.UPLOAD)
    request = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    check = group.sites["site-0"].check_upload
    refused(
        RefusalReason.TOO_FEW_PEERS,
        check,
        replace(request, shares=request.shares[:2]),
        weights_hash=WEIGHTS,
        request_hash=WORK,
    )
    refused(
        RefusalReason.SELF_NOT_AMONG_PEERS,
        check,
        replace(request, shares=request.shares[1:]),
        weights_hash=WEIGHTS,
        request_hash=WORK,
    )
    check(request, weights_hash=WEIGHTS, request_hash=WORK)


def test_peer_without_keys(group):
    group.names.remove("site-3")
    server = group.server()
    requests = server.build_advertise_requests()
    group.exchange(server, requests, without=["site-3"])
    group.exchange(server, server.build_share_requests())
    request = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    shares = (*request.shares, replace(request.shares[1], dealer="site-3"))
    refused(
        RefusalReason.PEER_WITHOUT_KEYS,
        group.sites["site-0"].check_upload,
        replace(request, shares=shares),
        weights_hash=WEIGHTS,
        request_hash=WORK,
    )


@pytest.mark.parametrize(
    ("n", "c", "t"),
    [(3, 1, 2), (4, 1, 2), (5, 2, 3), (2, 1, 2), (101, 1, 60), (3, 3, 3), (3, 0, 3), (4, 1, 5)],
)
def test_lower_threshold_than_the_plan_can_carry(n, c, t):
    with pytest.raises(InvalidThresholdError):
        ProtocolParameters(n_sites=n, threshold=t, max_colluding=c, modulus_bits=32)


def test_lower_threshold_told_to_some_sites(group):
    """A site whose parameters differ signs something else: nobody takes its keys."""
    request = share_request(group)
    other = replace(group.parameters, threshold=4)
    fake = SiteSecureAggregation(
        site_id="site-1",
        key=group.identities["site-1"],
        roster=group.roster,
        parameters=other,
        study_digest=group.study,
        register_attempt=lambda _: None,
        entropy=group.entropy,
    )
    keys = fake.advertise(AdvertiseRequest(attempt=group.attempt()), dict).keys
    keys = (request.keys[0], keys, *request.keys[2:])
    refused(RefusalReason.BAD_KEY_SIGNATURE, group.sites["site-0"].share, replace(request, keys=keys))


def test_one_peer_alive_and_dead_to_one_site(group):
    server = uploaded(group, without=["site-3"])
    confirm = server.build_confirm_requests()["site-0"]
    group.sites["site-0"].confirm(confirm)
    for name in ("site-1", "site-2"):
        server.accept(name, group.ask(name, confirm))
    unmask = UnmaskRequest(attempt=server.attempt, uploads=confirm.uploads, confirmations=())
    refused(RefusalReason.TOO_FEW_CONFIRMATIONS, group.sites["site-0"].unmask, unmask)
    everyone = replace(unmask, uploads=(*confirm.uploads, ("site-3", bytes(64))))
    refused(RefusalReason.BAD_UPLOAD_SIGNATURE, group.sites["site-0"].unmask, everyone)
    twice = replace(unmask, uploads=(*confirm.uploads, confirm.uploads[0]))
    with pytest.raises(MalformedMessageError):
        UnmaskRequest.from_envelope(twice.to_envelope())


def test_one_peer_dead_to_some_and_alive_to_others(group):
    """All four uploaded; the server tells 0, 1, 2 that 3 is dead and 3 that all live."""
    server = uploaded(group)
    uploads = server.build_unmask_requests()["site-3"].uploads
    without = ConfirmRequest(attempt=server.attempt, uploads=uploads[:3])
    signatures = tuple((name, group.sites[name].confirm(without).signature) for name in group.names[:3])
    unmask = UnmaskRequest(attempt=server.attempt, uploads=uploads[:3], confirmations=signatures)
    everyone = UnmaskRequest(attempt=server.attempt, uploads=uploads, confirmations=())
    seeds = [share for share in group.sites["site-3"].unmask(everyone).shares if share.owner == "site-3"]
    keys = []
    for name in group.names[:3]:
        refused(RefusalReason.SECOND_SURVIVOR_SET, group.sites[name].unmask, everyone)
        keys += [share for share in group.sites[name].unmask(unmask).shares if share.owner == "site-3"]
    assert {share.kind for share in seeds} == {"seed"}
    assert {share.kind for share in keys} == {"key"}
    assert len(seeds) < group.parameters.threshold


def test_self_left_out_of_the_survivors(group):
    server = uploaded(group)
    uploads = server.build_unmask_requests()["site-0"].uploads[1:]
    site = group.sites["site-0"]
    reason = RefusalReason.SELF_NOT_AMONG_SURVIVORS
    refused(reason, site.confirm, ConfirmRequest(attempt=server.attempt, uploads=uploads))
    refused(reason, site.unmask, UnmaskRequest(attempt=server.attempt, uploads=uploads, confirmations=()))
    still_sound(group)


def test_survivor_that_is_no_peer(group):
    server = group.server()
    group.exchange(server, server.build_advertise_requests())
    group.exchange(server, server.build_share_requests(), without=["site-3"])
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    server.close_uploads()
    request = server.build_unmask_requests()["site-0"]
    for stranger in ("site-3", "nobody"):
        uploads = (*request.uploads, (stranger, bytes(64)))
        site = group.sites["site-0"]
        reason = RefusalReason.SURVIVOR_NOT_A_PEER
        refused(reason, site.unmask, replace(request, uploads=uploads))
        refused(reason, site.confirm, ConfirmRequest(attempt=server.attempt, uploads=uploads))
    group.exchange(server, dict.fromkeys(group.names[:3], request))
    np.testing.assert_array_equal(server.total(), group.expected(group.names[:3]))


def test_too_few_survivors(group):
    server = uploaded(group)
    uploads = server.build_unmask_requests()["site-0"].uploads[:2]
    site = group.sites["site-0"]
    refused(
        RefusalReason.TOO_FEW_SURVIVORS, site.confirm, ConfirmRequest(attempt=server.attempt, uploads=uploads)
    )
    refused(
        RefusalReason.TOO_FEW_SURVIVORS,
        site.unmask,
        UnmaskRequest(attempt=server.attempt, uploads=uploads, confirmations=()),
    )


def test_survivors_without_enough_signatures(group):
    server = uploaded(group, without=["site-3"])
    confirm = server.build_confirm_requests()["site-0"]
    signatures = [(name, group.sites[name].confirm(confirm).signature) for name in group.names[:3]]
    unmask = UnmaskRequest(
        attempt=server.attempt, uploads=confirm.uploads, confirmations=tuple(signatures[:2])
    )
    site = group.sites["site-0"]
    refused(RefusalReason.TOO_FEW_CONFIRMATIONS, site.unmask, unmask)
    forged = (*signatures[:2], ("site-2", signatures[1][1]))
    refused(RefusalReason.BAD_CONFIRMATION, site.unmask, replace(unmask, confirmations=forged))
    outsider = (*signatures[:2], ("site-3", signatures[1][1]))
    refused(RefusalReason.BAD_CONFIRMATION, site.unmask, replace(unmask, confirmations=outsider))
    assert len(site.unmask(replace(unmask, confirmations=tuple(signatures))).shares) == 4


def test_confirmation_of_another_set_does_not_count(consortium):
    group = consortium(5, 1, 4)
    server = uploaded(group)
    uploads = server.build_unmask_requests()["site-0"].uploads
    first = ConfirmRequest(attempt=server.attempt, uploads=uploads[:4])
    second = ConfirmRequest(attempt=server.attempt, uploads=uploads[1:])
    signatures = [(name, group.sites[name].confirm(first).signature) for name in group.names[:3]]
    signatures.append(("site-3", group.sites["site-3"].confirm(second).signature))
    unmask = UnmaskRequest(attempt=server.attempt, uploads=uploads[:4], confirmations=tuple(signatures))
    refused(RefusalReason.BAD_CONFIRMATION, group.sites["site-0"].unmask, unmask)


def test_confirmation_by_a_site_that_is_no_survivor(consortium):
    """A site outside U signs U all the same: it does not count among the t signatures."""
    group = consortium(5, 1, 4)
    server = uploaded(group)
    session, terms = server._session, server._collections[Component.UPLOAD].terms
    uploads = server.build_unmask_requests()["site-0"].uploads
    chosen = ConfirmRequest(attempt=server.attempt, uploads=uploads[:4])
    signatures = [(name, group.sites[name].confirm(chosen).signature) for name in group.names[:3]]
    outsider = SurvivorStatement(
        session=session, site_id="site-4", terms=terms, survivors=tuple(group.names[:4])
    ).sign(group.identities["site-4"])
    unmask = UnmaskRequest(
        attempt=server.attempt, uploads=uploads[:4], confirmations=(*signatures, ("site-4", outsider))
    )
    refused(RefusalReason.BAD_CONFIRMATION, group.sites["site-0"].unmask, unmask)


def test_second_set_after_the_full_one(group):
    server = uploaded(group)
    request = server.build_unmask_requests()["site-0"]
    site = group.sites["site-0"]
    site.unmask(request)
    smaller = ConfirmRequest(attempt=server.attempt, uploads=request.uploads[:3])
    refused(RefusalReason.ATTEMPT_CLOSED, site.confirm, smaller)
    refused(RefusalReason.ATTEMPT_CLOSED, site.unmask, request)


def test_second_set_after_a_confirmed_one(consortium):
    group = consortium(5, 1, 4)
    server = uploaded(group)
    uploads = server.build_unmask_requests()["site-0"].uploads
    site = group.sites["site-0"]
    site.confirm(ConfirmRequest(attempt=server.attempt, uploads=uploads[:4]))
    other = (uploads[0], *uploads[2:])
    refused(RefusalReason.OUT_OF_ORDER, site.confirm, ConfirmRequest(attempt=server.attempt, uploads=other))
    for chosen in (other, uploads):
        request = UnmaskRequest(attempt=server.attempt, uploads=chosen, confirmations=())
        refused(RefusalReason.SECOND_SURVIVOR_SET, site.unmask, request)


def test_shares_for_a_set_that_the_site_never_confirmed(group):
    server = uploaded(group, without=["site-3"])
    confirm = server.build_confirm_requests()["site-0"]
    request = UnmaskRequest(attempt=server.attempt, uploads=confirm.uploads, confirmations=())
    refused(RefusalReason.SURVIVORS_NOT_CONFIRMED, group.sites["site-0"].unmask, request)


def test_confirmation_where_nobody_dropped(group):
    server = uploaded(group)
    uploads = server.build_unmask_requests()["site-0"].uploads
    request = ConfirmRequest(attempt=server.attempt, uploads=uploads)
    refused(RefusalReason.NOBODY_DROPPED, group.sites["site-0"].confirm, request)


def test_a_site_is_told_other_weights_than_it_was_given(group):
    server = group.until(Component.UPLOAD)
    request = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    check = group.sites["site-0"].check_upload
    refused(RefusalReason.WRONG_WEIGHTS, check, request, weights_hash=b"\x09" * 32, request_hash=WORK)
    refused(RefusalReason.WRONG_REQUEST, check, request, weights_hash=WEIGHTS, request_hash=b"\x09" * 32)


def test_different_weights_to_different_sites(group):
    """Each site is told the truth about its own weights: masks do not cancel, and nobody releases."""
    server = group.until(Component.UPLOAD)
    requests = server.build_upload_requests(WEIGHTS, WORK)
    crafted = b"\x77" * 32
    masked, uploads = [], []
    for name, request in requests.items():
        weights = crafted if name == "site-3" else WEIGHTS
        envelope = group.ask(name, replace(request, weights_hash=weights), weights=weights)
        masked.append(np.frombuffer(envelope.blobs[0], dtype="<u4"))
        uploads.append((name, bytes.fromhex(envelope.body["signature"])))
    unmask = UnmaskRequest(attempt=server.attempt, uploads=tuple(uploads), confirmations=())
    for name in group.names:
        refused(RefusalReason.BAD_UPLOAD_SIGNATURE, group.sites[name].unmask, unmask)


def test_pair_masks_of_different_weights_do_not_cancel(group, monkeypatch):
    """What binding masks to weights adds to the signatures: self masks removed, pair masks still stand.

    False-failure probability below 2^-100: five random 32-bit words would have to be zero.
    """
    monkeypatch.setattr("privacy.secagg.site_masking.self_mask_key", lambda *_: bytes(32))
    server = group.until(Component.UPLOAD)
    requests = server.build_upload_requests(WEIGHTS, WORK)
    zeros = np.zeros(group.length, dtype=np.int64)

    def summed(weights_of):
        total = np.zeros(group.length, dtype=np.uint32)
        for name in group.names:
            weights = weights_of(name)
            request = replace(requests[name], weights_hash=weights)
            total += np.frombuffer(group.ask(name, request, weights=weights, vector=zeros).blobs[0], "<u4")
        return total

    different = summed(lambda name: b"\x77" * 32 if name == "site-3" else WEIGHTS)
    server = group.until(Component.UPLOAD, number=2)
    requests = server.build_upload_requests(WEIGHTS, WORK)
    assert not np.array_equal(summed(lambda _: WEIGHTS), different)


def test_replayed_requests(group):
    server = group.server()
    advertise = server.build_advertise_requests()
    group.exchange(server, advertise)
    site = group.sites["site-0"]
    refused(RefusalReason.ATTEMPT_NOT_NEW, site.advertise, advertise["site-0"], {})
    share = server.build_share_requests()
    group.exchange(server, share)
    refused(RefusalReason.OUT_OF_ORDER, site.share, share["site-0"])
    upload = server.build_upload_requests(WEIGHTS, WORK)
    group.exchange(server, upload)
    hashes = {"weights_hash": WEIGHTS, "request_hash": WORK}
    refused(RefusalReason.OUT_OF_ORDER, site.check_upload, upload["site-0"], **hashes)
    refused(RefusalReason.OUT_OF_ORDER, site.upload, upload["site-0"], group.vector("site-0"), **hashes)
    server.close_uploads()
    unmask = server.build_unmask_requests()
    group.exchange(server, unmask)
    refused(RefusalReason.ATTEMPT_CLOSED, site.unmask, unmask["site-0"])
    np.testing.assert_array_equal(server.total(), group.expected(group.names))


def test_reordered_requests(group):
    server = group.until(Component.UPLOAD)
    request = server.build_upload_requests(WEIGHTS, WORK)["site-0"]
    fresh = AdvertiseRequest(attempt=group.attempt(2))
    replaced = group.sites["site-0"]._prepared
    group.sites["site-0"].advertise(fresh, dict)
    assert replaced.secrets.seed == bytes(32)
    refused(
        RefusalReason.ATTEMPT_CLOSED,
        group.sites["site-0"].check_upload,
        request,
        weights_hash=WEIGHTS,
        request_hash=WORK,
    )


def test_request_of_another_attempt(group):
    server = uploaded(group)
    request = server.build_unmask_requests()["site-0"]
    site = group.sites["site-0"]
    later = replace(request, attempt=group.attempt(9))
    refused(RefusalReason.UNKNOWN_ATTEMPT, site.unmask, later)
    for change in ({"round": 5}, {"run_id": "8"}, {"purpose": "audit"}, {"vector_length": 6}):
        changed = replace(request, attempt=group.attempt(1, **change))
        refused(RefusalReason.ATTEMPT_CHANGED, site.unmask, changed)


def test_opening_a_later_attempt_closes_the_earlier_one(group):
    first = uploaded(group)
    unmask = first.build_unmask_requests()["site-0"]
    held = [piece for pair in group.sites["site-0"]._open.held.values() for piece in pair]
    uploaded(group, number=2)
    assert not any(any(piece) for piece in held)
    refused(RefusalReason.ATTEMPT_CLOSED, group.sites["site-0"].unmask, unmask)
    still_sound(group)


def test_an_attempt_number_after_a_restart(group):
    server = uploaded(group)
    unmask = server.build_unmask_requests()["site-0"]
    site = group.restart("site-0")
    refused(RefusalReason.ATTEMPT_CLOSED, site.unmask, unmask)
    refused(RefusalReason.ATTEMPT_NOT_NEW, site.advertise, AdvertiseRequest(attempt=group.attempt(1)), dict)
    site.advertise(AdvertiseRequest(attempt=group.attempt(2)), dict)
    still_sound(group)


def test_the_number_is_durable_before_keys_exist(group):
    register = group.register["site-0"]
    group.ask("site-0", AdvertiseRequest(attempt=group.attempt(1)))
    assert register == [1]

    def full_disk(number):
        raise OSError("no space left on device")

    group.sites["site-0"]._register_attempt = full_disk
    with pytest.raises(OSError, match="no space"):
        group.sites["site-0"].advertise(AdvertiseRequest(attempt=group.attempt(2)), dict)
    assert group.sites["site-0"].prepared_attempt == 1


def test_request_for_another_site(group):
    server = group.until(Component.UPLOAD)
    request = server.build_upload_requests(WEIGHTS, WORK)["site-1"]
    refused(
        RefusalReason.OTHER_SITE,
        group.sites["site-0"].check_upload,
        request,
        weights_hash=WEIGHTS,
        request_hash=WORK,
    )


@pytest.mark.parametrize("cut", [1, 7, 200])
def test_truncated_and_oversized_payloads(group, cut):
    server = group.until(Component.UPLOAD)
    envelope = server.build_upload_requests(WEIGHTS, WORK)["site-0"].to_envelope()
    data = encode(envelope)
    with pytest.raises(MalformedMessageError):
        decode(data[:-cut])
    blob = envelope.blobs[0]
    for wrong in (blob[:-cut], blob + bytes(cut)):
        with pytest.raises(MalformedMessageError):
            UploadRequest.from_envelope(replace(envelope, blobs=(wrong,)))
    with pytest.raises(MalformedMessageError):
        UploadRequest.from_envelope(replace(envelope, blobs=(blob, blob)))


def test_shares_swapped_between_recipients_or_changed(group):
    server = group.until(Component.UPLOAD)
    requests = server.build_upload_requests(WEIGHTS, WORK)
    request = requests["site-0"]
    foreign = replace(requests["site-1"].shares[2], recipient="site-0")
    changed = replace(request.shares[2], ciphertext=bytes(80))
    for share in (foreign, changed):
        shares = (*request.shares[:2], share, *request.shares[3:])
        error = refused(
            RefusalReason.BAD_SHARE_SIGNATURE,
            group.sites["site-0"].check_upload,
            replace(request, shares=shares),
            weights_hash=WEIGHTS,
            request_hash=WORK,
        )
        assert error.peer == "site-2"


def test_signatures_are_bound_to_the_whole_session(group):
    """Each part of the session changes what is signed."""
    base = Session(attempt=group.attempt(), roster=group.sites["site-0"]._roster, parameters=group.parameters)
    variants = [
        replace(base, attempt=group.attempt(**change))
        for change in (
            {"study_digest": "cd" * 32},
            {"run_id": "8"},
            {"round": 2},
            {"attempt": 2},
            {"purpose": "audit"},
            {"vector_length": 6},
        )
    ]
    variants.append(replace(base, parameters=replace(group.parameters, modulus_bits=64)))
    assert len({variant.parts() for variant in (base, *variants)}) == 8
