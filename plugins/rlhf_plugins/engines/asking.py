"""Questions to a server over HTTP: several at once, each asked again until it is answered or its tries are used up.

What a server says may hold what it was sent, so the token is taken out of every message.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf_plugins.engines.exchange import Address, Reply, exchange

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses after which another try may do better."""
FIRST_PAUSE = 0.5
"""Seconds before the first retry; up to twice as many, so that those that failed together don't come back together."""
LONGEST_PAUSE = 60.0
"""Seconds, whatever the server asks for."""
_LIMIT = 16 << 20
"""Bytes of an answer."""
T = TypeVar("T")


class Unusable(Exception):  # noqa: N818 - another try may do better
    """Why a try gave nothing; how many seconds the server wants to be left alone, if it says so."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


class Refused(Exception):  # noqa: N818 - an answer
    """The server answers what no other try would mend."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Asker:
    """Asks one server."""

    def __init__(self, to: Address, token: str = "", *, seconds: float, retries: int, concurrency: int = 1) -> None:
        """
        Args:
            token: sent as `Authorization: Bearer`; empty, none is.
            seconds: for each try, from the connection to the last byte.
            retries: tries after the first.
            concurrency: questions under way at once.
        """
        self.to = to
        self._token = token
        self._seconds = seconds
        self._retries = retries
        self._concurrency = concurrency
        self.over = threading.Event()
        """One question has ended it all: the others need no more tries."""

    def ask(self, path: str, body: bytes, read: Callable[[bytes], T], seed: int | str) -> T:
        """The answer to a JSON body, as `read` understands it.

        Args:
            path: after the server's address.
            read: of an answer with status 200; may raise `Unusable` to have it asked again.
            seed: of the pauses' jitter.

        Raises:
            Unusable: the last try's, after all of them.
            Refused: another status than 200, after which no try would do better.
        """
        jitter = random.Random(seed)
        for attempt in range(self._retries + 1):
            try:
                return read(self._content(self._post(path, body)))
            except Unusable as error:
                pause = max(error.pause, FIRST_PAUSE * 2**attempt * (1 + jitter.random()))
                if attempt == self._retries or self.over.wait(min(LONGEST_PAUSE, pause)):
                    raise
        raise AssertionError

    def every(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """What each gives, in order; as many at once as `concurrency` says. See `every`."""
        return every(work, self._concurrency, self.over)

    def clean(self, text: str, most: int | None = None) -> str:
        """One line without the token, of so many characters at most: cut after, since half a token is one too."""
        return " ".join((text.replace(self._token, "***") if self._token else text).split())[:most]

    def look(self, path: str, seconds: float) -> Reply:
        """A GET, once, whatever its status.

        Raises:
            Unusable: nobody answers.
        """
        return self._exchange("GET", path, b"", seconds)

    def _post(self, path: str, body: bytes) -> Reply:
        return self._exchange("POST", path, body, self._seconds)

    def _exchange(self, method: str, path: str, body: bytes, seconds: float) -> Reply:
        headers = {"Content-Type": "application/json"} if body else {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            return exchange(self.to, method, path, body, headers, seconds=seconds, limit=_LIMIT)
        except OSError as error:
            raise Unusable(self.clean(f"no answer of {self.to}: {error.strerror or error}")) from error

    def _content(self, reply: Reply) -> bytes:
        if reply.status == 200:
            return reply.body
        why = f"{self.to} answers {reply.status}: {self.clean(reply.body.decode(errors='replace'), 500)}"
        if reply.status in AGAIN:
            pause = reply.headers.get("retry-after", "")
            raise Unusable(why, float(pause) if pause.isascii() and pause.isdigit() else 0.0)
        raise Refused(reply.status, why)


def every(work: Sequence[Callable[[], T]], concurrency: int, over: threading.Event) -> list[T]:
    """What each gives, in order, by so many threads. The first error ends it all, and so does Ctrl-C: it is raised
    without waiting for those under way, whose threads end by their own deadlines, or by `over`, or with the process.

    Args:
        over: cleared first, and set when it has ended early.
    """
    over.clear()
    found: list[Any] = [None] * len(work)
    failed: dict[int, BaseException] = {}
    left = iter(range(len(work)))
    lock = threading.Lock()

    def some() -> None:
        while not over.is_set():
            with lock:
                place = next(left, None)
            if place is None:
                return
            try:
                found[place] = work[place]()
            except BaseException as error:
                failed[place] = error
                over.set()

    count = min(concurrency, len(work))
    threads = [threading.Thread(target=some, name=f"ask-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive() and not failed:
                thread.join(0.1)
    except BaseException:
        over.set()
        raise
    if failed:
        raise failed[min(list(failed))]
    return found
