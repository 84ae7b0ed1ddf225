"""When memory strategies fit a plan: pure functions of it. Imports no torch."""

from __future__ import annotations

import functools
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


def only_frozen(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """The strategy is for roles that are frozen."""
    for role in _those_with(plan, component):
        if role.role.trainable:
            what = (
                f"--mem {role.name}={component.name}: the role {role.name} is trained, so its weights are always needed"
            )
            frozen = ", ".join(f"--mem {other.name}={component.name}" for other in plan.roles if _frozen_alone(other))
            yield Problem(what, frozen or "leave it out: no role of this run is frozen and has a module of its own")


def elsewhere(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """Between visits weights lie somewhere else than on the device."""
    if component.config.to == "host" and "cuda" not in plan.machine.provides:
        flag = f"--mem.{component.key}.to"
        what = f"{flag} host: this machine has no GPU, so the host's memory is where the weights are anyway"
        yield Problem(what, f"{flag} disk")
    if component.config.to == "host" and component.config.folder is not None:
        yield Problem(f"--mem.{component.key}.folder: nothing is written with to host", "leave one of the two out")


def offload_needs_gpu(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """Activations can leave a GPU's memory for the host's, and the host's for nowhere."""
    if component.config.offload and "cuda" not in plan.machine.provides:
        what = f"--mem.{component.key}.offload: this machine has no GPU, so activations are in the host's memory anyway"
        yield Problem(what, f"leave it out: --mem {component.key} alone keeps the layers' inputs only")


def ema_has_a_use(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """The average is for something."""
    if not (component.config.evaluate or component.config.save):
        what = f"--mem {component.key}: with neither evaluate nor save, nobody would see the average"
        yield Problem(what, "leave one of them on, or the strategy out")


def _frozen_alone(role: RolePlan) -> bool:
    return role.view == "own" and not role.role.trainable


def one_base(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """What acts on the base is the same for all who share it; who is trained, is so by adapters."""
    for role in _those_with(plan, component):
        if role.role.trainable and "adapters" not in role.provides():
            what = f"--mem {component.name}: the role {role.name} is trained whole, and a shared base stays as it is"
            yield Problem(what, f"train adapters on it: --mem lora,{component.name}")
        if role.view != "adapter":
            continue
        owner = plan.role(role.module)
        own = [c.key for c in role.mem if c not in owner.mem and "adapters" not in c.entry.provides]
        if own:
            what = f"--mem {role.name}={','.join(own)}: {role.name} is adapters on {owner.name}'s base, which has none"
            alone = f"--mem {role.name}={_without(role, component)}"
            yield Problem(what, f"the same for both, or {role.name} without {component.name}: {alone}")


def somebody_shares(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """Several roles are on one base, or it does nothing."""
    those = _those_with(plan, component)
    whole = any(role.role.trainable and "adapters" not in role.provides() for role in those)  # `one_base` tells
    if whole or any(role.view == "adapter" for role in those):
        return
    names = ", ".join(role.name for role in plan.roles)
    what = f"--mem {component.name} would do nothing: no two of {names} are on one base by it"
    hosts = [role for role in those if role.role.trainable]
    if hosts or not those:
        yield Problem(what, "leave it out; a reference that is the policy with its adapters off is one without it")
    else:
        what = f"--mem {component.name}: no trained role lends its base to {', '.join(role.name for role in those)}"
        yield Problem(what, f"give it to the policy too: --mem lora,{component.name}")


def adapters_of_the_base(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """A role starts from the very base that it shares, or from adapters of it."""
    for role in _those_with(plan, component):
        if role.view != "adapter":
            if role.model.adapter_of is not None and _sharers(plan, role):
                what = f"--mem {component.name}: {role.model.path} is adapters already, and a base is a whole model"
                fix = f"export it first: rlhf export {role.model.path} --output FOLDER, then --model FOLDER"
                yield Problem(what, fix)
            continue
        owner = plan.role(role.module)
        if role.model.path == owner.model.path and role.model.adapter_of is None:
            if not role.role.trainable:
                what = (
                    f"--mem {component.name}: {role.name} is {owner.name}'s base itself, with a head that it hasn't got"
                )
                yield Problem(what, f"give it adapters of the base: --model {role.name}=FOLDER")
            continue
        if role.model.adapter_of == owner.model.path or not role.model.known:
            continue  # what isn't known yet, a model on the hub, is judged when it is loaded
        kind = f"adapters of {role.model.adapter_of}" if role.model.adapter_of else "a whole model of its own"
        given = f"{role.model.path} (role {role.name})"
        what = f"--mem {component.name}: {given} is {kind}, not adapters of {owner.model.path}"
        fix = f"give {role.name} a module of its own: --mem {role.name}={_without(role, component)}"
        yield Problem(what, f"{fix}; or train it with --mem lora on {owner.model.path}")


def _sharers(plan: Plan, owner: RolePlan) -> list[RolePlan]:
    return [role for role in plan.roles if role.view == "adapter" and role.module == owner.module]


def _without(role: RolePlan, component: PlannedComponent) -> str:
    """A role's strategies but for one, as they are typed."""
    return ",".join(c.key for c in role.mem if c is not component and c != component)


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


def keeps_its_weights(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """Nothing puts other objects in the place of int8 weights, on which bitsandbytes keeps their scales. Tried with
    0.50.2: FSDP2 does ("no attribute 'CB'"), DeepSpeed doesn't."""
    if "replaced-weights" in plan.backend.entry.provides:
        for role in _those_with(plan, component):
            if role.role.trainable:
                what = f"--mem {component.name}: bitsandbytes {_bitsandbytes()[0]} keeps the scales on the weights, "
                fix = "--mem 4bit in its place; or keep it, and --mem zero3 in the place of the backend"
                yield Problem(f"{what}which --backend {plan.backend.name} replaces (role {role.name})", fix)


def alike_where_trained(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """All trained roles stand in one container, which is spread in one way."""
    trained = [role for role in plan.roles if role.view == "own" and role.role.trainable]
    without = [role.name for role in trained if component not in role.mem]
    if 0 < len(without) < len(trained):
        what = f"--mem {component.name}: trained roles are spread together, and {', '.join(without)} isn't so"
        yield Problem(what, f"say it for all of them: --mem {component.name}")


def seen_with(package: str, oldest: str) -> Constraint:
    """The installed version of a package is the one that was seen to work, or newer."""

    def known(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
        found, numbers = _installed(package)
        if numbers < _numbers(oldest):
            what = f"--{component.kind} {component.name} needs {package} {oldest} or newer, and {found} is installed"
            yield Problem(what, f"pip install '{package}>={oldest}'")

    return known


def _bitsandbytes() -> tuple[str, tuple[int, ...]]:
    """The installed version, as text and as two numbers."""
    found, numbers = _installed("bitsandbytes")
    return found, numbers[:2]


def _installed(package: str) -> tuple[str, tuple[int, ...]]:
    """An installed version, as text and as three numbers; of one built in place, the newest that there can be."""
    return _read(importlib.metadata.version, package)


@functools.cache  # a table of all combinations asks a thousand times, and each look takes a millisecond
def _read(version_of: Callable[[str], str], package: str) -> tuple[str, tuple[int, ...]]:
    try:
        found = version_of(package)
    except importlib.metadata.PackageNotFoundError:
        return "of its own", (1 << 30,)
    return found, _numbers(found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _those_with(plan: Plan, component: PlannedComponent) -> list[RolePlan]:
    """The roles on whose module a strategy acts."""
    return [role for role in plan.roles if component in role.mem and role.chooses]
