"""The manifest of `freeze`; no torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs

from rlhf.api import MemoryEntry, ModuleMemory, Plan, PlannedComponent, Problem, RolePlan, Weight, hookimpl, option


@attrs.frozen(kw_only=True)
class FreezeConfig:
    """Options of `freeze`."""

    layers: int = option(2, help="the last so many are trained, and the norm after them", unit="layers", ge=1)
    head: bool = option(
        False, help="train the vocabulary head too; where it is the embedding, that as well. A scalar head always is"
    )


def trained_part(weight: Weight, layers: int, config: FreezeConfig) -> int:
    """How many of the tensors of a weight are trained.

    Args:
        layers: that the model has.
    """
    if weight.kind == "score":
        return weight.count
    if weight.kind in ("embedding", "head"):
        tied = weight.kind == "embedding" and weight.name == "embed_tokens"
        return weight.count if config.head and (weight.kind == "head" or tied) else 0
    each, beside = divmod(weight.count, layers)  # beside the layers is the last norm
    return min(config.layers, layers) * each + beside


def kept(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """Weights that aren't trained have no gradient and no moments."""
    architecture, config = module.architecture, component.config
    weights: list[Weight] = []
    for weight in module.weights:
        part = trained_part(weight, architecture.layers, config)
        if weight.kind == "embedding" and not architecture.tied:
            part = 0
        if part:
            weights.append(attrs.evolve(weight, count=part))
        if part < weight.count:
            weights.append(attrs.evolve(weight, count=weight.count - part, trained=False))
    return attrs.evolve(module, weights=tuple(weights))


def _roles(plan: Plan, component: PlannedComponent) -> Iterator[RolePlan]:
    """Those that it acts for."""
    return (role for role in plan.roles if role.chooses and component in role.mem)


def fits(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """The roles are trained, and have more layers than are to be."""
    for role in _roles(plan, component):
        if not role.role.trainable:
            yield Problem(f"--mem {role.name}={component.name}: the role {role.name} isn't trained", "leave it out")
        count = role.model.get("num_hidden_layers", "n_layer") if role.model.known else None
        if count is not None and component.config.layers >= count:
            what = f"--mem.{component.key}.layers {component.config.layers}: {role.model.path} has {count} layers"
            yield Problem(what, f"give less than {count}, or leave --mem {component.name} out to train them all")


@hookimpl
def rlhf_memory() -> Iterable[MemoryEntry]:
    yield MemoryEntry(
        name="freeze",
        summary="train the last layers alone, the rest frozen: no gradients and no moments of it",
        config=FreezeConfig,
        impl="rlhf_freeze.strategy:Freeze",
        phase="adapt",
        applies="trainable",
        conflicts={"adapters", "quantised", "one-base"},
        constraints=(fits,),
        footprint=kept,
        api_version=1,
    )
