"""An agent that runs: it ends by itself when its ledger's disk failed, and only then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from client.serving import ServingAgent, open_ledger
from client.site_home import SiteHome, init_site
from privacy.ledger import Ledger
from shared.errors import LedgerError
from shared.exit_codes import ExitCode


def fill(ledger: Ledger) -> None:
    pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
    ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
    ledger.record("filler", {"text": "x" * 40_000})


def replace(ledger: Ledger) -> None:
    copy = ledger._path.with_name("copy")
    copy.write_bytes(ledger._path.read_bytes())
    copy.replace(ledger._path)
    ledger.record("note", {})


@pytest.mark.parametrize(("fault", "ends"), [(fill, True), (replace, False)])
def test_only_a_failed_disk_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Ledger], None], ends: bool
) -> None:
    """Whose ledger was tampered with is not started again by a service manager."""
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    home = SiteHome(tmp_path / "site")
    init_site(home, name="north")
    with ExitStack() as resources:
        ledger = resources.enter_context(open_ledger(home))
        agent = ServingAgent(resources.pop_all(), "socket", ledger)
        with agent:
            agent.check_storage()
            with pytest.raises(LedgerError):
                fault(ledger)
            if not ends:
                agent.check_storage()
                return
            with pytest.raises(LedgerError, match="could not be written") as told:
                agent.check_storage()
    assert told.value.exit_code == ExitCode.SITE_MUST_ACT
