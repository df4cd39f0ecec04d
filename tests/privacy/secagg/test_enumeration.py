"""A server that tells every honest site something else after the uploads, enumerated on the real sites.

The last site colludes: the server has all it holds and signs with its key. A strategy gives each honest
site a set to confirm (or none) and a set to unmask. Broken means: the vectors of a non-empty set S of
fewer than t - c honest sites can be summed alone, that is, the mask seed of each site in S and, for each
pair of honest sites across the border of S, one mask key of the two are within reach of t shares.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from privacy.secagg import site_unmasking
from privacy.secagg.messages import ConfirmRequest, UnmaskRequest, UploadReply
from privacy.secagg.reasons import AggregationRefusedError, Component
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.site_unmasking import ConfirmedState
from privacy.secagg.statements import SurvivorStatement, UploadStatement

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32
PHANTOM = "phantom"


class CheatingServer:
    """What each honest site answers to each (confirm, unmask, who confirmed); every answer asked once."""

    def __init__(self, consortium: Any, n: int, t: int) -> None:
        self.group = group = consortium(n, 1, t, length=1)
        server = group.until(Component.UPLOAD)
        requests = server.build_upload_requests(WEIGHTS, WORK)
        replies = {name: UploadReply.from_envelope(group.ask(name, item)) for name, item in requests.items()}
        self.attempt = server.attempt
        self.uploads = {name: reply.signature for name, reply in replies.items()}
        self.states = {name: group.sites[name]._open for name in group.names}
        self.honest, self.colluder = group.names[:-1], group.names[-1]
        self.t = t
        everyone = [*group.names, PHANTOM]
        self.sets = [chosen for size in range(1, n + 2) for chosen in itertools.combinations(everyone, size)]
        self._confirmed: dict[Any, bytes | None] = {}
        self._revealed: dict[Any, dict[str, str]] = {}

    def _reset(self, name: str) -> SiteSecureAggregation:
        state = self.states[name]
        held = {peer: (bytearray(pair[0]), bytearray(pair[1])) for peer, pair in state.held.items()}
        site = self.group.sites[name]
        site._open = replace(state, held=held)
        return site

    def _signed(self, chosen: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
        return tuple((name, self.uploads.get(name, bytes(64))) for name in chosen)

    def confirm(self, name: str, chosen: tuple[str, ...]) -> bytes | None:
        if (name, chosen) not in self._confirmed:
            site = self._reset(name)
            try:
                request = ConfirmRequest(attempt=self.attempt, uploads=self._signed(chosen))
                self._confirmed[name, chosen] = site.confirm(request).signature
            except AggregationRefusedError:
                self._confirmed[name, chosen] = None
        return self._confirmed[name, chosen]

    def reveal(
        self, name: str, first: Any, second: tuple[str, ...], signers: tuple[str, ...]
    ) -> dict[str, str]:
        key = (name, first, second, signers)
        if key not in self._revealed:
            self._revealed[key] = {}
            signatures = {signer: self.confirm(signer, second) for signer in signers}
            state = self.states[self.colluder]
            mine = SurvivorStatement(
                session=state.session, site_id=self.colluder, terms=state.terms, survivors=second
            )
            if self.colluder in second:
                signatures[self.colluder] = mine.sign(self.group.identities[self.colluder])
            site = self._reset(name)
            request = UnmaskRequest(
                attempt=self.attempt,
                uploads=self._signed(second),
                confirmations=tuple((signer, value or bytes(64)) for signer, value in signatures.items()),
            )
            try:
                if first is not None:
                    site.confirm(ConfirmRequest(attempt=self.attempt, uploads=self._signed(first)))
                self._revealed[key] = {share.owner: share.kind for share in site.unmask(request).shares}
            except AggregationRefusedError:
                pass
        return self._revealed[key]

    def exposed(self, strategy: dict[str, tuple[Any, tuple[str, ...]]]) -> tuple[str, ...] | None:
        """The smallest honest set that this strategy lays bare, if it has fewer than t - c sites."""
        counts = {(owner, kind): 1 for owner in self.honest for kind in ("seed", "key")}
        for name, (first, second) in strategy.items():
            signers = tuple(
                other
                for other, (told, _) in strategy.items()
                if told == second and other in second and self.confirm(other, second)
            )
            for owner, kind in self.reveal(name, first, second, signers).items():
                if owner in self.honest:
                    counts[owner, kind] += 1
        seeds = {owner for owner in self.honest if counts[owner, "seed"] >= self.t}
        keys = {owner for owner in self.honest if counts[owner, "key"] >= self.t}
        for size in range(1, self.t - 1):
            for chosen in itertools.combinations(self.honest, size):
                rest = [owner for owner in self.honest if owner not in chosen]
                if set(chosen) <= seeds and all(a in keys or b in keys for a in chosen for b in rest):
                    return chosen
        return None

    def search(self, strategies: Any) -> tuple[str, ...] | None:
        for choices in strategies:
            found = self.exposed(dict(zip(self.honest, choices, strict=True)))
            if found:
                return found
        return None

    def plain(self) -> Any:
        """Each honest site is asked to confirm and unmask one set, another for each."""
        tricks = [(chosen, chosen) for chosen in self.sets]
        return itertools.product(tricks, repeat=len(self.honest))


def test_all_strategies_for_three_sites(consortium):
    server = CheatingServer(consortium, 3, 3)
    tricks = [(first, second) for first in [None, *server.sets] for second in server.sets]
    assert server.search(itertools.product(tricks, repeat=2)) is None
    full = tuple(server.group.names)
    assert server.reveal("site-0", None, full, ()), "the honest strategy does reveal something"


@pytest.mark.parametrize(("n", "t", "count"), [(4, 3, 3000), (5, 4, 1500), (6, 4, 1000)])
def test_sampled_strategies_for_more_sites(consortium, n, t, count):
    """A public, seeded generator picks; likely sets are preferred: those of at least t - 1 real sites."""
    server, chance = CheatingServer(consortium, n, t), random.Random(n)
    likely = [chosen for chosen in server.sets if t - 1 <= len(chosen)]

    def strategies():
        for _ in range(count):
            common = chance.choice(likely)
            picks = []
            for _ in server.honest:
                second = common if chance.random() < 0.5 else chance.choice(likely)
                first = chance.choice([None, second, second, chance.choice(likely)])
                picks.append((first, second))
            yield picks

    assert server.search(strategies()) is None


def without_confirmations(monkeypatch):
    monkeypatch.setattr(ConfirmedState, "check_released", lambda *_: None)


@pytest.mark.parametrize("rule", ["require_enough", "require_within_peers"])
def test_each_size_condition_is_needed_where_signatures_are_not_counted(consortium, monkeypatch, rule):
    """With the count of confirmations removed the conditions alone still hold for four sites; with one
    of the conditions gone too, a single site is laid bare."""
    without_confirmations(monkeypatch)
    monkeypatch.setattr(UploadStatement, "verify", lambda *_: None)
    server = CheatingServer(consortium, 4, 3)
    assert server.search(server.plain()) is None
    monkeypatch.setattr(site_unmasking, rule, lambda *_: None)
    server = CheatingServer(consortium, 4, 3)
    found = server.search(server.plain())
    assert found is not None
    assert len(found) == 1


def test_counting_confirmations_is_needed(consortium, monkeypatch):
    """n = 6, t = 4: sets that satisfy all conditions, another for each site, open a sum over two."""

    def names(digits):
        return tuple(f"site-{digit}" for digit in digits)

    dropped = {0: "24", 1: "23", 2: "34", 3: "24", 4: "23"}
    strategy = {}
    for site, gone in dropped.items():
        chosen = names(digit for digit in "012345" if digit not in gone)
        strategy[f"site-{site}"] = (chosen, chosen)
    assert CheatingServer(consortium, 6, 4).exposed(strategy) is None
    without_confirmations(monkeypatch)
    assert CheatingServer(consortium, 6, 4).exposed(strategy) == ("site-0", "site-1")
