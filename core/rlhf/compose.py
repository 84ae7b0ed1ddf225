"""Composition: from a recipe to a plan, or to every reason why not. Pure data; imports no torch, loads no weights.

    pick -> structure the options -> modules present? -> capabilities -> facts -> constraints -> frozen plan

Where the user names nothing, the highest rank among the legal wins. Nothing here knows a plugin's name.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from rlhf import facts
from rlhf.entries import KINDS, MANY, AlgorithmEntry, Constraint, Entry, FormatEntry, MemoryEntry, Role, StarterEntry
from rlhf.errors import Problem, RequestError
from rlhf.facts import Machine, ModelFacts
from rlhf.options import fields, structure
from rlhf.plan import Component, DataSource, Plan, RolePlan, phase_order, resource
from rlhf.recipe import Pick, Recipe, RoleRecipe, RunOptions
from rlhf.registry import Registry
from rlhf.rows import PromptRow, row_needs

Picks = dict[str, tuple[Pick, ...]]
_SINGLE = ("policy", "engine", "optim", "backend", "launch")
_LABEL = re.compile(r"[\w-]+")
_MOST_DRAFTS = 400
"""Drafts tried before giving up; each takes well under a millisecond."""


def compose(
    recipe: Recipe, registry: Registry, machine: Machine, models: Mapping[str, ModelFacts] | None = None
) -> Plan:
    """Check and freeze a recipe.

    Args:
        models: facts of models that aren't there yet, by what the recipe calls them: a pipeline's later stages.

    Raises:
        RequestError: with all problems at once and, where it is a matter of combination, the nearest legal one.
    """
    return _Composer(recipe, registry, machine, models or {}).solve()


def chosen_entries(recipe: Recipe, registry: Registry) -> dict[str, dict[str, Entry]]:
    """The components that a recipe would use, for `--help`: by kind, what options address them by -> entry. Named
    ones, even where an option that they need is missing, and those taken unasked.

    Raises:
        RequestError: one that was named isn't there.
    """
    composer = _Composer(recipe, registry, facts.machine())
    named = composer.named()
    own = tuple(pick for role in recipe.roles.values() for pick in role.mem or ())
    found: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
    problems = []
    picks, draft = next(composer.drafts(named), (named, _Draft()))
    for kind, chosen in {**named, **picks, "mem": (*picks.get("mem", ()), *own)}.items():
        for pick in chosen:
            entry = registry.find(kind, pick.name)
            if isinstance(entry, Problem):
                problems.append(entry)
            else:
                found[kind][pick.key] = entry
    if problems:
        raise RequestError(problems)
    found["mem"].update({c.key: c.entry for c in draft.components if c.kind == "mem"})
    return found


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
    models: Mapping[str, ModelFacts] = attrs.Factory(dict)

    def named(self) -> Picks:
        return {kind: picks for kind, picks in self.recipe.picks.items() if picks}

    def solve(self) -> Plan:
        named = self.named()
        first: _Draft | None = None
        for _, draft in self.drafts(named):
            first = first or draft
            if draft.plan is not None and not draft.problems:
                return draft.plan
            if first.request:  # no other combination mends it
                break
        if first is None:  # without an algorithm nothing else can be judged
            found = [self.registry.find(kind, pick.name) for kind, picks in named.items() for pick in picks]
            unknown = [problem for problem in found if isinstance(problem, Problem)]
            raise RequestError(unknown or Problem("no algorithm is installed", "pip install rlhf-kit again"))
        raise RequestError(first.problems, "" if first.request else self._nearest(named))

    # What to try

    def drafts(self, named: Picks) -> Iterator[tuple[Picks, _Draft]]:
        """Drafts with every choice the user left open filled in, the best-ranked first."""
        tried = 0
        for algo in named.get("algo") or self._ranked("algo"):
            entry = self.registry.find("algo", algo.name)
            if not isinstance(entry, AlgorithmEntry):
                continue
            starter = self._starter(entry)
            settings = self._settings(algo, entry, starter)
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
                    "track": self._trackers(named),
                }
                yield full, self._draft(full, fill, entry, starter, settings)

    def _ranked(self, kind: str) -> list[Pick]:
        return [Pick(entry.name) for entry in self.registry.entries(kind) if entry.rank > 0]

    def _trackers(self, named: Picks) -> tuple[Pick, ...]:
        """Those that listen unasked, and the named ones, each once."""
        asked = {pick.key: pick for pick in named.get("track", ())}
        return (*(pick for pick in self._ranked("track") if pick.key not in asked), *asked.values())

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

    def _settings(self, algo: Pick, entry: AlgorithmEntry, starter: StarterEntry | None) -> dict[str, Any]:
        """What stands where the user says nothing: the algorithm's defaults, then the starter's for its own parts."""
        settings = dict(entry.defaults)
        config, problems = structure(entry.config, {**algo.options, **self.recipe.options.get("algo", {})}, "--algo.")
        roles = () if problems else _roles_of(Component(entry, config))
        left = [role for role in roles if role.start == "model" and not self._asked(role).model]
        own_model, own_data = not self.recipe.model and bool(left or problems), not self.recipe.data
        if starter is not None:
            for applies, part in (
                (own_model, starter.with_model),
                (own_data, starter.with_data),
                (own_model and own_data, starter.with_both),
            ):
                if applies:
                    settings.update(part)
        return settings

    def _asked(self, role: Role) -> RoleRecipe:
        return self.recipe.roles.get(role.name, RoleRecipe())

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
        self._unplaced_options(picks, fill, draft)
        self._kinds_fit(algorithm, picks, draft)
        data = self._sources("data", self.recipe.data or ((starter.data,) if starter else ()), settings, draft)
        if not self.recipe.data and starter is None:
            what = f"--data is needed: {algorithm.name} has no data of its own to start from"
            draft.request.append(Problem(what, row_needs(algorithm.data or PromptRow)))
        held_out = self.recipe.eval_data
        if not held_out and not self.recipe.data and starter:
            held_out = (starter.eval_data,)
        if starter and not self.recipe.data:
            notes.append(f"data: the starter {starter.name!r}, because no --data was given")
        eval_data = self._sources("eval-data", held_out, settings, draft)
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
        if pick.label and (kind not in MANY or not _LABEL.fullmatch(pick.label)):
            fix = (
                "a label is of letters, digits, - and _" if kind in MANY else f"only {', '.join(sorted(MANY))} take one"
            )
            draft.request.append(Problem(f"--{kind} {pick.name}: the label {pick.label!r} can't be used", fix))
            return None
        prefix = f"{kind}.{pick.key}" if kind in MANY else kind
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

    def _unplaced_options(self, picks: Picks, fill: tuple[Pick, ...], draft: _Draft) -> None:
        own = tuple(pick for role in self.recipe.roles.values() for pick in role.mem or ())
        chosen = {**picks, "mem": (*picks["mem"], *fill, *own)}
        places = {f"{kind}.{pick.key}" if kind in MANY else kind for kind, named in chosen.items() for pick in named}
        for prefix, options in self.recipe.options.items():
            if prefix not in places | {"format"}:
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
        wanted = _in_order(wanted)
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
            chosen = self._asked(role)
            found = self._model(role, chosen.model, models, starter, names, draft)
            if found is None:
                continue
            models[role.name] = found
            own_mem = self._role_mem(role, chosen, mem, fillers, settings, draft)
            plans.append(self._placed(role, found, own_mem, mem, draft, plans, notes))
        if len(plans) < len(wanted):
            if not draft.request:
                draft.request.append(Problem(f"{algo.name}: its roles {', '.join(names)} start from one another"))
            return plans
        used = [component for plan in plans for component in plan.mem]
        for component in mem:
            if component not in used:
                fits = any(_applies(component, role) for role in wanted)
                why = (
                    "every role it is for has a choice of its own" if fits else f"it is for none of {', '.join(names)}"
                )
                draft.combination.append(Problem(f"--mem {component.key} would do nothing: {why}", "leave it out"))
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
        found = self.models[path] if path in self.models else facts.model(path, role.name)
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
        once = [component for i, component in enumerate(own) if component not in own[:i]]  # said twice is once
        return tuple(sorted(once, key=phase_order))

    def _placed(
        self, role: Role, model: ModelFacts, mem: tuple[Component, ...], named: list[Component], draft: _Draft,
        plans: list[RolePlan], notes: list[str],
    ) -> RolePlan:  # fmt: skip
        chosen = self._asked(role)
        for other in plans:
            if role.shares == other.name:
                if chosen != RoleRecipe():
                    what = f"role {role.name} is a head on {other.name}'s trunk: it has no model or --mem of its own"
                    draft.request.append(Problem(what, f"choose for {other.name}"))
                if role.trainable != other.role.trainable:
                    what = f"role {role.name} is a head on {other.name}'s trunk, and only one of the two is trained"
                    draft.request.append(Problem(what))
                return RolePlan(role, model, other.mem, other.module, "trunk")
            if (
                role.start == other.name
                and not role.trainable
                and other.role.trainable
                and role.head == other.role.head
                and chosen == RoleRecipe()
                and "adapters" in other.provides()
                # What was said for every role holds for this one too: it can't borrow a module that lacks it.
                and all(component in other.mem for component in named if _applies(component, role))
            ):
                notes.append(f"role {role.name}: {other.name} with its adapters off, so it costs no memory")
                return RolePlan(role, model, other.mem, other.module, "adapters-off")
        if role.shares is not None:
            draft.request.append(Problem(f"role {role.name} is a head on a role {role.shares!r} that is not there"))
        return RolePlan(role, model, mem, role.name)

    def _sources(
        self, flag: str, paths: Iterable[str], settings: Mapping[str, Any], draft: _Draft
    ) -> tuple[DataSource, ...]:
        sources = []
        formats = [entry for entry in self.registry.entries("format") if isinstance(entry, FormatEntry)]
        picked = self.recipe.picks.get("format", ())
        for path in map(resource, paths):
            place = Path(path).expanduser()
            claim = "/" if place.is_dir() else place.name.lower()
            if not place.exists():
                endings = tuple(suffix for entry in formats for suffix in entry.suffixes if suffix.startswith("."))
                if path.startswith((".", "/", "~")) or path.count("/") > 1 or claim.endswith(endings):
                    draft.request.append(Problem(f"--{flag} {path}: there is no such file"))
                    continue
                claim = "hub:"
            if picked:
                pick = picked[0]
            else:
                fitting = [entry for entry in formats if claim.endswith(tuple(entry.suffixes) or ("\0",))]
                if not fitting:
                    known = ", ".join(f"{e.name} ({' '.join(e.suffixes)})" for e in formats)
                    draft.request.append(
                        Problem(f"--{flag} {path}: no format claims it", f"--format NAME, of: {known}")
                    )
                    continue
                pick = Pick(fitting[0].name)
            component = self._component("format", pick, settings, draft)
            if component is not None:
                # Absolute, as a run may be resumed from elsewhere.
                sources.append(DataSource(str(place.absolute()) if place.exists() else path, component))
        return tuple(sources)

    # The nearest legal combination

    def _nearest(self, named: Picks) -> str:
        """The fewest changes to what was named that make it legal, as a command line; empty when none is near. Options
        of what goes away go with it."""
        budget = itertools.count()
        single = list(self._edits(named))
        pairs = (second for first in single for second in self._edits(first))
        for candidate in itertools.chain(single, pairs):
            gone = {
                f"{kind}.{pick.key}" if kind in MANY else kind
                for kind, picks in named.items()
                for pick in picks
                if pick not in candidate.get(kind, ())
            }
            kept = {prefix: options for prefix, options in self.recipe.options.items() if prefix not in gone}
            other = attrs.evolve(self, recipe=attrs.evolve(self.recipe, picks=candidate, options=kept))
            for _, draft in other.drafts(candidate):
                if next(budget) > _MOST_DRAFTS:
                    return ""
                if draft.plan is not None and not draft.problems:
                    return _command(other.recipe)
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


def _in_order(roles: list[Role]) -> list[Role]:
    """Each role after the one it starts from or shares with, else as declared. A circle is left as it is."""
    names = {role.name for role in roles}
    waiting, placed = list(roles), list[Role]()
    while waiting:
        done = {role.name for role in placed} | {"model", "given"}
        ready = [role for role in waiting if {role.start, role.shares or role.start} & names <= done]
        taken = (ready or waiting)[0]
        waiting.remove(taken)
        placed.append(taken)
    return placed


def _memory_entry(component: Component) -> MemoryEntry:
    assert isinstance(component.entry, MemoryEntry)
    return component.entry


def _applies(component: Component, role: Role) -> bool:
    return _memory_entry(component).acts_on(role)


def _combination_problems(plan: Plan, registry: Registry) -> list[Problem]:
    """Capabilities, conflicts, slots and constraints; all of them, not the first."""
    problems: list[Problem] = []
    shared = [c for c in plan.components() if c.kind != "mem"]
    everywhere = plan.machine.provides.union(*(c.entry.provides for c in shared))
    for component in shared:
        others = plan.machine.provides.union(*(c.entry.provides for c in plan.components() if c is not component))
        problems += _capabilities(component, plan.provides(), others, registry)
    for role in (role for role in plan.roles if role.view == "own"):
        for component in role.mem:
            beside = everywhere.union(*(c.entry.provides for c in role.mem if c is not component))
            problems += _capabilities(component, everywhere | role.provides(), beside, registry, f" (role {role.name})")
        strategies = [c.name for c in role.mem]
        for name in sorted({name for name in strategies if strategies.count(name) > 1}):
            problems.append(Problem(f"--mem {name} acts twice on role {role.name}", "leave all but one out"))
        slots = [_memory_entry(c).slot for c in role.mem]
        for slot in sorted({slot for slot in slots if slot and slots.count(slot) > 1}):
            rivals = " and ".join(c.name for c in role.mem if _memory_entry(c).slot == slot)
            problems.append(
                Problem(f"--mem {rivals}: a role has one {slot} (role {role.name})", "leave all but one out")
            )
    seen: set[str] = set()
    for component in plan.components():
        for constraint in component.entry.constraints:
            for problem in _asked_of(constraint, plan, component):
                if str(problem) not in seen:
                    seen.add(str(problem))
                    problems.append(problem)
    return problems


def _asked_of(constraint: Constraint, plan: Plan, component: Component) -> list[Problem]:
    try:
        return list(constraint(plan, component))
    except Exception as error:  # a plugin's fault must not take down a run that may not even use it
        what = (
            f"--{component.kind} {component.key} (from {component.distribution} {component.version}): its check failed"
        )
        return [Problem(f"{what}: {type(error).__name__}: {error}", "leave it out, and tell its author")]


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


def _command(recipe: Recipe) -> str:
    """The recipe as a command line, to be pasted."""

    def typed(pick: Pick) -> str:
        return f"{pick.name}:{pick.label}" if pick.label else pick.name

    words = ["rlhf", "run"]
    options = dict(recipe.options)
    for kind in KINDS:
        for pick in recipe.picks.get(kind, ()):
            words += [f"--{kind}", typed(pick)]
            prefix = f"{kind}.{pick.key}" if kind in MANY else kind
            options[prefix] = {**pick.options, **options.get(prefix, {})}
    for name, role in recipe.roles.items():
        words += ["--model", f"{name}={role.model}"] if role.model else []
        words += ["--mem", f"{name}={','.join(map(typed, role.mem))}"] if role.mem else []
    words += ["--model", recipe.model] if recipe.model else []
    for flag, paths in (("--data", recipe.data), ("--eval-data", recipe.eval_data)):
        words += [word for path in paths for word in (flag, path)]
    for prefix, given in options.items():
        words += [f"--{prefix}.{name.replace('_', '-')}={_typed(value)}" for name, value in given.items()]
    for name, value in recipe.run.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)] if value not in (None, False) else []
    return shlex.join(words)


def _typed(value: Any) -> str:
    """An option's value as it is typed."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_typed(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(_typed, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
