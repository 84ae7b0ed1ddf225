"""A server of a fake vLLM in a thread of this process, for the tests of what speaks to one."""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any

from fake_sampler import FakeSampler
from rlhf_plugins.engines.vllm.sampler import Settings
from rlhf_plugins.engines.vllm.serve import HTTPServer, serve
from rlhf_plugins.engines.vllm.service import Service

TOKEN = "a-token-of-the-tests"


class Running:
    """One that runs already."""

    def __init__(self, **arguments: Any) -> None:
        """arguments: see `FakeSampler`."""
        self.service = Service(Settings("m", arguments))
        server = HTTPServer("127.0.0.1", 0, TOKEN, self.service)
        self.url = f"http://127.0.0.1:{server.server_port}"
        self.error: Exception | None = None
        """What it ended by."""

        def work() -> None:
            try:
                serve(server, FakeSampler)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """Whatever is sent, and what comes back."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=10)
        connection.putrequest(method, path)
        given = {"Authorization": f"Bearer {TOKEN}", "Content_Length": str(len(body)), **headers}
        for name, value in given.items():
            if value:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
