"""The house's rules, with the source text and a fresh interpreter as oracles: imports go down, importing is lean."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "halfstep"
ROOMS = ("core", "data", "nets", "engine", "measure", "search", "training", "methods", "report", "app")
"""From the ground up: a room's modules import from their own room and from those before it."""
ADDRESSES = ("bank", "recipe", "sampling")
"""Modules beside the rooms that hold nothing but names of before."""
MODULES = sorted(str(p.relative_to(SOURCE).with_suffix("")) for p in SOURCE.rglob("*.py"))


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse((SOURCE / f"{module}.py").read_text())


def imports_of(module: str) -> set[str]:
    """The modules, e.g. "core/plan", that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "halfstep":
            path = "/".join(node.module.split(".")[1:])
            found |= {path} | {f"{path}/{alias.name}".strip("/") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {"/".join(a.name.split(".")[1:]) for a in node.names if a.name.startswith("halfstep.")}
    return found & set(MODULES)


def room_of(module: str) -> str:
    return module.split("/")[0] if "/" in module else ""


def test_every_module_stands_in_a_room():
    beside = {module for module in MODULES if not room_of(module)}
    assert beside == {"__init__", "__main__", *ADDRESSES}
    assert {room_of(module) for module in MODULES} == {"", *ROOMS}


@pytest.mark.parametrize("module", [m for m in MODULES if "/" in m])
def test_imports_go_only_downward(module):
    height = ROOMS.index(room_of(module))
    for other in imports_of(module):
        assert "/" in other, f"{module} imports {other}, which is there for scripts of before"
        assert ROOMS.index(room_of(other)) <= height, f"{module} imports {other} from a room above"


def test_no_modules_import_each_other_in_a_circle():
    links = {module: imports_of(module) for module in MODULES if "/" in module}
    while free := [module for module, others in links.items() if not others & set(links)]:
        for module in free:
            del links[module]
    assert not links


def test_a_paper_does_not_know_another_but_for_the_masks_of_a_supernet():
    known = {(m, o) for m in MODULES if room_of(m) == "methods" for o in imports_of(m) if room_of(o) == "methods"}
    assert known == {("methods/slimmable", "methods/sparse")}  # DDSM x SparseDM: every width under every mask


def test_addresses_of_before_hold_nothing_of_their_own():
    for module in ADDRESSES:
        assert all(isinstance(node, ast.ImportFrom) for node in tree(module).body[1:])


def test_importing_halfstep_and_its_values_does_not_import_torch():
    core = ", ".join(f"halfstep.{m.replace('/', '.')}" for m in MODULES if room_of(m) == "core" and "__" not in m)
    heavy = "('torch', 'diffusers', 'accelerate', 'matplotlib')"
    code = f"import sys, halfstep, halfstep.app.cli, {core}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import halfstep

    assert [getattr(halfstep, name).__name__ for name in halfstep.__all__[:-1]] == halfstep.__all__[:-1]


def test_type_checkers_see_every_public_name_in_the_home_that_it_is_fetched_from():
    import halfstep

    (seen,) = (node for node in tree("__init__").body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in seen.body for alias in node.names}
    assert told == {name: f"halfstep.{home}" for name, home in halfstep._HOMES.items()}


@pytest.mark.slow
def test_the_types_are_right():
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr


def test_all_that_is_linted_is_type_checked_but_the_tests():
    linted = re.search(r"ruff check (.*)", (ROOT / "Makefile").read_text())[1].split()
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert {path.split("/")[0] for path in checked} == set(linted) - {"tests"}


def test_no_drawer_modules_and_no_pickle():
    for module in MODULES:
        assert Path(module).name not in ("utils", "misc", "common", "helpers")
        text = (SOURCE / f"{module}.py").read_text()
        assert not re.search(
            r"\btorch\.(load\((?!.*weights_only=True)|save\()|allow_pickle=True|trust_remote_code=True", text
        )
        assert (
            module == "engine/cluster" or "import pickle" not in text
        )  # between processes of one cluster, never a file


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_in_one_line(module):
    docstring = ast.get_docstring(tree(module))
    assert docstring and len(docstring.splitlines()[0]) <= 120


MOST_LINES, MOST_PARAMETERS = 50, 8


def functions(module: str) -> list[tuple[ast.FunctionDef, bool]]:
    """Every function, and whether diffusers makes a config of its parameters."""
    found = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]
    return [(node, any(ast.unparse(d) == "register_to_config" for d in node.decorator_list)) for node in found]


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short_and_take_few_things(module):
    for node, is_config in functions(module):
        lines = node.end_lineno - node.lineno + 1
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        assert lines <= MOST_LINES, f"{module}: {node.name} has {lines} lines"
        of_diffusers = is_config or (module, node.name) == ("engine/stepaware", "__call__")
        assert of_diffusers or count <= MOST_PARAMETERS, f"{module}: {node.name} has {count} parameters"


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names: the second of a process would be an error of collection."""
    names = sorted(file.name for file in Path(__file__).parent.rglob("test_*.py"))
    assert len(names) == len(set(names)), names


def test_tests_stand_in_the_rooms_of_what_they_test():
    tests = Path(__file__).parent
    assert {p.parent.name for p in tests.rglob("test_*.py")} == {"tests", *ROOMS}
