"""What the user asked for: a YAML file and flags, read strictly. Defaults come later, from the chosen components."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import yaml

from rlhf import library
from rlhf.entries import KINDS, MANY, NONE
from rlhf.errors import Problem, RequestError
from rlhf.options import fields, nearest, option

_MOST = 1_000_000_000
"""Of steps, rows and tokens: far more than any run, and nothing that a computer can't count to."""


@attrs.frozen(kw_only=True)
class RunOptions:
    """What concerns every run, whatever its components. YAML keys, and flags of the same name."""

    max_steps: int | None = option(
        None,
        help="end after this many steps, however often they pass over the data; left out, after --epochs",
        ge=1,
        le=_MOST,
    )
    epochs: float = option(1.0, help="passes over the data, where --max-steps is left out", gt=0, le=1_000_000)
    batch_size: int = option(32, help="rows (offline) or prompts (online) a step, over all ranks", ge=1, le=10_000_000)
    micro_batch_tokens: int = option(
        8192, help="upper bound of one forward, padding included; changes speed and memory, not results", unit="tokens",
        ge=1, le=_MOST,
    )  # fmt: skip
    seed: int = option(0, help="of data order, sampling and initialisation", ge=0, le=2**63 - 1)
    save_every: int | None = option(None, help="steps between checkpoints; left out, ten a run", ge=1, le=_MOST)
    keep: int = option(2, help="how many checkpoints to keep; the best one is kept besides", ge=1, le=_MOST)
    eval_every: int | None = option(
        None, help="steps between evaluations on held-out data; left out, only before and after", ge=1, le=_MOST
    )
    eval_rows: int = option(
        128, help="at most so many held-out rows are evaluated; 0 turns evaluation off", ge=0, le=_MOST
    )
    eval_fraction: float = option(0.05, help="share of --data held out where there is no --eval-data", ge=0, le=0.5)
    eval_temperature: float | None = option(
        None, help="of held-out sampling; left out, the engine's own, with seeds that never change", ge=0
    )
    importance: str = option(
        "token", help="weights for samples of an engine whose log-probs aren't exact: a token's own, its whole "
        "response's (the product over the tokens), or none",
        source="TIS, Yao et al. 2025", choices=("token", "sequence", "off"),
    )  # fmt: skip
    importance_cap: float = option(
        2.0, help="the largest importance weight; what is above it follows --importance-beyond", source="TIS's C", ge=1
    )
    importance_beyond: str = option(
        "clip", help="what becomes of a weight above the cap: the cap, or 0, so that the token isn't learnt from",
        source="clip: TIS; mask: IcePop, Ling Team 2025", choices=("clip", "mask"),
    )  # fmt: skip
    ptx_coef: float = option(
        0.0, help="weight of the mean next-token loss on --ptx-data, in every optimiser step of an online algorithm",
        source="PPO-ptx, InstructGPT, whose gamma is 27.8", ge=0,
    )  # fmt: skip
    ptx_batch_size: int = option(16, help="rows of --ptx-data an optimiser step, over all ranks", ge=1, le=10_000_000)
    nproc: int = option(1, help="processes to start on this machine", ge=1, le=100_000)
    trust_remote_code: bool = option(False, help="run code that comes with a model; only for models you have read")


@attrs.frozen
class Pick:
    """One component the user named, with the options given beside it."""

    name: str
    label: str = ""
    """Tells two of one sort apart: `--reward model:helpful`."""
    options: Mapping[str, Any] = attrs.Factory(dict)

    @property
    def key(self) -> str:
        """How options address it: the label where there is one."""
        return self.label or self.name


Picks = Mapping[str, tuple[Pick, ...]]
"""Kind -> the components named, in the order typed. That no tracker is to listen is said by ()."""


@attrs.frozen
class RoleRecipe:
    """What is asked for one role alone."""

    model: str | None = None
    mem: tuple[Pick, ...] | None = None


@attrs.frozen
class Recipe:
    """The whole request."""

    picks: Picks = attrs.Factory(dict)
    options: Mapping[str, Mapping[str, Any]] = attrs.Factory(dict)
    """`--KIND.FIELD` by kind; for kinds of which there are many, by "kind.component"."""
    roles: Mapping[str, RoleRecipe] = attrs.Factory(dict)
    model: str | None = None
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    ptx_data: tuple[str, ...] = ()
    run: Mapping[str, Any] = attrs.Factory(dict)
    """Raw run options, as given."""

    def merged(self, over: Recipe) -> Recipe:
        """This recipe with `over` (the flags) laid on top. A component named in both keeps its options from here."""
        picks = {kind: _laid_over(self.picks.get(kind, ()), named) for kind, named in over.picks.items()}
        options = {key: {**self.options.get(key, {}), **over.options.get(key, {})}
                   for key in {*self.options, *over.options}}  # fmt: skip
        roles = {
            name: RoleRecipe(
                (over.roles.get(name) or RoleRecipe()).model or (self.roles.get(name) or RoleRecipe()).model,
                _laid_over((self.roles.get(name) or RoleRecipe()).mem or (), over.roles[name].mem or ())
                if name in over.roles and over.roles[name].mem is not None
                else (self.roles.get(name) or RoleRecipe()).mem,
            )
            for name in {*self.roles, *over.roles}
        }
        return Recipe(
            picks={**self.picks, **picks},
            options=options,
            roles=roles,
            model=over.model or self.model,
            data=over.data or self.data,
            eval_data=over.eval_data or self.eval_data,
            ptx_data=over.ptx_data or self.ptx_data,
            run={**self.run, **over.run},
        )


def _laid_over(below: Iterable[Pick], above: Iterable[Pick]) -> tuple[Pick, ...]:
    given = {(pick.name, pick.label): pick.options for pick in below}
    return tuple(attrs.evolve(p, options={**given.get((p.name, p.label), {}), **p.options}) for p in above)


_TOP = {*KINDS, "roles", "model", "data", "eval_data", "ptx_data"}


def from_mapping(content: Mapping[str, Any], where: str) -> Recipe:
    """Read a recipe from parsed YAML. All its keys are checked; options are checked once components are chosen.

    Raises:
        RequestError: unknown keys (with the nearest), or values of the wrong shape.
    """
    if "stages" in content:
        raise RequestError(Problem(f"{where}: is a pipeline, not the recipe of one run", f"rlhf pipeline {where}"))
    problems = [*twice(content, where)]
    picks: dict[str, tuple[Pick, ...]] = {}
    options: dict[str, Mapping[str, Any]] = {}
    run: dict[str, Any] = {}
    known_run = fields(RunOptions)
    given = {}
    for raw_key, value in content.items():
        key = key_of(raw_key)
        given[key] = value
        if key in KINDS and key not in MANY and isinstance(value, dict) and "name" not in value:
            problems += twice(value, f"{where}: {key}")
            if value:
                options[key] = {key_of(name): chosen for name, chosen in value.items()}
        elif key in KINDS:
            picks[key] = _picks(key, value, where, problems)
        elif key in known_run:
            run[key] = value
        elif key not in _TOP:
            near = nearest(key, [*_TOP, *known_run])
            fix = f"did you mean {near!r}?" if near else f"known keys: {', '.join(sorted([*_TOP, *known_run]))}"
            problems.append(Problem(f"{where}: unknown key {raw_key!r}", fix))
    recipe = Recipe(
        picks=picks,
        options=options,
        roles=_roles({} if given.get("roles") is None else given["roles"], where, problems),
        model=_text(given.get("model"), f"{where}: model", problems),
        data=_paths("data", given, where, problems),
        eval_data=_paths("eval_data", given, where, problems),
        ptx_data=_paths("ptx_data", given, where, problems),
        run=run,
    )
    if problems:
        raise RequestError(problems)
    return recipe


def key_of(raw: Any) -> str:
    """A key of a recipe as it is looked up: `batch-size` and `batch_size` are one."""
    return str(raw).replace("-", "_")


def twice(content: Mapping[Any, Any], where: str) -> Iterator[Problem]:
    """Keys of one mapping that differ in their spelling alone, of which the last would win without a word."""
    spelt: dict[str, list[str]] = {}
    for raw in content:
        spelt.setdefault(key_of(raw), []).append(str(raw))
    for names in spelt.values():
        if len(names) > 1:
            yield Problem(f"{where}: {' and '.join(names)} are one key, given twice", "leave all but one out")


def from_file(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RequestError: no such file, not YAML, or not a recipe.
    """
    return from_mapping(read_yaml(library.find(str(path))), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        RequestError: no such file, no text, no YAML, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(Problem(f"{path}: there is no such recipe file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(Problem(f"{path}: cannot be read: {error}")) from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise RequestError(Problem(f"{path}: is no YAML: {error}")) from error
    if not isinstance(content, dict):
        raise RequestError(Problem(f"{path}: holds no recipe", "a recipe is a mapping, such as 'algo: ppo'"))
    return content


def parse_yaml(text: str) -> Any:
    """What YAML says.

    Raises:
        ValueError: it is none; says why in a line.
    """
    try:
        return yaml.load(text, Loader=_Strict)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class _Strict(yaml.SafeLoader):
    """YAML in which a key given twice is an error, where by itself the last would win without a word; and so is a value
    that isn't of its type, or is a part of itself."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=True)  # at once, so that a part of itself isn't there yet
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # of any kind, such as IndexError of an empty !!int
            what = f"line {node.start_mark.line + 1}: {node.value!r:.40} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"line {line} gives the key {key.value!r} again")
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _picks(kind: str, value: Any, where: str, problems: list[Problem]) -> tuple[Pick, ...]:
    items = value if isinstance(value, list) else [value]
    found: list[Pick] = []
    if not items and kind not in ("mem", "track"):  # of these, none at all is a choice
        problems.append(_nothing(f"{where}: {kind}", f"{kind}: NAME"))
    for item in items:
        if isinstance(item, str) and not item.replace(",", "").strip():
            problems.append(_nothing(f"{where}: {kind}", f"{kind}: NAME"))
        elif isinstance(item, str):
            found.extend(parse_pick(part) for part in item.split(",") if part.strip())
        elif isinstance(item, dict) and isinstance(item.get("name"), str):
            pick = parse_pick(item["name"])
            label = item.get("label", pick.label)
            if "label" in item and (label == "" or isinstance(label, bool) or not isinstance(label, str | int)):
                problems.append(
                    Problem(f"{where}: {kind}: {pick.name}: the label {label!r} is no word", "leave it out")
                )
            problems += twice(item, f"{where}: {kind}: {pick.name}")
            options = {key_of(k): v for k, v in item.items() if k not in ("name", "label")}
            found.append(Pick(pick.name, str(label), options))
        else:
            what = f"{where}: {kind}: {item!r} names no component"
            problems.append(Problem(what, f"write '{kind}: NAME' or '{kind}: {{name: NAME, OPTION: VALUE}}'"))
    if len(found) > 1 and kind not in MANY:
        problems.append(Problem(f"{where}: {kind} takes one component, not {len(found)}"))
    return _none_or(kind, found, f"{where}: {kind}: ", problems)


def _none_or(kind: str, picks: list[Pick], where: str, problems: list[Problem]) -> tuple[Pick, ...]:
    """The picks; of trackers, none at all where that is said."""
    if kind != "track" or NONE not in [pick.name for pick in picks]:
        return tuple(picks)
    if len(picks) > 1:
        problems.append(Problem(f"{where}{NONE} stands alone: with others it says nothing", "leave it or them out"))
    return ()


def parse_pick(text: str) -> Pick:
    """`NAME` or `NAME:LABEL`."""
    name, _, label = text.strip().partition(":")
    return Pick(name, label)


def _roles(content: Any, where: str, problems: list[Problem]) -> dict[str, RoleRecipe]:
    if not isinstance(content, dict):
        problems.append(Problem(f"{where}: roles must map a role to its choices", "roles: {reward: {model: PATH}}"))
        return {}
    roles = {}
    for name, chosen in content.items():
        if not isinstance(chosen, dict) or set(chosen) - {"model", "mem"}:
            unknown = (
                ", ".join(sorted(map(str, set(chosen) - {"model", "mem"})))
                if isinstance(chosen, dict)
                else repr(chosen)
            )
            problems.append(Problem(f"{where}: roles: {name}: {unknown} is unknown", "a role takes model and mem"))
            continue
        roles[str(name)] = RoleRecipe(
            _text(chosen.get("model"), f"{where}: roles: {name}: model", problems),
            _picks("mem", chosen["mem"], f"{where}: roles: {name}", problems) if "mem" in chosen else None,
        )
    return roles


def _text(value: Any, where: str, problems: list[Problem]) -> str | None:
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    if isinstance(value, str):
        problems.append(_nothing(where, "model: PATH"))
    else:
        problems.append(Problem(f"{where} must be text, not {value!r}"))
    return None


def _paths(key: str, given: Mapping[str, Any], where: str, problems: list[Problem]) -> tuple[str, ...]:
    value = given.get(key)
    items = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        problems.append(Problem(f"{where}: {key} must be a path or a list of paths, not {value!r}"))
        return ()
    if not all(item.strip() for item in items) or (key == "data" and value == []):  # of the others none is a choice
        problems.append(_nothing(f"{where}: {key}", f"{key}: PATH"))
    return tuple(items)


def _nothing(what: str, instead: str) -> Problem:
    """Of what would silently mean something else, such as what is taken unasked."""
    return Problem(f"{what} is given nothing", f"{instead}, or leave it out")


_PATHS = ("model", "data", "eval_data", "ptx_data")
_ROLE_VALUE = re.compile(r"([\w-]+)=(.+)")


def from_flags(
    flags: Mapping[str, Any], field_options: Sequence[tuple[str, Any]], named: Mapping[str, Sequence[str]]
) -> Recipe:
    """Make a recipe of what was typed.

    Args:
        flags: run options given on the command line, by name; and "model", "data", "eval_data", "ptx_data".
        field_options: ("kind.field" or "kind.component.field", value), in the order typed; True where none was.
        named: kind -> the values of its flag, in the order typed.

    Raises:
        RequestError: an option path that can't be meant.
    """
    problems: list[Problem] = []
    picks: dict[str, tuple[Pick, ...]] = {}
    roles: dict[str, RoleRecipe] = {}
    given = {**named, **{name: flags.get(name) or () for name in _PATHS}}
    for name, values in given.items():  # such as of a shell variable that is not set
        if any(not value.replace(",", "").strip() for value in values):
            flag = f"--{name.replace('_', '-')}"
            problems.append(_nothing(flag, f"{flag} VALUE"))
    for kind, values in named.items():
        found: list[Pick] = []
        for value in values:
            scoped = _ROLE_VALUE.fullmatch(value) if kind == "mem" else None
            if scoped:
                role = scoped.group(1)
                parts = tuple(parse_pick(part) for part in scoped.group(2).split(",") if part.strip())
                before = roles.get(role, RoleRecipe())
                roles[role] = attrs.evolve(before, mem=(before.mem or ()) + parts)
            elif kind == "mem" and "=" in value:
                problems.append(
                    Problem(f"--mem {value} can't be read", "--mem NAME,NAME, and apart from it --mem ROLE=NAME,NAME")
                )
            else:
                found.extend(parse_pick(part) for part in (value.split(",") if kind in MANY else [value]) if part)
        if found:
            picks[kind] = _none_or(kind, found, f"--{kind} ", problems)
    models: list[str] = []
    for value in flags.get("model") or ():
        scoped = _ROLE_VALUE.fullmatch(value)
        if scoped and not Path(value).exists():
            roles[scoped.group(1)] = attrs.evolve(roles.get(scoped.group(1), RoleRecipe()), model=scoped.group(2))
        else:
            models.append(value)
    if len(models) > 1:
        problems.append(
            Problem(f"--model is given twice: {', '.join(models)}", "for one role alone: --model ROLE=PATH")
        )
    options: dict[str, dict[str, Any]] = {}
    for path, value in field_options:
        kind, _, rest = path.partition(".")
        component, _, name = rest.rpartition(".")  # a component's name may hold dots
        if name and bool(component) == (kind in MANY):
            options.setdefault(f"{kind}.{component}" if component else kind, {})[name.replace("-", "_")] = value
        else:
            form = f"--{kind}.COMPONENT.FIELD" if kind in MANY else f"--{kind}.FIELD"
            problems.append(Problem(f"--{path} is no option", f"options of this kind read {form}"))
    if problems:
        raise RequestError(problems)
    run = {key: value for key, value in flags.items() if key in fields(RunOptions) and value is not None}
    return Recipe(
        picks,
        options,
        roles,
        models[0] if models else None,
        tuple(flags.get("data") or ()),
        tuple(flags.get("eval_data") or ()),
        tuple(flags.get("ptx_data") or ()),
        run,
    )
