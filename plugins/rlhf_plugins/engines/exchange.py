"""One HTTP request and its answer, within a deadline that holds for all of it.

No redirects are followed and no proxy is asked: a token goes to the host that was named, and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import attrs

from rlhf.api import Problem, RequestError


@attrs.frozen
class Reply:
    """What came back."""

    status: int
    body: bytes
    headers: Mapping[str, str]  # names in lower case


@attrs.frozen
class Address:
    """Where a server is."""

    tls: bool
    host: str
    port: int
    path: str
    """Before that of each request; without a slash at its end."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


def address_of(url: str, option: str) -> Address:
    """Read a URL.

    Args:
        option: that gave it, for the message.

    Raises:
        RequestError: it is none of http or https, or holds a user, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
        shown = f"{parts.scheme}://...@{host}" if parts.username else url  # a password may stand there
        what = f"{option} {shown}: not the address of a server"
        raise RequestError(Problem(what, "write http://HOST:PORT or https://HOST:PORT/PATH; a token goes elsewhere"))
    tls = parts.scheme == "https"
    return Address(tls, host, port or (443 if tls else 80), parts.path.rstrip("/"))


def exchange(
    to: Address,
    method: str,
    path: str,
    body: bytes | memoryview = b"",
    headers: Mapping[str, str] | None = None,
    *,
    seconds: float,
    limit: int,
) -> Reply:
    """Send a request and read its answer.

    Args:
        seconds: for all of it, from the connection to the last byte.
        limit: bytes of the answer at most.

    Raises:
        TimeoutError: the deadline passed.
        OSError: no connection, or it broke, or what came back is no HTTP, or too long.
    """
    kind = http.client.HTTPSConnection if to.tls else http.client.HTTPConnection
    connection = kind(to.host, to.port, timeout=seconds)
    end = time.monotonic() + seconds
    late = threading.Event()

    def stop() -> None:
        late.set()
        if connection.sock is not None:
            with contextlib.suppress(OSError):  # it broke meanwhile
                connection.sock.shutdown(socket.SHUT_RDWR)

    # A socket's own timeout begins anew with every byte; this one doesn't.
    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        connection.request(method, to.path + path, body=body or None, headers=dict(headers or {}))
        answer = connection.getresponse()
        content = answer.read(limit + 1)
        if late.is_set():
            raise TimeoutError
        if len(content) > limit:
            raise OSError(f"an answer of more than {limit} bytes")
        if answer.length:  # read(n) takes an early end for the end
            raise OSError(f"{answer.length} bytes of the answer are missing")
        return Reply(answer.status, content, {name.lower(): value for name, value in answer.getheaders()})
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError) or time.monotonic() >= end:
            raise TimeoutError(f"no answer within {seconds:g} s") from error
        if isinstance(error, OSError):
            raise
        raise OSError(f"no HTTP came back: {type(error).__name__}: {error}") from error
    finally:
        timer.cancel()
        connection.close()
