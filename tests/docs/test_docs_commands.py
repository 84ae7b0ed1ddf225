"""Every `rlhf` command in the README and the docs is accepted, with files of the right kind in place of its names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from fences import shell_lines

from rlhf.cli import main

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "plugins" / "rlhf_plugins" / "starter"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_READERS = ("--algo theirs", "--algo tempered", "--reward keyword")
"""Of packages that a reader makes; tests/third_party installs such ones."""
SUBCOMMANDS = ("run", "plan", "plugins", "pipeline", "eval", "export", "report")


def commands() -> list[tuple[str, str]]:
    """(page, command) of fenced blocks and inline code; lines that end in a backslash go on."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = shell_lines(text)
        inline = re.findall(r"`(rlhf [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        for line in [*lines, *(" ".join(command.split()) for command in inline)]:
            command = line.split(" && ")[-1]
            if command.startswith("rlhf ") and not any(name in command for name in OF_READERS):
                found.append((str(page.relative_to(ROOT)), command.split("  #")[0].strip()))
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds everything the commands name."""
    folder = tmp_path_factory.mktemp("desk")
    data = {"chats": "sft_train", "train": "sft_train", "held_out": "sft_eval", "pairs": "pref_train"}
    data |= dict.fromkeys(("prompts", "questions", "problems", "big"), "prompts_train")
    for name, source in data.items():
        (folder / f"{name}.jsonl").write_bytes((STARTER / "data" / f"{source}.jsonl").read_bytes())
    (folder / "problems.csv").write_text("problem,solution\nWhat is 1 + 1?,2\n")
    (folder / "folder").mkdir()
    for name in ("my.py", "my_reward.py"):
        (folder / name).write_text("def score(completion):\n    return 1.0\n")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_documented_command_is_accepted(
    page: str, command: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    words = shlex.split(command)[1:]
    assert words[0] in SUBCOMMANDS or words[0].startswith("-"), f"{page}: no such command"
    if words[0] in ("eval", "export", "report") or "--resume" in words:  # they need a run; tests/runs carries them out
        words = [words[0], "--help"]
    if "..." in command:
        rest = [word for word in words if "..." not in word and word not in ("the", "same", "arguments...")]
        words = [*rest, "--algo", "ppo", "--model", "MODEL"]
        words += [] if "--data" in words else ["--data", "prompts.jsonl"]
        words += [] if "--reward" in words else ["--reward", "length"]
    model = str(STARTER / "model")
    names = {"MODEL": model, "RUN": model, "PATH": model, "runs/first": model, "NAME": "ppo"}
    words = [re.sub(r"^(reward=)?(MODEL|RUN|PATH|runs/first)$", lambda m: (m[1] or "") + names[m[2]], w) for w in words]
    words = [names.get(word, word) if words[0] == "plugins" else word for word in words]
    if words[0] == "run" and "--help" not in words:
        words.append("--dry-run")
    if words[0] == "pipeline":
        words = [*words[:2], "--dry-run"]
    if any(word.startswith("reward=") for word in words):  # a reward model stands for by facts alone
        config = json.loads((STARTER / "model" / "config.json").read_text())
        judge = desk / "judge"
        judge.mkdir(exist_ok=True)
        (judge / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
        words = [f"reward={judge}" if word.startswith("reward=") else word for word in words]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0, f"{page}: {command}\n{capsys.readouterr().err}"


def test_there_are_commands_to_check() -> None:
    pages = {page for page, _ in commands()}
    assert {"README.md", "docs/tutorial.md", "docs/how-to/own-data.md", "docs/how-to/own-reward.md"} <= pages
    assert len(commands()) > 25
