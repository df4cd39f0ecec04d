"""See ``tests.benchmarks.load_driver``, which the ServerApp's process finds on its path."""

from tests.benchmarks.load_driver import app

__all__ = ["app"]
