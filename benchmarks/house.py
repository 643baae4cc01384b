"""The house in numbers: modules, import levels, imports, circles, long functions; of this checkout or of another's.

python benchmarks/house.py [SOURCE]        SOURCE: a folder src/halfstep, e.g. of a worktree of an older commit
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

HERE = Path(__file__).parents[1] / "src" / "halfstep"


def modules_of(source: Path) -> dict[str, ast.Module]:
    """Every module by its dotted name inside of the package, but for packages that only say what they are."""
    files = [p for p in source.rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(source).with_suffix("").parts): ast.parse(p.read_text()) for p in files}


def imports_of(tree: ast.Module, modules: dict[str, ast.Module]) -> set[str]:
    """The package's modules that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (module := node.module or "").split(".")[0] == "halfstep":
            path = module.partition(".")[2]
            found |= {path} | {f"{path}.{alias.name}".strip(".") for alias in node.names}
    return found & set(modules)


def levels(links: dict[str, set[str]]) -> tuple[int, list[str]]:
    """How many floors the modules stand on, each above all that it imports, and those that stand in a circle."""
    floors, rest = 0, dict(links)
    while rest:
        free = [module for module, others in rest.items() if not others & set(rest)]
        if not free:
            return floors, sorted(rest)
        floors += 1
        for module in free:
            del rest[module]
    return floors, []


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    modules = modules_of(source)
    links = {name: imports_of(tree, modules) - {name} for name, tree in modules.items()}
    floors, circle = levels(links)
    functions = [node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    configs = {f for f in functions if any(ast.unparse(d) == "register_to_config" for d in f.decorator_list)}
    wide = [f for f in functions if f not in configs and _parameters(f) > 8]
    rooms = {name.split(".")[0] for name in modules if "." in name}
    print(f"rooms                        {len(rooms)}")
    print(f"modules                      {len(modules)}")
    print(f"lines of the longest         {max(len(p.read_text().splitlines()) for p in source.rglob('*.py'))}")
    print(f"import levels                {floors}")
    print(f"imports between modules      {sum(map(len, links.values()))}")
    print(f"imports between rooms        {len(_between_rooms(links))}")
    print(f"modules in a circle          {len(circle)}")
    print(f"functions over 50 lines      {sum(_lines(f) > 50 for f in functions)}")
    print(f"functions of over 8 things   {len(wide)}")


def _lines(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None, "of parsed text"
    return node.end_lineno - node.lineno + 1


def _parameters(node: ast.FunctionDef) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _between_rooms(links: dict[str, set[str]]) -> set[tuple[str, str]]:
    pairs = {(a.split(".")[0], b.split(".")[0]) for a, others in links.items() for b in others if "." in a and "." in b}
    return {(a, b) for a, b in pairs if a != b}


if __name__ == "__main__":
    main()
