"""The command line: exit codes, what stands on stdout and what on stderr, help, listings, and how light it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from rlhf import registry as registries
from rlhf.cli import main
from rlhf.entries import PolicyEntry
from rlhf.errors import Interrupted, RunError
from rlhf.registry import Registry

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run a command in this process."""
    monkeypatch.setenv("COLUMNS", "110")

    def run(*words: str) -> Ended:
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        out, err = capsys.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    return run


Rlhf = Callable[..., Ended]


def in_a_process(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "rlhf"]
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=60, check=False)


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


def test_problems_are_all_told_each_with_what_to_type(rlhf: Rlhf) -> None:
    err = rlhf("plan", "--algo", "ppo", "--algo.clip-rnage", "1", "--mem", "lroa", "--seed", "-1").err
    assert err.count("error: ") == 3
    assert "did you mean --algo.clip-range?" in err
    assert "did you mean 'lora'?" in err
    assert "--seed must be >= 0, not -1" in err


def test_a_misspelt_flag_names_the_nearest(rlhf: Rlhf) -> None:
    assert "--batch-size" in rlhf("run", "--batchsize", "3").err


def test_the_nearest_combination_is_offered_and_works(rlhf: Rlhf) -> None:
    err = rlhf("plan", "--algo", "dpo", "--engine", "hf", "--algo.beta", "0.3").err
    line = next(line for line in err.splitlines() if line.startswith("the nearest combination that works: "))
    words = line.partition(": ")[2].split()
    assert words == ["rlhf", "run", "--algo", "dpo", "--algo.beta=0.3"]
    assert rlhf("plan", *words[2:]).code == 0


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


# Light


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("plugins",),
        ("run", "--algo", "ppo", "--help"),
        ("plan", "--algo", "ppo", "--mem", "lora"),
        ("run", "--algo", "ppo", "--dry-run"),
        *((command, "--help") for command in ("pipeline", "eval", "report")),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(words: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom rlhf.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    ended = in_a_process(*words, code=code)
    assert ended.returncode == 0
    assert ended.stderr.splitlines()[-1] == "[]"


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


@pytest.mark.parametrize("words", [("--help",), ("plugins",)], ids=" ".join)
def test_it_answers_in_under_a_third_of_a_second(words: tuple[str, ...], tmp_path: Path) -> None:
    """Seconds of CPU, beside those in which this machine imports what the program is built on, in turn: a processor
    that is slower, or shared, is as much slower at both. With bytecode, as in an installed copy."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, "PYTHONPYCACHEPREFIX": str(tmp_path)}

    def seconds(*start: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, *start], env=environment, capture_output=True, timeout=60, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    yardstick = ("-c", "import click, attrs, cattrs, pluggy, yaml, psutil, importlib.metadata")
    pairs = [(seconds("-m", "rlhf", *words), seconds(*yardstick)) for _ in range(6)][1:]  # the first writes bytecode
    # The contract is 0.3 s where the yardstick takes 0.1 s; importing torch alone takes ten times that.
    assert min(found for found, _ in pairs) < 3 * min(beside for _, beside in pairs)


def test_the_module_is_the_same_program() -> None:
    start = time.perf_counter()
    ended = in_a_process("plugins", "--json")
    assert time.perf_counter() - start < 60
    assert ended.returncode == 0
    assert {"algo", "policy"} <= {row["kind"] for row in json.loads(ended.stdout)}
    refused = in_a_process("plan", "--algo", "ppp")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "did you mean" in refused.stderr or "installed:" in refused.stderr


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


def test_a_typo_in_the_folder_to_resume_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "recipe.yaml").write_text("algo: ppo\n")
    with pytest.raises(SystemExit) as done:
        main(["run", "--resume", "--output", str(tmp_path / "frist")])
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert "holds no run to go on with" in said and f"did you mean --output {tmp_path / 'first'}?" in said
    assert [place.name for place in tmp_path.iterdir()] == ["first"]


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


# What Click finds, said as all else is


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--max-step", "3"), "unknown option --max-step\n    did you mean --max-steps?"),
        (("run", "--algo", "ppo", "--lr", "1"), "unknown option --lr\n    did you mean --optim.learning-rate?"),
        (("run", "--lora-rank", "4"), "unknown option --lora-rank\n    did you mean --mem.lora.rank?"),
        (("run", "--algo", "ppo", "--optim.lr", "1"), "--optim.lr\n    did you mean --optim.learning-rate?"),
        (("eval", "x", "--row", "3"), "unknown option --row\n    did you mean --rows?"),
        (("eval",), "missing argument 'RUN_DIR'\n    rlhf eval --help tells what it takes"),
        (("eval", "x", "--rows", "no"), "invalid value for '--rows'"),
        (("rn",), "there is no command 'rn'\n    did you mean rlhf run?"),
        (("qqqq",), "there is no command 'qqqq'\n    commands: run, plan"),
        (("plugins", "show", "loar"), "no component is called 'loar'\n    the nearest: lora"),
        (("plugins", "show", "zzzz"), "rlhf plugins lists all"),
        (("eval", "nosuch-run"), "nosuch-run: there is no such folder\n    give a run's folder"),
        (
            ("run", "nosuch.yaml"),
            "there is no such recipe file\n    give a YAML file, or a shipped one: chat",
        ),
        (("run", "chat-ppo"), "chat-ppo: is a pipeline, not the recipe of one run\n    rlhf pipeline chat-ppo"),
        (("run", "--algo", "sft", "--data", "ok.txt"), "--data ok.txt: there is no such file here\n    give a file"),
        (("run", "--algo", ""), "--algo is given nothing\n    --algo VALUE, or leave it out"),
        (("plan", "--algo", "sft", "--model", "", "--mem", ",,"), "--model is given nothing"),
        (("plan", "--algo", "sft", "--data="), "--data is given nothing"),
        (("run", "--algo", "gpro"), "there is no --algo 'gpro'\n    did you mean 'grpo'?"),
        (("run", "--output", ""), "--output is given nothing\n    --output VALUE, or leave it out"),
        (("run", ""), "RECIPE.yaml is given nothing\n    give it a value, or leave it out"),
        (("run", "--seed", ""), "--seed is given nothing"),
        (("export", "run", "--output", "x", "--checkpoint", ""), "--checkpoint is given nothing"),
        (("export", "run", "--output="), "--output is given nothing\n    --output VALUE\n"),
        (("eval", "run", "--checkpoint", ""), "--checkpoint is given nothing"),
        (("pipeline", "chat-dpo", "--output", ""), "--output is given nothing"),
        (("report", ""), "RUN_DIR is given nothing\n    give it a value\n"),
        (("new", "plugin", "x", "--kind", "algo", "--output", ""), "--output is given nothing"),
        (("matrix", "--algo", ""), "--algo is given nothing"),
        (("run", "--algo", "sft", "--batch-size", "1e20"), "--batch-size must be <= 1e+07"),
        (("run", "--algo", "sft", "--epochs", "1e308"), "--epochs must be <= 1e+06"),
        (("run", "--algo", "sft", "--max-steps", "9" * 400), "--max-steps must be <= 1e+09"),
        (("run", "--algo", "sft", "--max-steps", "9" * 5000), "--max-steps must be int"),
        (("plan", "--algo", "sft", "--nproc", "1e30"), "--nproc must be <= 100000"),
        (("run", "--algo", "sft", "--seed", "9" * 30), "--seed must be <= 9.22337e+18"),
        (("run", "--algo", "sft", "--model", "x" * 300), "is too long for the name of a file"),
        (("run", "--resume", "--output", "x" * 300), "is too long for the name of a file"),
        (("pipeline", "sft-dpo", "--output", "x" * 300), "cannot be written: File name too long"),
        (("pipeline", "sft-dpo", "--set", "sft.seed=!!int foo"), "the value is no YAML: line 1: 'foo' is no int"),
        (("run", "/"), "/: is a folder\n    give a YAML file"),
        (("report", __file__), "is a file\n    give a run's folder"),
        (("eval", __file__), "is a file\n    give a run's folder"),
        (("pipeline", "sft-dpo", "--set", "sft.data=[1,2"), "--set sft.data=[1,2: the value is no YAML"),
        (("pipeline", "sft-dpo", "--set", "sft.model=@dpo"), "stage sft: no stage 'dpo' comes before it"),
        (("pipeline", "sft-dpo", "--set"), "option '--set' requires an argument\n    rlhf pipeline --help"),
        (("pipeline", "sft-dpo", "--output", f"{__file__}/x"), "x: cannot be written: Not a directory"),
        (("pipeline", "sft-dpo", "--set", "dpo.model=nosuch/dir"), "stage dpo: --model nosuch/dir: there is no such"),
    ],
)
@pytest.mark.whole
def test_a_slip_is_told_with_what_to_type_instead(rlhf: Rlhf, words: tuple[str, ...], says: str) -> None:
    ended = rlhf(*words)
    assert ended.code == 2 and says in ended.err
    assert ended.err.startswith("error: ") and "Usage:" not in ended.err and "stage 1/" not in ended.err


def test_help_shows_the_defaults_that_hold(rlhf: Rlhf) -> None:
    def flat(*words: str) -> str:
        return " ".join(rlhf("run", "--algo", "ppo", *words, "--help").out.split())

    ours = flat()
    assert "over all ranks [default: 128, set by the starter 'sums']" in ours
    theirs = flat("--model", "org/name", "--data", "x.jsonl")
    assert "over all ranks [default: 64, set by ppo]" in theirs
    assert "may set another default [default: 3e-06, set by ppo]" in theirs
    assert "[default: 32]" not in theirs


def test_the_shipped_recipes_are_listed_and_checked_without_torch(rlhf: Rlhf) -> None:
    listed = rlhf("pipeline", "--list")
    assert listed.code == 0 and "chat-ppo " in listed.out and "recipes/chat-ppo.yaml" in listed.out
    code = "import sys; from rlhf.cli import main\ntry: main(sys.argv[1:])\nfinally: print(sorted(set(sys.modules) & "
    done = in_a_process("pipeline", "sft-dpo", "--dry-run", code=code + f"set({HEAVY})))")
    assert done.returncode == 0 and done.stdout.startswith("stages:") and done.stdout.endswith("[]\n")


@pytest.mark.whole
def test_a_column_that_a_reward_needs_is_missed_before_a_model_is_loaded(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("rlhf.assemble.build", build)
    (tmp_path / "goal.py").write_text("def score(completion, goal, hint=None): return 1.0\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "gaol": "b"}\n')
    words = ("run", "--algo", "ppo", "--data", str(tmp_path / "rows.jsonl"), "--reward", "python",
             "--reward.python.path", f"{tmp_path}/goal.py:score", "--output", str(tmp_path / "out"))  # fmt: skip
    ended = rlhf(*words)
    assert ended.code == 2
    assert "1 x no column 'goal', which reward 'python' needs; its other columns: gaol" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "words", "note"),
    [
        (3, ("--max-steps", "1"), "3 rows are fewer than the batch of 12: each is in every step 4 times"),
        (3, ("--epochs", "1"), "3 rows are fewer than the batch of 12: the first step takes them all"),
        (12, ("--epochs", "1"), ""),
    ],
)
@pytest.mark.whole
def test_fewer_rows_than_a_batch_are_noted(
    rlhf: Rlhf, tmp_path: Path, count: int, words: tuple[str, ...], note: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Question: What is 1 + 1?\\nAnswer:", "completion": " 2"}\n' * count)
    given = ("--algo", "sft", "--data", str(rows), "--batch-size", "12", "--eval-rows", "0", "--track", "none")
    ended = rlhf("run", *given, "--output", str(tmp_path / "out"), *words)
    assert ended.code == 0
    assert (note in ended.err) and ("fewer than the batch" in ended.err) == bool(note)


@pytest.mark.whole
def test_a_reward_looks_at_each_row_before_a_model_is_loaded(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.errors import RowError
    from rlhf_plugins.rewards.length import Length

    def check(reward: Length, row: Any) -> None:
        if row.extra["size"] > 1:
            raise RowError(f"size {row.extra['size']} is more than 1")

    def build(*arguments: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(Length, "check", check, raising=False)
    monkeypatch.setattr("rlhf.assemble.build", build)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "a", "size": {i}}}\n' for i in (2, 3, 2)))
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "size": 1}\n')
    words = ("run", "--algo", "ppo", "--reward", "length", "--output", str(tmp_path / "out"))
    refused = rlhf(*words, "--data", str(tmp_path / "rows.jsonl"))
    assert refused.code == 2
    assert (
        "2 x reward 'length': size 2 is more than 1 (first: " in refused.err
        and "1 x reward 'length': size 3 is more than 1" in refused.err
    )
    held_out = rlhf(*words, "--data", str(tmp_path / "good.jsonl"), "--eval-data", str(tmp_path / "rows.jsonl"))
    assert held_out.code == 2 and "2 x reward 'length': size 2 is more than 1" in held_out.err
