"""Low-rank adapters by PEFT: W x + (alpha / rank) B A x, where W is frozen and A, B are trained.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1. B starts at zero, so the first forward is the base's own. What
is frozen needs no float32 master and is loaded in the precision of matrix products; adapters, and a scalar head, which
is trained whole, are float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOSEN_BY_PEFT
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rlhf.api import LoadSpec, MemoryStrategy, Problem, RequestError
from rlhf_plugins.memory.adapters import active
from rlhf_plugins.policies.loading import adapter_config

ALL_LINEAR = "all-linear"


class Lora(MemoryStrategy):
    """See the module."""

    def load(self, spec: LoadSpec) -> LoadSpec:
        """The base in the precision of matrix products, which a `load` of an earlier phase has set."""
        return spec if spec.compute is None else attrs.evolve(spec, weights=spec.compute)

    def adapt(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        """A `PeftModel` around the module, of which only the adapters and a scalar head are trained.

        Raises:
            RequestError: a target names no linear module; lists those there are.
        """
        head = spec.head == "scalar"
        for name in SEQ_CLS_HEAD_NAMES if head else ():
            if hasattr(module, name):
                getattr(module, name).float()  # PEFT trains a copy of it
        config = self._config(module, spec, TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM)
        with seeded(spec.seed):
            adapted: nn.Module = get_peft_model(module, config)
        return cast_by_autocast(adapted, spec)

    def join(self, module: nn.Module, spec: LoadSpec) -> None:
        """Adapters of this role's own beside another's, as `adapt` would start them; none where its checkpoint brings
        some.

        Raises:
            RequestError: a target names no linear module; lists those there are.
        """
        if adapter_config(spec.model) is not None:
            return
        assert isinstance(module, PeftModel)
        config = self._config(module.get_base_model(), spec, TaskType.CAUSAL_LM)
        config.base_model_name_or_path = next(iter(module.peft_config.values())).base_model_name_or_path
        with seeded(spec.seed):
            module.add_adapter(spec.role, config)
        cast_by_autocast(module, spec)

    def noisy(self, module: nn.Module) -> bool:
        return any(isinstance(part, LossDropout) and part.p > 0 for part in module.modules())

    def _config(self, module: nn.Module, spec: LoadSpec, task: TaskType) -> LoraConfig:
        return LoraConfig(
            task_type=task,
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=self._targets(module, spec),
            fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),  # how GPT-2 keeps its weights
            use_rslora=self.config.rslora,
            use_dora=self.config.dora,
        )

    def adapters_off(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """A context in which the module is its own base, a scalar head included."""
        return active(module, ())

    def as_role(self, module: nn.Module, role: str) -> contextlib.AbstractContextManager[Any]:
        """A context in which this role's adapters are on: those that joined under its name, else the first."""
        assert isinstance(module, PeftModel)
        names = list(module.peft_config)
        return active(module, (role if role in names[1:] else names[0],))

    def _targets(self, module: nn.Module, spec: LoadSpec) -> str | list[str]:
        """As PEFT takes them."""
        known = linear_names(module)
        targets = tuple(self.config.targets)
        if not targets:
            kind = getattr(getattr(module, "config", None), "model_type", "")
            targets = tuple(CHOSEN_BY_PEFT.get(kind, (ALL_LINEAR,)))
        if targets == (ALL_LINEAR,):  # among adapters of other roles PEFT would take those for linear modules too
            return sorted({name.rpartition(".")[2] for name in known}) if spec.joins else ALL_LINEAR
        wrong = [t for t in targets if not any(name == t or name.endswith("." + t) for name in known)]
        if wrong:
            what = f"--mem.lora.targets {','.join(wrong)}: names no linear module of {spec.model} (role {spec.role})"
            names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known))
            raise RequestError(Problem(what, f"it has {names or 'none'}; or {ALL_LINEAR} for them all"))
        return list(targets)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which adapters are drawn from the role's seed; the run's own RNG stays put."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def cast_by_autocast(module: nn.Module, spec: LoadSpec) -> nn.Module:
    """Leave casts to autocast where there is one, which makes two copies less; and dropout to the loss's forward."""
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = spec.compute is None
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = LossDropout(dropout.p)
    return module


class LossDropout(nn.Dropout):
    """Acts where gradients are recorded, in the loss's forward. Modules are kept in evaluation mode, so that scores
    taken for experience have nothing random; the usual switch would leave this one off for good."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=torch.is_grad_enabled())


def linear_names(module: nn.Module) -> list[str]:
    """Names of the linear modules that an adapter may go on: the heads may be read otherwise than by being called, so
    they are no such. GPT-2's `Conv1D` is a linear module by another name."""
    output: Any = getattr(module, "get_output_embeddings", lambda: None)()
    heads = {id(output), *(id(getattr(module, name, None)) for name in SEQ_CLS_HEAD_NAMES)}
    found: list[str] = []
    inside: tuple[str, ...] = (
        "\0",
    )  # of modules that have adapters already: they are linear themselves, not their parts
    parts: Iterable[tuple[str, nn.Module]] = module.named_modules()
    for name, part in parts:
        if isinstance(part, LoraLayer):
            inside = (*inside, f"{name}.")
        if isinstance(part, nn.Linear | Conv1D | LoraLayer) and id(part) not in heads and not name.startswith(inside):
            found.append(name)
    return found
