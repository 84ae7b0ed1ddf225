"""Trackers: who hears of a run's events. `console` listens unasked; others by `--track NAME`."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import TrackerEntry, hookimpl, option


@attrs.frozen(kw_only=True)
class ConsoleConfig:
    every: float = option(
        60.0,
        help="longest silence where stderr is no terminal: a step that ends later than this after the last line gets "
        "a line; about 20 evenly spaced steps get one anyway",
        unit="seconds",
        gt=0,
    )
    samples: int = option(2, help="responses to show of the first and of the last rollout; 0 shows none", ge=0)


@hookimpl
def rlhf_trackers() -> Iterable[TrackerEntry]:
    yield TrackerEntry(
        name="console",
        summary="progress, held-out results and a few samples on stderr; plain lines where it is no terminal",
        config=ConsoleConfig,
        impl="rlhf_plugins.trackers.console:Console",
        rank=10,
    )
    yield TrackerEntry(
        name="tensorboard",
        summary="scalars, hyperparameters and the recipe as event files in RUN/tensorboard",
        impl="rlhf_plugins.trackers.tensorboard:TensorBoard",
        modules={"tensorboard": "pip install 'rlhf-kit[track]'"},
    )
