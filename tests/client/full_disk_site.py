"""Three sites, one of them on a disk that is really full: ``python full_disk_site.py ORDER`` (JSON).

Run in a mount namespace of its own, it mounts a small tmpfs for site 0's home, or for its witness; without
the right to mount, it sets RLIMIT_FSIZE in place of it. What it saw is printed as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from agent_trio import Trio

from client.site_home import SiteHome
from privacy.ledger import read_ledger
from privacy.ledger_chain import CHARGE
from shared.wire import Envelope


def mount_small_disk(path: Path) -> None:
    """A tmpfs of 512 KiB at ``path``, in this process's own mount namespace."""
    path.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(path), b"tmpfs", 0, b"size=512k,mode=0700") != 0:
        raise OSError(ctypes.get_errno(), "mount")


@contextlib.contextmanager
def full(order: dict[str, Any], folder: Path, ledger: Path) -> Iterator[None]:
    """Nothing can be written any more until the end."""
    if order["disk"] == "rlimit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.stat().st_size // 4, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    filler = folder / "filler"
    for size in (65536, 4096, 512, 1):
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(size)):
                pass
    yield
    filler.unlink()


def keys(trio: Trio) -> Envelope:
    """What site 0 answers when it is asked for keys."""
    (answer,) = trio.ask(0, trio.new_attempt().build_advertise_requests()["site-0"].to_envelope())
    return answer


def main(order: dict[str, Any]) -> None:
    root = Path(order["root"])
    home, witness = root / "h0", root / "witness"
    small = {"ledger": home, "witness": witness}[order["full"]]
    if order["disk"] == "tmpfs":
        mount_small_disk(small)
    with contextlib.ExitStack() as stack:
        if order["full"] == "witness":
            stack.enter_context(witness_in(witness, home))
        trio = Trio(root)
        trio.complete()
        parts = trio.uploads(trio.set_up())[0] if order["asked"] == "upload" else []
        with full(order, small, trio.homes[0].ledger_path):
            answers = [*(trio.ask(0, *parts) if parts else []), keys(trio)]
        answers.append(keys(trio))
        told = trio.status()["error"]
        charged, computed = len(trio.charges()), list(trio.benches[0].calls)
        trio.restart(0)
        trio.complete()
        site = trio.homes[0]
        entries = read_ledger(site.ledger_path, key=site.identity().verify_key)
        seen = {
            "answers": [[answer.kind, answer.body.get("reason")] for answer in answers],
            "blobs": sum(len(blob) for answer in answers for blob in answer.blobs),
            "computed": computed,
            "charged_while_full": charged,
            "charged_at_the_end": sum(entry.kind == CHARGE for entry in entries),
            "told": told,
            "status": trio.status()["state"],
        }
        trio.close()
    print(json.dumps(seen), flush=True)


def witness_in(folder: Path, home: Path) -> Any:
    """The witness of the site with that home, and no other, lies in ``folder``."""
    usual = SiteHome.counter_path.fget
    assert usual is not None
    return mock.patch.object(
        SiteHome,
        "counter_path",
        property(lambda self: folder / "site-0.counter" if self.root == home else usual(self)),
    )


if __name__ == "__main__":
    os.environ["LACUNA_COUNTER_DIR"] = str(Path(json.loads(sys.argv[1])["root"]) / "counters")
    main(json.loads(sys.argv[1]))
