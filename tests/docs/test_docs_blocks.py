"""What stands in a page can be read: blocks of code parse, options exist, names in the drawings are installed."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import click
import pytest
import yaml
from fences import PAGES, ROOT, blocks, files, inline

from rlhf.cli import _COMMANDS, cli
from rlhf.entries import KINDS, MANY
from rlhf.options import fields
from rlhf.registry import Registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

PARSERS = {"python": ast.parse, "yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}
TEXT = ("", "sh", "bash", "text")
WRITTEN = [page for page in PAGES if page.parent.name != "reference"]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.[\w*-]+)*")


def of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_every_block_parses() -> None:
    parsed = 0
    for page in PAGES:
        for language, content in blocks(page.read_text(encoding="utf-8")):
            if language.startswith("{"):  # of the site's own, in index.md
                assert of(page) == "docs/index.md"
            elif language not in TEXT:
                assert language in PARSERS, f"{of(page)}: a block of an unknown language: {language}"
                try:
                    PARSERS[language](content)
                except (SyntaxError, ValueError, yaml.YAMLError) as error:
                    pytest.fail(f"{of(page)}: a block of {language} doesn't parse: {error}\n{content}")
                parsed += 1
    assert parsed > 60


def known_flags(registry: Registry) -> tuple[set[str], dict[str, set[str]]]:
    """(plain flags, kind -> names of the options of all its components)."""
    plain, names = {"--help", "--version"}, {}
    context = click.Context(cli)

    def walk(command: click.Command) -> None:
        for parameter in command.params:
            plain.update(parameter.opts)
        for name in command.list_commands(context) if isinstance(command, click.Group) else ():
            found = command.get_command(context, name)
            assert found is not None
            walk(found)

    walk(cli)
    for kind in KINDS:
        configs = [offer.entry.config for offer in registry.offers_of(kind) if offer.entry and offer.entry.config]
        names[kind] = {name.replace("_", "-") for config in configs for name in fields(config)}
    assert _COMMANDS.keys() and "--save-every" in plain and "clip-range" in names["algo"]
    return plain, names


@pytest.mark.parametrize("page", WRITTEN, ids=of)
def test_every_option_named_in_prose_exists(page: Path, installed: Registry) -> None:
    plain, names = known_flags(installed)
    for code in inline(page.read_text(encoding="utf-8")):
        if "keyword" in code or code.startswith(("pip ", "python ", "nox ", "accelerate ")):  # not ours
            continue
        for flag in FLAG.findall(code):
            kind, _, rest = flag[2:].partition(".")
            if not rest:
                assert flag in plain, f"{of(page)}: `{code}`: there is no {flag}"
            elif rest != "FIELD":
                field = rest.rpartition(".")[2]
                assert kind in KINDS, f"{of(page)}: `{code}`: there is no kind {kind}"
                assert ("." in rest) == (kind in MANY), f"{of(page)}: `{code}`: which component's option?"
                assert field in names[kind], f"{of(page)}: `{code}`: no --{kind} has an option {field}"


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may end in."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    followed = 0
    for page in PAGES:
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", prose)):
            if link.startswith(("http://", "https://")):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{of(page)}: {link}: there is no such file"
            assert not anchor or anchor in anchors(target), f"{of(page)}: {link}: there is no such heading"
            followed += 1
    assert followed > 100


def test_every_page_is_in_the_sites_menu() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    trees = [content for language, content in blocks(index) if language == "{toctree}"]
    listed = {
        line for content in trees for line in content.split("\n") if line and line[0] != ":" and line != "Home <self>"
    }
    pages = {of(page).removeprefix("docs/").removesuffix(".md") for page in PAGES if page.name != "README.md"}
    assert pages - {"index"} == listed


def test_an_algorithm_of_ones_own_is_under_80_lines() -> None:
    page = files((ROOT / "docs" / "how-to" / "own-algorithm.md").read_text(encoding="utf-8"))
    assert {Path(name).name for name in page} == {"pyproject.toml", "__init__.py", "algorithm.py"}
    lines = [line for content in page.values() for line in content.split("\n") if line.strip() and line[0] != "#"]
    assert 30 < len(lines) < 80


def test_the_drawing_of_the_house_names_every_component(installed: Registry) -> None:
    drawn = (ROOT / "docs" / "img" / "house.svg").read_text(encoding="utf-8")
    words = set(re.findall(r"[\w+-]+", re.sub(r"<[^>]*>", " ", drawn.partition("</style>")[2])))
    ours = {offer.name for offer in installed.offers if offer.distribution == "rlhf-kit"}
    assert {*ours, *KINDS, *_COMMANDS} <= words
