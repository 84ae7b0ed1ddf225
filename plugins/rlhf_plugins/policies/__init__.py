"""The first-party policies: how models are loaded, how text becomes tokens, how ragged sequences are scored."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import attrs

from rlhf.api import (
    Activations,
    ForwardBatch,
    ModuleMemory,
    Plan,
    PlannedComponent,
    PolicyEntry,
    Problem,
    hookimpl,
    option,
    transformer,
)

MOST_SCORES = 1 << 26
"""That attention by matrix products holds at once, 128 MiB of them in bfloat16."""
FLAT_CALL, CALL = 2e6, 32.0
"""What a block of a flat row's attention costs on a CPU, times the square of a model's width, and what a forward costs:
in tokens' matrix products of a layer, of the model."""
FLAT_FROM = (FLAT_CALL / CALL) ** 0.5
"""Width of models of which a flat row is never slower, on a CPU."""


@attrs.frozen(kw_only=True)
class HFPolicyConfig:
    """Options of `--policy hf`."""

    max_prompt_tokens: int | None = option(
        None, help="the longest prompt; left out, the model's context less one token to answer", unit="tokens", ge=1
    )
    prompt_overflow: str = option(
        "refuse",
        help="what becomes of a longer prompt: the row is refused and counted, or its tokens are cut on that side",
        choices=("refuse", "left", "right"),
    )
    max_length: int | None = option(
        None,
        help="the longest sequence of offline data, prompt and response; left out, the model's context",
        unit="tokens",
        ge=2,
    )
    response_overflow: str = option(
        "refuse",
        help="what becomes of a response that makes its sequence longer: the row is refused and counted, or the "
        "response is cut and then has no end token",
        choices=("refuse", "cut"),
    )
    chat: bool = option(False, help="put a plain-text prompt into the model's chat template, as a user's turn")
    template: str | None = option(
        None,
        help="what to put around prompts: text with {prompt} for plain text and single user turns, or the path of a "
        "Jinja chat template that takes the place of the model's own",
    )
    layout: str = option(
        "auto",
        help="how a forward lays out its sequences: a row for each, a prompt's responses in one row behind it, or all "
        "of them in one row without padding, where attention allows that; auto takes what costs less; same results",
        choices=("auto", "padded", "shared", "flat"),
    )
    chunk_tokens: int = option(
        512, help="response tokens whose logits are held at once; fewer take less memory", unit="tokens", ge=1
    )
    attention: str = option(
        "auto",
        help="attention implementation of transformers: sdpa, eager, or another it knows, such as flash_attention_2; "
        "auto is sdpa where the architecture has it, and on a CPU a faster one by matrix products",
    )


def _language_models(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """What is to speak was trained to."""
    seen = set[str]()
    for role in plan.roles:
        if role.role.head == "lm" and role.model.classifier and role.model.path not in seen:
            seen.add(role.model.path)
            what = f"--model {role.model.path}: is a classifier, as reward models are, and the {role.name} is to speak"
            yield Problem(what, "give it a language model; a reward model is given as --model reward=PATH")


def _prompts_within_context(plan: Plan, component: PlannedComponent) -> Iterable[Problem]:
    """The longest prompt allowed leaves room to answer."""
    flag, most = f"--policy.max-prompt-tokens {component.config.max_prompt_tokens}", component.config.max_prompt_tokens
    contexts = [role.model.context for role in plan.roles if role.role.head == "lm" and role.model.context is not None]
    if most is not None and contexts and most >= min(contexts):
        yield Problem(f"{flag}: the model's context is {min(contexts)} tokens", f"{min(contexts) - 1} at most")


def _plain_text_stays(plan: Plan, component: PlannedComponent) -> Iterable[str]:
    """What a chat model is given may be no chat. Of the built-in model it is known to be right."""
    policy = next((role for role in plan.roles if role.role.head == "lm"), None)
    config = component.config
    if policy is None or config.chat or config.template is not None or not _has_chat_template(Path(policy.model.path)):
        return
    if Path(policy.model.path) != _STARTER:
        yield "prompts that are plain text stay so; --policy.chat true puts them into the model's chat template"


_STARTER = Path(__file__).parents[1] / "starter" / "model"


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").is_file():
        return True
    try:
        return '"chat_template"' in (model / "tokenizer_config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # on the hub, or has none
        return False


def _footprint(module: ModuleMemory, batch: ForwardBatch, plan: Plan, component: PlannedComponent) -> Activations:
    config = component.config
    host = "cuda" not in plan.machine.provides
    by_products = host and config.attention == "auto"
    # As trunk.py chooses: where prompts are shared, a flat row's calls cost a narrow model more than they save.
    auto = config.layout == "auto" and (batch.group == 1 or module.architecture.hidden >= FLAT_FROM)
    return transformer(
        module, batch, chunk=config.chunk_tokens, shares=config.layout != "padded",
        flat=by_products and (config.layout == "flat" or auto), products=by_products, fused=host,
        most_scores=MOST_SCORES,
    )  # fmt: skip


@hookimpl
def rlhf_policies() -> Iterable[PolicyEntry]:
    """Any causal language model of transformers."""
    yield PolicyEntry(
        name="hf",
        summary="causal language models of Hugging Face transformers",
        config=HFPolicyConfig,
        impl="rlhf_plugins.policies.hf:HFPolicy",
        footprint=_footprint,
        constraints=(_language_models, _prompts_within_context),
        notes=(_plain_text_stays,),
        eases=("chunk_tokens",),
        rank=10,
    )
