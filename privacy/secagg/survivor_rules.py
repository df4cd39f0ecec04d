"""The conditions on a survivor set U, one function each (DESIGN section 6, rule 4).

While t genuine confirmations by members of U, and upload signatures, are asked for, each condition alone is
implied by them: taking one out lets nothing open. Each is the last line where another check fails: self in U
and |U| >= t where it is not checked that confirmations come from members of U, U within P where upload
signatures are not checked either. ``tests/privacy/secagg/test_enumeration.py`` shows both, on this code.
"""

from __future__ import annotations

from collections.abc import Collection

from privacy.secagg.reasons import AggregationRefusedError, RefusalReason


def require_self(survivors: Collection[str], site_id: str) -> None:
    """Self in U: else a site that uploaded would help to open its own pair masks as a dropped one."""
    if site_id not in survivors:
        raise AggregationRefusedError(
            RefusalReason.SELF_NOT_AMONG_SURVIVORS, "the survivor set leaves this site out"
        )


def require_within_peers(survivors: Collection[str], peers: Collection[str]) -> None:
    """U within P: only sites that this site masked with can have survived."""
    for site_id in survivors:
        if site_id not in peers:
            raise AggregationRefusedError(
                RefusalReason.SURVIVOR_NOT_A_PEER,
                f"{site_id[:64]} is not a peer of this attempt",
                peer=site_id,
            )


def require_enough(survivors: Collection[str], threshold: int) -> None:
    """|U| >= t: no sum over fewer sites is ever unmasked."""
    if len(survivors) < threshold:
        raise AggregationRefusedError(
            RefusalReason.TOO_FEW_SURVIVORS,
            f"{len(survivors)} survivors are fewer than the threshold {threshold}",
        )
