"""A run's report as it is read: films, strips, light and dark, and a browser's and axe-core's opinion of the page.

Oracles: what went in, the plan's prices, WCAG's formula of contrast, headless Chromium, axe-core (where they are).
"""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_page import ABOUT, ROW

from halfstep.core.plan import Correction, Guide, Price, Row, Sampler, StepPlan
from halfstep.core.results import Comparison
from halfstep.measure.films import Film
from halfstep.report.charts import done_after, strip
from halfstep.report.figures import Pareto, Series, draw_svg
from halfstep.report.lanes import lanes
from halfstep.report.markup import light_and_dark, shrunk, themed, tiles
from halfstep.report.page import Beside, Grid, Report, Table, write_report
from halfstep.report.palette import DARK, contrast, in_dark
from halfstep.report.reels import Reel, Track, reel
from halfstep.report.story import _reel

RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice")
PRICES = {"full": Price(100, 2900), "w0.50": Price(25, 1000)}


def plan_of(*names: str) -> StepPlan:
    rows = tuple(Row(999.0 - k * 998 / len(names), name) for k, name in enumerate(names))
    return StepPlan(rows=rows, sampler=Sampler("DDIMScheduler", {}, len(names)), reference="full", prices=PRICES)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def film(frames: int = 4) -> Film:
    rows = np.arange(-1, frames - 1)
    return Film(
        frames=noise(frames, 2, 1, 8, 8),
        rows=rows,
        timesteps=np.linspace(999, 0, frames),
        ran=np.array(["", *["full"] * (frames - 1)]),
        of=frames - 1,
    )


def track(frames: int, ms: float) -> Track:
    at = tuple(np.linspace(0, ms, frames).tolist())
    told = tuple(f"call {k}" for k in range(frames))
    return Track(name=f"the {ms:g}", frames=noise(frames, 2, 1, 8, 8), ms=at, told=told)


def whole() -> Report:
    """A page with one of each part."""
    pictures = noise(8, 1, 8, 8)
    series = (Series(name="plan", points=((1.0, 2.0, 1.0, 3.0),), style="star"),)
    timed = {"cost_label": "milliseconds per image", "beat": (2.0, 1.5)}
    plan = plan_of("full", "w0.50", "w0.50").with_guides([None, Guide("full", 2.0), None])
    return Report(
        title="A report",
        summary="The plan is 4.0 times as fast.",
        warnings=("16 images are few",),
        todo=("About 300 images would decide it:", "--set eval.images=300"),
        numbers=(("40 ms", "for a batch of 64", "today 160 ms"), ("4.0×", "as fast as today", "")),
        facts={"data": "digits"},
        parts=(
            Beside(title="The same noise", rows={"today": pictures, "the plan": pictures}, pictured=("a cat",)),
            Table(
                title="Time",
                columns=("", *(f"a long column {k}" for k in range(9))),
                rows=tuple((name, *["1,000.00"] * 9) for name in ("today", "best free", "plan")),
                best=2,
                beat=1,
            ),
            Pareto(title="Quality", metric_label="FD", series=series, band=(1.0, 2.0), **timed),
            strip(plan, against={"today": ("full",) * 50}),
            Reel(title="Films", tracks=(track(4, 2.0), track(9, 8.0)), pictured=("a cat", "")),
            *(Grid(title=name, images=pictures) for name in ("reference", "plan")),
        ),
        files={"plan.json": "the plan"},
    )


# --- films ----------------------------------------------------------------------------------------------------------


def test_a_film_s_clock_is_the_measured_time_of_an_image_shared_out_by_price():
    about = replace(ABOUT, free="best free")
    row = replace(ROW, wall_ms=80.0)  # of a batch of 8
    record = Comparison(about=about, plans={"reference": row, "best free": row, "plan": replace(row, wall_ms=8.0)})
    plan = plan_of("full", "w0.50", "w0.50").with_guides([None, None, Guide("w0.50", 2.0)])
    found = _reel(record, plan, {"reference": film(), "plan": film()}, ("a cat", "a dog"))
    assert [one.name for one in found.tracks] == ["today", "the plan"] and found.pictured == ("a cat", "a dog")
    np.testing.assert_allclose(found.tracks[0].ms, [0, 10 / 3, 20 / 3, 10])
    np.testing.assert_allclose(found.tracks[1].ms, [0, 29 / 59, 39 / 59, 1])  # by the microseconds of its calls
    assert found.tracks[1].told == (
        "noise",
        "call 1 of 3: full at 666",
        "call 2 of 3: full at 333",
        "call 3 of 3: full at 0",
    )


def test_what_is_done_is_a_share_of_the_time_or_of_the_macs_where_there_are_no_times():
    plan = plan_of("full", "w0.50")
    np.testing.assert_allclose(done_after(plan), [29 / 39, 1])
    np.testing.assert_allclose(
        done_after(replace(plan, prices={"full": Price(100), "w0.50": Price(25, 1.0)})), [0.8, 1]
    )


def test_the_frames_of_a_page_are_those_that_were_kept_one_below_another():
    one = track(5, 2.0)
    told = reel(Reel(title="Films", tracks=(one,)))
    screen = told[told.index('class="screen"') :]
    source = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", screen)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))).convert("L"))
    for frame in range(5):
        for k in range(2):
            assert np.array_equal(sheet[9 * frame : 9 * frame + 8, 9 * k : 9 * k + 8], one.frames[frame, k, 0])
    at, said = (json.loads(unescape(re.search(rf'data-{name}="([^"]*)"', screen)[1])) for name in ("at", "told"))
    assert len(at) == len(said) == 5 and said[-1] == "call 4" and at[-1] == 2.0
    assert told.count("<td><img") == 5 and '<div class="moving" hidden>' in told


def test_a_long_film_s_strip_has_its_first_and_last_moment_and_a_few_between():
    told = reel(Reel(title="Films", tracks=(track(25, 50.0),)))
    strip = told[told.index('<table class="film"') :]
    assert re.findall(r"<span>(call \d+)</span>", strip) == [f"call {k}" for k in (0, 4, 8, 12, 16, 20, 24)]


# --- strips ---------------------------------------------------------------------------------------------------------


def test_each_row_of_a_plan_is_as_wide_as_its_price_and_says_it():
    plan = plan_of("full", "w0.50", "full").with_guides([None, Guide("full", 2.0), None])
    plan = plan.with_corrections([Correction(), Correction(), Correction(0.9)])
    told = lanes(strip(plan, against={"today": ("full",) * 10}), {"full": "#000000", "w0.50": "#111111"})
    steps = told[told.index('<table class="steps"') :]
    rows = re.findall(r"<tr><th scope=\"row\">(\d+)</th>.*?<td>(.*?)</td><td class=\"n\">(.*?)</td>(.*?)</tr>", steps)
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("1", "full", "2.9"), ("2", "w0.50, guided by full ×2", "3.9"), ("3", "full, corrected", "2.9"),
    ]  # fmt: skip
    widths = [sum(map(float, re.findall(r"width:([\d.]+)%", row[3]))) for row in rows]
    np.testing.assert_allclose(widths, [100 * 2.9 / 3.9, 100, 100 * 2.9 / 3.9], rtol=1e-3)
    lanes_ = re.findall(r'aria-label="([^"]*)" style="width:([\d.]+)%"', told)
    assert [name for name, _ in lanes_] == ["10 calls: 10 of full", "4 calls: 3 of full, 1 of w0.50"]
    assert [float(width) for _, width in lanes_] == pytest.approx([100, 100 * 9.7 / 29], rel=1e-3)


def test_a_thousand_rows_are_told_in_stretches():
    plan = plan_of(*["full"] * 500, *["w0.50"] * 500)
    told = lanes(strip(plan), {"full": "#000000", "w0.50": "#111111"})
    assert told.count("<tr>") == 3 and "1 to 500" in told and "501 to 1000" in told and "1 each" in told
    assert told.count("<i ") == 4 and len(told) < 4000


# --- light and dark -------------------------------------------------------------------------------------------------


@given(st.integers(0, 0xFFFFFF).map("#{:06x}".format))
def test_every_colour_can_be_told_from_the_ground_in_the_dark(colour):
    known = {"#dfe4ec", "#e3e7ee", "#f1f3f6", "#c5cbd5", "#ffffff"}  # grounds and lines, which are to be quiet
    assert colour in known or contrast(in_dark(colour), DARK) >= 4.5


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == contrast("#ffffff", "#000000") == 21
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the known near miss


def test_a_drawing_has_no_colour_of_its_own_and_the_page_says_all_of_them_twice():
    figure = next(part for part in whole().parts if isinstance(part, Pareto))
    for narrow in (False, True):
        svg = draw_svg(figure, {}, narrow=narrow)
        told = themed(svg)
        assert svg == draw_svg(figure, {}, narrow=narrow) and not re.search(r"[: ]#[0-9a-f]{6}\b", told)
        names = set(re.findall(r"var\(--(c[0-9a-f]{6})\)", told))
        style = light_and_dark(told)
        assert names and all(len(re.findall(rf"--{name}:", style)) == 2 for name in names)


# --- pictures -------------------------------------------------------------------------------------------------------


def test_tiles_keep_the_pixels_and_large_ones_are_shrunk():
    images = noise(5, 3, 8, 8)
    sheet = np.asarray(tiles(images, 3))
    assert sheet.shape == (18, 27, 4) and not sheet[8, :, 3].any()
    for k, one in enumerate(images):
        y, x = k // 3 * 9, k % 3 * 9
        assert np.array_equal(sheet[y : y + 8, x : x + 8, :3], one.transpose(1, 2, 0))
    assert shrunk(noise(2, 1, 640, 320)).shape == (2, 1, 160, 80) and shrunk(images) is images


def test_the_pictures_of_one_noise_stand_below_one_another_and_say_what_they_are_of(tmp_path):
    page = write_report(whole(), tmp_path).read_text()
    assert 'alt="picture 1, a cat, by the plan"' in page and 'alt="picture 2, by today"' in page
    assert "<title>A report</title>" in page and "<b>Warning:</b> 16 images are few." in page
    assert "<code>--set eval.images=300</code>" in page and not re.search(r"https?://(?!www\.w3\.org)", page)


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    return write_report(whole(), tmp_path_factory.mktemp("report")).as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_axe_finds_nothing_serious_and_the_page_does_not_scroll_sideways(browser, axe, written, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(written)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert not wrong and {one.split(":")[0] for one in asked} <= {"file", "data"}
    page.evaluate(axe)
    found = page.evaluate("(rules) => axe.run(document, {runOnly: {type: 'tag', values: rules}})", list(RULES))
    assert not [(one["id"], one["nodes"][0]["html"]) for one in found["violations"] if one["impact"] != "minor"]
    page.close()


@pytest.mark.slow
def test_the_clock_moves_every_film_to_what_had_run_by_then(browser, written):
    page = browser.new_page()
    page.goto(written)
    page.focus("#clock")
    assert page.inner_text(".clock output") == "0 ms" and page.inner_text(".now >> nth=1") == "call 0"
    page.keyboard.press("End")
    assert page.inner_text(".clock output") == "8 ms"
    assert [page.inner_text(f".now >> nth={k}") for k in (0, 1)] == ["call 3", "call 8"]
    moved = page.evaluate("[...document.querySelectorAll('.screen img')].map(one => one.style.transform)")
    assert moved == ["translateY(-75%)", f"translateY({-100 * 8 / 9:.4f}%)"] or len(moved) == 2
    page.emulate_media(reduced_motion="reduce")
    assert not page.is_visible(".clock button")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.is_visible(".moving") and page.is_visible(".film") and page.is_visible(".broad")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()


@pytest.mark.slow
def test_without_a_script_the_strip_alone_is_seen(browser, written):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written)
    assert not page.is_visible(".moving") and page.is_visible(".film")
    context.close()
