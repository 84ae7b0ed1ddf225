"""What `--reward judge` offers, and when it fits a plan."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlhf.api import Plan, PlannedComponent, Problem, RewardEntry, option
from rlhf_plugins.rewards.remote import address_problems


@attrs.frozen(kw_only=True)
class JudgeConfig:
    weight: float = option(1.0, help="factor of this source in the sum of rewards; may be negative")
    url: str = option(help="of the endpoint, without /chat/completions: https://HOST/v1")
    model: str = option(help="the judge's name there")
    mode: str = option(
        "score",
        help="give each response a score, or compare it: with the reference, or the responses of a group with each "
        "other; its reward is then the share of comparisons that it wins",
        choices=("score", "compare"),
    )
    rubric: str = option("", help="what a good response is like, for the judge; left out, a general one")
    rubric_file: str | None = option(None, help="file with the rubric, in place of a text")
    template: str | None = option(
        None, help="file with the question; its fields are told in the how-to on rewards; left out, the mode's own"
    )
    low: float = option(0.0, help="the worst score")
    high: float = option(10.0, help="the best score")
    reference_column: str = option(
        "", help="column with the response to compare with; left out, those of a group are compared with each other"
    )
    seed: int = option(0, help="sent with each request, for endpoints that take one", ge=0)
    max_tokens: int = option(512, help="of an answer", unit="tokens", ge=1)
    concurrency: int = option(8, help="requests under way at once, of each rank", ge=1)
    timeout: float = option(120.0, help="an answer is there by then, or is asked for again", unit="seconds", gt=0)
    retries: int = option(
        4, help="how often an answer is asked for again, each time after twice as long; then it has failed", ge=0
    )
    check: bool = option(True, help="see that the endpoint is there before a model is loaded")
    token_env: str = option("OPENAI_API_KEY", help="environment variable with the token; not set, none is sent")
    token_file: str | None = option(None, help="file with the token, readable for you alone, in place of a variable")
    allow_plain_http: bool = option(False, help="send the token to another host unencrypted")


def _problems(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    from rlhf_plugins.rewards.judge.questions import columns, rubric_of

    config, flag = component.config, f"--reward.{component.key}"
    yield from address_problems(config, flag, bool(config.token_file))
    for option_, look in (("template", columns), ("rubric-file", rubric_of)):
        try:
            look(config)
        except ValueError as error:
            yield Problem(f"{flag}.{option_}: {error}")
    if config.low >= config.high:
        yield Problem(f"{flag}.low {config.low:g} is no less than {flag}.high {config.high:g}")
    if config.mode == "score" and config.reference_column:
        yield Problem(f"{flag}.reference-column is for comparing", f"{flag}.mode compare, or name it in a template")
    if config.mode == "compare" and not config.reference_column and plan.run.eval_rows:
        what = f"{flag}.mode compare: a held-out prompt gets one response, and there is nothing to compare it with"
        yield Problem(what, f"--eval-rows 0, or {flag}.reference-column COLUMN")


def _columns(config: JudgeConfig) -> tuple[str, ...]:
    from rlhf_plugins.rewards.judge.questions import columns

    return columns(config)


def _notes(plan: Plan, component: PlannedComponent) -> Iterator[str]:
    config = component.config
    asks = "each response is scored"
    if config.mode == "compare":
        asks = "each is compared with its reference, in both orders" if config.reference_column else ""
        asks = asks or "each two of a group are compared, in both orders: G (G - 1) requests a group of G"
    yield (
        f"--reward {component.key}: sends prompts and responses to {config.model} at {config.url}; {asks}; "
        f"{config.concurrency} requests at once, {config.timeout:g} s and {config.retries} retries each"
    )


JUDGE = RewardEntry(
    name="judge",
    summary="a language model at an OpenAI-compatible endpoint scores responses, or compares them",
    config=JudgeConfig,
    impl="rlhf_plugins.rewards.judge.reward:Judge",
    columns=_columns,
    constraints=(_problems,),
    notes=(_notes,),
)
