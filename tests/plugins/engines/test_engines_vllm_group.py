"""Weights that are broadcast to an engine's workers: what arrives, who may join, and how every wait for one that is
gone ends. The workers of the fake are threads."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from fake_sampler import FakeSampler
from fake_server import TOKEN, Running
from rlhf.errors import RequestError, RunError
from rlhf_plugins.engines.vllm import carriers, group, wire
from rlhf_plugins.engines.vllm.beside import Beside
from rlhf_plugins.engines.vllm.buckets import to_bytes
from rlhf_plugins.engines.vllm.packing import Buffer, size_of, taken
from rlhf_plugins.engines.vllm.remote import Deadlines, Server
from rlhf_plugins.engines.vllm.sampler import Ask, EngineLost, Gone, Settings
from rlhf_plugins.engines.vllm.worker import Extension

SOON = Deadlines(start=60.0, load=20.0, sample=20.0)
WEIGHTS = {
    "odd": torch.arange(3, dtype=torch.bfloat16),
    "matrix": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "turned": torch.arange(12, dtype=torch.float16).reshape(3, 4).T,  # not contiguous
    "large": torch.randn(900, generator=torch.Generator().manual_seed(1)),  # more than a buffer of 1024 bytes
    "last": torch.ones(2, 2),
}


CPU = torch.device("cpu")
TEXT = "0123456789abcdef" * 2
LARGE = 64 << 20
"""Bytes; more than sockets hold, so that a broadcast isn't done before it is taken."""


def address(store: group.Store, size: int, seconds: float = 20.0) -> group.Address:
    return group.Address(store.host, store.port, store.key, size, "gloo", seconds)


def joined(size: int, seconds: float = 20.0) -> tuple[group.Store, list[group.Group]]:
    """All of a group, each by a thread, as each is a process in truth."""
    store = group.Store("127.0.0.1")
    at = address(store, size, seconds)
    with ThreadPoolExecutor(size) as each:
        return store, list(each.map(lambda rank: group.Group(at, rank, CPU, "" if rank else TEXT), range(size)))


# The group


def test_what_is_broadcast_is_at_every_worker() -> None:
    _store, (trainer, *workers) = joined(3)
    assert [worker.text for worker in workers] == [TEXT, TEXT]
    got: list[dict[str, Tensor]] = [{}, {}]

    def take(worker: int, places: Any) -> None:
        buffer = torch.empty(size_of(places), dtype=torch.uint8)
        workers[worker].broadcast(buffer)
        got[worker] |= taken(buffer, places)

    with ThreadPoolExecutor(2) as each:
        for laid, places in Buffer("cpu", 1024).buckets(iter(WEIGHTS.items())):
            waits = [each.submit(take, worker, places) for worker in range(2)]
            trainer.broadcast(laid)
            for wait in waits:
                wait.result()
    for found in got:
        assert found.keys() == WEIGHTS.keys()
        for name, tensor in WEIGHTS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_broadcast_that_nobody_takes_ends_and_is_the_last() -> None:
    _store, (trainer, _) = joined(2, seconds=0.5)
    with pytest.raises(OSError, match=r"(?i)0\.5 s|timed? ?out"):
        trainer.broadcast(torch.zeros(LARGE, dtype=torch.uint8))
    with pytest.raises(ConnectionError, match="was left"):
        trainer.broadcast(torch.zeros(8, dtype=torch.uint8))


def test_a_look_ends_a_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_LOOK", 0.05)
    _store, (trainer, _) = joined(2)

    def look() -> None:
        raise EngineLost("it is gone")

    begun = time.monotonic()
    with pytest.raises(EngineLost, match="it is gone"):
        trainer.broadcast(torch.zeros(LARGE, dtype=torch.uint8), look)
    assert time.monotonic() - begun < 10.0  # its deadline is twice that


def test_a_meeting_that_is_over_ends_a_workers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_LOOK", 0.05)
    store, (_, worker) = joined(2)
    store.end()
    with pytest.raises(ConnectionError, match="the meeting is over"):
        worker.broadcast(torch.zeros(8, dtype=torch.uint8))


def test_who_waits_for_one_that_does_not_come_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "JOIN", 0.3)
    store = group.Store("127.0.0.1")
    with pytest.raises(TimeoutError):
        group.Group(address(store, 2), 0, CPU, TEXT)
    with ThreadPoolExecutor(1) as each:
        stranger = each.submit(group.Group, attrs.evolve(address(store, 2), key="another"), 1, CPU)
        with pytest.raises(TimeoutError):  # who has another key isn't met
            group.Group(address(store, 2), 0, CPU, TEXT)
        assert isinstance(stranger.exception(), TimeoutError)


def test_a_library_that_waits_too_long_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "JOIN", 0.3)
    monkeypatch.setattr(group, "_gloo", lambda *given: time.sleep(3))
    store = group.Store("127.0.0.1")
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        group.Group(address(store, 1), 0, CPU, TEXT)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["NCCL 2.27.3, GPU-a", "NCCL 2.26.2, GPU-b"], "the trainer has NCCL 2.27.3, and the workers have NCCL 2.26.2"),
        (["NCCL 2.27.3, GPU-a", "no NCCL, 1"], "the workers have no NCCL"),
        (["no NCCL, 1", "no NCCL, 2"], "the trainer has no NCCL"),
        (["NCCL 2.27.3, GPU-a", "NCCL 2.27.3, GPU-b", "NCCL 2.27.3, GPU-a"], "the same GPU"),
    ],
)
def test_who_can_not_be_in_a_group_is_told_before_a_library_waits(words: list[str], why: str) -> None:
    with pytest.raises(ConnectionError, match=why):
        group._check(words)
    group._check(["NCCL 2.27.3, GPU-a", "NCCL 2.27.3, GPU-b"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_a_process_says_of_itself() -> None:
    assert group._word("nccl", CPU).startswith("no NCCL, ")
    assert group._word("gloo", CPU) != group._word("gloo", CPU)  # as devices, which two may not share


def test_a_store_listens_where_it_is_told_and_nowhere_else() -> None:
    store = group.Store("127.0.0.1")
    socket.create_connection(("127.0.0.1", store.port), timeout=5).close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)  # this host by another name


# With a server


def right(weights: dict[str, Tensor], version: int = 0) -> Any:
    own = FakeSampler(Settings("m", {}))
    own.load(lambda: iter(weights.items()), version)
    return own.sample([Ask((1, 2), seed, 8, 1.0) for seed in range(4)])


def sampled(engine: Server) -> Any:
    return engine.sample([Ask((1, 2), seed, 8, 1.0) for seed in range(4)])


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_are_broadcast_and_adapters_are_not(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int
) -> None:
    monkeypatch.setattr(Buffer.__init__, "__defaults__", (1024,))
    log = tmp_path / "log"
    engine = Server(running(tensor_parallel_size=workers, log=str(log)).url, TOKEN, {}, SOON, carrier="broadcast")
    assert engine.carrier == "broadcast" and engine.why_host == ""
    others = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    for version, weights in enumerate((WEIGHTS, others)):
        engine.load(lambda found=weights: iter(found.items()), version)  # type: ignore[misc]
        assert engine.health().version == version
        assert sampled(engine) == right(weights)
    assert right(WEIGHTS) != right(others)
    engine.load_adapter({"a": torch.ones(2)}, {"r": 8}, 2)
    assert log.read_text().split("\n")[:-1] == [
        f"join {workers + 1}", "load 0", "sample 4", "load 1", "sample 4", "adapter 2 {'r': 8}"
    ]  # fmt: skip
    engine.close()


def test_an_error_inside_is_told_whatever_waits(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake refuses the first bucket while the second is under way, which nobody takes then."""
    monkeypatch.setattr(Buffer.__init__, "__defaults__", (LARGE,))
    monkeypatch.setattr(group, "_LOOK", 0.1)
    url = running().url
    engine = Server(url, TOKEN, {}, SOON, carrier="broadcast")
    wrong = {"unknown": torch.ones(LARGE // 4), "other": torch.ones(LARGE // 4), "third": torch.ones(LARGE // 4)}
    begun = time.monotonic()
    with pytest.raises(RunError, match="no weight is called 'unknown'") as caught:
        engine.load(lambda: iter(wrong.items()), 0)
    assert not isinstance(caught.value, EngineLost)  # other weights are wanted, not another engine
    assert engine.version == -1
    engine.close()
    other = Server(url, TOKEN, {}, SOON, carrier="broadcast")
    other.load(lambda: iter(WEIGHTS.items()), 1)
    assert sampled(other) == right(WEIGHTS)
    assert time.monotonic() - begun < 0.75 * SOON.load
    other._carrier.close()  # type: ignore[union-attr]  # as a load that breaks off leaves it
    with pytest.raises(EngineLost, match=r"the trainer was lost|the group was left"):  # whoever sees it first
        other.load(lambda: iter(WEIGHTS.items()), 2)
    other.close()


def test_a_second_run_is_told_to_the_first(running: Callable[..., Running]) -> None:
    url = running().url
    one = Server(url, TOKEN, {}, SOON, carrier="broadcast")
    one.load(lambda: iter(WEIGHTS.items()), 0)
    two = Server(url, TOKEN, {}, SOON, carrier="broadcast")
    two.load(lambda: iter(WEIGHTS.items()), 0)
    with pytest.raises(RunError, match="its workers have met another run since") as caught:
        one.load(lambda: iter(WEIGHTS.items()), 1)
    assert not isinstance(caught.value, EngineLost)  # else the two would take it from each other for ever
    assert sampled(two) == right(WEIGHTS)  # nothing of it was touched
    for engine in (one, two):
        engine.close()


def test_who_meets_workers_in_the_middle_of_a_load_ends_it(running: Callable[..., Running]) -> None:
    url = running().url
    one, others = Server(url, TOKEN, {}, SOON, carrier="broadcast"), []

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield "first", torch.ones(32 << 20)  # a bucket
        yield "second", torch.ones(32 << 20)
        others.append(Server(url, TOKEN, {}, SOON, carrier="broadcast", only=True))
        yield "third", torch.ones(32 << 20)
        yield "fourth", torch.ones(32 << 20)

    with pytest.raises(RunError, match="another run has met its workers since") as caught:
        one.load(interrupted, 0)
    assert not isinstance(caught.value, EngineLost)
    others[0].load(lambda: iter(WEIGHTS.items()), 0)
    assert sampled(others[0]) == right(WEIGHTS)
    for engine in (one, *others):
        engine.close()


def test_workers_that_are_busy_are_waited_for(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed left responses under way; the next one's patience with a meeting is shorter."""
    monkeypatch.setattr(group, "JOIN", 0.5)
    url = running(slow_sample=2.0).url
    one = Server(url, TOKEN, {}, attrs.evolve(SOON, sample=0.1, pace=1e6), carrier="broadcast")
    one.load(lambda: iter(WEIGHTS.items()), 0)
    with pytest.raises(EngineLost, match="in vain"):
        sampled(one)
    two = Server(url, TOKEN, {}, SOON, carrier="broadcast", only=True)
    two.load(lambda: iter(WEIGHTS.items()), 0)
    assert sampled(two) == right(WEIGHTS)
    for engine in (one, two):
        engine.close()


def test_who_comes_after_one_that_was_lost_in_a_load_does_not_wait(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Buffer.__init__, "__defaults__", (1024,))
    url = running().url
    one = Server(url, TOKEN, {}, SOON, carrier="broadcast")

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield from list(WEIGHTS.items())[:4]
        raise LookupError("the trainer is gone")

    with pytest.raises(LookupError):
        one.load(breaks_off, 0)
    begun = time.monotonic()
    two = Server(url, TOKEN, {}, SOON, carrier="broadcast", only=True)
    two.load(lambda: iter(WEIGHTS.items()), 0)
    assert sampled(two) == right(WEIGHTS)
    assert time.monotonic() - begun < 5.0  # the server's patience with the first is ten minutes
    for engine in (one, two):
        engine.close()


def test_a_load_is_of_one_sort(running: Callable[..., Running]) -> None:
    engine = Server(running().url, TOKEN, {}, SOON)
    for fetched, path, message in (
        (True, "/load/body", to_bytes({"x": torch.ones(1)})),
        (False, "/load/broadcast", group.Coming("", ())),
    ):
        load = engine.ask("/load", wire.Begin("r", 0, None, fetched, ""), wire.Begun, "a load").load
        if isinstance(message, group.Coming):
            message = attrs.evolve(message, load=load)
        with pytest.raises(RunError, match="or they are fetched; not both"):
            engine.ask(path, message, wire.Done, "a bucket", headers={"X-Load": load})
    with pytest.raises(RunError, match="adapters aren't fetched"):
        engine.ask("/load", wire.Begin("r", 0, {}, True, ""), wire.Begun, "a load")
    with pytest.raises(RunError, match=r"message\.seconds is out of range"):
        engine.ask("/group", group.Join("gloo", 0.0), group.Meeting, "a place to meet")
    engine.close()


def test_where_they_do_not_meet_weights_go_by_way_of_the_host(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "JOIN", 0.5)
    url = running(never_joins=True).url
    engine = Server(url, TOKEN, {}, SOON, carrier="broadcast")
    assert "didn't meet: no route to host" in engine.why_host and engine.carrier in ("shared-memory", "bodies")
    engine.load(lambda: iter(WEIGHTS.items()), 0)
    assert sampled(engine) == right(WEIGHTS)
    with pytest.raises(RequestError, match=r"--engine\.carrier broadcast: .*didn't meet"):
        Server(url, TOKEN, {}, SOON, carrier="broadcast", only=True)
    with pytest.raises(EngineLost, match="didn't meet"):  # it was open before, so it may be again
        Server(url, TOKEN, {}, SOON, carrier="broadcast", only=True, again=True)
    engine.close()


def test_a_text_that_arrives_otherwise_is_no_way(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = running().url
    monkeypatch.setattr(group, "text_of", lambda buffer: "something else")
    with pytest.raises(RequestError, match="what was broadcast didn't arrive"):
        Server(url, TOKEN, {}, SOON, carrier="broadcast", only=True)


def test_workers_that_hang_in_a_meeting_are_a_lost_engine(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "JOIN", 0.5)
    monkeypatch.setattr(FakeSampler, "join", lambda self, at: time.sleep(5))
    with pytest.raises(EngineLost, match="its workers don't leave a meeting"):
        Server(running().url, TOKEN, {}, SOON, carrier="broadcast")


def test_an_engine_that_dies_in_a_broadcast_is_missed_at_once(tmp_path: Path) -> None:
    settings = Settings("m", {"die_once_loading": str(tmp_path / "died")})
    engine = Beside(settings, SOON, sampler="fake_sampler:FakeSampler", carrier="broadcast", only=True)
    assert engine.carrier == "broadcast"
    many = {f"part-{i}": torch.ones(LARGE // 2) for i in range(4)}  # a bucket each
    begun = time.monotonic()
    with pytest.raises(EngineLost, match="was ended by SIGKILL while waiting for 1 tensors to be broadcast"):
        engine.load(lambda: iter(many.items()), 0)
    assert time.monotonic() - begun < 0.75 * SOON.load
    engine.close()


def test_a_way_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    for name in ("Host", "SameGPU", "Broadcast"):
        monkeypatch.setattr(carriers, name, lambda *given, name=name: made.append((name, *given[1:])))
    for name in ("host", "cuda-ipc", "broadcast"):
        carriers.opened(None, name, "cuda:1")  # type: ignore[arg-type]
    assert made == [("Host",), ("SameGPU", "cuda:1"), ("Broadcast", "cuda:1")]


def test_an_engine_without_one_of_its_workers_ends(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Any, asks: Any) -> Any:
        raise Gone("a worker of the vLLM is gone: RuntimeError: cancelled")

    monkeypatch.setattr(FakeSampler, "score", gone)
    server = running()
    engine = Server(server.url, TOKEN, {}, SOON)
    engine.load(lambda: iter(WEIGHTS.items()), 0)
    with pytest.raises(EngineLost, match="a worker of the vLLM is gone"):
        engine.score([(1, 2)])
    server.thread.join(10.0)
    assert isinstance(server.error, Gone) and not server.thread.is_alive()
    engine.close()


def test_of_several_workers_an_error_of_one_is_told_by_all_answering() -> None:
    class Worker(Extension):
        def fails(self, number: int) -> int:
            if number > 1:
                raise KeyError(number)
            return number

        def loses(self) -> None:
            raise ConnectionError("gone")

    worker = Worker()
    assert worker.told("fails", 1) == ("", False, 1)
    assert worker.told("fails", 2) == ("KeyError: 2", False, None)
    assert worker.told("loses") == ("ConnectionError: gone", True, None)
