"""Recipes that ship with plugins: the files `recipes/NAME.yaml` of a plugin's package, known by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from rlhf.errors import Problem, RequestError
from rlhf.options import nearest
from rlhf.registry import packages


def shipped(among: Iterable[str] | None = None) -> dict[str, Path]:
    """Name -> file, in the order of the packages that offer plugins; the first keeps a name."""
    found: dict[str, Path] = {}
    for package in packages() if among is None else among:
        spec = importlib.util.find_spec(package)  # of a top package: imports nothing
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(place, "recipes").glob("*.yaml")):
                found.setdefault(file.stem, file)
    return found


def about(file: Path) -> str:
    """The first line of a recipe, where it is a comment."""
    first = file.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("# ").rstrip(":") if first.startswith("#") else ""


def find(given: str) -> Path:
    """A recipe file by its path, or by the name of one that is shipped.

    Raises:
        RequestError: there is neither.
    """
    place = Path(given).expanduser()
    if place.is_dir():
        inside = next((place / name for name in ("recipe.yaml", "pipeline.yaml") if (place / name).is_file()), None)
        raise RequestError(
            Problem(f"{given}: is a folder", f"its recipe is {inside}" if inside else "give a YAML file")
        )
    if place.exists():
        return place
    known = shipped()
    name = place.stem if place.suffix in (".yaml", ".yml") else given
    if given in known:
        return known[given]
    near = nearest(name, known)
    here = nearest(place.name, [file.name for file in place.parent.glob("*.y*ml")]) if place.parent.is_dir() else None
    hint = f"did you mean {place.parent / here if here else near}? " if here or near else ""
    raise RequestError(
        Problem(
            f"{given}: there is no such recipe file", f"{hint}give a YAML file, or a shipped one: {', '.join(known)}"
        )
    )
