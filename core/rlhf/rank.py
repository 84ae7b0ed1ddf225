"""One rank of a run, from the plan to the last step: in the process the user started, or, as `python -m rlhf.rank
JOB.json`, in one that a launcher started. Rank 0 alone prints, writes files and speaks to trackers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from rlhf import signals
from rlhf.errors import Interrupted, Problem, RankLost, RequestError, RunError
from rlhf.place import Place, here
from rlhf.plan import Plan, plan_from_json

Say = Callable[[str], None]
REPORT = "RLHF_REPORT"
"""Environment variable: the file that a rank writes what ended it badly to."""
PARENT_PIPE = "RLHF_PARENT_PIPE"
"""Environment variable: a file descriptor that is closed when the launcher ends."""
_MEETING_SECONDS = 600.0
"""That ranks may start after one another."""


@attrs.frozen
class Job:
    """What every rank is to carry out."""

    plan: Plan
    output: Path
    resume: bool

    def write(self, path: Path) -> None:
        content = {"plan": self.plan.to_json(), "output": str(self.output), "resume": self.resume}
        path.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        from rlhf.registry import loaded

        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(plan_from_json(content["plan"], loaded()), Path(content["output"]), content["resume"])


@attrs.frozen
class Report:
    """What ended a rank badly, as it is handed from one process to another."""

    code: int
    problems: list[dict[str, str]] = attrs.Factory(list)
    """Of a wrong request."""
    message: str = ""
    lost: bool = False
    """It ended for another rank's sake, which knows more."""

    @classmethod
    def of(cls, error: BaseException) -> Report:
        if isinstance(error, RequestError):
            return cls(2, [attrs.asdict(problem) for problem in error.problems])
        if isinstance(error, RunError):
            return cls(1, message=str(error), lost=isinstance(error, RankLost))
        if isinstance(error, Interrupted):
            return cls(130, message=str(error))
        return cls(1, message=trace(error))

    def error(self, rank: int) -> BaseException:
        """The exception again. Of a wrong request or an interruption all ranks say the same; else the rank is named."""
        if self.problems:
            return RequestError([Problem(**problem) for problem in self.problems])
        if self.code == 130:
            return Interrupted(self.message)
        return RunError(f"rank {rank}: {self.message}")


def trace(error: BaseException) -> str:
    """A fault's trace as Python prints it. Where a plugin's code is on the way, it begins there, and says how much of
    what led to it is left out; RLHF_TRACEBACK=full leaves out nothing."""
    from rlhf.registry import packages

    found = traceback.TracebackException.from_exception(error)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_rank = max((i for i, name in enumerate(modules) if name in (__name__, "__main__")), default=len(modules))
    plugins = set(packages())
    first = next((i for i in range(of_rank, len(modules)) if modules[i].partition(".")[0] in plugins), 0)
    left_out = ""
    if first and os.environ.get("RLHF_TRACEBACK") != "full":
        del found.stack[:first]
        left_out = f"\n({first} calls that led to it are left out; RLHF_TRACEBACK=full shows them)"
    return "".join(found.format()).rstrip() + left_out


def carry_out(job: Job, say: Say) -> int:
    """Carry out this process's rank. Returns 0; failures are raised."""
    place = here()
    verdict = agreed(place, lambda: look(job))
    if verdict.get("problems"):
        raise RequestError([Problem(**problem) for problem in verdict["problems"]])
    if verdict.get("done") is not None:
        if place.rank == 0:
            say(f"{verdict['output']}: already finished after {verdict['done']} steps; nothing to do")
        return 0
    job = attrs.evolve(job, output=Path(verdict["output"]))
    return _run(job, place, say if place.rank == 0 else _nothing)


def look(job: Job) -> dict[str, Any]:
    """What the run directory says to the job, before anything is loaded: "problems", how many steps are "done", the
    "output"."""
    from rlhf.rundir import RunDirectory

    directory = RunDirectory(job.output)
    try:
        directory.check(job.plan, job.resume)
        before = directory.summary() if job.resume else None
        finished = before and before.get("status") == "done" and _as_long(directory.recipe(), job.plan)
    except RequestError as error:
        return {"problems": [attrs.asdict(problem) for problem in error.problems]}
    return {"output": str(job.output), "done": before["steps"] if before and finished else None}


def agreed(place: Place, verdict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Rank 0's verdict, for every rank: the others might find what it has written since."""
    if place.size == 1:
        return verdict()
    from rlhf.world import rendezvous

    store = rendezvous(place, _MEETING_SECONDS)
    if place.rank == 0:
        found = verdict()
        store.set("verdict", json.dumps(found))
    else:
        found = json.loads(store.get("verdict"))
    # The store may live in rank 0: it waits until all have read, so that it can end at once.
    store.set(f"read/{place.rank}", "1")
    store.wait([f"read/{rank}" for rank in range(place.size)])
    return found


def _run(job: Job, place: Place, say: Say) -> int:
    from rlhf.assemble import assemble
    from rlhf.loop import Loop, resume_from
    from rlhf.parts import check_data
    from rlhf.rundir import Onlooker, RunDirectory

    directory = RunDirectory(job.output) if place.rank == 0 else Onlooker(job.output)
    with contextlib.ExitStack() as held:
        parts = assemble(job.plan, say)
        held.callback(parts.close)
        directory.lock()
        held.callback(directory.close)
        if not job.resume:
            directory.check(job.plan, False)  # again: while this one loaded another may have come and gone
        world = parts.backend.world
        digests = world.gather(parts.digest)  # and the directory is there, or rank 0 has said why not
        if digests[place.rank] != digests[0]:
            raise RunError("read other data than rank 0: the same path must hold the same rows on every machine")
        found = resume_from(directory, say) if job.resume else None
        if found:
            check_data(parts, found[1])
        directory.open(job.plan)
        if job.resume:
            fresh = f"{directory.shown} holds no checkpoint yet: starting from 0"
            world.barrier()  # all have looked before anything is cut
            directory.cut_back(found[1]["loop"]["step"] if found else 0)
            say(f"resuming from {directory.shown / found[0].relative_to(directory.path)}" if found else fresh)
        Loop(parts, directory, say).run(found[1] if found else None)
    return 0


def _as_long(stored: Mapping[str, Any], plan: Plan) -> bool:
    """The plan goes on no longer than the run that was made of the stored recipe."""
    return (stored.get("max_steps"), stored.get("epochs")) == (plan.run.max_steps, plan.run.epochs)


def _nothing(text: str) -> None:
    """What ranks other than 0 say."""


def _end_with_parent() -> None:
    """A rank whose launcher is gone, however it went, must not go on alone: it holds the other end of a pipe."""
    descriptor = os.environ.pop(PARENT_PIPE, None)
    if descriptor is None:
        return

    def watch(number: int) -> None:
        os.read(number, 1)  # nobody ever writes: it returns when the other end is closed
        os._exit(1)

    threading.Thread(target=watch, args=(int(descriptor),), daemon=True).start()


def main(arguments: list[str]) -> int:
    """What a launcher starts: the exit code, and a report where it isn't 0."""
    from rlhf.cli import say
    from rlhf.cli.resume import what_stands
    from rlhf.cli.run import settle

    settle()
    _end_with_parent()
    output, home = None, Path.cwd()
    try:
        with signals.raised():
            job = Job.read(Path(arguments[0]))
            output = job.output
            return carry_out(job, say)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        report = Report(130, message=what_stands(output, home)) if stopped else Report.of(error)
        if path := os.environ.get(REPORT):
            partial = Path(path + ".part")
            partial.write_text(json.dumps(attrs.asdict(report)), encoding="utf-8")
            partial.rename(path)
        else:
            print(report.message or error, file=sys.stderr)
        return report.code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without waiting for anything: threads of a transport whose other end is gone might never end.
    os._exit(code)
