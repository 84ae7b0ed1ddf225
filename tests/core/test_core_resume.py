"""`--resume` on the command line: what isn't typed is as it was, and what is typed and differs is named, alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf.cli import main
from rlhf.cli.resume import what_stands

Rlhf = Callable[..., tuple[int, str, str]]
BEGUN = ("run", "--algo", "dpo", "--mem", "lora", "--batch-size", "4", "--algo.beta", "0.3", "--seed", "3",
         "--max-steps", "1", "--eval-rows", "0")  # fmt: skip


@pytest.fixture
def rlhf(capfd: pytest.CaptureFixture[str]) -> Rlhf:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(list(words))
        out, err = capfd.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done."""
    out = tmp_path_factory.mktemp("runs") / "begun"
    with pytest.raises(SystemExit) as done:
        main([*BEGUN, "--output", str(out)])
    assert done.value.code == 0
    return out


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--seed", "4"), "seed: 3 there, 4 now"),
        (("--algo", "dpo", "--seed", "4"), "seed: 3 there, 4 now"),  # once: beta, lora and the batch were not typed
        (("--algo.beta", "0.1"), "algo.beta: 0.3 there, 0.1 now"),
        (("--algo", "dpo", "--algo.beta", "0.1", "--seed", "4"), "algo.beta: 0.3 there, 0.1 now; seed: 3 there, 4 now"),
        (("--algo", "sft"), "algo: dpo there, sft now"),
        (("--algo", "sft", "--seed", "4"), "algo: dpo there, sft now"),
        (("--mem.lora.rank", "3"), "mem.lora.rank: 16 there, 3 now"),
        (("--mem", "bf16"), "mem.bf16: none there, bf16 now; mem.fp32: fp32 there, none now"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_was_typed_and_differs_is_named_alone(
    rlhf: Rlhf, begun: Path, words: tuple[str, ...], changed: str
) -> None:
    code, _, err = rlhf("run", "--resume", "--output", str(begun), *words)
    assert code == 2
    assert f"--output {begun}: holds another run: {changed}\n    leave that out: what isn't typed is as it was." in err
    assert "may change --backend, --epochs, --eval-every, --keep" in err


def test_another_model_is_another_run(rlhf: Rlhf, begun: Path, tiny_model: Path) -> None:
    code, _, err = rlhf("run", "--resume", "--output", str(begun), "--model", str(tiny_model))
    assert code == 2 and f"starter/model there, {tiny_model} now" in err


@pytest.mark.parametrize("words", [(), ("--algo", "dpo"), BEGUN[1:], ("--algo", "dpo", "--mem", "lora")], ids=" ".join)
def test_the_same_line_or_a_part_of_it_goes_on(rlhf: Rlhf, begun: Path, words: tuple[str, ...]) -> None:
    code, _, err = rlhf("run", "--resume", "--output", str(begun), *words)
    assert code == 0 and "already finished after 1 steps" in err


def test_what_may_change_is_laid_over_what_is_there(rlhf: Rlhf, begun: Path) -> None:
    words = ("run", "--resume", "--output", str(begun), "--dry-run")
    stored = yaml.safe_load((begun / "recipe.yaml").read_text())
    code, out, _ = rlhf(*words, "--max-steps", "7")
    assert code == 0 and yaml.safe_load(out) == {**stored, "max_steps": 7}
    code, out, _ = rlhf(*words, "--epochs", "3")  # of a run whose length was given in steps
    assert code == 0 and yaml.safe_load(out) == {**stored, "max_steps": None, "epochs": 3.0}
    code, out, _ = rlhf(*words, "--epochs", "2")  # as it was
    assert code == 0 and yaml.safe_load(out) == stored


def test_a_run_that_failed_before_its_first_checkpoint_is_begun_again(rlhf: Rlhf, tmp_path: Path) -> None:
    reward, rows, out = tmp_path / "r.py", tmp_path / "p.jsonl", str(tmp_path / "out")
    reward.write_text("def score(completion):\n    return 1 / 0\n")
    rows.write_text('{"prompt": "Question: What is 1 + 1?\\nAnswer:"}\n' * 4)
    words = ("run", "--algo", "ppo", "--data", str(rows), "--reward", "python", "--reward.python.path",
             f"{reward}:score", "--output", out, "--max-steps", "1", "--batch-size", "2", "--eval-rows", "0",
             "--engine.max-new-tokens", "4")  # fmt: skip
    code, _, err = rlhf(*words)
    assert code == 1 and "ZeroDivisionError" in err
    (tmp_path / "better.py").write_text("def score(completion):\n    return 1.0\n")
    again = [word.replace("r.py", "better.py") for word in words]
    code, _, err = rlhf(*again)
    assert code == 2 and "add --resume to begin it again, with the same options or with others" in err
    code, _, err = rlhf(*again, "--resume")
    assert code == 0 and "holds no checkpoint yet: starting from 0" in err


def test_a_reward_that_changes_the_working_folder_changes_nothing(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    Path("goal.py").write_text(
        "import os\nos.chdir('elsewhere')\ndef score(completion):\n    return float(len(completion))\n"
    )
    words = ("run", "--algo", "ppo", "--reward", "python", "--reward.python.path", "goal.py:score", "--max-steps", "1",
             "--batch-size", "4", "--eval-rows", "0", "--output", "out")  # fmt: skip
    code, _, err = rlhf(*words)
    assert code == 0, err
    assert Path.cwd() == tmp_path / "elsewhere" and not list(Path.cwd().iterdir())
    assert (tmp_path / "out" / "model").is_dir() and (tmp_path / "out" / "summary.json").is_file()
    assert f"{Path('out') / 'model'}" in err and str(tmp_path / "out") not in err  # told as it was typed


def test_what_stands_is_looked_for_where_the_run_was_started(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = "interrupted; step-000001 stands: rlhf run --resume --output begun"
    assert what_stands(Path("begun"), begun.parent) == told
    assert what_stands(begun, tmp_path) == told.replace("begun", str(begun))
    assert what_stands(Path("begun"), tmp_path).endswith("no checkpoint was written")
