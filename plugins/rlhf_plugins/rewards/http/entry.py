"""What `--reward http` offers, and when it fits a plan."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlhf.api import Plan, PlannedComponent, Problem, RewardEntry, option
from rlhf_plugins.rewards.remote import address_problems


@attrs.frozen(kw_only=True)
class HTTPConfig:
    weight: float = option(1.0, help="factor of this source in the sum of rewards; may be negative")
    url: str = option(help="where completions are sent to: https://HOST/PATH")
    columns: tuple[str, ...] = option((), help="columns of the data that are sent along; rows without are refused")
    batch_size: int = option(32, help="of a request", unit="completions", ge=1)
    concurrency: int = option(4, help="requests under way at once, of each rank", ge=1)
    timeout: float = option(60.0, help="a request is answered by then, or is made again", unit="seconds", gt=0)
    retries: int = option(
        4,
        help="how often a request is made again after no answer, or status 429 or 5xx, each time after twice as long; "
        "then its completions have failed",
        ge=0,
    )
    check: bool = option(True, help="ask it to score nothing before a model is loaded, to see that it is there")
    token_env: str = option("", help="environment variable with a bearer token; left out, none is sent")
    token_file: str | None = option(None, help="file with the token, readable for you alone, in place of a variable")
    allow_plain_http: bool = option(False, help="send the token to another host unencrypted")


def _address(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    config = component.config
    yield from address_problems(config, f"--reward.{component.key}", bool(config.token_env or config.token_file))


def _notes(plan: Plan, component: PlannedComponent) -> Iterator[str]:
    config = component.config
    first = "; it is asked before a model is loaded" if config.check else ""
    sent = ", ".join(["prompt", "completion", *config.columns])
    yield (
        f"--reward {component.key}: sends {sent} to {config.url}, {config.batch_size} completions a request, "
        f"{config.concurrency} requests at once, {config.timeout:g} s and {config.retries} retries each{first}"
    )


HTTP = RewardEntry(
    name="http",
    summary="a server's score: POST a batch of prompts and completions, get numbers",
    config=HTTPConfig,
    impl="rlhf_plugins.rewards.http.reward:HTTPReward",
    columns=lambda config: tuple(config.columns),
    constraints=(_address,),
    notes=(_notes,),
)
