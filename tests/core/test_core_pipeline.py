"""Pipelines: what is checked before the first stage, and a real one that is interrupted and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import cli
from rlhf.cli.pipeline import _set
from rlhf.errors import Interrupted, RequestError, RunError
from rlhf.pipeline import _run, check, stages_of
from rlhf.recipe import from_mapping
from rlhf.registry import Registry


def refused(content: Any) -> list[str]:
    with pytest.raises(RequestError) as caught:
        stages_of(content, "p.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_common_keys_hold_for_every_stage_that_does_not_say_otherwise() -> None:
    content = {"seed": 3, "model": "base", "stages": {"sft": {"algo": "sft"}, "dpo": {"algo": "dpo", "model": "@sft"}}}
    first, second = stages_of(content, "p.yaml")
    assert (first.name, first.recipe) == ("sft", {"seed": 3, "model": "base", "algo": "sft"})
    assert (second.name, second.recipe) == ("dpo", {"seed": 3, "model": "@sft", "algo": "dpo"})


def test_a_stages_own_key_goes_before_the_common_one_however_it_is_spelt() -> None:
    content = {"eval_data": "all.jsonl", "seed": 3, "stages": {"sft": {"algo": "sft", "eval-data": "own.jsonl"}}}
    (stage,) = stages_of(content, "p.yaml")
    assert stage.recipe == {"seed": 3, "algo": "sft", "eval-data": "own.jsonl"}
    assert from_mapping(stage.recipe, "p.yaml").eval_data == ("own.jsonl",)


def test_a_common_key_in_both_spellings_is_refused() -> None:
    (said,) = refused({"batch_size": 4, "batch-size": 8, "stages": {"sft": {"algo": "sft"}}})
    assert said.startswith("p.yaml: batch_size and batch-size are one key, given twice")


def test_a_setting_takes_the_place_of_the_key_however_it_is_spelt() -> None:
    content = {"stages": {"sft": {"algo": "sft", "batch_size": 4}}}
    _set(content, "sft.batch-size=8")
    assert content == {"stages": {"sft": {"algo": "sft", "batch_size": 8}}}
    with pytest.raises(RequestError, match=r"--set sft\.data=: must read PATH=VALUE"):
        _set(content, "sft.data=")


@pytest.mark.parametrize("stages", [None, {}, [], "sft"])
def test_a_pipeline_has_stages(stages: Any) -> None:
    (said,) = refused({"stages": stages} if stages is not None else {"algo": "sft"})
    assert "p.yaml: holds no stages" in said and "stages: {sft:" in said


def test_references_must_be_of_stages_before_and_all_wrong_ones_are_named() -> None:
    said = refused(
        {
            "stages": {
                "sft": {"algo": "sft", "model": "@dpo"},  # forward
                "reward": {"algo": "reward", "model": "@stf"},  # a slip
                "dpo": "dpo",
                "ppo": {"algo": "ppo", "roles": {"reward": {"model": "@rewards"}}, "data": ["a", "@ppo"]},  # nested
            }
        }
    )
    assert said == [
        "p.yaml: stage sft: no stage 'dpo' comes before it\n    stages before it: none",
        "p.yaml: stage reward: no stage 'stf' comes before it\n    did you mean @sft?",
        "p.yaml: stage dpo: must be a recipe, not 'dpo'",
        "p.yaml: stage ppo: no stage 'rewards' comes before it\n    did you mean @reward?",
        "p.yaml: stage ppo: no stage 'ppo' comes before it\n    stages before it: sft, reward",
    ]


@pytest.mark.parametrize("name", ["recipes", "a/b", "..", "", "-x", "a b"])
def test_a_stages_name_is_that_of_a_folder_of_its_own(name: str) -> None:
    (said,) = refused({"stages": {name: {"algo": "sft"}}})
    assert f"stage {name!r}: is no name for a stage" in said


def test_every_problem_of_every_stage_is_found_before_anything_runs(installed: Registry) -> None:
    content = {
        "stages": {
            "sft": {"algo": "stf"},
            "dpo": {"algo": {"name": "dpo", "beta": -1, "bta": 2}},
            "reward": {"algo": "reward"},
            "ppo": {"algo": "ppo", "model": "@reward", "batch": 3},
        }
    }
    with pytest.raises(RequestError) as caught:
        check(stages_of(content, "p.yaml"), "p.yaml", installed)
    said = [str(problem) for problem in caught.value.problems]
    for stage, word in (("sft", "stf"), ("dpo", "beta"), ("dpo", "bta"), ("ppo", "'batch'")):
        assert any(text.startswith(f"stage {stage}: ") and word in text for text in said), (stage, word, said)
    assert not any(text.startswith("stage reward: ") for text in said)


def test_a_stages_output_stands_for_the_model_it_starts_from(installed: Registry, tiny_model: Path) -> None:
    content = {
        "model": str(tiny_model),
        "batch_size": 4,
        "max_steps": 1,
        "stages": {"sft": {"algo": "sft"}, "dpo": {"algo": "dpo", "model": "@sft"}},
    }
    check(stages_of(content, "p.yaml"), "p.yaml", installed)


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (130, Interrupted, "stage dpo was interrupted; to go on, type the same pipeline line with --resume"),
        (2, RequestError, "stage dpo was refused"),
        (1, RunError, "stage dpo failed with exit code 1"),
        (-9, RunError, "stage dpo failed with exit code -9"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_is_asked_once_to_stop_and_its_end_is_told(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int, error: type[Exception], says: str
) -> None:
    sent: list[int] = []

    class Stage:
        def __init__(self, command: list[str]) -> None:
            assert command[1:] == ["-m", "rlhf", "run", "recipe.yaml"]

        def send_signal(self, number: int) -> None:
            sent.append(number)

        def wait(self) -> int:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            return code

    monkeypatch.setattr("rlhf.pipeline.subprocess.Popen", Stage)
    before = signal.getsignal(number)
    with pytest.raises(error, match=says):
        _run("dpo", ["recipe.yaml"])
    # Never SIGINT: a terminal's Ctrl-C reaches the stage too, and a second one would end it without a checkpoint.
    assert sent == [signal.SIGTERM]
    assert signal.getsignal(number) is before


def rlhf(*words: str) -> int:
    """The exit code of a command line, carried out in this process."""
    with pytest.raises(SystemExit) as done:
        cli.main(list(words))
    return int(done.value.code or 0)


def test_a_pipeline_is_interrupted_goes_on_and_redoes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "two.yaml", tmp_path / "out"
    common: dict[str, Any] = {"batch_size": 4, "eval_rows": 4, "mem": "fp32"}
    # the second stage is long, until it is interrupted
    stages = {"sft": {"algo": "sft", "max_steps": 2}, "dpo": {"algo": "dpo", "model": "@sft", "max_steps": 100_000}}
    recipe.write_text(yaml.safe_dump({**common, "stages": stages}, sort_keys=False))
    words = ("pipeline", str(recipe), "--output", str(out))

    # A session of its own, so that Ctrl-C, which goes to the pipeline and its stage alike, doesn't reach the tests.
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = out / "dpo" / "metrics.jsonl"
    lines: list[str] = []
    assert process.stderr is not None
    listening = threading.Thread(target=lambda: lines.extend(process.stderr or ()))  # so that its pipe is never full
    listening.start()
    try:
        # However busy the machine is, it gets there: it is waited for as long as it lives.
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait()
        listening.join()
        said = "".join(lines)
        assert code == 130, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (
        "checkpoint saved" in said
        and "stage dpo was interrupted; to go on, type the same pipeline line with --resume" in said
    )
    first = json.loads((out / "sft" / "summary.json").read_text())
    assert (first["status"], first["steps"]) == ("done", 2)
    stopped = json.loads((out / "dpo" / "summary.json").read_text())
    assert stopped["status"] == "interrupted" and stopped["steps"] >= 1

    # How long a resumed stage goes on may change; that makes it another pipeline, unless its kept copy says so too.
    stages["dpo"]["max_steps"] = stopped["steps"] + 1
    recipe.write_text(yaml.safe_dump({**common, "stages": stages}, sort_keys=False))
    assert rlhf(*words) == 2 and "holds another pipeline" in capfd.readouterr().err
    kept = yaml.safe_load((out / "pipeline.yaml").read_text())
    kept["stages"]["dpo"]["max_steps"] = stopped["steps"] + 1
    (out / "pipeline.yaml").write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))

    before = (out / "sft" / "summary.json").stat().st_mtime_ns
    assert rlhf(*words, "--resume") == 0
    told = capfd.readouterr()
    assert "stage 1/2 sft: done before, not redone" in told.err and "resuming from" in told.err
    lines = told.out.splitlines()
    assert lines[-2].startswith("sft: done, 2 steps") and lines[-1].startswith(
        f"dpo: done, {stopped['steps'] + 1} steps"
    )
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, stopped["steps"] + 2))
    plan = json.loads((out / "dpo" / "plan.json").read_text())
    assert {role["model"]["path"] for role in plan["roles"]} == {str(out / "sft" / "model")}

    assert rlhf(*words) == 0 and capfd.readouterr().err.count("done before, not redone") == 2
    assert (out / "sft" / "summary.json").stat().st_mtime_ns == before
    results = json.loads((out / "pipeline.json").read_text())
    assert [(r["stage"], r["status"]) for r in results] == [("sft", "done"), ("dpo", "done")]
