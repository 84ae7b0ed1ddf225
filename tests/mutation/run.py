"""Plants errors one by one in a copy of the packages and shows which test catches each.

    python tests/mutation/run.py                    all of them: some minutes on two cores
    python tests/mutation/run.py --named            those of the table in named.py
    python tests/mutation/run.py --only 'gae'       those whose name or file holds the text (or matches the pattern)
    python tests/mutation/run.py --list             what would be planted

Exit codes: 0 every error was caught; 1 one survived, or the tests fail without any; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from fnmatch import fnmatch

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: workers share the cores
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import named
import systematic
from mutants import Mutant, TableError
from planting import Harness, Outcome, scratch


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    both = arguments.named == arguments.systematic
    found: list[Mutant] = []
    if arguments.named or both:
        found += named.mutants()
    if arguments.systematic or both:
        found += systematic.mutants()
    wanted: str | None = arguments.only
    if wanted is not None:
        texts = {id(m): f"{m.name} {m.file} {m.what}" for m in found}
        found = [m for m in found if wanted in texts[id(m)] or fnmatch(m.name, wanted)]
    return found


def line(outcome: Outcome, width: int) -> str:
    mark = "" if outcome.good else f"{outcome.verdict.upper()}  "
    return f"{outcome.mutant.name:<{width}}  {outcome.seconds:5.1f} s  {mark}{outcome.by or outcome.mutant.what}"


class Progress:
    """A line that is written over where there is a terminal, else one every so often."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.bad, self.started = total, 0, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self, outcome: Outcome) -> None:
        self.done += 1
        self.bad += not outcome.good
        if self.terminal or self.done % 50 == 0 or not outcome.good:
            left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
            text = f"{self.done} of {self.total}, {self.bad} not caught, about {left:.0f} s left"
            if not outcome.good:
                start = "\r" if self.terminal else ""
                print(f"{start}{outcome.verdict}: {outcome.mutant.name:<68}", file=sys.stderr)
            print(f"\r{text:<78}" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr)
            sys.stderr.flush()
        if self.done == self.total and self.terminal:
            print(file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="those whose name, file or text holds this, or match it")
    parser.add_argument("--named", action="store_true", help="the errors of the table only")
    parser.add_argument("--systematic", action="store_true", help="the errors made by rule only")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one in N of them, the first among them")
    parser.add_argument("--list", action="store_true", help="print what would be planted, and stop")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="at once; default: the cores")
    arguments = parser.parse_args()
    try:
        mutants = chosen(arguments)
    except TableError as error:
        print(f"the table of errors doesn't fit the source:\n{error}", file=sys.stderr)
        return 2
    if not mutants or min(arguments.workers, arguments.every) < 1:
        what = "--workers and --every must be 1 or more"
        what = what if mutants else f"--only {arguments.only!r} matches none; see --list"
        print(what, file=sys.stderr)
        return 2
    mutants = mutants[:: arguments.every]
    width = min(max(len(m.name) for m in mutants), 76)
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name:<{width}}  {mutant.what}")
        print(f"{len(mutants)} errors")
        return 0

    started = time.monotonic()
    outcomes: list[Outcome] = []
    with scratch() as folder:
        harness = Harness(folder, min(arguments.workers, len(mutants)))
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        print("the tests without any error ...", file=sys.stderr, flush=True)
        wrong = harness.baseline(tests)
        if wrong:
            print(f"the tests fail without any error planted: {wrong}", file=sys.stderr)
            return 1
        print(f"pass, {time.monotonic() - started:.0f} s; planting {len(mutants)} errors", file=sys.stderr, flush=True)
        progress = Progress(len(mutants))

        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.step(outcome)

        harness.run(mutants, done)

    place = {id(mutant): i for i, mutant in enumerate(mutants)}
    outcomes.sort(key=lambda outcome: place[id(outcome.mutant)])
    for outcome in outcomes:
        print(line(outcome, width))
    bad = [outcome for outcome in outcomes if not outcome.good]
    if bad:
        print("\nNot caught:")
        for outcome in bad:
            print(f"{line(outcome, width)}\n    {outcome.mutant.file}: {outcome.mutant.what}")
    for title, kind in (("named", True), ("by rule", False)):
        some = [o for o in outcomes if o.mutant.named == kind]
        counts = Counter(o.verdict for o in some)
        if some:
            parts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
            print(f"{title}: {len(some)} planted, {parts}")
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} caught in {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
