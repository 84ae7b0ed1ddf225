"""Plan against truth: what `rlhf plan` says of a run, beside what the run really held.

    python tests/planning/truth.py [--model FOLDER] [--only NAME ...] [--out FILE.md]

Each case is a run of the real command in a process of its own, on a model of SmolLM2-135M's shape (random weights,
made here, unless a folder is given). Weights, gradients and optimiser state must be equal to the byte. The peak is the
process's highest resident memory less what it held before its first model. Sequences are of one length, which the plan
is told. One run at a time; noise of other work changes times, not these numbers.

On a machine with a GPU it is the GPU's memory: the model is of Llama-3.2-1B's shape, the peak is what torch's allocator
held at most, and cases of more processes than there are GPUs are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import click

from rlhf import facts
from rlhf.allocator import TUNABLES
from rlhf.cli.recipes import RecipeCommand, recipe_of, recipe_options
from rlhf.compose import compose
from rlhf.plan import Plan, resource
from rlhf.planning.memory import Lengths
from rlhf.planning.prediction import Prediction, prediction
from rlhf.recipe import Recipe
from rlhf.registry import loaded

EXACT = ("weights", "gradients", "optimizer")
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
_WORD = "1 "


@attrs.frozen
class Case:
    """A run: its algorithm, memory strategies and what else is typed."""

    algo: str
    mem: str
    more: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def name(self) -> str:
        words = (self.algo, self.mem, *(word for word in self.more if not word.startswith("--")))
        return " ".join(words) + (f", {self.ranks} processes" if self.ranks > 1 else "")


CASES = (
    Case("sft", "fp32"),
    Case("sft", "bf16"),
    Case("sft", "bf16,checkpointing"),
    Case("sft", "bf16,ema"),
    Case("sft", "bf16", ("--optim", "adamw8bit")),
    Case("sft", "bf16", ("--micro-batch-tokens", "300")),
    Case("sft", "fp32,lora"),
    Case("sft", "bf16,lora"),
    Case("sft", "bf16,lora,4bit"),
    Case("sft", "fp32,lora,8bit"),
    Case("sft", "bf16,lora", ("--mem.lora.dora", "true", "--mem.lora.targets", "all-linear")),
    Case("dpo", "bf16"),
    Case("dpo", "bf16", ("--mem", "reference=bf16,offload")),
    Case("dpo", "fp32,lora"),
    Case("dpo", "bf16,lora,checkpointing"),
    Case("reward", "bf16"),
    Case("reward", "bf16,lora,8bit"),
    Case("ppo", "fp32"),
    Case("ppo", "bf16"),
    Case("ppo", "bf16,lora"),
    Case("ppo", "bf16,lora,shared-base"),
    Case("ppo", "bf16,lora,4bit,checkpointing"),
    Case("sft", "fp32", ("--backend", "ddp"), ranks=2),
    Case("dpo", "bf16,lora,4bit", ("--backend", "ddp"), ranks=2),
    Case("sft", "bf16", ("--backend", "fsdp2"), ranks=2),
    Case("sft", "fp32", ("--backend", "fsdp2"), ranks=2),
    Case("sft", "fp32,zero1", ranks=2),
    Case("sft", "fp32,zero2", ranks=2),
    Case("sft", "fp32,zero3", ("--mem.zero3.keep-whole", "0"), ranks=2),
    Case("sft", "fp32,zero2", ("--mem.zero2.offload", "optimizer"), ranks=2),
    Case("sft", "fp32,zero3", ("--mem.zero3.keep-whole", "0", "--mem.zero3.offload", "optimizer,parameters"), ranks=2),
)


@attrs.frozen
class Truth:
    """A case with both sides, in bytes."""

    case: Case
    predicted: dict[str, float]
    measured: dict[str, float]
    process: float
    phase: str

    @property
    def error(self) -> float:
        """Of the peak: above 0 where the plan says more than there was."""
        return self.predicted["peak"] / self.measured["peak"] - 1

    @property
    def off(self) -> dict[str, int]:
        """Bytes by which a count differs, of those that were seen: DeepSpeed's gradients may be gone before a step."""
        differences = {part: round(self.predicted[part]) - round(self.measured[part]) for part in EXACT}
        return {part: n for part, n in differences.items() if n and (self.measured[part] or self.case.ranks == 1)}

    @property
    def exact(self) -> bool:
        """Over ranks, but for what each has whole of what is counted as a share: an optimiser's counters of steps."""
        allowed = 0 if self.case.ranks == 1 else 4096
        return all(abs(n) <= allowed for n in self.off.values())


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Llama of this shape with random weights in bfloat16, and the starter's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    for file in Path(resource("rlhf_plugins.starter:model")).iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


def write_rows(path: Path, rows: int, words: int) -> None:
    """Rows that every algorithm reads, all of one length."""
    text = _WORD * words
    row = {"prompt": text.strip(), "completion": text, "chosen": text, "rejected": text.replace("1", "2")}
    with path.open("w") as file:
        file.writelines(json.dumps({**row, "id": i}) + "\n" for i in range(rows))


def arguments(case: Case, model: Path, folder: Path, scale: Scale) -> list[str]:
    """Of `rlhf run` and `rlhf plan` alike."""
    columns = {"sft": ("prompt", "completion"), "ppo": ("prompt",)}.get(case.algo, ("prompt", "chosen", "rejected"))
    data = folder / f"{case.algo}.jsonl"
    if not data.exists():
        whole = folder / "all.jsonl"
        write_rows(whole, scale.rows * scale.steps, scale.words)
        rows = [json.loads(line) for line in whole.read_text().splitlines()]
        data.write_text("".join(json.dumps({name: row[name] for name in columns}) + "\n" for row in rows))
    online = (
        ("--reward", "length", "--engine.max-new-tokens", str(scale.words), "--algo.epochs", "1")
        if case.algo == "ppo"
        else ()
    )
    return [
        "--algo", case.algo, "--mem", case.mem, "--model", str(model), "--data", str(data),
        "--batch-size", str(scale.rows), "--max-steps", str(scale.steps), "--save-every", str(scale.steps),
        "--eval-rows", "0", *online,
        *case.more, *(("--nproc", str(case.ranks)) if case.ranks > 1 else ()),
    ]  # fmt: skip


@attrs.frozen
class Scale:
    """How large the runs are."""

    rows: int = 4
    words: int = 32
    steps: int = 2


def measure(cases: Sequence[Case], model: Path, folder: Path, scale: Scale) -> Iterator[Truth]:
    """Run cases and plan them, one after the other.

    Raises:
        RuntimeError: a run failed.
    """
    typed = [arguments(case, model, folder, scale) for case in cases]
    outputs = [folder / f"run-{i}" for i in range(len(cases))]
    jobs: list[dict[str, Any]] = [
        {"out": str(output), "arguments": ["run", *words, "--output", str(output), "--track", "none"],
         "ranks": case.ranks}
        for case, words, output in zip(cases, typed, outputs, strict=True)
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("observe.py")), str(folder / "jobs.json")]
    # as the command sets them, before anything is imported
    environment = {
        **os.environ, "GLIBC_TUNABLES": TUNABLES, "GOMP_SPINCOUNT": "1000",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a look for GPUs must not open them before a fork
    }  # fmt: skip
    errors = folder / "errors"
    with (
        errors.open("w") as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        for case, words, output in zip(cases, typed, outputs, strict=True):
            if process.stdout.readline().strip() != "0":
                raise RuntimeError(f"{case.name}: {errors.read_text()[-2000:]}")
            shutil.rmtree(output, ignore_errors=True)
            seen = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(case.ranks)]
            most = max(seen, key=lambda rank: rank["peak"] - rank["process"])
            yield compared(case, words, {**most, **{part: max(rank[part] for rank in seen) for part in EXACT}})


def compared(case: Case, words: Sequence[str], seen: dict[str, float]) -> Truth:
    """Both sides of a case. seen: as `observe.py` writes it."""
    said = predicted(words, Lengths(prompt=int(seen["prompt"]), response=int(seen["response"])))
    roles = said.memory.roles
    return Truth(
        case=case,
        predicted={**{part: sum(getattr(role, part) for role in roles) for part in EXACT},
                   # held between steps: not what lies in a file
                   "weights": said.memory.phases[-1].device["weights"], "peak": said.memory.peak_bytes},
        measured={**{part: seen[part] for part in EXACT}, "peak": seen["peak"] - seen["process"]},
        process=seen["process"],
        phase=said.memory.peak.phase,
    )  # fmt: skip


def predicted(words: Sequence[str], lengths: Lengths) -> Prediction:
    """What `rlhf plan` says."""
    return prediction(plan_of(words), lengths)


def plan_of(words: Sequence[str]) -> Plan:
    recipe = _read.main(list(words), standalone_mode=False)
    assert isinstance(recipe, Recipe)
    return compose(recipe, loaded(), facts.machine(1))


@click.command(cls=RecipeCommand)
@recipe_options
@click.pass_context
def _read(ctx: click.Context, /, recipe_file: str | None, **flags: Any) -> Recipe:
    return recipe_of(ctx, recipe_file, flags)


def table(found: Sequence[Truth]) -> Iterator[str]:
    """Markdown."""
    yield "| case | weights | gradients | optimiser | exact | peak planned | peak measured | off by | in |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for truth in found:
        exact = [f"{truth.measured[part] / 1e6:.1f}" if truth.measured[part] else "not seen" for part in EXACT]
        peaks = [f"{side['peak'] / 1e6:.0f}" for side in (truth.predicted, truth.measured)]
        off = "".join(f" {n:+} B" for n in truth.off.values())
        yes = ("but for" if truth.exact else "NO,") + off if off else "yes"
        yield f"| {' | '.join((truth.case.name, *exact, yes, *peaks, f'{truth.error:+.1%}', truth.phase))} |"
    worst = max(found, key=lambda truth: abs(truth.error))
    mean = sum(abs(truth.error) for truth in found) / len(found)
    yield ""
    yield (
        f"{len(found)} runs; MB of 10^6 bytes. Worst error of a peak {worst.error:+.1%} ({worst.case.name}), mean "
        f"{mean:.1%}. Before its first model a process held {min(t.process for t in found) / 1e6:.0f} to "
        f"{max(t.process for t in found) / 1e6:.0f} MB, which are taken off."
    )


def possible(cases: Sequence[Case]) -> list[Case]:
    """Those for which there are GPUs enough, if there are any; the others are named."""
    gpus = len(facts.machine().gpus)
    found = [case for case in cases if not gpus or case.ranks <= gpus]
    for case in cases:
        if case not in found:
            print(f"left out, as there are {gpus} GPUs: {case.name}", file=sys.stderr)
    return found


def main() -> int:
    """All cases; exit code 1 where a count is not exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; left out, one of SmolLM2-135M's shape is made, on a GPU "
                        "of Llama-3.2-1B's")  # fmt: skip
    parser.add_argument("--only", nargs="*", default=[], help="cases by name")
    parser.add_argument("--out", type=Path, help="write the table there too")
    asked = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        gpu = bool(facts.machine().gpus)
        model = asked.model or make_model(folder / "model", LLAMA_1B if gpu else SMOLLM2)
        cases = possible([case for case in CASES if not asked.only or case.name in asked.only])
        for truth in measure(cases, model, folder, Scale(words=256) if gpu else Scale()):
            found.append(truth)
            print(list(table(found))[len(found) + 1], file=sys.stderr, flush=True)
    lines = "\n".join(table(found)) + "\n"
    print(lines)
    if asked.out:
        asked.out.write_text(lines)
    return 0 if all(truth.exact for truth in found) else 1


if __name__ == "__main__":
    sys.exit(main())
