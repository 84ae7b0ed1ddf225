#!/usr/bin/env python3
"""Generate the starter task: data files, a tokenizer and a randomly initialised tiny model.

The starter is what ``rlhf run`` uses when the user names no model and no data. It has to work offline, on a CPU, in
about a minute, and the reward curve has to move for a reason that can be checked. So the task is adding two numbers
below fifty, and the reward is whether the last number of the response is the sum.

The trick is in ``pretrain.jsonl``: most of its answers are wrong the way people get sums wrong (a forgotten carry, off
by one). A model trained on it knows the right answer *and* the usual mistakes and samples among them, so it starts at
about one answer in three right. That leaves reinforcement learning something to sharpen, instead of something to
teach from nothing, which a model of this size could not do in a minute.

Usage::

    python scripts/make_starter.py --out starter
    # then train starter/model-init on starter/pretrain.jsonl with the framework's own SFT

Everything is a function of ``--seed``: the same seed gives the same bytes.

Layout of the output directory::

    prompts_train.jsonl  prompts_eval.jsonl   {"prompt", "answer"}              RL prompts with a checkable answer
    sft_train.jsonl      sft_eval.jsonl       {"prompt", "completion"}          right answers only
    pref_train.jsonl     pref_eval.jsonl      {"prompt", "chosen", "rejected"}  right answer against an obvious mistake
    steps_train.jsonl    steps_eval.jsonl     {"prompt", "steps", "labels"}     one to four answers, each judged
    pretrain.jsonl                            {"prompt", "completion"}          makes the start model; need not ship
    model-init/                               config, random weights and tokenizer in Hugging Face format

Completions do not contain the end-of-sequence token: whoever tokenizes them appends it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EOS_TOKEN = "<eos>"
PAD_TOKEN = "<pad>"

# Prompts are plain strings that already look like what the chat template renders for one user turn, so the model is at
# home both with raw prompts and with chat messages.
PROMPT_FORMAT = "Question: {question}\nAnswer:"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'Question: ' + message['content'] + '\\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'Answer: ' + message['content'] + eos_token + '\\n' -}}"
    "{%- else -%}"
    "{{- message['content'] + '\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}"
)

QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "{name} has {a} {things} and gets {b} more. How many now?",
)
NAMES = ("Ann", "Ben", "Mia", "Tom")
THINGS = ("apples", "books", "coins", "pens")

MAX_OPERAND = 49


class Problem(NamedTuple):
    """One addition, worded."""

    a: int
    b: int
    prompt: str

    @property
    def total(self) -> int:
        return self.a + self.b


class ErrorRates(NamedTuple):
    """How often an answer in the pretraining data is right, or wrong in which way; the three add up to one."""

    right: float
    carry: float
    off_by_one: float


# With a carry the commonest answer is the wrong one, without a carry it is the right one. A small model smooths over
# that boundary, so greedy decoding starts well above sampling, but both ways of evaluating leave room to improve.
RATES_WITH_CARRY = ErrorRates(right=0.25, carry=0.45, off_by_one=0.30)
RATES_WITHOUT_CARRY = ErrorRates(right=0.45, carry=0.20, off_by_one=0.35)


def has_carry(a: int, b: int) -> bool:
    return a % 10 + b % 10 >= 10


def carry_mistake(a: int, b: int) -> int:
    """Forget the carry where there is one, invent one where there is none."""
    return a + b - 10 if has_carry(a, b) else a + b + 10


def off_by_one(a: int, b: int, rng: random.Random) -> int:
    return a + b + rng.choice((-1, 1))


def usual_answer(a: int, b: int, rng: random.Random) -> int:
    """An answer as the pretraining data gives it, right or wrong."""
    rates = RATES_WITH_CARRY if has_carry(a, b) else RATES_WITHOUT_CARRY
    draw = rng.random()
    if draw < rates.right:
        return a + b
    if draw < rates.right + rates.carry:
        return carry_mistake(a, b)
    return off_by_one(a, b, rng)


def obvious_mistake(a: int, b: int, rng: random.Random) -> int:
    """A wrong answer that a short look gives away: one of the operands repeated, or a number far off.

    The preference data uses these rather than the usual mistakes. Telling 42 from 41 takes adding and then comparing;
    a reward model of this size does not learn that from a few thousand pairs, but it does learn to rule these out.
    """
    if rng.random() < 0.5:
        return rng.choice((a, b))
    return rng.choice([number for number in range(2, 2 * MAX_OPERAND + 1) if abs(number - (a + b)) > 15])


def split_pairs(eval_share: float, rng: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split all pairs of operands into train and held-out.

    The split is over unordered pairs: were 17 + 25 in train and 25 + 17 held out, the held-out score would partly
    measure memory.
    """
    pairs = [(a, b) for a in range(1, MAX_OPERAND + 1) for b in range(a, MAX_OPERAND + 1)]
    rng.shuffle(pairs)
    cut = round(len(pairs) * eval_share)
    return pairs[cut:], pairs[:cut]


def word_problem(pair: tuple[int, int], rng: random.Random) -> Problem:
    """Put a pair into words, its operands in either order."""
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    question = rng.choice(QUESTIONS).format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))
    return Problem(a, b, PROMPT_FORMAT.format(question=question))


def draw_problems(pairs: Sequence[tuple[int, int]], count: int, rng: random.Random) -> list[Problem]:
    """Draw ``count`` problems that differ in their prompts."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = word_problem(rng.choice(pairs), rng)
        problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def prompt_row(problem: Problem) -> dict[str, str]:
    return {"prompt": problem.prompt, "answer": str(problem.total)}


def sft_row(problem: Problem) -> dict[str, str]:
    return {"prompt": problem.prompt, "completion": f" {problem.total}"}


def preference_row(problem: Problem, rng: random.Random) -> dict[str, str]:
    return {
        "prompt": problem.prompt,
        "chosen": f" {problem.total}",
        "rejected": f" {obvious_mistake(problem.a, problem.b, rng)}",
    }


def step_row(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """One to four answers to a problem, one a step, each right or an obvious mistake."""
    labels = [rng.random() < 0.5 for _ in range(rng.randint(1, 4))]
    answers = [problem.total if right else obvious_mistake(problem.a, problem.b, rng) for right in labels]
    return {"prompt": problem.prompt, "steps": [f" {answer}" for answer in answers], "labels": labels}


def pretrain_row(problem: Problem, rng: random.Random) -> dict[str, str]:
    return {"prompt": problem.prompt, "completion": f" {usual_answer(problem.a, problem.b, rng)}"}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_data(out: Path, seed: int, train_size: int, eval_size: int, pretrain_size: int) -> None:
    """Part A: write all data files."""
    train_pairs, eval_pairs = split_pairs(eval_share=0.1, rng=random.Random(f"{seed}/split"))

    # One generator per file, so that changing the size of one file leaves the others as they were.
    for split, pairs, count in (("train", train_pairs, train_size), ("eval", eval_pairs, eval_size)):
        rng = random.Random(f"{seed}/prompts/{split}")
        write_jsonl(out / f"prompts_{split}.jsonl", map(prompt_row, draw_problems(pairs, count, rng)))
        rng = random.Random(f"{seed}/sft/{split}")
        write_jsonl(out / f"sft_{split}.jsonl", map(sft_row, draw_problems(pairs, count, rng)))
        rng = random.Random(f"{seed}/pref/{split}")
        problems = draw_problems(pairs, count, rng)
        write_jsonl(out / f"pref_{split}.jsonl", [preference_row(problem, rng) for problem in problems])
        rng = random.Random(f"{seed}/steps/{split}")
        problems = draw_problems(pairs, count, rng)
        write_jsonl(out / f"steps_{split}.jsonl", [step_row(problem, rng) for problem in problems])

    # Repeats are wanted here: the same problem with different answers is what makes the start model undecided.
    rng = random.Random(f"{seed}/pretrain")
    rows = (pretrain_row(word_problem(rng.choice(train_pairs), rng), rng) for _ in range(pretrain_size))
    write_jsonl(out / "pretrain.jsonl", rows)


def make_tokenizer(seed: int):
    """Build a byte-level BPE tokenizer in which every word of the task is one token and every digit is one token.

    Byte level, so that any text at all survives encoding and decoding unchanged; single digits, so that the model can
    learn to add by column.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than needed: training ends when every word is one token
        min_frequency=1,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"{seed}/tokenizer")
    corpus = [word_problem((rng.randint(1, MAX_OPERAND), rng.randint(1, MAX_OPERAND)), rng).prompt for _ in range(2000)]
    tokenizer.train_from_iterator(corpus, trainer)

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,  # the clean-up rewrites " ?" to "?", so decoding would not round-trip
        model_max_length=512,
    )


def make_model(out: Path, seed: int, hidden: int, layers: int, heads: int, intermediate: int) -> None:
    """Part B: write the tokenizer and a model with random weights to ``out``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # The usual 0.02 suits wide models; at this width attention would start out flat and stay so for a long time.
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    fix_tokenizer_class(out)
    for path in out.iterdir():
        path.chmod(0o644)  # weights are written readable by their owner only, which is no use in a package


def fix_tokenizer_class(folder: Path) -> None:
    """Name the tokenizer class in a way that every version of transformers knows.

    Newer versions write their internal base class, which older ones (and the inference engines that pin them) cannot
    resolve; the public name works in all of them.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Generate the data and the untrained model of the starter task.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-size", type=int, default=2048, help="rows per training file")
    parser.add_argument("--eval-size", type=int, default=256, help="rows per held-out file")
    parser.add_argument("--pretrain-size", type=int, default=100_000, help="rows of pretrain.jsonl")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4, help="keep hidden / heads at 32 or 64 for inference engines")
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--data-only", action="store_true", help="write the data files, not the model")
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    make_data(args.out, args.seed, args.train_size, args.eval_size, args.pretrain_size)
    if not args.data_only:
        make_model(args.out / "model-init", args.seed, args.hidden, args.layers, args.heads, args.intermediate)


if __name__ == "__main__":
    main()
