"""`rlhf new plugin`: what it writes, and what it refuses. That the packages work is tests/core/testing's."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.cli.new import _KINDS, files
from rlhf.entries import KINDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def new(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(exit code, what was printed, what was said) of `rlhf new ...`, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["new", *words])
        printed, said = capsys.readouterr()
        assert isinstance(done.value.code, int)
        return done.value.code, printed, said

    return call


def test_every_kind_has_a_template() -> None:
    assert _KINDS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tempered", "re+.v2", "3d"])
def test_what_is_written_parses_and_is_of_that_name(kind: str, name: str) -> None:
    written = files(name, kind)
    about = tomllib.loads(written["pyproject.toml"])
    package = about["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"][0]
    assert package.isidentifier()
    assert list(about["project"]["entry-points"]["rlhf"].values()) == [package]
    assert about["project"]["name"].startswith("rlhf-")
    for path, content in written.items():
        assert "$" not in content, f"{path}: a placeholder is left"
        if path.endswith(".py"):
            ast.parse(content)
            assert max(map(len, content.splitlines()), default=0) <= 120
    entry = written[f"{package}/__init__.py"]
    assert f'name="{name}"' in entry
    assert "api_version = 1 " in entry
    assert f"--{kind} {name}" in written["README.md"] or kind == "format"


def test_only_the_public_interface_is_imported() -> None:
    for kind in KINDS:
        for path, content in files("mine", kind).items():
            lines = [line for line in content.splitlines() if line.startswith(("import ", "from "))]
            own = ("from rlhf.api import", "from rlhf.testing import", "from rlhf_mine")
            assert all(line.startswith(own) for line in lines if "rlhf" in line.split()[1]), path


def test_a_whole_algorithm_is_short() -> None:
    algorithm = files("mine", "algo")["rlhf_mine/algorithm.py"]
    assert len(algorithm.splitlines()) <= 60


def test_it_says_what_to_type_next(new, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, printed, said = new("plugin", "mine", "--kind", "algo")
    assert code == 0
    assert printed.splitlines() == [
        "pip install -e rlhf-mine", "pytest rlhf-mine", "rlhf run --algo mine --max-steps 5",
    ]  # fmt: skip
    assert "wrote rlhf-mine: a plugin of one component, --algo mine" in said
    assert sorted(path.name for path in (tmp_path / "rlhf-mine").iterdir()) == [
        ".gitignore", "README.md", "pyproject.toml", "rlhf_mine", "tests",
    ]  # fmt: skip


def test_another_folder(new, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, printed, _ = new("plugin", "mine", "--kind", "reward", "--output", "some/where")
    assert code == 0
    assert printed.startswith("pip install -e some/where\n")
    assert (tmp_path / "some" / "where" / "rlhf_mine" / "reward.py").is_file()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("Mine", "--kind", "algo"), "'Mine' is no legal name: lower case, digits"),
        (("Mine", "--kind", "algo"), "such as mine"),
        (("my reward!", "--kind", "reward"), "such as my-reward"),
        (("none", "--kind", "track"), "it stands for no component"),
        (("rlhf-mine", "--kind", "algo"), "give the component's name alone: mine"),
        (
            ("mine", "--kind", "algorithm"),
            "--kind algorithm: there is no such kind\n    did you mean algo? kinds: algo,",
        ),
        (("mine", "--kind", "rewards"), "did you mean reward?"),
        (("mine", "--kind", "memory"), "did you mean mem?"),
        (("ppo", "--kind", "algo"), "there is a --algo ppo already, from rlhf-kit"),
        (("mine", "--kind", "algo", "--output", "there"), "--output there: is there already"),
        (
            ("mine", "--kind", "algo", "--output", "file/inside"),
            "--output file/inside: cannot be written: Not a directory",
        ),
        (("mine",), "missing option '--kind'"),
        (("mine", "--kind", "algo", "--outptu", "x"), "unknown option --outptu"),
    ],
)
def test_what_is_refused_leaves_nothing(new, tmp_path: Path, words: tuple[str, ...], problem: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    code, printed, said = new("plugin", *words)
    assert code == 2
    assert problem in said
    assert not printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_a_folder_that_cannot_be_written_leaves_nothing(
    new,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, said = new("plugin", "mine", "--kind", "algo")
    assert code == 2
    assert "--output rlhf-mine: cannot be written: No space left on device" in said
    assert not list(tmp_path.iterdir())


def test_help_teaches(new) -> None:  # type: ignore[no-untyped-def]
    code, printed, _ = new("plugin", "--help")
    assert code == 0
    assert "pip install -e rlhf-tempered" in printed
    assert all(kind in printed for kind in KINDS)


@pytest.mark.parametrize(("name", "taken"), [("kit", "a distribution rlhf-kit"), ("plugins", "a package rlhf_plugins")])
def test_a_package_of_that_name_is_not_replaced(new, name: str, taken: str) -> None:  # type: ignore[no-untyped-def]
    code, _, said = new("plugin", name, "--kind", "reward")
    assert code == 2 and f"{name!r}: {taken} is installed, and would be replaced or hidden" in said
    assert not Path(f"rlhf-{name}").exists()


@pytest.mark.parametrize(("name", "kind"), [("codec", "policy"), ("failed", "reward"), ("path", "track")])
def test_a_class_does_not_hide_what_it_calls(name: str, kind: str) -> None:
    written = files(name, kind)
    tree = ast.parse("\n".join(written[f"rlhf_{name}/{file}"] for file in _modules(written, f"rlhf_{name}")))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    made = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert f"The{name.capitalize()}" in made
    assert not {name for name in made if not name.endswith("Config")} & (imported - made)


def _modules(written: dict[str, str], package: str) -> list[str]:
    return [path.partition("/")[2] for path in written if path.startswith(f"{package}/") and path.endswith(".py")]
