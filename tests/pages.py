"""The blocks of code on pages, and whether the command line takes a command: what tests of README and docs ask."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from typer.main import get_command

from halfstep.app.cli import app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line`: that of its fence."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Of a bash block: the words of each command, without comments and variables set before it."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines]
        return [words[next(k for k, word in enumerate(words) if "=" not in word) :] for words in found if words]


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    fences = re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", text, re.S | re.M)
    return [
        Block(page, text[: m.start()].count("\n") + 1, m[2], re.sub(rf"^{m[1]}", "", m[3], flags=re.M)) for m in fences
    ]


def require_parses(words: list[str]) -> None:
    """Have the command line's own parser read a command, `halfstep` and on; it raises for what the verb does not take
    and runs nothing."""
    verb, words = get_command(app), words[1:]
    if words[0].startswith("--"):
        assert words[0] in {name for option in verb.params for name in option.opts}
        return
    while hasattr(verb, "commands"):
        name, *words = words
        verb = verb.commands[name]
    assert verb.make_context(name, words).params
