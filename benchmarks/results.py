"""The ledger of the five papers' claims: what was measured of each, by which command, beside what, and the verdict.

python benchmarks/results.py             # lists the rows with their commands and times (`make results`)
python benchmarks/results.py --write     # docs/results.md, from benchmarks/results.toml
"""

from __future__ import annotations

import argparse
import tomllib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console

HERE = Path(__file__).parent
LEDGER, PAGE = HERE / "results.toml", HERE.parent / "docs" / "results.md"
Verdict = Literal["held", "not held", "not decided", "not measured"]
ARXIV = {
    "DDSM": ("2310.03337", "ddsm"),
    "SparseDM": ("2404.10445", "sparsedm"),
    "Spectral Diffusion": ("2211.17106", "spectral"),
    "The Missing U": ("2310.20092", "continuous"),
    "Regularised score matching": ("2502.09151", "regularized"),
}
"""Every paper's number, and its page under docs/methods."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row. `n`: pictures; `seeds`: trainings; `decides`: what would decide an undecided one, or a remark;
    `minutes`: of one core."""

    paper: str
    claim: str
    measured: str
    n: int
    seeds: int
    control: str
    verdict: Verdict
    command: str
    decides: str = ""
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.paper not in ARXIV or self.verdict not in get_args(Verdict):
            raise ValueError(f"{self.claim!r}: paper {self.paper!r}, verdict {self.verdict!r}")
        if self.verdict.startswith("not d") and not self.decides:
            raise ValueError(f"{self.claim!r}: not decided, and not said what would decide it")


def read_ledger(file: Path = LEDGER) -> list[Claim]:
    """The rows of the ledger. Raises ValueError and TypeError for one that is not whole."""
    rows = tomllib.loads(file.read_text())["claim"]
    known = {field.name for field in fields(Claim)}
    foreign = [key for row in rows for key in row if key not in known]
    if foreign:
        raise ValueError(f"a field {foreign[0]!r}, not one of {', '.join(sorted(known))}")
    return [Claim(**row) for row in rows]


def page_of(claims: list[Claim]) -> str:
    """The ledger as a page."""
    told = Counter(claim.verdict for claim in claims)
    counted = ", ".join(f"{told[v]} {v}" for v in get_args(Verdict) if told[v])
    lines = [
        "# The ledger",
        f"Each claim of the five papers, what we measured of it at our scale, and the verdict: {counted}. Intervals "
        "are of 95 %, over pictures unless trainings are counted; *n*: pictures, *seeds*: trainings. Made of "
        "[results.toml](../benchmarks/results.toml); `make results` lists the commands with their times.",
    ]
    for paper, (number, page) in ARXIV.items():
        rows = [claim for claim in claims if claim.paper == paper]
        lines.append(
            f"## {paper}\n\n[arXiv {number}](https://arxiv.org/abs/{number}); [what we do](methods/{page}.md)."
        )
        lines += [_told(claim) for claim in rows]
    return "\n\n".join(lines) + "\n"


def _told(claim: Claim) -> str:
    """One claim under its verdict; a table of so many words would be no table on a narrow page."""
    counts = [f"{claim.n:,} pictures, {claim.seeds} training{'s' * (claim.seeds > 1)}"] if claim.seeds else []
    said = [
        f"### {claim.verdict.capitalize()}: {claim.claim}",
        ". ".join([f"**Measured**: {claim.measured}", *counts]) + ".",
        f"**Beside**: {claim.control}." if claim.command else "",
        f"**Would decide it**: {claim.decides}." if claim.verdict.startswith("not ") and claim.decides else "",
        f"```bash\n{claim.command}\n```" if claim.command else "",
    ]
    return "\n\n".join(filter(None, said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make docs/results.md")
    claims = read_ledger()
    if parser.parse_args().write:
        PAGE.write_text(page_of(claims))
    console = Console(soft_wrap=True, highlight=False)
    for claim in claims:
        minutes = "" if claim.minutes is None else f", {claim.minutes:,.0f} min of a core"
        console.print(f"[b]{claim.paper}[/b]: {claim.claim}: [b]{claim.verdict}[/b]{minutes}", markup=True)
        console.print(f"    {claim.command or claim.decides}", markup=False)


if __name__ == "__main__":
    main()
