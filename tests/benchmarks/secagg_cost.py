"""What secure aggregation costs a site, against Flower's SecAgg+ client and a floor; the ServerApp's memory.

Every cell runs in a fresh process (:mod:`secagg_site_cost`, :mod:`secagg_server_memory`). The table goes to
``tests/benchmarks/secagg_cost.md``. Flower's client is measured up to 10^9 parameters times sites; beyond
that its time is a straight line in the number of masks through the two largest measured cells of the same
size, and the cell says "extrapolated".

A cell that was measured is kept in ``tests/benchmarks/results/secagg_cost.jsonl`` and not measured again, so
that an interrupted run goes on; remove the file to measure everything.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cryptography
import flwr
import numpy as np
from rich.console import Console

TABLE = Path(__file__).with_name("secagg_cost.md")
MEASURED = Path(__file__).parent / "results" / "secagg_cost.jsonl"
PARAMETERS = (1_000_000, 10_000_000, 100_000_000)
SITES = (3, 10, 32, 100)
PEER_BOUND = 1_000_000_000
MEMORY_CELLS = [
    *((1_000_000, n) for n in SITES),
    *((10_000_000, n) for n in SITES[:3]),
    *((100_000_000, n) for n in SITES[:2]),
]
MASKED_BOUND = 10**10
"""Parameters times sites squared up to which the sites of a memory cell really mask."""

SITE_NOTES = """\
Processor seconds on one core, modulus 2^32, c = 1, nobody drops; quantize, masks and floor are the least of
three or five turns, all other figures of three up to 10^8 parameters times sites. *quantize*: float64 to the
integer grid, which Flower's client does too (it is in its *vector*). *masks*: from int64 to the bytes that
travel. *floor*: expanding as many masks with AES-256-CTR and as many additions, into an array that is there
already. *keys, shares*: everything else, signatures and their checks included. Bytes: all that a site sends
in an attempt. The noise of differential privacy and the hash of the weights (SHA-256 over one message) are
in neither column."""

SERVER_NOTES = """\
Highest resident memory of a round above that between rounds, which holds the model (weights, their average,
Adam's two moments: 4 vectors), in vectors of 4 bytes a parameter. The round is the real one: weights out,
uploads in through Flower's own inflation of messages, keys and shares of the next attempt along the way,
unmasking, optimizer step, checkpoint. SuperLink's storage is not in it: it keeps each message until it is
taken, up to 4 bytes a parameter and site. The peak is at the end of an answer's inflation: the sum, and the
answer twice, as Flower's chunks and as its arrays; the rest is Flower's threads and messages. Where sites
send without masks, the total is not checked; the ServerApp's work is the same."""


def cell(module: str, *arguments: object) -> dict[str, Any]:
    """Run one cell in a process of its own, unless its figures are there."""
    key = " ".join((module, *map(str, arguments)))
    if MEASURED.exists():
        for line in MEASURED.read_text().splitlines():
            kept: dict[str, Any] = json.loads(line)
            if kept["cell"] == key:
                return kept
    words = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found: dict[str, Any] = {"cell": key, **json.loads(done.stdout.splitlines()[-1])}
    MEASURED.parent.mkdir(exist_ok=True)
    with MEASURED.open("a") as file:
        file.write(json.dumps(found) + "\n")
    return found


def extrapolate(cells: list[dict[str, Any]]) -> None:
    """Fill in Flower's figures where they were not measured: linear in the number of sites."""
    known = [item for item in cells if item["flower"] is not None][-2:]
    for item in cells:
        if item["flower"] is None:
            (a, b), n = known, item["sites"]
            share = (n - a["sites"]) / (b["sites"] - a["sites"])
            item["flower"] = {
                name: a["flower"][name] + share * (b["flower"][name] - a["flower"][name])
                for name in ("vector", "keys", "bytes")
            }
            item["extrapolated"] = True


def site_lines(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| parameters | sites | ours: quantize | masks | floor | masks / floor | keys, shares | ours, all "
        "| Flower: vector | keys, shares | Flower / ours | bytes ours | bytes Flower | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for item in cells:
        ours, flower = item["ours"], item["flower"]
        total = ours["quantize"] + ours["vector"] + ours["keys"]
        theirs = flower["vector"] + flower["keys"]
        mark = " (extrapolated)" if item.get("extrapolated") else ""
        lines.append(
            f"| {item['parameters']:,} | {item['sites']} | {ours['quantize']:.3f} | {ours['vector']:.3f} "
            f"| {item['floor']:.3f} | {ours['vector'] / item['floor']:.2f} "
            f"| {ours['keys']:.3f} | {total:.3f} | {flower['vector']:.2f}{mark} "
            f"| {flower['keys']:.3f}{mark} | {theirs / total:.1f}{mark} "
            f"| {ours['bytes']:,.0f} | {flower['bytes']:,.0f}{mark} | {ours['bytes'] / flower['bytes']:.3f} |"
        )
    return lines


def memory_lines(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| parameters | sites | vectors beyond the model | MiB | MiB above 3 vectors | ServerApp, s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for item in cells:
        above = item["mib"] - 3 * 4 * item["parameters"] / 2**20
        mark = "" if item["masked"] else " (sites send without masks)"
        lines.append(
            f"| {item['parameters']:,} | {item['sites']}{mark} | {item['vectors']:.2f} | {item['mib']:.0f} "
            f"| {above:+.1f} | {item['server_seconds']:.1f} |"
        )
    return lines


def run() -> str:
    """Measure all cells; minutes to an hour, by machine."""
    console = Console(stderr=True)
    sites: list[dict[str, Any]] = []
    for parameters in PARAMETERS:
        row = []
        for n in SITES:
            console.print(f"one site, {parameters:,} parameters, {n} sites")
            peer = () if parameters * n <= PEER_BOUND else ("no-peer",)
            row.append(cell("secagg_site_cost", parameters, n, *peer))
        extrapolate(row)
        sites += row
    memory = []
    for parameters, n in MEMORY_CELLS:
        console.print(f"ServerApp's memory, {parameters:,} parameters, {n} sites")
        plain = () if parameters * n * n <= MASKED_BOUND else ("plain",)
        memory.append(cell("secagg_server_memory", parameters, n, *plain))
    text = "\n".join(
        [
            "# What secure aggregation costs",
            "",
            f"Written by `python -m tests.benchmarks secagg_cost` on {datetime.now(UTC):%Y-%m-%d}: "
            f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"numpy {np.__version__}, cryptography {cryptography.__version__}, flwr {flwr.__version__}.",
            "",
            "## One site, one attempt",
            "",
            SITE_NOTES,
            "",
            *site_lines(sites),
            "",
            "## ServerApp, one round",
            "",
            SERVER_NOTES,
            "",
            *memory_lines(memory),
            "",
        ]
    )
    TABLE.write_text(text)
    return text


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
