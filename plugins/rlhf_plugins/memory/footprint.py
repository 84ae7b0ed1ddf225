"""What the strategies make of a module's memory: see `rlhf.api.ModuleMemory`. Imports no torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs

from rlhf.api import (
    Footprint,
    ModuleMemory,
    Plan,
    PlannedComponent,
    Weight,
    divided,
    on_disk,
    on_host,
    recomputed,
)

ALL_LINEAR = ("all-linear",)
BUCKET = 50_000_000
"""Gradients that DeepSpeed adds up over ranks in one go, at most."""
_BLOCK = 64
"""Weights of a 4-bit block."""


def lora(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """Everything is frozen, in the precision of products; the adapters are trained in float32. PEFT trains a copy of a
    scalar head and keeps the original."""
    if plan.role(module.role).view == "adapter" and plan.role(module.role).model.adapter_of is not None:
        return module  # it goes on with those it has
    config = component.config
    targets = tuple(config.targets) or by_architecture(module.architecture.model_type)
    weights: list[Weight] = []
    for weight in module.weights:
        if weight.kind == "score":
            weights += [attrs.evolve(weight, trained=False), attrs.evolve(weight, name=f"{weight.name}.copy")]
            continue
        size = min(weight.bytes_each, module.compute)
        weights.append(attrs.evolve(weight, trained=False, bytes_each=size))
        if weight.kind == "linear" and (targets == ALL_LINEAR or _named(weight.name, targets)):
            weights += _adapters(weight, config.rank, config.dora, trained=True)
    return attrs.evolve(module, weights=tuple(weights))


def _adapters(weight: Weight, rank: int, dora: bool, trained: bool) -> Iterator[Weight]:
    rows, columns = weight.shape
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, columns), "B": (rows, rank)}
    if dora:
        shapes["magnitude"] = (rows,)
    for part, shape in shapes.items():
        yield Weight(name=f"{weight.name}.{part}", shape=shape, kind="adapter", count=weight.count, trained=trained)


def shared_base(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """A role that brings adapters of the base has those of its folder. What a role draws anew is `lora`'s to tell."""
    role = plan.role(module.role)
    if role.view != "adapter" or role.model.adapter_of is None:
        return module
    saved = json.loads((Path(role.model.path) / "adapter_config.json").read_text(encoding="utf-8"))
    targets = saved["target_modules"]
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    weights: list[Weight] = []
    for weight in module.weights:
        weights.append(attrs.evolve(weight, trained=module.trainable and weight.kind == "score"))
        if weight.kind == "linear" and (targets == ALL_LINEAR or _named(weight.name, targets)):
            weights += _adapters(weight, int(saved["r"]), bool(saved.get("use_dora")), trained=module.trainable)
    return attrs.evolve(module, weights=tuple(weights))


def offload(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """To the host's memory where the device is a GPU, else to a file, unless the user says which."""
    to = component.config.to
    if to == "host" or (to == "auto" and "cuda" in plan.machine.provides):
        return on_host("weights", visits=True)(module, plan, component)
    return on_disk(module, plan, component)


def checkpointing(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """Of each layer its input, on the device or on the host."""
    module = recomputed(module, plan, component)
    return on_host("activations")(module, plan, component) if component.config.offload else module


def _named(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target.rpartition(".")[2] for target in targets)


@functools.cache
def by_architecture(model_type: str) -> tuple[str, ...]:
    """The targets that PEFT chooses, read from its source: importing it would bring torch."""
    return tuple(_chosen_by_peft().get(model_type, ALL_LINEAR))


@functools.cache
def _chosen_by_peft() -> Mapping[str, list[str]]:
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        return {}
    source = (Path(found.origin).parent / "utils" / "constants.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        name = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets):
            chosen: Mapping[str, list[str]] = ast.literal_eval(node.value)
            return chosen
    return {}


def four_bit(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """Half a byte a linear weight; of each block of 64 its magnitude: a float32, or, quantised twice, a byte, with a
    float32 for each 256 of them and one for their mean. The 16 values of the code are kept with each tensor."""
    double = component.config.double_quant

    def beside(numel: int) -> float:
        blocks = -(-numel // _BLOCK)
        return 16 * 4 + (blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks)

    return _packed(module, 0.5, lambda weight: beside(weight.numel))


def eight_bit(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """A byte a linear weight, and a float32 a row. bitsandbytes' product keeps its input, needed or not."""
    module = _packed(module, 1.0, lambda weight: 4.0 * weight.shape[0])
    return attrs.evolve(module, inputs=frozenset(w.name for w in module.weights if w.kind == "linear"))


def _packed(module: ModuleMemory, bytes_each: float, beside: Callable[[Weight], float]) -> ModuleMemory:
    weights = [
        attrs.evolve(w, bytes_each=bytes_each, beside=beside(w), trained=False) if w.kind == "linear" else w
        for w in module.weights
    ]
    return attrs.evolve(module, weights=tuple(weights), unpacks=True)


_SPREAD: Mapping[int, Footprint] = {
    1: divided("optimizer"),
    2: divided("optimizer", "gradients"),
    3: divided("optimizer", "gradients", "weights"),
}
_AWAY: Mapping[str, Footprint] = {"optimizer": on_host("optimizer"), "parameters": on_host("weights")}


def zero(module: ModuleMemory, plan: Plan, component: PlannedComponent) -> ModuleMemory:
    """Optimiser state, then gradients, then weights are spread over ranks. DeepSpeed steps on float32 masters of its
    own, spread too, which stand beside the weights, and go where the optimiser's state goes; for the step it copies a
    rank's gradients into one piece, there too. On their way between device and host, stages 1 and 2 lay the largest
    gradient at both ends, and a rank's weights at the host's. Gradients are gathered in a buffer that is as large as it
    may become. Stage 3 adds them up over ranks in another. Under the others, on CPUs, where gloo gathers into memory of
    its own, each step makes another copy of the weights: it counts all the time, as the heap is at its largest then.
    Under stage 3 whole layers come and go between what stays, and leave gaps in a CPU's heap: a quarter of the whole
    gradients, which puts 13 runs of three shapes within a tenth."""
    numbers = sum(weight.numbers for weight in module.trained)
    masters = 4.0 * numbers / plan.world_size
    bucket = 4.0 * min(sum(weight.numbers for weight in module.own), BUCKET) if numbers else 0.0
    module = _SPREAD[component.config.stage](module, plan, component)
    for part in component.config.offload:
        module = _AWAY[part](module, plan, component)
    copies = {"bucket": bucket}
    if component.config.stage == 3:
        copies["bucket, added up"] = bucket
        if "cuda" not in plan.machine.provides:
            copies["gaps that whole layers leave"] = 4.0 * numbers / 4
    elif "cuda" not in plan.machine.provides:
        copies["gathered"] = 4.0 * numbers
    away = "optimizer" in component.config.offload
    where = "host " if away else ""
    copies |= {f"{where}masters": masters, f"{where}gradients in one piece": masters}
    if away and component.config.stage < 3 and numbers:
        largest = max(weight.numel * weight.bytes_each for weight in module.trained)
        own = sum(weight.numbers * weight.bytes_each for weight in module.trained) / plan.world_size
        copies |= {
            "a gradient on its way": largest,
            "host gradient on its way": largest,
            "host weights on their way": own,
        }
    return attrs.evolve(module, copies={**module.copies, **copies} if numbers else module.copies)
