"""The run directory: whose folder it is, what a resumed run may change, and how logs are cut back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml

from rlhf import facts
from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.plan import Plan, plain
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.rundir import RunDirectory, default_path


def plan_of(**recipe: Any) -> Plan:
    content = {"algo": "sft", "max_steps": 2, "batch_size": 4, **recipe}
    return compose(from_mapping(content, "test"), loaded(), facts.machine())


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of()


def refused(directory: RunDirectory, plan: Plan, resume: bool = False) -> str:
    with pytest.raises(RequestError) as caught:
        directory.check(plan, resume)
    return str(caught.value)


def test_a_run_starts_in_no_folder_or_an_empty_one(tmp_path: Path, plan: Plan) -> None:
    RunDirectory(tmp_path / "new").check(plan, resume=False)
    RunDirectory(tmp_path).check(plan, resume=False)
    assert list(tmp_path.iterdir()) == []  # a check leaves nothing behind


def test_a_folder_of_something_else_is_refused(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "holds something that is no run" in refused(RunDirectory(tmp_path), plan)
    assert "holds something that is no run" in refused(RunDirectory(tmp_path), plan, resume=True)
    assert "is a file" in refused(RunDirectory(tmp_path / "thesis.tex"), plan)
    assert "cannot be written: Not a directory" in refused(RunDirectory(tmp_path / "thesis.tex" / "run"), plan)
    assert "cannot be written: File name too long" in refused(RunDirectory(tmp_path / ("x" * 300)), plan)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert "is a link to nothing" in refused(RunDirectory(tmp_path / "link"), plan)


def begin(directory: RunDirectory, plan: Plan) -> None:
    """As a run leaves it that has saved a checkpoint."""
    directory.open(plan)
    (directory.checkpoints / "step-000001").mkdir(parents=True)
    (directory.checkpoints / "step-000001" / "manifest.json").write_text("{}")


def test_a_run_that_ended_before_its_first_checkpoint_may_be_begun_again(tmp_path: Path, plan: Plan) -> None:
    RunDirectory(tmp_path).open(plan)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)  # torn: it has no manifest
    text = refused(RunDirectory(tmp_path), plan)
    assert "holds a run that ended before its first checkpoint" in text
    assert "add --resume to begin it again, with the same options or with others; or give another folder" in text
    RunDirectory(tmp_path).check(plan, resume=True)
    RunDirectory(tmp_path).check(plan_of(algo="dpo", seed=4), resume=True)
    (tmp_path / "model").mkdir()  # done, and its checkpoints were taken away
    assert "seed: 0 there, 4 now" in refused(RunDirectory(tmp_path), plan_of(seed=4), resume=True)


def test_a_folder_of_a_run_needs_resume(tmp_path: Path, plan: Plan) -> None:
    begin(RunDirectory(tmp_path), plan)
    assert "add --resume" in refused(RunDirectory(tmp_path), plan)
    RunDirectory(tmp_path).check(plan, resume=True)


def test_a_run_killed_before_its_plan_was_written_can_still_be_started(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunDirectory(tmp_path / "whole")
    whole.open(plan)
    order: list[str] = []
    monkeypatch.setattr("rlhf.rundir.write_atomic", lambda path, text: order.append(path.name))
    RunDirectory(tmp_path / "order").open(plan)
    assert order[-1] == "plan.json"
    for written in range(len(order)):  # killed while writing the next one
        killed = tmp_path / f"killed-{written}"
        killed.mkdir()
        for name in (".lock", *order[:written], order[written] + ".part"):
            (killed / name).write_text("x")
        for resume in (False, True):
            RunDirectory(killed).check(plan, resume)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 5}, "batch_size: 4 there, 5 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"algo": {"name": "sft", "packing": True}}, "holds another run: algo.packing: false there, true now\n"),
        ({"optim": {"learning_rate": 0.5}}, "holds another run: optim.learning_rate: 0.001 there, 0.5 now\n"),
        ({"mem": "bf16"}, "holds another run: mem.bf16: none there, bf16 now; mem.fp32: fp32 there, none now\n"),
        ({"algo": "dpo"}, "holds another run: algo: sft there, dpo now; "),
        ({"eval_rows": 7}, "eval_rows: 256 there, 7 now"),  # which rows are held out says which are learnt from
        ({"batch_size": 5, "seed": 1}, "batch_size: 4 there, 5 now; seed: 0 there, 1 now"),
    ],
    ids=str,
)
def test_resuming_with_other_options_is_refused_naming_them(
    tmp_path: Path, plan: Plan, change: dict[str, Any], says: str
) -> None:
    begin(RunDirectory(tmp_path), plan)
    text = refused(RunDirectory(tmp_path), plan_of(**change), resume=True)
    assert says in text and "A run that goes on may change --backend, --epochs, --eval-every, --keep" in text


@pytest.mark.parametrize("change", [{"max_steps": 9}, {"save_every": 1}, {"keep": 9}, {"eval_every": 1}], ids=str)
def test_how_long_a_resumed_run_goes_on_and_what_it_tells_may_change(
    tmp_path: Path, plan: Plan, change: dict[str, Any]
) -> None:
    begin(RunDirectory(tmp_path), plan)
    RunDirectory(tmp_path).check(plan_of(**change), resume=True)


def test_two_processes_cannot_be_at_work_in_one_folder(tmp_path: Path, plan: Plan) -> None:
    first = RunDirectory(tmp_path)
    first.open(plan)
    with pytest.raises(RequestError, match="another process is running in it"):
        RunDirectory(tmp_path).open(plan)  # a lock belongs to the open file, so this holds within a process as well
    assert first._lock is not None
    first._lock.close()
    RunDirectory(tmp_path).open(plan)


def test_a_run_that_goes_on_is_no_longer_done(tmp_path: Path, plan: Plan) -> None:
    """Killed on its way it would else be taken for done, with a recipe that asks for no more steps."""
    first = RunDirectory(tmp_path)
    first.open(plan)
    first.write_summary({"status": "done"})
    first.close()
    again = RunDirectory(tmp_path)
    again.lock()
    assert again.summary() == {"status": "done"}  # so far it may still be refused
    again.open(plan)
    assert again.summary() is None


def test_a_folder_that_cannot_be_made_is_a_wrong_request(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").open(plan)


@pytest.mark.whole
def test_recipe_plan_and_environment_are_written_and_the_recipe_repeats_the_run(tmp_path: Path, plan: Plan) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(plan)
    again = compose(from_mapping(directory.recipe(), "recipe.yaml"), loaded(), facts.machine())
    assert plain(again.to_recipe()) == plain(plan.to_recipe()) == directory.recipe()
    assert directory.plan_json()["algo"]["name"] == "sft"
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"torch", "transformers", "safetensors"} <= set(environment["packages"])
    assert "rlhf-kit" in environment["plugins"]


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for read in (directory.recipe, directory.plan_json):
        with pytest.raises(RequestError, match="holds no run"):
            read()
    assert directory.summary() is None
    (tmp_path / "recipe.yaml").write_text("- a list\n")
    with pytest.raises(RequestError, match="holds no recipe"):
        directory.recipe()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.log_metrics(1, {"loss": 0.5, "a": math.nan, "b": math.inf, "c": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 0.5, "a": null, "b": null, "c": null}\n'


def test_logs_are_cut_back_to_a_step_and_torn_lines_go(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        directory.log_metrics(step, {"loss": step / 10})
        directory.log_samples([{"step": step, "response": f"a\u2028b\u0085c\x1e\n {step} \ud800 é"}] * 2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write('{"step": 1, "response": "torn é'.encode()[:-1])  # in the middle of a character
    directory.cut_back(2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    samples = lines(tmp_path / "samples.jsonl")
    assert [line["step"] for line in samples] == [1, 1, 2, 2]
    assert samples[2]["response"] == "a\u2028b\u0085c\x1e\n 2 \ud800 é"
    directory.log_metrics(3, {"loss": 0.9})  # goes on on a line of its own
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [0.1, 0.2, 0.9]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    directory = RunDirectory(tmp_path)
    directory.cut_back(2)
    directory.log_metrics(3, {})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    directory.cut_back(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_foreign_lines_are_dropped_and_missing_logs_are_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('null\n[1]\n{"loss": 1}\n{"step": "1"}\n{"step": 1}\n')
    RunDirectory(tmp_path).cut_back(5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_model_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for content in ("first", "second"):
        partial = tmp_path / "model.part"
        partial.mkdir()
        (partial / content).touch()
        directory.replace_model(partial)
    assert [path.name for path in directory.model.iterdir()] == ["second"] and not (tmp_path / "model.part").exists()


def test_default_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf.rundir.time.strftime", lambda form: "T")
    names = []
    for _ in range(3):
        path = default_path("dpo")
        path.mkdir(parents=True)
        names.append(path.as_posix())
    assert names == ["runs/dpo-T", "runs/dpo-T-2", "runs/dpo-T-3"]


def test_plain_leaves_only_what_yaml_knows(plan: Plan) -> None:
    assert plain({1: (1, [2]), "a": {"b": frozenset({3})}}) == {"1": [1, [2]], "a": {"b": [3]}}
    recipe = plain(attrs.evolve(plan).to_recipe())
    assert yaml.safe_load(yaml.safe_dump(recipe)) == recipe
