"""Reward sources: a verifiable answer, the response's length, a user's Python function, a reward model, a server,
math-verify, a program's tests, a language model as a judge.

Each returns unweighted numbers, one a rollout; the core multiplies by `weight` and adds the sources up.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from rlhf.api import Plan, PlannedComponent, Problem, RewardEntry, Role, hookimpl, option
from rlhf_plugins.rewards.code.entry import CODE
from rlhf_plugins.rewards.http.entry import HTTP
from rlhf_plugins.rewards.judge.entry import JUDGE
from rlhf_plugins.rewards.math.entry import MATH

_WEIGHT = "factor of this source in the sum of rewards; may be negative"


@attrs.frozen(kw_only=True)
class AnswerConfig:
    weight: float = option(1.0, help=_WEIGHT)
    answer_column: str = option(
        "answer", help="column of the data that holds the reference; what follows a #### counts"
    )
    extract: str = option(
        "auto",
        help="how the response's answer is read: its last number, its last \\boxed{}, all of it (exact), or auto: "
        "\\boxed{} where there is one, else the last number where the reference is a number, else all of it",
        choices=("auto", "number", "boxed", "exact"),
    )
    correct: float = option(1.0, help="score of a right answer")
    wrong: float = option(0.0, help="score of a wrong answer, or of none")


@attrs.frozen(kw_only=True)
class LengthConfig:
    weight: float = option(1.0, help=_WEIGHT)
    target: int = option(0, help="the length that costs nothing", unit="tokens", ge=0)
    slope: float = option(
        0.01,
        help="cost of each token away from the target",
        unit="reward a token",
        source="alpha of LCPO, Aggarwal & Welleck 2025, arXiv:2503.04697, eq. 1",
        ge=0,
    )
    side: str = option(
        "both", help="which lengths cost: over the target, or both over and under", choices=("both", "over")
    )
    min: float | None = option(-1.0, help="the score never falls below this; none for no bound", le=0)


@attrs.frozen(kw_only=True)
class PythonConfig:
    weight: float = option(1.0, help=_WEIGHT)
    path: str = option(
        help="FILE.py:FUNCTION or MODULE:FUNCTION; it is called as f(prompt, completion, **columns) -> number, or with "
        "lists as f(prompts, completions, **columns) -> numbers, and gets the columns that it has parameters for"
    )
    batched: bool | None = option(
        None, help="call it once a batch, with lists; left out, when it has a parameter `completions`"
    )


@attrs.frozen(kw_only=True)
class ModelConfig:
    weight: float = option(1.0, help=_WEIGHT)
    template: str = option(
        "auto",
        help="same: score the very tokens that were sampled; own: encode the text again with the reward model's "
        "tokenizer and chat template; auto: same where tokenizer and template are the policy's, else own",
        choices=("auto", "same", "own"),
    )


@attrs.frozen(kw_only=True)
class ProcessConfig:
    weight: float = option(1.0, help=_WEIGHT)
    separator: str = option("\n", help="text between steps; the one that the model was trained with")
    aggregate: str = option(
        "min",
        help="what becomes of the steps' scores: a response is as good as its worst step, as all on average, as the "
        "last, or as likely to be right throughout as their product",
        source="min and product: Lightman et al. 2023",
        choices=("min", "mean", "last", "product"),
    )

    def __attrs_post_init__(self) -> None:
        if not self.separator:
            raise ValueError("separator is empty, so no response could be cut at it")


def answer_column(config: AnswerConfig) -> tuple[str, ...]:
    """The column that rows must have."""
    return (config.answer_column,)


def function_is_there(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """The file or module of `path` exists. Nothing of it is run while planning."""
    path: str = component.config.path
    place, sign, function = path.rpartition(":")
    flag = f"--reward.{component.key}.path"
    if not sign or not place or not function.isidentifier():
        yield Problem(f"{flag} {path}: is not FILE.py:FUNCTION or MODULE:FUNCTION", f"such as {flag} reward.py:score")
    elif place.endswith(".py"):
        if not Path(place).expanduser().is_file():
            yield Problem(f"{flag} {path}: there is no such file", f"looked for {Path(place).expanduser().absolute()}")
    elif not all(part.isidentifier() for part in place.split(".")):
        yield Problem(
            f"{flag} {path}: {place} is neither a .py file nor a module's name", f"such as {flag} reward.py:score"
        )
    elif importlib.util.find_spec(place.partition(".")[0]) is None:
        yield Problem(f"{flag} {path}: no module {place!r} is installed", f"for a file: {flag} FILE.py:{function}")


def _roles(component: PlannedComponent) -> tuple[Role, ...]:
    roles = component.entry.roles
    return tuple(roles(component.config) if callable(roles) else roles)


def scores_one_number(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """The reward model's config.json, where it is known, describes a classifier with one label."""
    role = plan.role(component.label or next(role.name for role in _roles(component)))
    if not role.model.known or (Path(role.model.path) / "adapter_config.json").is_file():
        return  # an adapter folder tells of its base, not of the head that comes with the adapter
    labels = len(role.model.get("id2label") or {}) or role.model.get("num_labels")
    flag = f"--model {role.name}={role.model.path}"
    if role.model.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        yield Problem(f"{flag}: {role.model.architecture} has no scalar head", "give a model trained as a reward model")
    elif labels not in (1, None):
        yield Problem(f"{flag}: it has {labels} labels; a reward model has 1", "give a model with num_labels 1")


@hookimpl
def rlhf_rewards() -> Iterator[RewardEntry]:
    yield RewardEntry(
        name="answer",
        summary="right or wrong against a reference answer: numbers, \\boxed{}, or exact text",
        config=AnswerConfig,
        impl="rlhf_plugins.rewards.answer:Answer",
        columns=lambda config: (config.answer_column,),
    )
    yield RewardEntry(
        name="length",
        summary="minus a cost for each token away from a target length",
        config=LengthConfig,
        impl="rlhf_plugins.rewards.length:Length",
    )
    yield RewardEntry(
        name="python",
        summary="your own function: --reward.python.path FILE.py:FUNCTION",
        config=PythonConfig,
        impl="rlhf_plugins.rewards.python:PythonFunction",
        constraints=(function_is_there,),
    )
    yield RewardEntry(
        name="model",
        summary="a sequence classifier with one label: --model reward=PATH",
        config=ModelConfig,
        impl="rlhf_plugins.rewards.model:RewardModel",
        constraints=(scores_one_number,),
        roles=(Role("reward", head="scalar", start="given"),),
    )
    yield RewardEntry(
        name="prm",
        summary="a process reward model, which scores each step: --model prm=PATH",
        config=ProcessConfig,
        impl="rlhf_plugins.rewards.process:ProcessRewardModel",
        constraints=(scores_one_number,),
        roles=(Role("prm", head="scalar", start="given"),),
    )
    yield HTTP
    yield MATH
    yield CODE
    yield JUDGE
