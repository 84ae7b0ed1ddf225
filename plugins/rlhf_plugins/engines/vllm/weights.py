"""The trainer's weights as vLLM takes them: by the names of a plain Hugging Face checkpoint, adapters merged; or the
adapters alone, as PEFT saves them.

A merged matrix is W + s B A (Hu et al. 2021), or m (W + s B A) / |W + s B A| by rows with DoRA (Liu et al. 2024); it
is summed in float32 and then rounded to the type of W, where the trainer rounds the two products apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf.api import RunError, Weights

_ADAPTED = re.compile(r"(.*)\.(base_layer|lora_A|lora_B|lora_magnitude_vector)\.(.*)")


def plain(module: nn.Module, weights: Weights) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """A stream of what a plain checkpoint of the module would hold, adapters merged, one tensor at a time."""
    return lambda: _merged(module, weights)


def base(module: nn.Module, weights: Weights) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """The same without the adapters; these aren't gathered."""

    def only(name: str) -> bool:
        return ".lora_" not in name

    return lambda: _merged(module, lambda also=None: weights(only))


def adapter(module: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The first adapters of a PEFT module, by the names that PEFT saves them under. Nothing else is gathered."""
    name = _first(module)
    found = weights(lambda key: ".lora_" in key and f".{name}." in key)
    return {key.replace(f".{name}.", "."): tensor.detach().clone() for key, tensor in found}


def adapter_config(module: nn.Module) -> dict[str, Any]:
    """What PEFT would write as adapter_config.json."""
    config: Any = module.peft_config[_first(module)]  # type: ignore[index]
    found = {key: value for key, value in config.to_dict().items() if _is_json(value)}
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key, None)
        found[key] = sorted(value) if isinstance(value, set | list | tuple) else value
    return found


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _first(module: nn.Module) -> str:
    """The policy's own adapters; others are of roles that share its base."""
    return str(next(iter(module.peft_config)))  # type: ignore[arg-type]


def _merged(module: nn.Module, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    own = _first(module) if hasattr(module, "peft_config") else ""
    layers = {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}
    held: dict[str, Tensor] = {}
    place = ""
    for name, tensor in weights():
        found = _ADAPTED.fullmatch(name)
        if place and (found is None or found[1] != place):
            yield from _layer(place, layers[place], held, own)
            held, place = {}, ""
        if found is not None and found[1] in layers:
            place = found[1]
            held[name[len(place) + 1 :]] = tensor  # a bucket of one layer: its matrix and what is added to it
        elif ".original_module." not in name and not _quantised_part(name):
            tensor = unpacked(module.get_submodule(name.rpartition(".")[0]), name, tensor)
            yield _plain_name(name.replace(f".modules_to_save.{own}.", ".")), tensor
    if place:
        yield from _layer(place, layers[place], held, own)


def _layer(place: str, layer: LoraLayer, held: dict[str, Tensor], own: str) -> Iterator[tuple[str, Tensor]]:
    """One adapted layer, merged. held: its tensors by their names inside it."""
    inner: Any = layer.base_layer
    for name, tensor in held.items():
        part, _, rest = name.partition(".")
        if part != "base_layer" or _quantised_part(rest):
            continue
        plain_name = _plain_name(f"{place}.{rest}")
        a, b = held.get(f"lora_A.{own}.weight"), held.get(f"lora_B.{own}.weight")
        weight = unpacked(inner, rest, tensor)
        if rest != "weight" or a is None or b is None:
            yield plain_name, weight
            continue
        turned = bool(getattr(layer, "fan_in_fan_out", False))  # how GPT-2 keeps its weights: [in, out]
        whole = weight.float().T if turned else weight.float()
        whole = whole + layer.scaling[own] * (b.float() @ a.float())
        magnitude = held.get(f"lora_magnitude_vector.{own}.weight")
        if magnitude is not None:
            whole = whole * (magnitude.float() / whole.norm(dim=1))[:, None]
        yield plain_name, (whole.T if turned else whole).to(weight.dtype)


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _quantised_part(name: str) -> bool:
    """What bitsandbytes keeps beside a packed weight, under names of its own: it is asked of the module."""
    return ".weight." in f".{name}" or name.rpartition(".")[2] in ("SCB", "weight_format")


def unpacked(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The weight called `name` of a layer, as numbers; of any other it is the tensor itself.

    Raises:
        RunError: its layer's sort of packing isn't known here.
    """
    kind = type(module).__name__
    if name.rpartition(".")[2] != "weight" or kind not in ("Linear4bit", "Linear8bitLt"):
        if not tensor.is_floating_point():
            raise RunError(
                f"{name} is of {tensor.dtype}: --engine vllm knows no way to unpack it; --engine hf needs none"
            )
        return tensor
    layer: Any = module
    if kind == "Linear8bitLt":
        scales = layer.state.SCB if getattr(layer.weight, "SCB", None) is None else layer.weight.SCB
        found: Tensor = tensor.float() * (scales.to(tensor.device) / 127)[:, None]
        return found
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    packed = tensor.view(torch.uint8) if tensor.dtype != torch.uint8 else tensor  # kept as another type, to be spread
    plain_weight: Tensor = dequantize_4bit(packed.reshape(-1, 1), state)
    return plain_weight
