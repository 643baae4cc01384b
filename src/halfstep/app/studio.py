"""The studio's page: controls and pictures over explorations (`exploring.py`), which check all that a browser sends.

Pictures and strips are parts of the page itself: no file is served. Only `serving.py` imports this, once Gradio is told
what it must not do.
"""

from __future__ import annotations

import base64
import functools
import io
import time
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from halfstep.app.exploring import (
    GRID,
    MOST_LETTERS,
    MOST_PICTURES,
    Asked,
    Exploration,
    Frame,
    difference,
    ms_of,
    progress,
    told_row,
)
from halfstep.app.palette import INK, amount, entry_colours, is_dark
from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.plan import StepPlan
from halfstep.core.seeds import MAX_SEED
from halfstep.core.typed import shown
from halfstep.data.pictures import picture_grid
from halfstep.search.scores import read_scores

MOST_BUTTONS = 200
"""Rows of a strip that can be clicked; of a longer plan the others are chosen by number."""
FRAME_SECONDS = 0.15
ALL = "all in turn"

CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
.strip {display: flex; flex-wrap: wrap; gap: 3px; padding: 4px}
.strip button {min-width: 30px; min-height: 44px; margin: 0 !important}
.strip button {border: 1px solid var(--border-color-primary); border-radius: 4px; font-weight: 600; cursor: pointer}
.strip button[aria-pressed=true] {box-shadow: inset 0 0 0 2px white, 0 0 0 3px #c2410c}
.strip button:focus-visible, .swipe input:focus-visible {outline: 3px solid #2563eb; outline-offset: 3px}
.legend {display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.95em}
.legend i {display: inline-block; width: 0.9em; height: 0.9em; border-radius: 2px; margin-right: 0.4em}
.pictures {display: flex; flex-wrap: wrap; gap: 16px}
.pictures figure {flex: 1 1 280px; margin: 0; max-width: 540px}
.pictures img, .swipe img {width: 100%; image-rendering: pixelated; background: white; border-radius: 4px}
#progress table {display: block; overflow-x: auto; max-width: 100%}
#progress th, #progress td {padding: 4px 8px}
.swipe {max-width: 640px}
.swipe div {position: relative}
.swipe .over {position: absolute; inset: 0; clip-path: inset(0 0 0 50%)}
.swipe input {width: 100%; height: 32px}
.min_value, .max_value, figcaption, .told {color: var(--body-text-color) !important}
button.primary, button.primary:hover {background: #1d4ed8 !important; color: white !important}
"""

STRIP_JS = """
element.setAttribute('aria-live', 'polite');
let held = false;
const pick = (button) => { held = true; trigger('select', {row: Number(button.dataset.row)}); };
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-row]');
  if (button) pick(button);
});
element.addEventListener('keydown', (event) => {
  const button = event.target.closest('button[data-row]');
  if (!button) return;
  const all = [...element.querySelectorAll('button[data-row]')], at = all.indexOf(button);
  const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  all[to].focus();
  pick(all[to]);
});
watch('value', () => {
  if (held) element.querySelector('button[aria-pressed=true]')?.focus();
  held = false;
});
"""
"""Rows are one stop of the tab key, and arrows move along them, as in a toolbar of ARIA's patterns."""

LIVE_JS = "element.setAttribute('aria-live', 'polite');"
SWIPE_JS = """
element.addEventListener('input', (event) => {
  const over = element.querySelector('.over');
  if (over) over.style.clipPath = `inset(0 0 0 ${event.target.value}%)`;
});
"""


def told_in_the_page(handler: Callable[..., Any]) -> Callable[..., Any]:
    """What a user's error says is shown in the page; the server goes on."""

    @functools.wraps(handler)
    def told(*args: Any) -> Any:
        try:
            return handler(*args)
        except HalfstepError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return told


# ----------------------------------------------------------------------------------------------------------- as HTML


def data_url(pictures: np.ndarray, columns: int = 4) -> str:
    """A grid of uint8 [N,C,H,W] as a PNG within the page."""
    picture_grid(pictures, columns).save(file := io.BytesIO(), "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(pictures: np.ndarray, caption: str, alt: str) -> str:
    """A grid with its caption."""
    image = f'<img src="{data_url(pictures)}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def strip(plan: StepPlan, chosen: int) -> str:
    """The plan's rows as buttons, each as wide as its cost, and what the colours are."""
    shares = {name: price.macs / plan.prices[plan.reference].macs for name, price in plan.prices.items()}
    colours = entry_colours(shares)
    buttons = []
    for at, row in enumerate(plan.rows[:MOST_BUTTONS]):
        colour, us = colours[row.entry], plan.prices[row.entry].us or 1.0
        ink = "white" if is_dark(colour) else INK
        look = f"flex: {us / 1e3:.4g} 1 30px; background: {colour}; color: {ink}"
        state = (
            f'aria-pressed="{str(at == chosen).lower()}" tabindex="{0 if at == min(chosen, MOST_BUTTONS - 1) else -1}"'
        )
        said = escape(told_row(plan, at))
        told = f'style="{look}" title="{said}" aria-label="{said}"'
        buttons.append(f'<button type="button" data-row="{at}" {state} {told}>{at + 1}</button>')
    more = (
        f"<p>Rows {MOST_BUTTONS + 1} to {len(plan.rows)} are chosen by number.</p>"
        if len(plan.rows) > MOST_BUTTONS
        else ""
    )
    legend = "".join(
        f'<span><i style="background: {colours[name]}"></i>{escape(name)}: {plan.entries.count(name)} rows</span>'
        for name in dict.fromkeys(plan.entries)
    )
    group = '<div class="strip" role="toolbar" aria-label="Rows of the plan, from noise to picture; arrow keys move">'
    return f'{group}{"".join(buttons)}</div>{more}<div class="legend">{legend}</div>'


def swipe(one: np.ndarray, other: np.ndarray) -> str:
    """The reference's pictures under the plan's, of which a range control shows more or less."""
    lower = f'<img src="{data_url(one)}" alt="The reference\'s pictures, left of the line">'
    upper = f'<img class="over" src="{data_url(other)}" alt="The plan\'s pictures, right of the line">'
    control = '<input type="range" min="0" max="100" value="50" aria-label="Swipe: the reference left, the plan right">'
    return f'<div class="swipe"><div>{lower}{upper}</div>{control}<p>Left: the reference. Right: the plan.</p></div>'


def price_line(explored: Exploration, plan: StepPlan) -> str:
    """What a plan costs beside the reference, and what was measured of it."""
    ms, today = ms_of(plan), ms_of(explored.reference)
    same = [one for one in explored.plans if one.plan.digest == plan.digest and one.score is not None]
    quality = "not measured"
    if same:
        quality = f"distance to the data {amount(same[0].score or 0.0)}, measured of {same[0].images} pictures"
    told = (
        f"<strong>{amount(ms)} ms</strong> a picture, {plan.macs / 1e6:,.0f} MMACs; "
        f"{ms / today:.0%} of the reference's {amount(today)} ms ({escape(explored.reference.sampler.told)}). "
        f"{escape(plan.sampler.told)}, {len(plan.called)} network calls; {quality}."
    )
    return f'<p class="told">{told}</p>'


# ---------------------------------------------------------------------------------------------------------- the page


class Page:
    """The page over some runs, by name; the first is shown first. `build` makes it."""

    def __init__(self, runs: Mapping[str, Exploration]):
        self.runs = dict(runs)
        self.first = next(iter(self.runs.values()))

    def explored(self, run: Any) -> Exploration:
        """One of the runs by its name. Raises RunError for a name that is none of them."""
        if not isinstance(run, str) or run not in self.runs:
            names = ", ".join(self.runs)
            raise RunError(got=shown(run), expected=f"one of {names}", where="run", do="choose one that was opened")
        return self.runs[run]

    def build(self) -> gr.Blocks:
        """All of it, its events bound."""
        with gr.Blocks(title="Halfstep studio", analytics_enabled=False) as page:
            gr.Markdown("# Halfstep studio")
            names = list(self.runs)
            self.run = gr.Dropdown(names, value=names[0], label="Run", visible=len(names) > 1, filterable=False)
            self.plan = gr.State(self.begin(self.first).plan)
            self._plan_section()
            self._picture_section()
            self._film_section()
            self._save_section()
            self._progress_section()
            self._bind(page)
        return page

    @staticmethod
    def begin(explored: Exploration) -> Any:
        """The plan that is shown first: the best one for a quarter of the reference's time."""
        return explored.at(ms_of(explored.reference) / 4)

    def _plan_section(self) -> None:
        gr.Markdown("## The plan")
        self.ms = gr.Slider(0, 1, label="Milliseconds a picture, on this machine", elem_id="ms")
        self.price = gr.HTML(js_on_load=LIVE_JS, elem_id="price")
        self.strip = gr.HTML(js_on_load=STRIP_JS, elem_id="strip", label="The plan, row by row")
        with gr.Row():
            self.row = gr.Slider(1, 2, step=1, label="Row", elem_id="row")
            self.call = gr.Radio([], label="What runs in this row", elem_id="call")
        with gr.Accordion("The plan in words", open=False):
            self.words = gr.Textbox(label="Plan", lines=4, interactive=False, elem_id="words")

    def _picture_section(self) -> None:
        gr.Markdown("## Pictures of the same noise")
        with gr.Row():
            self.count = gr.Slider(1, MOST_PICTURES, value=GRID, step=1, label="Pictures", elem_id="count")
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
            self.label = gr.Dropdown([ALL], value=ALL, label="Class", visible=False, elem_id="class")
            self.prompt = gr.Textbox(label="Prompt", max_length=MOST_LETTERS, visible=False, elem_id="prompt")
        self.draw = gr.Button("Draw the pictures", variant="primary", elem_id="draw")
        self.drawn = gr.HTML(js_on_load=LIVE_JS, elem_id="drawn")
        with gr.Tab("Side by side"):
            self.beside = gr.HTML(js_on_load=None, elem_id="beside")
        with gr.Tab("Swipe"):
            self.swipe = gr.HTML(js_on_load=SWIPE_JS, elem_id="swipe")
        with gr.Tab("Difference"):
            self.apart = gr.HTML(js_on_load=None, elem_id="difference")

    def _film_section(self) -> None:
        gr.Markdown("## From noise to picture")
        self.frames = gr.State([])
        with gr.Row():
            self.filmed = gr.Button("Film the plan", elem_id="film")
            self.play = gr.Button("Play", elem_id="play")
        self.frame = gr.Slider(0, 1, value=0, step=1, label="Moment", elem_id="moment", interactive=True)
        self.moment = gr.HTML("<p>Nothing is filmed yet.</p>", js_on_load=None, elem_id="frame")

    def _save_section(self) -> None:
        gr.Markdown("## Keep it")
        with gr.Row():
            self.name = gr.Textbox(label="Name of the pipeline", max_length=40, value="mine", elem_id="name")
            self.save = gr.Button("Save as a pipeline", elem_id="save")
        self.saved = gr.HTML(js_on_load=LIVE_JS, elem_id="saved")
        with gr.Row():
            self.kept = gr.Dropdown([], label="Saved here", elem_id="kept", filterable=False)
            self.open = gr.Button("Show its plan", elem_id="open")

    def _progress_section(self) -> None:
        gr.Markdown("## The search")
        self.progress = gr.HTML(js_on_load=None, elem_id="progress")
        self.again = gr.Button("Take in what was measured since", elem_id="again")
        self.timer = gr.Timer(3.0)

    def _bind(self, page: gr.Blocks) -> None:
        """Every event. Those of a slider take the last of many positions."""
        shown_plan = [self.plan, self.price, self.strip, self.row, self.call, self.words]
        shown_run = [*shown_plan, self.ms, self.label, self.prompt, self.kept, self.progress]
        asked = [self.run, self.plan, self.count, self.seed, self.label, self.prompt]
        last: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
        self._on(page.load, self.chosen, [self.run], shown_run, "choose")
        self._on(self.run.input, self.chosen, [self.run], shown_run, None)
        self._on(self.ms.input, self.moved, [self.run, self.ms], shown_plan, "move", **last)
        self._on(self.row.input, self.picked, [self.run, self.plan, self.row], [self.strip, self.call], "pick", **last)
        self.strip.select(
            self._clicked, [self.run, self.plan], [self.strip, self.call, self.row], api_visibility="private", **last
        )
        self._on(self.call.input, self.edited, [self.run, self.plan, self.row, self.call], shown_plan, "edit", **last)
        drawn = [self.drawn, self.beside, self.swipe, self.apart]
        self._on(self.draw.click, self.pictures, asked, drawn, "draw")
        self._on(self.filmed.click, self.film, asked, [self.frames, self.frame, self.moment], "film")
        self._on(self.frame.input, self.at_moment, [self.frames, self.frame], [self.moment], None, **last)
        self._on(self.play.click, self.played, [self.frames], [self.frame, self.moment], None, show_progress="hidden")
        self._on(self.save.click, self.kept_as, [self.run, self.plan, self.name], [self.saved, self.kept], "save")
        self._on(self.open.click, self.opened, [self.run, self.kept], shown_plan, "open")
        self._on(self.timer.tick, self.told_progress, [self.run], [self.progress], None, show_progress="hidden")
        self._on(self.again.click, self.taken, [self.run], shown_run, "again")

    @staticmethod
    def _on(event: Any, handler: Callable, inputs: list, outputs: list, name: str | None, **more: Any) -> None:
        visible = {"api_name": name} if name else {"api_visibility": "private"}
        told = handler if handler.__name__ == "played" else told_in_the_page(handler)
        event(told, inputs, outputs, concurrency_limit=1, **visible, **more)

    # ------------------------------------------------------------------------------------------------- what events do

    def _shown(self, explored: Exploration, plan: StepPlan, row: int = 0) -> tuple:
        """A plan in all the places that show one."""
        rows = gr.Slider(1, max(2, len(plan.rows)), value=row + 1, step=1)
        call = gr.Radio(list(explored.calls), value=explored.call_at(plan, row))
        return plan, price_line(explored, plan), strip(plan, row), rows, call, str(plan)

    def chosen(self, run: str) -> tuple:
        """Another run, or the page anew."""
        explored = self.explored(run)
        first, least, most = self.begin(explored), explored.plans[0].ms, explored.plans[-1].ms
        step = float(f"{max(1e-4, (most - least) / 200):.1g}")
        ms = gr.Slider(_down(least), _up(most), value=float(f"{first.ms:.4g}"), step=step)
        label = gr.Dropdown([ALL, *explored.labels], value=ALL, visible=bool(explored.labels))
        prompt = gr.Textbox(visible=explored.takes_prompts)
        kept = gr.Dropdown(explored.saved(), value=None)
        return (*self._shown(explored, first.plan), ms, label, prompt, kept, self.told_progress(run))

    def moved(self, run: str, ms: float) -> tuple:
        """The slider."""
        explored = self.explored(run)
        return self._shown(explored, explored.at(ms).plan)

    def picked(self, run: str, plan: StepPlan, row: float) -> tuple:
        """A row by its number."""
        explored = self.explored(run)
        at = explored.row_of(plan, row - 1 if isinstance(row, int | float) else row)
        return strip(plan, at), gr.Radio(list(explored.calls), value=explored.call_at(plan, at))

    def _clicked(self, run: str, plan: StepPlan, event: gr.EventData) -> tuple:
        """A row of the strip."""
        row = event._data.get("row") if isinstance(event._data, dict) else None
        at = told_in_the_page(self.explored(run).row_of)(plan, row)
        return *self.picked(run, plan, at + 1), at + 1

    def edited(self, run: str, plan: StepPlan, row: float, call: str) -> tuple:
        """Another entry in the row."""
        explored = self.explored(run)
        at = explored.row_of(plan, row - 1 if isinstance(row, int | float) else row)
        return self._shown(explored, explored.edited(plan, at, call), at)

    @staticmethod
    def _asked(count: float, seed: float, label: str | None, prompt: str) -> Asked:
        return Asked(count, seed, None if label in (None, ALL) else label, prompt or "")  # type: ignore[arg-type]

    def pictures(self, run: str, plan: StepPlan, count: float, seed: float, label: str, prompt: str) -> tuple:
        """The same noise through the reference and the plan."""
        explored, asked = self.explored(run), self._asked(count, seed, label, prompt)
        begun = time.perf_counter()
        found = explored.drawn(plan, asked)
        middle = time.perf_counter()
        today = explored.drawn(explored.reference, asked)
        seconds, before = middle - begun, time.perf_counter() - middle
        apart = difference(today, found)
        what = f"{len(found)} pictures of seed {int(seed)}"
        told = f"{what}: the plan in {seconds:.2f} s, the reference in {before:.2f} s (0 s: kept from before)."
        one = figure(today, f"Reference: {explored.reference.sampler.told}", f"{what}, drawn by the reference")
        other = figure(found, f"Plan: {plan.sampler.told}, {amount(ms_of(plan))} ms each", f"{what}, drawn by the plan")
        mean = f"mean {apart.mean():.3g}, most {apart.max()} of 255; black where equal"
        third = figure(apart, f"Absolute difference, {mean}", f"{what}: absolute difference, {mean}")
        both = f'<div class="pictures">{one}{other}</div>'
        return f'<p class="told">{told}</p>', both, swipe(today, found), f'<div class="pictures">{third}</div>'

    def film(self, run: str, plan: StepPlan, count: float, seed: float, label: str, prompt: str) -> tuple:
        """The plan's way from noise to pictures."""
        explored = self.explored(run)
        frames = explored.film(plan, self._asked(count, seed, label, prompt))
        return frames, gr.Slider(0, len(frames) - 1, value=0, step=1), self.at_moment(frames, 0)

    def at_moment(self, frames: list[Frame], at: float) -> str:
        """One moment of the film."""
        if not frames:
            return "<p>Nothing is filmed yet.</p>"
        frame = frames[max(0, min(len(frames) - 1, int(at)))]
        shown_now = figure(frame.pictures, frame.told, f"{len(frame.pictures)} pictures: {frame.told}")
        return f'<div class="pictures">{shown_now}</div>'

    def played(self, frames: list[Frame]) -> Iterator[tuple]:
        """The film, moment by moment."""
        for at in range(len(frames)):
            yield at, self.at_moment(frames, at)
            time.sleep(FRAME_SECONDS)
        if not frames:
            yield 0, self.at_moment(frames, 0)

    def kept_as(self, run: str, plan: StepPlan, name: str) -> tuple:
        """Save the plan with its networks."""
        explored = self.explored(run)
        folder = explored.save(plan, name)
        told = f'<p class="told">Saved: <code>{escape(str(folder))}</code></p>'
        return told, gr.Dropdown(explored.saved(), value=name)

    def opened(self, run: str, name: str | None) -> tuple:
        """A plan that was saved here."""
        explored = self.explored(run)
        return self._shown(explored, explored.opened(name))

    def taken(self, run: str) -> tuple:
        """What was measured since the run was opened."""
        explored = self.explored(run)
        if explored.folder is not None:
            explored.take(read_scores(explored.folder))
        return self.chosen(run)

    def told_progress(self, run: str) -> str:
        """How the run stands."""
        explored = self.explored(run)
        if explored.folder is None:
            return "<p>This is a model, not a run: nothing is searched here.</p>"
        found = progress(explored.folder)
        rows = "".join(
            f"<tr><th scope='row'>{escape(name)}</th><td>{count}</td><td>{images}</td><td>{best:.4g}</td></tr>"
            for name, images, count, best in found.stages
        )
        titles = ("Stage", "Plans", "Pictures", "Best score")
        cells = "".join(f"<th scope='col'>{title}</th>" for title in titles)
        head = f"<tr>{cells}</tr>"
        note = "Scores compare within one number of pictures; those of fidelity are of another measure."
        more = f" {explored.unknown} measured plans are of entries that are not here." if explored.unknown else ""
        table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table><p>{note}</p>" if rows else ""
        return f"<p>{escape(found.told)}.{more}</p>{table}"


def _down(ms: float) -> float:
    """To three digits, no larger."""
    return float(f"{ms * 0.995:.3g}")


def _up(ms: float) -> float:
    """To three digits, no smaller."""
    return float(f"{ms * 1.005:.3g}")


def theme() -> gr.themes.Base:
    """Gradio's plain theme in the system's own letters: none are fetched."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
