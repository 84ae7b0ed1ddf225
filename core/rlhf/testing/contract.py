"""What every contract has: a name, options, and what the manifest of any component must be."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import attrs
import cattrs
import pytest

from rlhf import API_VERSION, options
from rlhf.entries import MANY, Entry
from rlhf.errors import Problem, RequestError
from rlhf.hooks import GROUP
from rlhf.registry import Offer

if TYPE_CHECKING:
    from rlhf.plan import Component, Plan
    from rlhf.testing.kit import Kit

_PROBE = """
import importlib, json, sys
from rlhf.hooks import HOOK_OF_KIND
from rlhf.registry import HEAVY
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for hook in HOOK_OF_KIND.values():
        list(getattr(module, hook, list)() or ())
print(json.dumps([name for name in HEAVY if name in sys.modules]))
"""
"""Imports entry modules, asks their hooks, and tells what heavy came along."""


def broken(text: str) -> NoReturn:
    """The contract is broken: the message is all that the author is shown."""
    pytest.fail(text, pytrace=False)


def require(holds: Any, text: str) -> None:
    """A term of the contract."""
    if not holds:
        broken(text)


class Contract:
    """What every component must keep. Derive from the contract of its kind, and say which component it is.

    class TestMine(RewardContract):
        name = "mine"
        options = {"threshold": 0.5}
    """

    kind: ClassVar[str]
    name: ClassVar[str] = ""
    """Of the entry: what is typed after `--KIND`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Of the component, where it is not to be tested with its defaults."""
    recipe: ClassVar[Mapping[str, Any]] = {}
    """More of the recipe of the kit's runs, as in a YAML file: {"mem": ["lora"], "optim": {"learning_rate": 1e-3}}."""

    def asked(self) -> dict[str, Any]:
        """The recipe's part that asks for the component."""
        pick = {"name": self.name, **self.options}
        return {self.kind: [pick] if self.kind in MANY else pick}

    def base(self, kit: Kit) -> dict[str, Any]:
        """What a plan of this component needs besides."""
        return {}

    def plan(self, kit: Kit, **more: Any) -> Plan:
        """A plan of the component."""
        self.offer(kit)
        recipe = {**self.base(kit), **self.asked(), **self.recipe, **more}
        recipe["roles"] = {**self._given(kit), **recipe.get("roles", {})}
        try:
            return kit.plan(recipe)
        except RequestError as error:
            hint = "what it needs besides goes into the contract's `options` and `recipe`"
            broken("no plan can be made with it: " + "\n".join(map(str, error.problems)) + f"\n{hint}")

    def _given(self, kit: Kit) -> dict[str, Any]:
        """Models of the roles that a user must give one for, such as a teacher: the kit's own."""
        entry = self.entry(kit)
        roles = entry.roles(self.config(kit)) if callable(entry.roles) else entry.roles
        models = {"lm": lambda: kit.model, "scalar": lambda: kit.scalar_model}
        return {role.name: {"model": str(models[role.head]())} for role in roles if role.start == "given"}

    def offer(self, kit: Kit) -> Offer:
        """The component as it was found."""
        require(self.name, f"{type(self).__name__} must say which component it tests: name = '...'")
        found = kit.registry.offer(self.kind, self.name)
        if found is None:
            problem = kit.registry.find(self.kind, self.name)
            broken(f"{problem}. Is its package installed, with an entry point of the group {GROUP!r}?")
        return found

    def entry(self, kit: Kit) -> Entry:
        """Its entry; the component can be used."""
        offer = self.offer(kit)
        require(offer.status == "ok" and offer.entry is not None, f"--{self.kind} {self.name}: {offer.reason}")
        assert offer.entry is not None
        return offer.entry

    def config(self, kit: Kit) -> Any:
        """Its options, as the contract gives them."""
        config, problems = options.structure(self.entry(kit).config, self.options, f"--{self.kind}.")
        if problems:
            broken("its options must have defaults, or be given in the contract's `options`: " + _text(problems))
        return config

    def component(self, plan: Plan) -> Component:
        """The component in a plan."""
        return next(c for c in plan.components() if c.kind == self.kind and c.name == self.name)

    def implementation(self, kit: Kit) -> Any:
        """Its class."""
        from rlhf.plan import Component
        from rlhf.registry import resolve

        try:
            return resolve(Component(self.entry(kit), self.config(kit)))
        except RequestError as error:
            broken(_text(error.problems))

    # The manifest

    def test_it_is_found_and_can_be_used(self, rlhf_kit: Kit) -> None:
        """`rlhf plugins` lists it as ok, with its distribution, and nothing of its distribution is warned of."""
        self.entry(rlhf_kit)
        offer = self.offer(rlhf_kit)
        require(offer.summary.strip(), "its summary is empty: `rlhf plugins` would say nothing of it")
        require("\n" not in offer.summary, "its summary must be one line")
        said = [text for text in rlhf_kit.registry.warnings if f"plugin {offer.distribution} " in text]
        warnings = [text for text in said if f": --{self.kind} {self.name}: " in text or ": --" not in text]
        # torch is here by now, so this process can't tell who brought it; the next test can
        require(not warnings, "whoever uses rlhf is warned: " + "; ".join(warnings))

    def test_its_entry_module_is_light(self, rlhf_kit: Kit) -> None:
        """Every command imports it, so it imports no torch."""
        heavy = rlhf_kit.once(("heavy", self.offer(rlhf_kit).distribution), lambda: _heavy(self.offer(rlhf_kit)))
        fix = "name the class in impl='module:Class', in a module of its own, and import there what it needs"
        require(not heavy, f"its entry module brings {', '.join(heavy)}, which slows every command: {fix}")

    def test_its_api_version_is_this_one(self, rlhf_kit: Kit) -> None:
        entry = self.entry(rlhf_kit)
        require(entry.api_version == API_VERSION, f"made for API {entry.api_version}, and this is {API_VERSION}")

    def test_every_option_is_documented(self, rlhf_kit: Kit) -> None:
        config = self.entry(rlhf_kit).config
        for name, field in (options.fields(config) if config else {}).items():
            hint = f'{name}: {options.type_name(field.type)} = option(..., help="what it does, and when to change it")'
            require(options.info(field).help.strip(), f"the option {name!r} has no help: write {hint}")

    def test_options_come_back_from_json_and_the_command_line(self, rlhf_kit: Kit) -> None:
        """A plan is written to `plan.json`, and built again from it in other processes."""
        config = self.config(rlhf_kit)
        if config is None:
            return
        for name in options.fields(type(config)):
            with contextlib.suppress(attrs.exceptions.FrozenError):
                setattr(config, name, getattr(config, name))
                broken(f"its option {name!r} can be changed after the plan is made: use attrs.frozen(kw_only=True)")
        written = json.loads(json.dumps(cattrs.unstructure(config)))
        typed = {name: options.typed(value) for name, value in written.items()}
        for how, given in (("plan.json", written), ("the command line", typed)):
            again, problems = options.structure(type(config), given, f"--{self.kind}.")
            require(not problems, f"written to {how}, its options can't be read again: {_text(problems)}")
            require(again == config, f"written to {how}, its options come back as {again}, not as {config}")

    def test_its_class_is_of_its_kind(self, rlhf_kit: Kit) -> None:
        """`impl` names a class that derives from its kind's in `rlhf.api`."""
        self.implementation(rlhf_kit)

    def test_a_plan_of_it_can_be_written_and_read(self, rlhf_kit: Kit) -> None:
        from rlhf.plan import plan_from_json

        plan = self.plan(rlhf_kit)
        written = json.loads(json.dumps(plan.to_json()))
        again = json.loads(json.dumps(plan_from_json(written, rlhf_kit.registry).to_json()))
        require(again == written, f"the plan read from plan.json is another: {_difference(again, written)}")


def _text(problems: Sequence[Problem]) -> str:
    return "; ".join(map(str, problems))


def _difference(a: Any, b: Any) -> str:
    changed = [key for key in {*a, *b} if a.get(key) != b.get(key)]
    return "; ".join(f"{key}: {a.get(key)!r}, not {b.get(key)!r}" for key in sorted(changed))


def _heavy(offer: Offer) -> list[str]:
    """What the entry modules of a distribution bring along, in a process of their own."""
    points = importlib.metadata.distribution(offer.distribution).entry_points
    modules = [point.module for point in points if point.group == GROUP]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *modules], env=environment, capture_output=True, text=True, timeout=120
    )
    require(done.returncode == 0, f"importing {', '.join(modules)} failed:\n{done.stderr}")
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found
