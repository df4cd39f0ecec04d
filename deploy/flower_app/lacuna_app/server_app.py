"""The ServerApp: the round driver of the ``lacuna`` that the coordinator installed."""

from server.server_app import app

__all__ = ["app"]
