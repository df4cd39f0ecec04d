"""The ClientApp: the courier of the ``lacuna`` that the hospital installed."""

from client.courier import app

__all__ = ["app"]
