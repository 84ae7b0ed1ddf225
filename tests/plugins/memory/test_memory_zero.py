"""What is spread over ranks is chosen with the backend that can, and refused with what is in its way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import attrs
import pytest

from needs import FSDP2
from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Machine
from rlhf.plan import Plan
from rlhf.recipe import Recipe
from rlhf.registry import Registry, load
from rlhf_plugins.memory import Zero1Config, Zero2Config, Zero3Config, ZeroConfig

Typed = Callable[..., Recipe]


@pytest.fixture
def planned(typed: Typed, installed: Registry, machine: Machine) -> Callable[..., Plan]:
    def plan(*words: str, ranks: int = 1) -> Plan:
        return compose(typed(*words), installed, attrs.evolve(machine, world_size=ranks))

    return plan


def refused(planned: Callable[..., Plan], *words: str) -> str:
    with pytest.raises(RequestError) as error:
        planned(*words)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "stage"), [("zero1", Zero1Config, 1), ("zero2", Zero2Config, 2), ("zero3", Zero3Config, 3)]
)
@pytest.mark.parametrize("more", [(), ("--nproc", "2"), ("--mem", "lora"), ("--backend", "deepspeed")])
def test_zero_brings_its_backend(
    name: str, config: type[ZeroConfig], stage: int, more: tuple[str, ...], planned: Callable[..., Plan]
) -> None:
    plan = planned("--algo", "ppo", "--mem", name, *more)
    assert plan.backend.name == "deepspeed"
    by_role = {role.name: [c.name for c in role.mem] for role in plan.roles if role.view == "own"}
    assert by_role["policy"][-1] == by_role["value"][-1] == name  # it acts last
    assert name not in by_role.get("reference", [])  # frozen roles stay whole
    [spread] = [component.config for component in plan.mem if isinstance(component.config, ZeroConfig)]
    assert isinstance(spread, config) and spread.stage == stage


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--mem", "lora,4bit", "--backend", "fsdp2"), marks=FSDP2),
        pytest.param(("--mem", "reference=8bit", "--backend", "fsdp2"), marks=FSDP2),  # frozen roles stay whole
        *((("--mem", f"lora,{quantised},{zero}")) for quantised in ("4bit", "8bit") for zero in ("zero1", "zero3")),
    ],
)
def test_quantised_bases_under_what_takes_them(words: tuple[str, ...], planned: Callable[..., Plan]) -> None:
    assert any("quantised" in role.provides() for role in planned("--algo", "dpo", *words).roles)


def test_without_zero_several_processes_take_ddp(planned: Callable[..., Plan]) -> None:
    assert planned("--algo", "sft", "--nproc", "2").backend.name == "ddp"
    assert planned("--algo", "sft", ranks=2).backend.name == "ddp"


@FSDP2
def test_several_processes_take_another_backend_when_it_is_named(planned: Callable[..., Plan]) -> None:
    assert planned("--algo", "sft", "--nproc", "2", "--backend", "fsdp2").backend.name == "fsdp2"


def test_what_is_to_be_offloaded_is_an_option(planned: Callable[..., Plan]) -> None:
    plan = planned("--algo", "sft", "--mem", "zero3", "--mem.zero3.offload", "optimizer,parameters")
    [spread] = [component.config for component in plan.mem if isinstance(component.config, ZeroConfig)]
    assert spread.offload == ("optimizer", "parameters")
    assert "only with the optimizer" in refused(planned, "--mem", "zero3", "--mem.zero3.offload", "parameters")
    assert "must be one of optimizer" in refused(planned, "--mem", "zero2", "--mem.zero2.offload", "parameters")


@pytest.mark.parametrize(
    ("words", "why", "fix"),
    [
        (("--mem", "zero2,zero3"), "a role has one sharding", "leave all but one out"),
        (("--mem", "zero3", "--backend", "fsdp2"), "needs 'zero', which nothing provides", "--backend deepspeed"),
        (("--mem", "zero3", "--backend", "single"), "needs 'zero', which nothing provides", "--backend deepspeed"),
        (("--backend", "deepspeed"), "nothing says what it is to spread", "--mem zero1"),
        (("--mem", "reference=zero3"), "the role reference isn't trained", "policy, value"),
        (("--mem", "policy=zero3"), "trained roles are spread together, and value isn't so", "--mem zero3"),
        (("--mem", "zero2", "--optim", "adamw8bit", "--backend", "deepspeed"), "needs 'whole-gradients'", "--backend"),
        (("--backend", "fsdp2", "--optim", "adamw8bit"), "needs 'whole-gradients'", "--backend"),
        (("--mem", "lora,8bit", "--backend", "fsdp2"), "keeps the scales on the weights", "--mem 4bit"),
        (("--mem", "4bit,zero3"), "quantised weights take no gradient", "--mem lora,4bit"),
    ],
)
def test_what_does_not_go_is_refused_with_its_reason(
    words: tuple[str, ...], why: str, fix: str, planned: Callable[..., Plan]
) -> None:
    said = refused(planned, "--algo", "ppo", *words)
    assert why in said and fix in said


@pytest.mark.parametrize("words", [("--mem", "zero3", "--nproc", "2"), ("--backend", "deepspeed", "--mem", "zero1")])
def test_without_deepspeed_it_says_what_to_install(
    words: tuple[str, ...], typed: Typed, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else found(name, *a))
    registry = load()
    status = {o.name: o.status for kind in ("mem", "backend") for o in registry.offers_of(kind)}
    assert (status["zero3"], status["deepspeed"], status["fsdp2"]) == ("missing", "missing", "ok")
    with pytest.raises(RequestError, match=r"pip install 'rlhf-kit\[deepspeed\]'"):
        compose(typed("--algo", "ppo", *words), registry, machine)


@pytest.mark.parametrize(
    ("package", "version", "good", "words"),
    [
        ("deepspeed", "0.19.7", False, ("--mem", "zero2")),
        ("deepspeed", "0.9.10", False, ("--mem", "zero2")),
        ("deepspeed", "0.19.8", True, ("--mem", "zero2")),
        ("deepspeed", "0.20.0", True, ("--mem", "zero2")),
        ("torch", "2.12.1+cpu", False, ("--backend", "fsdp2")),
        ("torch", "2.13.0+cu130", True, ("--backend", "fsdp2")),
    ],
)
def test_what_is_older_than_what_was_tried_is_told(
    package: str,
    version: str,
    good: bool,
    words: tuple[str, ...],
    planned: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == package else found(name))
    if good:
        planned("--algo", "sft", *words)
        return
    said = refused(planned, "--algo", "sft", *words)
    oldest = {"deepspeed": "0.19.8", "torch": "2.13"}[package]
    assert f"{' '.join(words)} needs {package} {oldest} or newer, and {version} is installed" in said
    assert f"pip install '{package}>={oldest}'" in said
