"""Sheets that hospitals exchange: the writer's fingerprint is compared, what it vouches for is pinned."""

from __future__ import annotations

from typing import Any

import pytest

from client.site_policy import SitePolicy
from shared.attestation import Statement, sign_statement
from shared.errors import MalformedMessageError, PeerError, RefusedError
from shared.fingerprint_sheet import SHEET_PREDICATE, FingerprintSheet, open_sheet, sign_sheet
from shared.identity import SigningKey

WRITER, OTHER = SigningKey.generate(), SigningKey.generate()
PRINT, OTHERS = WRITER.verify_key.fingerprint, OTHER.verify_key.fingerprint


def test_a_sheet_comes_back_with_its_writer_on_it() -> None:
    data = sign_sheet(FingerprintSheet(writer="north", entries={"south": OTHERS, "north": OTHERS}), WRITER)
    sheet = open_sheet(data, fingerprint=PRINT)
    assert sheet == FingerprintSheet(writer="north", entries={"south": OTHERS, "north": PRINT})
    with pytest.raises(RefusedError, match="is signed by"):
        open_sheet(data, fingerprint=OTHERS)
    with pytest.raises(PeerError):
        open_sheet(data.replace(b'"sig":"', b'"sig":"AAAA'), fingerprint=PRINT)


@pytest.mark.parametrize(
    "predicate",
    [
        {"writer": "north", "entries": {}},
        {"writer": "north", "entries": {"north": OTHERS}},
        {"writer": "north", "entries": {"north": PRINT, "../x": OTHERS}},
        {"writer": "north", "entries": {"north": PRINT, "south": "SHA256:x"}},
        {"writer": "north", "entries": {"north": PRINT} | {f"s{i}": OTHERS for i in range(200)}},
        {"writer": 3, "entries": {"north": PRINT}},
    ],
)
def test_malformed_sheets_are_refused(predicate: dict[str, Any]) -> None:
    statement = Statement(predicate_type=SHEET_PREDICATE, subjects=(), predicate=predicate)
    with pytest.raises(MalformedMessageError):
        open_sheet(sign_statement(statement, WRITER), fingerprint=PRINT)


def test_pins_are_added_never_replaced_and_nobody_says_who_i_am() -> None:
    policy = SitePolicy().pinned("south", OTHERS)
    pinned, fresh = policy.pinned_together(
        {"coordinator": PRINT, "south": OTHERS}, own=(PRINT, None), writer="north"
    )
    assert fresh == {"coordinator"}
    assert pinned.pins() == {"coordinator": PRINT, "south": OTHERS}
    with pytest.raises(RefusedError, match=r"contradicts.*south"):
        policy.pinned_together({"south": PRINT, "west": PRINT}, own=(PRINT, None), writer="north")
    with pytest.raises(RefusedError, match="this site itself"):
        policy.pinned_together({}, own=(PRINT, OTHERS), writer="north")
