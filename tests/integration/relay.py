"""A TCP relay between clients and one server, that can be cut, made mute, walled off or slowed.

A broker that is told to advertise the relay's address is reached through it by every client, while
the broker itself, its other listeners and its leadership stay as they are.
"""

import asyncio
import math
import socket
import threading
from collections.abc import Callable

from helpers import free_port

CHUNK = 65536


class Relay:
    """`with Relay(upstream_port) as relay:` clients connect to `relay.address`."""

    def __init__(self, upstream: int, port: int = 0):
        self.upstream = upstream
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.connections = 0  # accepted so far
        self.delay = 0.0  # seconds before each piece of an answer
        self.rate = math.inf  # bytes a second of the answers on a connection
        self.spoil: Callable[[bytes], bytes] | None = None  # changes each piece of an answer
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()  # cleared: what was accepted waits
        self._open.set()
        self._hangs_up = False
        self._server: asyncio.Server | None = None
        self._wall: list[socket.socket] = []
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def cut(self) -> None:
        """As a server that has ended: connections are closed, new ones refused."""
        self._call(self._shut())

    def mute(self) -> None:
        """As a server that hangs: connections stay and are accepted, nothing is answered."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def hang_up(self) -> None:
        """As a server that is not ready: each connection is accepted and closed."""
        self._hangs_up = True
        self._loop.call_soon_threadsafe(self._abort)

    def wall(self) -> None:
        """As a firewall that drops packets: nothing is answered, not even a new connection."""
        self._call(self._wall_off())

    def heal(self) -> None:
        """Pass everything on again; what was held back while mute comes first."""
        self.delay, self.rate, self.spoil = 0.0, math.inf, None
        self._hangs_up = False
        self._call(self._listen())

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        for each in self._wall:
            each.close()
        self._wall.clear()
        self._open.set()
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, backlog=128
            )

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._abort()

    def _abort(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _wall_off(self) -> None:
        self._open.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        # The kernel drops the connections that find a full queue; one fills a queue of zero.
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", self.port))
        server.listen(0)
        self._wall = [server]
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._wall.append(filler)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._hangs_up:
            writer.close()
            return
        self._writers.add(writer)
        far: asyncio.StreamWriter | None = None
        try:
            await self._open.wait()
            far_reader, far = await asyncio.open_connection("127.0.0.1", self.upstream)
            self._writers.add(far)
            await asyncio.gather(self._pump(reader, far), self._answers(far_reader, writer))
        except OSError:
            pass
        finally:
            for each in (writer, far):
                if each is not None:
                    self._writers.discard(each)
                    each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests, as they are; the end of one side is the end of both."""
        try:
            while data := await reader.read(CHUNK):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers, slowed or spoilt when asked."""
        try:
            while data := await reader.read(CHUNK):
                await asyncio.sleep(self.delay + len(data) / self.rate)
                await self._open.wait()
                writer.write(self.spoil(data) if self.spoil else data)
                await writer.drain()
        finally:
            writer.close()
