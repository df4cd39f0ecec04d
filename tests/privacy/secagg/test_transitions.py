"""The tables are what the code does: every pair of stage and component, every pair of stage and step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from privacy.secagg.messages import AdvertiseRequest
from privacy.secagg.reasons import AggregationRefusedError, Component, RefusalReason
from privacy.secagg.transitions import (
    SERVER_TRANSITIONS,
    SITE_TRANSITIONS,
    ServerStage,
    ServerStep,
    SiteStage,
)
from shared.errors import InternalError

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32
COMPONENTS = [component for component in Component if component is not Component.ADVERTISE]


class Walk:
    """Four sites, the last of which stays silent after dealing shares; requests for site-0 at every point."""

    def __init__(self, consortium):
        self.group = group = consortium(4, 1, 3)
        self.server = server = group.server()
        group.exchange(server, server.build_advertise_requests())
        self.requests = {Component.SHARE: server.build_share_requests()["site-0"]}

    def to(self, stage):
        """Bring site-0 to a stage, and make the request of every component that belongs there."""
        group, server, requests = self.group, self.server, self.requests
        others = group.names[1:]
        group.exchange(server, dict.fromkeys(others, requests[Component.SHARE]))
        reply = group.ask("site-0", requests[Component.SHARE])
        server.accept("site-0", reply)
        uploads = server.build_upload_requests(WEIGHTS, WORK)
        requests[Component.UPLOAD] = uploads["site-0"]
        group.exchange(server, uploads, without=["site-3"])
        server.close_uploads()
        confirm = server.build_confirm_requests()["site-0"]
        requests[Component.CONFIRM] = confirm
        group.exchange(server, dict.fromkeys(group.names[:3], confirm))
        requests[Component.UNMASK] = server.build_unmask_requests()["site-0"]
        if stage is SiteStage.CLOSED:
            group.ask("site-0", requests[Component.UNMASK])
        return requests


def stage_of(site, number):
    for state in (site._prepared, site._open):
        if state is not None and state.number == number:
            return state.stage
    return SiteStage.CLOSED


def test_every_listed_transition_of_a_site_happens(consortium):
    seen = {}
    walk = Walk(consortium)
    group, ask = walk.group, walk.group.ask

    def watched(name, request, **named):
        number = request.attempt.attempt
        before = stage_of(group.sites["site-0"], number)
        reply = ask(name, request, **named)
        if name == "site-0" and not isinstance(request, AdvertiseRequest):
            component = Component(request.KIND.removeprefix("secagg_"))
            seen[before, component] = stage_of(group.sites["site-0"], number)
        return reply

    group.ask = watched
    walk.to(SiteStage.CLOSED)
    server = group.until(Component.UPLOAD, number=2)
    group.ask = ask
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    server.close_uploads()
    before = stage_of(group.sites["site-0"], 2)
    group.ask("site-0", server.build_unmask_requests()["site-0"])
    seen[before, Component.UNMASK] = stage_of(group.sites["site-0"], 2)
    assert seen == SITE_TRANSITIONS


@pytest.mark.parametrize("stage", list(SiteStage))
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_other_pair_is_refused(consortium, stage, component):
    """The requests are genuine; only their moment is wrong."""
    if (stage, component) in SITE_TRANSITIONS:
        return
    walk = Walk(consortium)
    requests = walk.to(SiteStage.CONFIRMED)
    site, group = walk.group.sites["site-0"], walk.group
    if stage is SiteStage.CLOSED:
        site.abandon()
    elif stage is not SiteStage.CONFIRMED:
        site = group.restart("site-0")
        server = group.server(2)
        group.exchange(server, server.build_advertise_requests())
        keys = server.build_share_requests()
        if stage is not SiteStage.ADVERTISED:
            group.exchange(server, keys)
        if stage is SiteStage.UPLOADED:
            group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
        requests = {name: replace(request, attempt=group.attempt(2)) for name, request in requests.items()}
    number = requests[component].attempt.attempt
    assert stage_of(site, number) is stage
    with pytest.raises(AggregationRefusedError) as caught:
        group.ask("site-0", requests[component])
    expected = RefusalReason.ATTEMPT_CLOSED if stage is SiteStage.CLOSED else RefusalReason.OUT_OF_ORDER
    assert caught.value.reason == expected
    assert stage_of(site, number) is stage


def _steps(server):
    return {
        ServerStep.ASK_KEYS: server.build_advertise_requests,
        ServerStep.ASK_SHARES: server.build_share_requests,
        ServerStep.ASK_UPLOADS: lambda: server.build_upload_requests(WEIGHTS, WORK),
        ServerStep.CLOSE_UPLOADS: server.close_uploads,
        ServerStep.ASK_CONFIRMATIONS: server.build_confirm_requests,
        ServerStep.ASK_REVEALS: server.build_unmask_requests,
        ServerStep.UNMASK: server.total,
    }


def _server_at(consortium, stage):
    """A server at a stage, one site of four having dropped before its upload."""
    group = consortium(4, 1, 3)
    server = group.server()
    if stage is ServerStage.NEW:
        return server
    for step in ServerStep:
        requests = _steps(server)[step]()
        if server.stage is stage:
            return server
        if isinstance(requests, dict):
            silent = ["site-3"] if step is ServerStep.ASK_UPLOADS else []
            if stage is ServerStage.ABORTED:
                silent = group.names
            group.exchange(server, requests, without=silent)
        if stage is ServerStage.ABORTED:
            with pytest.raises(Exception, match="too_few_keys"):
                server.build_share_requests()
            return server
    return server


@pytest.mark.parametrize(("stage", "step"), list(itertools.product(ServerStage, ServerStep)))
def test_a_step_of_the_server_out_of_its_place_is_a_bug_of_the_driver(consortium, stage, step):
    server = _server_at(consortium, stage)
    assert server.stage is stage
    skips_confirmation = (stage, step) == (ServerStage.SURVIVORS, ServerStep.ASK_REVEALS)
    if (stage, step) in SERVER_TRANSITIONS and not skips_confirmation:
        return
    with pytest.raises(InternalError):
        _steps(server)[step]()
    assert server.stage is stage


def test_the_server_goes_through_its_stages(consortium):
    group = consortium(4, 1, 3)
    for number, silent in ((1, ["site-3"]), (2, [])):
        server, path = group.server(number), [ServerStage.NEW]
        for step in ServerStep:
            if step is ServerStep.ASK_CONFIRMATIONS and not silent:
                continue
            requests = _steps(server)[step]()
            assert SERVER_TRANSITIONS[path[-1], step] is server.stage
            path.append(server.stage)
            if isinstance(requests, dict):
                without = silent if step is ServerStep.ASK_UPLOADS else []
                group.exchange(server, requests, without=without)
        assert path[-1] is ServerStage.DONE


def test_confirming_where_nobody_dropped_is_a_bug_of_the_driver(consortium):
    group = consortium(3)
    server = group.until(Component.UPLOAD)
    group.exchange(server, server.build_upload_requests(WEIGHTS, WORK))
    server.close_uploads()
    with pytest.raises(InternalError):
        server.build_confirm_requests()
    assert server.stage is ServerStage.SURVIVORS
