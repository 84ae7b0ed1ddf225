"""The contract of rollout engines: `EngineContract`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from rlhf.testing import parts
from rlhf.testing.contract import Contract, broken, require

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.interfaces import Engine
    from rlhf.sequences import Generation, Prompt, Sample
    from rlhf.testing.kit import Kit, Work

_PROMPTS = ("n o p: ", "q, ", "r s t m o p q: ")
_MOST = 6


class EngineContract(Contract):
    """What an engine must keep: as many responses as asked for, in order; a seed's response is the same in any company;
    log-probs that are what it says they are; weights that are the trainer's.

    class TestMine(EngineContract):
        name = "mine"
    """

    kind = "engine"
    learns: ClassVar[bool | None] = None
    """Whether it samples from the policy and takes its new weights; left out, where its entry provides "on-policy"."""
    seeded: ClassVar[bool] = True
    """A seed fixes a response; not so of an endpoint that takes none."""
    logprob_tolerance: ClassVar[float] = 1e-4
    """Nats by which log-probs may differ from the trainer's forward: those that are exact by rounding alone, others by
    their precision and kernels."""

    def base(self, kit: Kit) -> dict[str, Any]:
        return {"algo": parts.REINFORCE, "reward": parts.REWARD, "data": str(kit.once("data", kit.data))}

    def asked(self) -> dict[str, Any]:
        return {"engine": {"name": self.name, "max_new_tokens": _MOST, **self.options}}

    def work(self, kit: Kit) -> Work:
        """A run with the engine, attached and given its weights; made once."""

        def make() -> Work:
            made = kit.work(self.plan(kit))
            self._sync(made, 0)
            return made

        found: Work = kit.once(("engine at work", self.name, repr(self.options), repr(self.recipe)), make)
        return found

    def engine(self, work: Work) -> Engine:
        assert work.parts.sampler is not None
        return work.parts.sampler.engine

    def on_policy(self, kit: Kit) -> bool:
        return "on-policy" in self.entry(kit).provides if self.learns is None else self.learns

    def prompts(self, work: Work) -> list[Prompt]:
        from rlhf.rows import PromptRow
        from rlhf.sequences import Prompt

        codec = work.parts.models.policy.codec(work.plan.role("policy").model.path)
        return [Prompt(codec.prompt(text), PromptRow(text), i) for i, text in enumerate(_PROMPTS)]

    def requests(self, work: Work, counts: Sequence[int] = (2, 1, 3), seed: int = 5) -> list[Sample]:
        from rlhf.sequences import Sample

        prompts = zip(self.prompts(work), counts, strict=True)
        return [Sample(prompt, count, seed=seed + i) for i, (prompt, count) in enumerate(prompts)]

    def generate(self, work: Work, requests: Sequence[Sample], temperature: float | None = None) -> Generation:
        sampler = work.parts.sampler
        assert sampler is not None
        with sampler._whole():
            return sampler.engine.generate(requests, temperature)

    def _sync(self, work: Work, version: int) -> None:
        from rlhf.models import weight_stream

        self.engine(work).sync(weight_stream(work.parts.models, "policy"), version)

    # The terms

    def test_as_many_as_asked_for_in_order(self, rlhf_kit: Kit) -> None:
        """Checked as a run checks it: responses, their prompts, finish reasons, and log-probs a token."""
        from rlhf.errors import RunError
        from rlhf.rollouts import gather

        work = self.work(rlhf_kit)
        requests = self.requests(work)
        made = self.generate(work, requests)
        codec = work.parts.models.policy.codec(work.plan.role("policy").model.path)
        try:
            gather(requests, made, codec, 1.0)
        except RunError as error:
            broken(str(error))
        wanted = [request.prompt.tokens for request in requests for _ in range(request.count)]
        for i, tokens in enumerate(wanted):
            same = made.sequences.prompt(i).tolist() == tokens.tolist()
            require(same, f"response {i} stands at another prompt: the order is that of the requests, `count` of each")
        require(len(made.finish) == len(wanted), f"{len(made.finish)} finish reasons for {len(wanted)} responses")
        require(set(made.finish) <= {"stop", "length"}, f"finish reasons are stop and length, not {set(made.finish)}")
        for i, (length, reason) in enumerate(zip(made.sequences.lengths.tolist(), made.finish, strict=True)):
            if i not in made.failed:
                require(1 <= length <= _MOST, f"response {i} has {length} tokens, and max_new_tokens is {_MOST}")
                full = length == _MOST or reason == "stop"
                require(full, f"response {i} is cut ('length') after {length} tokens of {_MOST}")

    def test_nothing_asked_for(self, rlhf_kit: Kit) -> None:
        """A rank may have no requests."""
        work = self.work(rlhf_kit)
        try:
            made = self.generate(work, [])
        except Exception as error:
            broken(f"asked for nothing, as a rank may be, it raises {type(error).__name__}: {error}")
        require(len(made.sequences) == 0, f"asked for nothing, it returns {len(made.sequences)} responses")

    def test_a_seed_gives_the_same_response_in_any_company(self, rlhf_kit: Kit) -> None:
        """So a run is the same on any number of ranks, and a lost response can be asked for again."""
        self._need_seeds()
        work = self.work(rlhf_kit)
        requests = self.requests(work)
        together = _texts(self.generate(work, requests))
        require(_texts(self.generate(work, requests)) == together, "asked again with the same seeds, it says otherwise")
        turned = _texts(self.generate(work, requests[::-1]))
        require(turned == together[3:] + together[2:3] + together[:2], "the order of requests changes responses")
        alone = [text for request in requests for text in _texts(self.generate(work, [request]))]
        require(alone == together, "asked for alone, a request's responses are others than among others'")

    def test_seeds_and_responses_differ(self, rlhf_kit: Kit) -> None:
        """Another seed, and another of the same request."""
        self._need_seeds()
        work = self.work(rlhf_kit)
        first, second = (_texts(self.generate(work, self.requests(work, (4, 4, 4), seed))) for seed in (5, 50))
        require(first != second, "another seed gives the same responses")
        fix = "responses of one request are drawn apart"
        require(len(set(map(tuple, first[:4]))) > 1, f"four responses to one request are the same: {fix}")

    def test_temperature_0_is_greedy(self, rlhf_kit: Kit) -> None:
        """And so is a request that says so."""
        from rlhf.sequences import Sample

        work = self.work(rlhf_kit)
        said = [_texts(self.generate(work, self.requests(work, seed=seed), 0.0)) for seed in (5, 50)]
        require(said[0] == said[1], "at temperature 0 a seed changes the response")
        require(said[0][0] == said[0][1], "at temperature 0 two responses to a prompt differ")
        asked = [Sample(prompt, greedy=True, seed=1) for prompt in self.prompts(work)]
        greedy = _texts(self.generate(work, asked))
        require(greedy == [said[0][0], said[0][2], said[0][3]], "Sample(greedy=True) isn't what temperature 0 gives")

    def test_log_probs_are_what_it_says(self, rlhf_kit: Kit) -> None:
        """Of each token, under the weights that sampled, as `logprobs` describes them."""
        work = self.work(rlhf_kit)
        made = self.generate(work, self.requests(work))
        said = self.engine(work).logprobs
        if made.logp is None:
            require(not said.available, "it returns no log-probs: say so, logprobs = LogProbs(available=False)")
            return
        require(bool((made.logp <= 1e-6).all()), "a log-prob is above 0")
        usable = said.available and not said.truncated and self.on_policy(rlhf_kit)
        if not usable or not said.usable(self._temperature(work)):
            return
        off = float((self._trainers(work, made) - made.logp).abs().max())
        what = "exact" if said.exact else "the policy's"
        told = f"its log-probs are off by {off:.3g} nats, more than {self.logprob_tolerance:g}, and said to be {what}"
        require(off <= self.logprob_tolerance, told)

    def test_new_weights_are_sampled_from(self, rlhf_kit: Kit) -> None:
        """After `sync`: other responses, of the version that it was told."""
        self._need_policy(rlhf_kit)
        work = rlhf_kit.work(self.plan(rlhf_kit))
        self._sync(work, 0)
        requests = self.requests(work)
        before = self.generate(work, requests, 0.0)
        require(before.version == 0, f"synced to version 0, it says that it samples from version {before.version}")
        _move(work)
        self._sync(work, 7)
        after = self.generate(work, requests, 0.0)
        require(after.version == 7, f"synced to version 7, it says that it samples from version {after.version}")
        require(_texts(after) != _texts(before), "after sync it samples from the weights of before")
        if after.logp is not None and self.engine(work).logprobs.usable(1.0):
            sampled = self.generate(work, requests)
            assert sampled.logp is not None
            off = float((self._trainers(work, sampled) - sampled.logp).abs().max())
            near = off <= self.logprob_tolerance
            require(near, f"after sync its log-probs are off by {off:.3g} nats: some weights are those of before")
        self.engine(work).close()

    def test_state_is_plain_and_complete(self, rlhf_kit: Kit) -> None:
        from rlhf.testing.kit import same, written_and_read

        work = self.work(rlhf_kit)
        self.generate(work, self.requests(work))
        try:
            state = written_and_read(self.engine(work).state())
        except TypeError as error:
            broken(f"its state can't be put into a checkpoint: {error}")
        after = _texts(self.generate(work, self.requests(work, seed=9)))
        self.engine(work).load_state(state)
        require(same(written_and_read(self.engine(work).state()), state), "given its state, it says another")
        again = _texts(self.generate(work, self.requests(work, seed=9)))
        if self.seeded:
            require(after == again, "given back its state, it goes on otherwise than before")

    def _need_seeds(self) -> None:
        if not self.seeded:
            pytest.skip("it takes no seeds: the contract says seeded = False")

    def _need_policy(self, kit: Kit) -> None:
        if not self.on_policy(kit):
            pytest.skip("it doesn't sample from the policy: its entry doesn't provide \"on-policy\"")

    def _temperature(self, work: Work) -> float:
        return float(getattr(self.engine(work).config, "temperature", 1.0))

    def _trainers(self, work: Work, made: Generation) -> Tensor:
        """Log-probs by the trainer's own forward."""
        from rlhf.experience import Experience

        experience = Experience(made.sequences)
        experience.temperature = self._temperature(work)
        return work.parts.score(experience, "policy").logp


def _texts(made: Generation) -> list[list[int]]:
    return [response.tolist() for response in made.sequences.responses()]


def _move(work: Work) -> None:
    """Other weights, as if steps had been made: of the same size, drawn anew."""
    import torch

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in work.parts.models.trained.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                drawn = torch.randn(parameter.shape, generator=generator) * float(parameter.std())
                parameter.copy_(drawn)
    work.parts.models.stepped()
