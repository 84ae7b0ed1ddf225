"""How far a step is from what the machine allows.

    floor = sum over a step's passes of max(required FLOPs / matmul peak, required bytes / bandwidth)
    perf/floor_ratio = step time / floor        perf/mfu = required FLOPs / (step time x matmul peak)

Required is what the algorithm cannot do without, whatever computes it: matrix products and attention, a tied head once
and only where a token is scored, each shared prompt once, nothing padded, nothing computed twice. A trained matrix
costs 6 FLOPs a weight and token (2 forward, 2 for its input's gradient, 2 for its own), one that is frozen below a
trained one 4, one without gradient 2. Peaks are measured (`rlhf.peaks`), not read off a data sheet.

Left out, so that the floor is below what is possible and never above: norms, softmax, embeddings, scalar heads, the
optimiser's own traffic, sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from rlhf.sequences import Sequences
    from rlhf.world import World

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number, by the name of its dtype."""


@attrs.frozen
class AttentionShape:
    """Attention layers alike in what a query sees; widths are summed over them."""

    width: int
    """Query heads x head dimension: a pair of tokens costs 4 FLOPs of each, in its score and in its value."""
    cached: int
    """Numbers of a token's keys and values."""
    window: int | None = None
    """The most tokens that a query sees, itself included; None is all."""


@attrs.frozen
class ModelShape:
    """What a forward of a module computes and reads. Told by the policy that built it."""

    trunk: int
    """Weights that each token is multiplied by; of experts those that a token goes through."""
    trunk_trained: int
    """Of these, trained: all, none, or the adapters."""
    head: int
    """Weights of the vocabulary head; 0 where the module has none."""
    head_trained: int
    attention: tuple[AttentionShape, ...]
    dtype: str
    """Of the products, a key of `BYTES`."""
    weight_bytes: float
    """Of trunk and head, read once."""


@attrs.frozen
class Work:
    """What a pass must compute and move."""

    flops: float
    bytes: float
    dtype: str = "float32"

    def seconds(self, peaks: Peaks) -> float:
        """The least it can take."""
        return max(self.flops / peaks.flops[self.dtype], self.bytes / peaks.bandwidth)


@attrs.frozen
class Peaks:
    """What the machine was measured to do."""

    flops: Mapping[str, float]
    """FLOP/s of matrix products, by dtype."""
    bandwidth: float
    """Bytes/s read from memory."""

    def best(self, other: Peaks) -> Peaks:
        """The higher of each: what is lower was measured while something else ran."""
        dtypes = {**self.flops, **other.flops}
        flops = {name: max(peaks.flops.get(name, 0.0) for peaks in (self, other)) for name in dtypes}
        return Peaks(flops, max(self.bandwidth, other.bandwidth))


def token_count(sequences: Sequences) -> int:
    """Tokens of prompts, each once, and of responses."""
    return sum(len(prompt) for prompt in sequences.prompts) + len(sequences.tokens)


def pair_count(sequences: Sequences, window: int | None = None) -> int:
    """(query, key) pairs of causal attention: of each prompt once, and of each response with its prompt and itself."""
    pairs = sum(_seen(0, len(prompt), window) for prompt in sequences.prompts)
    for of, length in zip(sequences.prompt_of.tolist(), sequences.lengths.tolist(), strict=True):
        pairs += _seen(len(sequences.prompts[of]), length, window)
    return pairs


def _seen(before: int, count: int, window: int | None) -> int:
    """Keys that `count` queries see which stand behind `before` tokens: before + 1, before + 2, ... at most window."""
    if window is None:
        return count * before + count * (count + 1) // 2
    free = min(max(window - before, 0), count)  # queries that see all there is
    return free * before + free * (free + 1) // 2 + (count - free) * window


def forward(shape: ModelShape, sequences: Sequences, *, lm: bool, adapters: bool = True) -> Work:
    """A forward without gradient.

    Args:
        lm: the vocabulary head is read, before each of the policy's own response tokens.
        adapters: whether they are on; off, what is trained of the trunk isn't computed.
    """
    trunk = shape.trunk - (0 if adapters else shape.trunk_trained)
    flops = 2.0 * trunk * token_count(sequences) + _attention(shape, sequences)
    if lm:
        flops += 2.0 * shape.head * sequences.token_count
    return Work(flops, shape.weight_bytes, shape.dtype)


def training(shape: ModelShape, sequences: Sequences, *, lm: bool) -> Work:
    """A forward and its backward: weights are read twice."""
    flops = (4.0 * shape.trunk + 2.0 * shape.trunk_trained) * token_count(sequences)
    flops += 3.0 * _attention(shape, sequences)  # backward: gradients of both factors of each product
    if lm:
        flops += (4.0 * shape.head + 2.0 * shape.head_trained) * sequences.token_count
    return Work(flops, 2.0 * shape.weight_bytes, shape.dtype)


def decoding(shape: ModelShape, sequences: Sequences) -> Work:
    """Sampling the responses: prompts in one forward, then a token of each response at a time.

    Weights are read once for each position of the longest response, keys and values once for each token that sees
    them, those of a shared prompt once for all its responses.
    """
    lengths = sequences.lengths.tolist()
    flops = 2.0 * shape.trunk * token_count(sequences) + _attention(shape, sequences)
    flops += 2.0 * shape.head * len(sequences.tokens)
    longest: dict[int, int] = {}  # prompt -> its longest response
    for of, length in zip(sequences.prompt_of.tolist(), lengths, strict=True):
        longest[of] = max(longest.get(of, 0), length)
    read = 0.0
    for layer in shape.attention:
        for of, length in longest.items():
            prompt = len(sequences.prompts[of])
            read += layer.cached * (_seen(prompt, length, layer.window) - _seen(0, length, layer.window))
        read += layer.cached * sum(_seen(0, length, layer.window) for length in lengths)
    moved = shape.weight_bytes * max(lengths, default=0) + read * BYTES[shape.dtype]
    return Work(flops, moved, shape.dtype)


def _attention(shape: ModelShape, sequences: Sequences) -> float:
    return sum(4.0 * layer.width * pair_count(sequences, layer.window) for layer in shape.attention)


def joined(ranks: Sequence[Sequence[Work]]) -> list[Work]:
    """The ranks' passes, which they make at the same time, as one each."""
    longest = max(ranks, key=len)
    return [
        attrs.evolve(
            work,
            flops=sum(works[i].flops for works in ranks if i < len(works)),
            bytes=sum(works[i].bytes for works in ranks if i < len(works)),
        )
        for i, work in enumerate(longest)
    ]


def together(ranks: Sequence[Peaks]) -> Peaks:
    """What ranks can do that were measured at the same time."""
    dtypes = set[str]().union(*(peaks.flops for peaks in ranks))
    flops = {name: sum(peaks.flops.get(name, 0.0) for peaks in ranks) for name in dtypes}
    return Peaks(flops, sum(peaks.bandwidth for peaks in ranks))


ShapeOf = Callable[[str], "tuple[str, ModelShape | None, bool, bool]"]
"""Role -> (its module, the module's shape, whether it reads the vocabulary head, whether adapters are on)."""


class Ledger:
    """The passes of a step, noted as they are asked for."""

    def __init__(self, shape_of: ShapeOf) -> None:
        self._shape_of = shape_of
        self.start()

    def start(self) -> None:
        """A step begins; what was noted before it (an evaluation, say) isn't its own."""
        self._known = True
        self._passes: list[Work] = []
        self._before_update: list[Work] = []

    @property
    def dtypes(self) -> set[str]:
        """Of the products noted."""
        return {work.dtype for work in (*self._passes, *self._before_update)}

    def scored(self, sequences: Sequences, roles: Sequence[str]) -> None:
        """A forward without gradient."""
        for shape, lm, adapters in self._modules(roles):
            trained = adapters and shape.trunk_trained > 0
            passes = self._before_update if trained else self._passes
            passes.append(forward(shape, sequences, lm=lm, adapters=adapters))

    def sampled(self, sequences: Sequences) -> None:
        """A rollout by the policy."""
        for shape, _, _ in self._modules(("policy",)):
            self._passes.append(decoding(shape, sequences))

    def learnt(self, sequences: Sequences, roles: Iterable[str], *, at_once: bool) -> None:
        """An optimiser step's forward and backward. `at_once`: it is the step's first, of all its experience, and in
        one forward, whose values and log-probs are the old ones: none had to be computed before."""
        if at_once:
            self._before_update = []
        for shape, lm, adapters in self._modules(roles):
            trained = adapters and shape.trunk_trained > 0
            self._passes.append(
                training(shape, sequences, lm=lm) if trained else forward(shape, sequences, lm=lm, adapters=adapters)
            )

    def metrics(self, peaks: Peaks, seconds: float, world: World | None = None) -> dict[str, float]:
        """Of the step, which took so long: all ranks' passes against what all of them could do together. None where a
        policy tells no shape: a floor that lacks some of the passes would flatter."""
        passes = [*self._passes, *self._before_update]
        if world is not None and world.size > 1:
            own = [self._known, [attrs.asdict(work) for work in passes], attrs.asdict(peaks)]
            everybody = world.gather(own)
            self._known = all(known for known, _, _ in everybody)
            passes = joined([[Work(**work) for work in works] for _, works, _ in everybody])
            peaks = together([Peaks(**found) for _, _, found in everybody])
        floor = sum(work.seconds(peaks) for work in passes)
        if not self._known or floor <= 0 or seconds <= 0:
            return {}
        return {
            "perf/floor_seconds": floor,
            "perf/floor_ratio": seconds / floor,
            "perf/mfu": sum(work.flops / peaks.flops[work.dtype] for work in passes) / seconds,
        }

    def _modules(self, roles: Iterable[str]) -> list[tuple[ModelShape, bool, bool]]:
        """Roles that share a module share its pass."""
        found: dict[tuple[str, bool], tuple[ModelShape, bool, bool]] = {}
        for role in roles:
            module, shape, lm, adapters = self._shape_of(role)
            if shape is None:
                self._known = False
                continue
            before = found.get((module, adapters))
            found[module, adapters] = (shape, lm or (before is not None and before[1]), adapters)
        return list(found.values())
