"""Names of segments, as people typed them, and the plan's labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from client.ingest.scan import ProblemKind, UnusableScanError


def values_by_name(
    named: Mapping[int, str], labels: Sequence[str], names: Mapping[str, str], *, what: str
) -> dict[int, int]:
    """The plan's value for each index that a segmentation has a name for; 0 for what is left out.

    Args:
        named: Index and name.
        labels: The plan's labels.
        names: Names that stand for a label of another name, or, empty, for nothing.
        what: How errors name the segmentation.

    Raises:
        UnusableScanError: a name that is no label.
    """
    known = {_normal(label): value for value, label in enumerate(labels, start=1)}
    known["background"] = 0
    renamed = {_normal(name): _normal(label) for name, label in names.items()}
    stands_for = {index: renamed.get(_normal(name), _normal(name)) for index, name in named.items()}
    unknown = [named[index] for index, name in stands_for.items() if name and name not in known]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:5])
        raise UnusableScanError(
            ProblemKind.UNKNOWN_LABEL,
            f"{what}: segments {shown}; the plan has {', '.join(labels)} "
            "(say which is which: --segment NAME=LABEL)",
        )
    return {index: known.get(name, 0) for index, name in stands_for.items()}


def _normal(text: str) -> str:
    """Without case, spaces and punctuation."""
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")
