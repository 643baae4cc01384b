"""The pages against the code: every block on them parses or runs, every link leads somewhere, the site builds."""

from __future__ import annotations

import base64
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import halfstep_run
from halfstep.app.cli import main
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from pages import PAGES, ROOT, Block, blocks_of, require_parses
from pipelines import stable_diffusion
from tiny import unet

LANGUAGES = ("bash", "python", "text", "toml", "yaml", "json")
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def script(name: str) -> Any:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------- all blocks


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_its_language(block):
    assert block.language in LANGUAGES


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_is_one_of_a_block(page):
    fences = re.findall(r"^ *```", (ROOT / page).read_text(), re.M)
    assert len(fences) == 2 * len(blocks_of(page))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", (ROOT / page).read_text()):
        assert re.match(r"https?:", target) or ((ROOT / page).parent / target).is_file(), target


@pytest.mark.parametrize("block", [*of("json"), *of("toml"), *of("yaml")], ids=str)
def test_data_parses(block):
    {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}[block.language](block.text)


# -------------------------------------------------------------------------------------------------------- command lines


def of_pip(words: list[str]) -> None:
    assert words[1] == "install"
    for word in words[2:]:
        if extra := re.search(r"^(?:halfstep|\.)\[(.*)\]$", word):
            assert set(extra[1].split(",")) <= set(EXTRAS), word
        elif word.startswith("./") or word.endswith(".txt"):
            assert (ROOT / word).exists(), word


def of_python(words: list[str]) -> None:
    if words[1] == "-m":
        assert words[2] in ("venv", "pytest", "mkdocs")
    else:
        assert (ROOT / words[1]).is_file(), words[1]


def of_pytest(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def of_make(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)


def of_a_launcher(words: list[str]) -> None:
    require_parses(words[words.index("-m") + 1 :])


def of_the_runner(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        assert halfstep_run._asked().folder


KNOWN: dict[str, Callable[[list[str]], object]] = {
    "halfstep": require_parses,
    "halfstep-run": of_the_runner,
    "accelerate": of_a_launcher,
    "pip": of_pip,
    "python": of_python,
    "python3": of_python,
    "pytest": of_pytest,
    "make": of_make,
    "ray": lambda words: None,
    ".": lambda words: None,
}
"""Whether a page's command is one, by its first word. No other command stands on a page."""


def told() -> list[tuple[list[str], str, str]]:
    """Of the page of errors: each command, the line that it ends with, and where it stands."""
    blocks = blocks_of("docs/troubleshooting.md")
    return [
        (*one.commands, other.text.strip(), str(one))  # one command each
        for one, other in itertools.pairwise(blocks)
        if one.language == "bash" and other.language == "text"
    ]


TOLD = told()
QUOTED = {where for *_, where in TOLD}


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_every_command_is_one(block):
    for words in block.commands:
        if str(block) not in QUOTED:  # what is refused is run below
            KNOWN[words[0]](words)


# --------------------------------------------------------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with what pages speak of, small: photos by class, a dense model, a run, a pipeline of text."""
    home, draw = tmp_path_factory.mktemp("workshop"), np.random.default_rng(0)
    for k in range(24):
        file = home / "photos" / ("cat", "dog")[k % 2] / f"{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    DDPMPipeline(unet(colours=3, size=16), DDPMScheduler()).save_pretrained(home / "runs" / "dense")
    bank = Bank({"full": unet(0, (16, 16)), "w0.50": unet(1, (8, 8))}, "full", "epsilon")
    plan = reference_plan(bank, DDPMScheduler().config, SampleSpec(steps=3), {"full": 4, "w0.50": 1})
    for run in ("runs/half", "RUN"):
        StepAwarePipeline(bank, plan).save_pretrained(home / run / "pipeline")
    stable_diffusion().save_pretrained(home / "sd15")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, workshop, tmp_path, monkeypatch):
    for part in workshop.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    known = {"folder": str(workshop / "sd15"), "__name__": page}
    for block in (block for block in of("python") if block.page == page):
        exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), known)
    if page.endswith("add-a-method.md"):
        _trains(known["draft"])


def _trains(make: Callable) -> None:
    """What a page calls a method makes a draft whose loss is a number and whose bank has its price."""
    from halfstep.app.subject import open_subject

    draft = make(open_subject("digits", "digits", Recipe()), Recipe())
    assert draft.bank().prices().keys() == {"full", "mine"}


@pytest.mark.slow
def test_the_notebook_prints_and_shows_what_stands_in_it():
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())
    before = [out for cell in notebook["cells"] for out in cell.get("outputs", ())]
    after = [out for cell in script("notebook").executed(notebook)["cells"] for out in cell.get("outputs", ())]
    assert len(after) >= 4 and [out.get("text") for out in after] == [out.get("text") for out in before]
    for one, other in zip(before, after, strict=True):
        if "data" in one:
            new, old = (Image.open(io.BytesIO(base64.b64decode(out["data"]["image/png"]))) for out in (other, one))
            assert np.abs(np.asarray(new, float) - np.asarray(old, float)).mean() < 1  # of 255: another processor


# ------------------------------------------------------------------------------------------------ tables and errors


def test_tables_are_what_the_code_says():
    written = script("tables").written
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert written(text) == text, f"{page}: python docs/tables.py"


@pytest.mark.parametrize(("words", "line", "where"), TOLD, ids=[where for *_, where in TOLD])
def test_an_error_is_said_as_the_page_quotes_it(words, line, where, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", words)
    before = sorted(workshop.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main()
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert stop.value.code == 2 and errors == [line]
    assert sorted(workshop.rglob("*")) == before


# --------------------------------------------------------------------------------------------------------- quick start


@pytest.mark.slow
def test_the_first_pictures_of_the_quick_start_are_drawn_as_written(tmp_path):
    blocks = [block for block in blocks_of("docs/index.md") if "first/" in block.text and block.language == "bash"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    for words in blocks[0].commands:
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    grids = [Image.open(tmp_path / "first" / name / "grid.png") for name in ("today", "few")]
    assert grids[0].size == grids[1].size and np.std(grids[0]) > 20
    apart = np.abs(np.asarray(grids[0], float) - np.asarray(grids[1], float)).mean()
    assert apart < 0.5 * np.std(grids[0])  # the same noise: the same pictures, nearly


# ------------------------------------------------------------------------------------------------------------- the site


def test_every_public_name_is_on_the_page_of_the_api():
    import halfstep

    page = (ROOT / "docs" / "api.md").read_text()
    for name, home in halfstep._HOMES.items():
        among = re.search(rf"::: halfstep\.{re.escape(home)}\n(?:    .*\n)*? *members: \[.*\b{name}\b", page)
        assert f"::: halfstep.{home}.{name}\n" in page or among, name


def test_every_page_is_in_the_navigation_once():
    def leaves(entry: Any) -> list[str]:
        return [entry] if isinstance(entry, str) else [leaf for one in _values(entry) for leaf in leaves(one)]

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(named) == sorted([*pages, "repository/CONTRIBUTING.md"])


def _values(entry: dict[str, Any] | list[Any]) -> list[Any]:
    return list(entry.values()) if isinstance(entry, dict) else entry


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {str(p.relative_to(tmp_path / "site").with_suffix(".md")) for p in (tmp_path / "site").rglob("*.html")}
    assert {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} <= pages


def test_what_a_page_would_fetch_is_found():
    pytest.importorskip("mkdocs")
    fetched = script("outside").fetched
    for text in (
        '<script src="https://a.b/c.js"></script>',
        "<img alt=x src=//a.b/c.png>",
        '<link rel="stylesheet" href="https://a.b/c.css">',
        "@import 'https://a.b/c.css'",
        "a { background: url(https://a.b/c.png) }",
    ):
        assert fetched(text), text
    for text in ('<a href="https://a.b">', '<link rel="canonical" href="https://a.b">', '<img src="c.png">'):
        assert not fetched(text), text
