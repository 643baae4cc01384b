"""The tables of pages that the code knows best: written here from its own lists, held by a test.

python docs/tables.py     writes them anew, each between its two marks on its page
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from halfstep.app import cli
from halfstep.core.process import BETA_SCHEDULERS, FLOW_SCHEDULERS, OTHER_PROCESSES
from halfstep.core.recipe import RuntimeName
from halfstep.core.solvers import SOLVERS
from halfstep.engine.pipelines import CONDITIONAL_HALF
from halfstep.engine.runtime import PACKAGES
from halfstep.engine.samplers import REFUSED
from halfstep.nets.architectures import ROWS
from halfstep.nets.denoiser import class_example

HERE = Path(__file__).parent
YES = "✓"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verbs_of(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every verb of the command line by its words."""
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):
            yield from verbs_of(verb, (*path, name))
        else:
            yield " ".join((*path, name)), verb


def verbs() -> str:
    """What each verb is for, and which of the options that not all have."""
    rows = []
    for name, verb in verbs_of(get_command(cli.app)):
        options = {word for option in verb.params for word in option.opts}
        about = re.split(r"(?<=\.)\s", inspect.cleandoc(verb.help))[0].rstrip(".").replace("|", "\\|")
        goes_on = YES if name.split()[0] in cli.RESUMED else ""
        rows.append([f"`{name}`", about, goes_on, *(YES * (o in options) for o in ("--processes", "--ray", "--json"))])
    return table(["verb", "what it does", "goes on", "`--processes`", "`--ray`", "`--json`"], rows)


def families() -> str:
    """Which network takes what."""
    head = ["network", "conditions", "widths", "masks", "slim student", "reuse", "`train` from nothing"]
    rows = []
    for row in ROWS:
        conditions = "nothing or classes" if row.example is class_example else _CONDITIONS[row.name]
        able = [row.slim, True, row.gated, row.cuts, row.fresh]
        rows.append([f"`{row.name}`", conditions, *(YES if ability else "–" for ability in able)])
    return table(head, rows)


_CONDITIONS = {
    "UNet2DConditionModel": "text",
    "DiTTransformer2DModel": "classes",
    "PixArtTransformer2DModel": "text",
    "SD3Transformer2DModel": "text",
    "FluxTransformer2DModel": "text; under `attach` alone",
}
"""Of the families whose calls take more than class numbers."""


def samplers() -> str:
    """What a recipe names, and what the search tries."""
    rows = [
        [f"`{name}`", solver.told, ", ".join(f"`{one}`" for one in solver.spacings),
         ", ".join(map(str, solver.orders)) or "–", YES if solver.flow else "–"]
        for name, solver in SOLVERS.items()
    ]  # fmt: skip
    return table(["`--scheduler`", "sampler", "`--spacing`", "`--order`", "flow matching"], rows)


def schedulers() -> str:
    """What a plan may name, and what is refused."""

    def told(names: Iterable[str]) -> str:
        return ", ".join(f"`{name.removesuffix('Scheduler')}`" for name in sorted(names))

    rows = [["of betas", told(set(BETA_SCHEDULERS) - set(REFUSED))], ["of flow matching", told(FLOW_SCHEDULERS)]]
    rows += [[f"of betas, {why}: refused", told([name])] for name, why in REFUSED.items()]
    rows += [[f"{kind}: refused", told(names)] for kind, names in OTHER_PROCESSES.items()]
    return table(["process", "diffusers' classes, without `Scheduler`"], rows)


def runtimes() -> str:
    """What runs a network."""
    rows = []
    for name in get_args(RuntimeName):
        packages = PACKAGES.get(name, ())
        needs = f"`halfstep[{name}]`: {', '.join(packages)}" if packages else "–"
        rows.append([f"`{name}`", _RUNTIMES[name][0], needs, _RUNTIMES[name][1]])
    return table(["`--runtime`", "what runs", "needs", "where"], rows)


_RUNTIMES = {
    "eager": ("PyTorch as it is", "everywhere"),
    "auto": ("the fastest here of all that are installed, by a timing", "everywhere"),
    "compile": ("`torch.compile`; on a GPU CUDA graphs too", "everywhere"),
    "onnx": ("ONNX Runtime", "CPU, float32 and `int8`"),
    "openvino": ("OpenVINO", "CPU, float32 and `int8`"),
}


def guided() -> str:
    """The stock pipelines whose guidance a plan may rule."""
    return ", ".join(f"`{name}`" for name in CONDITIONAL_HALF)


TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one for one in (verbs, families, samplers, schedulers, runtimes, guided)
}


def written(text: str) -> str:
    """A page's text with every table that it marks as the code has it now."""

    def anew(match: re.Match[str]) -> str:
        return f"<!-- docs/tables.py: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- docs/tables\.py: (\w+) -->\n.*?<!-- end -->", anew, text, flags=re.S)


def main() -> None:
    for page in sorted(HERE.rglob("*.md")):
        if (new := written(page.read_text("utf-8"))) != page.read_text("utf-8"):
            page.write_text(new, "utf-8")
            print(page)


if __name__ == "__main__":
    main()
