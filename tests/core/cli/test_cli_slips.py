"""What is typed wrong: every problem is told, with what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Rlhf

from rlhf.cli import main


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


def test_a_typo_in_the_folder_to_resume_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "recipe.yaml").write_text("algo: ppo\n")
    with pytest.raises(SystemExit) as done:
        main(["run", "--resume", "--output", str(tmp_path / "frist")])
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert "holds no run to go on with" in said and f"did you mean --output {tmp_path / 'first'}?" in said
    assert [place.name for place in tmp_path.iterdir()] == ["first"]
