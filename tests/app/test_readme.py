"""The README and the help against the code: examples parse, files and modules exist; README is a screen."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from halfstep.app.cli import app
from pages import ROOT, require_parses

README = (ROOT / "README.md").read_text()


def helps(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every verb of the command line, and what its help says."""
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):  # compress METHOD
            yield from helps(verb, (*path, name))
        else:
            yield " ".join((*path, name)), verb.help


HELPS = dict(helps(get_command(app)))


@pytest.mark.parametrize("verb", HELPS)
def test_every_verb_has_an_example_of_itself_that_parses(verb):
    examples = re.findall(r"`(halfstep [^`]*)`", HELPS[verb].partition("Example: ")[2])
    assert examples and all(example.startswith(f"halfstep {verb} ") for example in examples)
    for example in examples:
        require_parses(shlex.split(example))


def test_linked_files_and_make_targets_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_tree_names_exactly_the_modules():
    tree = re.search(r"```text\n(src/halfstep/.*?)```", (ROOT / "docs" / "modules.md").read_text(), re.S)
    named, room = set(), ""
    for line in tree.group(1).splitlines():
        if found := re.match(r"  (\w+)/ ", line):
            room = found.group(1)
        named |= {f"{room}/{name}" for name in re.findall(r"(\w+\.py)\b", line)}
    source = ROOT / "src" / "halfstep"
    assert named == {str(p.relative_to(source)) for p in source.glob("*/*.py") if p.name != "__init__.py"}


def test_the_readme_is_one_screen_with_one_table_one_picture_five_links():
    assert len(README.splitlines()) <= 50
    assert len(re.findall(r"^\| ---", README, re.M)) == 1 and README.count("](docs/demo-plan.png)") == README.count(
        "!["
    )
    assert len(re.findall(r"(?<!!)\[[^]]*\]\((?!http)", README)) == 5 == len(re.findall(r"^- \[", README, re.M))
