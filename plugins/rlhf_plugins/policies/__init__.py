"""The first-party policies: how models are loaded, how text becomes tokens, how ragged sequences are scored."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import PolicyEntry, hookimpl, option


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
        help="how a forward lays out its sequences: a row for each, or a prompt's responses in one row behind it; "
        "auto takes what costs less; same results",
        choices=("auto", "padded", "shared"),
    )
    chunk_tokens: int = option(
        512, help="response tokens whose logits are held at once; fewer take less memory", unit="tokens", ge=1
    )
    attention: str = option(
        "auto",
        help="attention implementation of transformers: sdpa, eager, or another it knows, such as flash_attention_2; "
        "auto is sdpa, and on a CPU in bfloat16 a faster one by matrix products",
    )


@hookimpl
def rlhf_policies() -> Iterable[PolicyEntry]:
    """Any causal language model of transformers."""
    yield PolicyEntry(
        name="hf",
        summary="causal language models of Hugging Face transformers",
        config=HFPolicyConfig,
        impl="rlhf_plugins.policies.hf:HFPolicy",
        rank=10,
    )
