"""Makes the small plan of the tests importable."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parent.parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

DEPLOY_TESTS = str(Path(__file__).parent)
if DEPLOY_TESTS not in sys.path:
    sys.path.insert(0, DEPLOY_TESTS)
