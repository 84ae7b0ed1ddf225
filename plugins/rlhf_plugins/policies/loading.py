"""From a folder or hub id to a module with the head asked for, all of its weights accounted for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from rlhf.api import LoadSpec, Problem, RequestError, RunError
from rlhf_plugins.policies.heads import init_scalar_head

_LM_HEADS = ("lm_head.", "embed_out.")
"""Weights that a language model has and its scalar-headed sibling has not."""


def load_model(
    spec: LoadSpec, attention: str | None, world_size: int, unpack: Callable[[nn.Module], nn.Module] | None = None
) -> PreTrainedModel:
    """The model on its device; of an adapter's folder, its base with the adapter merged.

    Args:
        attention: of transformers' implementations; None for its choice, `sdpa` where the architecture has it.
        unpack: makes a quantised base a plain one, into which an adapter may then be merged.

    Raises:
        RequestError: there is no such model, or its weights aren't all those of the head asked for.
    """
    adapter = adapter_config(spec.model)
    with torch.random.fork_rng():  # transformers draws for weights that are missing; the run's own RNG stays put
        torch.manual_seed(spec.seed)
        model, info = _load(spec, adapter.base_model_name_or_path if adapter else spec.model, attention)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if others := [f"{name} {[*there]}, not {[*wanted]}" for name, there, wanted in info["mismatched_keys"]]:
        fix = "its weights are those of another config.json"
        raise RequestError(Problem(f"--model {spec.model}: has weights of another shape: {_names(set(others))}", fix))
    if spec.head == "scalar":
        missing = _start_head(model, spec, missing, brought=adapter is not None and _adapter_has_head(spec.model))
        unexpected = {name for name in unexpected if not name.startswith(_LM_HEADS)}
    if missing or unexpected:
        parts = [f"lacks {_names(missing)}"] if missing else []
        parts += [f"has {_names(unexpected)}, which a {type(model).__name__} hasn't"] if unexpected else []
        fix = "its config.json names another architecture than its weights are of; nothing is left out or made up"
        raise RequestError(Problem(f"--model {spec.model}: {' and '.join(parts)}", fix))
    if adapter is not None:
        if "quantization_config" in spec.arguments and unpack is None:
            what = f"--model {spec.model}: is an adapter, and merging it into quantised weights would round it away"
            fix = f"merge it into its base first: rlhf export {spec.model} --output FOLDER, then --model FOLDER"
            raise RequestError(Problem(what, fix))
        model = _merged(model if unpack is None else unpack(model), spec)
    return model if "device_map" in spec.arguments else _placed(model, torch.device(spec.device), world_size)


def partitioned(module: nn.Module) -> bool:
    """DeepSpeed ZeRO-3 has spread the parameters over ranks, as early as at loading."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def adapter_config(model: str) -> Any:
    """The PEFT config of an adapter's folder or repository, or None."""
    from peft import PeftConfig

    if Path(model).is_dir() and not (Path(model) / "adapter_config.json").is_file():
        return None
    try:
        with readable(model):
            return PeftConfig.from_pretrained(model)
    except RequestError:
        if Path(model).is_dir():
            raise
        return None


def adapter_weights(model: str) -> dict[str, torch.Tensor]:
    """The weights in an adapter's folder or repository, on the CPU.

    Raises:
        RequestError: there are none, or they can't be read.
    """
    from peft.utils import load_peft_weights

    with readable(model):
        return dict(load_peft_weights(model, device="cpu"))


@contextlib.contextmanager
def readable(model: str, handed_on: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever libraries raise while they read a model is the model's fault: a file that is cut off, a config that
    makes no sense.

    Args:
        handed_on: errors that the caller deals with.

    Raises:
        RequestError: they raised; gives their reason in a line.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (RequestError, RunError, *handed_on)):
            raise
        what = f"--model {model}: can't be loaded: {reason(error)}"
        fix = "give a folder or hub id of a causal language model with its weights in safetensors"
        raise RequestError(Problem(what, fix)) from error


def reason(error: Exception) -> str:
    """What a library's error says, in a line: its first, and the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    bare = not said or isinstance(error, ArithmeticError | LookupError | TypeError | AttributeError)
    return f"{type(error).__name__}: {said}".removesuffix(": ") if bare else said


def _load(spec: LoadSpec, model: str, attention: str | None) -> tuple[Any, dict[str, Any]]:
    """(the model, what transformers tells of weights that are missing, unexpected or of another shape)."""
    auto: Any = AutoModelForCausalLM if spec.head == "lm" else AutoModelForSequenceClassification
    arguments: dict[str, Any] = {
        "dtype": spec.weights,
        "trust_remote_code": spec.trust_remote_code,
        "use_safetensors": True,  # never unpickle
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are told, and refused here by name
        **({} if attention is None else {"attn_implementation": attention}),
        **({"num_labels": 1} if spec.head == "scalar" else {}),
        **spec.arguments,
    }
    with readable(spec.model), quiet():
        found, info = auto.from_pretrained(model, **arguments)
    return found, info


def _placed(model: Any, device: torch.device, world_size: int) -> PreTrainedModel:
    """On the device; where this process alone has several and one is too small for the weights, spread over them."""
    if partitioned(model):
        return model
    if device.type == "cuda" and world_size == 1 and torch.cuda.device_count() > 1:
        free, _ = torch.cuda.mem_get_info(device)
        if model.get_memory_footprint() > 0.9 * free:
            from accelerate import dispatch_model, infer_auto_device_map

            return dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=model._no_split_modules))
    return model.to(device)


def _start_head(model: Any, spec: LoadSpec, missing: set[str], brought: bool) -> set[str]:
    """Start a scalar head that the checkpoint hasn't; returns what else is missing."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        what = f"--model {spec.model}: {type(model).__name__} has no scalar head on its last token"
        raise RequestError(Problem(what, "give a causal language model, or a reward model made from one"))
    names = {f"score.{name}" for name, _ in head.named_parameters()}
    if names & missing and not brought:
        if spec.head_init == "keep":
            what = (
                f"--model {spec.role}={spec.model}: the checkpoint has no scalar head, and role {spec.role!r} keeps one"
            )
            raise RequestError(Problem(what, f"give a model that was trained with one: --model {spec.role}=PATH"))
        init_scalar_head(head, spec.head_init, spec.seed)
    if not partitioned(model):
        head.float()  # one number out of D products: in bfloat16, its rounding would be the noise of the score
    return missing - names


def _adapter_has_head(folder: str) -> bool:
    return any(".score." in name for name in adapter_weights(folder))


def _merged(model: Any, spec: LoadSpec) -> PreTrainedModel:
    from peft import PeftModel

    config = adapter_config(spec.model)
    if spec.head == "scalar" and config.task_type == "CAUSAL_LM":
        config.task_type = None  # under a scalar head, PEFT's wrapper for language models misses their generation
    with readable(spec.model):
        merged: PreTrainedModel = PeftModel.from_pretrained(model, spec.model, config=config).merge_and_unload()
    return merged


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No report of missing weights, which are dealt with here; no progress bar into a file."""
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _names(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
