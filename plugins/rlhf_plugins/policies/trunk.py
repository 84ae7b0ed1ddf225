"""A loaded transformers model seen as a trunk and its heads, whatever the family, and whatever wraps it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.api import RunError, Sequences
from rlhf_plugins.policies import CALL, FLAT_CALL, attention, ragged
from rlhf_plugins.policies.heads import LogitsOf, logit_transform
from rlhf_plugins.policies.layout import Costs, Grid, lay_flat, lay_out
from rlhf_plugins.policies.loading import partitioned

_NOTE = "rlhf_traits"
"""Where a model carries what was found out about it: on itself, so that copies and wrappers keep it."""
_UNREAD = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""A mask for a flat row, whose attention goes by blocks: one of four dimensions, so that the model makes none."""


@attrs.frozen
class Traits:
    """What was found out about a model when it was loaded."""

    device: torch.device
    """Where its inputs go."""
    compute: torch.dtype | None
    """Of matrix products, by autocast."""
    own_forward: bool
    """Its logits are not its head's output as `logit_transform` has it, so only its own forward makes them."""
    shareable: bool
    """Several responses may stand behind one prompt in a row."""
    flat: bool = False
    """Its attention can be told where sequences lie, so that all may stand in one row."""


def base_of(module: nn.Module) -> PreTrainedModel:
    """The transformers model inside a module; adapters stay in it, as they are its layers.

    Raises:
        RunError: there is none.
    """
    inner: Any = module
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise RunError(f"policy hf can't read a {type(inner).__name__}: it isn't a transformers model")
    return inner


def examine(model: PreTrainedModel, compute: torch.dtype | None, device: torch.device, lm: bool) -> None:
    """Find out and note a model's traits, by trying it on a handful of tokens.

    Weights that DeepSpeed already spread over ranks can't be tried alone; the common case is taken for granted there.
    """
    trunk = Trunk(model, Traits(device, compute, own_forward=False, shareable=False))
    if partitioned(model):
        setattr(model, _NOTE, trunk.traits)
        return
    own_forward = lm and not trunk.head_agrees()
    trunk.traits = attrs.evolve(trunk.traits, own_forward=own_forward)
    shareable, flat = trunk.agrees("shared"), trunk.agrees("flat")
    setattr(model, _NOTE, attrs.evolve(trunk.traits, shareable=shareable, flat=flat))


class Trunk:
    """Reads hidden states, and says how logits come from them."""

    def __init__(self, module: nn.Module, traits: Traits | None = None) -> None:
        self.model = base_of(module)
        if traits is None:
            if not hasattr(self.model, _NOTE):
                device = self.model.get_input_embeddings().weight.device
                examine(self.model, None, device, lm=self.model.get_output_embeddings() is not None)
            traits = cast(Traits, getattr(self.model, _NOTE))
        self.traits = traits

    @property
    def device(self) -> torch.device:
        return self.traits.device

    @property
    def sharded(self) -> bool:
        """Parameters are spread over ranks (DeepSpeed ZeRO-3, FSDP), so that each use of one is a collective."""
        return any(spread(parameter) for parameter in self.model.parameters())

    @property
    def head_sharded(self) -> bool:
        """Each use of the vocabulary head is a collective; FSDP keeps it whole through a forward and its backward."""
        return spread(self.model.get_output_embeddings().weight)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        compute = self.traits.compute
        return torch.autocast(self.device.type, dtype=compute, enabled=compute is not None)

    def costs(self) -> Costs:
        """Of width D: a pair in attention takes 1/(6 D) of the operations of a token's matrix products, at two fifths
        of their speed (CPU, bfloat16), two thirds (CPU, float32), or half (GPU, with a mask; not measured)."""
        width = int(self.model.config.get_text_config().hidden_size)
        if self.device.type != "cpu":
            return Costs(pair=0.35 / width, call=2048.0)
        half = self.traits.compute in (torch.bfloat16, torch.float16) or self.model.dtype != torch.float32
        return Costs(pair=(0.4 if half else 0.25) / width, call=CALL)

    def flat_costs(self) -> ragged.Costs:
        """Of width D and d = 12 D^2 weights a layer: a block's dozen calls take about 300 microseconds, forward and
        backward, in which 2e6 / D^2 tokens go through the layer's matrix products (CPU, two cores)."""
        config = self.model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", 1))
        pair, width = self.costs().pair, int(config.hidden_size)
        return ragged.Costs(pair=pair, call=FLAT_CALL / width**2, most=attention.MOST // heads)

    def _flat_costs_less(self, sequences: Sequences) -> bool:
        """Where prompts are shared, a narrow model's rectangles waste less than a flat row's blocks cost in calls: a
        width of 128 and 8 responses a prompt took a third longer flat. Without any to share, flat was never slower."""
        shared = len(sequences.prompts) < len(sequences)
        return not shared or self.flat_costs().call <= self.costs().call

    def read(self, sequences: Sequences, layout: str, last: bool) -> tuple[Tensor, Tensor | None]:
        """One forward.

        Returns:
            ([N, D], the state before each response token; with `last` [B, D], the state at each last token, else None)
        """
        if self.traits.flat and (layout == "flat" or (layout == "auto" and self._flat_costs_less(sequences))):
            grids = [lay_flat(sequences, self.flat_costs())]
        else:
            share = True if layout == "shared" else None if layout == "auto" else False
            share = share if self.traits.shareable else False
            grids = lay_out(sequences, share=share, single=self.sharded, costs=self.costs())
        before, ends = [], []
        for grid in grids:
            states = self._states(grid).flatten(0, 1)  # [b x T, D]
            before.append(states[grid.before.to(states.device)])
            if last:
                ends.append(states[grid.last.to(states.device)])
        return _in_order(before, [grid.token for grid in grids]), (
            _in_order(ends, [grid.sequence for grid in grids]) if last else None
        )

    def _states(self, grid: Grid) -> Tensor:
        """[b, T, D]; or, of a model that only its own forward reads, [b, T, V + D]: logits, then states."""
        mask = _UNREAD if grid.blocks else grid.mask
        arguments = {
            "input_ids": grid.ids.to(self.device),
            "position_ids": grid.positions.to(self.device),
            "attention_mask": None if mask is None else mask.to(self.device),
            "use_cache": False,
            **({attention.BLOCKS: grid.blocks} if grid.blocks else {}),
        }
        if not self.traits.own_forward:
            return cast(Tensor, self.model.base_model(**arguments).last_hidden_state)
        out = self.model(**arguments, output_hidden_states=True)
        return torch.cat([out.logits, out.hidden_states[-1]], dim=-1)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def hidden(self, states: Tensor) -> Tensor:
        """The hidden part of what was read, for scalar heads."""
        return states[:, self.vocabulary :] if self.traits.own_forward else states

    def logits_of(self) -> LogitsOf:
        """From what was read to logits."""
        if self.traits.own_forward:
            return lambda states: states[:, : self.vocabulary]
        head = self.model.get_output_embeddings()
        transform = logit_transform(self.model.config.get_text_config())
        return lambda states: transform(head(states))

    def head_agrees(self) -> bool:
        """The head on the trunk gives the logits of the model's own forward."""
        ids = self._probe(8)[None]
        with torch.no_grad(), self.autocast():
            own = self.model(input_ids=ids, use_cache=False).logits[0]
            states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            return _alike(self.logits_of()(states), own)

    def agrees(self, layout: str) -> bool:
        """Responses laid out so (`shared` or `flat`) have the states that each has in a row of its own."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kernels = ("sdpa", attention.NAME) if layout == "shared" else (attention.NAME,)
        if self.model.config._attn_implementation not in kernels or kinds != {"full_attention"} or windowed:
            return False  # other kernels take no such mask, and a window would count the responses between
        ids = self._probe(14).cpu()
        some = Sequences.of([ids[:3], ids[9:11]], [ids[3:6], ids[6:9], ids[11:]], prompt_of=[0, 0, 1])
        trial = Trunk(self.model, attrs.evolve(self.traits, shareable=True, flat=True))
        with torch.no_grad(), self.autocast():
            try:
                return _alike(trial.read(some, layout, False)[0], trial.read(some, "padded", False)[0])
            except (TypeError, ValueError, RuntimeError):
                return False  # it takes no mask, positions or blocks of ours

    def _probe(self, count: int) -> Tensor:
        """Some token ids, all over the vocabulary."""
        rows = int(self.model.get_input_embeddings().weight.shape[0])
        return torch.linspace(0, rows - 1, count).long().to(self.device)


def spread(parameter: Any) -> bool:
    """It lies spread over ranks (DeepSpeed ZeRO-3, FSDP), and must be gathered to be used."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: a wrong scale, cap or mask is off by far more than either bound."""
    bound = 1e-3 if a.dtype == torch.float32 and b.dtype == torch.float32 else 5e-2
    return bool((a.float() - b.float()).norm() <= bound * b.float().norm())


def _in_order(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Concatenate parts and put each row in its place."""
    order = torch.empty(sum(len(place) for place in places), dtype=torch.long)
    order[torch.cat(list(places))] = torch.arange(len(order))
    return torch.cat(list(parts))[order.to(parts[0].device)]
