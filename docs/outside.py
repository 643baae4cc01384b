"""A hook of mkdocs: what pages link to outside of docs/ (benchmarks, examples) is a page of the site, too.

Pages are read in the repository as well as on the site. A link `../benchmarks/free16.md` is right there; here it is led
to `repository/benchmarks/free16.md`: Markdown as a page, a notebook and any other text as a page that shows it,
pictures as they are. And nothing that is built may ask the network for anything: `on_post_build` looks.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"
ALWAYS = ("CONTRIBUTING.md",)
"""What the navigation names."""
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
AS_IT_IS = (".md", ".png", ".svg", ".jpg", ".webp")
FETCHES = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s>]*"
    r"|<link\b(?![^>]*\brel=[\"']?(?:canonical|next|prev))[^>]*\bhref=[\"']?(?:https?:)?//[^\s>]*"
    r"|(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s)]*"
)
"""What a browser would fetch from elsewhere when it opens a page; a link that is clicked is none."""


def is_here(target: str) -> bool:
    return not re.match(r"[a-z]+:", target)


def path_of(src_uri: str) -> str:
    """Where a page of the site stands in the repository, relative to its root."""
    if src_uri.startswith(f"{PLACE}/"):
        path = src_uri.removeprefix(f"{PLACE}/")
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{src_uri}"


def uri_of(path: str) -> str:
    """The page of the site for a file of the repository; the other way round of `path_of`."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{PLACE}/{path}" if path.endswith(AS_IT_IS) else f"{PLACE}/{path}.md"


def linked(text: str, path: str) -> set[str]:
    """The files of the repository that a page at `path` links to, as paths from the root."""
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(path), m[2])) for m in LINK.finditer(text)
             if is_here(m[2])}  # fmt: skip
    return {one for one in found if not one.startswith("..") and (ROOT / one).is_file()}


def outside(paths: Iterable[str]) -> set[str]:
    """All that these pages link to outside of docs/, and what that links to in turn."""
    found, queue = set(), list(paths)
    while queue:
        path = queue.pop()
        for other in linked((ROOT / path).read_text("utf-8"), path) if path.endswith(".md") else ():
            if not other.startswith("docs/") and other not in found:
                found.add(other)
                queue.append(other)
    return found


def cells(text: str) -> str:
    """A notebook as Markdown: its cells, and what they printed."""
    shown = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        shown.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                shown.append(
                    f"![What the cell above shows](data:image/png;base64,{''.join(data['image/png']).strip()})"
                )
            elif printed := "".join(output.get("text", data.get("text/plain", ""))):
                shown.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(shown) + "\n"


def page_of(path: str) -> str:
    """The Markdown of a page that shows a text file."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".ipynb"):
        return cells(text)
    language = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml"}.get(Path(path).suffix, "text")
    return f"# `{path}`\n\n````{language}\n{text.rstrip()}\n````\n"


def on_files(files: Any, config: Any) -> Any:
    """Add what is linked to."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in sorted(outside([*pages, *ALWAYS]) | set(ALWAYS)):
        if path.endswith(AS_IT_IS):
            files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, uri_of(path), content=page_of(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead the links of a page to where the site has what they name."""
    mine = page.file.src_uri
    path = path_of(mine)

    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if not is_here(match[2]) or not (ROOT / target).is_file():
            return match[0]  # mkdocs says what is wrong with it
        there = posixpath.relpath(uri_of(target), posixpath.dirname(mine) or ".")
        return f"{match[1]}{there}{match[3] or ''}"

    return LINK.sub(led, markdown)


def fetched(text: str) -> list[str]:
    """What a page or style sheet would fetch from elsewhere."""
    return [match[0] for match in FETCHES.finditer(text)]


def on_post_build(config: Any) -> None:
    """Refuse a site that asks the network for anything when it is opened."""
    for file in sorted(Path(config["site_dir"]).rglob("*")):
        if file.suffix in (".html", ".css") and (found := fetched(file.read_text("utf-8"))):
            raise PluginError(f"{file.relative_to(config['site_dir'])} would fetch {found[0]}")
