"""Offload: frozen weights are there while their role scores and nowhere else, and come back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.errors import RequestError, RunError
from rlhf.facts import Gpu, Machine
from rlhf.interfaces import Context, HeadRequest, LoadSpec
from rlhf.loop import Loop
from rlhf.models import Models
from rlhf.parts import Parts
from rlhf.plan import Plan
from rlhf.recipe import Recipe
from rlhf.registry import Registry
from rlhf.rundir import RunDirectory
from rlhf.sequences import Sequences
from rlhf_plugins.memory import OffloadConfig
from rlhf_plugins.memory.offload import DiskShelf, HostShelf, Offload
from rlhf_plugins.policies.hf import HFPolicy

Folder = Callable[..., str]
Prepared = Callable[..., tuple[nn.Module, LoadSpec]]
Typed = Callable[..., Recipe]
GPU = Machine(2, frozenset(), 1 << 34, (Gpu("fake", 16 << 30, (8, 0)),), 1)
SEQUENCES = Sequences.of([torch.tensor([5, 6, 7])], [torch.arange(8, 40)])


def offload(**options: Any) -> Offload:
    return Offload(OffloadConfig(**options), Context(None))  # type: ignore[arg-type]


def present(module: nn.Module) -> int:
    """Bytes of a module's weights that are there now, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("to", ["disk", "host"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_are_the_same_bits(
    folder: Folder, prepared: Prepared, policy: HFPolicy, strategies: Any, to: str, precision: str
) -> None:
    def logp(module: nn.Module) -> Tensor:
        return policy.score(module, SEQUENCES, [HeadRequest("reference", "lm")])[0].logp

    path, strategy = folder("llama"), offload(to=to)
    here, _ = prepared(path, strategies(precision), trainable=False)
    away, _ = prepared(path, [*strategies(precision), strategy], trainable=False)
    with torch.no_grad():
        expected = logp(here)
        for _ in range(2):  # it goes and comes again
            with strategy.visit(away):
                assert torch.equal(logp(away), expected)


@pytest.mark.parametrize("to", ["disk", "host"])
def test_between_visits_nothing_is_there(folder: Folder, prepared: Prepared, strategies: Any, to: str) -> None:
    strategy = offload(to=to)
    module, _ = prepared(folder("llama"), [*strategies("fp32"), strategy], trainable=False)
    here, _ = prepared(folder("llama"), strategies("fp32"), trainable=False)
    ids = torch.tensor([[5, 6]])
    assert present(module) == 0
    with pytest.raises(RuntimeError):  # and can't be used by mistake
        module(input_ids=ids)
    with strategy.visit(module):
        with strategy.visit(module):  # a visit within a visit
            assert present(module) >= sum(p.nbytes for p in here.parameters())
        assert present(module) > 0
    assert present(module) == 0
    with pytest.raises(ValueError), strategy.visit(module):  # it leaves when a score fails
        raise ValueError
    assert present(module) == 0


def test_tied_weights_stay_tied(folder: Folder, prepared: Prepared, strategies: Any) -> None:
    strategy = offload(to="disk")
    module: Any = prepared(folder("gpt2"), [*strategies("fp32"), strategy], trainable=False)[0]
    assert module.lm_head.weight is module.transformer.wte.weight
    with strategy.visit(module):
        assert module.lm_head.weight.data_ptr() == module.transformer.wte.weight.data_ptr()


def test_the_file_goes_with_the_run(tmp_path: Path) -> None:
    """Its name goes at once where the system allows, so that a killed run leaves none."""
    shelf = DiskShelf(str(tmp_path))
    shelf.put([torch.arange(6.0).view(2, 3)])
    assert list(tmp_path.iterdir()) == [] or not os.path.exists("/proc/self/fd")
    assert shelf.fetch(torch.device("cpu"))[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    descriptor = shelf._file.fileno()
    del shelf
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_mapped_file_is_not_private_memory(tmp_path: Path) -> None:
    """64 MiB that are fetched and read from a file are the kernel's pages: the process's own memory stays."""

    def private() -> int:
        text = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty"))

    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system doesn't tell what memory is private")
    shelf = DiskShelf(str(tmp_path))
    shelf.put([torch.ones(16 << 20)])
    before = private()
    (there,) = shelf.fetch(torch.device("cpu"))
    assert float(there.sum()) == 16 << 20
    # 8 MiB: what anything else in this process may take meanwhile; a copy would be 64
    assert private() - before < 8 << 20
    copy = there.clone()
    assert private() - before > 56 << 20 and len(copy)  # the measure sees a copy where there is one


def test_a_host_shelf_keeps_and_gives_copies() -> None:
    weight = torch.arange(4.0)
    shelf = HostShelf()
    shelf.put([weight])
    weight.zero_()
    (first,), (second,) = shelf.fetch(torch.device("cpu")), shelf.fetch(torch.device("cpu"))
    first.zero_()
    assert second.tolist() == [0, 1, 2, 3]


def test_auto_is_a_file_on_a_cpu_and_the_hosts_memory_on_a_gpu() -> None:
    assert isinstance(offload()._made(torch.device("cpu")), DiskShelf)
    assert isinstance(offload()._made(torch.device("cuda")), HostShelf)
    assert isinstance(offload(to="disk")._made(torch.device("cuda")), DiskShelf)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"give --mem.offload.folder a place with room"):
        DiskShelf(str(tmp_path / "nowhere")).put([torch.ones(2)])


# Whole runs


@pytest.fixture
def parts(typed: Typed, installed: Registry, machine: Machine, tmp_path: Path) -> Callable[..., Parts]:
    def make(*words: str) -> Parts:
        said = ("--algo", "ppo", "--max-steps", "2", "--batch-size", "8", "--eval-rows", "4", *words)
        return assemble(compose(typed(*said), installed, machine), lambda text: None)

    return make


def test_a_run_with_its_accounts(parts: Callable[..., Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each role's weights are in each phase of PPO, and the same metrics and weights as without."""
    accounts: dict[str, set[tuple[str, bool]]] = {}

    def account(phase: str, models: Models) -> None:
        accounts.setdefault(phase, set()).update(
            (role.name, present(models.body(role.module)) > 0) for role in models.plan.roles
        )

    def go(made: Parts, folder: Path, watched: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        if watched:
            for owner, name, phase in (
                (made.sampler.engine, "generate", "sampling"),  # type: ignore[union-attr]
                (made.backend, "backward", "learning"),
                (made.backend, "update", "update"),
            ):
                work = getattr(owner, name)

                def noted(*args: Any, work: Any = work, phase: str = phase) -> Any:
                    account(phase, made.models)
                    return work(*args)

                monkeypatch.setattr(owner, name, noted)
            score = made.models.policy.score

            def scored(module: nn.Module, sequences: Sequences, heads: Any) -> Any:
                account(f"scoring {heads[0].role}", made.models)
                return score(module, sequences, heads)

            monkeypatch.setattr(made.models.policy, "score", scored)
        directory = RunDirectory(folder)
        directory.open(made.plan)
        rows: list[dict[str, Any]] = []
        log = directory.log_metrics
        monkeypatch.setattr(
            directory, "log_metrics", lambda step, metrics: rows.append(dict(metrics)) or log(step, metrics)
        )
        Loop(made, directory, lambda text: None).run(None)
        directory.close()
        kept = ("loss", "reward", "kl", "policy", "value", "optim")
        return [{k: v for k, v in row.items() if k.split("/")[0] in kept} for row in rows], {
            name: p.detach() for name, p in made.models.trained.named_parameters()
        }

    plain, weights = go(parts(), tmp_path / "plain", watched=False)
    away, others = go(parts("--mem", "offload"), tmp_path / "away", watched=True)
    assert plain == away and len(plain) == 2
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    trained = {("policy", True), ("value", True)}
    assert accounts == {
        "sampling": trained | {("reference", False)},
        "scoring reference": trained | {("reference", True)},
        "scoring value": trained | {("reference", False)},
        "scoring policy": trained | {("reference", False)},
        "learning": trained | {("reference", False)},
        "update": trained | {("reference", False)},
    }


def test_a_visit_lasts_for_all_forwards_of_a_score(
    parts: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parts("--mem", "offload", "--micro-batch-tokens", "8")
    fetched = []
    fetch = DiskShelf.fetch
    monkeypatch.setattr(DiskShelf, "fetch", lambda self, device: fetched.append(1) or fetch(self, device))
    many = Sequences.of([torch.tensor([5])] * 4, [torch.tensor([6, 7, 8, 9, 5])] * 4)
    made.score(many, "reference")
    assert len(fetched) == 1


# Plans


def planned(typed: Typed, installed: Registry, on: Machine, *words: str) -> Plan:
    return compose(typed(*words), installed, on)


DPO, SFT = ("--algo", "dpo", "--mem"), ("--algo", "sft", "--mem")
REFUSED = [
    ((*SFT, "offload"), "it is for none of policy", "leave it out"),
    ((*DPO, "lora,offload"), "no role it is for (reference) has a module of its own", "leave it out"),
    ((*DPO, "policy=offload"), "the role policy is trained", "--mem reference=offload"),
    ((*SFT, "policy=offload"), "the role policy is trained", "no role of this run is frozen"),
    ((*DPO, "offload", "--mem.offload.to", "host"), "this machine has no GPU", "--mem.offload.to disk"),
    ((*DPO, "reference=offload,8bit"), "--mem offload excludes 'quantised'", "leave one of them out"),
]


@pytest.mark.parametrize(("words", "what", "fix"), REFUSED)
def test_offload_of_what_is_not_there(
    typed: Typed, installed: Registry, machine: Machine, words: tuple[str, ...], what: str, fix: str
) -> None:
    with pytest.raises(RequestError) as error:
        planned(typed, installed, machine, *words)
    assert any(what in problem.what and fix in problem.fix for problem in error.value.problems), error.value.problems
    assert error.value.suggestion  # and a combination that works is named


def test_what_is_for_frozen_modules_makes_none(
    typed: Typed, installed: Registry, machine: Machine, tmp_path: Path
) -> None:
    """A reference that the adapters give for nothing isn't loaded so that it can be put away."""
    made = planned(typed, installed, machine, "--algo", "ppo", "--mem", "lora,offload", "--mem", "reference=offload")
    assert made.role("reference").view == "own"  # where it is asked for
    with pytest.raises(RequestError, match="no role it is for"):
        planned(typed, installed, machine, "--algo", "ppo", "--mem", "lora,offload")


def test_by_role(typed: Typed, installed: Registry, machine: Machine, folder: Folder) -> None:
    words = ("--algo", "ppo", "--reward", "model", "--model", f"reward={folder('llama', 'scalar')}")
    made = planned(typed, installed, machine, *words, "--mem", "reference=offload", "--mem", "reward=8bit")
    names = {role.name: [c.name for c in role.mem] for role in made.roles}
    assert names["reference"][-1] == "offload" and "8bit" in names["reward"]
    assert "offload" not in names["policy"] + names["value"] + names["reward"]
    on_gpu = planned(typed, installed, GPU, *words, "--mem", "offload", "--mem.offload.to", "host")
    assert [role.name for role in on_gpu.roles if any(c.name == "offload" for c in role.mem)] == ["reference", "reward"]
