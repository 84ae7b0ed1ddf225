"""What entries declare, against the tensors that are really made: weights, gradients, optimiser state, and what
autograd keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from needs import ADAMW8BIT, FSDP2
from rlhf.api import Weight
from rlhf.assemble import make
from rlhf.compose import compose
from rlhf.interfaces import Context
from rlhf.models import Models, build
from rlhf.plan import Plan, resource
from rlhf.planning.footprint import ForwardBatch
from rlhf.planning.memory import Lengths, modules, optimizer_bytes
from rlhf.planning.phases import predict
from rlhf.recipe import Recipe
from rlhf.registry import Registry
from rlhf.scores import ScoreRequest
from rlhf.sequences import Sequences
from rlhf_plugins.memory.footprint import by_architecture

Typed = Callable[..., Recipe]
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=300, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=300, n_positions=64),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with random weights, by type."""
    found = {}
    for name, config in CONFIGS.items():
        found[name] = tmp_path_factory.mktemp("models") / name
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(found[name])
        for file in Path(resource("rlhf_plugins.starter:model")).iterdir():
            if file.name.startswith("tokenizer"):
                shutil.copy(file, found[name])
    return found


@pytest.fixture
def built(folders: dict[str, Path], typed: Typed, installed: Registry, machine: Any) -> Callable[..., Any]:
    """(plan, models) of a command line."""

    def make_models(model: str, *words: str) -> tuple[Plan, Models]:
        plan = compose(typed("--model", str(folders[model]), *words), installed, machine)
        context = Context(plan=plan)
        backend = make(plan.backend, context)
        context.world, context.device = backend.world, "cpu"
        policy = make(plan.policy, context)
        context.policy = policy
        return plan, build(plan, policy, backend, make(plan.optim, context), context)

    return make_models


def held(*containers: nn.Module) -> int:
    """Bytes of weights, with what bitsandbytes keeps beside a packed one: block magnitudes, or a scale a row."""
    found: list[torch.Tensor] = []
    for part in (part for container in containers for part in container.modules()):
        own = list(part.parameters(recurse=False))
        found += [parameter.data for parameter in own]
        for state in filter(None, (getattr(parameter, "quant_state", None) for parameter in own)):
            found += [state.absmax, state.code, *((state.offset, state.state2.absmax) if state.nested else ())]
        scales = [getattr(holder, "SCB", None) for holder in (*own, getattr(part, "state", None))]
        found += [scale for scale in scales if scale is not None]
    return nbytes(found)


def nbytes(found: Iterable[torch.Tensor]) -> int:
    """Of their storages, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}.values())


STRATEGIES = [
    "fp32", "bf16", "fp32,lora", "bf16,lora", "bf16,lora,4bit", "fp32,lora,4bit", "bf16,lora,8bit",
    "bf16,checkpointing", "fp16", "fp16,lora", "bf16,ema,lora",
]  # fmt: skip


@pytest.mark.parametrize("mem", STRATEGIES)
@pytest.mark.parametrize("algo", ["sft", "reward", "ppo"])
def test_weights_are_exact(built: Any, algo: str, mem: str) -> None:
    plan, models = built("llama", "--algo", algo, "--mem", mem)
    real = held(models.trained, models.frozen)
    found = predict(plan, Lengths(prompt=8, response=8))
    assert sum(role.weights for role in found.roles) == real
    trained = sum(p.numel() for p in models.trained.parameters() if p.requires_grad)
    assert sum(role.trained for role in found.roles) == trained
    assert sum(role.gradients for role in found.roles) == 4 * trained  # float32 all of them


@pytest.mark.parametrize("mem", ["fp32,lora,shared-base", "bf16,lora,shared-base", "bf16,lora,4bit,shared-base"])
def test_who_joins_a_base_adds_adapters_and_a_head(built: Any, mem: str) -> None:
    plan, models = built("llama", "--algo", "ppo", "--mem", mem)
    found = predict(plan, Lengths(prompt=8, response=8))
    assert sum(role.weights for role in found.roles) == held(models.trained, models.frozen)
    policy, reference, value = found.roles
    joined = sum(
        p.numel() for n, p in models.trained.named_parameters() if n in models.joined or n.startswith("heads.")
    )
    assert (value.parameters, value.trained, value.module) == (joined, joined, "policy")
    assert reference.parameters == 0
    assert policy.trained + value.trained == sum(p.numel() for p in models.trained.parameters() if p.requires_grad)


def test_who_brings_adapters_of_its_own_has_those_of_its_folder(
    built: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    saved = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type=TaskType.CAUSAL_LM)
    get_peft_model(base, saved).save_pretrained(tmp_path / "reference")
    words = ("--mem", "bf16,lora,shared-base", "--model", f"reference={tmp_path / 'reference'}")
    plan, models = built("llama", "--algo", "dpo", *words)
    assert plan.role("reference").view == "adapter"
    found = predict(plan, Lengths(prompt=8, response=8))
    assert sum(role.weights for role in found.roles) == held(models.trained, models.frozen)
    reference = found.roles[1]
    # two layers; q_proj is 128 x 128, down_proj 128 x 192
    assert (reference.parameters, reference.trained) == (2 * 3 * (128 + 128 + 128 + 192), 0)


def test_offloaded_weights_are_there_while_they_score(built: Any) -> None:
    plan, models = built("llama", "--algo", "dpo", "--mem", "fp32", "--mem", "reference=fp32,offload")
    found = predict(plan, Lengths(prompt=8, response=8))
    phases = {phase.phase: phase.device["weights"] for phase in found.phases}
    policy, reference = found.roles
    assert phases["update"] == policy.weights == held(models.trained)
    assert held(models.frozen) == 0
    with models.visiting(["reference"]):
        assert phases["experience"] - policy.weights == reference.weights == held(models.frozen)


@pytest.mark.parametrize(
    "words",
    [
        ("--mem.4bit.double-quant", "false", "--mem", "bf16,lora,4bit"),
        ("--mem", "bf16,lora", "--mem.lora.targets", "all-linear", "--mem.lora.rank", "5"),
        ("--mem", "bf16,lora", "--mem.lora.targets", "q_proj,down_proj", "--mem.lora.dora", "true"),
        ("--mem", "fp32,lora,8bit", "--mem.lora.dora", "true"),
    ],
)
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_options_are_counted(built: Any, model: str, words: tuple[str, ...]) -> None:
    plan, models = built(model, "--algo", "sft", *words)
    real = held(models.trained)
    assert sum(role.weights for role in predict(plan).roles) == real


@pytest.mark.parametrize("mem", ["fp32", "bf16,lora"])
def test_gpt2_is_counted_though_its_matrices_are_of_another_class(built: Any, mem: str) -> None:
    plan, models = built("gpt2", "--algo", "sft", "--mem", mem)
    assert sum(role.weights for role in predict(plan).roles) == held(models.trained)


@pytest.mark.parametrize("optim", ["adamw", pytest.param("adamw8bit", marks=ADAMW8BIT)])
@pytest.mark.parametrize("mem", ["fp32", "bf16,lora"])
def test_optimiser_state_is_exact(built: Any, optim: str, mem: str) -> None:
    plan, models = built("llama", "--algo", "sft", "--mem", mem, "--optim", optim)
    parameters = [p for p in models.trained.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    models.backend.update(1.0)
    states = models.backend._steps.optimizer.state  # type: ignore[attr-defined]
    shared = {"qmap1", "qmap2"}  # one table for all tensors
    real = nbytes(
        x for p in parameters for name, x in states[p].items() if isinstance(x, torch.Tensor) and name not in shared
    )
    assert sum(role.optimizer for role in predict(plan).roles) == real


@ADAMW8BIT
def test_small_tensors_keep_float32_moments(built: Any) -> None:
    plan, _ = built("llama", "--algo", "sft", "--optim", "adamw8bit")
    small = Weight(name="w", shape=(64, 63), kind="linear", count=2)  # 4032 weights, below min_size
    large = Weight(name="w", shape=(64, 64), kind="linear")  # 4096 weights: 2 x 4096, and 2 x 16 blocks x 4 bytes
    assert optimizer_bytes(plan, small) == 2 * 8 * 4032
    assert optimizer_bytes(plan, large) == 2 * 4096 + 2 * 16 * 4


@pytest.mark.parametrize("mem", [m for m in STRATEGIES if "checkpointing" not in m])
def test_what_autograd_keeps_of_a_layer_is_exact(built: Any, mem: str) -> None:
    """The difference between two batch sizes, which leaves what doesn't grow with tokens out."""
    plan, models = built("llama", "--algo", "sft", "--mem", mem)
    told, kept = growth(plan, models)
    # rotary tables, indices and masks are no part of it: some bytes a token, of thousands
    assert told == pytest.approx(kept, rel=0.03)


def test_a_magnitude_a_row_keeps_what_it_scales(built: Any) -> None:
    """DoRA multiplies what comes out of the matrix, and out of the adapter, by a number that is learnt."""
    words = ("--mem", "bf16,lora", "--mem.lora.dora", "true", "--mem.lora.targets", "all-linear")
    plan, models = built("llama", "--algo", "sft", *words)
    told, kept = growth(plan, models)
    assert told == pytest.approx(kept, rel=0.03)


def test_checkpointing_keeps_the_layers_inputs(built: Any) -> None:
    plan, models = built("llama", "--algo", "sft", "--mem", "fp32,checkpointing")
    told, kept = growth(plan, models)
    # what the two layers keep is 2 x 128 floats a token; ends and states are about as much again here
    assert told == pytest.approx(kept, rel=0.15)


def growth(plan: Plan, models: Models) -> tuple[float, int]:
    """Bytes that the forward of 8 rows of 16 tokens keeps beyond that of 4: (as told, as it is)."""
    module = modules(plan).modules["policy"]
    entry: Any = plan.policy.entry

    def told(rows: int) -> float:
        batch = ForwardBatch(rows=rows, prompt=8, response=8, gradient=True)
        found: float = entry.footprint(module, batch, plan, plan.policy).kept
        return found

    return told(8) - told(4), saved(models, 8, tokens=16) - saved(models, 4, tokens=16)


def saved(models: Models, rows: int, tokens: int) -> int:
    """Bytes that the forward keeps for the backward, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in models.trained.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no other takes its place
        return x

    half = tokens // 2
    sequences = Sequences.of(
        [torch.randint(0, 300, (half,)) for _ in range(rows)],
        [torch.randint(0, 300, (half,)) for _ in range(rows)],
        prompt_of=list(range(rows)),
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        (scores,) = models.forward([ScoreRequest("policy", sequences, 1.0, False)])
    for node in graph(scores.logp.grad_fn):
        kept = getattr(node, "A", None)  # bitsandbytes' int8 product keeps its input there, unseen by hooks
        if isinstance(kept, torch.Tensor):
            pack(kept)
    return sum(storage.nbytes() for storage in found.values())


def graph(last: Any) -> set[Any]:
    """The nodes of a graph."""
    found, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return found


def test_targets_are_those_that_peft_chooses() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOSEN

    assert {kind: tuple(names) for kind, names in CHOSEN.items()} == {kind: by_architecture(kind) for kind in CHOSEN}
    assert by_architecture("of-no-such-type") == ("all-linear",)


# What is spread over ranks: counted from the plan; tests/distributed counts what ranks really hold


@pytest.mark.parametrize(
    ("words", "weights", "gradients", "optimizer", "masters"),
    [
        (("--backend", "ddp"), 1, 1, 1, None),
        pytest.param(("--backend", "fsdp2"), 3, 3, 3, None, marks=FSDP2),
        (("--mem", "fp32,zero1"), 1, 1, 3, 3),
        (("--mem", "fp32,zero2"), 1, 3, 3, 3),
        (("--mem", "fp32,zero3"), 3, 3, 3, 3),
        (("--mem", "fp32,zero2", "--mem.zero2.offload", "optimizer"), 1, 3, 3, 3),
    ],
)
def test_what_ranks_share(
    folders: Any, typed: Typed, installed: Registry, machine: Any, words: tuple[str, ...], weights: int, gradients: int,
    optimizer: int, masters: int | None,
) -> None:  # fmt: skip
    common = ("--model", str(folders["llama"]), "--algo", "sft", "--mem", "fp32")
    alone = modules(compose(typed(*common), installed, machine)).modules["policy"]
    found = modules(compose(typed(*common, "--nproc", "3", *words), installed, machine)).modules["policy"]
    whole = sum(weight.numbers for weight in alone.trained)
    assert whole == sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIGS["llama"]).parameters())
    assert [found.over("weights"), found.over("gradients"), found.over("optimizer")] == [weights, gradients, optimizer]
    # this model is less than ddp's bucket of 25 MiB and than zero's of 50 million numbers
    spread = {} if masters is None else {"masters": 4 * whole / masters, "gradients in one piece": 4 * whole / masters}
    bucket = {"gaps that whole gradients leave" if "fsdp2" in words else "bucket": 4 * whole}
    if "--mem.zero2.offload" in words:  # the host's part; two places for the largest gradient; a copy of own weights
        largest = 4 * max(weight.numel for weight in alone.trained)
        spread = {f"host {name}": size for name, size in spread.items()} | {"a gradient on its way": largest}
        spread |= {"host gradient on its way": largest, "host weights on their way": 4 * whole / 3}
    stage = next((word[-1] for word in words if word.startswith("fp32,zero")), "")
    third = {"bucket, added up": 4 * whole, "gaps that whole layers leave": whole}
    own = {"3": third, "": {}}.get(stage, {"gathered": 4 * whole})
    assert found.copies == pytest.approx({**spread, **bucket, **own})
    assert found.host == ({"optimizer"} if "--mem.zero2.offload" in words else frozenset())
