"""A model of a hundred thousand random weights, whose tokens are letters, digits and a few signs."""

from __future__ import annotations

from pathlib import Path

LETTERS = "abcdefghijkl"
GOOD, BAD = LETTERS[:6], LETTERS[6:]
"""What the kit's tasks reward and what they don't."""
_TEXT = " ".join((LETTERS, "mnopqrstuvwxyz0123456789.,:?!=+-"))
_SPECIAL = ("<pad>", "<eos>", "<unk>")
_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
HIDDEN = 64


def write_model(folder: Path, seed: int = 0, scalar: bool = False) -> Path:
    """Write model and tokenizer as a Hugging Face folder; returns it.

    Args:
        scalar: with one number a sequence for a head, in place of the vocabulary's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    words = [*_SPECIAL, *dict.fromkeys(_TEXT)]
    _write_tokenizer(folder, words)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=not scalar,
        initializer_range=HIDDEN**-0.5,  # at the usual .02 so narrow a model's attention would start out flat
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=_SPECIAL[2]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        unk_token=_SPECIAL[2],
        chat_template=_CHAT,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    ).save_pretrained(folder)
