"""The contributed packages as their user meets them: listed with their distribution, their options in help, their
choice in a plan, and at work. They use the public interface alone.

By default their metadata is put on the path, which is what an installer would write. `nox -s contrib` really installs
them, with what they depend on, and says so by `RLHF_CONTRIB=installed`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contributed import CONTRIB, PACKAGES, ROOT, Package

STARTER = ROOT / "plugins" / "rlhf_plugins" / "starter" / "model"


OFFERS = {
    "rlhf-opmd": ("algo", "opmd"),
    "rlhf-muon": ("optim", "muon"),
    "rlhf-mlflow": ("track", "mlflow"),
    "rlhf-ifeval": ("reward", "ifeval"),
    "rlhf-freeze": ("mem", "freeze"),
}
"""Distribution -> what it offers."""


def has_mlflow() -> bool:
    return all(importlib.util.find_spec(name) for name in ("mlflow", "sqlalchemy", "alembic"))


with_mlflow = pytest.mark.skipif(not has_mlflow(), reason="MLflow isn't installed; `nox -s contrib` installs it")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables under which the packages are there."""
    quiet = {**os.environ, "COLUMNS": "200"}
    quiet.pop("MLFLOW_TRACKING_URI", None)
    if os.environ.get("RLHF_CONTRIB") == "installed":
        return quiet
    site = tmp_path_factory.mktemp("site")
    for package in PACKAGES:
        package.write_metadata(site)
    paths = [str(site), *(str(package.folder) for package in PACKAGES), os.environ.get("PYTHONPATH", "")]
    return {**quiet, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def rlhf(environment: dict[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf", *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and their instructions, some of which can't be carried out."""
    folder = tmp_path_factory.mktemp("desk")
    rows = [
        {
            "prompt": f"Question: What is {i} + 2?\nAnswer:",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"num_words": 2, "relation": "less than"}],
        }
        for i in range(24)
    ]
    rows += [{**rows[0], "instruction_id_list": ["punctuation:no_coma", "startend:quotation"]}]
    rows += [{"prompt": "Question: What is 1 + 1?\nAnswer:"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


ALL = ("--algo", "opmd", "--optim", "muon", "--reward", "ifeval", "--model", str(STARTER), "--data", "rows.jsonl")
"""All of them in one run, but for the tracker."""
SMALL = (
    "--algo.group-size",
    "2",
    "--batch-size",
    "8",
    "--eval-rows",
    "4",
    "--engine.max-new-tokens",
    "6",
    "--mem",
    "fp32",
)


# What they are


def test_every_package_is_tested_here_and_each_is_of_another_kind() -> None:
    assert {package.name for package in PACKAGES} == set(OFFERS)
    assert len({kind for kind, _ in OFFERS.values()}) == len(OFFERS) >= 4


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_is_made_as_the_docs_say(package: Package) -> None:
    assert package.folder.name == package.name
    assert package.project["license"] == "Apache-2.0"
    assert "rlhf-kit>=0.1,<0.2" in package.project["dependencies"]
    readme = (package.folder / package.project["readme"]).read_text(encoding="utf-8")
    _, name = OFFERS[package.name]
    assert f"pip install ./contrib/{package.name}\nrlhf run " in readme and f" {name}" in readme
    assert list((package.folder / "tests").glob("test_*.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_uses_the_public_interface_alone(package: Package) -> None:
    own = set(package.points.values())
    seen = set()
    for path in package.folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                seen.add(node.module or "")
            elif isinstance(node, ast.Import):
                seen |= {alias.name for alias in node.names}
    ours = {name for name in seen if name.partition(".")[0].startswith("rlhf") and name.partition(".")[0] not in own}
    assert "rlhf.api" in ours and ours <= {"rlhf.api", "rlhf.testing"}


def test_the_algorithm_is_a_file_of_80_lines() -> None:
    text = (CONTRIB / "rlhf-opmd" / "rlhf_opmd" / "algorithm.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80


# What a user sees


def test_the_listing_has_each_with_its_distribution(environment: dict[str, str], tmp_path: Path) -> None:
    done = rlhf(environment, "plugins", "--json", cwd=tmp_path)
    assert done.returncode == 0
    found = {offer["distribution"]: offer for offer in json.loads(done.stdout) if offer["distribution"] in OFFERS}
    for package in PACKAGES:
        offer = found[package.name]
        assert (offer["kind"], offer["name"], offer["version"]) == (*OFFERS[package.name], package.project["version"])
        if package.name == "rlhf-mlflow" and not has_mlflow():
            assert offer["status"] == "missing" and "pip install mlflow-skinny sqlalchemy alembic" in offer["reason"]
        else:
            assert offer["status"] == "ok", offer["reason"]
    assert "warning" not in done.stderr  # none is slow to import, or made for another interface


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--algo", "opmd"), "--algo.tau number"),
        (("--algo", "sft", "--optim", "muon"), "--optim.scale text"),
        (("--algo", "ppo", "--reward", "ifeval"), "--reward.ifeval.partial true/false"),
        (("--algo", "sft", "--mem", "freeze"), "--mem.freeze.layers int"),
        pytest.param(("--algo", "ppo", "--track", "mlflow"), "--track.mlflow.uri text", marks=with_mlflow),
    ],
)
def test_options_are_in_help(environment: dict[str, str], tmp_path: Path, words: tuple[str, ...], option: str) -> None:
    done = rlhf(environment, "run", *words, "--help", cwd=tmp_path)
    assert done.returncode == 0 and option.lower() in done.stdout.lower()


def test_a_plan_names_them_and_where_they_come_from(environment: dict[str, str], desk: Path) -> None:
    done = rlhf(environment, "plan", *ALL, "--json", cwd=desk)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    plan = plan.get("plan", plan)
    assert (plan["algo"]["name"], plan["algo"]["distribution"]) == ("opmd", "rlhf-opmd")
    assert (plan["optim"]["name"], plan["optim"]["distribution"]) == ("muon", "rlhf-muon")
    assert [(reward["name"], reward["distribution"]) for reward in plan["rewards"]] == [("ifeval", "rlhf-ifeval")]
    text = rlhf(environment, "plan", *ALL, cwd=desk).stdout
    assert "online policy mirror descent" in text and "muon" in text and "ifeval, weight 1" in text
    # 524,288 numbers in matrices of layers at 4 bytes, 43,008 others at 8: 2.33 MiB; AdamW would keep 4.33
    assert "2.33 MiB" in text


def documented() -> list[tuple[str, str]]:
    """(page, command) of what a reader pastes, in the docs' page of them and in their READMEs."""
    pages = [ROOT / "docs" / "how-to" / "contributed.md", *sorted(CONTRIB.glob("*/README.md"))]
    found = []
    for page in pages:
        blocks = re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line.startswith("rlhf run ")]
        lines += re.findall(r"`(rlhf (?:run|plan|plugins show) [^`]+)`", page.read_text(encoding="utf-8"))
        found += [(str(page.relative_to(ROOT)), line) for line in lines]
    return found


@pytest.mark.parametrize(("page", "command"), documented())
def test_a_documented_command_is_accepted(environment: dict[str, str], desk: Path, page: str, command: str) -> None:
    if "--track mlflow" in command and not has_mlflow():
        pytest.skip("MLflow isn't installed; `nox -s contrib` installs it")
    files = {"MODEL": str(STARTER), "prompts.jsonl": str(STARTER.parent / "data" / "prompts_train.jsonl")}
    files["instructions.jsonl"] = "rows.jsonl"
    words = [files.get(word, word) for word in command.split()[1:]]
    done = rlhf(environment, *(["plan", *words[1:]] if words[0] == "run" else words), cwd=desk)
    assert done.returncode == 0, f"{page}: {command}\n{done.stderr}"


def test_every_page_has_a_command() -> None:
    assert {page for page, _ in documented()} == {
        "docs/how-to/contributed.md",
        *(f"contrib/{name}/README.md" for name in OFFERS),
    }


@pytest.mark.parametrize("backend", ["fsdp2", "deepspeed"])
def test_muon_refuses_what_spreads_matrices(environment: dict[str, str], tmp_path: Path, backend: str) -> None:
    words = ("--algo", "sft", "--optim", "muon", "--backend", backend, "--nproc", "2", "--mem", "zero2")
    done = rlhf(environment, "plan", *(words if backend == "deepspeed" else words[:-2]), cwd=tmp_path)
    assert done.returncode == 2
    assert "--optim muon needs 'whole-gradients', which nothing provides" in done.stderr
    assert "--backend ddp" in done.stderr


# What they do


@pytest.mark.matrix
def test_they_run_together_and_rows_that_cannot_be_judged_are_told(environment: dict[str, str], desk: Path) -> None:
    words = (*ALL, *SMALL, "--max-steps", "2", "--output", "run", "--track", "none")
    done = rlhf(environment, "run", *words, cwd=desk)
    assert done.returncode == 0, done.stderr
    assert "2 refused" in done.stderr
    assert (
        "1 x reward 'ifeval': there is no instruction 'punctuation:no_coma'; did you mean 'punctuation:no_comma'?"
        in done.stderr
    )
    assert "1 x no column 'instruction_id_list', which reward 'ifeval' needs" in done.stderr
    lines = [json.loads(line) for line in (desk / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0.0 <= line["reward/mean"] <= 1.0 and "policy/log_ratio" in line for line in lines)
    environment_of_run = json.loads((desk / "run" / "environment.json").read_text(encoding="utf-8"))
    assert "rlhf-opmd" in json.dumps(environment_of_run)


@with_mlflow
@pytest.mark.matrix
def test_a_run_is_in_mlflow_and_one_without_its_server_goes_on(environment: dict[str, str], desk: Path) -> None:
    words = (*ALL, *SMALL, "--max-steps", "2", "--track", "mlflow")
    done = rlhf(environment, "run", *words, "--output", "tracked/run", cwd=desk)
    assert done.returncode == 0 and "tracker" not in done.stderr, done.stderr
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{desk / 'tracked' / 'mlflow.db'}")
    run = client.get_run(json.loads((desk / "tracked" / "run" / "mlflow.json").read_text())["run_id"])
    assert run.info.status == "FINISHED" and run.data.params["algo"] == "opmd" and run.data.params["optim"] == "muon"
    rewards = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward/mean"))
    lines = [json.loads(line) for line in (desk / "tracked" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rewards == [(line["step"], pytest.approx(line["reward/mean"], abs=1e-12)) for line in lines]
    nowhere = ("--track.mlflow.uri", "http://127.0.0.1:9", "--track.mlflow.retries", "0", "--output", "untracked")
    done = rlhf(environment, "run", *words, *nowhere, cwd=desk)
    assert done.returncode == 0
    assert done.stderr.count("tracker MLflow failed at run_started and is dropped: MlflowException") == 1
    assert json.loads((desk / "untracked" / "summary.json").read_text())["steps"] == 2


@pytest.mark.matrix_full
def test_a_run_with_muon_resumes_to_the_bit(environment: dict[str, str], desk: Path) -> None:
    words = (*ALL, *SMALL, "--track", "none", "--save-every", "2", "--keep", "4")
    done = rlhf(environment, "run", *words, "--max-steps", "4", "--output", "whole", cwd=desk)
    assert done.returncode == 0, done.stderr
    shutil.copytree(desk / "whole", desk / "cut")
    shutil.rmtree(desk / "cut" / "checkpoints" / "step-000004")
    shutil.rmtree(desk / "cut" / "model")
    (desk / "cut" / "summary.json").unlink()
    done = rlhf(environment, "run", "--resume", "--output", "cut", cwd=desk)
    assert done.returncode == 0, done.stderr
    whole, cut = ((desk / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.matrix_full
def test_opmd_learns_on_the_embedded_task(environment: dict[str, str], tmp_path: Path) -> None:
    """A short run: 12 steps of 32 prompts; the whole example goes from .38 to .95."""
    words = ("--algo", "opmd", "--max-steps", "12", "--batch-size", "32", "--optim.learning-rate", "1e-3")
    done = rlhf(environment, "run", *words, "--track", "none", "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["heldout_after"]["reward/mean"] > summary["heldout_before"]["reward/mean"] + 0.1
