"""From prompts to judged rollouts: sampling requests, the engine, the rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from rlhf.data import derive
from rlhf.errors import RunError
from rlhf.interfaces import Codec, Engine, Failed, Reward, Score
from rlhf.sequences import Generation, Prompt, Rollouts, Sample
from rlhf.shares import share
from rlhf.world import ALONE, World


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


def groups_of(requests: Sequence[Sample]) -> list[int]:
    """Each request's group: several of one prompt share theirs. Numbered as asked for."""
    first: dict[int, int] = {}
    return [first.setdefault(id(request.prompt), len(first)) for request in requests]


def own_requests(requests: Sequence[Sample], groups: Sequence[int], longest: int, world: World) -> list[int]:
    """Which of the step's requests this rank serves: whole groups, so that ranks have about as many tokens.

    Args:
        longest: tokens of a response at most, all that is known of it beforehand.
    """
    costs = [0.0] * (max(groups, default=-1) + 1)
    for request, group in zip(requests, groups, strict=True):
        costs[group] += request.count * (len(request.prompt.tokens) + longest)
    mine = set(share(costs, world.size)[world.rank])
    return [i for i, group in enumerate(groups) if group in mine]


def gather(
    requests: Sequence[Sample],
    generation: Generation,
    codec: Codec,
    temperature: float,
    groups: Sequence[int] | None = None,
) -> Rollouts:
    """Rollouts of what an engine returned.

    Args:
        groups: each request's, of all ranks' requests; left out, these are all.

    Raises:
        RunError: it returned another number of responses than asked for, or of log-probs than of tokens, or tokens of
            one that failed.
    """
    groups = groups_of(requests) if groups is None else groups
    of_response = [request for request in requests for _ in range(request.count)]
    sequences = generation.sequences
    if len(of_response) != len(sequences):
        raise RunError(f"the engine returned {len(sequences)} responses to requests for {len(of_response)}")
    if generation.logp is not None and generation.logp.shape != sequences.tokens.shape:
        given = f"log-probs of shape {tuple(generation.logp.shape)} for {len(sequences.tokens)} tokens"
        raise RunError(f"the engine returned {given}")
    if any(int(sequences.lengths[place]) for place in generation.failed):
        raise RunError("the engine returned tokens of a response that failed")
    of_group = [group for request, group in zip(requests, groups, strict=True) for _ in range(request.count)]
    prompts = {id(request.prompt): codec.prompt_text(request.prompt.tokens) for request in requests}
    return Rollouts(
        sequences=attrs.evolve(sequences, group=torch.tensor(of_group, dtype=torch.long)),
        logp=generation.logp,
        finish=generation.finish,
        rows=tuple(request.prompt.row for request in of_response),
        prompts=tuple(prompts[id(request.prompt)] for request in of_response),
        texts=tuple(codec.decode(response) for response in sequences.responses()),
        tags=tuple(request.tag for request in of_response),
        rewards=torch.zeros(len(of_response)),
        temperature=temperature,
        version=generation.version,
        failed=generation.failed,
    )


def judge(rollouts: Rollouts, sources: Sequence[Source], score: Score) -> tuple[Rollouts, list[str]]:
    """Judge rollouts by every source and add up; groups with one that could not be had, or be judged, are left out.

    Returns:
        (the judged rollouts, perhaps none; why each of those that failed did)

    Raises:
        RunError: a source raises, or returns something else than a finite number for each.
    """
    rollouts, unsampled = _whole_groups(rollouts, rollouts.failed)  # no reward sees them
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
    weights = {source.name: source.weight for source in sources}
    judged = attrs.evolve(rollouts, rewards=total, reward_parts=parts, reward_weights=weights)
    judged, unjudged = _whole_groups(judged, failed)
    return judged, unsampled + unjudged


def _whole_groups(rollouts: Rollouts, failed: Mapping[int, str]) -> tuple[Rollouts, list[str]]:
    """Without the groups of those that failed; why each of these did. failed: by place."""
    if not failed:
        return rollouts, []
    lost = {int(rollouts.sequences.group[i]) for i in failed}
    kept = [i for i, group in enumerate(rollouts.sequences.group.tolist()) if group not in lost]
    return rollouts.select(torch.tensor(kept, dtype=torch.long)), list(failed.values())


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
        self,
        engine: Engine,
        sources: Sequence[Source],
        codec: Codec,
        score: Score,
        seed: int,
        temperature: float,
        world: World = ALONE,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            whole: a context for sampling, in which what the engine samples from is whole.
        """
        self.engine = engine
        self.sources = list(sources)
        self._codec = codec
        self._score = score
        self._seed = seed
        self.temperature = temperature
        self._world = world
        self._whole = whole

    def prompts(self, rows: Sequence[tuple[Any, Tensor]], first: int = 0) -> list[Prompt]:
        """Prompts of (row, tokens), numbered by their place in the batch, from `first` on."""
        return [Prompt(tokens, row, i) for i, (row, tokens) in enumerate(rows, first)]

    def sample(self, requests: Sequence[Sample], purpose: str, temperature: float | None = None) -> Rollouts:
        """This rank's part of the rollouts, unjudged.

        Args:
            requests: of all ranks, the same on each.
            purpose: makes the seeds: the step, or what is evaluated.
        """
        asked, groups = seeded(requests, self._seed, purpose), groups_of(requests)
        longest = int(getattr(self.engine.config, "max_new_tokens", 0))
        mine = own_requests(asked, groups, longest, self._world)
        own = [asked[i] for i in mine]
        with self._whole():
            generation = self.engine.generate(own, temperature)
        heat = self.temperature if temperature is None else temperature
        return gather(own, generation, self._codec, heat, [groups[i] for i in mine])

    def judge(self, rollouts: Rollouts, needed: bool = True) -> tuple[Rollouts, list[str]]:
        """This rank's rollouts, judged; see `judge`.

        Args:
            needed: without any of them there is nothing to go on with.

        Raises:
            RunError: on every rank, none of any rank's could be had and judged, and some are needed.
        """
        judged, failures = judge(rollouts, self.sources, self._score)
        everybody = self._world.gather([len(judged), failures[:1]])
        first = [why for _, whys in everybody for why in whys]
        if needed and first and not sum(kept for kept, _ in everybody):
            raise RunError(f"every rollout of the batch failed; the first: {first[0]}")
        return judged, failures


def describe(rollouts: Rollouts) -> dict[str, Tensor]:
    """The numbers of rollouts that are reported as means: name -> float [B]."""
    parts = rollouts.reward_parts
    return {
        **({"reward/mean": rollouts.rewards} if parts else {}),  # some algorithms do without
        **({f"reward/{name}": part for name, part in parts.items()} if len(parts) > 1 else {}),
        "response/length": rollouts.lengths.float(),
        "response/ended": rollouts.ended.float(),
    }


def spread(rewards: Tensor, world: World) -> dict[str, float]:
    """`reward/std` over all ranks' rewards, [B] of this rank; nothing where there is but one. Divided by their number:
    the spread of this very batch."""
    own = rewards.double()
    count, total = world.sum(torch.stack([torch.tensor(len(own), dtype=torch.float64), own.sum()])).tolist()
    if count < 2:
        return {}
    squares = world.sum((own - total / count).square().sum())
    return {"reward/std": math.sqrt(float(squares) / count)}
