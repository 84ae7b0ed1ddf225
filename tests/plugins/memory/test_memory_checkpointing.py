"""Gradient checkpointing: the same gradients, for less kept and more computed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Gpu, Machine
from rlhf.interfaces import Context, HeadRequest, LoadSpec, MemoryStrategy
from rlhf.sequences import Sequences
from rlhf_plugins.memory import CheckpointingConfig
from rlhf_plugins.memory.checkpointing import Checkpointing
from rlhf_plugins.policies.hf import HFPolicy

Model = Callable[..., nn.Module]
Strategies = Callable[..., list[MemoryStrategy]]
Prepared = Callable[..., tuple[nn.Module, LoadSpec]]
SPEC = LoadSpec("policy", "some/model", "lm", True, "keep", "cpu")
LAYERS = 4


def wrap(module: nn.Module) -> nn.Module:
    return Checkpointing(CheckpointingConfig(), Context(None)).wrap(module, SPEC)  # type: ignore[arg-type]


def layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def step(module: nn.Module, ids: torch.Tensor, bf16: bool = False) -> tuple[dict[str, torch.Tensor], int, int]:
    """(gradients by name, bytes that autograd kept for the backward, forwards of layers' normalisation)."""
    kept, runs = [0], [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.numel() * tensor.element_size()
        return tensor

    def count(*_: Any) -> None:
        runs[0] += 1

    norms = [
        next(part for part in layer.modules() if "norm" in type(part).__name__.lower()) for layer in layers(module)
    ]
    handles = [norm.register_forward_hook(count) for norm in norms]
    module.zero_grad()
    cast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        loss = module(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[..., 3].sum()
    loss.backward()
    for handle in handles:
        handle.remove()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}, kept[0], runs[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_same_gradients_less_kept(family: str, make_model: Model, ids: torch.Tensor, bf16: bool) -> None:
    """In evaluation mode, where transformers' own switch is dead."""
    plain, plain_kept, plain_runs = step(make_model(family), ids, bf16)
    module = wrap(make_model(family))
    assert not module.training
    found, kept, runs = step(module, ids, bf16)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)  # the same operations: bit for bit
    assert (plain_runs, runs) == (LAYERS, 2 * LAYERS)
    assert kept < plain_kept / 3  # what is left is the head, and one input a layer


def test_with_adapters(
    family: str, folder: Callable[..., str], strategies: Strategies, prepared: Prepared, ids: torch.Tensor
) -> None:
    """The first layer's input has no gradient when only adapters are trained; theirs must not be lost for it."""
    path = folder(family)
    plain, plain_kept, _ = step(prepared(path, strategies("lora"))[0], ids)
    found, kept, runs = step(prepared(path, strategies("checkpointing", "lora"))[0], ids)
    assert len(plain) == 2 * LAYERS * (1 if family == "gpt2" else 2)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    assert runs == 2 * LAYERS
    assert kept < plain_kept / 2


def test_through_the_policy(
    folder: Callable[..., str], strategies: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    """Prompts shared in one row, heads in chunks, module put in evaluation mode before each forward."""
    prompt = torch.tensor([5, 6, 7, 8, 9, 10, 11])
    sequences = Sequences.of([prompt], [torch.tensor([8, 9]), torch.tensor([4, 3, 2])], prompt_of=[0, 0])
    gradients, path = [], folder("llama")
    for names in ((), ("checkpointing",)):
        module, _ = prepared(path, strategies(*names))
        policy.score(module, sequences, [HeadRequest("policy", "lm")])[0].logp.sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])  # type: ignore[arg-type]


def test_plain_forward_without_gradient(make_model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would be kept, so nothing (such as the RNG's state) is put aside to compute it again."""
    module = wrap(make_model("llama"))
    expected = make_model("llama")(input_ids=ids, use_cache=False).logits
    monkeypatch.setattr("rlhf_plugins.memory.checkpointing.checkpoint", None)
    with torch.no_grad():
        assert torch.equal(module(input_ids=ids, use_cache=False).logits, expected)
    with pytest.raises(TypeError):  # with a gradient it would have been called
        module(input_ids=ids, use_cache=False)


def test_a_cache_is_written_once(make_model: Model, ids: torch.Tensor) -> None:
    """A forward that fills a cache is not checkpointed, with gradient or without: run again, it would append twice."""
    plain: Any = make_model("llama")
    module: Any = wrap(make_model("llama"))
    out = module(input_ids=ids, use_cache=True)
    out.logits.sum().backward()
    assert out.past_key_values.get_seq_length() == ids.shape[1]
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(module.generate(ids, **greedy), plain.generate(ids, **greedy))


def test_a_copy_is_its_own(make_model: Model, ids: torch.Tensor) -> None:
    module = wrap(make_model("llama"))
    twin = copy.deepcopy(module)
    expected = module(input_ids=ids).logits
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(twin(input_ids=ids).logits, expected)


def test_layers_stay_what_they_were(make_model: Model) -> None:
    before = make_model("llama")
    kinds, names = [type(layer) for layer in layers(before)], [type(layer).__name__ for layer in layers(before)]
    weights = list(before.state_dict())
    after = wrap(before)
    assert [type(layer).__name__ for layer in layers(after)] == names
    assert all(isinstance(layer, kind) for layer, kind in zip(layers(after), kinds, strict=True))
    assert list(after.state_dict()) == weights


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(RequestError, match="can't checkpoint the layers of a Linear"):
        wrap(nn.Linear(2, 2))


def test_inputs_kept_on_the_host_give_the_same_gradients(make_model: Model, ids: torch.Tensor) -> None:
    """On a CPU they are copies in the same memory: what is kept goes through `save_on_cpu`, and comes back the same."""
    packed: list[torch.Size] = []

    class Counted(torch.autograd.graph.save_on_cpu):  # fake-host: the same, and counts
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: packed.append(tensor.shape) or pack(tensor)

    expected, _, _ = step(wrap(make_model("llama")), ids)
    module = Checkpointing(CheckpointingConfig(offload=True), Context(None)).wrap(make_model("llama"), SPEC)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
        found, _, _ = step(module, ids)
    assert set(found) == set(expected) and all(torch.equal(found[name], g) for name, g in expected.items())
    assert packed.count(torch.Size((3, 7, 32))) == LAYERS  # the states that enter each layer


def test_inputs_on_the_host_need_a_gpu(typed: Any, installed: Any, machine: Any) -> None:
    words = ("--algo", "sft", "--mem", "checkpointing", "--mem.checkpointing.offload", "true")
    with pytest.raises(RequestError, match="this machine has no GPU, so activations are in the host's memory anyway"):
        compose(typed(*words), installed, machine)
    gpu = Machine(2, frozenset(), 1 << 34, (Gpu("fake", 16 << 30, (8, 0)),), 1)
    assert compose(typed(*words), installed, gpu)
