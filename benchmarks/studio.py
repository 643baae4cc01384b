"""The studio as it is seen: screenshots wide and narrow, light and dark, seconds of a grid, what axe-core objects to.

    halfstep studio RUN --port 7860 &
    python benchmarks/studio.py http://127.0.0.1:7860 --out docs [--axe node_modules/axe-core/axe.min.js]

Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

VIEWS = {
    "wide-light": (1200, "light"),
    "wide-dark": (1200, "dark"),
    "phone-light": (420, "light"),
    "phone-dark": (420, "dark"),
}
RULES = "wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"


def used(page: Page, address: str) -> str:
    """Open the page, edit its fifth row, draw, film; returns what was said of the drawing."""
    page.goto(address)
    page.wait_for_selector("#strip button", timeout=90_000)
    page.click("#strip button[data-row='4']")
    page.wait_for_selector("#strip button[data-row='4'][aria-pressed=true]", timeout=60_000)
    page.locator("#call label:not(.selected) input[type=radio]").last.check()
    page.wait_for_function("() => document.querySelector('#price').innerText.includes('not measured')", timeout=60_000)
    page.click("#draw")
    page.wait_for_selector("#beside img >> nth=1", timeout=90_000)
    page.click("#film")
    page.wait_for_selector("#frame img:not([hidden])", timeout=90_000)
    page.wait_for_function("() => document.querySelector('#frame .controls button').textContent == 'Play'")
    middle = "(one) => { one.value = one.max * 0.8; one.dispatchEvent(new Event('input', {bubbles: true})); }"
    page.locator("#frame input[type=range]").evaluate(middle)
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    page.wait_for_timeout(300)
    return page.inner_text("#drawn")


def small(picture: bytes, file: Path) -> None:
    """A screenshot in 128 colours, a third of its bytes."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def objections(page: Page, axe: Path) -> list[str]:
    """What axe-core finds wrong, by rule, impact, and one element of each."""
    page.evaluate(axe.read_text())
    told = {"runOnly": {"type": "tag", "values": RULES}}
    found = page.evaluate("(told) => axe.run(document, told)", told)
    return [f"{v['impact']} {v['id']} x{len(v['nodes'])}: {v['nodes'][0]['html'][:160]}" for v in found["violations"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--axe", type=Path)
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, scheme) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said = used(page, args.address)
            wide = page.evaluate("document.documentElement.scrollWidth")
            small(page.screenshot(full_page=True), args.out / f"studio-{name}.png")
            wrong = objections(page, args.axe) if args.axe else None
            print(json.dumps({"view": name, "drawn": said, "page_width": wide, "axe": wrong}, indent=1), flush=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
