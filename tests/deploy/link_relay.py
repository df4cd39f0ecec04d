"""A link in user space: a TCP relay that can be cut, slowed and made lossy. (No tests of its own.)

Packets are not lost under TCP, as programs see it: a lost one comes late (it is sent again), and a link that
loses too many resets the connection. That is what a lossy link does here, chunk by chunk, by a seeded die.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import dataclass

CHUNK_BYTES = 16384
RESENT_S = (0.2, 1.5)
"""How late what was lost and sent again comes: TCP's retransmission timer, once or a few times."""


@dataclass(kw_only=True)
class Weather:
    """State of the link now. ``lost`` and ``reset`` are chances of one chunk."""

    cut: bool = False
    delay_s: float = 0.0
    lost: float = 0.0
    reset: float = 0.0


class LinkRelay:
    """Listens on a free loopback port and carries bytes to ``port``, in a thread of its own.

    Args:
        port: Loopback port at the far end.
        seed: Of the die that loses chunks.
    """

    def __init__(self, port: int, *, seed: int = 0) -> None:
        self.target = port
        self.weather = Weather()
        self.port = 0
        self.connections = 0
        self._die = random.Random(f"link {seed}")
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait(30)

    def cut(self) -> None:
        """Connections end without a word, new ones are not accepted, until :meth:`mend`."""
        self.weather.cut = True
        self._loop.call_soon_threadsafe(self._reset_all)

    def slow(self, delay_s: float) -> None:
        self.weather.delay_s = delay_s

    def lose(self, *, lost: float, reset: float) -> None:
        self.weather.lost, self.weather.reset = lost, reset

    def mend(self) -> None:
        self.weather = Weather()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        self._reset_all()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_writer: asyncio.StreamWriter | None = None
        self._writers.add(writer)
        try:
            if self.weather.cut:
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(far_writer)
            self.connections += 1
            ways = (self._carry(reader, far_writer), self._carry(far_reader, writer))
            await asyncio.gather(*ways)
        except (OSError, ConnectionError):
            pass
        finally:
            for end in (writer, far_writer):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            weather = self.weather
            if self._die.random() < weather.reset:
                raise ConnectionResetError
            late_s = self._die.uniform(*RESENT_S) if self._die.random() < weather.lost else 0.0
            if weather.delay_s + late_s:
                await asyncio.sleep(weather.delay_s + late_s)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()
