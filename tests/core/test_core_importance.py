"""Engines that aren't exact: weights by hand, gradients over every outcome there is, and whole runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import attrs
import pytest
import torch
from torch import Tensor

from built import rollouts_of
from fake_ranks import in_two_ranks
from rlhf.errors import RunError
from rlhf.experience import Batch, Experience, Totals, policy_mean, token_mean
from rlhf.importance import OffPolicy, importance_weights
from rlhf.interfaces import Context, Engine, LogProbs
from rlhf.plan import Plan
from rlhf.scores import ScoreRequest, Scores
from rlhf.scoring import Scorer
from rlhf.sequences import Sequences
from rlhf.world import World
from rlhf_plugins.algorithms import PPOConfig
from rlhf_plugins.algorithms.ppo import PPO

# Responses of 3, 1 and 0 tokens; what the trainer finds a token's probability to be, by the engine's.
RATIOS, LENGTHS = [0.5, 1.5, 4.0, 1.6], [3, 1, 0]
DIFFERENCE = torch.tensor([math.log(r) for r in RATIOS])
FLOAT32: dict[str, Any] = {"rel": 1e-6, "abs": 1e-6}  # weights are float32: 2^-24, after exp of a sum of three
NAN = math.nan


def sequences_of(lengths: list[int], masks: list[Tensor | None] | None = None) -> Sequences:
    responses = [torch.arange(n) for n in lengths]
    return Sequences.of([torch.tensor([9])] * len(lengths), responses, masks=masks)


@pytest.mark.parametrize(
    ("level", "beyond", "expected", "over"),
    [
        ("token", "clip", [0.5, 1.5, 2.0, 1.6], [2]),
        ("token", "mask", [0.5, 1.5, 0.0, 1.6], [2]),
        # .5 x 1.5 x 4 = 3 is the whole response's
        ("sequence", "clip", [2.0, 2.0, 2.0, 1.6], [0, 1, 2]),
        ("sequence", "mask", [0.0, 0.0, 0.0, 1.6], [0, 1, 2]),
    ],
)
def test_weights_by_hand(level: str, beyond: str, expected: list[float], over: list[int]) -> None:
    found = importance_weights(DIFFERENCE, sequences_of(LENGTHS), level, 2.0, beyond)
    assert found.weights.tolist() == pytest.approx(expected, **FLOAT32) and found.weights.dtype == torch.float32
    assert found.beyond.nonzero().flatten().tolist() == over


def test_below_the_cap_a_response_weighs_the_product_of_its_tokens() -> None:
    found = importance_weights(DIFFERENCE, sequences_of(LENGTHS), "sequence", 10.0, "clip")
    assert found.weights.tolist() == pytest.approx([3.0, 3.0, 3.0, 1.6], **FLOAT32)
    assert not found.beyond.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_that_are_not_the_policys_own_have_no_part_in_it(level: str) -> None:
    masks = [torch.tensor([True, False, True]), None, None]
    difference = torch.tensor([math.log(0.5), NAN, math.log(3.0), 500.0])  # exp of the last overflows: it is clipped
    found = importance_weights(difference, sequences_of([3, 1, 0], masks), level, 2.0, "clip")
    own = [0.5, 2.0] if level == "token" else [1.5, 1.5]
    assert found.weights.tolist() == pytest.approx([own[0], 1.0, own[1], 2.0], **FLOAT32)
    assert found.beyond.tolist() == [False, False, level == "token", True]


def test_a_weight_at_the_cap_is_not_beyond_it() -> None:
    found = importance_weights(torch.zeros(2), sequences_of([2]), "token", 1.0, "mask")
    assert found.weights.tolist() == [1.0, 1.0] and not found.beyond.any()


# What a step learns of its rollouts


def metrics_of(rows: list[int], world: World, **options: Any) -> dict[str, float]:
    """Of these rows of RATIOS."""
    sequences = sequences_of(LENGTHS)
    rollouts = rollouts_of(sequences, torch.full((4,), -1.0)).select(torch.tensor(rows, dtype=torch.long))
    found = OffPolicy(**options)
    found.weigh(rollouts, DIFFERENCE[sequences.token_index(torch.tensor(rows, dtype=torch.long))] - 1.0)
    return found.metrics(world)


def test_metrics_by_hand() -> None:
    expected = {
        "engine/logp_difference": sum(abs(math.log(r)) for r in RATIOS) / 4,
        "engine/logp_difference_max": math.log(4.0),
        "engine/kl": sum(r - 1 - math.log(r) for r in RATIOS) / 4,
    }
    clipped = {"importance/mean": 5.6 / 4, "importance/clipped": 1 / 4,
               "importance/ess": 5.6**2 / (4 * (0.5**2 + 1.5**2 + 2.0**2 + 1.6**2))}  # fmt: skip
    masked = {"importance/mean": 3.6 / 4, "importance/masked": 1 / 4,
              "importance/ess": 3.6**2 / (4 * (0.5**2 + 1.5**2 + 1.6**2))}  # fmt: skip
    assert metrics_of([0, 1, 2], World()) == pytest.approx({**expected, **clipped}, **FLOAT32)
    assert metrics_of([0, 1, 2], World(), beyond="mask") == pytest.approx({**expected, **masked}, **FLOAT32)
    assert metrics_of([0, 1, 2], World(), level="off") == pytest.approx(expected, **FLOAT32)
    all_masked = metrics_of([0], World(), level="sequence", beyond="mask")
    assert (all_masked["importance/mean"], all_masked["importance/ess"]) == (0.0, 0.0)


@pytest.mark.parametrize("parts", [([0], [1, 2]), ([0, 1, 2], []), ([], [1, 0, 2])])
def test_metrics_are_of_all_ranks(parts: tuple[list[int], list[int]]) -> None:
    first, second = in_two_ranks(lambda rank, world: metrics_of(parts[rank], world))
    assert first == second == pytest.approx(metrics_of([0, 1, 2], World()), rel=1e-12)


def test_where_nothing_was_compared_nothing_is_reported() -> None:
    assert OffPolicy().metrics(World()) == {}
    compared = OffPolicy()
    compared.compare(rollouts_of(sequences_of([2]), torch.tensor([-1.0, -2.0])), torch.tensor([-1.5, -2.0]))
    assert compared.metrics(World())["engine/logp_difference"] == 0.25
    assert "importance/mean" not in compared.metrics(World())
    compared.start()
    assert compared.metrics(World()) == {}


def test_rows_keep_their_weights_however_they_are_chosen() -> None:
    """An algorithm may leave rollouts out before it asks, after it, and once more with its experience."""
    rollouts = rollouts_of(sequences_of([2, 1, 3, 1]), torch.full((7,), -1.0))
    ratios = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2])
    asked = rollouts.select(torch.tensor([3, 0, 2]))
    found = OffPolicy()
    found.weigh(asked, ratios[rollouts.sequences.token_index(torch.tensor([3, 0, 2]))].log() - 1.0)
    experience = Experience(asked.select(torch.tensor([2, 1])), tokens={"x": torch.zeros(5)}).select(
        torch.tensor([1, 0])
    )
    found.attach(experience)
    assert experience["importance"].tolist() == pytest.approx([0.5, 0.6, 0.8, 0.9, 1.1], **FLOAT32)
    whole = Experience(rollouts)
    found.attach(whole)  # the second was never asked about
    assert whole.importance.tolist() == pytest.approx([0.5, 0.6, 1.0, 0.8, 0.9, 1.1, 1.2], **FLOAT32)
    minibatch = Batch(whole.select(torch.tensor([3, 1])), Totals(1, 1, 1))
    assert minibatch.importance.tolist() == pytest.approx([1.2, 1.0], **FLOAT32)
    own = Experience(rollouts, tokens={"importance": torch.zeros(7)})
    found.attach(own)
    assert not own.importance.any()  # the algorithm's word goes before


def test_without_weights_importance_is_one_and_changes_no_bit() -> None:
    batch = Batch(Experience(rollouts_of(sequences_of([2, 1]), None)), Totals(3, 2, 2))
    x = torch.tensor([0.1, -0.7, 1e-30])
    assert batch.importance.tolist() == [1.0, 1.0, 1.0] and batch.corrected
    assert torch.equal(policy_mean(x, batch), token_mean(x, batch))


def test_a_log_prob_that_is_no_number_is_refused() -> None:
    masks = [torch.tensor([True, False])]
    fine = rollouts_of(sequences_of([2], masks), torch.tensor([-1.0, NAN]))  # a tool's token
    OffPolicy().weigh(fine, torch.tensor([-1.0, -1.0]))
    with pytest.raises(RunError, match=r"gave -inf as log-prob of a token that it sampled \(1 such\)"):
        OffPolicy().weigh(rollouts_of(sequences_of([2]), torch.tensor([-1.0, -math.inf])), torch.zeros(2))


# A bandit, and a game of two moves: the gradient over every outcome, none of them drawn

REWARD = torch.tensor([[1.0, -0.5], [0.3, 2.0]])  # of the first move and the second
FIRST, SECOND = torch.tensor([0.4, -0.2]), torch.tensor([[0.1, 0.6], [-0.3, 0.5]])  # logits of the policy
ENGINE_FIRST, ENGINE_SECOND = torch.tensor([0.9, -0.4]), torch.tensor([[0.5, 0.2], [0.0, -0.4]])


class Game:
    """What a `Scorer` needs of models: a policy that is two tables of logits, and values that are 0."""

    class backend:  # noqa: N801
        sharded = False

    def __init__(self) -> None:
        self.first, self.second = FIRST.double().requires_grad_(), SECOND.double().requires_grad_()

    def forward(self, requests: list[ScoreRequest]) -> list[Scores]:
        found = []
        for request in requests:
            moves = request.sequences.tokens.view(-1, 2)
            first = torch.log_softmax(self.first, -1)[moves[:, 0]]
            second = torch.log_softmax(self.second, -1)[moves[:, 0], moves[:, 1]]
            zeros = torch.zeros(len(request.sequences.tokens), requires_grad=True)
            lm = request.role == "policy"
            found.append(Scores(request.role, torch.stack([first, second], -1).flatten() if lm else None,
                                values_=None if lm else zeros))  # fmt: skip
        return found

    def visiting(self, roles: Any) -> Any:
        return torch.no_grad()

    def apart(self, roles: Any) -> bool:
        return True


class TableEngine(Engine):
    """Plays by tables of its own, and says how likely it was to."""

    logprobs = LogProbs(exact=False)


def moves_of(first: Tensor, second: Tensor) -> dict[tuple[int, int], list[float]]:
    """Each outcome's log-probs, of its two moves."""
    one, two = torch.log_softmax(first.double(), -1), torch.log_softmax(second.double(), -1)
    return {(a, b): [float(one[a]), float(two[a, b])] for a, b in itertools.product((0, 1), repeat=2)}


def expected_gradient(**options: Any) -> Tensor:
    """Of PPO's loss, over what the engine plays: float64 [6]."""
    game = Game()
    total = torch.zeros(6, dtype=torch.float64)
    for (a, b), told in moves_of(ENGINE_FIRST, ENGINE_SECOND).items():
        sequences = Sequences.of([torch.tensor([0])], [torch.tensor([a, b])])
        rollouts = attrs.evolve(rollouts_of(sequences, torch.tensor(told)), rewards=REWARD[a, b][None])
        config = PPOConfig(kl_coef=0.0, lam=1.0, missing_eos="none", whiten_advantages=False, value_coef=0.0)
        context = Context(plan=cast(Plan, None))
        algorithm = PPO(config, context)
        plain = Scorer(cast(Any, game), 100, TableEngine(None, context), off_policy=OffPolicy(**options))
        with torch.no_grad():
            experience = algorithm.experience(rollouts, plain)
            plain.off_policy.attach(experience)
        loss = algorithm.loss(Batch(experience, Totals(2, 1, 1)), Scorer(cast(Any, game), 100, gradient=True))
        gradients = torch.autograd.grad(2 * loss, [game.first, game.second])  # a sum over the two moves, not their mean
        total += math.exp(sum(told)) * torch.cat([g.flatten() for g in gradients])
    return total


def weighted_gradient(weights: Callable[[list[float], list[float]], list[float]]) -> Tensor:
    """- sum over outcomes of q(a, b) R(a, b) (w_1 grad log p(a) + w_2 grad log p(b | a)), in plain Python."""
    ours, theirs = moves_of(FIRST, SECOND), moves_of(ENGINE_FIRST, ENGINE_SECOND)
    p1 = [math.exp(ours[a, 0][0]) for a in (0, 1)]
    found = [0.0] * 6
    for a, b in ours:
        w1, w2 = weights(ours[a, b], theirs[a, b])
        scale = math.exp(sum(theirs[a, b])) * float(REWARD[a, b])
        for k in (0, 1):
            found[k] -= scale * w1 * ((k == a) - p1[k])
            found[2 + 2 * a + k] -= scale * w2 * ((k == b) - math.exp(ours[a, k][1]))
    return torch.tensor(found, dtype=torch.float64)


def of_tokens(p: list[float], q: list[float]) -> list[float]:
    return [math.exp(a - b) for a, b in zip(p, q, strict=True)]


def of_response(p: list[float], q: list[float]) -> list[float]:
    return [math.exp(sum(p) - sum(q))] * 2


def of_the_policy() -> Tensor:
    """The gradient that is meant: over what the policy itself plays."""
    return weighted_gradient(of_response)


ROUNDING = {"rtol": 0, "atol": 1e-6}  # log-probs and weights are float32, rewards of order 1


def test_uncorrected_the_gradient_is_another() -> None:
    found = expected_gradient(level="off")
    assert torch.allclose(found, weighted_gradient(lambda p, q: [1.0, 1.0]), **ROUNDING)
    assert float((found - of_the_policy()).abs().max()) > 0.1


def test_weighted_by_whole_responses_the_gradient_is_the_policys_own() -> None:
    found = expected_gradient(level="sequence", cap=100.0)
    assert torch.allclose(found, of_the_policy(), **ROUNDING)
    # and it is what differentiating the expected reward gives
    game = Game()
    one, two = torch.softmax(game.first, -1), torch.softmax(game.second, -1)
    (-(one[:, None] * two * REWARD.double()).sum()).backward()  # type: ignore[no-untyped-call]
    assert game.first.grad is not None and game.second.grad is not None
    assert torch.allclose(found, torch.cat([game.first.grad, game.second.grad.flatten()]), **ROUNDING)


def test_weighted_by_tokens_a_bandits_gradient_is_the_policys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first move is alike, the second is a bandit for each of its states, and a token's weight is all."""
    monkeypatch.setitem(globals(), "ENGINE_FIRST", FIRST)
    found = expected_gradient(level="token", cap=100.0)
    assert torch.allclose(found[2:], of_the_policy()[2:], **ROUNDING)
    assert float((expected_gradient(level="off") - of_the_policy())[2:].abs().max()) > 0.05


def test_a_tokens_weight_leaves_out_the_other_moves() -> None:
    found = expected_gradient(level="token", cap=100.0)
    assert torch.allclose(found, weighted_gradient(of_tokens), **ROUNDING)
    bias, uncorrected = (float((g - of_the_policy()).abs().max()) for g in (found, expected_gradient(level="off")))
    assert 0.01 < bias < uncorrected


@pytest.mark.parametrize("beyond", ["clip", "mask"])
@pytest.mark.parametrize(("level", "of"), [("token", of_tokens), ("sequence", of_response)])
def test_the_cap_biases_the_gradient_by_what_it_cuts(level: str, of: Any, beyond: str) -> None:
    cap, kept = 1.1, 1.1 if beyond == "clip" else 0.0
    found = expected_gradient(level=level, cap=cap, beyond=beyond)
    expected = weighted_gradient(lambda p, q: [w if w <= cap else kept for w in of(p, q)])
    assert torch.allclose(found, expected, **ROUNDING)
    assert float((found - weighted_gradient(of)).abs().max()) > 0.01  # something was cut
