"""What `--reward code` offers, and when it fits a plan."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlhf.api import Plan, PlannedComponent, Problem, RewardEntry, option


@attrs.frozen(kw_only=True)
class CodeConfig:
    weight: float = option(1.0, help="factor of this source in the sum of rewards; may be negative")
    tests_column: str = option(
        "tests", help="column of the data that holds the tests: inputs with outputs, or Python with asserts"
    )
    extract: str = option(
        "auto",
        help="where a response's program is: its last fenced block; auto: where there is no block at all, all of it",
        choices=("auto", "fenced"),
    )
    score: str = option(
        "fraction",
        help="the share of tests that pass, or 1 where all do, else 0",
        choices=("fraction", "all"),
    )
    max_tests: int | None = option(None, help="run a row's first so many tests; none for all", ge=1)
    seconds: int = option(5, help="of a processor, for one test", unit="seconds", ge=1)
    wall_seconds: float = option(15.0, help="of the clock, for one test", unit="seconds", gt=0)
    memory: int = option(512, help="address space of a program", unit="MiB", ge=64)
    disk: int = option(16, help="of one file that a program writes", unit="MiB", ge=1)
    processes: int = option(16, help="that a program may have beside itself; threads count", ge=0)
    files: int = option(64, help="that a program may have open", ge=16)
    output: int = option(1024, help="that a program may print", unit="KiB", ge=1)
    workers: int = option(2, help="programs at once, of each rank", ge=1)
    python: str | None = option(
        None, help="interpreter for programs; left out, the run's, without what is installed in it"
    )
    isolation: str = option(
        "auto",
        help="programs have no network and see no files but Python's: where the system permits it, or required",
        choices=("auto", "required"),
    )


def _isolation(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    if component.config.isolation != "required":
        return
    from rlhf_plugins.rewards.code.sandbox import isolation

    try:
        isolated, why = isolation(component.config.python)
    except OSError as error:
        isolated, why = False, str(error)
    if not isolated:
        flag = f"--reward.{component.key}.isolation required"
        yield Problem(f"{flag}: this machine doesn't permit it: {why}", "permit user namespaces, or leave it out")


def _notes(plan: Plan, component: PlannedComponent) -> Iterator[str]:
    from rlhf_plugins.rewards.code.sandbox import isolation

    config = component.config
    what = f"{config.seconds} s of a processor, {config.memory} MiB and {config.processes} processes a test"
    try:
        isolated, why = isolation(config.python)
    except OSError as error:
        yield f"--reward {component.key}: programs can't be run here: {error}"
        return
    if isolated:
        kept = "they have no network, and see no files but Python's and the system's"
    else:
        kept = f"NOT isolated ({why}): they have this machine's network and may read what you may"
    yield f"--reward {component.key}: programs of responses are run with limits, {what}; {kept}"


CODE = RewardEntry(
    name="code",
    summary="runs the response's program against the row's tests, with limits",
    config=CodeConfig,
    impl="rlhf_plugins.rewards.code.reward:Code",
    columns=lambda config: (config.tests_column,),
    constraints=(_isolation,),
    notes=(_notes,),
)
