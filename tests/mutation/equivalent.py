"""Edits by rule that are no errors: the program they make does the same, or differs in what nobody can see.

Each needs its reason, and each must still be an edit that a rule makes.
"""

from __future__ import annotations

import attrs

P = "plugins/rlhf_plugins"


@attrs.frozen
class Equivalent:
    file: str
    within: str
    """The function or class."""
    line: str
    """Some of the line of code."""
    change: str
    """As the program prints it."""
    reason: str


EQUIVALENT = (
    Equivalent("core/rlhf/floor.py", "pair_count", "for of, length in zip(", "True -> False",
               "both are one a sequence, which `Sequences.of` checks"),
    Equivalent("core/rlhf/floor.py", "decoding", "for of, length in zip(", "True -> False",
               "both are one a sequence, which `Sequences.of` checks"),
    Equivalent(f"{P}/functional/advantages.py", "gae", "r = pad(", "0.0 -> 1.0",
               "padding is no own token, so it is not read"),
    Equivalent(f"{P}/functional/advantages.py", "gae", "v = pad(", "0.0 -> 1.0",
               "padding is no own token, so it is not read"),
    Equivalent(f"{P}/functional/advantages.py", "gae", "own = pad(", "False -> True",
               "a token of reward 0 and value 0 behind the last one has advantage 0 and passes nothing on"),
    Equivalent(f"{P}/functional/advantages.py", "gae", "padded = torch.zeros_like(r)", "zeros_like -> ones_like",
               "every column is written"),
    Equivalent(f"{P}/functional/advantages.py", "Moments.var", "return (self.total_sq / self.count", "1.0 -> 1.01",
               "counts are whole; at 1 the variance comes out below 0 and is raised to 0, which it is"),
    Equivalent(f"{P}/functional/advantages.py", "whiten_with", "kept = torch.where(own, x, 0.0).double()", "0.0 -> 1.0",
               "what is masked is 0 in the end, and so is its gradient"),
    Equivalent(f"{P}/functional/preference.py", "PreferenceLoss.__call__", "self, c: Tensor, r: Tensor, beta: float",
    "0.0 -> 1.0",
               "the default of a protocol is never used"),
    Equivalent(f"{P}/functional/ragged.py", "check_same_length", "if any(len(shape) != 1", "any -> all",
               "where some are one-dimensional and others not, the shapes differ, which is refused too"),
    Equivalent(f"{P}/functional/ragged.py", "last_index", "check_ragged(lengths)", "check_ragged(lengths) -> pass",
               "`repeat` refuses the same, three lines on"),
    Equivalent(f"{P}/functional/scores.py", "update_stats", "batch = scores.detach().double()", "detach -> clone",
               "only plain numbers leave the function"),
    Equivalent(f"{P}/policies/heads.py", "token_logps", "parts = [states.new_zeros(2, 0", "new_zeros -> new_ones",
    "it has no elements"),
    Equivalent(f"{P}/policies/heads.py", "_LogSoftmax.forward", "spread = torch.zeros_like(logp)",
    "zeros_like -> ones_like",
               "not read where entropies aren't asked for"),
    Equivalent(f"{P}/policies/layout.py", "_deal", "filled = [0] * count", "0 -> 1", "all rows alike"),
    Equivalent(f"{P}/policies/layout.py", "_batches", "best = [0.0] + ", "0.0 -> 1.0", "all prices alike"),
    Equivalent(f"{P}/policies/layout.py", "_batches", "cut = [0] * (len(rows) + 1)", "0 -> 1",
    "written before it is read"),
    Equivalent(f"{P}/policies/layout.py", "_batches", "cut = [0] * (len(rows) + 1)", "1 -> 2",
    "the place more is not read"),
    Equivalent(f"{P}/policies/layout.py", "_batches", "if price < best[end]:", "< -> <=", "a cut that costs the same"),
    Equivalent(f"{P}/policies/layout.py", "_grid", "for place, i in enumerate(members, start=1):", "1 -> 2",
               "numbers that differ from each other and from the prompt's 0"),
    Equivalent(f"{P}/engines/sampling.py", "draw", "logits: Tensor, uniform: Tensor", "1.0 -> 1.01",
    "above 1 keeps all, as 1 does"),
    Equivalent(f"{P}/engines/sampling.py", "draw", "tokens = torch.where(greedy", "- -> +",
               "u x total is below the total for every u below 1, so the bound is for NaN alone"),
    Equivalent(f"{P}/engines/sampling.py", "_truncated", "return torch.full_like(logits, -torch.inf)",
    "-torch.inf -> torch.inf",
               "every place is written"),
    Equivalent(f"{P}/functional/packing.py", "pack", "open_bins: list[list[int]] =", "1 -> 2",
    "a heap more, never used"),
    Equivalent(f"{P}/functional/packing.py", "_SmallestAtLeast.__init__", "self._leaves =", "1 -> 2",
               "a tree twice as wide"),
    Equivalent(f"{P}/functional/packing.py", "_SmallestAtLeast.__init__", "self._any =", "2 -> 3", "room never used"),
    Equivalent(f"{P}/functional/packing.py", "_SmallestAtLeast.mark", "while node > 1:", "> -> >=",
               "node 0 is marked too, and never read"),
    Equivalent(f"{P}/functional/packing.py", "_SmallestAtLeast.mark", "while node > 1:", "1 -> 2",
    "the root is never read"),
    Equivalent("core/rlhf/sequences.py", "Sequences.of", "if responses else torch.zeros(0", "zeros -> ones",
               "it has no elements"),
    Equivalent("core/rlhf/sequences.py", "Sequences.of", "for start, length, own in zip(", "True -> False",
               "the lengths were compared before"),
    Equivalent("core/rlhf/sequences.py", "Sequences.token_index", "if pieces else torch.zeros(0", "zeros -> ones",
               "it has no elements"),
    Equivalent("core/rlhf/scores.py", "join_scores", "whole = torch.zeros(len(of.tokens))", "zeros -> ones",
               "every place is written"),
    Equivalent("core/rlhf/scores.py", "join_scores", "whole = torch.zeros(len(of))", "zeros -> ones",
               "every place is written"),
    Equivalent(f"{P}/optimizers/adamw.py", "AdamW.build", "fused=True,", "True -> False", "speed"),
    Equivalent("core/rlhf/schedules.py", "schedule", "done = (step - rising)", "1 -> 2", "0 over 1 or over 2"),
)  # fmt: skip
