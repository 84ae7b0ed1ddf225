"""Loading accounts for every weight; saving gives back what was loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf.errors import RequestError
from rlhf.interfaces import HeadRequest
from rlhf.sequences import Sequences
from rlhf_plugins.policies.export import export


def edit_weights(folder: str, drop: str = "", add: str = "") -> None:
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    if drop:
        del weights[drop]
    if add:
        weights[add] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_weight_that_is_missing_is_named(folder: Any, policy: Any, spec: Any) -> None:
    place = folder("llama")
    edit_weights(place, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(RequestError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        policy().load(spec(place))


@pytest.mark.parametrize(("head", "kind"), [("lm", "CausalLM"), ("scalar", "SequenceClassification")])
def test_a_weight_that_has_no_place_is_named(head: str, kind: str, folder: Any, policy: Any, spec: Any) -> None:
    place = folder("llama")
    edit_weights(place, add="model.extra.weight")
    with pytest.raises(RequestError, match=rf"has model\.extra\.weight, which a LlamaFor{kind} hasn't"):
        policy().load(spec(place, head, head_init="zero"))


def test_a_reward_model_is_no_language_model(folder: Any, policy: Any, spec: Any) -> None:
    with pytest.raises(RequestError, match=r"lacks lm_head\.weight and has score\.weight"):
        policy().load(spec(folder("llama", "scalar")))


def test_a_scalar_head_is_kept_started_or_asked_for(folder: Any, policy: Any, spec: Any) -> None:
    hf, lm = policy(), folder("llama")
    trained = hf.load(spec(folder("llama", "scalar"), "scalar", head_init="zero"))
    assert trained.score.weight.any()  # the checkpoint has one: the start asked for is not its
    with pytest.raises(RequestError, match="no scalar head"):
        hf.load(spec(lm, "scalar", role="reward"))
    assert not hf.load(spec(lm, "scalar", head_init="zero")).score.weight.any()
    before = torch.random.get_rng_state()
    one, again, other = (hf.load(spec(lm, "scalar", head_init="normal", seed=s)).score.weight for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("given", ["empty", "file"])
def test_what_is_no_model_is_refused(given: str, tmp_path: Path, policy: Any, spec: Any) -> None:
    place = tmp_path / given
    if given == "empty":
        place.mkdir()
    else:
        place.write_text("hello")
    with pytest.raises(RequestError, match="can't be loaded"):
        policy().load(spec(str(place)))


def cut(place: Path) -> None:
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def short(place: Path) -> None:
    weights = load_file(place / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:3].contiguous()
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


def says(**changed: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, **changed}))

    return change


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"can't be loaded: .*deserializing header"),
        (lambda place: (place / "model.safetensors").write_bytes(b""), r"can't be loaded: .*header too small"),
        (short, r"has weights of another shape: model\.embed_tokens\.weight \[3, 32\], not \[41, 32\]"),
        (says(hidden_size="x"), r"can't be loaded: .*'hidden_size': TypeError: .*expected int, got str"),
        (says(vocab_size=None), r"can't be loaded: .*'vocab_size'"),
        (says(num_attention_heads=0), r"can't be loaded: ZeroDivisionError: "),
        (says(model_type=[]), r"can't be loaded: TypeError: unhashable"),
    ],
)
def test_a_damaged_model_is_refused_with_the_reason(
    damage: Callable[[Path], None], told: str, folder: Any, policy: Any, spec: Any, tmp_path: Path
) -> None:
    place = Path(folder("llama"))
    damage(place)
    with pytest.raises(RequestError, match=told) as caught:
        policy().load(spec(str(place)))
    assert str(caught.value).startswith(f"--model {place}: ") and len(caught.value.problems[0].what.splitlines()) == 1
    with pytest.raises(RequestError, match=told):
        export(spec(str(place)), tmp_path / "out", None)
    with contextlib.suppress(RequestError):  # and with nothing else: a tokenizer is read by the config too
        policy().codec(str(place))


@pytest.mark.parametrize("damage", ["gone", "cut", "shape"])
def test_a_damaged_adapter_is_refused_with_the_reason(
    damage: str, folder: Any, policy: Any, spec: Any, tmp_path: Path
) -> None:
    hf, given, place = policy(), spec(folder("llama")), tmp_path / "adapter"
    hf.save(adapted(hf.load(given), seed=1), place, given)
    file = place / "adapter_model.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:
        save_file({name: w[:1].contiguous() for name, w in load_file(file).items()}, file)
    for head in ("lm", "scalar"):
        with pytest.raises(RequestError, match=rf"--model {place}: can't be loaded: \w+"):
            hf.load(spec(str(place), head, head_init="zero"))


def test_pickled_weights_are_never_read(folder: Any, policy: Any, spec: Any) -> None:
    place = Path(folder("llama"))
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="can't be loaded"):
        policy().load(spec(str(place)))


def test_weights_and_gradients_are_as_asked_for(folder: Any, policy: Any, spec: Any) -> None:
    hf, place = policy(), folder("llama")
    frozen = hf.load(spec(place, trainable=False, weights=torch.bfloat16))
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = hf.load(spec(place))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in trained.parameters()) and not trained.training


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_saved_model_scores_the_same(
    head: Any, folder: Any, policy: Any, spec: Any, ragged: Sequences, tmp_path: Path
) -> None:
    hf, asked = policy(), [HeadRequest("policy", head)]
    given = spec(folder("llama"), head, head_init="normal")
    module = hf.load(given)
    hf.save(module, tmp_path / "saved", given)
    again = hf.load(spec(str(tmp_path / "saved"), head))
    (one,), (other,) = hf.score(module, ragged, asked), hf.score(again, ragged, asked)
    assert torch.equal(one.logp if head == "lm" else one.score, other.logp if head == "lm" else other.score)
    assert hf.codec(str(tmp_path / "saved")).prompt("abc").tolist() == hf.codec(given.model).prompt("abc").tolist()
    assert not list((tmp_path / "saved").glob("*.bin"))


def adapted(module: Any, seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **more))


def test_an_adapter_is_merged_into_its_base(
    folder: Any, policy: Any, spec: Any, ragged: Sequences, tmp_path: Path
) -> None:
    hf, given = policy(), spec(folder("llama"))
    module = adapted(hf.load(given), seed=1)
    hf.save(module, tmp_path / "adapter", given)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    merged = hf.load(spec(str(tmp_path / "adapter")))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    (one,), (other,) = (hf.score(m, ragged, [HeadRequest("policy", "lm")]) for m in (module, merged))
    torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=1e-5)  # x W + x A B against x (W + A B), float32


def test_adapters_on_a_merged_adapter_are_saved_as_a_whole_model(
    folder: Any, policy: Any, spec: Any, ragged: Sequences, tmp_path: Path
) -> None:
    """Its PEFT folder would name the first base, and lose the first adapter."""
    hf, given = policy(), spec(folder("llama"))
    hf.save(adapted(hf.load(given), seed=1), tmp_path / "first", given)
    second = spec(str(tmp_path / "first"))
    module = adapted(hf.load(second), seed=2)
    hf.save(module, tmp_path / "second", second)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["model_type"] == "llama"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    (kept,), (saved,) = (hf.score(m, ragged, [HeadRequest("policy", "lm")]) for m in (module, plain))
    torch.testing.assert_close(kept.logp, saved.logp, rtol=0, atol=1e-5)  # float32, merged as above


def test_an_adapter_with_a_scalar_head_brings_it(
    folder: Any, policy: Any, spec: Any, ragged: Sequences, tmp_path: Path
) -> None:
    hf, given = policy(), spec(folder("llama"), "scalar", head_init="normal")
    module = adapted(hf.load(given), seed=1, task_type="SEQ_CLS")
    hf.save(module, tmp_path / "reward", given)
    merged = hf.load(spec(str(tmp_path / "reward"), "scalar"))
    (one,), (other,) = (hf.score(m, ragged, [HeadRequest("reward", "scalar")]) for m in (module, merged))
    torch.testing.assert_close(one.score, other.score, rtol=0, atol=1e-5)
    assert one.score.abs().max() > 1e-2


def test_a_language_models_adapter_serves_under_a_scalar_head(
    folder: Any, policy: Any, spec: Any, ragged: Sequences, tmp_path: Path
) -> None:
    hf, given = policy(), spec(folder("llama"))
    module = adapted(hf.load(given), seed=1, task_type="CAUSAL_LM")
    hf.save(module, tmp_path / "tuned", given)
    reward = hf.load(spec(str(tmp_path / "tuned"), "scalar", head_init="normal", seed=3))
    head = hf.add_scalar_head(module, "value", "normal", seed=3)  # the same draws, and a bias of 0
    (one,) = hf.score(reward, ragged, [HeadRequest("reward", "scalar")])
    (other,) = hf.score(module, ragged, [HeadRequest("value", "scalar", head)])
    torch.testing.assert_close(one.score, other.score, rtol=0, atol=1e-5)  # float32, merged as above
