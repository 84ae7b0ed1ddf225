"""Progress on stderr: a bar where it is a terminal, plain lines where it isn't (CI, a pipe, a log file).

stdout stays free for the command's own results. Text of data and models is shown with its control characters
replaced: a response must not move the cursor of whoever watches it.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.api import Tracker

if TYPE_CHECKING:
    from rlhf.api import Plan, Rollouts

NUMBERS = (
    ("loss", "loss", ""),
    ("reward/mean", "reward", ""),
    ("reward/accuracy", "accuracy", ""),
    ("kl/k1", "kl", ""),
    ("response/length", "length", ""),
    ("optim/learning_rate", "lr", ""),
    ("perf/tokens_per_second", "", " tok/s"),
    ("perf/floor_ratio", "", "x floor"),
)
"""The few metrics that show whether a run is well: (name, what is written before the number, what after)."""
LINES = 20
"""Plain lines of a whole run, about."""
WINDOW = 20
"""Steps that the time left is estimated from: the first one compiles, and responses grow."""


class Console(Tracker):
    """The tracker that listens unasked."""

    def run_started(self, run: Mapping[str, Any]) -> None:
        plan: Plan = run["plan"]
        self._directory, self._steps = Path(run["directory"]), int(run["steps"])
        self._shown = Path(run.get("shown", self._directory))
        self._step = int(run["first_step"])
        self._saved = f", saved at {self._step}" if self._step else ""
        self._started = self._spoken = time.monotonic()
        self._ends: deque[float] = deque([self._started], maxlen=WINDOW + 1)
        self._numbers = ""
        self._sampled: tuple[int, list[str]] | None = None  # the newest rollout's samples, not yet shown
        self._sample_shown = False
        # Asked of the stream itself: FORCE_COLOR, which CI sets, makes rich take anything for a terminal.
        self._console = RichConsole(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        if sys.stderr.isatty() and not self._console.is_dumb_terminal:
            # stdout is not redirected: what the command prints there may go into a pipe.
            self._live: Live | None = Live(
                get_renderable=self._view, console=self._console, refresh_per_second=2, redirect_stdout=False
            )
        else:
            self._live = None
        self._header(plan, run["notes"])
        if self._live is not None:
            self._live.start()

    def rollout_finished(self, step: int, rollouts: Rollouts) -> None:
        if self.config.samples:
            lines = self._sample_lines(rollouts)
            self._sampled = (step, lines) if lines else None
            if lines and not self._sample_shown:
                self._say_samples()

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._step = step
        self._ends.append(now)
        self._numbers = " | ".join(
            " ".join(filter(None, (before, number(metrics[name]) + after)))
            for name, before, after in NUMBERS
            if name in metrics
        )
        if self._live is None:
            nth = step * LINES // self._steps > (step - 1) * LINES // self._steps
            if nth or step == 1 or step == self._steps or now - self._spoken >= self.config.every:
                self._say(f"{self._progress()} | {self._numbers}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        if len(self._ends) == 1:  # before the first step, of whose length it says nothing
            self._ends[0] = time.monotonic()
        if step == self._steps:  # the table at the end has them
            return
        self._say(f"held-out at step {step}: " + " | ".join(f"{name} {number(x)}" for name, x in metrics.items()))

    def checkpoint_saved(self, step: int, path: Path) -> None:
        self._saved = f", saved at {step}"

    def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        if self._live is not None:
            self._live.stop()
        if self._sampled is not None:
            self._say_samples()
        before, after = summary.get("heldout_before") or {}, summary.get("heldout_after") or {}
        rows = [(name, number(before.get(name)), number(after.get(name))) for name in dict.fromkeys([*before, *after])]
        if rows:
            width = max(len(name) for name, _, _ in rows)
            self._say("")
            self._say(f"{'held-out':{width}}  {'before':>10}    {'after':>10}", "bold")
            for name, old, new in rows:
                self._say(f"{name:{width}}  {old:>10} -> {new:>10}")
        self._say("")
        memory = f"peak memory {size(summary.get('peak_rss_bytes'))}"
        if summary.get("peak_device_bytes"):
            memory += f", of the device {size(summary['peak_device_bytes'])}"
        took = duration(summary.get("wall_seconds"))
        self._say(f"{summary.get('status', 'ended')}: {summary.get('steps', self._step)} steps in {took}; {memory}")
        if error is None and (self._directory / "model").is_dir():
            self._say(f"model  {self._shown / 'model'}")
        folder = shlex.quote(str(self._shown))
        if error is not None and any((self._directory / "checkpoints").glob("step-*")):
            self._say(f"resume rlhf run --output {folder} --resume")
        self._say(f"next   rlhf report {folder}")

    # What is said

    def _header(self, plan: Plan, notes: list[str]) -> None:
        models: dict[str, list[str]] = {}
        for role in plan.roles:
            models.setdefault(role.model.path, []).append(role.name)
        named = [path if len(models) == 1 else f"{path} ({', '.join(roles)})" for path, roles in models.items()]
        on_gpu = self.context.device.startswith("cuda") and plan.machine.gpus
        chip = plan.machine.gpus[0].name if on_gpu else f"{plan.machine.cpus} cores"
        processes = f", {self.context.world.size} processes" if self.context.world.size > 1 else ""
        unit = "prompts" if plan.online else "rows"
        resumed = f", going on after step {self._step}" if self._step else ""
        self._say(f"rlhf {plan.algo.name}: {plan.algo.entry.summary}", "bold")
        for label, text in (
            ("model", "; ".join(named)),
            ("results", str(self._shown)),
            ("device", f"{self.context.device}, {chip}{processes}"),
            ("length", f"{self._steps} steps, {plan.run.batch_size} {unit} each{resumed}"),
            *(("note", note) for note in notes),
        ):
            self._say(f"  {label:8} {text}")

    def _say_samples(self) -> None:
        assert self._sampled is not None
        step, lines = self._sampled
        self._sampled, self._sample_shown = None, True
        self._say(f"samples of step {step}", "bold")
        for line in lines:
            self._say(line)

    def _sample_lines(self, rollouts: Rollouts) -> list[str]:
        """The first response of each of the first prompts, a prompt and a response on a line each."""
        first = {prompt: i for i, prompt in reversed(list(enumerate(rollouts.prompts)))}
        lines = []
        for i in sorted(first.values())[: self.config.samples]:
            reward = f"reward {number(float(rollouts.rewards[i]))}"
            lines.append("  prompt    " + shorten(rollouts.prompts[i], keep_end=True))
            lines.append(f"  response  {shorten(rollouts.texts[i])}  [{reward}, {rollouts.finish[i]}]")
        return lines

    def _progress(self) -> str:
        taken = duration(time.monotonic() - self._started)
        return f"step {self._step}/{self._steps}, {taken}{self._left()}{self._saved}"

    def _left(self) -> str:
        if len(self._ends) < 2 or self._step >= self._steps:
            return ""
        since = time.monotonic() - self._ends[-1]
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._steps - self._step) - since
        return f", {duration(max(seconds, 0.0))} left"

    def _view(self) -> Group:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(self._steps, self._step, width=30), Text(self._progress()))
        return Group(grid, Text(self._numbers, no_wrap=True, overflow="ellipsis"))

    def _say(self, line: str, style: str = "") -> None:
        self._spoken = time.monotonic()
        self._console.print(Text(visible(line), style))


def number(value: float | None) -> str:
    """Four digits; whole numbers as they are; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """h:mm:ss."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def size(count: float | None) -> str:
    """Bytes in GB, 10^9."""
    return "-" if count is None else f"{count / 1e9:.2f} GB"


def visible(text: str) -> str:
    """Control characters replaced, so that no text can steer the terminal or overwrite a line."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def shorten(text: str, most: int = 100, *, keep_end: bool = False) -> str:
    """One line of at most `most` characters, white space joined; of a prompt the end says more than the template."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return "..." + line[3 - most :] if keep_end else line[: most - 3] + "..."
