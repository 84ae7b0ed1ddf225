"""`rlhf export`: of runs, checkpoints, roles and models; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlhf.cli import main

Rlhf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str]) -> Rlhf:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(list(words))
        out, err = capsys.readouterr()
        return int(cast(int, done.value.code)), out, err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO run of two steps with LoRA on 4 bits, two trained models."""
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    words = ("run", "--algo", "ppo", "--mem", "policy=lora,4bit", "--mem", "value=lora", "--max-steps", "2",
             "--batch-size", "8", "--eval-rows", "0", "--save-every", "1", "--keep", "5",
             "--optim.learning-rate", "0.01", "--mem.lora.targets", "all-linear", "--track", "none",
             "--output", str(folder))  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(list(words))
    assert done.value.code == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return cast("dict[str, torch.Tensor]", load_file(folder / "model.safetensors"))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_its_last_checkpoint_and_its_model_folder_are_one(finished: Path, tmp_path: Path, rlhf: Rlhf) -> None:
    code, out, err = rlhf("export", str(finished), "--output", str(tmp_path / "run"))
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "run")  # some libraries print, too
    assert "LlamaForCausalLM: 567,296 weights, float32, 2.3 MB, adapters merged, unpacked" in err
    for words in ((str(finished), "--checkpoint", "step-000002"), (str(finished / "model"),)):
        target = tmp_path / "again" / str(len(words))
        target.parent.mkdir(exist_ok=True)
        assert rlhf("export", *words, "--output", str(target))[0] == 0
        assert same(weights(target), weights(tmp_path / "run"))
    assert rlhf("export", str(finished), "--checkpoint", "step-000001", "--output", str(tmp_path / "one"))[0] == 0
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "run"))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "one", "run"]  # nothing half-written


def test_what_was_exported_is_a_model_to_go_on_from(finished: Path, tmp_path: Path, rlhf: Rlhf) -> None:
    assert rlhf("export", str(finished), "--output", str(tmp_path / "plain"))[0] == 0
    words = ("run", "--algo", "sft", "--model", str(tmp_path / "plain"), "--mem", "lora,4bit", "--max-steps", "1",
             "--eval-rows", "0", "--track", "none", "--output", str(tmp_path / "next"))  # fmt: skip
    assert rlhf(*words)[0] == 0


def test_another_role(finished: Path, tmp_path: Path, rlhf: Rlhf) -> None:
    for i, words in enumerate([(str(finished), "--role", "value"), (str(finished / "model" / "value"),)]):
        code, _, err = rlhf("export", *words, "--dtype", "bfloat16", "--output", str(tmp_path / str(i)))
        assert code == 0, err
        assert "LlamaForSequenceClassification: 567,424 weights, bfloat16, 1.1 MB, adapters merged\n" in err
        assert {p.dtype for p in weights(tmp_path / str(i)).values()} == {torch.bfloat16}
    assert same(weights(tmp_path / "0"), weights(tmp_path / "1"))
    assert weights(tmp_path / "0")["score.weight"].abs().sum() > 0  # it starts at zero: this is the trained one


def test_a_model_of_no_run(finished: Path, tiny_model: Path, tmp_path: Path, rlhf: Rlhf) -> None:
    """An adapter that lies elsewhere is merged into the base that it names; what it was trained on nobody says."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (finished / "model").iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    assert rlhf("export", str(moved), "--output", str(tmp_path / "a"))[0] == 0
    assert rlhf("export", str(finished), "--output", str(tmp_path / "b"))[0] == 0
    ours, of_the_run = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert ours.keys() == of_the_run.keys() and not same(ours, of_the_run)
    assert rlhf("export", str(tiny_model), "--dtype", "float16", "--output", str(tmp_path / "c"))[0] == 0
    assert {p.dtype for p in weights(tmp_path / "c").values()} == {torch.float16}


def test_what_is_refused(finished: Path, tiny_model: Path, tmp_path: Path, rlhf: Rlhf) -> None:
    new = str(tmp_path / "new")
    half = tmp_path / "half"
    half.mkdir()
    (half / "plan.json").write_bytes((finished / "plan.json").read_bytes())
    refused = [
        ((str(finished), "--output", str(tmp_path)), "is there already"),
        ((str(finished), "--output", new, "--role", "reference"), "has trained no such model\n    it has policy"),
        ((str(finished), "--output", new, "--checkpoint", "step-9"), "it holds step-000001, step-000002"),
        ((str(tiny_model), "--output", new, "--role", "value"), "is no run"),
        ((str(tiny_model), "--output", new, "--checkpoint", "best"), "is no run"),
        ((str(half), "--output", new), "isn't finished, so it holds no model\n    finish it: rlhf run --resume"),
        ((str(tmp_path / "nowhere"), "--output", new), "there is no such folder"),
        ((str(finished), "--output", new, "--dtype", "int4"), "'int4' is not one of"),
        ((str(finished),), "--output"),
    ]  # fmt: skip
    for words, told in refused:
        code, _, err = rlhf("export", *words)
        assert code == 2 and told in err, words
        assert sorted(path.name for path in tmp_path.iterdir()) == ["half"]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("file/inside", "cannot be written: Not a directory"),
        ("file", "is there already"),
        ("dangling", "is there already"),
        ("x" * 300, "cannot be written: File name too long"),
        ("/proc/out", "cannot be written: No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_is_refused(
    output: str, told: str, tiny_model: Path, tmp_path: Path, rlhf: Rlhf
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    code, _, err = rlhf("export", str(tiny_model), "--output", str(tmp_path / output))
    assert code == 2 and told in err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_lies_beside_the_output_is_not_touched(tiny_model: Path, tmp_path: Path, rlhf: Rlhf) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.tex").write_text("mine")
    assert rlhf("export", str(tiny_model), "--output", str(tmp_path / "out"))[0] == 0
    assert (tmp_path / "out.part" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.part"]


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_disk_that_is_full_is_told(
    kind: Callable[[str], Exception], tiny_model: Path, tmp_path: Path, rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise kind("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    code, _, err = rlhf("export", str(tiny_model), "--output", str(tmp_path / "out"))
    assert code == 1 and err.endswith(f"error: {tmp_path / 'out'}: cannot be written: No space left on device\n")
    assert not list(tmp_path.iterdir())


def test_an_adapter_whose_base_has_gone(finished: Path, tmp_path: Path, rlhf: Rlhf) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    config = json.loads((finished / "model" / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/base"}))
    code, _, err = rlhf("export", str(moved), "--output", str(tmp_path / "out"))
    assert code == 2 and "is an adapter of /no/such/base, which can't be read" in err
