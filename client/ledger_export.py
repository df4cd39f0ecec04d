"""The site's ledger as a signed file, written without the agent."""

from __future__ import annotations

from client.site_home import SiteHome
from privacy.ledger import read_ledger
from privacy.ledger_chain import LedgerHead, check_chain, export_statement


def signed_ledger(home: SiteHome) -> bytes:
    """The signed export (DSSE, predicate ``ledger/v1``) of the ledger as it is on disk.

    The ledger is only read, so an agent may have it open; nothing is charged.

    Raises:
        LedgerError: it is missing or damaged.
    """
    key = home.identity()
    entries = read_ledger(home.ledger_path, key=key.verify_key)
    last = entries[-1]
    head = LedgerHead.sign(
        key,
        ledger_id=check_chain(entries, key=key.verify_key),
        length=last.sequence,
        entry_hash=last.entry_hash,
    )
    return export_statement(entries, head, key)
