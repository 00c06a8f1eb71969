"""A small HTTP proxy: the way of the test machines to the registries of packages.

It listens where its socket was made, on the network of the tests, and connects from where it was
started, which is the machine that runs them.
"""

import contextlib
import select
import shutil
import socket
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Proxy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """apt: the whole address is in the request."""
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        request = urllib.request.Request(self.path, headers=headers)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        except OSError as error:
            return self.send_error(502, str(error))
        with answer:
            self.send_response(answer.status or 502)
            for name in ("Content-Length", "Content-Type", "Last-Modified", "Content-Range"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            shutil.copyfileobj(answer, self.wfile)

    def do_CONNECT(self) -> None:
        """pip: TLS to a host and port, of which only the two ends know the content."""
        host, _, port = self.path.rpartition(":")
        try:
            there = socket.create_connection((host, int(port)), 60)
        except OSError as error:
            return self.send_error(502, str(error))
        self.send_response(200)
        self.end_headers()
        with there, contextlib.suppress(OSError):
            relay(self.connection, there)

    def log_message(self, format: str, *args: object) -> None:
        pass


def relay(one: socket.socket, other: socket.socket) -> None:
    """Copy bytes both ways until either end closes."""
    peer = {one: other, other: one}
    while True:
        ready, _, _ = select.select(list(peer), [], [], 120)
        for end in ready:
            data = end.recv(65536)
            if not data:
                return
            peer[end].sendall(data)
        if not ready:
            return


def serve(listener: socket.socket) -> ThreadingHTTPServer:
    """Serve on a listening socket, in threads, until shutdown() and server_close()."""
    server = ThreadingHTTPServer(listener.getsockname(), Proxy, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
