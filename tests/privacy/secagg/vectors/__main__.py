"""``python -m tests.privacy.secagg.vectors``: write the known-answer vectors again, with a clean git diff.

A change of the protocol gets files of a new version beside these; published files do not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .documents import key_derivation, mask_expansion, quantization, shares
from .whole_round import whole_round

FOLDER = Path(__file__).parent
DOCUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "key_derivation_v1.json": key_derivation,
    "mask_expansion_v1.json": mask_expansion,
    "shares_v1.json": shares,
    "quantization_v1.json": quantization,
    "round_v1.json": whole_round,
}


def text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    for name, build in DOCUMENTS.items():
        (FOLDER / name).write_text(text(build()))
        print(FOLDER / name)
