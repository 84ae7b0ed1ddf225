"""Which of the legal combinations are run: few that between them have every value, every pair and every triple of
memory, backend and engine.

    python tests/combinations/cover.py            writes chosen.txt anew, for what is installed here
    python tests/combinations/cover.py --count    says how many are legal, and how many are chosen

What is legal is asked of the composer (`rlhf.legality_table`), so that the list and a run can't disagree. Algorithms
that the composer can't tell apart are one class: pairs are of classes, and every algorithm is in two combinations at
least.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs

from rlhf import facts
from rlhf.entries import AlgorithmEntry, MemoryEntry
from rlhf.legality_table import Cell, Wanted, _as_composed, table
from rlhf.registry import Registry, loaded

CHOSEN = Path(__file__).with_name("chosen.txt")
ELSEWHERE = {
    "openai": "takes an endpoint: tests/plugins/engines runs it",
    "vllm": "takes half a minute to start: tests/plugins/engines runs it with whole weights and adapters under single, "
    "zero3 and fsdp2, in one process and in two, and compares more than losses",
}
"""Engines that are combined in tests of their own."""


@attrs.frozen(order=True)
class Combination:
    """What a run is told; its name reads like `ppo-hf-fp32+lora-ddp-adamw`."""

    algo: str
    engine: str
    mem: tuple[str, ...]
    backend: str
    optim: str

    @property
    def name(self) -> str:
        return "-".join((self.algo, self.engine or "offline", "+".join(self.mem), self.backend, self.optim))

    @property
    def nproc(self) -> int:
        return 1 if self.backend == "single" else 2


def parse(text: str) -> Combination:
    """The combination that a line of chosen.txt tells, words separated by blanks."""
    algo, engine, mem, backend, optim = text.split()
    return Combination(algo, "" if engine == "offline" else engine, tuple(mem.split("+")), backend, optim)


def line(combination: Combination) -> str:
    c = combination
    return " ".join((c.algo, c.engine or "offline", "+".join(c.mem), c.backend, c.optim))


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


def legal(registry: Registry) -> list[Combination]:
    """Every legal combination of algorithms, engines, memory strategies, backends and optimisers."""
    wanted = Wanted(only={"mem": tuple(",".join(mem) for mem in memories(registry))}, nproc=1)
    cells = [cell for cell in table(registry, facts.machine(), wanted) if cell.legal and cell.engine not in ELSEWHERE]
    return [of_cell(cell) for cell in cells]


def of_cell(cell: Cell) -> Combination:
    return Combination(cell.algo, cell.engine, cell.mem, cell.backend, cell.optim)


def values(combination: Combination, kinds: dict[str, str]) -> list[tuple[str, str]]:
    """(kind, value) of all that is combined; the algorithm's class stands for it."""
    c = combination
    found = [("algo", kinds[c.algo]), ("backend", c.backend), ("optim", c.optim), *(("mem", name) for name in c.mem)]
    return found + ([("engine", c.engine)] if c.engine else [])


def covered(combination: Combination, kinds: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    """The values, pairs and triples that a combination is an example of."""
    have = values(combination, kinds)
    found = {frozenset(some) for count in (1, 2) for some in itertools.combinations(have, count)}
    if combination.engine:
        engine, backend = ("engine", combination.engine), ("backend", combination.backend)
        found |= {frozenset((engine, backend, ("mem", name))) for name in combination.mem}
    return found


def choose(combinations: Sequence[Combination], kinds: dict[str, str]) -> list[Combination]:
    """Greedily, that which adds most; of equals the first. Then each algorithm twice."""
    shows = {c: covered(c, kinds) for c in combinations}
    missing = set().union(*shows.values()) if shows else set()
    chosen: list[Combination] = []
    while missing:
        best = max(combinations, key=lambda c: len(shows[c] & missing))
        chosen.append(best)
        missing -= shows[best]
    for algo in kinds:
        mine = [c for c in combinations if c.algo == algo and c not in chosen]
        lacking = max(2 - sum(c.algo == algo for c in chosen), 0)
        # from far apart in the list, so that they differ
        chosen += [mine[i * (len(mine) - 1)] for i in range(min(lacking, len(mine)))]
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
    head = "# Written by `python tests/combinations/cover.py`: algo engine mem backend optim\n"
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
