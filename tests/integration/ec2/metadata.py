"""Instance metadata service, version 2: tokens by PUT, values only with a token.

Usage: metadata.py FOLDER. FOLDER holds a file for each instance, named by its private address,
with its public address or nothing inside.
"""

import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKENS: set[str] = set()


class Metadata(BaseHTTPRequestHandler):
    def answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token":
            return self.answer(404)
        if not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
            return self.answer(400)
        TOKENS.add(secrets.token_hex())
        self.answer(200, next(iter(TOKENS)))

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") not in TOKENS:
            return self.answer(401)
        private = self.client_address[0]
        public = Path(sys.argv[1], private)
        values = {
            "local-ipv4": private,
            "public-ipv4": public.read_text() if public.exists() else "",
        }
        value = values.get(self.path.removeprefix("/latest/meta-data/"))
        self.answer(200, value) if value else self.answer(404)


if __name__ == "__main__":
    ThreadingHTTPServer(("169.254.169.254", 80), Metadata).serve_forever()
