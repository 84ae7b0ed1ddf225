"""From measured steps to what is printed: medians, spreads, ratios, floor ratios, the table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import attrs

TOKENS_APART = 0.02
"""Share by which the two sides' token counts may differ: packing puts its items in orders of their own."""


@attrs.frozen(kw_only=True)
class Side:
    """The timed steps of one side."""

    seconds: tuple[float, ...]  # of each step
    tokens: tuple[int, ...]  # of each step, prompts of pairs counted twice
    peak_bytes: int  # resident memory of the process
    sampled: tuple[int, ...] = ()  # response tokens of each step, where it samples

    @property
    def median(self) -> float:
        return median(self.seconds)


@attrs.frozen(kw_only=True)
class Result:
    """One case."""

    name: str
    title: str
    ours: Side
    trl: Side
    floor_seconds: tuple[float, ...] = ()  # of each timed step; empty where the run told none

    @property
    def ratio(self) -> float:
        """How many times as long TRL takes."""
        return self.trl.median / self.ours.median

    @property
    def memory_ratio(self) -> float:
        """How many times as much memory TRL takes."""
        return self.trl.peak_bytes / self.ours.peak_bytes

    def floor_ratio(self, side: Side) -> float | None:
        """Median of a step's seconds over its floor, which goes by the work, not by who does it: the same for both."""
        ratios = [taken / least for taken, least in zip(side.seconds, self.floor_seconds, strict=False)]
        return median(ratios) if ratios else None

    def check(self) -> None:
        """
        Raises:
            ValueError: the two sides didn't read or sample the same number of tokens, so their seconds don't compare.
        """
        for what, ours, trl in (
            ("read", self.ours.tokens, self.trl.tokens),
            ("sampled", self.ours.sampled, self.trl.sampled),
        ):
            if abs(sum(ours) - sum(trl)) > TOKENS_APART * sum(trl):
                raise ValueError(
                    f"ours {what} {sum(ours)} tokens and TRL {sum(trl)} in the timed steps, more than "
                    f"{TOKENS_APART:.0%} apart: {list(ours)} and {list(trl)}"
                )


HEADER = ("case", "ours s/step", "TRL s/step", "TRL / ours", "ours MB", "TRL MB", "ours / floor", "TRL / floor")


def cells(result: Result) -> tuple[str, ...]:
    """A row of the table; seconds as median (least to most)."""

    def seconds(side: Side) -> str:
        return f"{side.median:.2f} ({min(side.seconds):.2f} to {max(side.seconds):.2f})"

    def floor(side: Side) -> str:
        value = result.floor_ratio(side)
        return "-" if value is None else f"{value:.1f}"

    return (
        result.title, seconds(result.ours), seconds(result.trl), f"{result.ratio:.2f}",
        f"{result.ours.peak_bytes / 1e6:.0f}", f"{result.trl.peak_bytes / 1e6:.0f}",
        floor(result.ours), floor(result.trl),
    )  # fmt: skip


def markdown(results: Sequence[Result]) -> str:
    """The table, its columns aligned so that it reads well as plain text too."""
    lines = [HEADER, *map(cells, results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
             for line in lines]  # fmt: skip
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([shown[0], rule, *shown[1:]]) + "\n"


def footer(about: Mapping[str, Any]) -> str:
    """What the table was measured on and with, in a sentence or two."""
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in sorted(about["peaks"]["flops"].items()))
    memory = f"{about['peaks']['bandwidth'] / 1e9:.0f} GB/s from memory"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    machine = f"{about['machine']['processor']}, {about['threads']} of {about['machine']['cores']} cores"
    checkpointing = "on" if about["checkpointing"] else "off"
    return (
        f"{about['date'][:10]}, {about['model']}, {machine}: {rates}, {memory}. "
        f"Steps in {about['dtype']}, gradient checkpointing {checkpointing}. {versions}.\n"
    )


def as_json(results: Sequence[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, and what was made of it."""

    def side(result: Result, one: Side) -> dict[str, Any]:
        return {**attrs.asdict(one), "median_seconds": one.median, "floor_ratio": result.floor_ratio(one)}

    return {
        **about,
        "cases": [
            {
                "name": r.name, "title": r.title, "ratio": r.ratio, "memory_ratio": r.memory_ratio,
                "floor_seconds": list(r.floor_seconds), "ours": side(r, r.ours), "trl": side(r, r.trl),
            }
            for r in results
        ],
    }  # fmt: skip
