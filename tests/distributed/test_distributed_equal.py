"""Two real processes give the numbers of one: losses, metrics, weights, saved folders; and go on from each other's
checkpoints. In float32, with other rows on each rank, several micro-batches a step, and groups that are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from ranks import carry_out
from safetensors.torch import load_file

from rlhf.cli import main

MACHINE_DEPENDENT = ("time/", "perf/", "memory/")
STEPS = 8
REWARD = '''
"""Judges by what it is given alone, so the same on any rank; some prompts can't be judged, and their groups go."""
from rlhf.api import Failed

def score(prompt, completion, answer):
    if int(answer) % 7 == 0:
        return Failed("a multiple of seven")
    return float(completion.strip() == answer) + 0.1 * len(completion)
'''
COMMON = ("--max-steps", str(STEPS), "--mem", "fp32", "--track", "none", "--save-every", "4", "--keep", "9",
          "--eval-rows", "10",  # not a multiple of anything: ranks have different numbers of them
          # A small budget: several micro-batches a step, and not as many on each rank.
          "--micro-batch-tokens", "150",
          # Adam's own eps of 1e-8 would turn rounding into a step of the whole learning rate wherever a gradient is
          # about 0; at 1e-3 an update is a smooth function of its gradient.
          "--optim.eps", "1e-3")  # fmt: skip
CASES: dict[str, tuple[str, ...]] = {
    "sft": ("--algo", "sft", "--batch-size", "13"),
    "sft packed": ("--algo", "sft", "--algo.packing", "--algo.pack-length", "64", "--batch-size", "5"),
    "reward": ("--algo", "reward", "--algo.centre-coef", "0.1", "--batch-size", "7"),
    # Few rows: the third pass takes kept log-probs, some of them computed by the other rank.
    "dpo": ("--algo", "dpo", "--data", "{folder}/pairs.jsonl", "--batch-size", "7"),
    "dpo aot": ("--algo", "dpo", "--algo.loss", "aot,aot_unpaired", "--batch-size", "7"),
    "kto": ("--algo", "kto", "--batch-size", "7"),
    "ppo": ("--algo", "ppo", "--batch-size", "9", "--algo.epochs", "2", "--algo.minibatches", "2",
            "--algo.entropy-coef", "0.01", "--algo.normalise-rewards", "--algo.whiten-rewards",
            "--algo.kl-control", "adaptive", "--reward", "python", "--reward.python.path", "{folder}/judge.py:score"),
    # Groups that teach nothing are replaced, tokens are drawn over all ranks, and rows are learnt beside.
    "dapo": ("--algo", "dapo", "--batch-size", "5", "--algo.group-size", "3", "--algo.minibatches", "2",
             "--algo.covariance", "clip", "--algo.covariance-share", "0.1", "--algo.covariance-low", "-9",
             "--algo.covariance-high", "9", "--ptx-data", "{folder}/sums.jsonl", "--ptx-coef", "0.5",
             "--ptx-batch-size", "3"),
}  # fmt: skip
ADAPTERS = ("--mem", "lora", "--mem.lora.rank", "4", "--mem.lora.targets", "all-linear")
MEMORY: dict[str, tuple[str, ...]] = {
    "": (),
    "lora": ADAPTERS,
    "shared-base": (*ADAPTERS, "--mem", "shared-base"),
    "ema": (*ADAPTERS, "--mem", "ema", "--mem.ema.decay", "0.5"),
    "offload": ("--mem", "reference=fp32,offload"),
    "4bit": (*ADAPTERS, "--mem", "4bit"),
    "8bit": (*ADAPTERS, "--mem", "8bit"),
}
# These move the held-out loss by far more than a hundredth in 8 steps, and stay where training is stable: a run that
# diverges multiplies rounding, too.
RATES = (
    {"sft": "5e-4", "dapo": "3e-4"},
    {"sft": "3e-3", "sft packed": "3e-3", "reward": "3e-3", "dpo": "3e-3", "dpo aot": "3e-3"},
)
NAMES = [f"{case}{lora}" for case in CASES for lora in ("", ", lora")]
NAMES.remove("kto, lora")  # in 8 steps its loss moves by a fifth of a hundredth, which shows nothing
NAMES.remove("dapo, lora")  # adapters are nothing to what it does otherwise
NAMES += ["ppo, shared-base", "sft, ema", "dpo, offload", "sft, 4bit", "ppo, 4bit", "dpo, 8bit"]
RESUMED = ("dpo", "ppo, lora", "sft, ema", "dapo")
FEW = ("sft packed", "reward", "kto", "ppo", "dpo, offload", "ppo, 4bit", *RESUMED)
"""Each algorithm, each of adapters, 4 bits, averages and offload once: what `matrix` runs of them."""
EACH = [pytest.param(x, marks=pytest.mark.matrix if x in FEW else pytest.mark.matrix_full) for x in NAMES]


@attrs.frozen
class Runs:
    folder: Path

    def line(self, name: str, output: str, *more: str) -> list[str]:
        case, _, memory = name.partition(", ")
        words = [word.format(folder=self.folder) for word in CASES[case]]
        rate = ("--optim.learning-rate", RATES["lora" in MEMORY[memory]].get(case, "1e-3"))
        return ["run", *words, *COMMON, *rate, *MEMORY[memory], "--output", str(self.folder / output), *more]

    def metrics(self, output: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (self.folder / output / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(MACHINE_DEPENDENT)} for line in lines]

    def weights(self, output: str) -> dict[str, Any]:
        model = self.folder / output / "model"
        return {
            f"{path.relative_to(model)}:{name}": tensor
            for path in sorted(model.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    def summary(self, output: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / output / "summary.json").read_text())
        return found


def alone(line: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(line)
    assert end.value.code == 0


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every case that a selected test asks for, alone and on two ranks; then runs that stop after 4 steps on one number
    of ranks and go on to 8 on another."""
    here = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    asked = {item.callspec.params["name"] for item in here if "runs" in item.fixturenames and hasattr(item, "callspec")}
    names = [name for name in NAMES if name in asked | {"ppo", "dpo", "dpo, offload", "dapo"}]
    folder = tmp_path_factory.mktemp("equal")
    found = Runs(folder)
    (folder / "judge.py").write_text(REWARD)
    pairs = [
        {"prompt": f"Question: What is {a} + 3?\nAnswer:", "chosen": f" {a + 3}", "rejected": " 5 or 6"[: a % 5 + 2]}
        for a in range(10, 30)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    sums = [{"prompt": f"Question: What is {a} + 3?\nAnswer:", "completion": f" {a + 3}"} for a in range(10, 21)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    half = ("--max-steps", "4")
    lines = [found.line(name, f"{name} two") for name in names]
    for name in RESUMED:
        lines += [found.line(name, f"{name} 2-2", *half), found.line(name, f"{name} 2-1", *half)]
    carry_out(lines, folder)
    for name in names:
        alone(found.line(name, f"{name} one"))
    for name in RESUMED:
        alone(found.line(name, f"{name} 1-2", *half))
        alone(found.line(name, f"{name} 2-1", "--resume"))
    resumed = [(name, how) for name in RESUMED for how in ("2-2", "1-2")]
    carry_out([found.line(name, f"{name} {how}", "--resume") for name, how in resumed], folder)
    return found


def same_metrics(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        for key in a:
            # float32 sums in another order, over 8 steps of a rate that moves the loss
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (a["step"], key)


def same_weights(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one and list(one) == list(two)
    for name in one:
        # steps of 1e-2 that differ by what gradients differ by, some 1e-6 of them
        assert one[name].shape == two[name].shape and float((one[name] - two[name]).abs().max()) <= 2e-5, name


@pytest.mark.parametrize("name", EACH)
def test_two_ranks_give_the_numbers_of_one(runs: Runs, name: str) -> None:
    one, two = runs.metrics(f"{name} one"), runs.metrics(f"{name} two")
    losses = [line["loss"] for line in one]
    assert max(losses) - min(losses) > 0.01 * abs(losses[0])  # or nothing would be shown
    if name.startswith(("dpo", "kto")):  # policy and reference are the same, and rounding says which is "better"
        one[0].pop("reward/accuracy"), two[0].pop("reward/accuracy")
    same_metrics(one, two)
    before, after = runs.summary(f"{name} one"), runs.summary(f"{name} two")
    for part in ("heldout_before", "heldout_after"):
        assert before[part] == pytest.approx(after[part], rel=1e-5, abs=1e-5)
    if not name.startswith(("ppo", "dapo")):
        moved = before["heldout_after"]["loss"] / before["heldout_before"]["loss"]
        assert abs(moved - 1) > 0.01, moved


@pytest.mark.parametrize("name", EACH)
def test_they_save_the_same_folders(runs: Runs, name: str) -> None:
    same_weights(runs.weights(f"{name} one"), runs.weights(f"{name} two"))
    files = [{p.relative_to(runs.folder / f"{name} {n}") for p in (runs.folder / f"{name} {n}").rglob("*")
              if p.is_file()} for n in ("one", "two")]  # fmt: skip
    assert files[0] == files[1]


@pytest.mark.matrix
def test_groups_were_left_out_and_ranks_had_unequal_work(runs: Runs) -> None:
    assert sum(line["rollout/left_out"] for line in runs.metrics("ppo two")) > 0


@pytest.mark.matrix
def test_groups_were_replaced_and_tokens_held(runs: Runs) -> None:
    found = runs.metrics("dapo two")
    assert max(line["sampling/rounds"] for line in found) > 1 and sum(line["sampling/left_out"] for line in found) > 8
    assert all(line["policy/held"] > 0 for line in found)


@pytest.mark.matrix
@pytest.mark.parametrize("name", RESUMED)
def test_two_ranks_go_on_to_the_bit(runs: Runs, name: str) -> None:
    assert runs.metrics(f"{name} 2-2") == runs.metrics(f"{name} two")
    one, two = runs.weights(f"{name} 2-2"), runs.weights(f"{name} two")
    assert all(bool((one[key] == two[key]).all()) for key in two) and one.keys() == two.keys()


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["2-1", "1-2"])
@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_ranks_goes_on_with_the_same_numbers(runs: Runs, name: str, how: str) -> None:
    one = runs.metrics(f"{name} one")
    two = runs.metrics(f"{name} {how}")
    if name == "dpo":
        one[0].pop("reward/accuracy"), two[0].pop("reward/accuracy")
    same_metrics(one, two)
    same_weights(runs.weights(f"{name} one"), runs.weights(f"{name} {how}"))


@pytest.mark.matrix
def test_where_weights_lie_between_visits_is_no_matter(runs: Runs) -> None:
    for ranks in ("one", "two"):
        assert runs.metrics(f"dpo, offload {ranks}") == runs.metrics(f"dpo {ranks}")


@pytest.mark.matrix
def test_ranks_agree_on_the_scale_of_the_loss(tmp_path: Path) -> None:
    """In float16, from a scale at which gradients overflow: all ranks leave the same steps out, and go on from each
    other's checkpoints with the scale that was reached. And from one at which none does: the same numbers."""

    def line(output: str, scale: int, *more: str) -> list[str]:
        words = ("--max-steps", "5", "--save-every", "3", "--keep", "9", "--eval-rows", "0", "--track", "none")
        some = ("--algo", "sft", "--batch-size", "13", "--micro-batch-tokens", "150", "--optim.eps", "1e-3")
        fp16 = ("--mem", "fp16,ema", "--mem.fp16.initial-scale", str(scale))
        return ["run", *some, *words, *fp16, "--output", str(tmp_path / output), *more]

    half = ("--max-steps", "3")
    carry_out([line("two", 2**24), line("on", 2**24, *half), line("calm two", 2**10)], tmp_path)
    for last in (line("one", 2**24), line("on", 2**24, "--resume"), line("calm one", 2**10)):
        alone(last)
    for name in ("one", "two", "on"):
        found = Runs(tmp_path).metrics(name)
        assert [line["optim/loss_scale"] for line in found] == [2.0**n for n in (24, 23, 22, 21, 20)]
        # Gradients of some .06 overflow at 2^20: whether the last does, rounding may say. The others are twice as far.
        assert [line["optim/skipped"] for line in found[:4]] == [1.0] * 4
    one, two = Runs(tmp_path).metrics("calm one"), Runs(tmp_path).metrics("calm two")
    assert not any(line["optim/skipped"] for line in one + two)
    # products are rounded to float16, 2^-11 of each, and gradients added up in another order
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2**-10)
    norms = [[line["optim/grad_norm"] for line in lines] for lines in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=2**-7)
    before, after = (Runs(tmp_path).weights(name) for name in ("calm one", "calm two"))
    assert before and before.keys() == after.keys()
    # the average of five steps of at most 1e-3, which differ by a few hundredths of themselves
    assert all(float((before[name] - after[name]).abs().max()) <= 1e-4 for name in before)
