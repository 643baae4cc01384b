"""The parts of the studio's page as HTML: the frontier, a plan's price and its strip, pictures, a film. They need no
Gradio and no file beside them: pictures are data in the page, and colours follow its light or dark.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch

from halfstep.app.exploring import Exploration, Frame, Measured, Progress, ms_of, told_row
from halfstep.core.plan import StepPlan
from halfstep.data.pictures import picture_grid
from halfstep.nets.denoiser import class_count
from halfstep.report.palette import INK, amount, entry_colours, is_dark, percent

MOST_BUTTONS = 200
"""Rows of a strip that can be clicked; of a longer plan the others are chosen by number."""
ONE_LINE = 12
"""Rows that fit a phone's width; those of a longer plan do not grow, or the last line of them would."""
FILM_SIDE = 96
"""Pixels of a picture of a film at most: all of its moments are in the page at once."""

CSS = """
.gradio-container main.fillable {max-width: 1320px !important; padding: 20px clamp(12px, 3vw, 32px) !important}
.gradio-container .form {gap: 16px; background: none; border: 0; box-shadow: none}
.gradio-container .html-container, .gradio-container .html-container.padding {padding: 0 !important}
.gradio-container button[role=tab][aria-selected=true] {color: var(--body-text-color) !important}
.card {background: var(--block-background-fill); border: 1px solid var(--border-color-primary)}
.card {border-radius: 12px; padding: 16px clamp(12px, 2vw, 20px) 20px; gap: 14px !important; flex-grow: 1 !important}
.card h2 {margin: 0 0 2px; font-size: 1.15rem}
.card .block {padding-left: 0 !important; padding-right: 0 !important; overflow: visible !important}
#run {border-radius: 12px}
.masthead h1 {margin: 0; font-size: 1.6rem; letter-spacing: -0.01em}
.masthead p {margin: 2px 0 0; color: var(--body-text-color-subdued)}
.soft {color: var(--body-text-color-subdued); font-size: 0.92em; margin: 4px 0}
.frontier {width: 100%; height: auto; display: block; color: var(--body-text-color); font-size: 13px}
.frontier text {fill: currentColor}
.frontier .grid {stroke: currentColor; opacity: 0.13}
.frontier .line {fill: none; stroke: #4f46e5; stroke-width: 2}
.dark .frontier .line {stroke: #a5b4fc}
.frontier .dot {fill: #4f46e5; cursor: pointer}
.dark .frontier .dot {fill: #a5b4fc}
.frontier :not(.dot) {pointer-events: none}
.frontier .dot:hover {stroke: currentColor; stroke-width: 2}
.frontier .today {fill: none; stroke: currentColor; stroke-width: 2}
.frontier .now {stroke: #ea580c; stroke-width: 2; stroke-dasharray: 4 3}
.frontier .here {fill: #ea580c; stroke: var(--block-background-fill); stroke-width: 2}
.facts {display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 10px 24px; margin: 0}
.facts dt {font-size: 1.35rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums}
.facts dd {margin: 0; color: var(--body-text-color-subdued); font-size: 0.9em}
.strip {display: flex; flex-wrap: wrap; gap: 3px; padding: 5px 0}
.strip button {min-width: 24px; min-height: 44px; padding: 0; margin: 0 !important; font-variant-numeric: tabular-nums}
.strip button {border: 1px solid var(--border-color-primary); border-radius: 4px; font-weight: 600; cursor: pointer}
.strip button[aria-pressed=true] {box-shadow: inset 0 0 0 2px white, 0 0 0 3px #ea580c}
.strip button:focus-visible, .swipe input:focus-visible {outline: 3px solid #2563eb; outline-offset: 3px}
.film button:focus-visible, .film input:focus-visible {outline: 3px solid #2563eb; outline-offset: 3px}
.legend {display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.92em}
.legend i {display: inline-block; width: 0.9em; height: 0.9em; border-radius: 2px; margin-right: 0.4em}
.pictures {display: flex; flex-wrap: wrap; gap: 16px}
.pictures figure {flex: 1 1 200px; margin: 0; max-width: 560px}
.pictures img, .swipe img, .film img {width: 100%; image-rendering: pixelated; background: white; border-radius: 6px}
figcaption {font-size: 0.92em; margin-top: 4px}
.swipe {max-width: 640px}
.swipe div {position: relative}
.swipe .over {position: absolute; inset: 0; clip-path: inset(0 0 0 50%)}
.swipe .edge {position: absolute; top: 0; bottom: 0; left: 50%; width: 2px; margin-left: -1px; background: #ea580c}
.swipe input {width: 100%; height: 32px; accent-color: #4f46e5}
.film {max-width: 640px}
.film .calls {display: flex; gap: 2px; height: 10px; margin: 8px 0 2px}
.film .calls i {border-radius: 2px; opacity: 0.3}
.film .calls i.ran {opacity: 1}
.film .controls {display: flex; gap: 12px; align-items: center}
.film .controls input {flex: 1; height: 32px; accent-color: #4f46e5}
.film .controls button {min-width: 80px; min-height: 44px; border-radius: 8px; font-weight: 600}
.film .controls button {border: 1px solid var(--border-color-primary)}
.film .controls button {background: var(--button-secondary-background-fill)}
.progress table {display: block; overflow-x: auto; max-width: 100%; border-collapse: collapse}
.progress th, .progress td {padding: 4px 14px 4px 0; text-align: left; border: 0}
.progress tbody tr {border-top: 1px solid var(--border-color-primary)}
.progress td {font-variant-numeric: tabular-nums}
.min_value, .max_value, figcaption {color: var(--body-text-color) !important}
.gradio-container input.subdued {color: var(--body-text-color) !important}
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

FRONTIER_JS = """
element.addEventListener('click', (event) => {
  const dot = event.target.closest('[data-ms]');
  if (dot) trigger('select', {ms: Number(dot.dataset.ms)});
});
"""
LIVE_JS = "element.setAttribute('aria-live', 'polite');"
SWIPE_JS = """
element.addEventListener('input', (event) => {
  const over = element.querySelector('.over'), edge = element.querySelector('.edge');
  if (!over) return;
  over.style.clipPath = `inset(0 0 0 ${event.target.value}%)`;
  edge.style.left = `${event.target.value}%`;
});
"""
FILM_JS = """
let clock = 0;
const images = () => [...element.querySelectorAll('.screen img')];
const show = (at) => {
  const all = images(), frame = all[at], range = element.querySelector('input');
  all.forEach((one, k) => { one.hidden = k !== at; });
  element.querySelectorAll('.calls i').forEach((one, k) => one.classList.toggle('ran', k <= Number(frame.dataset.row)));
  element.querySelector('.now').textContent = frame.dataset.told;
  range.value = at;
  range.setAttribute('aria-valuetext', frame.dataset.told);
};
const stop = () => {
  clearInterval(clock);
  clock = 0;
  const button = element.querySelector('button');
  if (button) button.textContent = 'Play';
};
const play = () => {
  const range = element.querySelector('input'), last = images().length - 1;
  if (Number(range.value) >= last) show(0);
  element.querySelector('button').textContent = 'Pause';
  clock = setInterval(() => {
    const at = Number(element.querySelector('input')?.value ?? last);
    if (at >= last) return stop();
    show(at + 1);
  }, Math.max(60, Math.min(250, 3000 / last)));
};
element.addEventListener('click', (event) => {
  if (!event.target.closest('button')) return;
  if (clock) stop(); else play();
});
element.addEventListener('input', (event) => { stop(); show(Number(event.target.value)); });
watch('value', () => {
  stop();
  if (images().length > 1 && !matchMedia('(prefers-reduced-motion: reduce)').matches) play();
});
"""


def counted(count: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def told(text: str) -> str:
    """A paragraph of it."""
    return f'<p class="soft">{escape(text)}</p>'


def masthead() -> str:
    """What this page is."""
    what = "Plans by what they cost on this machine, and the same noise through each of them."
    return f'<header class="masthead"><h1>Halfstep studio</h1><p>{what}</p></header>'


def about(explored: Exploration) -> str:
    """What is looked at, and where it is priced."""
    config, names = explored.bank.config, list(explored.bank)
    size, classes = config["sample_size"], class_count(config)
    side = "×".join(map(str, size)) if isinstance(size, list | tuple) else f"{size}×{size}"
    kinds = [f"{classes} classes"] if classes else ["prompts"] if explored.takes_prompts else []
    facts = [
        f"{counted(len(names), 'network')} ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})",
        f"samples of {config['in_channels']}×{side}",
        *kinds,
        f"priced on {explored.bank.device.type}, {counted(torch.get_num_threads(), 'thread')}",
    ]
    return told("; ".join(facts))


# ----------------------------------------------------------------------------------------------------------- pictures


def data_url(pictures: np.ndarray, columns: int = 4, side: int | None = None) -> str:
    """A grid of uint8 [N,C,H,W] as a PNG within the page, each picture at most `side` pixels wide."""
    grid = picture_grid(pictures, columns)
    if side is not None and pictures.shape[-1] > side:
        grid.thumbnail((side * min(columns, len(pictures)), 1 << 16))
    grid.save(file := io.BytesIO(), "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(pictures: np.ndarray, caption: str, alt: str) -> str:
    """A grid with its caption."""
    image = f'<img src="{data_url(pictures)}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def row_of_figures(*figures: str) -> str:
    return f'<div class="pictures">{"".join(figures)}</div>'


def swipe(one: np.ndarray, other: np.ndarray) -> str:
    """The reference's pictures under the plan's, of which a range control shows more or less."""
    lower = f'<img src="{data_url(one)}" alt="The reference\'s pictures, left of the line">'
    upper = f'<img class="over" src="{data_url(other)}" alt="The plan\'s pictures, right of the line">'
    control = '<input type="range" min="0" max="100" value="50" aria-label="Swipe: the reference left, the plan right">'
    layers = f'<div>{lower}{upper}<span class="edge"></span></div>'
    return f'<div class="swipe">{layers}{control}{told("Left of the line: the reference. Right: the plan.")}</div>'


def film(frames: Sequence[Frame], plan: StepPlan) -> str:
    """The moments of a film, one of which is seen, what ran until then, and controls."""
    if not frames:
        return told("Nothing is filmed yet.")
    images = "".join(
        f'<img src="{data_url(one.pictures, side=FILM_SIDE)}" alt="{len(one.pictures)} pictures: {escape(one.told)}" '
        f'data-told="{escape(one.told)}" data-row="{-1 if one.row is None else one.row}"{" hidden" if at else ""}>'
        for at, one in enumerate(frames)
    )
    colours, first = colours_of(plan), escape(frames[0].told)
    calls = "".join(
        f'<i style="flex: {_us(plan, row.entry):.4g}; background: {colours[row.entry]}"></i>' for row in plan.rows
    )
    range_ = (
        f'<input type="range" min="0" max="{len(frames) - 1}" value="0" aria-label="Moment of the film" '
        f'aria-valuetext="{first}">'
    )
    controls = f'<div class="controls"><button type="button">Play</button>{range_}</div>'
    screen = f'<div class="screen">{images}</div><div class="calls" aria-hidden="true">{calls}</div>'
    return f'<div class="film">{screen}<p class="now soft">{first}</p>{controls}</div>'


# -------------------------------------------------------------------------------------------------------------- plans


def colours_of(plan: StepPlan) -> Mapping[str, str]:
    """The colour of every entry that a plan is priced for."""
    return entry_colours({name: price.macs / plan.prices[plan.reference].macs for name, price in plan.prices.items()})


def _us(plan: StepPlan, entry: str) -> float:
    return plan.prices[entry].us or 1.0


def strip(plan: StepPlan, chosen: int) -> str:
    """The plan's rows as buttons, each as wide as its cost, and what the colours are."""
    colours, buttons = colours_of(plan), []
    most = max(_us(plan, name) for name in plan.entries)
    for at, row in enumerate(plan.rows[:MOST_BUTTONS]):
        colour = colours[row.entry]
        ink = "white" if is_dark(colour) else INK
        wide = _us(plan, row.entry) / most
        flex = f"{wide:.4g} 1 24px" if len(plan.rows) <= ONE_LINE else f"0 0 {24 + 20 * wide:.0f}px"
        look = f"flex: {flex}; background: {colour}; color: {ink}"
        stop = 0 if at == min(chosen, MOST_BUTTONS - 1) else -1
        state = f'aria-pressed="{str(at == chosen).lower()}" tabindex="{stop}"'
        said = escape(told_row(plan, at))
        buttons.append(
            f'<button type="button" data-row="{at}" {state} style="{look}" title="{said}" aria-label="{said}">{at + 1}'
            "</button>"
        )
    over = len(plan.rows) > MOST_BUTTONS
    more = told(f"Rows {MOST_BUTTONS + 1} to {len(plan.rows)} are chosen by number.") if over else ""
    legend = "".join(
        f'<span><i style="background: {colours[name]}"></i>{escape(name)}: {counted(plan.entries.count(name), "row")}'
        "</span>"
        for name in dict.fromkeys(plan.entries)
    )
    group = '<div class="strip" role="toolbar" aria-label="Rows of the plan, from noise to picture; arrow keys move">'
    return f'{group}{"".join(buttons)}</div>{more}<div class="legend">{legend}</div>'


def price(explored: Exploration, plan: StepPlan) -> str:
    """What a plan costs beside the reference, and what was measured of it."""
    ms, today = ms_of(plan), ms_of(explored.reference)
    own, theirs = explored.measured(plan), explored.measured(explored.reference)
    beside = "" if theirs is None else f"; the reference {_score(theirs)}"
    quality = ("—", "distance to the data: not measured")
    if own is not None:
        quality = (_score(own), f"distance to the data, less is nearer; of {own.images} pictures{beside}")
    facts = [
        (f"{amount(ms)} ms", "a picture, on this machine"),
        (percent(ms / today), f"of the reference's {amount(today)} ms ({explored.reference.sampler.told})"),
        (str(len(plan.called)), f"network calls, {amount(plan.macs / 1e6)} MMACs ({plan.sampler.told})"),
        quality,
    ]
    cells = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(of)}</dd></div>" for what, of in facts)
    return f'<dl class="facts">{cells}</dl>'


def _score(one: Measured) -> str:
    return amount(one.score or 0.0)


class _Axis:
    """From values to places between two ends: logarithmic where they span more than a factor of eight."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        least, most = min(values), max(values)
        self.log = least > 0 and most / least > 8
        self.start, self.end = start, end
        low, high = (math.log(least), math.log(most)) if self.log else (least, most)
        room = 0.06 * (high - low or abs(high) or 1.0)
        self.low, self.high = low - room, high + room

    def __call__(self, value: float) -> float:
        share = ((math.log(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within the ends, two to seven of them."""
        low, high = (math.exp(self.low), math.exp(self.high)) if self.log else (self.low, self.high)
        if self.log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            round_ones = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            within = [one for one in round_ones if low <= one <= high]
            return within if len(within) < 8 else within[:: math.ceil(len(within) / 6)]
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 6)
        return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def frontier(explored: Exploration, plan: StepPlan) -> str:
    """The measured plans worth having, by milliseconds and distance, the reference and where the plan is; a dot takes
    its plan."""
    dots = [(one.ms, one.score) for one in explored.plans if one.score is not None]
    if not dots:
        return told("Nothing was measured here: the slider goes over uniform plans by their price.")
    today, own = explored.measured(explored.reference), explored.measured(plan)
    ms, at_today = ms_of(plan), ms_of(explored.reference)
    ys = [score for _, score in dots] + ([today.score or 0.0] if today else [])
    x, y = _Axis([*(cost for cost, _ in dots), at_today, ms], 44, 470), _Axis(ys, 178, 26)
    parts = [f'<line class="grid" x1="44" x2="470" y1="{y(one):.1f}" y2="{y(one):.1f}"/>' for one in y.ticks()]
    parts += [f'<text x="38" y="{y(one) + 4:.1f}" text-anchor="end">{amount(one)}</text>' for one in y.ticks()]
    parts += [f'<text x="{x(one):.1f}" y="196" text-anchor="middle">{amount(one)}</text>' for one in x.ticks()]
    parts.append('<text x="470" y="214" text-anchor="end">milliseconds a picture</text>')
    parts.append('<text x="10" y="14">distance to the data</text>')
    path = " ".join(f"{x(cost):.1f},{y(score):.1f}" for cost, score in dots)
    parts.append(f'<line class="now" x1="{x(ms):.1f}" x2="{x(ms):.1f}" y1="26" y2="178"/>')
    parts.append(f'<polyline class="line" points="{path}"/>')
    if today is not None:
        parts.append(f'<circle class="today" cx="{x(at_today):.1f}" cy="{y(today.score or 0.0):.1f}" r="8"/>')
    parts += [
        f'<circle class="dot" data-ms="{cost!r}" cx="{x(cost):.1f}" cy="{y(score):.1f}" r="5.5">'
        f"<title>{amount(cost)} ms, distance {amount(score)}</title></circle>"
        for cost, score in dots
    ]
    if own is not None and own.score is not None:
        parts.append(f'<circle class="here" cx="{x(ms):.1f}" cy="{y(own.score):.1f}" r="8"/>')
    (least, worst), (most, best) = dots[0], dots[-1]
    said = f"{counted(len(dots), 'measured plan')}: from {amount(least)} ms, distance {amount(worst)}, "
    said += f"to {amount(most)} ms, distance {amount(best)}; shown: {amount(ms)} ms"
    ring = " The ring is the reference." if today else ""
    note = told(f"Dots are measured plans, orange is the one shown.{ring}")
    return f'<svg class="frontier" viewBox="0 0 480 218" role="img" aria-label="{said}">{"".join(parts)}</svg>{note}'


def progress(found: Progress | None, unknown: int) -> str:
    """How a run stands; None: it is no run."""
    if found is None:
        return told("This is a model, not a run: nothing is searched here.")
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{count}</td><td>{images}</td><td>{best:.4g}</td></tr>"
        for name, images, count, best in found.stages
    )
    head = "".join(f"<th scope='col'>{title}</th>" for title in ("Stage", "Plans", "Pictures", "Best score"))
    more = f" {unknown} measured plans are of entries or samplers that are not here." if unknown else ""
    note = told("Scores compare within one number of pictures; those of fidelity are of another measure.")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{note}" if rows else ""
    return f'<div class="progress"><p>{escape(found.told)}.{escape(more)}</p>{table}</div>'
