"""Whether two models speak the same tokens."""

from __future__ import annotations

import json
from typing import Any

from rlhf.api import Codec


def same_vocabulary(policy: Codec, other: Codec) -> bool:
    """Whether the policy's tokens mean the same to `other`: the same tokenizer, but for tokens that only `other` has
    (such as a pad token). Two codecs that don't show a `tokenizer` of the tokenizers library are taken to differ."""
    ours, theirs = (_backend(codec) for codec in (policy, other))
    if ours is None or theirs is None or policy.eos != other.eos:
        return False
    known = theirs.get_vocab(with_added_tokens=True)
    if any(known.get(token) != number for token, number in ours.get_vocab(with_added_tokens=True).items()):
        return False
    return _pipeline(ours) == _pipeline(theirs)


def _backend(codec: Codec) -> Any:
    return getattr(getattr(codec, "tokenizer", None), "backend_tokenizer", None)


def _pipeline(backend: Any) -> dict[str, Any]:
    """How text is cut, apart from how batches are padded and which tokens were added."""
    content: dict[str, Any] = json.loads(backend.to_str())
    return {
        key: part for key, part in content.items() if key not in ("padding", "truncation", "added_tokens", "version")
    }
