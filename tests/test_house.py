"""The house's rules, with the source text and a fresh interpreter as oracles: imports go down, importing is lean."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "halfstep"
FLOORS = {
    "values": (
        "errors",
        "disk",
        "lock",
        "typed",
        "process",
        "recipe",
        "results",
        "plan",
        "watch",
        "threads",
        "sums",
        "seeds",
        "machine",
        "folder",
    ),
    "nets": (
        "content",
        "denoiser",
        "slices",
        "masks",
        "unet",
        "uvit",
        "wavelet",
        "ode",
        "channels",
        "architectures",
        "weights",
    ),
    "methods": ("slimmable", "sparse", "spectral", "continuous", "regularized"),
    "workers": (
        "arrays",
        "layout",
        "sources",
        "tables",
        "pictures",
        "data",
        "classes",
        "fit",
        "latents",
        "train",
        "models",
        "entry",
        "bank",
        "verify",
        "samplers",
        "sampling",
        "space",
        "damage",
        "frontier",
        "surrogate",
        "evolve",
        "profiling",
        "features",
        "spectrum",
        "quality",
        "sanity",
        "judge",
        "scores",
        "restore",
        "kernels",
        "device",
    ),
    "wiring": (
        "recipes",
        "figures",
        "page",
        "fresh",
        "loop",
        "rundir",
        "job",
        "reading",
        "compress",
        "driver",
        "corrections",
        "story",
        "measured",
        "methods",
        "run",
    ),
    "faces": ("options", "terminal", "cli", "__main__"),
}
HEIGHT = {module: floor for floor, modules in enumerate(FLOORS.values()) for module in modules}
MODULES = sorted(p.stem for p in SOURCE.glob("*.py") if p.stem != "__init__")


def imports_of(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "halfstep":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("halfstep."):
            found.add(node.module.split(".")[1])
    return found & set(MODULES)


def test_every_module_has_a_floor():
    assert set(MODULES) == set(HEIGHT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_downward(module):
    for other in imports_of(module):
        assert HEIGHT[other] <= HEIGHT[module], f"{module} imports {other} from a floor above"
        if HEIGHT[module] == HEIGHT["slimmable"]:
            assert HEIGHT[other] < HEIGHT[module], f"the method {module} imports the method {other}"


@pytest.mark.parametrize("module", MODULES)
def test_workers_know_no_paper(module):
    if module in FLOORS["workers"]:
        assert not imports_of(module) & set(FLOORS["methods"])


def test_importing_halfstep_does_not_import_torch():
    code = (
        "import sys, halfstep, halfstep.cli; print([m for m in ('torch','diffusers','matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_drawer_modules_and_no_pickle():
    for module in MODULES:
        assert module not in ("utils", "misc", "common", "helpers")
        text = (SOURCE / f"{module}.py").read_text()
        assert not re.search(r"\btorch\.(load|save)\(|\bimport pickle|allow_pickle=True|trust_remote_code=True", text)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_in_one_line(module):
    docstring = ast.get_docstring(ast.parse((SOURCE / f"{module}.py").read_text()))
    assert docstring and len(docstring.splitlines()[0]) <= 120
