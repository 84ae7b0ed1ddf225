"""The contributed packages, as their pyproject.toml has them."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import attrs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[1]
CONTRIB = ROOT / "contrib"


@attrs.frozen
class Package:
    """A contributed package, as its pyproject.toml has it."""

    folder: Path
    project: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.project["name"])

    @property
    def points(self) -> dict[str, str]:
        return dict(self.project["entry-points"]["rlhf"])

    def write_metadata(self, site: Path) -> None:
        """As an installer would, into a folder of the path."""
        folder = site / f"{self.name.replace('-', '_')}-{self.project['version']}.dist-info"
        folder.mkdir()
        about = f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.project['version']}\n"
        (folder / "METADATA").write_text(about, encoding="utf-8")
        lines = "".join(f"{key} = {value}\n" for key, value in self.points.items())
        (folder / "entry_points.txt").write_text(f"[rlhf]\n{lines}", encoding="utf-8")


PACKAGES = [
    Package(path.parent, tomllib.loads(path.read_text(encoding="utf-8"))["project"])
    for path in sorted(CONTRIB.glob("*/pyproject.toml"))
]


def not_installed() -> list[Package]:
    """Those that Python doesn't know of."""
    names = {distribution.name for distribution in importlib.metadata.distributions()}
    return [package for package in PACKAGES if package.name not in names]
