"""Sessions: `nox` runs lint, types and tests; the others by name."""

from __future__ import annotations

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
    """What takes minutes: the tutorial carried out as it is written."""
    session.install(*INSTALL)
    session.run("pytest", "-m", "matrix", *session.posargs)


@nox.session
def mutation(session: nox.Session) -> None:
    """Errors planted one by one, by name and by rule: the tests catch each. `-- --named` for a part, `-- --help`."""
    session.install(*INSTALL)
    session.run("python", "tests/mutation/run.py", *session.posargs)


@nox.session
def third_party(session: nox.Session) -> None:
    """Strangers' packages, really installed: good ones run by name, broken ones are reported and harm nobody."""
    session.install(*INSTALL)
    packages = "tests/third_party"
    for name in ("rlhf-scored", "rlhf-tempered", "broken/rlhf-broken", "broken/rlhf-squatter", "broken/rlhf-heavy"):
        session.install("--no-deps", f"{packages}/{name}")
    session.run("pytest", packages, env={"RLHF_THIRD_PARTY": "installed"})
