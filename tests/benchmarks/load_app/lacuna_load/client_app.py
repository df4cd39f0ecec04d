"""The real courier."""

from client.courier import app

__all__ = ["app"]
