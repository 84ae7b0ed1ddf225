"""Recipes that ship with packages, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf import library
from rlhf.errors import RequestError


def test_any_package_may_ship_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, names in (("fake_one", ("a", "b")), ("fake_two", ("b", "c"))):
        (tmp_path / package / "recipes").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise ImportError('listing imports nothing')")
        for name in names:
            (tmp_path / package / "recipes" / f"{name}.yaml").write_text(f"# {name} of {package}:\nalgo: sft\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = library.shipped(["fake_one", "fake_two", "fake_three"])
    assert {name: library.about(file) for name, file in found.items()} == {
        "a": "a of fake_one", "b": "b of fake_one", "c": "c of fake_two",
    }  # fmt: skip


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = library.shipped()
    assert {"sft-dpo", "sft-reward-ppo", "chat-dpo", "chat-ppo"} <= set(shipped)
    monkeypatch.chdir(tmp_path)
    assert library.find("sft-dpo") == shipped["sft-dpo"]
    (tmp_path / "sft-dpo").write_text("algo: sft\n")
    (tmp_path / "mine.yaml").write_text("algo: sft\n")
    assert library.find("sft-dpo") == Path("sft-dpo")
    for given, hint in (("mien.yaml", "did you mean mine.yaml?"), ("chat-pp", "did you mean chat-ppo?"), ("xyz", "")):
        with pytest.raises(RequestError) as caught:
            library.find(given)
        (problem,) = caught.value.problems
        assert problem.what == f"{given}: there is no such recipe file"
        assert problem.fix.startswith(hint or "give a YAML file, or a shipped one: chat-dpo")
