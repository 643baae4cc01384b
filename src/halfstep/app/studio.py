"""The studio's page: controls over explorations (`exploring.py`), which check all that a browser sends, and what they
show (`panels.py`).

Pictures and strips are parts of the page itself: no file is served. Only `serving.py` imports this, once Gradio is told
what it must not do.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from halfstep.app import panels
from halfstep.app.exploring import GRID, MOST_LETTERS, MOST_PICTURES, Asked, Exploration, difference, ms_of, progress
from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.plan import StepPlan
from halfstep.core.seeds import MAX_SEED
from halfstep.core.typed import shown
from halfstep.report.palette import amount
from halfstep.search.scores import read_scores

ALL = "all in turn"
AT_ONCE = 5.0
"""Seconds: where a plan and the reference are drawn in fewer, the page draws whenever the plan changes."""


def told_in_the_page(handler: Callable[..., Any]) -> Callable[..., Any]:
    """What a user's error says is shown in the page; the server goes on."""

    @functools.wraps(handler)
    def told(*args: Any) -> Any:
        try:
            return handler(*args)
        except HalfstepError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return told


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
            gr.HTML(panels.masthead(), js_on_load=None)
            names = list(self.runs)
            self.run = gr.Dropdown(
                names, value=names[0], label="Run", visible=len(names) > 1, filterable=False, elem_id="run"
            )
            self.about = gr.HTML(js_on_load=None, elem_id="about")
            self.plan = gr.State(self.begin(self.first).plan)
            left, right = [self._plan_section], [self._picture_section, self._film_section]
            for columns in ((left, right), ([self._save_section], [self._progress_section])):
                with gr.Row():
                    for sections in columns:
                        with gr.Column():
                            for section in sections:
                                with gr.Column(elem_classes="card"):
                                    section()
            self._bind(page)
        return page

    @staticmethod
    def begin(explored: Exploration) -> Any:
        """The plan that is shown first: the best one for a quarter of the reference's time."""
        return explored.at(ms_of(explored.reference) / 4)

    def _plan_section(self) -> None:
        gr.Markdown("## The plan")
        self.frontier = gr.HTML(js_on_load=panels.FRONTIER_JS, elem_id="frontier")
        self.ms = gr.Slider(0, 1, label="Milliseconds a picture, on this machine", elem_id="ms")
        self.price = gr.HTML(js_on_load=panels.LIVE_JS, elem_id="price")
        self.strip = gr.HTML(js_on_load=panels.STRIP_JS, elem_id="strip", label="The plan, row by row")
        with gr.Row():
            self.row = gr.Slider(1, 2, step=1, label="Row", elem_id="row", min_width=200)
            self.call = gr.Radio([], label="What runs in this row", elem_id="call", min_width=240)
        with gr.Accordion("The plan in words", open=False):
            self.words = gr.Textbox(label="Plan", lines=4, interactive=False, elem_id="words")

    def _picture_section(self) -> None:
        gr.Markdown("## Pictures of the same noise")
        with gr.Row():
            self.count = gr.Slider(1, MOST_PICTURES, value=GRID, step=1, label="Pictures", elem_id="count")
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
        self.label = gr.Dropdown([ALL], value=ALL, label="Class", visible=False, elem_id="class", filterable=False)
        what = "Prompt (empty: those of --prompts in turn)"
        self.prompt = gr.Textbox(label=what, max_length=MOST_LETTERS, visible=False, elem_id="prompt")
        with gr.Row():
            self.draw = gr.Button("Draw the pictures", variant="primary", elem_id="draw", min_width=200)
            self.live = gr.Checkbox(False, label="Draw whenever the plan changes", elem_id="live", min_width=200)
        self.drawn = gr.HTML(js_on_load=panels.LIVE_JS, elem_id="drawn")
        with gr.Tab("Side by side"):
            self.beside = gr.HTML(js_on_load=None, elem_id="beside")
        with gr.Tab("Swipe"):
            self.swipe = gr.HTML(js_on_load=panels.SWIPE_JS, elem_id="swipe")
        with gr.Tab("Difference"):
            self.apart = gr.HTML(js_on_load=None, elem_id="difference")

    def _film_section(self) -> None:
        gr.Markdown("## From noise to picture")
        self.filmed = gr.Button("Film the plan", elem_id="film")
        self.moment = gr.HTML(panels.told("Nothing is filmed yet."), js_on_load=panels.FILM_JS, elem_id="frame")

    def _save_section(self) -> None:
        gr.Markdown("## Keep it")
        self.name = gr.Textbox(label="Name of the pipeline", max_length=40, value="mine", elem_id="name")
        self.save = gr.Button("Save as a pipeline", elem_id="save")
        self.saved = gr.HTML(js_on_load=panels.LIVE_JS, elem_id="saved")
        self.kept = gr.Dropdown([], label="Saved here", elem_id="kept", filterable=False)
        self.open = gr.Button("Show its plan", elem_id="open")

    def _progress_section(self) -> None:
        gr.Markdown("## The search")
        self.progress = gr.HTML(js_on_load=None, elem_id="progress")
        self.again = gr.Button("Take in what was measured since", elem_id="again")
        self.timer = gr.Timer(3.0)

    def _bind(self, page: gr.Blocks) -> None:
        """Every event. Those of a slider take the last of many positions."""
        last: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
        shown_plan = [self.plan, self.frontier, self.price, self.strip, self.row, self.call, self.words]
        shown_run = [*shown_plan, self.ms, self.about, self.label, self.prompt, self.live, self.kept]
        shown_run += [self.progress, self.again]
        asked = [self.run, self.plan, self.count, self.seed, self.label, self.prompt]
        drawn = [self.drawn, self.beside, self.swipe, self.apart]
        new_plan = [
            self._on(page.load, self.chosen, [self.run], shown_run, "choose"),
            self._on(self.run.input, self.chosen, [self.run], shown_run),
            self._on(self.ms.input, self.moved, [self.run, self.ms], shown_plan, "move", **last),
            self._on(
                self.call.input, self.edited, [self.run, self.plan, self.row, self.call], shown_plan, "edit", **last
            ),
            self._on(self.open.click, self.opened, [self.run, self.kept], shown_plan, "open"),
            self._on(self.again.click, self.taken, [self.run], shown_run, "again"),
            self._on(self.frontier.select, self._taken_dot, [self.run], [*shown_plan, self.ms], **last),
        ]
        for event in (*(one.success for one in new_plan), self.label.input, self.count.release, self.live.input):
            self._on(event, self.pictures_at_once, [self.live, *asked], drawn, trigger_mode="always_last")
        self._on(self.row.input, self.picked, [self.run, self.plan, self.row], [self.strip, self.call], "pick", **last)
        self._on(self.strip.select, self._clicked, [self.run, self.plan], [self.strip, self.call, self.row], **last)
        self._on(self.draw.click, self.pictures, asked, drawn, "draw")
        self._on(self.prompt.submit, self.pictures, asked, drawn)
        self._on(self.filmed.click, self.film, asked, [self.moment], "film")
        self._on(self.save.click, self.kept_as, [self.run, self.plan, self.name], [self.saved, self.kept], "save")
        self._on(self.timer.tick, self.told_progress, [self.run], [self.progress], show_progress="hidden")

    @staticmethod
    def _on(event: Any, handler: Callable, inputs: list, outputs: list, name: str | None = None, **more: Any) -> Any:
        visible = {"api_name": name} if name else {"api_visibility": "private"}
        return event(told_in_the_page(handler), inputs, outputs, concurrency_limit=1, **visible, **more)

    # ------------------------------------------------------------------------------------------------- what events do

    def _shown(self, explored: Exploration, plan: StepPlan, row: int = 0) -> tuple:
        """A plan in all the places that show one."""
        rows = gr.Slider(1, max(2, len(plan.rows)), value=row + 1, step=1)
        call = gr.Radio(list(explored.calls), value=explored.call_at(plan, row))
        seen = panels.frontier(explored, plan), panels.price(explored, plan), panels.strip(plan, row)
        return plan, *seen, rows, call, str(plan)

    def chosen(self, run: str) -> tuple:
        """Another run, or the page anew."""
        explored = self.explored(run)
        first, least, most = self.begin(explored), explored.plans[0].ms, explored.plans[-1].ms
        step = float(f"{max(1e-4, (most - least) / 200):.1g}")
        ms = gr.Slider(_down(least), _up(most), value=float(f"{first.ms:.4g}"), step=step)
        label = gr.Dropdown([ALL, *explored.labels], value=ALL, visible=bool(explored.labels))
        prompt = gr.Textbox(visible=explored.takes_prompts)
        seconds = (ms_of(explored.reference) + first.ms) * GRID / 1e3
        kept = gr.Dropdown(explored.saved(), value=None)
        about = panels.about(explored), label, prompt, gr.Checkbox(value=seconds < AT_ONCE), kept
        again = gr.Button(visible=explored.folder is not None)
        return (*self._shown(explored, first.plan), ms, *about, self.told_progress(run), again)

    def moved(self, run: str, ms: float) -> tuple:
        """The slider."""
        explored = self.explored(run)
        return self._shown(explored, explored.at(ms).plan)

    def _taken_dot(self, run: str, event: gr.EventData) -> tuple:
        """A dot of the frontier."""
        found = self.explored(run).at(_sent(event, "ms"))
        return *self._shown(self.explored(run), found.plan), float(f"{found.ms:.4g}")

    def picked(self, run: str, plan: StepPlan, row: float) -> tuple:
        """A row by its number."""
        explored = self.explored(run)
        at = explored.row_of(plan, row - 1 if isinstance(row, int | float) else row)
        return panels.strip(plan, at), gr.Radio(list(explored.calls), value=explored.call_at(plan, at))

    def _clicked(self, run: str, plan: StepPlan, event: gr.EventData) -> tuple:
        """A row of the strip."""
        at = self.explored(run).row_of(plan, _sent(event, "row"))
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
        what = f"{panels.counted(len(found), 'picture')} of seed {int(seed)}"
        kept = f"in {before:.2f} s" if before > 0.01 else "kept from before"
        told = f"{what}: the plan in {seconds:.2f} s, the reference {kept}."
        of_today, of_plan = explored.reference.sampler.told, f"{plan.sampler.told}, {amount(ms_of(plan))} ms each"
        one = panels.figure(today, f"Reference: {of_today}", f"{what}, drawn by the reference")
        other = panels.figure(found, f"Plan: {of_plan}", f"{what}, drawn by the plan")
        mean = f"mean {apart.mean():.3g}, most {apart.max()} of 255; black where equal"
        third = panels.figure(apart, f"Absolute difference, {mean}", f"{what}: absolute difference, {mean}")
        both, alone = panels.row_of_figures(one, other), panels.row_of_figures(third)
        return panels.told(told), both, panels.swipe(today, found), alone

    def pictures_at_once(self, live: bool, *asked: Any) -> Any:
        """The pictures, where they are wanted whenever the plan changes."""
        return self.pictures(*asked) if live is True else (gr.skip(),) * 4

    def film(self, run: str, plan: StepPlan, count: float, seed: float, label: str, prompt: str) -> str:
        """The plan's way from noise to pictures."""
        return panels.film(self.explored(run).film(plan, self._asked(count, seed, label, prompt)), plan)

    def kept_as(self, run: str, plan: StepPlan, name: str) -> tuple:
        """Save the plan with its networks."""
        explored = self.explored(run)
        folder = explored.save(plan, name)
        return panels.told(f"Saved: {folder}"), gr.Dropdown(explored.saved(), value=name)

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
        found = None if explored.folder is None else progress(explored.folder)
        return panels.progress(found, explored.unknown)


def _sent(event: gr.EventData, name: str) -> Any:
    """What a script of the page said with an event; None where it did not."""
    return event._data.get(name) if isinstance(event._data, dict) else None


def _down(ms: float) -> float:
    """To three digits, no larger."""
    return float(f"{ms * 0.995:.3g}")


def _up(ms: float) -> float:
    """To three digits, no smaller."""
    return float(f"{ms * 1.005:.3g}")


def theme() -> gr.themes.Base:
    """Gradio's plain theme in the system's own letters, none of which are fetched, and in inks that can be read."""
    plain = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    ink: dict[str, Any] = {
        "body_background_fill": "*neutral_100",
        "body_background_fill_dark": "*neutral_950",
        "body_text_color_subdued": "*neutral_600",
        "body_text_color_subdued_dark": "*neutral_300",
        "block_label_text_color": "*neutral_700",
        "block_title_text_color": "*neutral_700",
        "block_border_width": "0px",
        "block_background_fill": "white",
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
        "button_primary_background_fill_dark": "*primary_700",
        "button_primary_text_color": "white",
        "slider_color": "*primary_600",
        "slider_color_dark": "*primary_400",
    }
    return plain.set(**ink)
