"""What the small HTTP servers here do alike: who may ask, how much is read, how it is answered. The standard library
alone."""

from __future__ import annotations

import contextlib
import hmac
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Wrong(Exception):  # noqa: N818 - an answer
    """The request gets this status, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Handler(BaseHTTPRequestHandler):
    """One request a connection, answered with JSON."""

    timeout = 60.0
    """Seconds that a client may be silent inside a request."""
    sys_version = ""

    def let_in(self, token: str) -> None:
        """
        Raises:
            Wrong: 401, the request doesn't carry the token.
        """
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, b"Bearer " + token.encode()):
            raise Wrong(401, "the token is missing or wrong")

    def body(self, most: int) -> bytes:
        """The request's body.

        Args:
            most: bytes.

        Raises:
            Wrong: 411 or 413, before anything is read; 400, less came than was said.
        """
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit()):
            raise Wrong(411, "Content-Length is missing")
        if int(text) > most:
            raise Wrong(413, f"{text} bytes; {most} at most")
        body = self.rfile.read(int(text))
        if len(body) != int(text):
            raise Wrong(400, f"{len(body)} bytes came of {text}")
        return body

    def answer(self, status: int, body: bytes) -> None:
        """Send JSON, and end the connection."""
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may be gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not worth a line each."""


class Server(ThreadingHTTPServer):
    """Is bound, and listens, as soon as it is made."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away mid-request is no news."""
