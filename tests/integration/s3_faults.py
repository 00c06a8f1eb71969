"""An S3 endpoint that fails on request: a proxy before a real S3 server, or a store of its own.

With `upstream` every request is passed on unchanged (Host too: the signature covers it) and the
answer comes from that server. Without it, a dictionary in memory answers, without signatures:
light enough for 100,000 objects.
"""

import asyncio
import bisect
import hashlib
import random
import socket
import struct
import threading
import time
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ANSWERS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "403": (403, "AccessDenied", "Access Denied"),
    "400": (400, "ExpiredToken", "The provided token has expired."),
    "404": (404, "NoSuchBucket", "The specified bucket does not exist"),
    "409": (409, "ConditionalRequestConflict", "The conditional request cannot succeed now."),
}
# refused: nothing listens; hang: no answer, ever; reset: torn before the object is stored;
# lost: stored, then torn before the answer; torn: stored, then torn within the answer.
KINDS = (*ANSWERS, "refused", "hang", "reset", "lost", "torn")


class Seen(NamedTuple):
    """One request: time.monotonic(), put|get|head|list|..., bucket/key, status (0: no answer)."""

    time: float
    operation: str
    key: str
    status: int


class FaultyS3:
    """`with FaultyS3(upstream) as s3:` s3.endpoint is for the clients, s3.fail(...) breaks it."""

    def __init__(self, upstream: str = "", *, latency: float = 0.0, port: int = 0):
        self.upstream = urlsplit(upstream) if upstream else None
        self.latency = latency  # seconds before each answer
        self.port = port
        self.requests: list[Seen] = []
        self.store: dict[str, bytes] = {}  # bucket/key -> bytes, without upstream
        self._sorted: list[str] = []
        self.etags: dict[str, str] = {}  # bucket/key -> another ETag than the MD5
        self._fault: tuple[str, float, tuple[str, ...]] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FaultyS3":
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._call(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def fail(self, kind: str, probability: float = 1.0, only: tuple[str, ...] = ()) -> None:
        """Break requests in the way `kind` names (KINDS); `only` these operations or objects."""
        assert kind in KINDS, kind
        if kind == "refused":
            assert probability == 1 and not only, "a closed port refuses everybody"
            self._call(self._close())
        self._fault = (kind, probability, only)

    def heal(self) -> None:
        self._fault = None
        self._call(self._open())

    def puts(self, since: float = 0.0) -> list[Seen]:
        return [r for r in list(self.requests) if r.operation == "put" and r.time >= since]

    def stored(self, since: float = 0.0) -> list[Seen]:
        """The PUTs that created an object: one for each object, or something was overwritten."""
        return [r for r in self.puts(since) if r.status == 200]

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _open(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, backlog=512
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            _reset(writer)

    def _breaks(self, operation: str, key: str) -> str:
        if self._fault is None:
            return ""
        kind, probability, only = self._fault
        meant = not only or operation in only or key.rpartition("/")[2] in only
        return kind if meant and random.random() < probability else ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                arrived = time.monotonic()
                method, target, fields = _parse(head)
                path, _, query = target.partition("?")
                key = unquote(path).strip("/")
                operation = method.lower() if "/" in key else _bucket_operation(method, query)
                kind = self._breaks(operation, key)

                def seen(status: int, operation=operation, key=key, arrived=arrived) -> None:
                    self.requests.append(Seen(arrived, operation, key, status))

                if kind == "reset":
                    seen(0)
                    return _reset(writer)
                if "100-continue" in fields.get("expect", ""):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await _body(reader, fields)
                if self.latency:
                    await asyncio.sleep(self.latency)
                if kind == "hang":
                    seen(0)
                    await reader.read()  # until the client gives up
                    return
                if kind in ANSWERS:
                    status, answer = ANSWERS[kind][0], _error(*ANSWERS[kind])
                elif self.upstream is None:
                    status, answer = self._answer(method, key, query, fields, body)
                else:
                    if upstream is None:
                        upstream = await asyncio.open_connection(
                            self.upstream.hostname, self.upstream.port, limit=2**20
                        )
                    status, answer, lasting = await _forward(upstream, method, head, body)
                    if not lasting:
                        upstream[1].close()
                        upstream = None
                if kind in ("lost", "torn"):
                    seen(status)
                    if kind == "torn":
                        writer.write(answer[: len(answer) // 2])
                        await writer.drain()
                    return _reset(writer)
                seen(status)
                if method == "HEAD":
                    answer = answer[: answer.index(b"\r\n\r\n") + 4]
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away
        finally:
            self._writers.discard(writer)
            for end in (writer, upstream and upstream[1]):
                if end:
                    end.close()

    def _answer(
        self, method: str, key: str, query: str, fields: dict[str, str], body: bytes
    ) -> tuple[int, bytes]:
        """What S3 answers, from the store in memory: as much of it as s3fs uses."""
        if "/" not in key:
            return (200, self._listing(key, parse_qs(query))) if method == "GET" else (200, _ok())
        if method == "PUT":
            if key in self.store and fields.get("if-none-match") == "*":
                return 412, _error(
                    412,
                    "PreconditionFailed",
                    "At least one of the pre-conditions you specified did not hold",
                    "<Condition>If-None-Match</Condition>",
                )
            self.store[key] = body
            return 200, _ok(etag=self._etag(key))
        if key not in self.store:
            return 404, _error(404, "NoSuchKey", "The specified key does not exist.")
        return 200, _ok(self.store[key], etag=self._etag(key), kind="binary/octet-stream")

    def _etag(self, key: str) -> str:
        return self.etags.get(key) or hashlib.md5(self.store[key]).hexdigest()

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        """One page of ListObjectsV2; the continuation token is the last name of the page before."""
        prefix, delimiter, after, start, size = (
            query.get(name, [default])[0]
            for name, default in (
                ("prefix", ""),
                ("delimiter", ""),
                ("continuation-token", ""),
                ("start-after", ""),
                ("max-keys", "1000"),
            )
        )
        if len(self._sorted) != len(self.store):
            self._sorted = sorted(self.store)
        contents: list[str] = []
        folders: list[str] = []
        token = last = ""
        first = f"{bucket}/{max(after, start, prefix)}"
        for key in self._sorted[bisect.bisect_left(self._sorted, first) :]:
            name = key[len(bucket) + 1 :]
            if not key.startswith(f"{bucket}/{prefix}"):
                break
            if name <= max(after, start):
                continue
            if len(contents) + len(folders) == int(size):
                token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>"
                break
            last = name
            if delimiter and delimiter in name[len(prefix) :]:
                folder = prefix + name[len(prefix) :].partition(delimiter)[0] + delimiter
                if folder not in folders and not after.startswith(folder):
                    folders.append(folder)
                continue
            contents.append(
                f"<Contents><Key>{escape(name)}</Key><ETag>&quot;{self._etag(key)}&quot;</ETag>"
                f"<LastModified>2026-11-23T00:00:00.000Z</LastModified>"
                f"<Size>{len(self.store[key])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        prefixes = "".join(
            f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders
        )
        return _ok(
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>{size}</MaxKeys>"
            f"<KeyCount>{len(contents) + len(folders)}</KeyCount>"
            f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>{token}"
            f"{''.join(contents)}{prefixes}</ListBucketResult>".encode()
        )


def _parse(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    one, two, *_ = first.split(" ")
    pairs = (line.partition(":") for line in rest)
    return one, two, {name.lower(): value.strip() for name, _, value in pairs}


def _bucket_operation(method: str, query: str) -> str:
    if method == "GET":
        return "location" if query.startswith("location") else "list"
    return f"{method.lower()}_bucket"


async def _body(reader: asyncio.StreamReader, fields: dict[str, str]) -> bytes:
    if "chunked" not in fields.get("transfer-encoding", ""):
        return await reader.readexactly(int(fields.get("content-length", 0)))
    raw = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        raw += line + await reader.readexactly(size + 2)
        if not size:
            return raw


async def _forward(upstream, method: str, head: bytes, body: bytes) -> tuple[int, bytes, bool]:
    """The server's status and whole answer, and whether its connection can be used again."""
    reader, writer = upstream
    lines = [ln for ln in head.split(b"\r\n") if not ln.lower().startswith(b"expect:")]
    writer.write(b"\r\n".join(lines) + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    _, status, fields = _parse(answer)
    bodiless = method == "HEAD" or status in ("204", "304")
    closes = fields.get("connection", "").lower() == "close" or answer.startswith(b"HTTP/1.0")
    if not bodiless:
        answer += await _body(reader, fields)
    return int(status), answer, not closes


def _ok(body: bytes = b"", etag: str = "", kind: str = "application/xml") -> bytes:
    tag = f'ETag: "{etag}"\r\n' if etag else ""
    return (
        f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nContent-Type: {kind}\r\n{tag}"
        "Last-Modified: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\n".encode()
        + body
    )


def _error(status: int, code: str, message: str, more: str = "") -> bytes:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
    )
    return (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: a lingering time of zero."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
