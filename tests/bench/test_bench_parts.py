"""The rest of the harness, part by part: arguments, processes, models, how TRL is watched."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from stepbench import cli, environments, models, peer, process
from stepbench.cases import FULL, cases
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_cases_are_chosen_by_name_and_keep_their_order():
    found = cli.chosen("ppo, sft", 7, quick=False)
    assert [case.name for case in found] == ["sft", "ppo"]
    assert [case.total for case in found] == [8, 8]  # one step of warm-up


def test_an_unknown_case_is_a_wrong_request(capsys):
    assert cli.main(["--only", "grpo"]) == 2
    assert "--only grpo: no such case; there are sft, sft-packed, reward, dpo, dpo-lora, ppo" in capsys.readouterr().err


def test_no_step_is_no_benchmark(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--steps", "0"])
    assert stopped.value.code == 2
    assert "must be a whole number above 0, not '0'" in capsys.readouterr().err


def test_data_is_given_by_kind(capsys):
    assert cli.data_files([f"pairs={__file__}"]) == {"pairs": __file__}
    assert cli.main(["--data", "rows.jsonl"]) == 2
    assert "expected KIND=PATH with KIND one of sft, pairs, prompts" in capsys.readouterr().err


def test_both_sides_have_the_same_settings():
    """Those that are written twice, as our flags and TRL's settings."""
    same = {"--policy.max-length": "max_length", "--algo.epochs": "num_ppo_epochs", "--algo.kl-coef": "kl_coef",
            "--algo.minibatches": "num_mini_batches", "--algo.kl-estimator": "kl_estimator",
            "--engine.temperature": "temperature", "--engine.max-new-tokens": "response_length",
            "--algo.packing": "packing"}  # fmt: skip
    seen = set()
    for case in cases(FULL):
        flags = dict(zip(case.flags[::2], case.flags[1::2], strict=True))
        for flag, setting in same.items():
            if flag in flags or setting in case.settings:
                assert flags[flag] == str(case.settings[setting]).replace("True", "true"), case.name
                seen.add(flag)
    assert seen == set(same)


def test_peak_memory_is_the_childs_own():
    """Measured from a small process, as the benchmark's is: a child's peak begins with its parent's."""
    code = (
        "import sys; from pathlib import Path; from stepbench import process;"
        "hold = [sys.executable, '-c', 'x = b\"x\" * 200_000_000'];"
        "print(process.run(hold, {}, Path(sys.argv[1])).peak_bytes)"
    )
    here = str(Path(__file__).parent)
    found = subprocess.run([sys.executable, "-c", code, os.devnull], env={**os.environ, "PYTHONPATH": here},
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert 200_000_000 < int(found.stdout) < 260_000_000  # an interpreter takes about 10 MB


def test_a_failed_side_tells_the_end_of_its_log(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*no such thing"):
        process.run([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], {}, tmp_path / "log")


def test_an_interpreter_tells_its_versions():
    found = environments.versions(sys.executable)
    assert found["torch"] == version("torch")  # without the build that torch itself appends
    with pytest.raises(ValueError, match="no/python: can't be run"):
        environments.versions("no/python")


def test_other_versions_are_refused():
    ours = {name: version(name) for name in environments.SAME}
    environments.check_versions("python", {**ours, "trl": "1.16.0"}, "trl==1.16.0")
    with pytest.raises(ValueError, match=r"python: has trl missing, not 1\.16\.0; torch 1\.0, not "):
        environments.check_versions("python", {**ours, "torch": "1.0"}, "trl==1.16.0")


def test_a_wrong_interpreter_is_found_before_anything_is_made(tmp_path: Path, capsys):
    assert cli.main(["--quick", "--only", "sft", "--trl-python", "no/python", "--work", str(tmp_path)]) == 2
    assert "no/python: can't be run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_none_is_a_wrong_request(tmp_path: Path, capsys):
    assert cli.main(["--model", str(tmp_path)]) == 2
    assert "no such model; give a folder that has a config.json" in capsys.readouterr().err


def test_a_step_lasts_from_the_end_of_the_one_before():
    stamps = peer.Stamps()
    stamps.times = [1.0, 3.0, 6.0]
    assert stamps.seconds() == [2.0, 3.0]


def test_tokens_are_counted_without_padding():
    batches = iter([
        {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
        {"input_ids": torch.ones(1, 7)},
    ])  # fmt: skip
    counting = peer.Counting(lambda _: next(batches))
    counting([]), counting([])
    assert counting.tokens == [5, 7]


def test_packed_items_are_put_in_the_order_of_ours():
    packed = {"input_ids": [[0] * 5, [0] * 9, [0] * 5, [0] * 2]}
    assert peer.in_order(packed, [9, 5, 3, 5]) == [1, 0, 3, 2]


def test_the_model_that_never_ends(tmp_path: Path):
    models.tiny(tmp_path / "tiny")
    models.endless(tmp_path / "tiny", tmp_path / "endless")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "endless")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "endless")
    assert (tokenizer.eos_token, model.config.eos_token_id) == ("<spare_1>", 2)
    assert tokenizer("a b")["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "tiny")("a b")["input_ids"]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model(torch.randint(3, 259, (8, 60), generator=draw)).logits
    ends = (logits / 0.7).softmax(-1)[..., 2]  # at the temperature that is sampled at
    assert ends.mean() < 1e-3  # of 128 tokens that --quick samples, 0.1 at most in the mean


def test_a_model_without_spare_tokens_is_refused(tiny_model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="PPO needs two special tokens that the model doesn't use, and it has 0"):
        models.endless(tiny_model, tmp_path / "endless")


def test_what_was_left_unfinished_is_made_anew(tmp_path: Path):
    calls = []

    def make(folder: Path) -> None:
        folder.mkdir()
        calls.append(folder)
        if len(calls) == 1:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        models.once(tmp_path / "made", make)
    assert models.once(tmp_path / "made", make) == models.once(tmp_path / "made", make) == tmp_path / "made"
    assert len(calls) == 2
