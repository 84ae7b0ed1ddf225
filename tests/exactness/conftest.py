"""Models that both sides start from, and the table of what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import CLOSE, NORM_TOLERANCE, TOLERANCE, Agree, Close, Course, moves, worst

_MEASURED = "worst relative difference"


@pytest.fixture(scope="session")
def scored_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a scalar head of its own, so that both sides start from the same one."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "scored"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def agree(record_property: Callable[[str, object], None]) -> Agree:
    """Two runs whose losses move, and which are equal in losses and gradient norms; the differences are reported."""

    def check(case: str, ours: Course, theirs: Course) -> None:
        loss, norm = worst(ours.loss, theirs.loss), worst(ours.grad_norm, theirs.grad_norm)
        record_property(_MEASURED, f"{case:<40} loss {loss:.1e}   gradient norm {norm:.1e}")
        assert moves(theirs.loss)
        assert loss < TOLERANCE and norm < NORM_TOLERANCE, f"{case}: ours {ours}, theirs {theirs}"

    return check


@pytest.fixture
def close(record_property: Callable[[str, object], None]) -> Close:
    """Two series equal to `CLOSE`; the largest difference, relative to the largest number, is reported."""

    def check(case: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
        assert len(ours) == len(theirs)
        largest = max(abs(b) for b in theirs)
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        record_property(_MEASURED, f"{case:<40} {difference / largest:.1e}")
        assert list(ours) == pytest.approx(list(theirs), **CLOSE), case

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = [value for report in reports for name, value in report.user_properties if name == _MEASURED]
    if lines:
        terminalreporter.section(_MEASURED)
        for line in lines:
            terminalreporter.write_line(line)
