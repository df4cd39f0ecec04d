"""A server that tells every honest site something else, played against the real sites.

The last c sites collude: the server has all that they hold and signs with their keys. At the upload each
honest site may be given peers and weights of its own. After it, a strategy gives each honest site a survivor
set to confirm (or none) and one to unmask (or none). What a site answers is computed by its real code, once
for each different question; what follows from the answers is linear algebra (``knowledge.py``).

A site that is not in the roster has no key; where the check before is taken out, looking it up fails, which
reveals nothing either.

Broken means: a sum over fewer than t - c honest sites comes out, or one over sites with different terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from knowledge import Knowledge, Upload

from privacy.secagg.messages import ConfirmRequest, UnmaskRequest
from privacy.secagg.reasons import AggregationRefusedError, Component
from privacy.secagg.statements import SurvivorStatement, UploadStatement

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32
PHANTOM = "phantom"
Sites = tuple[str, ...]
Trick = tuple[Sites | None, Sites | None]
"""What one site is asked to confirm, and what to unmask."""


class CheatingServer:
    """Sites that have uploaded, and everything that a server with c colluders can still ask of them.

    Args:
        consortium: Makes real sites.
        n, t, c: As in the plan.
        peers: P as each honest site is told it; everybody if left out.
        weights: Hash of the weights that each honest site is given.
        forgetful: Sites forget which survivor set they signed: what "one U for each attempt" prevents.
    """

    def __init__(
        self,
        consortium: Any,
        n: int,
        t: int,
        c: int = 1,
        *,
        peers: Mapping[str, Sites] | None = None,
        weights: Mapping[str, bytes] | None = None,
        forgetful: bool = False,
    ) -> None:
        self.group = group = consortium(n, c, t, length=1)
        self.honest, self.colluders = tuple(group.names[:-c]), tuple(group.names[-c:])
        self.t, self.c, self.forgetful = t, c, forgetful
        server = group.until(Component.UPLOAD)
        self.attempt = server.attempt
        requests = server.build_upload_requests(WEIGHTS, WORK)
        self.states: dict[str, Any] = {}
        self.known = Knowledge(t)
        self.signatures: dict[str, bytes] = {}
        for name in self.honest:
            told = (peers or {}).get(name, tuple(group.names))
            given = (weights or {}).get(name, WEIGHTS)
            shares = tuple(share for share in requests[name].shares if share.dealer in told)
            request = replace(requests[name], shares=shares, weights_hash=given)
            envelope = group.ask(name, request, weights=given)
            self.signatures[name] = bytes.fromhex(envelope.body["signature"])
            state = self.states[name] = group.sites[name]._open
            self.known.uploads[name] = Upload(state.peers, state.terms)
        dealers = dict.fromkeys(group.names, tuple(group.names))
        self.known = self.known.with_colluders(self.colluders, dealers)
        everyone = [*group.names, PHANTOM]
        self.sets = [chosen for size in range(1, n + 2) for chosen in itertools.combinations(everyone, size)]
        self._signed: dict[Any, bytes | None] = {}
        self._answers: dict[Any, dict[str, str]] = {}
        self._sums: dict[Any, Sites | None] = {}

    def _fresh(self, name: str) -> Any:
        state = self.states[name]
        held = {peer: (bytearray(pair[0]), bytearray(pair[1])) for peer, pair in state.held.items()}
        site = self.group.sites[name]
        site._open = replace(state, held=held)
        return site

    def _uploads(self, name: str, chosen: Sites) -> tuple[tuple[str, bytes], ...]:
        """Upload signatures as shown to one site: colluders sign whatever terms it has."""
        state = self.states[name]
        made = {
            colluder: UploadStatement(session=state.session, site_id=colluder, terms=state.terms).sign(
                self.group.identities[colluder]
            )
            for colluder in self.colluders
        }
        return tuple((site, made.get(site) or self.signatures.get(site, bytes(64))) for site in chosen)

    def confirm(self, name: str, chosen: Sites) -> bytes | None:
        """The site's signature under this set, if it gives one."""
        if (name, chosen) not in self._signed:
            request = ConfirmRequest(attempt=self.attempt, uploads=self._uploads(name, chosen))
            try:
                self._signed[name, chosen] = self._fresh(name).confirm(request).signature
            except (AggregationRefusedError, KeyError):
                self._signed[name, chosen] = None
        return self._signed[name, chosen]

    def reveal(self, name: str, first: Sites | None, second: Sites, signers: Iterable[str]) -> dict[str, str]:
        """Owner to kind of each share that the site reveals; the server tries several lists of signatures."""
        signers = tuple(signers)
        key = (name, first, second, signers)
        if key not in self._answers:
            genuine = (*signers, *self.colluders)
            lists = (genuine, tuple(site for site in genuine if site in second), second)
            answers = (self._ask(name, first, second, signers, listed) for listed in lists)
            self._answers[key] = next(filter(None, answers), {})
        return self._answers[key]

    def _ask(
        self, name: str, first: Sites | None, second: Sites, signers: Sites, listed: Sites
    ) -> dict[str, str]:
        """``listed``: whose confirmations the server shows; those of sites that gave none are forged."""
        state, site = self.states[name], self._fresh(name)
        statement = SurvivorStatement(
            session=state.session,
            site_id=name,
            terms=state.terms,
            survivors=state.session.roster.ordered(second),
        )
        made = {signer: self.confirm(signer, second) for signer in signers}
        for colluder in self.colluders:
            made[colluder] = replace(statement, site_id=colluder).sign(self.group.identities[colluder])
        confirmations = tuple((signer, made.get(signer) or bytes(64)) for signer in listed)
        try:
            if first is not None:
                site.confirm(ConfirmRequest(attempt=self.attempt, uploads=self._uploads(name, first)))
            request = UnmaskRequest(
                attempt=self.attempt, uploads=self._uploads(name, second), confirmations=confirmations
            )
            return {share.owner: share.kind for share in site.unmask(request).shares}
        except (AggregationRefusedError, KeyError):
            return {}

    def tricks(self, name: str) -> list[Trick]:
        """All that can be asked of a site and is not refused, whoever signs. A refusal changes nothing at
        a site (the named tests of refusals complete the attempt afterwards), so the rest comes down to one of
        these."""
        found: list[Trick] = [(None, None)]
        firsts = [chosen for chosen in self.sets if self.confirm(name, chosen)]
        for first in (None, *firsts):
            if first is not None:
                found.append((first, None))
            for second in self.sets:
                signers = [other for other in self.honest if self.confirm(other, second)]
                if self.reveal(name, first, second, signers):
                    found.append((first, second))
        return found

    def exposed(self, strategy: Mapping[str, Trick]) -> Sites | None:
        """The smallest sum that comes out, if none may."""
        shares = []
        for name, (first, second) in strategy.items():
            if second is None:
                continue
            signers = [
                other
                for other, (told, _) in strategy.items()
                if (self.forgetful or told == second) and self.confirm(other, second)
            ]
            shares += [(name, *item) for item in self.reveal(name, first, second, signers).items()]
        return self.judged(shares)

    def judged(self, shares: Iterable[tuple[str, str, str]]) -> Sites | None:
        """What (holder, owner, kind) lay bare: the smallest forbidden sum."""
        key = frozenset(shares)
        if key not in self._sums:
            known = self.known.with_colluders((), {})
            for holder, owner, kind in key:
                known.learn(holder, owner, kind)
            uploads = self.known.uploads
            bad = [
                names
                for names in known.sums(self.colluders)
                if len(names) < self.t - self.c or len({uploads[name] for name in names}) > 1
            ]
            self._sums[key] = min(bad, key=len, default=None)
        return self._sums[key]

    def everything(self) -> Iterator[tuple[Trick, ...]]:
        """All strategies."""
        return itertools.product(*(self.tricks(name) for name in self.honest))

    def search(self, strategies: Iterable[tuple[Trick, ...]]) -> Sites | None:
        """The first break among these strategies."""
        for choices in strategies:
            found = self.exposed(dict(zip(self.honest, choices, strict=True)))
            if found:
                return found
        return None
