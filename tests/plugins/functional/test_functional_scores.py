"""Score shaping by hand: EOS, length, clipping, and running statistics that survive a checkpoint."""

from __future__ import annotations

import json
import math
import statistics

import attrs
import pytest
import torch

from rlhf_plugins.functional import scores as sc

SCORES = torch.tensor([0.5, 3.0, -2.0])
ENDED = torch.tensor([True, False, False])


def test_eos_penalty_by_hand() -> None:
    assert sc.eos_penalty(SCORES, ENDED, "replace", -1.0).tolist() == [0.5, -1.0, -1.0]
    assert sc.eos_penalty(SCORES, ENDED, "subtract", 1.0).tolist() == [0.5, 2.0, -3.0]
    assert sc.eos_penalty(SCORES, ENDED, "none", 1.0).tolist() == [0.5, 3.0, -2.0]


def test_eos_penalty_refuses() -> None:
    with pytest.raises(ValueError, match=r"try 1\.0"):
        sc.eos_penalty(SCORES, ENDED, "subtract", -1.0)
    with pytest.raises(ValueError, match="'drop'"):
        sc.eos_penalty(SCORES, ENDED, "drop", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bool"):
        sc.eos_penalty(SCORES, ENDED.long(), "replace", -1.0)
    with pytest.raises(ValueError, match="one length"):
        sc.eos_penalty(SCORES, ENDED[:1], "replace", -1.0)


def test_the_least_that_may_be_asked_for() -> None:
    """A penalty of 0 or of less than 1, no threshold, a cap below 1 or of 0."""
    assert sc.eos_penalty(SCORES, ENDED, "subtract", 0.5).tolist() == [0.5, 2.5, -2.5]
    assert sc.eos_penalty(SCORES, ENDED, "subtract", 0.0).tolist() == SCORES.tolist()
    ones, lengths = torch.ones(2), torch.tensor([0, 2])
    assert sc.length_penalty(ones, lengths, threshold=0, per_token=0.5).tolist() == [1.0, 0.0]
    assert sc.length_penalty(ones, lengths, threshold=0, per_token=0.5, cap=0.25).tolist() == [1.0, 0.75]
    assert sc.length_penalty(ones, lengths, threshold=0, per_token=0.5, cap=0.0).tolist() == [1.0, 1.0]
    assert sc.length_penalty(ones, lengths, threshold=0, per_token=0.0).tolist() == [1.0, 1.0]


def test_length_penalty_by_hand() -> None:
    """Threshold 10, .5 a token: nothing up to 10, .5 at 11, 2 at 14."""
    shaped = sc.length_penalty(torch.ones(4), torch.tensor([0, 10, 11, 14]), threshold=10, per_token=0.5)
    assert shaped.tolist() == [1.0, 1.0, 0.5, -1.0]  # exact in binary


def test_length_penalty_is_dapos_with_a_cap() -> None:
    """Maximum 100, buffer 20: at 50 / 90 / 110 -> 0 / -.5 / -1."""
    lengths = torch.tensor([50, 80, 90, 100, 110])
    shaped = sc.length_penalty(torch.zeros(5), lengths, threshold=80, per_token=1 / 20, cap=1.0)
    assert shaped.tolist() == pytest.approx([0, 0, -0.5, -1, -1], abs=1e-6)  # float32: 1/20 is rounded


def test_length_penalty_refuses() -> None:
    with pytest.raises(ValueError, match="positive per_token"):
        sc.length_penalty(SCORES, torch.tensor([1, 2, 3]), threshold=1, per_token=-0.1)
    for wrong in ({"threshold": -1}, {"cap": -0.1}):
        with pytest.raises(ValueError, match="expected threshold, per_token and cap >= 0"):
            sc.length_penalty(SCORES, torch.tensor([1, 2, 3]), **{"threshold": 1, "per_token": 0.1, **wrong})
    with pytest.raises(ValueError, match="one length"):
        sc.length_penalty(SCORES, torch.tensor([1]), threshold=1, per_token=0.1)
    with pytest.raises(ValueError, match="int64"):
        sc.length_penalty(SCORES, torch.tensor([1.0, 2.0, 3.0]), threshold=1, per_token=0.1)


def test_clip_scores_by_hand() -> None:
    assert sc.clip_scores(SCORES, 1.0).tolist() == [0.5, 1.0, -1.0]
    assert sc.clip_scores(SCORES, None).tolist() == SCORES.tolist()
    with pytest.raises(ValueError, match="None for no clipping"):
        sc.clip_scores(SCORES, 0.0)
    with pytest.raises(ValueError, match="one-dimensional"):
        sc.clip_scores(torch.zeros(2, 2), None)


def test_stats_by_hand() -> None:
    """(1, 2, 3, 6): mean 3, squared distances 4 + 1 + 0 + 9 = 14, std sqrt(14 / 4)."""
    stats = sc.update_stats(sc.ScoreStats(), torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert stats == sc.ScoreStats(count=4, mean=3.0, m2=14.0)  # small integers: exact
    assert stats.std == pytest.approx(math.sqrt(3.5), abs=1e-12)


def test_fresh_stats_are_of_nothing() -> None:
    fresh = sc.ScoreStats()
    assert attrs.asdict(fresh) == {"count": 0, "mean": 0.0, "m2": 0.0} and fresh.std == 0.0


def test_stats_do_not_depend_on_the_batches() -> None:
    values = [1e4 + v for v in (0.25, -1.0, 3.5, 2.0, -0.75, 8.0, 0.5)]
    x = torch.tensor(values, dtype=torch.float64)
    for cuts in ([7], [1, 6], [3, 0, 4], [1] * 7):
        stats = sc.ScoreStats()
        for batch in torch.split(x, cuts):
            stats = sc.update_stats(stats, batch)
        assert stats.count == 7
        # 1e-9: the scores are near 1e4, where float64 steps by 2e-12, over seven merges
        assert stats.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
        assert stats.std == pytest.approx(statistics.pstdev(values), abs=1e-9)


def test_merge_of_ranks_is_the_whole() -> None:
    """(1, 3): mean 2, m2 2. (8): mean 8. Together mean 4, distances 9 + 1 + 16 = 26 = 2 + 0 + 36 * 2 * 1 / 3."""
    a = sc.update_stats(sc.ScoreStats(), torch.tensor([1.0, 3.0]))
    b = sc.update_stats(sc.ScoreStats(), torch.tensor([8.0]))
    whole = sc.ScoreStats(count=3, mean=4.0, m2=26.0)
    assert sc.merge_stats(a, b) == whole
    assert sc.merge_stats(b, a) == whole
    assert sc.merge_stats(whole, sc.ScoreStats()) == sc.merge_stats(sc.ScoreStats(), whole) == whole
    assert sc.merge_stats(sc.ScoreStats(), sc.ScoreStats()) == sc.ScoreStats()


def test_stats_go_through_a_checkpoint() -> None:
    stats = sc.update_stats(sc.ScoreStats(), torch.tensor([0.1, 0.2, 0.7]))
    restored = sc.ScoreStats(**json.loads(json.dumps(attrs.asdict(stats))))
    more = torch.tensor([0.4, -9.0])
    assert sc.update_stats(restored, more) == sc.update_stats(stats, more)  # bitwise


def test_update_leaves_the_old_state() -> None:
    stats = sc.ScoreStats(count=1, mean=1.0, m2=0.0)
    sc.update_stats(stats, torch.tensor([5.0]))
    assert stats == sc.ScoreStats(count=1, mean=1.0, m2=0.0)


def test_stats_refuse_what_would_poison_them() -> None:
    with pytest.raises(ValueError, match="finite"):
        sc.update_stats(sc.ScoreStats(), torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="one-dimensional"):
        sc.update_stats(sc.ScoreStats(), torch.zeros(2, 2))


def test_normalise_by_hand() -> None:
    stats = sc.ScoreStats(count=4, mean=3.0, m2=16.0)  # std 2
    assert sc.normalise_scores(torch.tensor([3.0, 7.0, -1.0]), stats).tolist() == [1.5, 3.5, -0.5]
    assert sc.normalise_scores(torch.tensor([3.0, 7.0, -1.0]), stats, shift_mean=True).tolist() == [0.0, 2.0, -2.0]


def test_normalise_without_a_scale_leaves_it() -> None:
    constant = sc.update_stats(sc.ScoreStats(), torch.full((3,), 0.1, dtype=torch.float64))
    assert 0.0 < constant.std < 1e-15  # three times .1 is not .3: a rounding, which must not become the scale
    for stats in (sc.ScoreStats(), sc.ScoreStats(count=1, mean=3.0), constant):
        assert sc.normalise_scores(SCORES, stats).tolist() == SCORES.tolist()


def test_a_deviation_is_a_scale_only_past_eps() -> None:
    stats = sc.ScoreStats(count=4, mean=3.0, m2=16.0)  # std 2
    assert sc.normalise_scores(torch.tensor([3.0]), stats, eps=2.0).tolist() == [3.0]
    assert sc.normalise_scores(torch.tensor([3.0]), stats, eps=1.99).tolist() == [1.5]
    small = sc.ScoreStats(count=1, m2=(1.005e-6) ** 2)  # just above the eps that nobody gave
    assert sc.normalise_scores(torch.tensor([1.005e-6]), small).item() == pytest.approx(1.0, rel=1e-6)  # float32
    with pytest.raises(ValueError, match="one-dimensional"):
        sc.normalise_scores(torch.zeros(2, 2), stats)


def test_no_scores() -> None:
    none = torch.zeros(0)
    assert sc.update_stats(sc.ScoreStats(), none) == sc.ScoreStats()
    assert sc.normalise_scores(none, sc.ScoreStats()).shape == (0,)
    assert sc.eos_penalty(none, none.bool(), "replace", -1.0).shape == (0,)
    assert sc.length_penalty(none, none.long(), 1, 0.1).shape == (0,)
    assert sc.clip_scores(none, 1.0).shape == (0,)
