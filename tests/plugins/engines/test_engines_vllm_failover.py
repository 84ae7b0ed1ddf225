"""Engines that are lost are started again with the weights they had, asked again for what they owed, and no more often
than allowed; on several ranks all meet for the weights, whoever lost an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_ranks import in_two_ranks
from fake_sampler import FakeSampler
from rlhf.errors import RunError
from rlhf.world import ALONE, World
from rlhf_plugins.engines.vllm.beside import Beside
from rlhf_plugins.engines.vllm.failover import Absent, Failover, Shared
from rlhf_plugins.engines.vllm.remote import Deadlines
from rlhf_plugins.engines.vllm.sampler import Answer, Ask, EngineLost, Settings

WEIGHTS = {"a": torch.ones(2), "b": torch.full((3,), 2.0)}


def ask(*seeds: int) -> list[Ask]:
    return [Ask((1, 2), seed, 8, 1.0) for seed in seeds]


def right(asks: Sequence[Ask], weights: dict[str, Tensor] = WEIGHTS) -> list[Answer]:
    own = FakeSampler(Settings("m", {}))
    own.load(lambda: iter(weights.items()), 0)
    return own.sample(asks)


class Frail(FakeSampler):
    """Is lost at the calls that its owner's script names, by their number since the owner began: a call is a word."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(Settings("m", {}))
        self._owner = owner

    def sample(self, asks: Sequence[Ask]) -> list[Answer]:
        self._owner.call("sample")
        return super().sample(asks)

    def load(self, weights: Any, version: int) -> None:
        def stream() -> Iterator[tuple[str, Tensor]]:
            for pair in weights():
                yield pair
                self._owner.call("tensor")

        self._owner.call("load")
        super().load(stream, version)

    def load_adapter(self, tensors: Any, config: Any, version: int) -> None:
        self._owner.call("adapter")
        super().load_adapter(tensors, config, version)

    def score(self, sequences: Any) -> list[list[float]]:
        self._owner.call("score")
        return super().score(sequences)

    def close(self) -> None:
        self._owner.calls.append("close")


class Owner:
    """Starts engines, and knows when they are lost."""

    def __init__(self, **losses: Sequence[int]) -> None:
        self.losses, self.calls, self.said = losses, list[str](), list[str]()

    def start(self, again: bool) -> Frail:
        assert again == ("start" in self.calls)
        self.call("start")
        return Frail(self)

    def call(self, word: str) -> None:
        self.calls.append(word)
        if self.calls.count(word) in self.losses.get(word, ()):
            raise EngineLost(f"lost at {word} {self.calls.count(word)}")

    def failover(self, restarts: int = 2, world: World = ALONE) -> Failover:
        return Failover(self.start, world, restarts, self.said.append)


def loaded(owner: Owner, restarts: int = 2, world: World = ALONE) -> Failover:
    found = owner.failover(restarts, world)
    found.load(lambda: iter(WEIGHTS.items()), 4)
    return found


def test_nothing_happens_where_nothing_is_lost() -> None:
    owner = Owner()
    engine = loaded(owner)
    assert engine.sample(ask(1, 2)) == right(ask(1, 2))
    assert engine.version == 4 and engine.restarted == 0 and owner.said == []
    assert owner.calls == ["start", "load", "tensor", "tensor", "sample"]


def test_one_that_is_lost_while_it_samples_gives_the_same_responses_in_the_end() -> None:
    owner = Owner(sample=[1, 2])
    engine = loaded(owner)
    assert engine.sample(ask(1, 2)) == right(ask(1, 2))
    again = ["close", "start", "load", "tensor", "tensor", "sample"]
    assert owner.calls == ["start", "load", "tensor", "tensor", "sample", *again, *again]
    assert engine.version == 4 and engine.restarted == 2
    assert "lost at sample 1" in owner.said[0] and "(1 of 2), and asked again for 2 responses" in owner.said[0]
    assert "lost at sample 2" in owner.said[1] and "(2 of 2)" in owner.said[1]


def test_times_are_counted_in_a_row() -> None:
    owner = Owner(sample=[1, 2, 4, 5])
    engine = loaded(owner)
    assert engine.sample(ask(1)) == engine.sample(ask(1)) == right(ask(1))
    assert engine.restarted == 4


def test_what_is_lost_for_good_has_failed_and_the_next_call_tries_anew() -> None:
    owner = Owner(sample=[1, 2, 3])
    engine = loaded(owner)
    failed = Answer((), (), "length", failed="engine: lost 3 times in a row; the last time: lost at sample 3")
    assert engine.sample(ask(1, 2)) == [failed, failed]
    assert owner.said[-1] == "engine lost: lost at sample 3\n    lost 3 times in a row: given up"
    assert engine.restarted == 2
    assert engine.sample(ask(1, 2)) == right(ask(1, 2))


def test_with_no_restarts_the_first_loss_is_for_good() -> None:
    owner = Owner(sample=[1])
    assert loaded(owner, restarts=0).sample(ask(1))[0].failed
    assert owner.calls.count("start") == 1


def test_an_engine_that_can_not_be_started_again_ends_the_run() -> None:
    owner = Owner(sample=[1], start=[2, 3, 4])
    with pytest.raises(RunError, match=r"lost at start 4\nlost 3 times in a row: given up"):
        loaded(owner).sample(ask(1))
    assert owner.calls.count("start") == 4


def test_one_that_is_lost_while_it_takes_weights_takes_them_again() -> None:
    owner = Owner(tensor=[1], load=[2])
    engine = loaded(owner)
    assert owner.calls == [
        "start",
        "load",
        "tensor",
        "close",
        "start",
        "load",
        "close",
        "start",
        "load",
        "tensor",
        "tensor",
    ]
    assert engine.sample(ask(3)) == right(ask(3)) and engine.restarted == 2


def test_the_newest_weights_are_given_and_what_was_adapted_since() -> None:
    owner = Owner(sample=[2], adapter=[2], score=[1])
    engine = loaded(owner)
    newer = {"a": torch.zeros(1)}
    engine.load(lambda: iter(newer.items()), 5)
    assert engine.sample(ask(1)) == right(ask(1), newer)
    engine.load_adapter({"x": torch.tensor([3.0])}, {"r": 8}, 6)
    adapted = {"a": torch.zeros(1), "x": torch.tensor([3.0])}
    assert engine.sample(ask(1)) == right(ask(1), adapted)  # lost once in the sample, once in the adapter
    assert engine.version == 6 and engine.restarted == 2
    assert engine.score([(1, 7)]) == [[-1.0 - 3.0]]
    assert engine.restarted == 3
    engine.load(lambda: iter(WEIGHTS.items()), 7)
    assert engine.sample(ask(1)) == right(ask(1))  # without what adapted the weights before


def test_other_errors_are_no_losses() -> None:
    class Odd(FakeSampler):
        def sample(self, asks: Sequence[Ask]) -> list[Answer]:
            raise RunError("another run has sent its weights")

    engine = Failover(lambda again: Odd(Settings("m", {})), ALONE, 3, lambda text: None)
    with pytest.raises(RunError, match="another run"):
        engine.sample(ask(1))
    assert engine.restarted == 0


# Several ranks


def gathered(world: World, counted: list[int]) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """A stream each tensor of which is a meeting, as of sharded weights."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        counted.append(world.rank)
        for name, tensor in WEIGHTS.items():
            assert world.gather(name) == [name, name]
            yield name, tensor

    return stream


@pytest.mark.parametrize(
    "losses",
    [{"sample": [1]}, {"sample": [1, 2]}, {"tensor": [1]}, {"load": [1]}, {"sample": [1], "start": [2]}],
    ids=["sampling", "twice", "half the weights", "before the weights", "starting"],
)
def test_ranks_meet_for_the_weights_whoever_lost_an_engine(losses: dict[str, list[int]]) -> None:
    """Any call that only one rank made would leave it waiting: the barrier of the fake ranks breaks after a while."""
    counted: list[int] = []

    def work(rank: int, world: World) -> Any:
        owner = Owner(**(losses if rank == 1 else {}))
        engine = owner.failover(world=world)
        engine.load(gathered(world, counted), 4)
        return engine.sample(ask(rank)), engine.restarted, owner.calls, owner.said

    (first, restarted, calls, said), (second, same, _, too) = in_two_ranks(work)
    assert first == right(ask(0)) and second == right(ask(1))
    assert restarted == same == sum(map(len, losses.values()))
    assert calls.count("sample") == 1 and calls.count("load") == 1, "an engine that is there is left alone"
    assert said == too != []  # rank 0 alone is heard
    assert counted.count(0) == counted.count(1) == 1 + restarted


def test_a_rank_that_lost_its_engine_for_good_has_failed_alone() -> None:
    def work(rank: int, world: World) -> list[Answer]:
        return loaded(Owner(**({"sample": [1, 2, 3]} if rank else {})), world=world).sample(ask(rank))

    first, second = in_two_ranks(work)
    assert first == right(ask(0)) and [bool(answer.failed) for answer in second] == [True]


def test_one_engine_for_all_ranks() -> None:
    owner = Owner(sample=[1])
    counted: list[int] = []

    def work(rank: int, world: World) -> Any:
        start = owner.start if rank == 0 else lambda again: Absent()
        engine = Shared(Failover(start, world, 2, lambda text: None), world)
        engine.load(gathered(world, counted), 4)
        mine = ask(*([1, 2, 3] if rank == 0 else [4]))
        sampled = engine.sample(mine)
        scored = engine.score([(1, 7 * (rank + 1))] * (2 - rank))
        none = engine.sample([])
        engine.load_adapter({"x": torch.ones(1)}, {}, 5)
        return (
            sampled == right(mine),
            scored,
            none,
            engine.restarted,
            engine.version,
            engine.sample(mine) == right(mine),
        )

    first, second = in_two_ranks(work)
    assert first == (True, [[-9.0], [-9.0]], [], 1, 5, False)  # -7/7 of the token, -8 of the weights
    assert second == (True, [[-10.0]], [], 1, 5, False)
    assert counted.count(0) == counted.count(1) == 2
    # both ranks' in one call
    assert owner.calls.count("sample") == 4  # lost, again, of nothing, of the adapter


# Real processes


def test_processes_that_die_are_replaced_by_others(tmp_path: Path) -> None:
    options = {
        "die_once": str(tmp_path / "sampled"), "die_once_loading": str(tmp_path / "loaded"),
        "die_once_scoring": str(tmp_path / "scored"),
    }  # fmt: skip
    said: list[str] = []

    def start(again: bool) -> Beside:
        return Beside(Settings("m", options), Deadlines(sample=30.0), sampler="fake_sampler:FakeSampler", again=again)

    engine = Failover(start, ALONE, 2, said.append)
    engine.load(lambda: iter(WEIGHTS.items()), 3)
    assert engine.sample(ask(1, 2)) == right(ask(1, 2))
    assert engine.score([(1, 7)]) == [[-9.0]]
    assert engine.restarted == 3 and engine.version == 3
    engine.close()
    assert all("was ended by SIGKILL" in text and "it last printed:\n    fake: dying now" in text for text in said)
    waited = [text.partition("SIGKILL while waiting for ")[2].partition(";")[0] for text in said]
    assert waited[1:] == ["2 responses", "the log-probs of 1 sequences"]
    assert waited[0] in ("2 tensors to be taken", "weights to be in place")  # whichever is asked when it is noticed
