"""When memory strategies fit a plan: pure functions of it. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterable

from rlhf.api import Plan, PlannedComponent, Problem, RolePlan

Constraint = Callable[[Plan, PlannedComponent], Iterable[Problem]]


def only_trained(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """The strategy is for roles that are trained."""
    for role in _those_with(plan, component):
        if not role.role.trainable:
            what = f"--mem {role.name}={component.name}: the role {role.name} isn't trained"
            yield Problem(what, f"leave it out, or give it to one of: {_trained(plan)}")


def _trained(plan: Plan) -> str:
    return ", ".join(role.name for role in plan.roles if role.role.trainable)


def under_adapters(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """Weights of so few bits can't be trained themselves; and a model that is quantised already stays as it is."""
    name = component.name
    for role in _those_with(plan, component):
        if role.role.trainable and "adapters" not in role.provides():
            what = f"--mem {name}: the role {role.name} is trained, and quantised weights take no gradient"
            frozen = [other.name for other in plan.roles if other.view == "own" and not other.role.trainable]
            alone = f"; or quantise frozen roles alone: --mem {frozen[0]}={name}" if frozen else ""
            yield Problem(what, f"train adapters on them: --mem lora,{name}{alone}")
        already = role.model.get("quantization_config")
        if already is not None:
            method = already.get("quant_method", "unknown") if isinstance(already, dict) else "unknown"
            what = f"--mem {name}: {role.model.path} is quantised already, by {method} (role {role.name})"
            yield Problem(what, f"leave --mem {name} out for it, or give the model it was made from")


def bitsandbytes_from(oldest: str, on_cpu: str = "") -> Constraint:
    """The installed bitsandbytes is one that was seen to work, or newer.

    Args:
        on_cpu: the oldest where there is no GPU, if that is another.
    """

    def known(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
        cpu = "cuda" not in plan.machine.provides
        needed = on_cpu if cpu and on_cpu else oldest
        found, numbers = _bitsandbytes()
        if numbers < _numbers(needed):
            where = " on a CPU" if cpu and on_cpu else ""
            what = f"--{component.kind} {component.name} needs bitsandbytes {needed} or newer{where}"
            yield Problem(f"{what}, and {found} is installed", f"pip install 'bitsandbytes>={needed}'")

    return known


def whole_blocks(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """Rows are of whole blocks of 64 weights, where bitsandbytes unpacks no others: on a CPU from 0.49 to 0.50, as
    tried with 0.48.0 (right), 0.49.0, 0.49.2, 0.50.0 and 0.50.2 (wrong). Of what config.json doesn't tell, and of later
    versions, the loading judges by trial."""
    found, numbers = _bitsandbytes()
    if "cuda" in plan.machine.provides or not (0, 49) <= numbers <= (0, 50):
        return
    for role in _those_with(plan, component):
        sizes = [role.model.get(*names) for names in (("hidden_size", "n_embd"), ("intermediate_size", "n_inner"))]
        wrong = [size for size in sizes if isinstance(size, int) and size % 64]
        if wrong:
            what = f"--mem {component.name}: bitsandbytes {found} unpacks rows of {wrong[0]} weights wrongly on a CPU, "
            fix = f"a model whose rows are multiples of 64, or --mem 8bit (the role {role.name})"
            yield Problem(f"{what}and {role.model.path} has such", fix)


def _bitsandbytes() -> tuple[str, tuple[int, ...]]:
    """The installed version, as text and as two numbers; of one built in place, the newest that there can be."""
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return "of its own", (1 << 30,)
    return found, _numbers(found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _those_with(plan: Plan, component: PlannedComponent) -> list[RolePlan]:
    """The roles on whose module a strategy acts."""
    return [role for role in plan.roles if component in role.mem and role.view == "own"]
