"""An engine in another process: what is asked of it arrives, what isn't allowed is refused, no wait is without an end,
and whoever dies is missed at once and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from fake_sampler import DIES, RAISES, STALLS, FakeSampler
from fake_server import TOKEN, Running
from rlhf.errors import RequestError, RunError
from rlhf_plugins.engines.vllm import buckets, wire
from rlhf_plugins.engines.vllm.beside import Beside, environment_of
from rlhf_plugins.engines.vllm.remote import Deadlines, Server
from rlhf_plugins.engines.vllm.sampler import Ask, EngineLost, Settings
from rlhf_plugins.engines.vllm.serve import HTTPServer
from rlhf_plugins.engines.vllm.service import Service

FAKE = "fake_sampler:FakeSampler"
SOON = Deadlines(start=60.0, load=2.0, sample=0.5, pace=1000.0)
WEIGHTS = {"embed": torch.ones(3, 4), "layer": torch.full((2,), 0.5, dtype=torch.bfloat16)}


def ask(*seeds: int, most: int = 8) -> list[Ask]:
    return [Ask((1, 2, seed % 5), seed, most, 1.0) for seed in seeds]


def right(asks: Sequence[Ask], weights: dict[str, torch.Tensor] = WEIGHTS) -> Any:
    """What the same sampler answers in this process."""
    own = FakeSampler(Settings("m", {}))
    own.load(lambda: iter(weights.items()), 0)
    return own.sample(asks)


# One that runs already


def test_it_samples_scores_and_takes_weights(running: Callable[..., Running]) -> None:
    engine = Server(running().url, TOKEN, {}, SOON)
    assert engine.version == -1
    engine.load(lambda: iter(WEIGHTS.items()), 3)
    assert engine.version == 3 and engine.health().version == 3
    assert engine.sample(ask(1, 2, 3)) == right(ask(1, 2, 3))
    assert engine.score([(1, 14, 21), (7, 7)]) == [[-2.0 - 13.0, -3.0 - 13.0], [-1.0 - 13.0]]
    engine.load_adapter({"a": torch.tensor([10.0])}, {"r": 8}, 4)
    assert engine.version == 4
    assert engine.score([(7, 7)]) == [[-1.0 - 23.0]]
    engine.load(lambda: iter(WEIGHTS.items()), 5)
    assert engine.score([(7, 7)]) == [[-1.0 - 13.0]]
    assert engine.sample([]) == [] and engine.score([]) == []
    assert engine.fingerprints({"embed": (3, 4)}) == {"embed": [12.0]}
    engine.sleep()
    engine.wake()
    engine.close()


@pytest.mark.parametrize("shared", [True, False])
def test_weights_go_by_shared_memory_or_else_as_bodies(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not os.path.isdir(wire.SHARED_MEMORY):
        pytest.skip("no /dev/shm here")
    if not shared:  # as of a server that sees another host's
        monkeypatch.setattr(Service, "shared", lambda self, asked: wire.Seen(False))
    ways: list[str] = []
    take, body = buckets.take, buckets.from_bytes
    monkeypatch.setattr(buckets, "take", lambda path: ways.append("file") or take(path))
    monkeypatch.setattr(buckets, "from_bytes", lambda text: ways.append("body") or body(text))
    engine = Server(running().url, TOKEN, {}, SOON)
    engine.load(lambda: iter(WEIGHTS.items()), 0)
    assert ways == (["file"] if shared else ["body"])
    assert engine.sample(ask(5)) == right(ask(5))
    folder = engine._carrier._folder
    assert (folder is not None) == shared
    engine.close()
    assert folder is None or not folder.path.exists()


def test_a_probe_that_says_something_else_is_another_hosts(running: Callable[..., Running]) -> None:
    folder = buckets.SharedFolder()
    try:
        path = folder.probe("this")
        server = running()
        assert server.service.shared(wire.Shared(str(path), "this")).shared
        assert not server.service.shared(wire.Shared(str(path), "that")).shared
        assert not server.service.shared(wire.Shared("/etc/passwd", "this")).shared
    finally:
        folder.close()


def test_no_more_than_a_few_buckets_are_under_way(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model is never there twice: the trainer's stream waits for the engine."""
    given, taken, most = 0, 0, 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal given
        for i in range(20):
            given += 1
            yield str(i), torch.zeros(1)

    def load(self: FakeSampler, weights: Any, version: int) -> None:
        nonlocal taken, most
        for _ in weights():
            time.sleep(0.01)
            most = max(most, given - taken)
            taken += 1
        self.version = version

    monkeypatch.setattr(FakeSampler, "load", load)
    monkeypatch.setattr("rlhf_plugins.engines.vllm.carriers.buckets", lambda weights: buckets.buckets(weights, 4))
    engine = Server(running().url, TOKEN, {}, SOON)
    engine.load(stream, 0)
    engine.close()
    # at the sampler one, waiting one, with a request one, and one that is gathered and shows that the last is full
    assert taken == 20 and most <= 4


def test_the_token_comes_before_all_else(running: Callable[..., Running]) -> None:
    server = running()
    for wrong in ("", "Bearer ", "Bearer another-token-of-the-tests", TOKEN, "Bearer \xff"):
        for method, path in (("GET", "/health"), ("POST", "/sample"), ("POST", "/shutdown"), ("GET", "/nothing")):
            assert server.raw(method, path, Authorization=wrong) == (401, {"error": "the token is missing or wrong"})
    assert server.service.health().state == "waiting"
    with pytest.raises(RequestError, match="refuses the token"):
        Server(server.url, "another-token-of-the-tests", {}, SOON)


def test_a_short_token_is_none() -> None:
    with pytest.raises(RequestError, match="fewer than 16"):
        HTTPServer("127.0.0.1", 0, "short", Service(Settings("m", {})))


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "why"),
    [
        ("GET", "/sample", b"", {}, 404, "there is no GET /sample"),
        ("POST", "/exec", b"{}", {}, 404, "there is no POST /exec"),
        ("POST", "/sample", b"{}", {"Content_Length": ""}, 411, "Content-Length is missing"),
        ("POST", "/sample", b"{}", {"Content_Length": "-1"}, 411, "Content-Length is missing"),
        ("POST", "/sample", b"{}", {"Content_Length": str(1 << 40)}, 413, "at most"),
        ("POST", "/load/body", b"{}", {"Content_Length": str(1 << 40)}, 413, "at most"),
        ("POST", "/sample", b"{}", {}, 400, "lacks asks, run, version"),
        ("POST", "/load/body", b"\x80\x04", {"X_Load": "x"}, 400, "no safetensors"),
        ("POST", "/load/file", b'{"load": "x", "path": "/etc/passwd"}', {}, 400, "not in a folder"),
        (
            "POST",
            "/load",
            b'{"run": "", "version": 0, "adapter": null, "fetched": false, "meeting": ""}',
            {},
            400,
            "has a version from 0 and a run",
        ),
        ("POST", "/load/end", b'{"load": "x", "tensors": 0}', {}, 409, "no such load"),
        ("POST", "/score", b'{"run": "r", "version": 0, "sequences": [[1]]}', {}, 400, "two tokens at least"),
        ("POST", "/score", b'{"run": "r", "version": 0, "sequences": [[1, 2]]}', {}, 409, "no weights of this run"),
    ],
)
def test_what_is_refused(
    running: Callable[..., Running], method: str, path: str, body: bytes, headers: Any, status: int, why: str
) -> None:
    server = running()
    Server(server.url, TOKEN, {}, SOON).close()  # it has started
    found, said = server.raw(method, path, body, **headers)
    assert (found, why in said["error"]) == (status, True), said


def test_nothing_is_sampled_from_other_weights(running: Callable[..., Running]) -> None:
    server = running()
    one, other = Server(server.url, TOKEN, {}, SOON), Server(server.url, TOKEN, {}, SOON)
    with pytest.raises(EngineLost, match="asked of version -1, and the server holds no weights of this run"):
        one.sample(ask(1))
    one.load(lambda: iter(WEIGHTS.items()), 3)
    one.version = 2
    with pytest.raises(EngineLost, match="asked of version 2, and the server holds version 3"):
        one.sample(ask(1))
    other.load(lambda: iter(WEIGHTS.items()), 3)
    one.version = 3
    with pytest.raises(RunError, match="another run has sent its weights here since") as caught:
        one.sample(ask(1))
    assert not isinstance(caught.value, EngineLost)  # another try would find the same
    assert other.sample(ask(1)) == right(ask(1))
    with pytest.raises(EngineLost, match="weights that the adapter is for aren't there"):
        one.load_adapter({"a": torch.ones(1)}, {}, 4)
    for client in (one, other):
        client.close()


def test_a_run_says_what_the_server_must_be_like(running: Callable[..., Running]) -> None:
    server = running(seed=7)
    assert server.service.health().state == "waiting"
    asked = wire.write(wire.Begin("r", 0, None, False, ""))
    assert server.raw("POST", "/load", asked) == (409, {"error": "it has not started"})
    Server(server.url, TOKEN, {"dtype": "float32", "seed": 1}, SOON).close()
    assert server.service._sampler._options == {"dtype": "float32", "seed": 7}  # its own goes before
    Server(server.url, TOKEN, {"dtype": "float32", "seed": 2}, SOON).close()  # another run like it
    with pytest.raises(RunError, match="it was opened with another dtype, max_model_len: start it again"):
        Server(server.url, TOKEN, {"dtype": "bfloat16", "max_model_len": 64}, SOON)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"worker_extension_cls": "os.system"}, "worker_extension_cls is for the server's own --arguments"),
        ({"model": "/etc"}, "model is for the server's own"),
        ({"trust_remote_code": True}, "trust_remote_code is for the server's own"),
        ({"dtype": ["float32"]}, "arguments.dtype must be str"),
        ({"seed": True}, "arguments.seed must be int"),
    ],
)
def test_a_run_may_choose_nothing_that_names_files_or_code(
    running: Callable[..., Running], arguments: dict[str, Any], why: str
) -> None:
    server = running()
    with pytest.raises(RunError, match=why):
        Server(server.url, TOKEN, arguments, SOON)
    assert server.service.health().state == "waiting"


def test_a_server_that_can_not_start_says_why(running: Callable[..., Running]) -> None:
    with pytest.raises(RequestError, match="could not start: ValueError: it was told to fail"):
        Server(running(fail_start=True).url, TOKEN, {}, SOON)
    with pytest.raises(EngineLost, match="it was told to fail"):
        Server(running(fail_start=True).url, TOKEN, {}, SOON, again=True)


def test_a_load_that_breaks_off_leaves_no_weights(running: Callable[..., Running]) -> None:
    server = running()
    engine = Server(server.url, TOKEN, {}, SOON)
    engine.load(lambda: iter(WEIGHTS.items()), 3)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "embed", torch.ones(1)
        raise LookupError("a rank was lost")

    with pytest.raises(LookupError):
        engine.load(broken, 4)
    assert engine.version == -1
    engine.version = 3
    with pytest.raises(EngineLost, match=r"waited 0\.5.* in vain"):  # it waits for the rest
        engine.sample(ask(1))
    engine.load(lambda: iter(WEIGHTS.items()), 4)  # which ends the one before
    assert engine.sample(ask(1)) == right(ask(1))
    engine.close()


def test_a_load_that_lacks_a_tensor_is_none(running: Callable[..., Running]) -> None:
    server = running()
    Server(server.url, TOKEN, {}, SOON).close()  # it has started
    _, begun = server.raw("POST", "/load", wire.write(wire.Begin("r", 0, None, False, "")))
    body = buckets.to_bytes({"x": torch.ones(1)})
    assert server.raw("POST", "/load/body", body, X_Load=begun["load"]) == (200, {"version": 0})
    status, said = server.raw("POST", "/load/end", wire.write(wire.End(begun["load"], 2)))
    assert (status, said["error"]) == (409, "1 tensors arrived of 2")
    assert server.service.health().run == ""


def test_an_error_inside_is_told(running: Callable[..., Running]) -> None:
    engine = Server(running().url, TOKEN, {}, SOON)
    with pytest.raises(RunError, match=r"KeyError: .no weight is called") as caught:
        engine.load(lambda: iter([*WEIGHTS.items(), ("unknown", torch.ones(1))]), 0)
    assert not isinstance(caught.value, EngineLost)  # other weights are wanted, not another engine
    engine.load(lambda: iter(WEIGHTS.items()), 0)
    with pytest.raises(EngineLost, match="MemoryError: no room for keys and values"):
        engine.sample(ask(1, RAISES))
    assert engine.sample(ask(1)) == right(ask(1))
    engine.close()


def test_every_wait_for_a_server_ends(running: Callable[..., Running]) -> None:
    begun = time.monotonic()
    with pytest.raises(EngineLost, match=r"waited 0\.3 s for it to start in vain"):
        Server(running(slow_start=30.0).url, TOKEN, {}, attrs.evolve(SOON, start=0.3))
    engine = Server(running().url, TOKEN, {}, SOON)
    engine.load(lambda: iter(WEIGHTS.items()), 0)
    with pytest.raises(
        EngineLost, match=r"waited 0\.516 s for 2 responses in vain"
    ):  # .5 s + 16 tokens / 1000 a second
        engine.sample(ask(1, STALLS))
    with pytest.raises(EngineLost, match=r"waited 0\.502 s for the log-probs of 1 sequences in vain"):
        engine.score([(1, 2)])
    with pytest.raises(EngineLost, match=r"waited 2 s for .* in vain"):
        engine.load(lambda: iter([(str(i), torch.ones(1)) for i in range(3)]), 1)
    engine.close()
    assert time.monotonic() - begun < 10.0  # the deadlines, and a busy machine


def test_who_is_no_server_of_ours(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"start it first, or correct --engine\.url"):
        Server("http://127.0.0.1:1", TOKEN, {}, SOON)
    with pytest.raises(EngineLost, match=r"waited 0\.3 s for it to start"):  # one that was there may come back
        Server("http://127.0.0.1:1", TOKEN, {}, attrs.evolve(SOON, start=0.3), again=True)
    server = running()
    monkeypatch.setattr(wire, "PROTOCOL", 3)
    found = server.service.health()
    monkeypatch.setattr(wire, "PROTOCOL", 2)
    monkeypatch.setattr(Service, "health", lambda self: found)
    with pytest.raises(RequestError, match="speaks protocol 3, and this is 2"):
        Server(server.url, TOKEN, {}, SOON)
    monkeypatch.setattr(Service, "health", lambda self: wire.Seen(True))
    with pytest.raises(RequestError, match="none of rlhf's, or another version: message lacks doing"):
        Server(server.url, TOKEN, {}, SOON)


# One beside


def beside(**arguments: Any) -> Beside:
    return Beside(Settings("m", arguments), SOON, sampler=FAKE)


def test_a_child_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    engine = beside(log=str(log))
    folder = engine._carrier._folder
    engine.load(lambda: iter(WEIGHTS.items()), 1)
    assert engine.sample(ask(1, 2)) == right(ask(1, 2))
    assert Path(f"/proc/{engine.pid}").exists() and os.getsid(engine.pid) != os.getsid(0)
    arguments = Path(f"/proc/{engine.pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{engine.pid}/environ").read_bytes()
    assert engine._headers["Authorization"].removeprefix("Bearer ").encode() not in arguments + environment
    engine.close()
    assert not Path(f"/proc/{engine.pid}").exists()
    assert log.read_text().splitlines() == ["load 1", "sample 2", "close"]  # it ended by itself
    assert folder is not None and not folder.path.exists()
    engine.close()  # again changes nothing


@pytest.mark.parametrize(
    ("device", "visible", "found"),
    [
        ("cpu", "3,5", "3,5"),
        ("cuda:1", "3,5", "5"),
        ("cuda:1", "", "1"),
        ("cuda", "", "0"),
        ("cuda", "GPU-a,GPU-b", "GPU-a"),
    ],
)
def test_a_child_sees_the_ranks_own_gpu_and_is_no_rank(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str, found: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "RLHF_ENGINE_TOKEN"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKING", "kept")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment = environment_of(device)
    assert environment["CUDA_VISIBLE_DEVICES"] == found
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "RLHF_ENGINE_TOKEN"} & set(environment)
    assert environment["RANKING"] == "kept"


def test_workers_have_gpus_that_no_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {
        **ranks,
        "MASTER_PORT": "1",
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "OMP_NUM_THREADS": "64",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    environment = environment_of("cuda:1", 2)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("5,7", "4")
    with pytest.raises(RequestError, match=r"4 GPUs are visible here, and .* would take number 5"):
        environment_of("cuda:1", 3)


def test_a_child_that_dies_is_missed_at_once() -> None:
    engine = beside()
    engine.load(lambda: iter(WEIGHTS.items()), 1)
    engine._deadlines = Deadlines(sample=600.0)
    begun = time.monotonic()
    with pytest.raises(EngineLost, match=r"was ended by SIGKILL while waiting for 2 responses"):
        engine.sample(ask(1, DIES))
    assert time.monotonic() - begun < 5.0  # not the deadline
    with pytest.raises(EngineLost, match="was ended by SIGKILL"):
        engine.sample(ask(1))
    engine.close()


def test_a_child_that_stalls_is_ended() -> None:
    engine = beside()
    engine.load(lambda: iter(WEIGHTS.items()), 1)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineLost, match=r"waited 0\.508 s for 1 responses in vain; it is ended"):
        engine.sample(ask(1))
    assert not Path(f"/proc/{engine.pid}").exists()
    engine.close()


def test_a_child_that_cannot_start_says_why() -> None:
    with pytest.raises(RequestError, match="could not start: ValueError: it was told to fail"):
        beside(fail_start=True)
    with pytest.raises(EngineLost, match=r"ended with exit code [01] while waiting for it to start"):
        Beside(Settings("m", {}), SOON, sampler="nosuch:Sampler")
    for start in (0.05, 6.0):  # before it listens, and after
        with pytest.raises(EngineLost, match=rf"waited {start:g} s for it to start in vain; it is ended"):
            Beside(Settings("m", {"slow_start": 60.0}), attrs.evolve(SOON, start=start), sampler=FAKE)


PARENT = """
import sys, torch
from rlhf_plugins.engines.vllm.beside import Beside
from rlhf_plugins.engines.vllm.remote import Deadlines
from rlhf_plugins.engines.vllm.sampler import Settings
engine = Beside(Settings("m", {}), Deadlines(), sampler="fake_sampler:FakeSampler")
engine._carrier._folder.write({"x": torch.ones(1)})
print(engine.pid, engine._carrier._folder.path, flush=True)
sys.stdin.read()
"""


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    assert Path(f"/proc/{pid}").exists() and len(list(Path(folder).iterdir())) == 2
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10.0
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or _state(pid) == "Z"  # nobody may be there to reap it
    assert not Path(folder).exists()
    parent.stdout.close()


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
