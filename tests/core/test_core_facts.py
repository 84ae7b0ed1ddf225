"""Facts of models and machines, read without torch: what each folder, path and hub id is taken for."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf import facts
from rlhf.compose import compose
from rlhf.errors import Problem
from rlhf.facts import Gpu, Machine, ModelFacts
from rlhf.plan import plan_from_json
from rlhf.planning.devices import planned_machine
from rlhf.recipe import Recipe
from rlhf.registry import loaded


def folder(path: Path, **content: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (path / f"{name}.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def found(path: Path | str, role: str = "") -> ModelFacts:
    made = facts.model(str(path), role)
    assert isinstance(made, ModelFacts), made
    return made


def test_facts_of_a_folder(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = found(tiny_model)
    assert made.known
    assert made.architecture.endswith("ForCausalLM")
    assert made.context is not None
    monkeypatch.chdir(tiny_model.parent)
    assert found(tiny_model.name) == made  # absolute, whatever was typed


def test_facts_of_nested_configs(tmp_path: Path) -> None:
    made = found(folder(tmp_path, config={"text_config": {"max_position_embeddings": 64}, "vocab_size": 9}))
    assert (made.context, made.get("vocab_size", "no"), made.get("no")) == (64, 9, None)


@pytest.mark.parametrize("value", ["x", [], math.inf])
def test_a_config_of_nonsense_names_no_context_and_no_architecture(tmp_path: Path, value: Any) -> None:
    made = found(folder(tmp_path, config={"max_position_embeddings": value, "architectures": 5}))
    assert (made.context, made.architecture) == (None, "")


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    made = folder(tmp_path, config={"vocab_size": 3})
    assert found(made).known  # a config.json alone can be planned for
    weights = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    folder(tmp_path, **{"model.safetensors.index": {"weight_map": weights}})
    (tmp_path / "one.safetensors").touch()
    problem = facts.model(str(tmp_path))
    assert isinstance(problem, Problem)
    assert problem.what.endswith("lacks two.safetensors, which its model.safetensors.index.json names")
    (tmp_path / "model.safetensors").touch()  # read before any index
    assert found(made).known
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "two.safetensors").touch()
    assert found(made).known


def test_a_run_is_resolved_to_the_role_asked_for(tmp_path: Path) -> None:
    folder(tmp_path / "model", config={"n": 1})
    folder(tmp_path / "model" / "value", config={"n": 2})
    assert found(tmp_path, "policy").path == str(tmp_path / "model")
    assert found(tmp_path, "value").path == str(tmp_path / "model" / "value")
    assert found(tmp_path).path == str(tmp_path / "model")


def test_a_run_of_one_role_of_another_name(tmp_path: Path) -> None:
    folder(tmp_path / "model" / "reward", adapter_config={"base_model_name_or_path": "org/base"})
    assert found(tmp_path, "helpful").path == str(tmp_path / "model" / "reward")
    folder(tmp_path / "model" / "other", config={})
    problem = facts.model(str(tmp_path), "helpful")
    assert isinstance(problem, Problem)
    assert problem.fix == "it holds these, one a role: other, reward"


def test_an_adapter_has_the_facts_of_its_base(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", config={"vocab_size": 7})
    adapter = folder(tmp_path / "adapter", adapter_config={"base_model_name_or_path": str(base)})
    assert found(adapter) == ModelFacts(str(adapter), {"vocab_size": 7}, str(base))
    hub = folder(tmp_path / "hub", adapter_config={"base_model_name_or_path": "org/elsewhere"})
    assert found(hub) == ModelFacts(str(hub), None, "org/elsewhere")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "the folder holds no model"),
        ({"config": "{"}, "config.json cannot be read"),
        ({"config": "[]"}, "config.json holds no JSON object"),
        ({"adapter_config": "{"}, "adapter_config.json cannot be read"),
        ({"adapter_config": "[]"}, "adapter_config.json holds no JSON object"),
        ({"adapter_config": "{}"}, "is an adapter that names no base model"),
        ({"adapter_config": {"base_model_name_or_path": None}}, "is an adapter that names no base model"),
        ({"adapter_config": {"base_model_name_or_path": "/gone/base"}}, "is an adapter of /gone/base"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, content: dict[str, Any], what: str) -> None:
    problem = facts.model(str(folder(tmp_path / "m", **content)))
    assert isinstance(problem, Problem)
    assert what in problem.what
    assert str(tmp_path / "m") in problem.what


def test_an_adapter_of_itself(tmp_path: Path) -> None:
    path = folder(tmp_path, adapter_config={"base_model_name_or_path": str(tmp_path)})
    problem = facts.model(str(path))
    assert isinstance(problem, Problem)


@pytest.mark.parametrize("path", ["/no/such/model", "./no", "~/no-such-model", "a/b/c"])
def test_a_path_that_is_not_there(path: str) -> None:
    problem = facts.model(path)
    assert isinstance(problem, Problem)
    assert problem.what == f"--model {path}: there is no such folder here"


def test_a_name_that_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "frist.txt").write_text("a file is no model")
    problem = facts.model("runs/frst")
    assert isinstance(problem, Problem)
    assert problem.what == "--model runs/frst: there is no such folder here, and the fake hub has no such thing"
    assert problem.fix == "did you mean runs/first? give a model's folder, a run's, or a hub id such as org/name"
    problem = facts.model("nosuch-thing-like-it")
    assert isinstance(problem, Problem) and problem.fix.startswith("give a model's folder")


def test_a_file_is_no_model(tiny_model: Path) -> None:
    problem = facts.model(str(tiny_model / "config.json"))
    assert isinstance(problem, Problem)
    assert problem.what.endswith("is a file")


def test_a_hub_id_is_unknown_until_it_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert found("org/name") == ModelFacts("org/name", None)
    cache = tmp_path / "hub" / "models--org--name"
    folder(cache / "snapshots" / "abc", config={"vocab_size": 3})
    folder(cache / "refs")
    (cache / "refs" / "main").write_text("abc\n")
    assert found("org/name") == ModelFacts("org/name", {"vocab_size": 3})


GPU_80 = Gpu("A", 80 << 30, (8, 0))


@pytest.mark.parametrize(
    ("flags", "vendor", "gpus", "provides"),
    [
        ({"avx512_bf16"}, "AuthenticAMD", (), {"bf16", "fast-bf16"}),
        ({"avx512_bf16"}, "GenuineIntel", (), {"bf16"}),  # half of float32's rate
        ({"avx512_bf16", "amx_bf16"}, "GenuineIntel", (), {"bf16", "fast-bf16"}),
        ({"bf16"}, "", (), {"bf16", "fast-bf16"}),  # as Linux on ARM calls it
        ({"avx2", "avx512f"}, "GenuineIntel", (), {"bf16"}),  # by way of float32, a quarter of its rate
        ({"avx2"}, "GenuineIntel", (GPU_80,), {"cuda", "bf16", "fast-bf16"}),
        ({"avx512_bf16"}, "AuthenticAMD", (GPU_80, Gpu("B", 1, (7, 5))), {"cuda"}),  # the weakest GPU says
    ],
)
def test_what_a_machine_provides(flags: set[str], vendor: str, gpus: tuple[Gpu, ...], provides: set[str]) -> None:
    assert Machine(1, frozenset(flags), 1, gpus, 1, vendor).provides == provides


def test_this_machine() -> None:
    made = facts.machine(3)
    assert made.cpus >= 1
    assert made.memory_bytes > 1 << 20
    assert made.world_size == 3


class Nvml(types.ModuleType):
    """Stands for pynvml, with two devices; the call named by `broken` fails."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: str = "") -> None:
        super().__init__("pynvml")
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        results: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda i: i, "nvmlDeviceGetName": lambda device: "AB"[device],
            "nvmlDeviceGetMemoryInfo": lambda device: types.SimpleNamespace(total=80 << 30),
            "nvmlDeviceGetCudaComputeCapability": lambda device: (8, 0),
        }  # fmt: skip

        def ask(*arguments: Any) -> Any:
            if name == self.broken:
                raise self.NVMLError("GPU is lost")
            return results[name](*arguments)

        return ask


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, "AB"), ("1", "B"), ("1,0", "BA"), ("0,7", "A"), ("GPU-af", "AB"), ("", ""), ("-1", "")],
)
def test_gpus_are_those_that_cuda_sees(monkeypatch: pytest.MonkeyPatch, visible: str | None, names: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(facts, "_without_cuda", lambda: "")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert facts.machine().gpus == tuple(Gpu(name, 80 << 30, (8, 0)) for name in names)
    assert facts.machine().unused == ""


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", "2.13.0+cpu"),
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", ""),
        ("__version__ = '1.0'\ncuda = None\n", "1.0"),
        ("cuda = None\n", "here"),
        ("", ""),
        (None, ""),
    ],
)
def test_a_torch_without_cuda_has_no_gpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: Callable[..., Recipe], said: str | None, version: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError")  # it isn't imported for this
    if said is not None:
        (tmp_path / "torch" / "version.py").write_text(said)
    here = facts.machine()
    monkeypatch.undo()
    assert (len(here.gpus), bool(here.unused)) == ((0, True) if version else (2, False))
    plan = compose(typed("--algo", "ppo"), loaded(), here)
    if version:
        assert plan.notes[0] == f"A: not used, since torch {version} is built without CUDA; install one that has it"
        assert plan_from_json(json.loads(json.dumps(plan.to_json())), loaded()).machine == here
    else:
        assert not any("CUDA" in note for note in plan.notes)
    named = planned_machine(here, "h100", None, 1)
    assert isinstance(named, Machine) and named.unused == ""


@pytest.mark.parametrize(
    "call",
    ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo", "nvmlShutdown"],
)
def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(broken=call))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert facts.machine().gpus == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert facts.machine().gpus == ()
