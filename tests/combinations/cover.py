"""Which of the legal combinations are run: few that between them have every value, every pair and every triple of
memory, backend and engine. What judges the samples is a value like the others.

    python tests/combinations/cover.py            writes chosen.txt anew, for what is installed here
    python tests/combinations/cover.py --count    says how many are legal, and how many are chosen

What is legal is asked of the composer (`rlhf.legality_table`), so that the list and a run can't disagree. Algorithms
that the composer can't tell apart are one class: pairs are of classes, and every algorithm is in two combinations at
least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from rlhf import facts
from rlhf.entries import AlgorithmEntry, Entry, MemoryEntry
from rlhf.legality_table import Cell, Wanted, _as_composed, table
from rlhf.plan import resource
from rlhf.recipe import Pick, Recipe, RoleRecipe
from rlhf.registry import Registry, loaded

CHOSEN = Path(__file__).with_name("chosen.txt")
ELSEWHERE = {
    "openai": "takes an endpoint: tests/plugins/engines runs it",
    "vllm": "takes half a minute to start: tests/plugins/engines runs it with whole weights and adapters under single, "
    "zero3 and fsdp2, in one process and in two, and compares more than losses",
    "http": "asks a server: tests/plugins/rewards runs it",
    "judge": "asks an endpoint: tests/plugins/rewards runs it",
}
"""Engines and rewards that are combined in tests of their own."""
OPTIONS = {"python": {"path": f"{Path(__file__).with_name('judging.py')}:score"}}
"""Of rewards that can't do without."""
STARTER = "rlhf_plugins.starter:model"


@attrs.frozen(order=True)
class Combination:
    """What a run is told; its name reads like `ppo-hf-fp32+lora-model-ddp-adamw`, or `sft-offline-fp32-single-adamw`
    where nothing is judged."""

    algo: str
    engine: str
    """Empty where nothing is sampled."""
    mem: tuple[str, ...]
    reward: str
    """Empty where nothing is judged."""
    backend: str
    optim: str

    @property
    def name(self) -> str:
        judged = (self.reward,) if self.reward else ()
        return "-".join((self.algo, self.engine or "offline", "+".join(self.mem), *judged, self.backend, self.optim))

    @property
    def nproc(self) -> int:
        return 1 if self.backend == "single" else 2


def parse(text: str) -> Combination:
    """The combination that a line of chosen.txt tells, words separated by blanks."""
    algo, engine, mem, reward, backend, optim = text.split()
    return Combination(
        algo,
        "" if engine == "offline" else engine,
        tuple(mem.split("+")),
        "" if reward == "unjudged" else reward,
        backend,
        optim,
    )


def line(combination: Combination) -> str:
    c = combination
    return " ".join((c.algo, c.engine or "offline", "+".join(c.mem), c.reward or "unjudged", c.backend, c.optim))


def classes(registry: Registry) -> dict[str, str]:
    """Each algorithm's class, named after its first member."""
    first: dict[object, str] = {}
    entries = [entry for entry in registry.entries("algo") if isinstance(entry, AlgorithmEntry)]
    return {entry.name: first.setdefault(_as_composed(entry), entry.name) for entry in entries}


def memories(registry: Registry) -> list[tuple[str, ...]]:
    """Each precision alone; with each other strategy; with each two others."""
    entries = [entry for entry in registry.entries("mem") if isinstance(entry, MemoryEntry)]
    precisions = [entry.name for entry in entries if entry.slot == "precision"]
    precisions.sort(key=lambda name: name != "fp32")  # of equal choices that which compares to rounding
    others = sorted(entry.name for entry in entries if entry.slot != "precision")
    sets = [more for count in range(3) for more in itertools.combinations(others, count)]
    return [(precision, *more) for precision in precisions for more in sets]


def rewards(registry: Registry) -> list[str]:
    """What may judge."""
    return [entry.name for entry in registry.entries("reward") if entry.name not in ELSEWHERE]


def told(registry: Registry, reward: str, judges: Mapping[str, str]) -> Recipe:
    """What a run is told of its reward.

    Args:
        judges: role -> the model that a reward asks.
    """
    entry = registry.find("reward", reward)
    assert isinstance(entry, Entry)
    roles = () if callable(entry.roles) else entry.roles
    return Recipe(
        picks={"reward": (Pick(reward, options=OPTIONS.get(reward, {})),)},
        roles={role.name: RoleRecipe(model=judges[role.name]) for role in roles},
    )


def lends(mem: Sequence[str]) -> bool:
    """Whether a judge is adapters on the policy's base, as it must be to share that."""
    return "shared-base" in mem


def legal(registry: Registry) -> list[Combination]:
    """Every legal combination of algorithms, engines, memory strategies, rewards, backends and optimisers. Of
    algorithms alike, and of rewards alike, the first is judged for all."""
    machine, kinds = facts.machine(), classes(registry)
    entries = [entry for entry in registry.entries("algo") if isinstance(entry, AlgorithmEntry)]
    sampled = {entry.name for entry in entries if "rollouts" in entry.requires and entry.rewards}
    engines = tuple(entry.name for entry in registry.entries("engine") if entry.name not in ELSEWHERE)

    def cells(judged: bool, mems: list[tuple[str, ...]], recipe: Recipe) -> Iterator[Cell]:
        algorithms = tuple(name for name in dict.fromkeys(kinds.values()) if (name in sampled) == judged)
        only = {"algo": algorithms, "engine": engines, "mem": tuple(",".join(mem) for mem in mems)}
        cells = table(registry, machine, Wanted(only=only, nproc=1, told=recipe)) if algorithms and mems else ()
        return (cell for cell in cells if cell.legal)

    found = [of_cell(cell) for cell in cells(False, memories(registry), Recipe())]
    with tempfile.TemporaryDirectory() as folder:
        whole, adapters = _judges(Path(folder))
        by_class: dict[object, list[Combination]] = {}
        for reward in rewards(registry):
            alike = _as_judged(registry, reward)
            if alike not in by_class:
                by_class[alike] = []
                for shared, model in ((False, whole), (True, adapters)):
                    mems = [mem for mem in memories(registry) if lends(mem) == shared]
                    recipe = told(registry, reward, {"reward": model, "prm": model})
                    by_class[alike] += [of_cell(cell, reward) for cell in cells(True, mems, recipe)]
            found += [attrs.evolve(c, reward=reward) for c in by_class[alike]]
    return [attrs.evolve(c, algo=algo) for c in found for algo in kinds if kinds[algo] == c.algo]


def _as_judged(registry: Registry, reward: str) -> object:
    """What composing looks at of a reward, but for its own options."""
    entry = registry.find("reward", reward)
    assert isinstance(entry, Entry)
    return entry.requires, entry.provides, entry.conflicts, entry.roles


def _judges(folder: Path) -> tuple[str, str]:
    """A reward model, and one that is adapters on the policy's base: as much of them as composing reads."""
    base = resource(STARTER)
    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    whole = {**config, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    adapters = {"base_model_name_or_path": base, "task_type": "SEQ_CLS"}
    for name, content in (("config.json", whole), ("adapter_config.json", adapters)):
        (folder / name.removesuffix(".json")).mkdir()
        (folder / name.removesuffix(".json") / name).write_text(json.dumps(content), encoding="utf-8")
    return str(folder / "config"), str(folder / "adapter_config")


def of_cell(cell: Cell, reward: str = "") -> Combination:
    return Combination(cell.algo, cell.engine, cell.mem, reward, cell.backend, cell.optim)


def values(combination: Combination, kinds: dict[str, str]) -> list[tuple[str, str]]:
    """(kind, value) of all that is combined; the algorithm's class stands for it."""
    c = combination
    found = [("algo", kinds[c.algo]), ("backend", c.backend), ("optim", c.optim), *(("mem", name) for name in c.mem)]
    return found + [(kind, name) for kind, name in (("engine", c.engine), ("reward", c.reward)) if name]


def covered(combination: Combination, kinds: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    """The values, pairs and triples that a combination is an example of."""
    have = values(combination, kinds)
    found = {frozenset(some) for count in (1, 2) for some in itertools.combinations(have, count)}
    if combination.engine:
        engine, backend = ("engine", combination.engine), ("backend", combination.backend)
        found |= {frozenset((engine, backend, ("mem", name))) for name in combination.mem}
    return found


def choose(combinations: Sequence[Combination], kinds: dict[str, str]) -> list[Combination]:
    """Greedily, that which adds most; of equals the first. Of algorithms alike each takes its turn, and has two."""
    shapes = [c for c in combinations if kinds[c.algo] == c.algo]
    shows = {c: covered(c, kinds) for c in shapes}
    missing = set().union(*shows.values()) if shows else set()
    turns = {first: itertools.cycle([algo for algo in kinds if kinds[algo] == first]) for first in kinds.values()}
    chosen: set[Combination] = set()
    while missing:
        best = max(shapes, key=lambda c: len(shows[c] & missing))
        chosen.add(attrs.evolve(best, algo=next(turns[best.algo])))
        missing -= shows[best]
    for algo in kinds:
        mine = [c for c in combinations if c.algo == algo and c not in chosen]
        lacking = max(2 - sum(c.algo == algo for c in chosen), 0)
        # from far apart in the list, so that they differ
        chosen |= {mine[i * (len(mine) - 1)] for i in range(min(lacking, len(mine)))}
    return sorted(chosen)


def first_of_each(chosen: Sequence[Combination]) -> Iterator[Combination]:
    """Of what is chosen, few that have every value: algorithms themselves, not their classes."""
    own = {c.algo: c.algo for c in chosen}
    missing = {value for c in chosen for value in values(c, own)}
    while missing:
        best = max(chosen, key=lambda c: (len(missing & set(values(c, own))), c.nproc == 1))
        missing -= set(values(best, own))
        yield best


def read() -> list[Combination]:
    """What chosen.txt lists."""
    lines = CHOSEN.read_text(encoding="utf-8").splitlines()
    return [parse(text) for text in lines if text and not text.startswith("#")]


def write(chosen: Iterable[Combination]) -> None:
    head = "# Written by `python tests/combinations/cover.py`: algo engine mem reward backend optim\n"
    CHOSEN.write_text(head + "".join(line(c) + "\n" for c in chosen), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", action="store_true", help="write nothing; say how many are legal and chosen")
    only_count = parser.parse_args().count
    registry = loaded()
    kinds, found = classes(registry), legal(registry)
    chosen = choose(found, kinds)
    if not only_count:
        write(chosen)
    few = list(first_of_each(chosen))
    print(
        f"{len(found)} legal combinations of {len(kinds)} algorithms in {len(set(kinds.values()))} classes; "
        f"{len(set().union(*(covered(c, kinds) for c in found)))} values, pairs and triples in {len(chosen)} chosen, "
        f"every value in {len(few)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
