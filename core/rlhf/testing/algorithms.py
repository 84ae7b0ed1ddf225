"""The contract of algorithms: `AlgorithmContract`."""

from __future__ import annotations

from rlhf.testing.algorithm_runs import AlgorithmRuns


class AlgorithmContract(AlgorithmRuns):
    """What an algorithm must keep: its manifest, its numbers (`AlgorithmNumbers`), its runs (`AlgorithmRuns`).

    class TestTempered(AlgorithmContract):
        name = "tempered"
        options = {"group_size": 4}
    """
