"""What the engine asks of a vLLM, wherever that one lives: in this process, in one beside it, or on another host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs
from torch import Tensor

from rlhf.api import RunError

Stream = Callable[[], Iterator[tuple[str, Tensor]]]
"""Weights by their Hugging Face names, in buckets; to be run through once a call, on every rank."""


@attrs.frozen
class Ask:
    """One response that is wanted."""

    prompt: tuple[int, ...]  # tokens
    seed: int
    max_tokens: int
    temperature: float  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    """That end it, and are kept in it."""


@attrs.frozen
class Answer:
    """One response that was sampled, or could not be had."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...]  # nats, of the distribution sampled from
    finish: Literal["stop", "length"]
    failed: str = ""
    """Why it could not be had; then it has no tokens."""


@attrs.frozen
class Settings:
    """How a vLLM is started. Plain values, so that they can be handed to another process as JSON."""

    model: str
    """Folder or hub id; its weights may be any, the trainer's follow before the first response."""
    arguments: Mapping[str, Any]
    """Of `vllm.LLM`, by its own names."""


class Sampler(Protocol):
    """A vLLM at work."""

    @property
    def version(self) -> int:
        """Of the weights it holds; -1 before the first `load`."""

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        """In order.

        Raises:
            EngineLost: it died, or let its deadline pass; what was asked for may be asked again of a new one.
        """

    def load(self, weights: Stream, version: int) -> None:
        """Take new weights, and forget the keys and values of old ones."""

    def load_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        """Take a new adapter on the weights it has: tensors by PEFT's names, and PEFT's adapter_config.json."""

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Log-probs of each token but the first, at temperature 1, for comparison with the trainer's forward."""

    def fingerprints(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, list[float]]:
        """Of the weights that it computes with, by their Hugging Face names; see `worker.fingerprint`. Those that it
        can't tell apart are left out; where it holds adapters, these are the weights under them.

        Args:
            shapes: of the weights, by name.
        """

    def sleep(self) -> None:
        """Give back device memory until the next call of `wake`."""

    def wake(self) -> None:
        """Before anything else is asked of one that sleeps."""

    def close(self) -> None:
        """Free what it holds."""


class Gone(Exception):  # noqa: N818 - what happened
    """A worker of a vLLM is gone, and the others are of no use without it; raised where the vLLM is."""


class EngineLost(RunError):  # noqa: N818 - what happened, as the core's RankLost
    """A vLLM died or let a deadline pass; says what was waited for, and how long."""
