"""The registry: whatever a plugin does wrong is told with its distribution, and harms nobody else.

Distributions are real `.dist-info` folders on the path, found as pip's are.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import registry as registries
from rlhf.entries import Entry, RewardEntry
from rlhf.errors import Problem, RequestError
from rlhf.plan import Component
from rlhf.registry import Offer, Registry, resolve, status_of

HEAD = "from rlhf.api import *\nfrom rlhf.api import hookimpl\nimport attrs\n"
GOOD = (
    HEAD
    + "@hookimpl\ndef rlhf_memory():\n    yield MemoryEntry(name={name!r}, summary='s', impl='a:B', phase='load')\n"
)


class Site:
    """A folder on the import path to install fake distributions into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, distribution: str, source: str, module: str = "", point: str = "") -> str:
        """Put a distribution there whose entry point names a module of this source."""
        module = module or "fake_plugin_" + distribution.replace("-", "_")
        (self.folder / f"{module}.py").write_text(source)
        self.metadata(distribution, f"[rlhf]\n{point or distribution} = {module}\n")
        return module

    def metadata(self, distribution: str, points: str, version: str = "1.2") -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("fake_plugin_")]:
        monkeypatch.delitem(sys.modules, name)
    return Site(tmp_path)


def warned(registry: Registry, distribution: str) -> str:
    """The one warning that names a distribution."""
    found = [warning for warning in registry.warnings if f"{distribution} 1.2" in warning]
    assert len(found) == 1, registry.warnings
    return found[0]


def of(registry: Registry, distribution: str) -> list[Offer]:
    return [offer for offer in registry.offers if offer.distribution == distribution]


def unharmed(registry: Registry, installed: Registry) -> bool:
    """Everybody else's components are there as they were."""
    return {(o.kind, o.name, o.status) for o in installed.offers} <= {
        (o.kind, o.name, o.status) for o in registry.offers
    }


def test_what_is_installed_loads_without_a_complaint(installed: Registry) -> None:
    ours = of(installed, "rlhf-kit")
    assert {offer.kind for offer in ours} == {
        "algo", "policy", "engine", "reward", "mem", "optim", "backend", "format", "track", "launch",
    }  # fmt: skip
    assert not [warning for warning in installed.warnings if "rlhf-kit" in warning]
    assert all(offer.version == importlib.metadata.version("rlhf-kit") for offer in ours)


def test_a_new_distribution_is_found_at_once(site: Site, installed: Registry) -> None:
    site.install("fake-good", GOOD.format(name="fake-mem"))
    registry = registries.load()
    assert [(o.kind, o.name, o.version, o.status) for o in of(registry, "fake-good")] == [
        ("mem", "fake-mem", "1.2", "ok")
    ]
    assert isinstance(registry.find("mem", "fake-mem"), Entry)
    assert unharmed(registry, installed)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        (HEAD, "implements no hook; is @hookimpl missing?"),
        (HEAD + "@hookimpl\ndef rlhf_algos(): return []", "unknown hooks: rlhf_algos"),
        (HEAD + "@hookimpl\ndef rlhf_memory(): 1 / 0", "rlhf_memory failed: ZeroDivisionError"),
        (HEAD + "@hookimpl\ndef rlhf_memory(): return 3", "rlhf_memory failed: TypeError"),
        (HEAD + "@hookimpl\ndef rlhf_memory(config): return []", "config"),
        (HEAD + "@hookimpl\ndef rlhf_memory(): yield 'lora'", "rlhf_memory yields MemoryEntry, not str"),
        (
            HEAD + "@hookimpl\ndef rlhf_engines(): yield PolicyEntry(name='x', summary='', impl='a:B')",
            "rlhf_engines yields EngineEntry, not PolicyEntry",
        ),
        (HEAD + "@hookimpl\ndef rlhf_starters(): yield {}", "rlhf_starters yields StarterEntry, not dict"),
        (
            HEAD + "@hookimpl\ndef rlhf_memory(): yield MemoryEntry(name=None, summary='', impl='a:B', phase='load')",
            "the entry None is malformed",
        ),
        ("import asyncio\nraise asyncio.CancelledError", "failed: CancelledError"),
        (HEAD + "def __getattr__(name): raise SystemExit(0)", "SystemExit: 0"),
        (HEAD + "def __getattr__(name): 1 / 0", "ZeroDivisionError"),
        (HEAD + "@hookimpl\ndef rlhf_memory(): raise SystemExit(0)", "rlhf_memory failed: SystemExit: 0"),
        (
            HEAD + "import asyncio\n@hookimpl\ndef rlhf_memory():\n    yield from ()\n    raise asyncio.CancelledError",
            "rlhf_memory failed: CancelledError",
        ),
        (
            HEAD + "@hookimpl\ndef rlhf_starters(): yield StarterEntry(name='x', summary='', data_type=int, model='m', "
            "data='d', eval_data='e', with_model=7)",
            "rlhf_starters: the starter 'x' is malformed: with_model must be Mapping[str, Any], not 7",
        ),
    ],
)
def test_a_plugin_of_which_nothing_can_be_used(site: Site, installed: Registry, source: str, reason: str) -> None:
    site.install("fake-bad", source)
    site.install("fake-good", GOOD.format(name="fake-mem"))
    registry = registries.load()
    (offer,) = of(registry, "fake-bad")
    assert (offer.kind, offer.name, offer.status) == ("", "fake-bad", "failed")
    assert reason in offer.reason
    assert offer.reason in warned(registry, "fake-bad")
    assert of(registry, "fake-good")[0].status == "ok"
    assert unharmed(registry, installed)


def test_a_plugin_for_another_api_version_is_told_so_before_its_hooks_are_looked_at(
    site: Site, installed: Registry
) -> None:
    site.install("fake-bad", HEAD + "api_version = 2\n@hookimpl\ndef rlhf_dreams():\n    yield 1\n")
    site.install("fake-good", "api_version = 1\n" + GOOD.format(name="fake-mem"))
    registry = registries.load()
    (offer,) = of(registry, "fake-bad")
    assert offer.status == "failed"
    assert offer.reason == "made for plugin API 2, this is 1: install a matching release of it"
    assert offer.reason in warned(registry, "fake-bad")
    assert of(registry, "fake-good")[0].status == "ok"
    assert unharmed(registry, installed)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("PolicyEntry(name='Big', summary='s', impl='a:B')", "'Big' is no legal name"),
        ("PolicyEntry(name='none', summary='s', impl='a:B')", "'none' is no legal name: it stands for no component"),
        ("PolicyEntry(name='x', summary='s', impl='a.b')", "impl must read 'module:Class', not 'a.b'"),
        ("PolicyEntry(name='x', summary='s', impl='a:B', config=dict)", "config must be an attrs class"),
        ("PolicyEntry(name='x', summary='s', impl='a:B', rank='high')", "rank must be int, not 'high'"),
        ("PolicyEntry(name='x', summary=None, impl='a:B')", "summary must be str, not None"),
        ("PolicyEntry(name='x', summary='s', impl=3)", "impl must be str, not 3"),
        (
            "PolicyEntry(name='x', summary='s', impl='a:B', modules=['m'])",
            "modules must be Mapping[str, str], not ['m']",
        ),
        (
            "PolicyEntry(name='x', summary='s', impl='a:B', defaults=None)",
            "defaults must be Mapping[str, Any], not None",
        ),
        (
            "PolicyEntry(name='x', summary='s', impl='a:B', defaults={1: 2})",
            "defaults must be Mapping[str, Any], not {1",
        ),
        ("PolicyEntry(name='x', summary='s', impl='a:B', requires={1})", "requires must be frozenset[str], not"),
        (
            "PolicyEntry(name='x', summary='s', impl='a:B', constraints=len)",
            "constraints must be tuple[Constraint, ...]",
        ),
        ("PolicyEntry(name='x', summary='s', impl='a:B', notes=(3,))", "notes must be tuple[Note, ...], not (3,)"),
        ("PolicyEntry(name='x', summary='s', impl='a:B', roles='value')", "roles must be Roles, not 'value'"),
        (
            "PolicyEntry(name='x', summary='s', impl='a:B', footprint=3)",
            "footprint must be PolicyFootprint | None, not 3",
        ),
        ("PolicyEntry(name='x', summary='s', impl='a:B', api_version=99)", "made for plugin API 99, this is 1"),
        (
            "PolicyEntry(name='x', summary='s', impl='a:B', config=attrs.make_class('C', ['name']))",
            "an option can't be called name",
        ),
        (
            "PolicyEntry(name='x', summary='s', impl='a:B', "
            "config=attrs.make_class('C', {'f': attrs.field(type='NoSuchType')}))",
            "the types of its config can't be read: NameError",
        ),
    ],
)
def test_an_ill_made_entry_is_fatal_only_when_it_is_asked_for(
    site: Site, installed: Registry, entry: str, reason: str
) -> None:
    site.install("fake-bad", HEAD + f"@hookimpl\ndef rlhf_policies():\n    yield {entry}\n")
    registry = registries.load()
    (offer,) = of(registry, "fake-bad")
    assert (offer.kind, offer.status) == ("policy", "failed")
    assert reason in offer.reason
    assert reason in warned(registry, "fake-bad")
    found = registry.find("policy", offer.name)
    assert isinstance(found, Problem)
    assert "from fake-bad" in found.what
    assert offer.name not in [entry.name for entry in registry.entries("policy")]
    assert unharmed(registry, installed)


@pytest.mark.parametrize(
    ("hook", "entry", "reason"),
    [
        ("memory", "MemoryEntry(slot=3, rank=1, phase='load', ", "slot must be str, not 3"),
        ("memory", "MemoryEntry(phase='nope', ", "phase must be Literal['load', 'adapt', 'wrap', 'shard'], not 'nope'"),
        ("formats", "FormatEntry(suffixes=None, ", "suffixes must be tuple[str, ...], not None"),
        ("formats", "FormatEntry(suffixes='.txt', ", "suffixes must be tuple[str, ...], not '.txt'"),
        ("algorithms", "AlgorithmEntry(data='rows', ", "data must be type | None, not 'rows'"),
        (
            "algorithms",
            "AlgorithmEntry(data=int, objective=('loss', 'down'), ",
            "objective must be tuple[str, Literal[",
        ),
        ("rewards", "RewardEntry(columns=7, ", "columns must be tuple[str, ...] | Callable"),
    ],
)
def test_a_field_of_another_type_than_its_kinds_has(site: Site, hook: str, entry: str, reason: str) -> None:
    made = f"{entry}name='fake-ill', summary='s', impl='a:B')"
    site.install("fake-bad", HEAD + f"@hookimpl\ndef rlhf_{hook}():\n    yield {made}\n")
    registry = registries.load()
    (offer,) = of(registry, "fake-bad")
    assert (offer.name, offer.status) == ("fake-ill", "failed")
    assert offer.reason.startswith(reason)
    assert offer.reason in warned(registry, "fake-bad")


def test_a_list_does_for_a_tuple(site: Site) -> None:
    site.install(
        "fake-good", GOOD.replace("phase='load'", "phase='load', notes=[], eases=['x']").format(name="fake-mem")
    )
    assert [offer.status for offer in of(registries.load(), "fake-good")] == ["ok"]


@pytest.mark.parametrize("stop", ["KeyboardInterrupt", "GeneratorExit"])
def test_who_stops_the_command_stops_it(site: Site, stop: str) -> None:
    site.install("fake-slow", HEAD + f"@hookimpl\ndef rlhf_memory(): raise {stop}")
    with pytest.raises(BaseException) as caught:
        registries.load()
    assert caught.type.__name__ == stop


def test_an_algorithm_that_neither_samples_nor_names_rows_is_told_so(site: Site, installed: Registry) -> None:
    entry = "AlgorithmEntry(name='fake-bad', summary='s', impl='a:B', requires={requires})"
    hook = HEAD + "@hookimpl\ndef rlhf_algorithms():\n    yield " + entry + "\n"
    site.install("fake-bad", hook.format(requires="'logprobs'"))
    site.install("fake-good", hook.replace("fake-bad", "fake-good").format(requires="'rollouts'"))
    registry = registries.load()
    reason = "its requires doesn't name 'rollouts', so it samples nothing, and data must say what rows it reads"
    assert [offer.reason for offer in of(registry, "fake-bad")] == [reason]
    assert reason in warned(registry, "fake-bad")
    assert [offer.status for offer in of(registry, "fake-good")] == ["ok"]
    assert unharmed(registry, installed)


def test_an_entry_point_name_that_is_taken_is_told_with_both_distributions(site: Site) -> None:
    site.install("fake-first", GOOD.format(name="fake-one"), point="same")
    site.install("fake-second", GOOD.format(name="fake-two"), point="same")
    registry = registries.load()
    assert [offer.status for offer in of(registry, "fake-first")] == ["ok"]
    (lost,) = of(registry, "fake-second")
    assert lost.status == "failed"
    assert "its entry-point name is taken by fake-first 1.2 (entry point 'same')" in lost.reason


def test_a_component_name_that_is_taken_stays_with_the_first(site: Site, installed: Registry) -> None:
    site.install("fake-thief", GOOD.format(name="fp32"))
    registry = registries.load()
    (lost,) = of(registry, "fake-thief")
    assert (lost.kind, lost.name, lost.status) == ("mem", "fp32", "failed")
    assert "the name is taken by rlhf-kit" in lost.reason
    kept = registry.offer("mem", "fp32")
    assert kept is not None
    assert (kept.distribution, kept.status) == ("rlhf-kit", "ok")
    assert unharmed(registry, installed)


def test_two_entry_points_to_one_module_are_told(site: Site) -> None:
    module = site.install("fake-twice", GOOD.format(name="fake-mem"))
    site.metadata("fake-again", f"[rlhf]\nagain = {module}\n")
    registry = registries.load()
    states = {offer.distribution: offer.status for offer in registry.offers if offer.distribution.startswith("fake-")}
    assert sorted(states.values()) == ["failed", "ok"]


def test_a_missing_module_is_told_with_how_to_install_it(site: Site) -> None:
    source = GOOD.replace("phase='load'", "phase='load', modules={{'no_such_module': 'pip install it'}}")
    site.install("fake-lacking", source.format(name="fake-mem"))
    registry = registries.load()
    (offer,) = of(registry, "fake-lacking")
    assert (offer.status, offer.reason) == ("missing", "needs the module 'no_such_module': pip install it")
    assert not [warning for warning in registry.warnings if "fake-lacking" in warning]  # nothing is broken
    found = registry.find("mem", "fake-mem")
    assert isinstance(found, Problem)
    assert "pip install it" in found.what


def test_a_module_that_breaks_on_the_way_to_it_counts_as_missing(site: Site) -> None:
    (site.folder / "fake_plugin_parent").mkdir()
    (site.folder / "fake_plugin_parent" / "__init__.py").write_text("raise RuntimeError('no driver')")
    source = GOOD.replace("phase='load'", "phase='load', modules={{'fake_plugin_parent.child': 'pip install it'}}")
    site.install("fake-lacking", source.format(name="fake-mem"))
    assert [offer.status for offer in of(registries.load(), "fake-lacking")] == ["missing"]


def test_a_heavy_import_in_an_entry_module_is_told_and_the_plugin_works(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    (site.folder / "vllm.py").write_text("")  # stands for the real one, which nothing here needs
    site.install("fake-heavy", "import vllm\n" + GOOD.format(name="fake-mem"))
    registry = registries.load()
    del sys.modules["vllm"]  # not by monkeypatch, which would bring it back
    assert "imports vllm in its entry module 'fake_plugin_fake_heavy'" in warned(registry, "fake-heavy")
    assert of(registry, "fake-heavy")[0].status == "ok"


def test_defaults_that_nothing_has_are_told(site: Site) -> None:
    """They would be without effect, and a slip of the pen is all it takes."""
    defaults = (
        "{{'optim.lerning_rate': 1.0, 'batchsize': 2, 'optim.learning_rate': 1.0, 'batch_size': 2, 'optim': 'x'}}"
    )
    site.install(
        "fake-lost", GOOD.replace("phase='load'", f"phase='load', defaults={defaults}").format(name="fake-mem")
    )
    told = [line for line in registries.load().warnings if "fake-lost" in line]
    assert [line.partition("its defaults name ")[2] for line in told] == [
        "'optim.lerning_rate', which nothing has; did its author mean 'optim.learning_rate'?",
        "'batchsize', which nothing has; did its author mean 'batch_size'?",
    ]


@pytest.mark.parametrize("points", ["[rlhf]\nno equals sign\n", "[rlhf]\nx = not a module!\n"])
def test_damaged_metadata_is_told(site: Site, installed: Registry, points: str) -> None:
    site.metadata("fake-damaged", points)
    registry = registries.load()
    assert any("fake_damaged" in warning or "fake-damaged" in warning for warning in registry.warnings)
    assert unharmed(registry, installed)


def test_one_distribution_found_twice_on_the_path_counts_once(
    site: Site, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("fake-good", GOOD.format(name="fake-mem"))
    behind = tmp_path_factory.mktemp("behind")
    Site(behind).install("fake-good", GOOD.format(name="fake-old"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(behind)])
    assert [offer.name for offer in of(registries.load(), "fake-good")] == ["fake-mem"]


def test_a_name_that_nobody_has(site: Site) -> None:
    site.install("fake-bad", "raise RuntimeError('x')")
    registry = registries.load()
    near = registry.find("mem", "lroa")
    assert isinstance(near, Problem)
    assert near.what == "there is no --mem 'lroa'"
    assert near.fix.startswith("did you mean 'lora'? installed: ")
    assert "a plugin that failed to load may have offered it: fake-bad" in near.fix


def test_the_highest_rank_comes_first(make_registry: Callable[..., Registry]) -> None:
    from rlhf.api import MemoryEntry

    made = [
        MemoryEntry(name=f"fake-{i}", summary="", impl="a:B", phase="load", rank=rank) for i, rank in enumerate((1, 5))
    ]
    assert [entry.name for entry in make_registry(*made).entries("mem")] == ["fake-1", "fake-0"]


def test_the_listing_has_the_fields_that_outsiders_read(installed: Registry) -> None:
    rows = status_of(installed.offers)
    assert all(list(row) == ["kind", "name", "summary", "distribution", "version", "status", "reason"] for row in rows)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "could not be imported: AttributeError: module 'fake_plugin_impl' has no attribute 'Thing'"),
        ("import no_such_module", "could not be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('half installed')", "could not be imported: RuntimeError: half installed"),
        ("raise SystemExit(3)", "could not be imported: SystemExit: 3"),
        ("def broken(:", "could not be imported: SyntaxError"),
        ("Thing = 3", "is no class that derives from rlhf.api.Reward"),
        ("def Thing(config, context): ...", "is no class that derives from rlhf.api.Reward"),
        ("from rlhf.api import Engine as Thing", "is no class that derives from rlhf.api.Reward"),
    ],
)
def test_an_implementation_that_cannot_be_used(site: Site, source: str, reason: str) -> None:
    (site.folder / "fake_plugin_impl.py").write_text(source)
    entry = RewardEntry(name="fake-judge", summary="", impl="fake_plugin_impl:Thing")
    with pytest.raises(RequestError) as caught:
        resolve(Component(entry, None, "helpful", "fake-package", "1.2"))
    (problem,) = caught.value.problems
    where = "--reward helpful (from fake-package 1.2): its implementation fake_plugin_impl:Thing "
    assert problem.what.startswith(where + reason)
    assert problem.fix == "install fake-package again, or tell its author"
    assert (caught.value.__cause__ is not None) == ("imported" in reason)  # the traceback is for its author


@pytest.mark.parametrize(
    ("own", "meant"),
    [("checks", "check"), ("chec", "check"), ("chick", "check"), ("hceck", "check"), ("stats", "state")],
)
def test_a_method_one_letter_away_from_what_would_be_called(site: Site, own: str, meant: str) -> None:
    entry = RewardEntry(name="fake-judge", summary="", impl="fake_plugin_impl:Thing")
    head = "from rlhf.api import Reward\n\nclass Thing(Reward):\n"
    source = head + f"    def {own}(self, rollouts): return []\n"
    (site.folder / "fake_plugin_impl.py").write_text(source)
    with pytest.raises(RequestError) as caught:
        resolve(Component(entry, None, "", "fake-package", "1.2"))
    (problem,) = caught.value.problems
    assert f"defines `{own}`, which nothing calls, beside rlhf.api.Reward's own `{meant}`" in problem.what
    assert problem.fix == f"call it `{meant}`, or if it is a helper, `_{own}`"


@pytest.mark.parametrize("own", ["_checks", "recheck", "hcekc", "verdict"])
def test_a_helper_of_another_name_is_nobodys_affair(site: Site, own: str) -> None:
    entry = RewardEntry(name="fake-judge", summary="", impl="fake_plugin_impl:Thing")
    head = "from rlhf.api import Reward\n\nclass Thing(Reward):\n"
    (site.folder / "fake_plugin_impl.py").write_text(head + f"    def {own}(self, rollouts): return []\n")
    assert resolve(Component(entry)).__name__ == "Thing"


def test_beside_the_method_itself_one_like_it_is_a_helper(site: Site) -> None:
    entry = RewardEntry(name="fake-judge", summary="", impl="fake_plugin_impl:Thing")
    head = "from rlhf.api import Reward\n\nclass Thing(Reward):\n    def judge(self, rollouts, score): return []\n"
    (site.folder / "fake_plugin_impl.py").write_text(head + "    def judges(self): return []\n")
    assert resolve(Component(entry)).__name__ == "Thing"


def test_an_implementation_that_is_not_there() -> None:
    entry = RewardEntry(name="fake-judge", summary="", impl="no_such_module:Thing")
    with pytest.raises(RequestError, match=r"^--reward fake-judge: its implementation no_such_module:Thing could not"):
        resolve(Component(entry))


def test_every_implementation_of_what_is_installed_derives_from_its_kinds_class(installed: Registry) -> None:
    ours = [offer.entry for offer in of(installed, "rlhf-kit") if offer.status == "ok" and offer.entry]
    assert len(ours) > 20
    for entry in ours:
        assert resolve(Component(entry)).__name__ == entry.impl.partition(":")[2]
