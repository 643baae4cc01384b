"""The README and the help against the code: their commands parse, files and modules exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from halfstep.app.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("halfstep ")]


def helps(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every verb of the command line, and what its help says."""
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):  # compress METHOD
            yield from helps(verb, (*path, name))
        else:
            yield " ".join((*path, name)), verb.help


def require_parses(command: str) -> None:
    verb, words = get_command(app), shlex.split(command)[1:]
    while hasattr(verb, "commands"):
        name, *words = words
        verb = verb.commands[name]
    assert verb.make_context(name, words).params  # raises for what the verb does not take; runs nothing


HELPS = dict(helps(get_command(app)))


@pytest.mark.parametrize("command", commands())
def test_every_halfstep_command_parses(command):
    require_parses(command)


@pytest.mark.parametrize("verb", HELPS)
def test_every_verb_has_an_example_of_itself_that_parses(verb):
    examples = re.findall(r"`(halfstep [^`]*)`", HELPS[verb].partition("Example: ")[2])
    assert examples and all(example.startswith(f"halfstep {verb} ") for example in examples)
    for example in examples:
        require_parses(example)


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
