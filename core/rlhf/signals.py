"""Requests to stop: Ctrl-C, SIGTERM, SIGHUP. `raised` ends what is at work at once, `noted` lets it come to an end.

The first holds from the first moment of a command, the second while a run makes its steps: then there is something
to finish and to save.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import attrs

_STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@attrs.define
class Asked:
    """The signal that asked first, if any did."""

    number: int | None = None


@contextlib.contextmanager
def raised() -> Iterator[Asked]:
    """Each signal raises KeyboardInterrupt, which no library takes for an error of its own; SIGTERM does so once, as
    whoever sends it sends it again and again."""
    asked = Asked()

    def stop(number: int, frame: FrameType | None) -> None:
        if asked.number is None or number == signal.SIGINT:
            asked.number = number
            raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled(stop):
        yield asked


@contextlib.contextmanager
def noted(tell: Callable[[int], None]) -> Iterator[None]:
    """Signals are told and nothing else, but for a second Ctrl-C, which raises KeyboardInterrupt."""
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt(signal.Signals(number).name)
        asked.number = number
        tell(number)

    with _handled(note):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    try:
        for number in _STOPPING:
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: its owner looks after signals
        pass
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
