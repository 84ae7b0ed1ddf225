"""What a vLLM in another process is asked and answers: JSON, read strictly, and weights as safetensors.

    GET  /health          who it is, what it does, which weights it holds
    POST /open            start a vLLM like this, or go on with the one that is like this
    POST /shared          whether it sees a file of this host's shared memory
    POST /shared/gpu      whether it sees a buffer in the memory of a GPU
    POST /group           where its workers meet the trainer, to be broadcast to
    POST /group/text      whether a text that was broadcast has arrived
    POST /group/leave     the meeting is over
    POST /load            weights, or an adapter, begin to come
    POST /load/file       some of them, in a file of shared memory
    POST /load/body       some of them, as the body; which load: the header X-Load
    POST /load/gpu        some of them, in a buffer of a GPU's memory
    POST /load/broadcast  some of them, which are broadcast next
    POST /load/check      whether the load goes on
    POST /load/end        that was all
    POST /sample          responses
    POST /score           log-probs of given tokens
    POST /fingerprints    what its weights are like
    POST /sleep, /wake    give device memory back, take it again
    POST /shutdown        end

Every request carries `Authorization: Bearer TOKEN`. What samples or scores names the run and the version of the weights
that it means: a server that holds others refuses, so that nothing is ever sampled from the wrong weights unnoticed.
Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import attrs

from rlhf_plugins.engines.vllm.sampler import Answer, Ask

IN_PROCESS = "rlhf_plugins.engines.vllm.inside:InProcess"
"""The sampler that is served where nobody says otherwise."""
PROTOCOL = 3
"""Both sides must speak the same."""
BUCKET = 128 << 20
"""Bytes of weights that travel at once; a tensor that is larger travels alone."""
TEXT = 32
"""Characters that must arrive on a way before weights go there."""
MOST_JSON = 256 << 20
"""Bytes of a message of text: 64 responses of 32,000 tokens to prompts as long take 40 MB."""
MOST_WEIGHTS = 8 << 30
"""Bytes of a bucket that is a body: the embedding of the largest models, in float32."""
SHARED_MEMORY = "/dev/shm"
PREFIX = "rlhf-weights-"
"""Of the folders in shared memory that weights travel through."""

T = TypeVar("T")


class WireError(ValueError):
    """A message isn't what it must be; says where."""


@attrs.frozen
class Health:
    """What a server says of itself."""

    protocol: int
    instance: str
    """Another one after each start."""
    state: Literal["waiting", "starting", "ready", "failed"]
    """`waiting` for a run to open it; `failed` to start, a moment before it ends."""
    doing: str
    """What it is at, or why it failed; empty when nothing."""
    run: str
    """Whose weights it holds; empty when nobody's."""
    version: int
    model: str


OPENABLE: Mapping[str, type] = {
    "disable_log_stats": bool, "dtype": str, "enable_chunked_prefill": bool, "enable_lora": bool,
    "enable_prefix_caching": bool, "generation_config": str, "load_format": str, "logprobs_mode": str,
    "max_lora_rank": int, "max_loras": int, "max_model_len": int, "max_num_batched_tokens": int, "max_num_seqs": int,
    "seed": int, "skip_tokenizer_init": bool, "tensor_parallel_size": int,
}  # fmt: skip
"""Arguments of `vllm.LLM` that a run may choose for a server that somebody else started. Others would name files and
code of its host, or are for who knows its devices to choose."""


@attrs.frozen
class Open:
    """What the vLLM must be like, beside what the server was started with, which goes before."""

    arguments: Mapping[str, Any]


@attrs.frozen
class Shared:
    """Does the server see this file, with this in it?"""

    path: str
    content: str


@attrs.frozen
class Begin:
    """Weights follow, or an adapter."""

    run: str
    version: int
    adapter: Mapping[str, Any] | None
    """PEFT's adapter_config.json; None: the whole model's weights."""
    fetched: bool
    """What comes is where the workers find them."""
    meeting: str
    """By whose group they are broadcast; empty where they aren't."""


@attrs.frozen
class Begun:
    """The load's own name, for what follows."""

    load: str


@attrs.frozen
class Bucket:
    """Some of the weights, in a file."""

    load: str
    path: str


@attrs.frozen
class End:
    """All weights were sent."""

    load: str
    tensors: int


@attrs.frozen
class SampleRequest:
    """Responses that are wanted of these weights."""

    run: str
    version: int
    asks: tuple[Ask, ...]


@attrs.frozen
class ScoreRequest:
    """Sequences whose tokens' log-probs are wanted."""

    run: str
    version: int
    sequences: tuple[tuple[int, ...], ...]


@attrs.frozen
class PrintsRequest:
    """Weights whose fingerprints are wanted, by name, with their shapes."""

    run: str
    version: int
    shapes: Mapping[str, tuple[int, ...]]


@attrs.frozen
class Prints:
    """Of the weights that can be told apart."""

    version: int
    found: Mapping[str, tuple[float, ...]]


@attrs.frozen
class Nothing:
    """There is nothing to say."""


@attrs.frozen
class Answers:
    """One for each asked, in order."""

    version: int
    answers: tuple[Answer, ...]


@attrs.frozen
class Scored:
    """Of each sequence, of each token but the first."""

    version: int
    scores: tuple[tuple[float, ...], ...]


@attrs.frozen
class Done:
    """It is done; the weights that are held now."""

    version: int


@attrs.frozen
class Seen:
    """Whether what was laid for it is there."""

    shared: bool


@attrs.frozen
class Refusal:
    """What came instead of an answer."""

    error: str


def write(message: Any) -> bytes:
    """A message as JSON. Floats keep all their digits."""
    return json.dumps(attrs.asdict(message), allow_nan=False).encode()


def read(text: bytes, kind: type[T]) -> T:
    """A message of JSON, strictly: every field, no other, of its type.

    Raises:
        WireError: it isn't one.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from error
    found: T = _read(value, kind, "message")
    return found


def check_open(arguments: Mapping[str, Any]) -> None:
    """What a run may choose.

    Raises:
        WireError: it chooses something else.
    """
    for name, value in arguments.items():
        if name not in OPENABLE:
            raise WireError(f"message.arguments.{str(name)[:80]} is for the server's own --arguments")
        _read(value, OPENABLE[name], f"message.arguments.{name}")


def check(asks: Sequence[Ask]) -> None:
    """What may be asked.

    Raises:
        WireError: something can't be.
    """
    for i, ask in enumerate(asks):
        wrong = [
            name
            for name, fine in (
                ("prompt", bool(ask.prompt) and all(0 <= token < 1 << 31 for token in ask.prompt)),
                ("seed", 0 <= ask.seed < 1 << 64),
                ("max_tokens", ask.max_tokens >= 1),
                ("temperature", ask.temperature >= 0),
                ("top_p", 0 < ask.top_p <= 1),
                ("top_k", ask.top_k >= 0),
                ("stop", all(ask.stop)),
                ("stop_tokens", all(0 <= token < 1 << 31 for token in ask.stop_tokens)),
            )
            if not fine
        ]
        if wrong:
            raise WireError(f"message.asks[{i}].{wrong[0]} is out of range: {str(getattr(ask, wrong[0]))[:80]}")


def check_answers(asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
    """Answers as they must be: one for each, no longer than asked for, a log-prob for each token.

    Raises:
        WireError: they aren't.
    """
    if len(answers) != len(asks):
        raise WireError(f"{len(answers)} answers to {len(asks)} requests")
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        size = len(answer.tokens)
        if len(answer.logps) != size:
            raise WireError(f"answer {i} has {len(answer.logps)} log-probs for {size} tokens")
        if not answer.failed and not 1 <= size <= ask.max_tokens:
            raise WireError(f"answer {i} has {size} tokens; 1 to {ask.max_tokens} were asked for")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _read(value: Any, kind: Any, where: str) -> Any:
    if kind is Any:
        return value
    if attrs.has(kind):
        return _fields(value, kind, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin in (types.UnionType, typing.Union):
        return None if value is None else _read(value, arguments[0], where)
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_read(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is not None:  # a mapping
        if isinstance(value, dict):
            return {name: _read(item, arguments[1], f"{where}.{name}") for name, item in value.items()}
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise WireError(f"{where} must be {getattr(kind, '__name__', kind)}, not {str(value)[:80]!r}")


def _fields(value: Any, kind: Any, where: str) -> Any:
    attrs.resolve_types(kind)
    fields = {field.name: field for field in attrs.fields(kind)}
    if not isinstance(value, dict):
        raise WireError(f"{where} must be an object, not {str(value)[:80]!r}")
    if value.keys() != fields.keys():
        lacks, others = sorted(fields.keys() - value.keys()), sorted(map(str, value.keys() - fields.keys()))
        said = [f"lacks {', '.join(lacks)}"] if lacks else []
        said += [f"has {', '.join(others)[:80]}, which is unknown"] if others else []
        raise WireError(f"{where} {' and '.join(said)}")
    return kind(**{name: _read(value[name], field.type, f"{where}.{name}") for name, field in fields.items()})
