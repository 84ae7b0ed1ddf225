"""From prompts to judged rollouts: sampling requests, the engine, the rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import attrs
import torch
from torch import Tensor

from rlhf.data import derive
from rlhf.errors import RunError
from rlhf.interfaces import Codec, Engine, Failed, Reward, Score
from rlhf.sequences import Generation, Prompt, Rollouts, Sample


@attrs.frozen
class Source:
    """A reward of the plan: its name, its weight in the sum, and itself."""

    name: str
    weight: float
    reward: Reward


def seeded(requests: Sequence[Sample], seed: int, purpose: str) -> list[Sample]:
    """Give each request a seed of its own: from its prompt's place in the global batch, so the same on any number of
    ranks."""
    found, before = [], dict[int, int]()
    for request in requests:
        place = request.prompt.index
        nth = before.get(place, 0)
        before[place] = nth + 1
        own = request.seed if request.seed is not None else derive(seed, purpose, place, nth)
        found.append(attrs.evolve(request, seed=own))
    return found


def gather(requests: Sequence[Sample], generation: Generation, codec: Codec, temperature: float) -> Rollouts:
    """Rollouts of what an engine returned.

    Raises:
        RunError: it returned another number of responses than asked for.
    """
    of_response = [request for request in requests for _ in range(request.count)]
    sequences = generation.sequences
    if len(of_response) != len(sequences):
        raise RunError(f"the engine returned {len(sequences)} responses to requests for {len(of_response)}")
    groups = [i for i, request in enumerate(requests) for _ in range(request.count)]
    if len({id(request.prompt) for request in requests}) != len(requests):  # several requests of one prompt
        first: dict[int, int] = {}
        groups = [first.setdefault(id(request.prompt), len(first)) for request in of_response]
    prompts = {id(request.prompt): codec.prompt_text(request.prompt.tokens) for request in requests}
    return Rollouts(
        sequences=attrs.evolve(sequences, group=torch.tensor(groups, dtype=torch.long)),
        logp=generation.logp,
        finish=generation.finish,
        rows=tuple(request.prompt.row for request in of_response),
        prompts=tuple(prompts[id(request.prompt)] for request in of_response),
        texts=tuple(codec.decode(response) for response in sequences.responses()),
        tags=tuple(request.tag for request in of_response),
        rewards=torch.zeros(len(of_response)),
        temperature=temperature,
        version=generation.version,
    )


def judge(rollouts: Rollouts, sources: Sequence[Source], score: Score) -> tuple[Rollouts, list[str]]:
    """Judge rollouts by every source and add up; groups with a rollout that could not be judged are left out.

    Returns:
        (the judged rollouts, why each of those left out failed)

    Raises:
        RunError: a source raises, or returns something else than a finite number for each.
    """
    total = torch.zeros(len(rollouts))
    parts: dict[str, Tensor] = {}
    failed: dict[int, str] = {}
    for source in sources:
        try:
            verdicts = source.reward.judge(rollouts, score)
        except RunError:
            raise
        except Exception as error:
            raise RunError(f"reward {source.name!r} raised {type(error).__name__}: {error}") from error
        part = _numbers(source.name, verdicts, rollouts, failed)
        parts[source.name] = part
        total = total + source.weight * part
    judged = attrs.evolve(rollouts, rewards=total, reward_parts=parts)
    if not failed:
        return judged, []
    lost = {int(rollouts.sequences.group[i]) for i in failed}
    kept = [i for i, group in enumerate(rollouts.sequences.group.tolist()) if group not in lost]
    if not kept:
        raise RunError(f"every rollout of the batch failed to be judged; the first: {next(iter(failed.values()))}")
    return judged.select(torch.tensor(kept, dtype=torch.long)), list(failed.values())


def _numbers(name: str, verdicts: Any, rollouts: Rollouts, failed: dict[int, str]) -> Tensor:
    if isinstance(verdicts, Tensor):
        if verdicts.ndim != 1:
            raise RunError(
                f"reward {name!r} returned a tensor of shape {tuple(verdicts.shape)}, not ({len(rollouts)},)"
            )
        verdicts = verdicts.detach().float().cpu().tolist()
    try:
        items = None if isinstance(verdicts, str | bytes | Mapping | Set) else list(verdicts)
    except TypeError:
        items = None
    if items is None:
        raise RunError(f"reward {name!r} returned {verdicts!r}, not one number a rollout, in order")
    if len(items) != len(rollouts):
        raise RunError(f"reward {name!r} returned {len(items)} numbers for {len(rollouts)} rollouts")
    numbers = []
    for i, item in enumerate(items):
        if isinstance(item, Failed):
            failed.setdefault(i, f"{name}: {item.why}")
            numbers.append(0.0)  # its group is left out
            continue
        try:
            number = math.nan if isinstance(item, str) else float(item)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # no number, or several
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise RunError(
                f"reward {name!r} returned {item!r} for sample {i}, not a finite number: "
                f"prompt {_short(rollouts.prompts[i])}, response {_short(rollouts.texts[i])}"
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)


_LARGEST = torch.finfo(torch.float32).max


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


class Sampler:
    """Prompts in, judged rollouts out."""

    def __init__(
        self, engine: Engine, sources: Sequence[Source], codec: Codec, score: Score, seed: int, temperature: float
    ) -> None:
        self.engine = engine
        self.sources = list(sources)
        self._codec = codec
        self._score = score
        self._seed = seed
        self._temperature = temperature

    def prompts(self, rows: Sequence[tuple[Any, Tensor]]) -> list[Prompt]:
        """Prompts of (row, tokens), numbered by their place in the batch."""
        return [Prompt(tokens, row, i) for i, (row, tokens) in enumerate(rows)]

    def sample(self, requests: Sequence[Sample], purpose: str, temperature: float | None = None) -> Rollouts:
        """Unjudged rollouts. `purpose` makes the seeds: the step, or what is evaluated."""
        asked = seeded(requests, self._seed, purpose)
        generation = self.engine.generate(asked, temperature)
        return gather(asked, generation, self._codec, self._temperature if temperature is None else temperature)

    def judge(self, rollouts: Rollouts) -> tuple[Rollouts, list[str]]:
        return judge(rollouts, self.sources, self._score)


def describe(rollouts: Rollouts) -> dict[str, Tensor]:
    """The numbers of rollouts that are reported as means: name -> float [B]."""
    parts = rollouts.reward_parts
    return {
        "reward/mean": rollouts.rewards,
        **({f"reward/{name}": part for name, part in parts.items()} if len(parts) > 1 else {}),
        "response/length": rollouts.lengths.float(),
        "response/ended": rollouts.ended.float(),
    }
