"""A small reference server of `POST /v1/completions` and its like, as OpenAI and vLLM speak it; a script makes it
misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = tuple[int, Any] | Callable[[dict[str, Any]], tuple[int, Any]]
"""A status with what is said, or what makes them of a request."""


def completed(text: str = "ab", reason: str = "stop") -> tuple[int, Any]:
    return 200, {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def chatted(text: Any) -> tuple[int, Any]:
    """An answer of `POST /v1/chat/completions`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {"object": "chat.completion", "choices": [choice]}


class ReferenceEndpoint:
    """Answers requests, in the order they come, by a script of steps; after its end with `completed()`."""

    def __init__(self, *script: Step, delay: float = 0.0, models: int = 200, **headers: str) -> None:
        """
        Args:
            models: the status of `GET /v1/models`.
        """
        self.asked: list[dict[str, Any]] = []
        self.authorised: list[str | None] = []
        self.most = 0
        """Requests under way at once."""
        steps, lock = iter(script), threading.Lock()
        under_way = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal under_way
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    under_way += 1
                    outer.most = max(outer.most, under_way)
                    outer.asked.append({"path": self.path, **body})
                    outer.authorised.append(self.headers.get("Authorization"))
                    step = next(steps, None)
                time.sleep(delay)
                status, said = completed() if step is None else step(body) if callable(step) else step
                with lock:
                    under_way -= 1
                self.answer(status, said)

            def do_GET(self) -> None:
                self.answer(models, {"object": "list", "data": []})

            def answer(self, status: int, said: Any) -> None:
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Not a line on stderr for every request."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that let its deadline pass is gone when the answer comes, which is what such a test is of;
                the server would print a traceback of it. What a handler itself gets wrong shows as no answer."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def endpoints() -> Iterator[Callable[..., ReferenceEndpoint]]:
    """Makes endpoints, and closes them at the end."""
    with contextlib.ExitStack() as closing:

        def make(*script: Any, **options: Any) -> ReferenceEndpoint:
            made = ReferenceEndpoint(*script, **options)
            closing.callback(made.close)
            return made

        yield make
