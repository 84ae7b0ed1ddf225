"""Shared fixtures: a tiny model, a machine that is the same everywhere, recipes as they are typed, small registries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from rlhf import registry as registries
from rlhf.cli.recipes import RecipeCommand, recipe_of, recipe_options
from rlhf.entries import Entry, StarterEntry
from rlhf.facts import Machine
from rlhf.plan import resource
from rlhf.recipe import Recipe
from rlhf.registry import Registry
from warm import Ranks

pytest_plugins = ["rlhf.testing.plugin"]  # the kit's; of its entry point's very name, so that it is loaded once

# One thread a test process: models here are tiny, and pytest-xdist's workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """A machine's GPU is out of sight, but for `-m gpu`: what tests say of numbers and of memory is of a CPU's."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny model (weights, tokenizer, chat template) in a folder of its own. Not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(resource("rlhf_plugins.starter:model"), folder)
    return folder


@pytest.fixture(scope="session")
def one() -> Iterator[Ranks]:
    """A warm process: the libraries are imported once for many runs."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two warm ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub as tests know it: all is there but what is of `runs` or `nosuch`. It is never asked over a network."""
    from rlhf import hub

    def unavailable(kind: str, name: str) -> str:
        return "the fake hub has no such thing" if name.startswith(("runs/", "nosuch")) else ""

    monkeypatch.setattr(hub, "unavailable", unavailable)


@pytest.fixture(scope="session")
def installed() -> Registry:
    """What is installed here."""
    return registries.load()


@pytest.fixture
def machine() -> Machine:
    """Two cores with bf16, no GPU, whatever the tests run on."""
    return Machine(2, frozenset({"avx2", "avx512_bf16"}), 8 << 30, (), 1)


@click.command(cls=RecipeCommand)
@recipe_options
@click.pass_context
def _read(ctx: click.Context, /, recipe_file: str | None, **flags: Any) -> Recipe:
    return recipe_of(ctx, recipe_file, flags)


@pytest.fixture
def typed() -> Callable[..., Recipe]:
    """The recipe that a command line means: typed("--algo", "ppo", "--mem=lora")."""

    def read(*words: str) -> Recipe:
        found = _read.main(list(words), standalone_mode=False)
        assert isinstance(found, Recipe)
        return found

    return read


@pytest.fixture
def make_registry() -> Callable[..., Registry]:
    """A registry of the entries and starters given, and nothing else."""

    def make(*entries: Entry, starters: tuple[StarterEntry, ...] = ()) -> Registry:
        registry = Registry()
        for entry in entries:
            registry.add(entry, registries._Source("fake", "fake-package", "1.0"))
        registry.starters.extend(starters)
        return registry

    return make
