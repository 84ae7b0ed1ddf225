"""Packages are tested where they lie, installed or not: an installed one comes before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from contributed import not_installed

if TYPE_CHECKING:
    from rlhf.testing.kit import Kit

for manifest in sorted(Path(__file__).parent.glob("*/pyproject.toml")):
    sys.path.append(str(manifest.parent))


@pytest.fixture(scope="module")
def rlhf_kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """The kit's, with the metadata of those packages on the path that aren't installed; no longer than a module, since
    whatever is tested after it should not find them."""
    from rlhf.testing.kit import Kit

    site = tmp_path_factory.mktemp("site")
    for package in not_installed():
        package.write_metadata(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Kit(tmp_path_factory.mktemp("rlhf-kit"))
