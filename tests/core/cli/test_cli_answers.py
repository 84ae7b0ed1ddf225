"""Exit codes, what stands on stdout and what on stderr, help, listings, plans, and how many processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import Ended, Rlhf

from rlhf import registry as registries
from rlhf.entries import PolicyEntry
from rlhf.errors import Interrupted, RunError
from rlhf.registry import Registry

# Exit codes


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--help",), 0),
        (("-h",), 0),
        (("--version",), 0),
        (("plugins",), 0),
        (("plan", "--algo", "ppo"), 0),
        (("run", "--algo", "dpo", "--mem", "lora", "--dry-run"), 0),
        (("run", "--help"), 0),
        (("no-such-command",), 2),
        (("run", "--no-such-option"), 2),
        (("run", "--algo", "ppp"), 2),
        (("run", "--algo", "ppp", "--help"), 2),
        (("plan", "--algo", "dpo", "--engine", "hf"), 2),
        (("run", "no-such-recipe.yaml"), 2),
        (("run", "--resume"), 2),
        (("plugins", "show", "no-such-plugin"), 2),
        (("plugins", "--kind", "colour"), 2),
    ],
)
def test_exit_codes(
    rlhf: Rlhf, words: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = rlhf(*words)
    assert ended.code == code
    assert bool(ended.out) == (code == 0)  # results on stdout, problems on stderr
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize(
    ("error", "code"), [(RunError("reward raised"), 1), (Interrupted("stopped"), 130), (KeyboardInterrupt(), 130)]
)
@pytest.mark.whole
def test_how_a_run_ends_is_its_exit_code(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def raises(*arguments: object) -> int:
        raise error

    monkeypatch.setattr("rlhf.cli.run.carry_out", raises)
    ended = rlhf("run", "--algo", "ppo")
    assert ended.code == code
    assert str(error) in ended.err


@pytest.mark.whole
def test_what_ends_the_process_from_inside_is_a_failure(
    rlhf: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script without a guard, taken for a reward, is no success that says nothing."""
    (tmp_path / "script.py").write_text("import sys\ndef score(completion): return 0.0\nsys.exit(0)\n")
    words = ("run", "--algo", "ppo", "--output", str(tmp_path / "run"), "--reward", "python")
    ended = rlhf(*words, "--reward.python.path", f"{tmp_path / 'script.py'}:score")
    assert ended.code == 2 and "raised SystemExit: 0" in ended.err

    def leaves() -> None:
        raise SystemExit(0)

    monkeypatch.setattr("rlhf.cli.plugins.loaded", leaves)
    ended = rlhf("plugins")
    assert ended.code == 1 and "something that was loaded called sys.exit(0)" in ended.err


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf", "run", "--algo", "ppo", "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert "Traceback" not in err


# Plans


def test_a_dry_run_prints_yaml_that_makes_the_same_plan(rlhf: Rlhf, tmp_path: Path) -> None:
    words = ("--algo", "ppo", "--algo.value-model=shared", "--mem", "lora", "--mem.lora.rank", "4", "--seed", "7")
    text = rlhf("run", *words, "--dry-run").out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert yaml.safe_load(text)["seed"] == 7
    assert rlhf("run", str(recipe), "--dry-run").out == text
    one, two = (json.loads(rlhf("plan", *given, "--json").out) for given in (words, (str(recipe),)))
    assert {**one, "notes": []} == {**two, "notes": []}


def test_a_plan_as_text_says_what_serves_each_role(rlhf: Rlhf) -> None:
    out = rlhf("plan", "--algo", "dpo", "--mem", "lora").out
    assert "policy with its adapters off" in out
    assert "note       --backend single: taken because none was named" in out


def test_what_is_not_installed_can_be_planned_for_another_machine(
    rlhf: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    present = registries._present
    monkeypatch.setattr(registries, "_loaded", None)
    monkeypatch.setattr(registries, "_present", lambda module: module != "deepspeed" and present(module))
    words = ("plan", "--algo", "ppo", "--mem", "zero3", "--nproc", "2")
    there = rlhf(*words, "--device", "h100")
    assert there.code == 0 and "backend deepspeed" in " ".join(there.out.split())
    for what in ("--mem zero3", "--backend deepspeed"):
        assert f"note: {what} can't run here: needs the module 'deepspeed'" in there.err
    here = rlhf(*words)
    assert here.code == 2 and "--mem zero3 (from rlhf-kit) cannot be used" in here.err
    usual = rlhf("plan", "--algo", "ppo", "--nproc", "2", "--device", "h100")  # taken only where it is asked for
    assert "backend ddp" in " ".join(usual.out.split()) and "can't run here" not in usual.err


# Help


def test_help_without_an_algorithm_says_how_to_see_more(rlhf: Rlhf) -> None:
    out = rlhf("run", "--help").out
    assert "Add --algo NAME" in out
    assert "ppo" in out
    assert "--max-steps INT" in out
    assert "--algo.clip-range" not in out


def test_help_with_components_shows_their_options(rlhf: Rlhf) -> None:
    out = rlhf("run", "--algo", "ppo", "--reward", "python:mine", "--mem", "lora", "--format", "jsonl", "--help").out
    assert "--algo.clip-range number" in out
    assert "(PPO, eq. 7)" in out
    assert "[default: 0.2]" in out
    assert "--engine.max-new-tokens int" in out  # of what is taken unasked
    assert "--mem.lora.rank int" in out
    assert "--reward.mine.path text" in out  # though it is required and missing
    assert "[required]" in out
    assert "--format.columns key=value list" in out
    assert "Factory" not in out
    assert "(none: not even those)" in " ".join(out.split())


def test_help_shows_the_defaults_that_hold(rlhf: Rlhf) -> None:
    def flat(*words: str) -> str:
        return " ".join(rlhf("run", "--algo", "ppo", *words, "--help").out.split())

    ours = flat()
    assert "over all ranks [default: 128, set by the starter 'sums']" in ours
    theirs = flat("--model", "org/name", "--data", "x.jsonl")
    assert "over all ranks [default: 64, set by ppo]" in theirs
    assert "may set another default [default: 3e-06, set by ppo]" in theirs
    assert "[default: 32]" not in theirs


# Listings


def test_plugins_json_has_the_fields_that_outsiders_read(rlhf: Rlhf) -> None:
    rows = json.loads(rlhf("plugins", "--json").out)
    assert all(set(row) == {"kind", "name", "summary", "distribution", "version", "status", "reason"} for row in rows)
    ppo = next(row for row in rows if (row["kind"], row["name"]) == ("algo", "ppo"))
    assert (ppo["distribution"], ppo["status"], ppo["reason"]) == ("rlhf-kit", "ok", "")
    assert {row["status"] for row in rows} <= {"ok", "missing", "failed"}
    only = json.loads(rlhf("plugins", "--kind", "mem", "--json").out)
    assert only == [row for row in rows if row["kind"] == "mem"]


def test_plugins_as_text(rlhf: Rlhf) -> None:
    out = rlhf("plugins", "--kind", "algo").out.splitlines()
    assert out[0] == "algo"
    assert any(line.split()[0] == "ppo" and "(rlhf-kit " in line for line in out[1:])


def test_show_a_component(rlhf: Rlhf) -> None:
    out = rlhf("plugins", "show", "lora").out
    assert "provides adapters" in out
    assert "--mem.lora.rank int" in out
    assert "the nearest: lora" in rlhf("plugins", "show", "loraa").err
    rows = json.loads(rlhf("plugins", "show", "lora", "--json").out)
    assert [(row["kind"], row["provides"], row["requires"], row["conflicts"]) for row in rows] == [
        ("mem", ["adapters"], [], [])
    ]
    options = {option.pop("name"): option for option in rows[0]["options"]}
    assert options["rank"] == {
        "type": "int", "required": False, "default": 16, "choices": [], "unit": "",
        "help": "of the update B A to each adapted matrix", "source": "r in Hu et al. 2021",
    }  # fmt: skip
    assert options["targets"]["default"] == []  # of a factory, what it makes
    (python,) = (row for row in json.loads(rlhf("plugins", "show", "python", "--json").out) if row["kind"] == "reward")
    path = next(option for option in python["options"] if option["name"] == "path")
    assert (path["required"], path["default"]) == (True, None)
    # one name may be of several kinds
    assert {row["kind"] for row in json.loads(rlhf("plugins", "show", "hf", "--json").out)} >= {"policy", "engine"}


def test_show_an_ill_made_component(
    rlhf: Rlhf, make_registry: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(PolicyEntry(name="fake-ill", summary="s", impl="a:B", config=dict))
    monkeypatch.setattr("rlhf.cli.plugins.loaded", lambda: registry)
    assert "config must be an attrs class" in rlhf("plugins", "show", "fake-ill").out
    assert json.loads(rlhf("plugins", "show", "fake-ill", "--json").out)[0]["status"] == "failed"


# Several processes


@pytest.mark.parametrize(("was", "now", "backend"), [("1", "2", "ddp"), ("2", "1", "single"), ("2", "3", "ddp")])
def test_a_run_that_goes_on_with_more_or_less_processes_has_a_backend_for_them(
    tmp_path: Path, rlhf: Callable[..., Ended], was: str, now: str, backend: str
) -> None:
    plan = json.loads(rlhf("plan", "--algo", "sft", "--nproc", was, "--json").out)
    recipe = rlhf("run", "--algo", "sft", "--nproc", was, "--dry-run").out
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "recipe.yaml").write_text(recipe)
    ended = rlhf("run", "--resume", "--output", str(tmp_path), "--nproc", now, "--dry-run")
    assert ended.code == 0 and yaml.safe_load(ended.out)["backend"]["name"] == backend
    kept = rlhf("run", "--resume", "--output", str(tmp_path), "--dry-run")
    assert yaml.safe_load(kept.out)["backend"] == yaml.safe_load(recipe)["backend"]


def test_more_processes_than_were_started_are_refused(
    rlhf: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    ended = rlhf("run", "--algo", "sft", "--nproc", "3")
    assert ended.code == 2 and "--nproc 3: torchrun has started 2 processes, of which this is one" in ended.err
    assert "backend    ddp" in rlhf("plan", "--algo", "sft").out
    monkeypatch.setenv("RANK", "1")
    ended = rlhf("run", "--algo", "sft", "--nproc", "3")
    assert ended.code == 2 and not ended.err  # rank 0 has said it


def test_single_is_refused_for_several(rlhf: Callable[..., Ended]) -> None:
    ended = rlhf("plan", "--algo", "sft", "--backend", "single", "--nproc", "2")
    assert ended.code == 2 and "--backend single is one process, the run has 2" in ended.err
