"""The SuperLink's list of nodes, kept equal to the roster: the operator's command, over the Control API.

A SuperNode is let in by the SuperLink only with a key that was registered there; the perimeter lets no
registration through. Which keys belong there follows from the certificates that are good.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deploy.flower_run import run_flower
from server.coordinator_home import CoordinatorHome
from shared.canonical import canonical_json, parse_json
from shared.errors import CoordinatorError
from shared.home import write_private


@dataclass(frozen=True, kw_only=True)
class NodeChanges:
    """Sites whose node was registered, and sites whose node was taken off."""

    registered: tuple[str, ...]
    removed: tuple[str, ...]


def register_nodes(home: CoordinatorHome, *, flwr_home: Path, connection: str) -> NodeChanges:
    """Register the nodes of sites with a good certificate, and take off those of sites without one.

    Node ids that the SuperLink gave are kept beside the certificates. Repeating it changes nothing.

    Raises:
        UsageError: no ``config.toml``.
        CoordinatorError: Flower's words if it refuses.
    """
    authority, now = home.authority, datetime.now(UTC)
    path = authority.root / "nodes.json"
    known: dict[str, str] = parse_json(path.read_bytes(), what=str(path)) if path.exists() else {}
    wanted = {line.node_key: line for line in authority.index() if line.good(now)}
    names = {line.node_key: line.site_id for line in authority.index()}
    listed = {str(node["node-id"]) for node in _nodes(flwr_home, connection)}
    registered, removed = [], []
    for key in [key for key, node_id in known.items() if key not in wanted or node_id not in listed]:
        node_id = known.pop(key)
        if node_id in listed:
            run_flower(flwr_home, connection, "supernode", "unregister", node_id, connection)
            removed.append(names.get(key, "?"))
        write_private(path, canonical_json(known))
    for key, line in wanted.items():
        if key in known:
            continue
        public = authority.root / "node.pub"
        write_private(public, f"{key}\n".encode())
        answer = run_flower(flwr_home, connection, "supernode", "register", str(public), connection)
        known[key] = str(answer["node-id"])
        write_private(path, canonical_json(known))
        registered.append(line.site_id)
    return NodeChanges(registered=tuple(registered), removed=tuple(removed))


def _nodes(flwr_home: Path, connection: str) -> list[dict[str, object]]:
    answer = run_flower(flwr_home, connection, "supernode", "list", connection)
    nodes = answer.get("nodes")
    if not isinstance(nodes, list):
        raise CoordinatorError("flwr supernode list gave no list of nodes")
    return nodes
