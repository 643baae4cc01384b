"""The README against the code: its commands parse, its Python runs, its files and modules exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from diffusers import DDPMScheduler, UNet2DModel

from halfstep.app.cli import app
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import StepAwarePipeline, reference_plan
from tiny import unet

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("halfstep ")]


@pytest.mark.parametrize("command", commands())
def test_every_halfstep_command_parses(command):
    from typer.main import get_command

    name, *rest = shlex.split(command)[1:]
    group = get_command(app)
    verb = group.commands[name]
    if hasattr(verb, "commands"):  # compress METHOD
        name, *rest = rest
        verb = verb.commands[name]
    context = verb.make_context(name, rest, resilient_parsing=False)
    assert context.params


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = Bank({"full": unet(0, (16, 16)), "w0.50": unet(1, (8, 8))}, "full", "epsilon")
    plan = reference_plan(bank, DDPMScheduler().config, SampleSpec(steps=3), {"full": 4, "w0.50": 1})
    StepAwarePipeline(bank, plan).save_pretrained("runs/demo/pipeline")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert UNet2DModel.from_pretrained("runs/half-unet").config.block_out_channels == [8, 8]


def test_linked_files_and_make_targets_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_tree_names_exactly_the_modules():
    tree = re.search(r"```\n(src/halfstep/.*?)```", README, re.S)
    named, room = set(), ""
    for line in tree.group(1).splitlines():
        if found := re.match(r"  (\w+)/ ", line):
            room = found.group(1)
        named |= {f"{room}/{name}" for name in re.findall(r"(\w+\.py)\b", line)}
    source = ROOT / "src" / "halfstep"
    assert named == {str(p.relative_to(source)) for p in source.glob("*/*.py") if p.name != "__init__.py"}
