"""A fake vLLM for the tests of what stands around it: its tokens follow from the seed, the prompt and the weights, its
log-probs from the tokens. A seed of its own makes it misbehave."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_plugins.engines.vllm import group, ipc
from rlhf_plugins.engines.vllm.packing import size_of, taken
from rlhf_plugins.engines.vllm.sampler import Answer, Ask, Settings, Stream

STALLS, RAISES, DIES = 1_000_001, 1_000_002, 1_000_003
"""Seeds."""


class FakeSampler:
    """Settings' arguments:
    fail_start: says so and raises; slow_start: seconds; die_once: a file whose absence makes it die in its first
    sample, and make the file; never_joins: the trainer; log: a file that gets a line for each call.
    """

    def __init__(self, settings: Settings) -> None:
        self._options = settings.arguments
        if "slow_start" in self._options:
            time.sleep(self._options["slow_start"])
        if "fail_start" in self._options:
            print("fake: no such device", file=sys.stderr)
            raise ValueError("it was told to fail")
        self.version = -1
        self._weights: dict[str, float] = {}
        self._adapter: dict[str, float] = {}
        self._groups: list[group.Group] = []

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        self._note(f"sample {len(asks)}")
        self._die_once("die_once")
        for ask in asks:
            if ask.seed == STALLS:
                time.sleep(3600)
            if ask.seed == RAISES:
                raise MemoryError("no room for keys and values")
            if ask.seed == DIES:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._options.get("slow_sample", 0.0))
        return [self._answer(ask) for ask in asks]

    def load(self, weights: Stream, version: int) -> None:
        self._note(f"load {version}")
        self._weights = {}
        for name, tensor in weights():
            self._die_once("die_once_loading")
            if name == "unknown":
                raise KeyError("no weight is called 'unknown'")
            self._weights[name] = float(tensor.double().sum())
        self._adapter, self.version = {}, version

    def sees(self, probe: ipc.Probe) -> bool:
        return ipc.seen(probe)

    @property
    def workers(self) -> int:
        return int(self._options.get("tensor_parallel_size", 1))

    def join(self, at: group.Address) -> list[str]:
        """Each worker is a thread."""
        self._note(f"join {at.size}")
        if self._options.get("never_joins"):
            raise RuntimeError("no route to host")
        self.leave()
        self._each = ThreadPoolExecutor(self.workers)
        make = functools.partial(group.Group, at, device=torch.device("cpu"))
        self._groups = list(self._each.map(make, range(1, at.size)))
        return [own.text for own in self._groups]

    def leave(self) -> None:
        for own in self._groups:
            own.close()
        self._groups = []

    def fetch(self, found: Iterator[group.Coming | ipc.Laid], version: int) -> None:
        opened = ipc.Opened()

        def stream() -> Iterator[tuple[str, Tensor]]:
            for bucket in found:
                size = size_of(bucket.places)
                if isinstance(bucket, ipc.Laid):
                    buffer = opened.copied(bucket.handle, size)
                else:
                    buffer, *others = self._received(size)
                    assert all(torch.equal(buffer, other) for other in others)
                yield from taken(buffer, bucket.places).items()

        self.load(stream, version)

    def _received(self, size: int) -> list[Tensor]:
        """By each worker."""
        buffers = [torch.empty(size, dtype=torch.uint8) for _ in self._groups]
        list(self._each.map(lambda own, buffer: own.broadcast(buffer), self._groups, buffers))
        return buffers

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        self._note(f"adapter {version} {dict(config)}")
        self._adapter = {name: float(tensor.double().sum()) for name, tensor in tensors.items()}
        self.version = version

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        self._die_once("die_once_scoring")
        return [[-token / 7 - self._sum() for token in sequence[1:]] for sequence in sequences]

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        return {name: [self._weights[name]] for name in shapes if name in self._weights}

    def sleep(self) -> None:
        self._note("sleep")

    def wake(self) -> None:
        self._note("wake")

    def close(self) -> None:
        self._note("close")

    def _sum(self) -> float:
        return sum(self._weights.values()) + sum(self._adapter.values())

    def _answer(self, ask: Ask) -> Answer:
        first = ask.seed * 31 + sum(ask.prompt) + round(self._sum())
        count = 1 + first % ask.max_tokens
        tokens = tuple((first + 7 * i) % 50 for i in range(count))
        return Answer(tokens, tuple(-token / 7 for token in tokens), "length" if count == ask.max_tokens else "stop")

    def _die_once(self, option: str) -> None:
        path = self._options.get(option)
        if path and not Path(path).exists():
            Path(path).touch()
            print("fake: dying now", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, line: str) -> None:
        if "log" in self._options:
            with open(self._options["log"], "a", encoding="utf-8") as file:
                file.write(line + "\n")
