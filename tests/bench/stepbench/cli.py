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

from stepbench import environments, process, results, sides
from stepbench.cases import FULL, QUICK, TRL, TRL_PPO, Case, cases
from stepbench.rows import COLUMNS

HERE = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    names = ", ".join(case.name for case in cases(FULL))
    found = argparse.ArgumentParser(prog="bench", description="Times training steps against TRL, in turn.")
    add = found.add_argument
    add("--only", default="", metavar="A,B", help=f"these cases alone: {names}")
    add("--steps", type=int, metavar="N", help="timed steps of each case; left out, 2 to 5")
    add("--quick", action="store_true", help="a tiny model and short rows: checks the harness, says nothing of speed")
    add("--model", metavar="PATH", help="folder of a causal language model; left out, SmolLM2-135M-Instruct is made")
    add("--data", action="append", default=[], metavar="KIND=PATH",
        help=f"JSON lines of plain text for {', '.join(COLUMNS)}; left out, made from the seed")  # fmt: skip
    add("--trl-python", metavar="PATH", help=f"an interpreter with {TRL}; left out, one is made")
    add("--trl-ppo-python", metavar="PATH", help=f"an interpreter with {TRL_PPO}; left out, one is made")
    add("--threads", type=int, default=2, help="of both sides (2)")
    add("--checkpointing", action="store_true", help="gradient checkpointing on both sides; left out, on neither")
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
        ValueError: it isn't of that form.
    """
    found = {}
    for text in given:
        kind, sign, path = text.partition("=")
        if not sign or kind not in COLUMNS:
            raise ValueError(f"--data {text}: expected KIND=PATH with KIND one of {', '.join(COLUMNS)}")
        found[kind] = str(Path(path).resolve())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 where the request was wrong; 1 where a side failed or the two did different work."""
    given = parser().parse_args(arguments)
    try:
        wanted, data = chosen(given.only, given.steps, given.quick), data_files(given.data)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    work: Path = given.work.resolve()
    for folder in ("logs", "runs", "rows", "envs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    if not (given.quick or given.model):
        environments.model_package()
    pythons = {TRL: given.trl_python, TRL_PPO: given.trl_ppo_python}
    for requirement in sorted({case.requirement for case in wanted}):
        folder = work / "envs" / requirement.replace("==", "-")
        pythons[requirement] = pythons[requirement] or environments.interpreter(folder, requirement)
    env = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    prepared = _prepare(given, wanted, data, work, env)
    flops = prepared["peaks"]["flops"]
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in sorted(flops.items()))
    print(f"this machine: {products}; memory {prepared['peaks']['bandwidth'] / 1e9:.1f} GB/s", flush=True)
    done: list[results.Result] = []
    versions: dict[str, dict[str, str]] = {}
    failures: list[str] = []
    for case in wanted:
        job = sides.Job(
            case=case, models=prepared["models"], items=prepared["items"].get(case.name, ()), work=work,
            seed=given.seed, checkpointing=given.checkpointing, env=env,
        )  # fmt: skip
        try:
            ours, floor = sides.ours(job)
            trl, versions[case.requirement] = sides.trl(job, pythons[case.requirement])
            environments.check_versions(versions[case.requirement])
            result = results.Result(name=case.name, title=case.title, ours=ours, trl=trl, floor_seconds=tuple(floor))
            result.check()
        except (RuntimeError, ValueError) as error:
            failures.append(f"{case.name}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        done.append(result)
        print("  ".join(f"{name}: {cell}" for name, cell in zip(results.HEADER, results.cells(result), strict=True)),
              flush=True)  # fmt: skip
        _write(given, done, versions, prepared["peaks"], work)
    print("\n" + results.markdown(done))
    return 1 if failures else 0


def _prepare(given: Any, wanted: Sequence[Case], data: dict[str, str], work: Path, env: dict[str, str]) -> Any:
    """Folders of the models; rows lie in `work`."""
    spec_path, result = work / "prepare.json", work / "models.json"
    spec = {
        "work": str(work), "quick": given.quick, "model": given.model and str(Path(given.model).resolve()),
        "data": data, "seed": given.seed, "cases": {case.name: case.steps for case in wanted}, "result": str(result),
    }  # fmt: skip
    spec_path.write_text(json.dumps(spec), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(HERE), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "stepbench.prepare", str(spec_path)]
    process.run(command, {**env, "PYTHONPATH": path}, work / "logs" / "prepare.log")
    return json.loads(result.read_text(encoding="utf-8"))


def _write(
    given: Any, done: Sequence[results.Result], versions: dict[str, dict[str, str]], peaks: Any, work: Path
) -> None:
    output: Path = (given.output or work).resolve()
    output.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "platform": platform.platform()},
        "peaks": peaks,
        "threads": given.threads,
        "checkpointing": given.checkpointing,
        "model": given.model or ("tiny" if given.quick else "SmolLM2-135M-Instruct"),
        "versions": {"rlhf-kit": version("rlhf-kit"), **versions},
    }
    text = json.dumps(results.as_json(done, about), indent=1) + "\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    (output / "results.md").write_text(results.markdown(done), encoding="utf-8")


def _processor() -> str:
    """Its name where the system tells one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
