"""Whether a SuperLink on this machine's loopback answers."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path


def superlink_answers(port: int, authority: Path) -> bool:
    """One request to ``/health``, over TLS that the given authority vouches for."""
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=2, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
