"""Memory strategies: the precision of weights and matrix products, LoRA adapters, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from rlhf.api import MemoryEntry, Plan, PlannedComponent, Problem, hookimpl, option


@attrs.frozen(kw_only=True)
class LoraConfig:
    rank: int = option(16, help="of the update B A to each adapted matrix", source="r in Hu et al. 2021", ge=1)
    alpha: int = option(32, help="the update is scaled by alpha / rank", source="alpha in Hu et al. 2021", ge=1)
    dropout: float = option(0.0, help="of the adapters' inputs, in the loss's forward only; 0 for RL", ge=0, lt=1)
    targets: tuple[str, ...] = option(
        (),
        help="names of the linear modules to adapt, such as q_proj,v_proj, or all-linear; left out, PEFT's choice for "
        "the architecture where it has one, else all-linear",
    )
    rslora: bool = option(
        False, help="scale by alpha / sqrt(rank), for high ranks", source="Kalajdzievski 2023, arXiv:2312.03732"
    )
    dora: bool = option(
        False, help="train each matrix's magnitude apart from its direction", source="Liu et al. 2024, arXiv:2402.09353"
    )

    def __attrs_post_init__(self) -> None:
        if self.dora and self.dropout:
            raise ValueError("dora has no dropout: leave one of them out")


def only_trained(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """The strategy is for roles that are trained."""
    for role in plan.roles:
        if component in role.mem and role.view == "own" and not role.role.trainable:
            what = f"--mem {role.name}={component.name}: the role {role.name} isn't trained"
            yield Problem(what, f"leave it out, or give it to one of: {_trained(plan)}")


def _trained(plan: Plan) -> str:
    return ", ".join(role.name for role in plan.roles if role.role.trainable)


@hookimpl
def rlhf_memory() -> Iterator[MemoryEntry]:
    yield MemoryEntry(
        name="bf16",
        summary="bfloat16 matrix products over fp32 weights; frozen weights in bfloat16",
        impl="rlhf_plugins.memory.precision:BFloat16",
        phase="load",
        slot="precision",
        requires={"bf16"},
        rank=20,
    )
    yield MemoryEntry(
        name="fp32",
        summary="everything in float32",
        impl="rlhf_plugins.memory.precision:Float32",
        phase="load",
        slot="precision",
        rank=10,
    )
    yield MemoryEntry(
        name="lora",
        summary="train low-rank adapters, the base frozen (PEFT)",
        config=LoraConfig,
        impl="rlhf_plugins.memory.lora:Lora",
        phase="adapt",
        applies="trainable",
        provides={"adapters"},
        constraints=(only_trained,),
    )
    yield MemoryEntry(
        name="checkpointing",
        summary="recompute each layer's activations in the backward instead of keeping them",
        impl="rlhf_plugins.memory.checkpointing:Checkpointing",
        phase="wrap",
        applies="trainable",
        constraints=(only_trained,),
    )
