"""When an engine's way of sampling fits a plan: pure functions of it, for any engine with these options. Imports no
torch."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.api import Plan, PlannedComponent, Problem


def room_to_answer(plan: Plan, component: PlannedComponent) -> Iterator[Problem]:
    """A response leaves some of the model's context to its prompt."""
    context = next((role.model.context for role in plan.roles if role.name == "policy"), None)
    tokens = component.config.max_new_tokens
    if context is not None and tokens >= context:
        what = f"--engine.max-new-tokens {tokens}: the model's context is {context} tokens, prompt included"
        yield Problem(what, f"at most {context - 1}, less what the prompts take")
