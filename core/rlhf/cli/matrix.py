"""`rlhf matrix`: which combinations are legal, and why the rest are not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import click

from rlhf import facts
from rlhf.cli import Command
from rlhf.cli.plan import warned
from rlhf.errors import RequestError
from rlhf.legality_table import AXES, Cell, Wanted, table, unknown
from rlhf.place import here
from rlhf.registry import Registry


@click.command(cls=Command)
@click.option("--algo", metavar="NAME", multiple=True, help="only this algorithm; may be repeated, as all of these")
@click.option("--engine", metavar="NAME", multiple=True, help="only this rollout engine")
@click.option("--mem", metavar="NAME,...", multiple=True, help="only these memory strategies, together")
@click.option("--optim", metavar="NAME", multiple=True, help="only this optimiser")
@click.option("--backend", metavar="NAME", multiple=True, help="only this parallel backend")
@click.option("--kind", type=click.Choice(AXES), multiple=True, help="vary only this kind; of the others, what a run "
              "takes unasked")  # fmt: skip
@click.option("--together", type=click.IntRange(0), default=1, show_default=True, metavar="INT",
              help="memory strategies at once, at most; 2 takes a minute where much is installed")  # fmt: skip
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, metavar="INT",
              help="processes; what isn't legal with so many is tried with 2")  # fmt: skip
@click.option("--legal/--illegal", default=None, help="only what is legal, or only what isn't")
@click.option("--json", "as_json", is_flag=True, help="print a list of objects")
def matrix(
    algo: tuple[str, ...], engine: tuple[str, ...], mem: tuple[str, ...], optim: tuple[str, ...],
    backend: tuple[str, ...], kind: tuple[str, ...], together: int, nproc: int, legal: bool | None, as_json: bool,
) -> int:  # fmt: skip
    """Tell which combinations of algorithm, engine, memory strategies, optimiser and backend are legal, and why the
    rest are not.

    Each is composed as a run would be, on this machine and with the built-in example's model, so that the table can't
    say anything else than `rlhf run`. What a model's sizes or a role's own choices change, `rlhf plan` tells.
    """
    registry = warned()
    only = {"algo": algo, "engine": engine, "mem": mem, "optim": optim, "backend": backend}
    for axis in AXES if kind else ():
        if axis not in kind and not only[axis] and axis != "algo":
            only[axis] = ("",) if axis == "mem" else _first(registry, axis)
    wanted = Wanted(only={axis: names for axis, names in only.items() if names}, together=together, nproc=nproc)
    problems = unknown(registry, wanted)
    if problems:
        raise RequestError(problems)
    cells = [cell for cell in table(registry, facts.machine(here().size), wanted) if legal in (None, cell.legal)]
    if as_json:
        click.echo(json.dumps([cell.to_json() for cell in cells], indent=1))
    else:
        click.echo("\n".join(_text(cells)))
    return 0


def _first(registry: Registry, kind: str) -> tuple[str, ...]:
    return tuple(entry.name for entry in registry.entries(kind)[:1])


def _text(cells: Sequence[Cell]) -> Iterator[str]:
    """A grid for each algorithm and engine: memory strategies down, optimiser and backend across."""
    reasons: dict[str, int] = {}
    for head in dict.fromkeys((cell.algo, cell.engine) for cell in cells):
        mine = [cell for cell in cells if (cell.algo, cell.engine) == head]
        columns = list(dict.fromkeys((cell.backend, cell.optim) for cell in mine))
        rows = list(dict.fromkeys(cell.mem for cell in mine))
        by_place = {(cell.mem, cell.backend, cell.optim): cell for cell in mine}
        titles = [f"{backend} {optim}" for backend, optim in columns]
        table = [[", ".join(mem) or "(none named)", *(_mark(by_place.get((mem, *at)), reasons) for at in columns)]
                 for mem in rows]  # fmt: skip
        widths = [max(len(row[i]) for row in [["", *titles], *table]) for i in range(len(titles) + 1)]
        yield f"{head[0]}{f', engine {head[1]}' if head[1] else ''}"
        for row in [["", *titles], *table]:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield ""
    yield f"{sum(cell.legal for cell in cells)} of {len(cells)} combinations are legal"
    if reasons:
        yield "why the others are not:"
    for reason, number in reasons.items():
        yield f"  {number:>3}  {reason}"


def _mark(cell: Cell | None, reasons: dict[str, int]) -> str:
    """yes, yes with so many processes, or the numbers of the reasons."""
    if cell is None:
        return ""
    if cell.legal:
        return "yes" if cell.nproc == 1 else f"yes, --nproc {cell.nproc}"
    return " ".join(str(reasons.setdefault(reason, len(reasons) + 1)) for reason in cell.reasons)
