"""Does the engine hold the trainer's weights? Its log-probs of tokens that it has just sampled are compared with the
trainer's own forward; where they differ too much, the weights are, one by one.

The log-probs are those of decoding, with keys and values from the cache: so they tell of a cache that was not reset,
and of a head that was not packed anew, as well as of a weight that was not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor

from rlhf.api import Sequences, World
from rlhf_plugins.engines.vllm.worker import fingerprint

SEQUENCES = 4
"""That are compared, at most, on each rank; they have a few hundred tokens together."""


@attrs.frozen
class Tolerance:
    """How far log-probs may be apart, in nats. In float32 the largest counts: measured 2e-5. Where products are rounded
    to fewer digits a token in a thousand may be far off, and the mean counts: measured .04 in bfloat16 on a model of
    135M; a head that is one step of training behind is off by .75."""

    largest: float | None
    mean: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(1e-3, 1e-3),
    torch.bfloat16: Tolerance(None, 0.15),
    torch.float16: Tolerance(None, 0.05),
}
WEIGHT_TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of a weight's fingerprint, relative."""


@attrs.frozen
class Gap:
    """Between two lists of log-probs, over all ranks."""

    mean: float
    largest: float
    tokens: int

    def within(self, tolerance: Tolerance) -> bool:
        """NaN is not."""
        return self.mean <= tolerance.mean and (tolerance.largest is None or self.largest <= tolerance.largest)


def gap(engine: Tensor, trainer: Tensor, world: World) -> Gap:
    """Both float32 [N] of this rank; N may be 0."""
    apart = (engine.double().cpu() - trainer.double().cpu()).abs()
    apart = torch.nan_to_num(apart, nan=torch.inf)
    total, count = world.sum(torch.stack([apart.sum(), torch.tensor(float(len(apart)), dtype=torch.float64)])).tolist()
    largest = float(world.max(apart.max() if len(apart) else torch.zeros((), dtype=torch.float64)))
    return Gap(total / max(count, 1.0), largest, int(count))


def sample_of(sequences: Sequences) -> Tensor:
    """Rows to compare: the first whole groups' first responses, of different prompts where there are several. int64."""
    groups = [(row, group) for row, group in enumerate(sequences.group.tolist()) if sequences.lengths[row]]
    first = {group: row for row, group in reversed(groups)}
    rows = sorted(first.values())[:SEQUENCES]
    rows += [row for row, _ in groups if row not in rows][: SEQUENCES - len(rows)]
    return torch.tensor(rows, dtype=torch.long)


def differing(
    stream: Iterator[tuple[str, Tensor]],
    fingerprints: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, list[float]]],
    tolerance: float,
) -> tuple[dict[str, float], int]:
    """(weights that the engine holds otherwise than they are -> by how much, relative; how many were compared)."""
    wanted, shapes = {}, {}
    for name, tensor in stream:
        if tensor.ndim in (1, 2):
            wanted[name], shapes[name] = fingerprint(tensor), tuple(tensor.shape)
    held = fingerprints(shapes)
    apart: dict[str, float] = {}
    for name, found in held.items():
        right, own = torch.tensor(wanted[name]), torch.tensor(found)
        relative = float((own - right).norm() / right.norm().clamp(min=1e-12))
        if not relative <= tolerance:
            apart[name] = relative
    return dict(sorted(apart.items(), key=lambda item: -item[1])), len(held)
