"""Finds plugins through entry points, loudly: a broken, duplicate or ill-made one is reported with its distribution
and harms nobody; it is fatal only when the run asks for it."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import attrs
import pluggy

from rlhf import API_VERSION
from rlhf.entries import KINDS, NONE, AlgorithmEntry, Entry, StarterEntry
from rlhf.errors import Problem, RequestError
from rlhf.hooks import GROUP, HOOK_OF_KIND, Hooks
from rlhf.options import fields, nearest, one_letter
from rlhf.well_made import ill_typed

if TYPE_CHECKING:
    from rlhf.plan import Component

NAME = re.compile(r"[a-z0-9]+\+*([-+._][a-z0-9]+\+*)*")
"""Of a component."""
HEAVY = ("torch", "transformers", "vllm", "deepspeed")
_ASKED = (KeyboardInterrupt, GeneratorExit)
"""Not a plugin's doing. All else that its code raises is, SystemExit and asyncio's CancelledError too."""


@attrs.frozen
class Offer:
    """One component as it was found, usable or not."""

    kind: str
    name: str
    summary: str
    distribution: str
    version: str
    status: Literal["ok", "missing", "failed"]
    reason: str = ""
    entry: Entry | None = None


@attrs.frozen
class _Source:
    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point {self.plugin!r})"


class Registry:
    """Every component of every installed plugin."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.starters: list[StarterEntry] = []
        self.warnings: list[str] = []
        """What should be said once on stderr: plugins that were left out, or that slow everybody down."""
        self._by_name: dict[tuple[str, str], Offer] = {}
        self._elsewhere = False

    def elsewhere(self) -> Registry:
        """The same, for a plan of another machine: what lacks a module here can be had, after all that doesn't."""
        found = copy.copy(self)
        found._elsewhere = True
        return found

    def _usable(self, offer: Offer) -> bool:
        return offer.status == "ok" or (self._elsewhere and offer.status == "missing")

    def offers_of(self, kind: str) -> list[Offer]:
        return [offer for offer in self.offers if offer.kind == kind]

    def entries(self, kind: str) -> list[Entry]:
        """The entries of a kind whose modules are there, highest rank first."""
        found = [offer for offer in self.offers_of(kind) if self._usable(offer) and offer.entry is not None]
        found.sort(key=lambda offer: (offer.status != "ok", -offer.entry.rank if offer.entry else 0, offer.name))
        return [offer.entry for offer in found if offer.entry is not None]

    def offer(self, kind: str, name: str) -> Offer | None:
        return self._by_name.get((kind, name))

    def find(self, kind: str, name: str) -> Entry | Problem:
        """The named entry, or why there is none and what to type instead."""
        offer = self.offer(kind, name)
        if offer is not None and self._usable(offer) and offer.entry is not None:
            return offer.entry
        if offer is not None:
            return Problem(f"--{kind} {name} (from {offer.distribution}) cannot be used: {offer.reason}")
        known = [entry.name for entry in self.entries(kind)]
        near = nearest(name, known)
        failed = [o for o in self.offers if o.kind == "" and o.status == "failed"]
        hint = f"did you mean {near!r}? " if near else ""
        lost = "; a plugin that failed to load may have offered it: " + ", ".join(o.distribution for o in failed)
        listing = f"installed: {', '.join(known) or 'none'}"
        return Problem(f"there is no --{kind} {name!r}", hint + listing + (lost if failed else ""))

    def add(self, entry: Entry, source: _Source) -> None:
        """Take an entry in, or report why not. A taken name stays with the plugin that had it first."""
        reason = _check(entry)
        summary: object = entry.summary
        taken = self._by_name.get((entry.kind, entry.name))
        if taken is not None:
            reason = f"the name is taken by {taken.distribution} {taken.version}; one of the two must be uninstalled"
            self.warnings.append(f"plugin {source}: --{entry.kind} {entry.name}: {reason}")
        missing = {} if reason else {m: hint for m, hint in entry.modules.items() if not _present(m)}
        offer = Offer(
            kind=entry.kind,
            name=entry.name,
            summary=summary if isinstance(summary, str) else "",
            distribution=source.distribution,
            version=source.version,
            status="failed" if reason else "missing" if missing else "ok",
            reason=reason or "; ".join(f"needs the module {m!r}: {hint}" for m, hint in missing.items()),
            entry=entry,
        )
        if reason and taken is None:
            self.warnings.append(f"plugin {source}: --{entry.kind} {entry.name}: {reason}")
        self.offers.append(offer)
        if taken is None:
            self._by_name[entry.kind, entry.name] = offer

    def fail(self, source: _Source, reason: str) -> None:
        """Report a plugin of which nothing could be loaded."""
        self.warnings.append(f"plugin {source} was left out: {reason}")
        self.offers.append(Offer("", source.plugin, "", source.distribution, source.version, "failed", reason))


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except _ASKED:
        raise
    except BaseException:  # of a dotted name the parents are imported, and may break in any way
        return False


def _other_api(version: object) -> str:
    return f"made for plugin API {version}, this is {API_VERSION}: install a matching release of it"


def _check(entry: Entry) -> str:
    if entry.api_version != API_VERSION:
        return _other_api(entry.api_version)
    if wrong := ill_typed(entry, KINDS[entry.kind]):
        return wrong
    if not NAME.fullmatch(entry.name):
        return f"{entry.name!r} is no legal name: lower case, digits, and - + . between them"
    if entry.name == NONE:
        return f"{NONE!r} is no legal name: it stands for no component"
    if entry.impl.count(":") != 1:
        return f"impl must read 'module:Class', not {entry.impl!r}"
    if isinstance(entry, AlgorithmEntry) and "rollouts" not in entry.requires and entry.data is None:
        return "its requires doesn't name 'rollouts', so it samples nothing, and data must say what rows it reads"
    if entry.config is not None and not attrs.has(entry.config):
        return f"config must be an attrs class, not {entry.config!r}"
    try:
        names = fields(entry.config) if entry.config is not None else {}
    except _ASKED:
        raise
    except BaseException as error:  # an annotation that can't be resolved
        return f"the types of its config can't be read: {type(error).__name__}: {error}"
    reserved = sorted({"name", "label"} & set(names))
    if reserved:
        return f"an option can't be called {' or '.join(reserved)}: in a recipe that says which component it is"
    return ""


def _distributions(registry: Registry) -> Iterator[tuple[importlib.metadata.EntryPoint, str, str]]:
    """Every entry point of the group with its distribution; one distribution found twice on the path counts once."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == GROUP]
            if not points:  # asked first: a name costs the parsing of METADATA
                continue
            name, version = distribution.name or "an unnamed distribution", distribution.version or "?"
        except Exception as error:  # a file of it is damaged; ours to report only if it speaks of our group
            if f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or ""):
                where = _Source("?", str(getattr(distribution, "_path", "an unreadable distribution")), "?")
                registry.fail(where, f"its metadata can't be read: {type(error).__name__}: {error}")
            continue
        if name not in seen:
            seen.add(name)
            for point in points:
                yield point, name, version


def packages() -> list[str]:
    """The top packages of all entry modules, ours first."""
    points = sorted(_distributions(Registry()), key=lambda found: (found[1] != "rlhf-kit", found[1], found[0].name))
    return list(dict.fromkeys(point.module.partition(".")[0] for point, _, _ in points))


def load() -> Registry:
    """Load every plugin. Never raises for what a plugin does; see `Registry.warnings`."""
    registry = Registry()
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    points = sorted(_distributions(registry), key=lambda found: (found[1] != "rlhf-kit", found[1], found[0].name))
    taken: dict[str, _Source] = {}
    for point, distribution, version in points:
        source = _Source(point.name, distribution, version)
        if point.name in taken:
            registry.fail(source, f"its entry-point name is taken by {taken[point.name]}")
            continue
        taken[point.name] = source
        heavy_before = {name for name in HEAVY if name in sys.modules}
        try:
            plugin = point.load()
        except _ASKED:
            raise
        except BaseException as error:
            registry.fail(source, f"importing {point.value!r} failed: {type(error).__name__}: {error}")
            continue
        heavy = [name for name in HEAVY if name in sys.modules and name not in heavy_before]
        if heavy:
            registry.warnings.append(
                f"plugin {source} imports {', '.join(heavy)} in its entry module {point.value!r}, which slows every "
                "command; its author should name the implementation in impl='module:Class' instead"
            )
        try:  # a module may have a __getattr__ of its own
            declared = getattr(plugin, "api_version", API_VERSION)
            if declared != API_VERSION:  # said before its hooks are looked at, which may be of that version
                registry.fail(source, _other_api(declared))
                continue
            manager.register(plugin, name=f"{distribution}:{point.name}")
        except _ASKED:
            raise
        except BaseException as error:
            registry.fail(source, f"{type(error).__name__}: {error}")
            continue
        _collect(registry, manager, plugin, source)
    registry.warnings.extend(_lost_defaults(registry))
    return registry


def _lost_defaults(registry: Registry) -> Iterator[str]:
    """Defaults that entries name and nothing has, so that they'd be without effect."""
    from rlhf.recipe import RunOptions  # which finds recipes in the packages that this module lists

    entries = [offer.entry for offer in registry.offers if offer.entry is not None and offer.status != "failed"]
    known = {*fields(RunOptions), *KINDS}
    for entry in entries:
        known |= {f"{entry.kind}.{name}" for name in (fields(entry.config) if entry.config is not None else ())}
    for offer in registry.offers:
        for key in offer.entry.defaults if offer.entry is not None and offer.status != "failed" else ():
            kind, _, option = key.partition(".")
            if (f"{kind}.{option.rpartition('.')[2]}" if option else kind) not in known:
                near = nearest(key, known)
                hint = f"; did its author mean {near!r}?" if near else ""
                where = f"plugin {offer.distribution} {offer.version}: --{offer.kind} {offer.name}"
                yield f"{where}: its defaults name {key!r}, which nothing has{hint}"


def _collect(registry: Registry, manager: pluggy.PluginManager, plugin: Any, source: _Source) -> None:
    own = manager.get_hookcallers(plugin) or []
    unknown = [caller.name for caller in own if not caller.has_spec()]
    if unknown:
        registry.fail(source, f"it implements unknown hooks: {', '.join(unknown)} (this is plugin API {API_VERSION})")
        return
    if not own:
        registry.fail(source, "it implements no hook; is @hookimpl missing?")
        return
    names = {caller.name for caller in own}
    for kind, hook in HOOK_OF_KIND.items():
        if hook in names:
            for entry in _call(registry, plugin, hook, source):
                if not isinstance(entry, KINDS[kind]):
                    registry.fail(source, f"{hook} yields {KINDS[kind].__name__}, not {type(entry).__name__}")
                    continue
                name: object = entry.name
                wrong = f"{hook}: the entry {name!r} is malformed: "
                if not isinstance(name, str):
                    registry.fail(source, f"{wrong}name must be str")
                    continue
                try:
                    registry.add(entry, source)
                except _ASKED:
                    raise
                except BaseException as error:  # such as of a class of its own, whose fields raise
                    registry.fail(source, f"{wrong}{type(error).__name__}: {error}")
    if "rlhf_starters" in names:
        for entry in _call(registry, plugin, "rlhf_starters", source):
            if not isinstance(entry, StarterEntry):
                registry.fail(source, f"rlhf_starters yields StarterEntry, not {type(entry).__name__}")
            elif wrong := ill_typed(entry, StarterEntry):
                registry.fail(source, f"rlhf_starters: the starter {entry.name!r} is malformed: {wrong}")
            else:
                registry.starters.append(entry)


def _call(registry: Registry, plugin: Any, hook: str, source: _Source) -> list[Any]:
    # Called directly, not through pluggy: one plugin that raises must not take the others' entries with it.
    try:
        found: Iterable[Any] | None = getattr(plugin, hook)()
        return list(found or ())
    except _ASKED:
        raise
    except BaseException as error:
        registry.fail(source, f"{hook} failed: {type(error).__name__}: {error}")
        return []


def resolve(component: Component) -> Any:
    """Import a component's class, after the plan is accepted.

    Raises:
        RequestError: its module can't be imported, whatever it raises, or holds no such class of this kind.
    """
    where = f"{component}: its implementation {component.entry.impl}"
    fix = f"install {component.distribution or 'it'} again, or tell its author"
    module, _, name = component.entry.impl.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except _ASKED:
        raise
    except BaseException as error:
        what = f"{where} could not be imported: {type(error).__name__}: {error}"
        raise RequestError(Problem(what, fix)) from error
    wanted = _class_of(component.kind)
    if not (isinstance(found, type) and issubclass(found, wanted)):
        raise RequestError(Problem(f"{where} is no class that derives from rlhf.api.{wanted.__name__}", fix))
    if near := _misspelt(found, wanted):
        own, meant = near
        what = f"{where} defines `{own}`, which nothing calls, beside rlhf.api.{wanted.__name__}'s own `{meant}`"
        raise RequestError(Problem(what, f"call it `{meant}`, or if it is a helper, `_{own}`"))
    return found


def _misspelt(found: type[Any], wanted: type[Any]) -> tuple[str, str] | None:
    """(a method of a plugin's own, what it is one letter away from and hasn't got otherwise)."""
    ours = {name for name in dir(wanted) if not name.startswith("_")}
    own = {name for name in dir(found) if not name.startswith("_") and callable(getattr(found, name, None))} - ours
    left = [name for name in sorted(ours) if getattr(found, name, None) is getattr(wanted, name, None)]
    return next(((name, meant) for name in sorted(own) for meant in left if one_letter(name, meant)), None)


def _class_of(kind: str) -> type[Any]:
    """What implementations of a kind derive from."""
    if kind == "launch":
        from rlhf.component import Launcher

        return Launcher
    from rlhf.interfaces import CLASS_OF_KIND  # imports torch

    return CLASS_OF_KIND[kind]


def loaded() -> Registry:
    """The registry of this process, made once."""
    global _loaded
    if _loaded is None:
        _loaded = load()
    return _loaded


_loaded: Registry | None = None


def status_of(offers: Iterable[Offer]) -> list[dict[str, str]]:
    """The listing that `rlhf plugins --json` prints."""
    keys = ("kind", "name", "summary", "distribution", "version", "status", "reason")
    return [{key: getattr(offer, key) for key in keys} for offer in offers]
