"""Composition: from a recipe to a plan, or to every reason why not. Pure data; imports no torch, loads no weights.

    pick -> structure the options -> modules present? -> capabilities -> facts -> constraints -> frozen plan

Where the user names nothing, the highest rank among the legal wins. Nothing here knows a plugin's name.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from rlhf import facts
from rlhf.entries import KINDS, AlgorithmEntry, Entry, FormatEntry, MemoryEntry, Role, StarterEntry
from rlhf.errors import Problem, RequestError
from rlhf.facts import Machine, ModelFacts
from rlhf.options import fields, structure
from rlhf.plan import Component, DataSource, Plan, RolePlan, phase_order, resource
from rlhf.recipe import Pick, Recipe, RoleRecipe, RunOptions
from rlhf.registry import Registry
from rlhf.rows import PromptRow, row_needs

Picks = dict[str, tuple[Pick, ...]]
_SINGLE = ("policy", "engine", "optim", "backend", "launch")
_MOST_DRAFTS = 400
"""Drafts tried before giving up; each takes well under a millisecond."""


def compose(recipe: Recipe, registry: Registry, machine: Machine) -> Plan:
    """Check and freeze a recipe.

    Raises:
        RequestError: with all problems at once and, where it is a matter of combination, the nearest legal one.
    """
    return _Composer(recipe, registry, machine).solve()


def chosen_entries(recipe: Recipe, registry: Registry) -> dict[str, list[Entry]]:
    """The components that a recipe would use, for `--help`: named ones, and those taken unasked. Raises nothing."""
    composer = _Composer(recipe, registry, facts.machine())
    for _, draft in composer.drafts(composer.named()):
        components = [*draft.components] if draft.components else []
        return {kind: [c.entry for c in components if c.kind == kind] for kind in KINDS}
    return {}


@attrs.define
class _Draft:
    """A composition under inspection."""

    request: list[Problem] = attrs.Factory(list)
    """Problems that another combination wouldn't mend: a bad option, a missing file."""
    combination: list[Problem] = attrs.Factory(list)
    components: list[Component] = attrs.Factory(list)
    plan: Plan | None = None

    @property
    def problems(self) -> list[Problem]:
        unique = {str(problem): problem for problem in [*self.request, *self.combination]}
        return list(unique.values())


@attrs.define
class _Composer:
    recipe: Recipe
    registry: Registry
    machine: Machine

    def named(self) -> Picks:
        return {kind: picks for kind, picks in self.recipe.picks.items() if picks}

    def solve(self) -> Plan:
        unknown: list[Problem] = []
        named: Picks = {}
        for kind, picks in self.named().items():
            kept = []
            for pick in picks:
                found = self.registry.find(kind, pick.name)
                if isinstance(found, Problem):
                    unknown.append(found)
                else:
                    kept.append(pick)
            if kept:
                named[kind] = tuple(kept)
        first: _Draft | None = None
        for _, draft in self.drafts(named):
            first = first or draft
            if draft.plan is not None and not draft.problems and not unknown:
                return draft.plan
            if draft.request or unknown:  # no other combination mends it
                first = draft
                break
        if first is None:
            raise RequestError(unknown or [Problem("no algorithm is installed", "pip install rlhf-kit again")])
        suggestion = "" if first.request or unknown else self._nearest(named)
        raise RequestError([*unknown, *first.problems], suggestion)

    # What to try

    def drafts(self, named: Picks) -> Iterator[tuple[Picks, _Draft]]:
        """Drafts with every choice the user left open filled in, the best-ranked first."""
        tried = 0
        for algo in named.get("algo") or self._ranked("algo"):
            entry = self.registry.find("algo", algo.name)
            if not isinstance(entry, AlgorithmEntry):
                continue
            starter = self._starter(entry)
            settings = self._settings(entry, starter)
            open_choices: list[list[tuple[str, tuple[Pick, ...]]]] = []
            for kind in _SINGLE:
                if kind == "engine" and "rollouts" not in entry.requires and "engine" not in named:
                    continue
                preferred = settings.get(kind)
                candidates = named.get(kind) or ((Pick(preferred),) if preferred else self._ranked(kind))
                # A kind of which nothing is installed is left out; the draft says what misses it.
                open_choices.append([(kind, (pick,)) for pick in candidates] or [(kind, ())])
            for slot in sorted({e.slot for e in self._memory() if e.slot and e.rank}):
                open_choices.append(
                    [("mem:" + slot, (pick,)) for pick in self._slot(slot, named, settings)] or [("", ())]
                )
            for choice in _best_first(open_choices):
                tried += 1
                if tried > _MOST_DRAFTS:
                    return
                picks = {kind: chosen for kind, chosen in choice if kind and not kind.startswith("mem:")}
                fill = tuple(pick for kind, chosen in choice if kind.startswith("mem:") for pick in chosen)
                full = {
                    **picks,
                    "algo": (algo,),
                    "mem": named.get("mem", ()),
                    "reward": named.get("reward", ()) or self._picks_of(settings.get("reward")),
                    "track": named.get("track", ()) or tuple(self._ranked("track")),
                }
                yield full, self._draft(full, fill, entry, starter, settings)

    def _ranked(self, kind: str) -> list[Pick]:
        return [Pick(entry.name) for entry in self.registry.entries(kind) if entry.rank > 0]

    def _memory(self) -> list[MemoryEntry]:
        return [entry for entry in self.registry.entries("mem") if isinstance(entry, MemoryEntry)]

    def _slot(self, slot: str, named: Picks, settings: Mapping[str, Any]) -> list[Pick]:
        """Who may fill a slot that nobody named fills; the settings' choice first."""
        members = [entry.name for entry in self._memory() if entry.slot == slot and entry.rank]
        everybody = {entry.name for entry in self._memory() if entry.slot == slot}
        if any(pick.name in everybody for pick in named.get("mem", ())):
            return []
        preferred = [pick.name for pick in self._picks_of(settings.get("mem")) if pick.name in members]
        return [Pick(name) for name in dict.fromkeys([*preferred, *members])]

    @staticmethod
    def _picks_of(value: Any) -> tuple[Pick, ...]:
        items = [] if value is None else [value] if isinstance(value, str) else value
        return tuple(Pick(item) for item in items)

    def _starter(self, entry: AlgorithmEntry) -> StarterEntry | None:
        wanted = entry.data or PromptRow
        fitting = [
            starter
            for starter in self.registry.starters
            if starter.data_type is wanted and (not starter.algorithms or entry.name in starter.algorithms)
        ]
        # One made for this very algorithm goes before one made for all of its kind.
        return max(fitting, key=lambda s: (bool(s.algorithms), s.rank), default=None)

    def _settings(self, entry: AlgorithmEntry, starter: StarterEntry | None) -> dict[str, Any]:
        """What stands where the user says nothing: the algorithm's defaults, then the starter's for its own parts."""
        settings = dict(entry.defaults)
        own_model, own_data = not self.recipe.model, not self.recipe.data
        if starter is not None:
            for applies, part in (
                (own_model, starter.with_model),
                (own_data, starter.with_data),
                (own_model and own_data, starter.with_both),
            ):
                if applies:
                    settings.update(part)
        return settings

    # One draft

    def _draft(
        self, picks: Picks, fill: tuple[Pick, ...], algorithm: AlgorithmEntry, starter: StarterEntry | None,
        settings: Mapping[str, Any],
    ) -> _Draft:  # fmt: skip
        draft = _Draft()
        notes: list[str] = []
        run, problems = structure(
            RunOptions, {**{k: v for k, v in settings.items() if k in fields(RunOptions)}, **self.recipe.run}, "--"
        )
        draft.request += problems
        made = {
            kind: [self._component(kind, pick, settings, draft) for pick in chosen] for kind, chosen in picks.items()
        }
        for kind, components in made.items():
            if kind != "mem":
                draft.components.extend(component for component in components if component is not None)
                keys = [component.key for component in components if component is not None]
                for key in sorted({key for key in keys if keys.count(key) > 1}):
                    label = f"--{kind} {key}:LABEL"
                    draft.request.append(Problem(f"--{kind} {key} is given twice", f"tell them apart: {label}"))
        for kind in ("algo", "engine", "reward", "backend"):
            if picks.get(kind) and kind not in self.recipe.picks:
                names = ", ".join(pick.name for pick in picks[kind])
                notes.append(f"--{kind} {names}: taken because none was named")
        fillers = [c for c in (self._component("mem", pick, settings, draft) for pick in fill) if c is not None]
        mem = [component for component in made.get("mem", []) if component is not None]
        draft.components.extend([*mem, *fillers])
        algo = made["algo"][0]
        roles: list[RolePlan] = []
        if algo is not None:
            roles = self._roles(algo, [c for c in made["reward"] if c], mem, fillers, starter, settings, draft, notes)
        self._unplaced_options(draft)
        self._kinds_fit(algorithm, picks, draft)
        data = self._sources(self.recipe.data or ((starter.data,) if starter else ()), settings, draft)
        if not data and not self.recipe.data:
            what = f"--data is needed: {algorithm.name} has no data of its own to start from"
            draft.request.append(Problem(what, row_needs(algorithm.data or PromptRow)))
        held_out = self.recipe.eval_data
        if not held_out and not self.recipe.data and starter:
            held_out = (starter.eval_data,)
        if starter and not self.recipe.data:
            notes.append(f"data: the starter {starter.name!r}, because no --data was given")
        eval_data = self._sources(held_out, settings, draft)
        required = [made[kind][0] if made.get(kind) else None for kind in ("policy", "optim", "backend", "launch")]
        for kind, component in zip(("policy", "optim", "backend", "launch"), required, strict=True):
            if component is None and not draft.request:
                draft.request.append(Problem(f"no --{kind} is installed"))
        if draft.request or algo is None:
            return draft
        policy, optim, backend, launch = (component for component in required if component is not None)
        draft.plan = Plan(
            algo=algo,
            policy=policy,
            engine=made["engine"][0] if made.get("engine") else None,
            rewards=tuple(component for component in made["reward"] if component),
            optim=optim,
            backend=backend,
            launch=launch,
            trackers=tuple(component for component in made["track"] if component),
            roles=tuple(roles),
            data=data,
            eval_data=eval_data,
            run=run,
            machine=self.machine,
            notes=tuple(notes),
        )
        draft.combination += _combination_problems(draft.plan, self.registry)
        return draft

    def _component(self, kind: str, pick: Pick, settings: Mapping[str, Any], draft: _Draft) -> Component | None:
        entry = self.registry.find(kind, pick.name)
        if isinstance(entry, Problem):
            draft.request.append(entry)
            return None
        prefix = f"{kind}.{pick.key}" if kind in ("reward", "mem", "track") else kind
        known = fields(entry.config) if entry.config is not None else {}
        # A default for an option that this component doesn't have means nothing to it; a user's option is checked.
        defaults = {
            key[len(prefix) + 1 :]: value
            for key, value in settings.items()
            if key.startswith(prefix + ".") and key[len(prefix) + 1 :] in known
        }
        given = {**defaults, **pick.options, **self.recipe.options.get(prefix, {})}
        config, problems = structure(entry.config, given, f"--{prefix}.")
        draft.request += problems
        if problems:
            return None
        offer = self.registry.offer(kind, pick.name)
        assert offer is not None
        return Component(entry, config, pick.label, offer.distribution, offer.version)

    def _unplaced_options(self, draft: _Draft) -> None:
        keys = {f"{c.kind}.{c.key}" for c in draft.components} | {c.kind for c in draft.components} | {"format"}
        role_mem = {f"mem.{pick.key}" for role in self.recipe.roles.values() for pick in role.mem or ()}
        for prefix, options in self.recipe.options.items():
            if prefix not in keys | role_mem:
                kind, _, name = prefix.partition(".")
                what = f"--{prefix}.{next(iter(options))}: the run has no --{kind} {name}".rstrip()
                draft.request.append(Problem(what, f"add --{kind} {name or 'NAME'}, or leave the option out"))

    def _kinds_fit(self, algorithm: AlgorithmEntry, picks: Picks, draft: _Draft) -> None:
        online = "rollouts" in algorithm.requires
        if not online:
            for kind in ("engine", "reward"):
                if picks.get(kind):
                    what = f"--{kind} {picks[kind][0].name}: {algorithm.name} samples nothing, it learns from its data"
                    draft.combination.append(Problem(what, f"leave --{kind} out"))
        elif algorithm.rewards and not picks.get("reward"):
            known = ", ".join(entry.name for entry in self.registry.entries("reward"))
            what = f"--reward is needed: {algorithm.name} learns from rewards, and this data brings none of its own"
            draft.request.append(Problem(what, f"installed: {known}; several add up"))

    def _roles(
        self, algo: Component, rewards: list[Component], mem: list[Component], fillers: list[Component],
        starter: StarterEntry | None, settings: Mapping[str, Any], draft: _Draft, notes: list[str],
    ) -> list[RolePlan]:  # fmt: skip
        wanted: list[Role] = list(_roles_of(algo))
        for reward in rewards:
            for role in _roles_of(reward):
                wanted.append(attrs.evolve(role, name=reward.label) if reward.label else role)
        names = [role.name for role in wanted]
        for name in self.recipe.roles:
            if name not in names:
                fix = f"its roles: {', '.join(names)}"
                draft.request.append(Problem(f"{algo.name} has no role {name!r} in this combination", fix))
        for name in sorted({name for name in names if names.count(name) > 1}):
            draft.request.append(
                Problem(f"two components ask for a role {name!r}", f"label one: --reward NAME:{name}2")
            )
        models: dict[str, ModelFacts] = {}
        plans: list[RolePlan] = []
        for role in wanted:
            chosen = self.recipe.roles.get(role.name, RoleRecipe())
            found = self._model(role, chosen.model, models, starter, names, draft)
            if found is None:
                continue
            models[role.name] = found
            own_mem = self._role_mem(role, chosen, mem, fillers, settings, draft)
            plans.append(self._placed(role, found, own_mem, chosen, plans, notes))
        return plans

    def _model(
        self, role: Role, given: str | None, models: Mapping[str, ModelFacts], starter: StarterEntry | None,
        names: list[str], draft: _Draft,
    ) -> ModelFacts | None:  # fmt: skip
        if given is None and role.start not in ("model", "given"):
            if role.start not in names:
                draft.request.append(Problem(f"role {role.name} starts from a role {role.start!r} that is not there"))
            return models.get(role.start)
        path = given or (self.recipe.model if role.start == "model" else None)
        if path is None and role.start == "model" and starter is not None:
            path = resource(starter.model)
        if path is None:
            what = f"the role {role.name!r} needs a model"
            flag = "--model PATH" if role.start == "model" else f"--model {role.name}=PATH"
            draft.request.append(Problem(what, f"give it with {flag}"))
            return None
        found = facts.model(path, role.name)
        if isinstance(found, Problem):
            draft.request.append(found)
            return None
        return found

    def _role_mem(
        self, role: Role, chosen: RoleRecipe, mem: list[Component], fillers: list[Component],
        settings: Mapping[str, Any], draft: _Draft,
    ) -> tuple[Component, ...]:  # fmt: skip
        if chosen.mem is not None:
            own = [c for c in (self._component("mem", pick, settings, draft) for pick in chosen.mem) if c is not None]
        else:
            own = [c for c in mem if _applies(c, role)]
        taken = {_memory_entry(c).slot for c in own} - {""}
        # What was said for all roles, or nobody said, fills the slots that this role's own choice leaves open.
        for component in [*mem, *fillers]:
            slot = _memory_entry(component).slot
            if slot and slot not in taken and _applies(component, role):
                own.append(component)
                taken.add(slot)
        return tuple(sorted({component.key: component for component in own}.values(), key=phase_order))

    def _placed(
        self, role: Role, model: ModelFacts, mem: tuple[Component, ...], chosen: RoleRecipe, plans: list[RolePlan],
        notes: list[str],
    ) -> RolePlan:  # fmt: skip
        for other in plans:
            if role.shares == other.name:
                return RolePlan(role, model, other.mem, other.module, "trunk")
            if (
                role.start == other.name
                and not role.trainable
                and other.role.trainable
                and role.head == other.role.head
                and chosen == RoleRecipe()
                and "adapters" in other.provides()
            ):
                notes.append(f"role {role.name}: {other.name} with its adapters off, so it costs no memory")
                return RolePlan(role, model, other.mem, other.module, "adapters-off")
        return RolePlan(role, model, mem, role.name)

    def _sources(self, paths: Iterable[str], settings: Mapping[str, Any], draft: _Draft) -> tuple[DataSource, ...]:
        sources = []
        formats = [entry for entry in self.registry.entries("format") if isinstance(entry, FormatEntry)]
        picked = self.recipe.picks.get("format", ())
        for path in map(resource, paths):
            place = Path(path).expanduser()
            claim = "/" if place.is_dir() else place.name.lower()
            if not place.exists():
                if (os.sep in path and (path.startswith((".", "/", "~")) or path.count("/") > 1)) or place.suffix:
                    draft.request.append(Problem(f"--data {path}: there is no such file"))
                    continue
                claim = "hub:"
            if picked:
                pick = picked[0]
            else:
                fitting = [entry for entry in formats if claim.endswith(tuple(entry.suffixes) or ("\0",))]
                if not fitting:
                    known = ", ".join(f"{e.name} ({' '.join(e.suffixes)})" for e in formats)
                    draft.request.append(Problem(f"--data {path}: no format claims it", f"--format NAME, of: {known}"))
                    continue
                pick = Pick(fitting[0].name)
            component = self._component("format", pick, settings, draft)
            if component is not None:
                sources.append(DataSource(path, component))
        return tuple(sources)

    # The nearest legal combination

    def _nearest(self, named: Picks) -> str:
        """The fewest changes to what was named that make it legal, as a command line; empty when none is near."""
        budget = itertools.count()
        single = list(self._edits(named))
        pairs = (second for first in single for second in self._edits(first))
        for candidate in itertools.chain(single, pairs):
            for _, draft in self.drafts(candidate):
                if next(budget) > _MOST_DRAFTS:
                    return ""
                if draft.plan is not None and not draft.problems:
                    return _command(candidate)
                if draft.request:
                    break
        return ""

    def _edits(self, named: Picks) -> Iterator[Picks]:
        for kind in ("mem", "reward"):
            for i in range(len(named.get(kind, ()))):
                yield {**named, kind: named[kind][:i] + named[kind][i + 1 :]}
        present = {pick.name for pick in named.get("mem", ())}
        for strategy in self._memory():
            if strategy.name not in present:
                yield {**named, "mem": (*named.get("mem", ()), Pick(strategy.name))}
        for kind in _SINGLE:
            if kind in named:
                yield {other: picks for other, picks in named.items() if other != kind}
            for entry in self.registry.entries(kind):
                if kind in named and entry.name != named[kind][0].name:
                    yield {**named, kind: (Pick(entry.name),)}


def _best_first(choices: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
    """The product of the choices, those with the smallest sum of ranks lost first."""
    sizes = [range(len(options)) for options in choices]
    for indices in sorted(itertools.islice(itertools.product(*sizes), 20_000), key=lambda found: (sum(found), found)):
        yield tuple(options[i] for options, i in zip(choices, indices, strict=True))


def _roles_of(component: Component) -> tuple[Role, ...]:
    roles = component.entry.roles
    return roles(component.config) if callable(roles) else roles


def _memory_entry(component: Component) -> MemoryEntry:
    assert isinstance(component.entry, MemoryEntry)
    return component.entry


def _applies(component: Component, role: Role) -> bool:
    applies = _memory_entry(component).applies
    return applies == "all" or (applies == "trainable") == role.trainable


def _combination_problems(plan: Plan, registry: Registry) -> list[Problem]:
    """Capabilities, conflicts, slots and constraints; all of them, not the first."""
    problems: list[Problem] = []
    shared = [c for c in plan.components() if c.kind != "mem"]
    everywhere = plan.machine.provides.union(*(c.entry.provides for c in shared))
    for component in shared:
        others = plan.machine.provides.union(*(c.entry.provides for c in plan.components() if c is not component))
        problems += _capabilities(component, plan.provides(), others, registry)
    for role in plan.roles:
        for component in role.mem:
            beside = everywhere.union(*(c.entry.provides for c in role.mem if c is not component))
            problems += _capabilities(component, everywhere | role.provides(), beside, registry, f" (role {role.name})")
        slots = [_memory_entry(c).slot for c in role.mem]
        for slot in sorted({slot for slot in slots if slot and slots.count(slot) > 1}):
            rivals = " and ".join(c.name for c in role.mem if _memory_entry(c).slot == slot)
            problems.append(
                Problem(f"--mem {rivals}: a role has one {slot} (role {role.name})", "leave all but one out")
            )
    seen: set[str] = set()
    for component in plan.components():
        for constraint in component.entry.constraints:
            for problem in constraint(plan, component):
                if str(problem) not in seen:
                    seen.add(str(problem))
                    problems.append(problem)
    return problems


def _capabilities(
    component: Component, provided: frozenset[str], others: frozenset[str], registry: Registry, where: str = ""
) -> list[Problem]:
    problems = []
    for need in sorted(component.entry.requires - provided):
        givers = [f"--{kind} {e.name}" for kind in KINDS for e in registry.entries(kind) if need in e.provides]
        fix = f"add one that does: {', '.join(givers)}" if givers else "nothing installed here, nor this machine, does"
        problems.append(
            Problem(f"--{component.kind} {component.name} needs {need!r}, which nothing provides{where}", fix)
        )
    for clash in sorted(component.entry.conflicts & others):
        problems.append(
            Problem(f"--{component.kind} {component.name} excludes {clash!r}{where}", "leave one of them out")
        )
    return problems


def _command(picks: Picks) -> str:
    words = ["rlhf", "run"]
    for kind in KINDS:
        for pick in picks.get(kind, ()):
            words += [f"--{kind}", f"{pick.name}:{pick.label}" if pick.label else pick.name]
    return shlex.join(words)
