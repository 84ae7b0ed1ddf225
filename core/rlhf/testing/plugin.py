"""What pytest loads wherever the kit is installed: one fixture. Imports no torch; the fixture does, when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rlhf.testing.kit import Kit


@pytest.fixture(scope="session")
def rlhf_kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """What the contracts of `rlhf.testing` work with: a folder, what is installed, a tiny model, runs at work."""
    from rlhf.testing.kit import Kit

    with pytest.MonkeyPatch.context() as patch:
        # Numbers are compared to the bit, which no GPU promises; and nothing may be asked of a network.
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Kit(tmp_path_factory.mktemp("rlhf-kit"))
