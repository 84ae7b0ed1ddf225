"""Seconds of a step by phase: the floor of each (`rlhf.floor`) over the share of it that runs were seen to reach.

    seconds = sum over a phase's passes of max(FLOPs / matmul peak, bytes / bandwidth) / efficiency

The floor's own formulas are asked, with sequences of even length in place of real ones. Recomputed layers are no part
of a floor, but they take time: checkpointing adds a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import attrs

from rlhf import floor
from rlhf.floor import AttentionShape, ModelShape, Peaks, Work
from rlhf.plan import Plan
from rlhf.planning.footprint import ModuleMemory, ranks_of
from rlhf.planning.memory import Lengths, holder, judges_of, modules, passes_of, scored_roles

EFFICIENCY: Mapping[str, float] = {"rollout": 0.25, "reward": 0.4, "experience": 0.4, "update": 0.4}
"""Measured on two cores with SmolLM2-135M (docs/performance.md: floor ratios of 2.3 to 2.9 offline). On a GPU these are
taken over, not measured."""
_DTYPES = {4.0: "float32", 2.0: "bfloat16"}


@attrs.frozen(kw_only=True)
class Duration:
    """A prediction, in seconds a step."""

    phases: Mapping[str, float]
    floor: float
    """Of all of them."""
    assumed: str
    """Where peaks and efficiencies are from."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())


@attrs.frozen
class _Even:
    """Looks like `Sequences` to the floor: rows of even length."""

    prompts: list[range]
    prompt_of: _Numbers
    lengths: _Numbers
    tokens: range

    @property
    def token_count(self) -> int:
        return len(self.tokens)


@attrs.frozen
class _Numbers:
    numbers: list[int]

    def tolist(self) -> list[int]:
        return self.numbers


def even(prompts: int, responses: int, lengths: Lengths) -> Any:
    """So many prompts with so many responses each."""
    count = prompts * responses
    return _Even(
        [range(lengths.prompt)] * prompts,
        _Numbers([i // responses for i in range(count)]),
        _Numbers([lengths.response] * count),
        range(count * lengths.response),
    )


def model_shape(module: ModuleMemory) -> ModelShape:
    """As a policy would tell it of the module when it is there."""
    a = module.architecture
    matrices = [w for w in module.weights if w.kind in ("linear", "adapter") or len(w.shape) == 3]
    head = [w for w in module.weights if w.kind == ("embedding" if a.tied else "head") and w.name != "positions"]
    size = a.heads * a.head_size
    cached = 2 * a.key_heads * a.head_size
    read = sum(w.numbers * min(w.bytes_each, module.compute) for w in matrices)
    in_head = 0 if module.scalar else a.head_numbers
    return ModelShape(
        trunk=round(sum(w.numbers * w.share for w in matrices)),
        trunk_trained=round(sum(w.numbers * w.share for w in matrices if w.trained)),
        head=in_head,
        head_trained=in_head if head and head[0].trained else 0,
        attention=tuple(
            AttentionShape(a.windows.count(window) * size, a.windows.count(window) * cached, window)
            for window in dict.fromkeys(a.windows)
        ),
        dtype=_DTYPES.get(module.compute, "float32"),
        weight_bytes=read + in_head * module.compute,
    )


def duration(plan: Plan, lengths: Lengths, peaks: Peaks, assumed: str) -> Duration | None:
    """Predict; None where a module can't be counted.

    Args:
        peaks: of one device; the ranks share a step's rows.
        assumed: where they are from.
    """
    counted = modules(plan)
    if counted.missing:
        return None
    found = counted.modules
    shapes = {name: model_shape(module) for name, module in found.items()}
    passes = passes_of(plan)
    share = -(-plan.run.batch_size // ranks_of(plan))
    sequences = cast(Any, even(share, passes.responses, lengths))
    work: dict[str, list[Work]] = {}

    def forward(role: str) -> Work:
        planned = plan.role(role)
        return floor.forward(shapes[holder(planned)], sequences, lm=planned.role.head == "lm",
                             adapters=planned.view != "adapters-off")  # fmt: skip

    if plan.online:
        work["rollout"] = [floor.decoding(shapes[plan.role("policy").module], sequences)]
        work["reward"] = [forward(role) for role in judges_of(plan)]
    work["experience"] = [forward(role) for role in scored_roles(plan)]
    work["update"] = list(_update(plan, found, shapes, sequences)) * passes.epochs
    if plan.ptx_data:  # so many rows each optimiser step
        beside = cast(Any, even(-(-plan.run.ptx_batch_size // ranks_of(plan)), 1, lengths))
        steps = passes.epochs * int(getattr(plan.algo.config, "minibatches", 1))
        work["update"] += [floor.training(shapes[holder(plan.role("policy"))], beside, lm=True)] * steps
    seconds = {name: sum(w.seconds(peaks) for w in works) for name, works in work.items() if works}
    return Duration(
        phases={name: value / EFFICIENCY[name] for name, value in seconds.items()},
        floor=sum(seconds.values()),
        assumed=f"{assumed}; reached of the floor: " + ", ".join(f"{name} {EFFICIENCY[name]:.0%}" for name in seconds),
    )


def _update(
    plan: Plan, found: Mapping[str, ModuleMemory], shapes: Mapping[str, ModelShape], sequences: Any
) -> Iterator[Work]:
    for name, module in found.items():
        if module.trainable:
            lm = any(holder(role) == name and role.role.trainable and role.role.head == "lm" for role in plan.roles)
            yield floor.training(shapes[name], sequences, lm=lm)
            if module.recomputes:
                yield floor.forward(shapes[name], sequences, lm=False)
