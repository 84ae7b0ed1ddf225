"""A vLLM in a process of its own, behind HTTP: started by a run beside itself, or by hand on another GPU or host.

    python -m rlhf_plugins.engines.vllm.serve --model Qwen/Qwen3-1.7B --token-file engine.token --port 8100

Left out: encryption. Bound to anything else than this host, it belongs behind an SSH tunnel or a TLS proxy. `wire` says
what it is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.api import Problem, RequestError
from rlhf_plugins.answering import Handler, Server, Wrong
from rlhf_plugins.engines.vllm import buckets, group, ipc, wire
from rlhf_plugins.engines.vllm.sampler import Settings
from rlhf_plugins.engines.vllm.secret import token_of
from rlhf_plugins.engines.vllm.service import Conflict, ServedSampler, Service, Taken, sampler_class


class _Handler(Handler):
    """Reads requests and checks them; `Service` answers."""

    server: HTTPServer
    server_version = "rlhf-engine"

    def do_GET(self) -> None:  # noqa: N802 - as http.server asks
        self._answer("GET")

    def do_POST(self) -> None:  # noqa: N802 - as http.server asks
        self._answer("POST")

    def _answer(self, method: str) -> None:
        try:
            status, message = 200, self._answered(method)
        except Wrong as wrong:
            status, message = wrong.status, wire.Refusal(wrong.why)
        except wire.WireError as error:
            status, message = 400, wire.Refusal(str(error))
        except Conflict as error:
            status, message = 409, wire.Refusal(str(error))
        except Taken as error:
            status, message = 423, wire.Refusal(str(error))
        except Exception as error:
            status, message = 500, wire.Refusal(f"{type(error).__name__}: {error}"[:2000])
        self.answer(status, wire.write(message))

    def _answered(self, method: str) -> Any:
        # The token before anything else: who hasn't it learns nothing, and sends nothing that is read.
        self.let_in(self.server.token)
        service = self.server.service
        if (method, self.path) == ("GET", "/health"):
            return service.health()
        if (method, self.path) == ("POST", "/load/body"):
            load = self.headers.get("X-Load", "")
            return service.bucket(load, buckets.from_bytes(self.body(wire.MOST_WEIGHTS)))
        if (method, self.path) == ("POST", "/load/file"):
            asked = wire.read(self.body(wire.MOST_JSON), wire.Bucket)
            return service.bucket(asked.load, buckets.take(asked.path))
        routes: dict[tuple[str, str], tuple[type[Any], Callable[[Any], Any]]] = {
            ("POST", "/open"): (wire.Open, service.open),
            ("POST", "/shared"): (wire.Shared, service.shared),
            ("POST", "/shared/gpu"): (ipc.Probe, service.sees),
            ("POST", "/group"): (group.Join, lambda join: service.meet(join, self.connection.getsockname()[0])),
            ("POST", "/group/text"): (group.Text, service.met),
            ("POST", "/group/leave"): (group.Leave, service.leave),
            ("POST", "/load"): (wire.Begin, service.begin),
            ("POST", "/load/gpu"): (ipc.Laid, service.announce),
            ("POST", "/load/broadcast"): (group.Coming, service.announce),
            ("POST", "/load/check"): (wire.Begun, service.check),
            ("POST", "/load/end"): (wire.End, service.end),
            ("POST", "/sample"): (wire.SampleRequest, service.sample),
            ("POST", "/score"): (wire.ScoreRequest, service.score),
            ("POST", "/fingerprints"): (wire.PrintsRequest, service.prints),
            ("POST", "/sleep"): (wire.Nothing, service.sleep),
            ("POST", "/wake"): (wire.Nothing, service.wake),
        }
        if (method, self.path) == ("POST", "/shutdown"):
            service.stop()
            return wire.Done(service.health().version)
        if (method, self.path) not in routes:
            raise Wrong(404, f"there is no {method} {self.path[:80]}")
        kind, answer = routes[method, self.path]
        return answer(wire.read(self.body(wire.MOST_JSON), kind))


class HTTPServer(Server):
    """Answers at an address."""

    def __init__(self, host: str, port: int, token: str, service: Service) -> None:
        if len(token) < 16:
            raise RequestError(Problem("the token has fewer than 16 characters", "leave it out, and one is made"))
        self.token, self.service = token, service
        super().__init__((host, port), _Handler)


def serve(server: HTTPServer, make: Callable[[Settings], ServedSampler]) -> None:
    """Answer until a client or a signal ends it; `make` and all of the sampler's work run on this thread."""
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    try:
        server.service.work(make)
    finally:
        server.shutdown()
        server.server_close()


def beside() -> int:
    """Serve whoever started this process: a line on its standard input says what, the end of that input is the end of
    the one that wrote it. The first line on the standard output is the port; all else goes to the standard error."""
    told = json.loads(sys.stdin.readline())
    out = os.dup(1)
    os.dup2(2, 1)  # libraries print there
    service = Service(Settings(**told["settings"]))

    def watch() -> None:
        while os.read(0, 4096):
            pass
        if service.folder is not None:  # the one who would have removed it is gone
            for file in service.folder.glob("*"):
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                service.folder.rmdir()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
    server = HTTPServer("127.0.0.1", 0, told["token"], service)
    with os.fdopen(out, "w") as stream:
        stream.write(f"{server.server_port}\n")
    serve(server, sampler_class(told["sampler"]))
    return 0


def main(arguments: Sequence[str]) -> int:
    """What is typed: 0 when told to end, 2 for a wrong request."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_plugins.engines.vllm.serve", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="folder or hub id; a run's weights replace its own")
    parser.add_argument(
        "--token-file", required=True, type=Path, help="written, with a new token, where it isn't there"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this host alone)")
    parser.add_argument("--port", default=8100, type=int, help="port to listen at; 0 takes a free one (default: 8100)")
    parser.add_argument(
        "--arguments", default="{}", help='more arguments of vllm.LLM, as JSON: \'{"dtype": "float32"}\''
    )
    parser.add_argument("--sampler", default=wire.IN_PROCESS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        more = json.loads(given.arguments)
        if not isinstance(more, dict):
            raise ValueError("not an object")
    except ValueError as error:
        parser.error(f"--arguments {given.arguments}: {error}")
    try:
        server = HTTPServer(given.host, given.port, token_of(given.token_file), Service(Settings(given.model, more)))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--host {given.host} --port {given.port}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"listening at http://{given.host}:{server.server_port}", file=sys.stderr)
    try:
        serve(server, sampler_class(given.sampler))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:]) if sys.argv[1:] != ["--beside"] else beside()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except RequestError as error:
        print(error, file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for threads of a library that never end
