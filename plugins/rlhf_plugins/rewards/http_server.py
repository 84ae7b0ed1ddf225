"""A small reward server: a Python function behind the protocol of `--reward http`.

    python -m rlhf_plugins.rewards.http_server reward.py:score --port 8200

The function is called as `--reward python` calls it: by name, with what it has parameters for, a completion at a time,
or with lists where it has a parameter `completions`. One that raises has no score for what it was given. It is called
by one request at a time. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.api import RequestError
from rlhf_plugins.answering import Handler, Server, Wrong
from rlhf_plugins.engines.vllm.secret import token_of
from rlhf_plugins.rewards.function import load_function, parameters
from rlhf_plugins.rewards.http.protocol import VERSION
from rlhf_plugins.rewards.remote import is_loopback

_MOST = 64 << 20
"""Bytes of a request."""


class Function:
    """Scores items by a user's function."""

    def __init__(self, function: Callable[..., Any], flag: str = "PATH") -> None:
        """
        Raises:
            RequestError: the function can't be called by name.
        """
        self._function = function
        self._takes = parameters(function, flag)
        self._batched = "completions" in self._takes.names
        self._lock = threading.Lock()

    def scores(self, items: Sequence[Mapping[str, Any]]) -> list[Any]:
        """What the protocol says of each item."""
        if not items:
            return []
        with self._lock:
            if not self._batched:
                return [self._one(item) for item in items]
            names = dict.fromkeys(name for item in items for name in item["columns"])
            lists = {name: [item["columns"].get(name) for item in items] for name in names}
            own = {key + "s": [item[key] for item in items] for key in ("prompt", "completion")}
            try:
                found = list(self._function(**self._given({**lists, **own})))
                if len(found) != len(items):
                    raise ValueError(f"{len(found)} scores for {len(items)} completions")
                return [_score(one) for one in found]
            except Exception as error:
                return [{"error": f"{type(error).__name__}: {error}"}] * len(items)

    def _one(self, item: Mapping[str, Any]) -> Any:
        given = {**item["columns"], "prompt": item["prompt"], "completion": item["completion"]}
        try:
            return _score(self._function(**self._given(given)))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _given(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What the function has parameters for."""
        missing = [name for name in self._takes.required if name not in found]
        if missing:
            raise TypeError(f"no {', '.join(missing)} was sent: --reward.http.columns {','.join(missing)}")
        if self._takes.all_columns:
            return dict(found)
        return {name: found[name] for name in self._takes.names if name in found}


def _score(value: Any) -> Any:
    """A number, or a mapping of the protocol's.

    Raises:
        ValueError, TypeError: neither.
    """
    if isinstance(value, Mapping):
        return {"score": _score(value["score"]), "parts": {k: float(v) for k, v in value.get("parts", {}).items()}}
    if hasattr(value, "why"):  # rlhf.api.Failed
        return {"error": str(value.why)}
    if isinstance(value, str | bytes):
        raise TypeError(f"the function returned {value!r}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the function returned {number}")
    return number


class _Handler(Handler):
    server: RewardServer
    server_version = "rlhf-reward"

    def do_POST(self) -> None:  # noqa: N802 - as http.server asks
        said: dict[str, Any]
        try:
            status, said = 200, {"scores": self.server.function.scores(self._items())}
        except Wrong as wrong:
            status, said = wrong.status, {"error": wrong.why}
        self.answer(status, json.dumps(said).encode())

    def _items(self) -> list[Mapping[str, Any]]:
        if self.server.token:
            self.let_in(self.server.token)
        body = self.body(_MOST)
        try:
            asked = json.loads(body)
            version, items = asked["version"], asked["items"]
            if version != VERSION:
                raise Wrong(400, f"the request is of version {version!r}, this server of {VERSION}")
            for item in items:
                if not (isinstance(item["completion"], str) and isinstance(item["columns"], dict) and "prompt" in item):
                    raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Wrong(400, "not a request of docs/how-to/rewards.md") from None
        return list(items)


class RewardServer(Server):
    """Answers by a function."""

    def __init__(self, host: str, port: int, function: Function, token: str = "") -> None:
        self.function, self.token = function, token
        super().__init__((host, port), _Handler)


def main(arguments: Sequence[str]) -> int:
    """What is typed: 0 when told to end, 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_plugins.rewards.http_server", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="PATH", help="FILE.py:FUNCTION or MODULE:FUNCTION")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this host alone)")
    parser.add_argument("--port", default=8200, type=int, help="port to listen at; 0 takes a free one (default: 8200)")
    parser.add_argument(
        "--token-file", type=Path, help="ask for the token in this file; written with a new one where it isn't there"
    )
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    if given.token_file is None and not is_loopback(given.host):
        parser.error(f"--host {given.host}: whoever reaches it could use it; add --token-file FILE")
    if ":" not in given.path:
        parser.error(f"{given.path}: is not FILE.py:FUNCTION or MODULE:FUNCTION")
    try:
        function = Function(load_function(given.path, given.path), given.path)
        token = token_of(given.token_file) if given.token_file else ""
        server = RewardServer(given.host, given.port, function, token)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--host {given.host} --port {given.port}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"listening at http://{given.host}:{server.server_port}", file=sys.stderr, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 130
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
