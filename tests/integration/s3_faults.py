"""An S3 endpoint that fails on request: a proxy before a real S3 server, or a store of its own.

With `upstream` every request is passed on unchanged (Host too: the signature covers it) and the
answer comes from that server. Without it, a dictionary in memory answers, without signatures:
light enough for 100,000 objects. Either can have the traits of stores that no server here has.
"""

import asyncio
import base64
import bisect
import hashlib
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
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
# What `fail` knows besides. mute: stored, and no answer, ever.
MORE_KINDS = ("mute",)

TRAITS = (
    "object lock",  # a PUT without Content-MD5 or a checksum is refused
    "archived",  # Glacier: objects can be listed and looked at, and not read
    "knows no condition",  # 501 for If-None-Match
    "ignores conditions",  # 200 for If-None-Match, always; in memory only
    "encrypted",  # SSE-KMS: the ETag is not the MD5, and the answer says why; in memory only
)

EXPRESS_SESSION = (
    b"<CreateSessionResult><Credentials><SessionToken>token</SessionToken>"
    b"<SecretAccessKey>secret</SecretAccessKey><AccessKeyId>key</AccessKeyId>"
    b"<Expiration>2100-01-01T00:00:00Z</Expiration></Credentials></CreateSessionResult>"
)


class Seen(NamedTuple):
    """One request: time.monotonic() of its head, put|get|head|list|..., bucket/key, status (0: no
    answer), and the seconds until it was answered."""

    time: float
    operation: str
    key: str
    status: int
    took: float


@dataclass
class Request:
    """What a client asks for; `key` is bucket/key, or the bucket alone."""

    head: bytes
    arrived: float
    body: bytes = b""

    def __post_init__(self) -> None:
        self.method, target, self.fields = _parse(self.head)
        path, _, self.query = target.partition("?")
        self.key = unquote(path).strip("/")
        about_object = "/" in self.key
        self.operation = (
            self.method.lower() if about_object else _bucket_operation(self.method, self.query)
        )

    @property
    def access_key(self) -> str:
        found = re.search("Credential=([^/]*)/", self.fields.get("authorization", ""))
        return found[1] if found else ""


class Pace:
    """A link that lets so many bytes a second through; connections that share one take turns."""

    def __init__(self, rate: float):
        self.rate = rate
        self.free = 0.0  # when all that was asked for so far is through

    async def take(self, count: int) -> None:
        now = time.monotonic()
        self.free = max(self.free, now) + count / self.rate
        await asyncio.sleep(self.free - now)


class FaultyS3:
    """`with FaultyS3(upstream) as s3:` s3.endpoint is for the clients, s3.fail(...) breaks it."""

    def __init__(
        self,
        upstream: str = "",
        *,
        latency: float = 0.0,
        port: int = 0,
        traits: Iterable[str] = (),
        bandwidth: float = 0.0,
        total_bandwidth: float = 0.0,
        buffered: bool = False,
    ):
        self.upstream = urlsplit(upstream) if upstream else None
        self.latency = latency  # seconds before each answer
        self.port = port
        self.traits = set(traits)
        assert self.traits <= set(TRAITS), traits
        self.bandwidth = bandwidth  # bytes a second of what is sent here, by connection
        self.total_bandwidth = total_bandwidth  # the same, of all connections together
        self.buffered = buffered  # the way to the slow link takes all that is sent at once
        self.access_keys: set[str] = set()  # if there are any: all others have expired
        self.requests: list[Seen] = []
        self.received = 0  # bytes of bodies, those of uploads that were broken off too
        self.store: dict[str, bytes] = {}  # bucket/key -> bytes, without upstream
        self._sorted: list[str] = []
        self.etags: dict[str, str] = {}  # bucket/key -> another ETag than the MD5
        self._fault: tuple[str | bytes, float, tuple[str, ...]] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._shared = Pace(total_bandwidth) if total_bandwidth else None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FaultyS3":
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._call(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def fail(self, kind: str, probability: float = 1.0, only: tuple[str, ...] = ()) -> None:
        """Break requests in the way `kind` names (KINDS); `only` these operations, objects, or
        folders (`partition=1/`)."""
        assert kind in (*KINDS, *MORE_KINDS), kind
        if kind == "refused":
            assert probability == 1 and not only, "a closed port refuses everybody"
            self._call(self._close())
        self._fault = (kind, probability, only)

    def answer(self, raw: bytes, probability: float = 1.0, only: tuple[str, ...] = ()) -> None:
        """Answer with these bytes instead, as something on the way to S3 does: see page(),
        redirect(), s3_error()."""
        self._fault = (raw, probability, only)

    def heal(self) -> None:
        self._fault = None
        self._call(self._open())

    def puts(self, since: float = 0.0) -> list[Seen]:
        return self.seen("put", since)

    def seen(self, operation: str, since: float = 0.0) -> list[Seen]:
        return [r for r in list(self.requests) if r.operation == operation and r.time >= since]

    def stored(self, since: float = 0.0) -> list[Seen]:
        """The PUTs that created an object: one for each object, or something was overwritten."""
        return [r for r in self.puts(since) if r.status == 200]

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _open(self) -> None:
        if self._server is None:
            narrow = bool(self.bandwidth or self.total_bandwidth) and not self.buffered
            listener = _listener(self.port, narrow)
            self._server = await asyncio.start_server(
                self._serve, sock=listener, backlog=512, limit=2**13 if narrow else 2**16
            )
            self.port = listener.getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            _reset(writer)

    async def _end(self) -> None:
        await self._close()
        open_connections = asyncio.all_tasks() - {asyncio.current_task()}
        for task in open_connections:
            task.cancel()
        await asyncio.gather(*open_connections, return_exceptions=True)

    def _breaks(self, operation: str, key: str) -> str | bytes:
        if self._fault is None:
            return ""
        kind, probability, only = self._fault
        folders = [name for name in only if name.endswith("/")]
        meant = (
            not only
            or operation in only
            or key.rpartition("/")[2] in only
            or any(f"/{folder}" in key for folder in folders)
        )
        return kind if meant and random.random() < probability else ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        upstream = _Upstream(self.upstream)
        pace = self._shared or (Pace(self.bandwidth) if self.bandwidth else None)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = Request(head, time.monotonic())
                if not await self._exchange(request, reader, writer, upstream, pace):
                    return
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away
        finally:
            self._writers.discard(writer)
            writer.close()
            upstream.close()

    async def _exchange(
        self,
        request: Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: "_Upstream",
        pace: Pace | None,
    ) -> bool:
        """Answer one request, or not; whether the connection lasts."""
        kind = self._breaks(request.operation, request.key)

        def seen(status: int) -> None:
            took = time.monotonic() - request.arrived
            self.requests.append(
                Seen(request.arrived, request.operation, request.key, status, took)
            )

        if kind == "reset":
            seen(0)
            _reset(writer)
            return False
        if "100-continue" in request.fields.get("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = await self._receive(reader, request.fields, pace)
        if self.latency:
            await asyncio.sleep(self.latency)
        if kind == "hang":
            seen(0)
            await reader.read()  # until the client gives up
            return False
        status, answer = await self._answer(kind, request, upstream)
        seen(status)
        if kind == "mute":
            await reader.read()
            return False
        if kind in ("lost", "torn"):
            if kind == "torn":
                writer.write(answer[: len(answer) // 2])
                await writer.drain()
            _reset(writer)
            return False
        if request.method == "HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        writer.write(answer)
        await writer.drain()
        return True

    async def _receive(
        self, reader: asyncio.StreamReader, fields: dict[str, str], pace: Pace | None
    ) -> bytes:
        """The body of a request, as fast as the link lets it through."""
        if pace is None or "chunked" in fields.get("transfer-encoding", ""):
            body = await _body(reader, fields)
            self.received += len(body)
            return body
        left = int(fields.get("content-length", 0))
        parts = []
        while left:
            parts.append(await reader.readexactly(min(left, 4096)))
            left -= len(parts[-1])
            self.received += len(parts[-1])
            await pace.take(len(parts[-1]))
        return b"".join(parts)

    async def _answer(
        self, kind: str | bytes, request: Request, upstream: "_Upstream"
    ) -> tuple[int, bytes]:
        """The status and the whole answer: of the fault, of a trait, or of the store."""
        if isinstance(kind, bytes):
            return int(kind.split(b" ", 2)[1]), kind
        if kind in ANSWERS:
            return ANSWERS[kind][0], s3_error(*ANSWERS[kind])
        if refusal := self._refusal(request):
            return refusal[0], s3_error(*refusal)
        if self.upstream is None:
            return self._from_memory(request)
        return await upstream.forward(request)

    def _refusal(self, request: Request) -> tuple[int, str, str] | None:
        """Status, code and message where a store with these traits refuses; None else."""
        fields = request.fields
        if self.access_keys and request.access_key not in self.access_keys:
            return ANSWERS["400"]
        if request.operation == "get" and "archived" in self.traits:
            message = "The operation is not valid for the object's storage class"
            return 403, "InvalidObjectState", message
        if request.operation != "put":
            return None
        if "if-none-match" in fields and "knows no condition" in self.traits:
            message = "A header you provided implies functionality that is not implemented"
            return 501, "NotImplemented", message
        promised = fields.get("content-md5")
        checked = promised or any(name.startswith("x-amz-checksum-") for name in fields)
        if "object lock" in self.traits and not checked:
            message = (
                "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests"
                " with Object Lock parameters"
            )
            return 400, "InvalidRequest", message
        if promised and promised != base64.b64encode(hashlib.md5(request.body).digest()).decode():
            return 400, "BadDigest", "The Content-MD5 you specified did not match what we received."
        return None

    def _from_memory(self, request: Request) -> tuple[int, bytes]:
        """What S3 answers, from the store in memory: as much of it as s3fs uses."""
        key = request.key
        if request.operation == "session":
            return 200, _ok(EXPRESS_SESSION)
        if request.operation in ("list", "location"):
            return 200, _ok(self._listing(key, parse_qs(request.query)))
        if "/" not in key:
            return 200, _ok()
        if request.method == "PUT":
            conditional = request.fields.get("if-none-match") == "*"
            if key in self.store and conditional and "ignores conditions" not in self.traits:
                return 412, s3_error(
                    412,
                    "PreconditionFailed",
                    "At least one of the pre-conditions you specified did not hold",
                    "<Condition>If-None-Match</Condition>",
                )
            self.store[key] = request.body
            return 200, _ok(fields=self._etag_fields(key))
        if key not in self.store:
            return 404, s3_error(404, "NoSuchKey", "The specified key does not exist.")
        fields = {**self._etag_fields(key), "Content-Type": "binary/octet-stream"}
        return 200, _ok(self.store[key], fields)

    def _etag(self, key: str) -> str:
        if key in self.etags:
            return self.etags[key]
        cipher = b"encrypted: " if "encrypted" in self.traits else b""
        return hashlib.md5(cipher + self.store[key]).hexdigest()

    def _etag_fields(self, key: str) -> dict[str, str]:
        fields = {"ETag": f'"{self._etag(key)}"'}
        if "encrypted" in self.traits:
            fields["x-amz-server-side-encryption"] = "aws:kms"
        return fields

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
        return (
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
    if method != "GET":
        return f"{method.lower()}_bucket"
    return next((name for name in ("location", "session") if query.startswith(name)), "list")


def _listener(port: int, narrow: bool) -> socket.socket:
    """A socket to listen at. The loopback takes megabytes at once; a narrow one takes a few packets
    of the usual size, as a slow link between two machines does."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if narrow:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**13)
    listener.bind(("127.0.0.1", port))
    return listener


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


class _Upstream:
    """A connection to the real server, made when it is needed and kept while it lasts."""

    def __init__(self, address):
        self.address = address
        self.ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def forward(self, request: Request) -> tuple[int, bytes]:
        """The server's status and whole answer."""
        if self.ends is None:
            self.ends = await asyncio.open_connection(
                self.address.hostname, self.address.port, limit=2**20
            )
        reader, writer = self.ends
        lines = [ln for ln in request.head.split(b"\r\n") if not ln.lower().startswith(b"expect:")]
        writer.write(b"\r\n".join(lines) + request.body)
        answer = await reader.readuntil(b"\r\n\r\n")
        _, status, fields = _parse(answer)
        closes = fields.get("connection", "").lower() == "close" or answer.startswith(b"HTTP/1.0")
        if request.method != "HEAD" and status not in ("204", "304"):
            answer += await _body(reader, fields)
        if closes:
            self.close()
        return int(status), answer

    def close(self) -> None:
        if self.ends is not None:
            self.ends[1].close()
            self.ends = None


def _ok(body: bytes = b"", fields: dict[str, str] | None = None) -> bytes:
    fields = {"Content-Type": "application/xml", **(fields or {})}
    return raw_answer(200, body, {**fields, "Last-Modified": "Mon, 23 Nov 2026 00:00:00 GMT"})


def raw_answer(status: int, body: bytes = b"", fields: dict[str, str] | None = None) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status} -"]
    if status != 204:
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def page(status: int = 200) -> bytes:
    """A page for people: what a captive portal, a proxy or a balancer answers in S3's place."""
    body = b"<!DOCTYPE html>\n<html><body><p>Welcome to our network<br>Sign in</body></html>"
    return raw_answer(status, body, {"Content-Type": "text/html"})


def undecodable(status: int = 502) -> bytes:
    """An answer that calls its body gzip, and it is none."""
    fields = {"Content-Type": "text/html; charset=utf-8", "Content-Encoding": "gzip"}
    return raw_answer(status, b"<html>\xff\xfe Bad gateway</html>", fields)


def redirect(status: int, location: str, region: str = "") -> bytes:
    """Somebody else is to be asked: S3 names the region of the bucket too."""
    fields = {"Location": location}
    if region:
        fields["x-amz-bucket-region"] = region
    body = b"<Error><Code>PermanentRedirect</Code><Message>Use another endpoint.</Message></Error>"
    return raw_answer(status, body, {"Content-Type": "application/xml", **fields})


def s3_error(status: int, code: str, message: str, more: str = "") -> bytes:
    """S3's own refusal."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
    )
    return raw_answer(status, body.encode(), {"Content-Type": "application/xml"})


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: a lingering time of zero."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
