"""What a run writes is what the docs tell of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fences import ROOT

from rlhf.cli import main
from rlhf.plan import resource
from rlhf.rundir import FILES

RUNS = {
    "sft": ("--algo", "sft"),
    "reward": ("--algo", "reward"),
    "dpo": ("--algo", "dpo"),
    "grpo": ("--algo", "grpo", "--algo.kl-coef", "0.1", "--algo.covariance", "kl", "--ptx-coef", "0.5", "--ptx-data",
             str(ROOT / "plugins/rlhf_plugins/starter/data/sft_eval.jsonl")),
    "dapo": ("--algo", "dapo"),
    "best-of-n": ("--algo", "best-of-n", "--algo.threshold", "0"),
    "online-dpo": ("--algo", "online-dpo"),
    "distill": ("--algo", "distill", "--model", f"teacher={resource('rlhf_plugins.starter:model')}"),
    "prm": ("--algo", "prm"),
    "ilql": ("--algo", "ilql"),
    "ppo": ("--algo", "ppo", "--reward", "answer", "--reward", "length", "--track", "tensorboard"),
}  # fmt: skip


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of each algorithm, with its report."""
    folder = tmp_path_factory.mktemp("runs") / str(request.param)
    few = ("--max-steps", "2", "--batch-size", "8", "--eval-rows", "8", "--save-every", "1", "--output", str(folder))
    for words in (("run", *RUNS[request.param], *few), ("report", str(folder))):
        with pytest.raises(SystemExit) as done:
            main(list(words))
        assert done.value.code == 0
    return folder


def metrics(run: Path) -> set[str]:
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return set().union(*lines, summary["heldout_before"], summary["heldout_after"])


def test_every_metric_is_in_the_glossary(run: Path) -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").partition("## Metrics")[2]
    told = set(re.findall(r"`([\w/]+)`", page))
    sources = {"reward/answer", "reward/length"}  # reward/NAME
    assert "reward/NAME" in told
    assert metrics(run) - sources <= told


def test_every_file_and_key_is_in_the_reference(run: Path) -> None:
    here = {path.name for path in run.iterdir()}
    assert here <= set(FILES)
    assert here >= set(FILES) - {"samples.jsonl", "tensorboard"}
    for key in json.loads((run / "summary.json").read_text()):
        assert key in FILES["summary.json"]
    if "samples.jsonl" in here:
        for key in json.loads((run / "samples.jsonl").read_text().split("\n")[0]):
            assert key in FILES["samples.jsonl"] or key in ("reward/answer", "reward/length")
    for folder in (run / "checkpoints").iterdir():
        assert re.fullmatch(r"step-\d{6}", folder.name)
        assert {path.name for path in folder.iterdir()} > {"manifest.json", "state.json"}
