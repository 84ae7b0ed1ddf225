"""The plan: a checked, frozen composition. Pure data; made without torch, readable and repeatable from `plan.json`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import cattrs

from rlhf import API_VERSION
from rlhf.entries import AlgorithmEntry, Entry, Follows, MemoryEntry, Role
from rlhf.errors import Problem, RequestError
from rlhf.facts import Gpu, Machine, ModelFacts
from rlhf.options import structure
from rlhf.recipe import RunOptions
from rlhf.registry import Registry

View = Literal["own", "adapters-off", "trunk", "adapter"]
"""How a role uses its module: alone; as the other role's module with its adapters off; by a head on its trunk; by
adapters (and a head) of its own on the other's base."""


@attrs.frozen
class Component:
    """A chosen component with its options."""

    entry: Entry
    config: Any = None
    label: str = ""
    distribution: str = ""
    version: str = ""

    @property
    def kind(self) -> str:
        return self.entry.kind

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def key(self) -> str:
        """Unique within its kind."""
        return self.label or self.entry.name

    def __str__(self) -> str:
        """How messages name it: by its flag and where it is from."""
        source = f" (from {self.distribution} {self.version})" if self.distribution else ""
        return f"--{self.kind} {self.key}{source}"

    def to_json(self) -> dict[str, Any]:
        options = cattrs.unstructure(self.config) if self.config is not None else {}
        return {
            "kind": self.kind,
            "name": self.name,
            "label": self.label,
            "options": options,
            "distribution": self.distribution,
            "version": self.version,
        }


@attrs.frozen
class RolePlan:
    """One role: its model, its memory strategies in the order they act, and the module that serves it."""

    role: Role
    model: ModelFacts
    mem: tuple[Component, ...]
    module: str
    """Name of the physical module: that of the role which owns it."""
    view: View = "own"

    @property
    def name(self) -> str:
        return self.role.name

    @property
    def chooses(self) -> bool:
        """Its memory strategies are its own, and act for it; the other views follow their module's owner."""
        return self.view in ("own", "adapter")

    def provides(self) -> frozenset[str]:
        return frozenset().union(*(component.entry.provides for component in self.mem))


@attrs.frozen
class DataSource:
    """A file, folder or hub data set, and the format that reads it."""

    path: str
    format: Component


@attrs.frozen
class Plan:
    """The composition that a run carries out."""

    algo: Component
    policy: Component
    engine: Component | None
    rewards: tuple[Component, ...]
    optim: Component
    backend: Component
    launch: Component
    trackers: tuple[Component, ...]
    roles: tuple[RolePlan, ...]
    data: tuple[DataSource, ...]
    eval_data: tuple[DataSource, ...]
    run: RunOptions
    machine: Machine
    ptx_data: tuple[DataSource, ...] = ()
    """Completions that are learnt beside, by `run.ptx_coef`."""
    notes: tuple[str, ...] = ()
    """Decisions that the user didn't make, each with its reason."""

    @property
    def algorithm_entry(self) -> AlgorithmEntry:
        assert isinstance(self.algo.entry, AlgorithmEntry)
        return self.algo.entry

    @property
    def world_size(self) -> int:
        """Ranks of the run: those it is one of, else those it is to start."""
        return max(self.run.nproc, self.machine.world_size)

    @property
    def online(self) -> bool:
        return "rollouts" in self.algo.entry.requires

    @property
    def objective(self) -> tuple[str, Literal["max", "min"]]:
        """The held-out metric that says which checkpoint is best, and its direction."""
        return self.algorithm_entry.objective or (("reward/mean", "max") if self.rewards else ("loss", "min"))

    @property
    def mem(self) -> tuple[Component, ...]:
        """Every memory strategy in use, once, in the order they act; two roles' with different options are two."""
        seen: list[Component] = []
        for role in self.roles:
            seen += [component for component in role.mem if component not in seen]
        return tuple(sorted(seen, key=phase_order))

    def components(self) -> Iterator[Component]:
        """Every chosen component, formats included."""
        yield self.algo
        yield self.policy
        if self.engine is not None:
            yield self.engine
        yield from self.rewards
        yield from self.mem
        yield self.optim
        yield self.backend
        yield self.launch
        yield from self.trackers
        yield from {source.format.name: source.format for source in self.sources}.values()

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """All data."""
        return (*self.data, *self.eval_data, *self.ptx_data)

    def provides(self) -> frozenset[str]:
        """What the chosen components and the machine provide together."""
        return self.machine.provides.union(*(component.entry.provides for component in self.components()))

    def role(self, name: str) -> RolePlan:
        for role in self.roles:
            if role.name == name:
                return role
        raise KeyError(f"the plan has no role {name!r}; it has {', '.join(r.name for r in self.roles)}")

    def to_json(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        return {
            "api_version": API_VERSION,
            "algo": self.algo.to_json(),
            "policy": self.policy.to_json(),
            "engine": self.engine.to_json() if self.engine else None,
            "rewards": [component.to_json() for component in self.rewards],
            "optim": self.optim.to_json(),
            "backend": self.backend.to_json(),
            "launch": self.launch.to_json(),
            "trackers": [component.to_json() for component in self.trackers],
            "roles": [
                {
                    "role": attrs.asdict(role.role),
                    "model": attrs.asdict(role.model),
                    "mem": [component.to_json() for component in role.mem],
                    "module": role.module,
                    "view": role.view,
                }
                for role in self.roles
            ],
            "data": [{"path": s.path, "format": s.format.to_json()} for s in self.data],
            "eval_data": [{"path": s.path, "format": s.format.to_json()} for s in self.eval_data],
            "ptx_data": [{"path": s.path, "format": s.format.to_json()} for s in self.ptx_data],
            "run": attrs.asdict(self.run),
            "machine": _machine_json(self.machine),
            "notes": list(self.notes),
        }

    def to_recipe(self) -> dict[str, Any]:
        """The recipe as resolved, enough to repeat the run: every option written out, whoever chose it. Plain data."""

        def pick(component: Component) -> dict[str, Any]:
            written = component.to_json()
            label = {"label": component.label} if component.label else {}
            return {"name": component.name, **label, **written["options"]}

        # Where files are of several formats, each is found by its name again; what was said holds for all of them.
        formats = _common([pick(source.format) for source in self.sources])
        adapted = any("adapters" in component.entry.provides for component in self.mem)
        paths = {role.name: role.model.path for role in self.roles if role.name not in ("model", "given")}
        models = {  # where a role starts as another does, nothing is written: it would be looked up in its own name
            role.name: {"model": role.model.path} if role.model.path != paths.get(role.role.start) else {}
            for role in self.roles
        }
        own = [role for role in self.roles if role.chooses]  # other views follow; a choice would undo them
        # Memory strategies are written once where they read back so, else for each role and not for all.
        alike = all(
            role.mem == tuple(c for c in self.mem if isinstance(c.entry, MemoryEntry) and c.entry.acts_on(role.role))
            and (role.role.trainable or bool(models[role.name]) or not adapted)
            for role in own
        )
        shared = [role.model.path for role in self.roles if not role.chooses and role.role.start == "model"]
        recipe: dict[str, Any] = {
            "algo": pick(self.algo),
            "policy": pick(self.policy),
            **({"engine": pick(self.engine)} if self.engine else {}),
            **({"reward": [pick(component) for component in self.rewards]} if self.rewards else {}),
            "optim": pick(self.optim),
            "backend": pick(self.backend),
            "launch": pick(self.launch),
            "track": [pick(component) for component in self.trackers],
            **({"format": formats} if formats else {}),
            **({"model": shared[0]} if shared else {}),
            **({"mem": [pick(component) for component in self.mem]} if alike else {}),
            "roles": {
                role.name: {**models[role.name], **({} if alike else {"mem": [pick(c) for c in role.mem]})}
                for role in own
            },
            "data": [source.path for source in self.data],
            "eval_data": [source.path for source in self.eval_data],
            "ptx_data": [source.path for source in self.ptx_data],
            **attrs.asdict(self.run),
        }
        written: dict[str, Any] = plain(recipe)
        return written


def _common(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The items that all of them have."""
    first = parts[0] if parts else {}
    return {key: value for key, value in first.items() if all(key in p and p[key] == value for p in parts)}


def plain(value: Any) -> Any:
    """Only what YAML and JSON know: no tuples, no subclasses."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [plain(item) for item in value]
    return value


def phase_order(component: Component) -> tuple[int, str]:
    """Sorts memory strategies: load, adapt, wrap, shard; by name within a phase, so that typing order is nothing."""
    assert isinstance(component.entry, MemoryEntry)
    return ("load", "adapt", "wrap", "shard").index(component.entry.phase), component.name


def _machine_json(machine: Machine) -> dict[str, Any]:
    found = attrs.asdict(machine)
    found["cpu_flags"] = sorted(machine.cpu_flags)
    return found


def component_from_json(content: Mapping[str, Any], registry: Registry) -> Component:
    """Build a component again, in any process, from what `plan.json` says of it.

    Raises:
        RequestError: it is not installed here, or no longer has an option.
    """
    found = registry.find(content["kind"], content["name"])
    if isinstance(found, Problem):
        raise RequestError(found)
    config, problems = structure(found.config, content["options"], f"--{content['kind']}.")
    if problems:
        raise RequestError(problems)
    return Component(found, config, content["label"], content["distribution"], content["version"])


def plan_from_json(content: Mapping[str, Any], registry: Registry) -> Plan:
    """Build a plan again from `plan.json`.

    Raises:
        RequestError: a component is not installed here, or the file is of another API version.
    """
    if content.get("api_version") != API_VERSION:
        raise RequestError(f"the plan is of API version {content.get('api_version')}, this is {API_VERSION}")

    def one(part: Mapping[str, Any]) -> Component:
        return component_from_json(part, registry)

    machine = dict(content["machine"])
    gpus = tuple(Gpu(g["name"], g["memory_bytes"], tuple(g["compute_capability"])) for g in machine.pop("gpus"))
    return Plan(
        algo=one(content["algo"]),
        policy=one(content["policy"]),
        engine=one(content["engine"]) if content["engine"] else None,
        rewards=tuple(one(part) for part in content["rewards"]),
        optim=one(content["optim"]),
        backend=one(content["backend"]),
        launch=one(content["launch"]),
        trackers=tuple(one(part) for part in content["trackers"]),
        roles=tuple(
            RolePlan(
                _role(part["role"]),
                ModelFacts(**part["model"]),
                tuple(one(component) for component in part["mem"]),
                part["module"],
                part["view"],
            )
            for part in content["roles"]
        ),
        data=tuple(DataSource(part["path"], one(part["format"])) for part in content["data"]),
        eval_data=tuple(DataSource(part["path"], one(part["format"])) for part in content["eval_data"]),
        ptx_data=tuple(DataSource(part["path"], one(part["format"])) for part in content.get("ptx_data", ())),
        run=RunOptions(**content["run"]),
        machine=Machine(
            cpus=machine["cpus"],
            cpu_flags=frozenset(machine["cpu_flags"]),
            memory_bytes=machine["memory_bytes"],
            gpus=gpus,
            world_size=machine["world_size"],
            vendor=machine.get("vendor", ""),
            unused=machine.get("unused", ""),
        ),
        notes=tuple(content["notes"]),
    )


def resource(reference: str) -> str:
    """The path of a `package:file` resource; any other text is returned as it is. Imports nothing but the parents."""
    package, sign, name = reference.partition(":")
    if not sign or Path(reference).exists():
        return reference
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return reference
    if spec is None or not spec.submodule_search_locations:
        return reference
    return str(Path(next(iter(spec.submodule_search_locations))) / name)


def _role(content: Mapping[str, Any]) -> Role:
    follows = content.get("follows")
    return Role(**{**content, "follows": Follows(**follows) if follows else None})
