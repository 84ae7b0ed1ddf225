"""One base for several roles: the numbers of modules of their own, whoever is asked between a forward and its backward,
and folders as each alone would leave them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from peft.utils import load_peft_weights
from torch import Tensor, nn

from rlhf.assemble import assemble
from rlhf.cli import main
from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Machine
from rlhf.interfaces import HeadRequest, LoadSpec
from rlhf.models import Models, weight_stream
from rlhf.parts import Parts
from rlhf.plan import Plan, resource
from rlhf.recipe import Recipe, from_file, from_mapping
from rlhf.registry import Registry, loaded
from rlhf.scoring import Scorer
from rlhf.sequences import Sequences
from rlhf_plugins.memory.adapters import active
from rlhf_plugins.policies.hf import HFPolicy

Typed = Callable[..., Recipe]
CPU = Machine(2, frozenset({"avx512_bf16"}), 8 << 30, (), 1)
RUN = ("--track", "none", "--eval-rows", "0", "--batch-size", "8")


def carry_out(*words: str) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return int(cast(Any, left.value.code))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    """The folder of a reward model that was trained by adapters on the tiny model."""
    run = tmp_path_factory.mktemp("judge") / "run"
    words = ("run", "--algo", "reward", "--model", str(tiny_model), "--mem", "fp32,lora", "--max-steps", "1", *RUN)
    assert carry_out(*words, "--optim.learning-rate", "0.01", "--output", str(run)) == 0
    return str(run / "model" / "reward")


def planned(tiny_model: Path, judge: str, mem: Any, **recipe: Any) -> Plan:
    content = {
        "algo": "ppo", "reward": "model", "roles": {"reward": {"model": judge}}, "model": str(tiny_model), "mem": mem,
        "max_steps": 1, "batch_size": 4, "eval_rows": 0, "engine": {"name": "hf", "max_new_tokens": 8}, **recipe,
    }  # fmt: skip
    content["data"] = [resource("rlhf_plugins.starter:data/prompts_train.jsonl")]
    return compose(from_mapping(content, "test"), loaded(), CPU)


def made(tiny_model: Path, judge: str, mem: Any, **recipe: Any) -> Parts:
    """With adapters that do something: those of separate and shared modules the same, by role and place."""
    parts = assemble(planned(tiny_model, judge, mem, **recipe), lambda text: None)
    for role, weights in by_role(parts.models).items():
        for place, weight in weights.items():
            generator = torch.Generator().manual_seed(sum(map(ord, role + place)))
            with torch.no_grad():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return parts


def by_role(models: Models) -> dict[str, dict[str, nn.Parameter]]:
    """The trained parameters, role -> place in the model -> parameter, whichever module they are in."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in models.trained.named_parameters():
        if not parameter.requires_grad:
            continue
        role = models.joined.get(name) or name.split(".")[1]
        place = name.replace(f".{role}.", ".").replace(".default.", ".").rpartition("base_model.model.")[2]
        place = "score" if place.startswith(("score", "heads.")) else place
        found.setdefault(role, {})[place] = parameter
    return found


SEQUENCES = Sequences.of(
    [torch.tensor([5, 6, 7]), torch.tensor([9])], [torch.tensor([8, 9, 10]), torch.tensor([20, 21])]
)


def gradients(parts: Parts, between: bool = False) -> dict[str, dict[str, Tensor]]:
    """Of a loss of policy and value together, by role and place. `between`: other roles score after the forward."""
    parts.models.trained.zero_grad(set_to_none=True)
    gradient = Scorer(parts.models, 10_000, gradient=True)
    policy, value = gradient.together(SEQUENCES, "policy", "value")
    loss = policy.logp.square().sum() + (value.values - 1).square().sum() * policy.logp.detach().mean()
    if between:
        for role in ("reference", "reward", "value", "policy"):
            parts.score(SEQUENCES, role)
    loss.backward()
    return {
        role: {place: cast(Tensor, p.grad).clone() for place, p in places.items() if p.grad is not None}
        for role, places in by_role(parts.models).items()
    }


@pytest.fixture(scope="module")
def separate(tiny_model: Path, judge: str) -> Iterator[Parts]:
    yield made(tiny_model, judge, "fp32,lora")


@pytest.fixture(scope="module")
def shared(tiny_model: Path, judge: str) -> Iterator[Parts]:
    yield made(tiny_model, judge, "fp32,lora,shared-base")


def test_four_roles_are_one_module(shared: Parts, separate: Parts) -> None:
    views = {role.name: (role.module, role.view) for role in shared.plan.roles}
    assert views == {
        "policy": ("policy", "own"),
        "reference": ("policy", "adapters-off"),
        "value": ("policy", "adapter"),
        "reward": ("policy", "adapter"),
    }
    assert list(shared.models.trained.bodies) == ["policy"] and not shared.models.frozen.bodies
    assert len(separate.models.trained.bodies) == 2 and len(separate.models.frozen.bodies) == 1
    body = shared.models.body("policy")
    whole = {id(p): p.numel() for p in body.parameters()}
    adapters = sum(p.numel() for n, p in body.named_parameters() if "lora_" in n)
    plain = sum(p.numel() for p in cast(PeftModel, separate.models.body("policy")).get_base_model().parameters())
    own = sum(p.numel() for n, p in separate.models.body("policy").named_parameters() if "lora_" in n)
    assert sum(whole.values()) == plain - own + adapters and adapters == 3 * own  # policy, value, reward


def test_scores_are_those_of_modules_of_their_own(shared: Parts, separate: Parts) -> None:
    for role, part in (("policy", "logp_"), ("reference", "logp_"), ("value", "values_"), ("reward", "score_")):
        one, other = (getattr(parts.score(SEQUENCES, role), part) for parts in (shared, separate))
        # float32; the reward's adapters are merged where it has a module of its own: log-probs of 1e1, rounded 1e-6
        torch.testing.assert_close(one, other, atol=2e-5 if role == "reward" else 0, rtol=0)
    policy, reference = (shared.score(SEQUENCES, role).logp for role in ("policy", "reference"))
    assert (policy - reference).abs().max() > 1e-2  # the adapters do something


def test_a_forward_is_kept_for_the_loss_of_roles_alone_on_their_module(shared: Parts, separate: Parts) -> None:
    assert separate.models.apart(["policy", "value"])
    for roles in (["policy"], ["value"], ["policy", "value"], ["reward"], ["reference"]):
        assert not shared.models.apart(roles)
    assert not separate.models.apart(["policy", "reward"])


@pytest.mark.parametrize("mem", ["fp32,lora,shared-base", "fp32,lora,shared-base,checkpointing"])
@pytest.mark.parametrize("between", [False, True])
def test_gradients_are_those_of_four_copies(
    tiny_model: Path, judge: str, separate: Parts, mem: str, between: bool
) -> None:
    """Exact: the same products in the same order. Also where other roles were asked between forward and backward, in
    which gradient checkpointing computes the forward again."""
    expected = gradients(separate)
    found = gradients(made(tiny_model, judge, mem), between)
    assert {role: set(places) for role, places in found.items()} == {r: set(p) for r, p in expected.items()}
    for role, places in expected.items():
        assert len(places) >= 8
        for place, gradient in places.items():
            assert gradient.abs().sum() > 0, (role, place)
            assert torch.equal(found[role][place], gradient), (role, place)


def test_what_is_trained_never_changes(shared: Parts) -> None:
    """PEFT's own switches do change it, and with it, silently, the gradient."""

    def flags() -> dict[str, bool]:
        return {name: p.requires_grad for name, p in shared.models.trained.named_parameters()}

    before = flags()
    assert {name for name, on in before.items() if on and "lora_" in name and ".reward." in name} == set()
    for role in ("policy", "reference", "value", "reward"):
        shared.score(SEQUENCES, role)
        assert flags() == before
    module = cast(PeftModel, shared.models.body("policy"))
    policy = Scorer(shared.models, 10_000, gradient=True)(SEQUENCES, "policy").logp
    module.set_adapter("value")
    try:
        policy.sum().backward()
        assert all(p.grad is None or not p.grad.abs().sum() for n, p in module.named_parameters() if ".default." in n)
    finally:
        shared.models.trained.zero_grad(set_to_none=True)
        module.set_adapter("default")
        for name, parameter in shared.models.trained.named_parameters():
            parameter.requires_grad_(before[name])


def test_between_forwards_the_policys_adapters_are_on(shared: Parts) -> None:
    """An engine that samples from the module calls it as it is."""
    module: Any = shared.models.body("policy")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = module(input_ids=ids).logits
        for role in ("reference", "value", "reward"):
            shared.score(SEQUENCES, role)
        assert torch.equal(module(input_ids=ids).logits, before)
        with active(module, ("default",)):
            assert torch.equal(module(input_ids=ids).logits, before)
        with pytest.raises(ValueError), active(module, ("value",)):
            raise ValueError  # a forward that fails
        assert torch.equal(module(input_ids=ids).logits, before)


def test_an_engine_is_given_the_policys_weights_alone(shared: Parts) -> None:
    names = [name for name, _ in weight_stream(shared.models, "policy")()]
    assert any(".default." in name for name in names)
    assert not any(".value." in name or ".reward." in name for name in names)
    asked: list[str] = []
    adapters = [name for name, _ in weight_stream(shared.models, "policy")(lambda x: asked.append(x) or ".lora_" in x)]  # type: ignore[func-returns-value]
    assert adapters == [name for name in names if ".lora_" in name]
    assert asked == names  # what isn't the policy's isn't even offered


def test_the_floor_counts_a_roles_own_adapters(shared: Parts, separate: Parts) -> None:
    for role in ("policy", "value"):
        one, other = (parts.models.shape(role)[1] for parts in (shared, separate))
        assert one is not None and other is not None
        assert (one.trunk, one.trunk_trained, one.attention) == (other.trunk, other.trunk_trained, other.attention)


@pytest.mark.parametrize("mem", ["bf16,lora,shared-base", "fp32,lora,4bit,shared-base", "fp32,lora,8bit,shared-base"])
def test_on_a_base_of_fewer_bits(tiny_model: Path, judge: str, mem: str) -> None:
    """Gradients of each role are those of its module of its own, with the same base."""
    expected = gradients(made(tiny_model, judge, mem.replace(",shared-base", ""), reward="answer", roles={}))
    found = gradients(made(tiny_model, judge, mem, reward="answer", roles={}))
    for role, places in expected.items():
        assert set(found[role]) == set(places) and all(g.abs().sum() > 0 for g in places.values())
        assert all(torch.equal(found[role][place], gradient) for place, gradient in places.items())


@pytest.mark.parametrize(
    "options",
    [{"targets": ["all-linear"], "dora": True}, {"rank": 4, "rslora": True, "targets": ["q_proj", "up_proj"]}],
)
def test_with_other_adapters(tiny_model: Path, judge: str, options: dict[str, Any]) -> None:
    def mem(*more: str) -> list[Any]:
        return ["fp32", {"name": "lora", **options}, *more]

    expected = gradients(made(tiny_model, judge, mem(), reward="answer", roles={}))
    found = gradients(made(tiny_model, judge, mem("shared-base"), reward="answer", roles={}))
    for role, places in expected.items():
        assert set(found[role]) == set(places) and len(places) >= 8
        for place, gradient in places.items():
            # DoRA's norms of a matrix are sums in float32 that are made again: of order 1, rounded 1e-7 a time
            torch.testing.assert_close(found[role][place], gradient, atol=0, rtol=1e-5)


# What is saved


def test_each_role_is_saved_as_if_it_had_been_alone(shared: Parts, separate: Parts, tmp_path: Path) -> None:
    shared.models.save(tmp_path / "shared")
    separate.models.save(tmp_path / "separate")
    policy = cast(HFPolicy, shared.models.policy)
    for place in ("", "value"):
        one, other = (tmp_path / way / place for way in ("shared", "separate"))
        ours, theirs = load_peft_weights(str(one), device="cpu"), load_peft_weights(str(other), device="cpu")
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
        config, expected = (json.loads((at / "adapter_config.json").read_text()) for at in (one, other))
        for key in ("base_model_name_or_path", "task_type", "r", "lora_alpha", "inference_mode", "modules_to_save"):
            assert config[key] == expected[key], key
        assert set(config["target_modules"]) == set(expected["target_modules"])
    again = policy.load(LoadSpec("value", str(tmp_path / "shared" / "value"), "scalar", False, "keep", "cpu"))
    (loaded_again,) = policy.score(again, SEQUENCES, [HeadRequest("value", "scalar")])
    # merged into float32 weights
    torch.testing.assert_close(loaded_again.values_, shared.score(SEQUENCES, "value").values, atol=2e-5, rtol=0)


def run(*words: str) -> int:
    return carry_out("run", "--algo", "ppo", "--mem", "fp32,lora,shared-base", *RUN, *words)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("time", "perf", "memory")
    return [{k: v for k, v in row.items() if k.split("/")[0] not in machine} for row in found]


def test_it_resumes_to_the_bit_and_is_exported(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run("--max-steps", "3", "--output", str(whole)) == 0
    assert run("--max-steps", "2", "--output", str(halves)) == 0
    assert run("--max-steps", "3", "--output", str(halves), "--resume") == 0
    assert rows(whole) == rows(halves) and len(rows(whole)) == 3
    for place in ("model", "model/value"):
        ours, theirs = (load_peft_weights(str(way / place), device="cpu") for way in (whole, halves))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for words in (("--role", "value"), ("--role", "value", "--checkpoint", "step-000003")):
        assert carry_out("export", str(whole), *words, "--output", str(tmp_path / words[-1])) == 0
    config = json.loads((tmp_path / "value" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again = compose(from_file(whole / "recipe.yaml"), loaded(), CPU)
    assert {role.name: role.view for role in again.roles}["value"] == "adapter"


def test_a_value_model_may_start_from_the_reward_models_adapters(tiny_model: Path, judge: str) -> None:
    """It goes on with them, head and all."""
    roles = {"reward": {"model": judge}, "value": {"model": judge}}
    parts = assemble(planned(tiny_model, judge, "fp32,lora,shared-base", roles=roles), lambda text: None)
    value, reward = (parts.score(SEQUENCES, role) for role in ("value", "reward"))
    assert torch.equal(cast(Tensor, value.score_), reward.score)
    trained = by_role(parts.models)["value"]
    assert "score" in trained and len(trained) > 8 and not by_role(parts.models).get("reward")


# Plans


def test_shared_base_asks_for_what_it_needs(
    typed: Typed, installed: Registry, tiny_model: Path, judge: str, tmp_path: Path
) -> None:
    def refused(*words: str) -> dict[str, str]:
        with pytest.raises(RequestError) as error:
            compose(typed("--algo", "ppo", *words), installed, CPU)
        return {problem.what: problem.fix for problem in error.value.problems}

    def said(found: dict[str, str], what: str, fix: str) -> None:
        assert any(what in w and fix in f for w, f in found.items()), found

    said(refused("--mem", "shared-base"), "the role value is trained whole", "--mem lora,shared-base")
    said(refused("--mem", "lora,shared-base", "--algo.value-model", "shared"), "would do nothing", "leave it out")
    said(
        refused("--mem", "policy=lora", "--mem", "reference=shared-base"),
        "no trained role lends its base to reference", "--mem lora,shared-base",
    )  # fmt: skip
    each = ("--mem", "value=lora,fp32,shared-base", "--mem", "policy=lora,bf16,shared-base")
    said(
        refused(*each),
        "--mem value=fp32: value is adapters on policy's base, which has none", "--mem value=fp32,lora",
    )  # fmt: skip
    whole = tmp_path / "whole"
    assert carry_out("export", judge, "--output", str(whole)) == 0
    judged = ("--mem", "fp32,lora,shared-base", "--reward", "model", "--model", f"reward={whole}")
    base = ("--model", str(tiny_model))
    said(refused(*judged, *base), f"{whole} (role reward) is a whole model of its own", "--mem reward=fp32")
    compose(typed("--algo", "ppo", *judged, *base, "--mem", "reward=fp32"), installed, CPU)  # as the fix says
    adapters = (*judged[:-1], f"reward={judge}")
    said(refused(*adapters), "is adapters of ", "--mem reward=fp32")  # of another base: the starter's own folder
    said(refused(*judged[:2], "--model", judge), f"{judge} is adapters already", f"rlhf export {judge}")
