"""One request over HTTP: addresses, deadlines that hold for all of it, answers that are none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rlhf.errors import RequestError
from rlhf_plugins.engines.exchange import address_of, exchange


@pytest.fixture
def speaker() -> Iterator[Callable[..., str]]:
    """A server that says bytes, with a pause after each piece, and then waits or ends."""
    opened: list[socket.socket] = []

    def make(*pieces: bytes, pause: float = 0.0, end: bool = True) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        opened.append(listener)

        def speak() -> None:
            other, _ = listener.accept()
            opened.append(other)
            other.recv(65536)
            try:
                for piece in pieces:
                    other.sendall(piece)
                    time.sleep(pause)
                if end:
                    other.close()
            except OSError:
                pass

        threading.Thread(target=speak, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield make
    for one in opened:
        one.close()


def ask(url: str, seconds: float = 5.0, limit: int = 100) -> tuple[int, bytes]:
    reply = exchange(address_of(url, "--x"), "GET", "/", seconds=seconds, limit=limit)
    return reply.status, reply.body


def test_an_answer(speaker: Callable[..., str]) -> None:
    assert ask(speaker(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")) == (404, b"no")


def test_a_redirect_is_an_answer(speaker: Callable[..., str]) -> None:
    assert ask(speaker(b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere\r\nContent-Length: 0\r\n\r\n")) == (302, b"")


@pytest.mark.parametrize(
    ("pieces", "pause"),
    [
        ([b""], 9.0),  # nothing at all
        ([b"HTTP/1.1 200 OK\r\n"] + [b"X: y\r\n"] * 50, 0.1),  # drop by drop, each in good time
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"] + [b"x"] * 50, 0.1),
    ],
)
def test_the_deadline_holds_for_all_of_it(speaker: Callable[..., str], pieces: list[bytes], pause: float) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
        ask(speaker(*pieces, pause=pause), seconds=0.5)
    assert time.monotonic() - begun < 2.0  # the deadline, and a busy machine


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([b""], "without response"),
        ([b"SSH-2.0-OpenSSH\r\n"], "no HTTP came back"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n" + b"x" * 101], "more than 100 bytes"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"], "5 bytes of the answer are missing"),
    ],
)
def test_what_is_no_answer(speaker: Callable[..., str], pieces: list[bytes], why: str) -> None:
    with pytest.raises(OSError, match=why):
        ask(speaker(*pieces))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        ask(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://host:81", "http://host:81"),
        ("http://host", "http://host:80"),
        ("https://host/v1/", "https://host:443/v1"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_an_address(url: str, found: str) -> None:
    assert str(address_of(url, "--engine.url")) == found


@pytest.mark.parametrize("url", ["", "host:81", "ftp://host", "http://", "http://host:x", "http://h?q", "http://h#f"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(RequestError, match="not the address of a server"):
        address_of(url, "--engine.url")


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(RequestError) as caught:
        address_of("http://me:hush@host", "--engine.url")
    assert "hush" not in str(caught.value)
