"""The ledger: its page is what its file says, and its commands are commands of this repository."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from pages import require_parses  # noqa: E402
from results import ARXIV, PAGE, page_of, read_ledger  # noqa: E402

CLAIMS = read_ledger()


def test_the_page_is_what_the_ledger_says():
    assert PAGE.read_text() == page_of(CLAIMS), "python benchmarks/results.py --write"
    assert {claim.paper for claim in CLAIMS} == set(ARXIV)


def test_a_row_that_is_not_whole_is_refused(tmp_path):
    row = '[[claim]]\npaper = "DDSM"\nclaim = "x"\nmeasured = "y"\nn = 1\nseeds = 1\ncontrol = "z"\ncommand = ""\n'
    for more in ('verdict = "sure"\n', 'verdict = "not decided"\n', 'verdict = "held"\nnumber = 1\n', ""):
        (tmp_path / "ledger.toml").write_text(row + more)
        with pytest.raises((ValueError, TypeError)):
            read_ledger(tmp_path / "ledger.toml")


@pytest.mark.parametrize("command", sorted({claim.command for claim in CLAIMS if claim.command}))
def test_a_command_is_one_of_this_repository(command):
    program, *words = shlex.split(command)
    if program == "halfstep":
        require_parses([program, *words])
        return
    text = (ROOT / words[0]).read_text()
    assert program == "python" and words[0].startswith("benchmarks/")
    options = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))
    assert {word for word in words if word.startswith("--")} <= options


def test_what_was_measured_names_its_pictures_or_none():
    for claim in CLAIMS:
        assert claim.verdict == "not measured" or claim.command
        assert bool(claim.n) == bool(claim.seeds), claim.claim
