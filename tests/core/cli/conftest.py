"""A command line that is carried out here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from command_line import Ended

from rlhf.cli import main


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run a command in this process."""
    monkeypatch.setenv("COLUMNS", "110")

    def run(*words: str) -> Ended:
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        out, err = capsys.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    return run
