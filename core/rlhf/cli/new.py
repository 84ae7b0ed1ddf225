"""`rlhf new`: packages that a plugin's author begins with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template

import attrs
import click

from rlhf import API_VERSION, api
from rlhf.cli import Command, say
from rlhf.entries import KINDS, NONE
from rlhf.errors import Problem, RequestError
from rlhf.files import cannot_be_written, check_free, new_folder
from rlhf.options import nearest
from rlhf.registry import NAME, loaded

_TEMPLATES = Path(__file__).parents[1] / "templates" / "plugin"


@attrs.frozen
class _Kind:
    """What is written for a kind of component."""

    module: str
    base: str
    """What its class derives from."""
    summary: str
    run: str = "--KIND NAME"
    """What tells a run to take it, once it is installed; NAME is the component's."""


_KINDS = {
    "algo": _Kind("algorithm", "Algorithm", "REINFORCE against a prompt's other completions"),
    "policy": _Kind("policy", "Policy", "causal language models, padded to one rectangle"),
    "engine": _Kind("engine", "Engine", "samples token by token, without a cache"),
    "reward": _Kind("reward", "Reward", "share of a row's words that are said"),
    "mem": _Kind("memory", "MemoryStrategy", "leaves parameters untrained by their names"),
    "optim": _Kind("optimizer", "OptimizerStrategy", "steps by the sign of the momentum"),
    "backend": _Kind("backend", "Backend", "one process, every line in sight"),
    "format": _Kind("reader", "Format", "a line of text a row", "--data example.NAME --reward answer"),
    "track": _Kind("tracker", "Tracker", "writes every number to a CSV file"),
    "launch": _Kind("launcher", "Launcher", "a process a rank, on this machine", "--launch NAME --nproc 2"),
}


@click.group()
def new() -> None:
    """Write what a plugin's author begins with.

    \b
    rlhf new plugin tempered --kind algo     a package that installs, passes its tests and runs
    """


@new.command(cls=Command)
@click.argument("name", metavar="NAME")
@click.option("--kind", metavar="KIND", required=True, help=f"of the component: {', '.join(KINDS)}")
@click.option("--output", metavar="DIR", help="where to; must not be there yet; left out, rlhf-NAME")
def plugin(name: str, kind: str, output: str | None) -> None:
    """Write a small, whole package of one component: it installs, passes the kit, and runs at once.

    NAME is what users will type: --KIND NAME. The package is rlhf-NAME, with a manifest (options, what it provides and
    requires), an implementation that works and is yours to change, and tests that hold it to its kind's contract.

    \b
    rlhf new plugin tempered --kind algo
    pip install -e rlhf-tempered
    rlhf run --algo tempered --help
    rlhf run --algo tempered --max-steps 5
    pytest rlhf-tempered

    What each kind is for is in docs/architecture.md; what a component is given and must return, in rlhf.api.
    """
    _check(name, kind)
    target = Path(output) if output else Path(f"rlhf-{name}")
    check_free(target)
    write(target, files(name, kind))
    run = _run(name, kind)
    say(f"wrote {target}: a plugin of one component, --{kind} {name}. What next:")
    inside = f"cd {target} && " if kind == "format" else ""
    for line in (f"pip install -e {target}", f"pytest {target}", f"{inside}{run}"):
        click.echo(line)


def _run(name: str, kind: str) -> str:
    """What to type once it is installed."""
    return f"rlhf run {_KINDS[kind].run.replace('KIND', kind).replace('NAME', name)} --max-steps 5"


def _check(name: str, kind: str) -> None:
    """
    Raises:
        RequestError: the name or the kind can't be.
    """
    problems = []
    if kind not in KINDS:
        near = nearest(kind, [*KINDS, *_MEANT], cutoff=0.6)
        near = _MEANT.get(near, near) if near else None
        hint = f"did you mean {near}? " if near else ""
        problems.append(Problem(f"--kind {kind}: there is no such kind", f"{hint}kinds: {', '.join(KINDS)}"))
    if not NAME.fullmatch(name):
        proposed = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        what = f"{name!r} is no legal name: lower case, digits, and one of - + . _ between"
        problems.append(Problem(what, f"such as {proposed}" if proposed else "such as tempered"))
    elif name == NONE:
        problems.append(Problem(f"{name!r} is no legal name: it stands for no component", "give another"))
    elif name.startswith("rlhf-"):
        what = f"{name!r}: the package is called rlhf-NAME by itself"
        problems.append(Problem(what, f"give the component's name alone: {name.removeprefix('rlhf-')}"))
    elif kind in KINDS and (taken := loaded().offer(kind, name)) is not None:
        what = f"there is a --{kind} {name} already, from {taken.distribution} {taken.version}"
        problems.append(Problem(what, "give another name: of two, neither could be told from the other"))
    elif there := _installed(_Names.of(name)):
        what = f"{name!r}: {there} is installed, and would be replaced or hidden"
        problems.append(Problem(what, "give another name"))
    if problems:
        raise RequestError(problems)


_MEANT = {
    "algorithm": "algo", "model": "policy", "memory": "mem", "optimizer": "optim", "optimiser": "optim",
    "data": "format", "tracker": "track", "logger": "track", "launcher": "launch",
}  # fmt: skip
"""What a kind may be taken to be called."""


@attrs.frozen
class _Names:
    """What things are called in the package of a component."""

    plugin: str
    package: str
    class_name: str
    distribution: str

    @classmethod
    def of(cls, name: str) -> _Names:
        words = re.findall(r"[a-z0-9]+", name.replace("+", " plus "))
        title = "".join(word.capitalize() for word in words)
        # one that the templates import would hide what they call
        hides = not title[0].isalpha() or title in {*api.__all__, "Any", "Callable", "Path", "Tensor"}
        plugin = "-".join(words)
        return cls(plugin, "rlhf_" + "_".join(words), f"The{title}" if hides else title, f"rlhf-{plugin}")


def _installed(names: _Names) -> str:
    """What is there already by one of these names; nothing where neither is."""
    if importlib.util.find_spec(names.package) is not None:
        return f"a package {names.package}"
    try:
        importlib.metadata.distribution(names.distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"a distribution {names.distribution}"


def files(name: str, kind: str) -> dict[str, str]:
    """Path inside the package's folder -> content."""
    about, names = _KINDS[kind], _Names.of(name)
    package = names.package
    values = {
        "name": name,
        **attrs.asdict(names),
        "module": about.module,
        "base": about.base,
        "summary": about.summary,
        "run": _run(name, kind),
        "api_version": str(API_VERSION),
    }
    found = {path.name.removesuffix(".tmpl"): _filled(path, values) for path in _sources("common")}
    for path in _sources(kind):
        content, file = _filled(path, values), path.name.removesuffix(".tmpl")
        if file == "test_plugin.py":
            found[f"tests/test_{package}.py"] = content
        elif file == "example":
            found[f"example.{name}"] = content
        else:
            found[f"{package}/{file}"] = content
    found[f"{package}/py.typed"] = ""
    return found


def _sources(folder: str) -> list[Path]:
    return sorted((_TEMPLATES / folder).glob("*.tmpl"))  # dot files among them


def _filled(path: Path, values: Mapping[str, str]) -> str:
    return Template(path.read_text(encoding="utf-8")).substitute(values)


def write(target: Path, content: Mapping[str, str]) -> None:
    """Write files into a folder that appears whole.

    Raises:
        RequestError: it can't be written.
    """
    try:
        with new_folder(target) as partial:
            for name, text in content.items():
                place = partial / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_be_written(target, error) from error
