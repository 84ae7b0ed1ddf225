"""Weights by CUDA IPC, as far as that can be seen without a GPU: what is laid where, what is sent of it, when it is
laid anew, and what happens where the memory can't be opened. Ordinary memory stands for a GPU's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from fake_sampler import FakeSampler
from fake_server import TOKEN, Running
from rlhf.errors import RunError
from rlhf_plugins.engines.vllm import ipc, wire
from rlhf_plugins.engines.vllm.packing import Buffer, Place, size_of, taken, written
from rlhf_plugins.engines.vllm.remote import Deadlines, Server
from rlhf_plugins.engines.vllm.sampler import Ask, Settings

SOON = Deadlines(start=60.0, load=20.0, sample=20.0)
WEIGHTS = {
    "odd": torch.arange(3, dtype=torch.bfloat16),
    "matrix": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "one": torch.tensor(4.0),
    "turned": torch.arange(12, dtype=torch.float16).reshape(3, 4).T,  # not contiguous
    "large": torch.randn(900, generator=torch.Generator().manual_seed(1)),  # more than a buffer of 1024 bytes
    "last": torch.ones(2, 2),
}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Handles name buffers of this process; what was done with them, in order."""
    done: list[str] = []
    buffers: dict[str, Tensor] = {}

    def exported(buffer: Tensor) -> ipc.Handle:
        name = f"memory-{buffer.data_ptr()}"
        buffers[name] = buffer
        done.append("laid")
        return ipc.Handle("GPU-0", len(buffer), name, 0, "", 0, "", True)

    def imported(handle: ipc.Handle) -> Tensor:
        done.append("opened")
        return buffers[handle.memory]

    monkeypatch.setattr(ipc, "exported", exported)
    monkeypatch.setattr(ipc, "imported", imported)
    return done


def same(found: dict[str, Tensor], right: dict[str, Tensor] = WEIGHTS) -> bool:
    return found.keys() == right.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in right.items()
    )


def test_what_is_laid_is_taken_and_the_buffer_is_used_again(events: list[str]) -> None:
    found: dict[str, Tensor] = {}
    handles, starts, opened, buffer = [], [], ipc.Opened(), Buffer("cpu", 1024)
    for laid, places in buffer.buckets(iter(WEIGHTS.items())):
        handles.append(ipc.exported(buffer.whole))
        assert len(laid) == size_of(places)
        found |= taken(opened.copied(handles[-1], len(laid)), places)
        starts.append([place.start for place in places])
    # 6, 140, 4 and 24 bytes, each from a multiple of 256; then 3,600, alone; and 16
    assert starts == [[0, 256, 512, 768], [0], [0]]
    assert [handle.size for handle in handles] == [1024, 3600, 3600]
    assert handles[1] == handles[2]  # so what was taken of it must be copies
    assert events == ["laid", "opened", "laid", "opened", "laid"]  # a buffer is opened once
    assert same(found)
    with pytest.raises(wire.WireError, match="3601 bytes don't lie in a buffer of 3600"):
        opened.copied(handles[-1], 3601)


@pytest.mark.parametrize(
    "change",
    [{"start": 256}, {"start": 1}, {"start": -256}, {"shape": (-1,)}, {"shape": (41,)}, {"shape": (1 << 40,)},
     {"dtype": "nn"}, {"dtype": "no"}],
)  # fmt: skip
def test_a_place_that_is_not_in_the_buffer(change: dict[str, Any]) -> None:
    ((laid, (place,)),) = Buffer("cpu", 1024).buckets(iter([("x", torch.ones(40))]))
    assert taken(laid, (place,))["x"].sum() == 40
    with pytest.raises(wire.WireError, match="x is no"):
        taken(laid, (attrs.evolve(place, **change),))


# Handles


def test_a_handle_travels_as_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would rebuild a tensor of is what it reduced one to, but for the number of the GPU there."""
    buffer = torch.empty(64, dtype=torch.uint8)
    memory, counter, event = bytes(range(64)), b"/torch_1_2_3", bytes([0, 255, 128])
    values = (Tensor, torch.Size([64]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 1, memory, 64, 512, False,
              counter, 24, event, True)  # fmt: skip
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (reductions.rebuild_cuda_tensor, values))
    there = ["GPU-a", "GPU-b"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=there[i]))
    sent = wire.write(ipc.Laid("load", ipc.exported(buffer), (Place("x", "float32", (2, 8), 0),)))
    assert json.loads(sent)["handle"]["gpu"] == "GPU-b"
    arrived = wire.read(sent, ipc.Laid)
    there[:] = ["GPU-b"]  # the only one that the engine sees
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *found: found)
    found: Any = ipc.imported(arrived.handle)
    assert found[:6] == values[:6] and found[7:] == values[7:] and found[6] == 0
    for change, why in (({"gpu": "GPU-c"}, "no GPU GPU-c"), ({"memory": "*"}, "no base64"), ({"size": 0}, "no buffer")):
        with pytest.raises(wire.WireError, match=why):
            ipc.imported(attrs.evolve(arrived.handle, **change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_seen() -> None:
    handle = ipc.Handle("GPU-0", 64, "AAAA", 0, "", 0, "", True)
    assert not ipc.seen(ipc.Probe(handle, "x"))
    with pytest.raises(wire.WireError, match="no GPU GPU-0"):
        ipc.Opened().copied(handle, 64)


def test_a_buffer_that_says_something_else_is_not_seen(events: list[str]) -> None:
    probe = ipc.Probe(ipc.exported(written(torch.empty(4, dtype=torch.uint8), "this")), "this")
    assert ipc.seen(probe)
    assert not ipc.seen(attrs.evolve(probe, content="that"))


# With a server


@pytest.fixture
def url(running: Callable[..., Running]) -> str:
    return running().url


def test_weights_go_through_the_buffer_and_no_bucket_is_laid_before_the_last_is_taken(
    url: str, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Buffer.__init__, "__defaults__", (1024,))
    engine = Server(url, TOKEN, {}, SOON, carrier="cuda-ipc")
    assert engine.carrier == "cuda-ipc"
    engine.load(lambda: iter(WEIGHTS.items()), 3)
    # the probe; a buffer for the first bucket; a larger one for the second, and the third
    assert events == ["laid", "opened"] * 3
    assert engine.version == engine.health().version == 3
    right = FakeSampler(Settings("m", {}))
    right.load(lambda: iter(WEIGHTS.items()), 3)
    asks = [Ask((1, 2), seed, 8, 1.0) for seed in range(4)]
    assert engine.sample(asks) == right.sample(asks)
    with pytest.raises(RunError, match=r"x is no float32 of shape \(9,\) at 4"):
        monkeypatch.setattr(ipc, "imported", lambda handle: torch.zeros(64, dtype=torch.uint8))
        wrong = (torch.zeros(36, dtype=torch.uint8), (Place("x", "float32", (9,), 4),))
        monkeypatch.setattr(Buffer, "buckets", lambda self, weights: [wrong])
        engine.load(lambda: iter([]), 4)
    assert engine.version == -1
    engine.close()


@pytest.mark.parametrize("at", ["here", "there"])
def test_memory_that_cannot_be_shared_is_gone_round(
    url: str, events: list[str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(ipc, "exported" if at == "here" else "imported", refuse)
    engine = Server(url, TOKEN, {}, SOON, carrier="cuda-ipc")
    assert engine.carrier == ("shared-memory" if os.path.isdir(wire.SHARED_MEMORY) else "bodies")
    assert "memory" in engine.why_host
    engine.load(lambda: iter(WEIGHTS.items()), 0)
    assert engine.health().version == 0
    engine.close()
