"""Films of a page: a strip of moments that prints, and a clock to move all films by, in milliseconds of an image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape

import numpy as np

from halfstep.report.markup import data_of, image_tag, scrolling, tiles
from halfstep.report.palette import amount

MOMENTS = 7
"""Of a strip, the noise with them."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """One plan's film. `frames`: uint8 [T, N, C, H, W]; by frame the milliseconds of an image that have gone by, and
    what ran."""

    name: str
    frames: np.ndarray
    ms: tuple[float, ...]
    told: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reel:
    """Films of the same noises side by side; `pictured`: what each picture is of, "" where nothing was asked for."""

    title: str
    tracks: tuple[Track, ...]
    pictured: tuple[str, ...] = ()
    note: str = ""


def reel(one: Reel) -> str:
    """The films of a page: what a script moves is hidden where none runs, and the strip is seen everywhere."""
    screens = "".join(map(_screen, one.tracks))
    clock = (
        '<div class="clock"><label for="clock">Time of an image</label>'
        '<input type="range" id="clock" min="0" value="0" step="1"><output for="clock"></output>'
        '<button type="button">Play</button></div>'
    )
    asked = ", ".join(filter(None, one.pictured))
    told = f'<p class="note">{escape(asked)}</p>' * bool(asked)
    moving = f'<div class="moving" hidden>{clock}<div class="screens">{screens}</div></div>'
    return f"{moving}{_strip(one)}{told}<script>{SCRIPT}</script>"


def _screen(track: Track) -> str:
    """All frames below one another, of which a window shows one."""
    count, pictures, _, height, width = track.frames.shape
    sheet = tiles(track.frames.reshape(-1, *track.frames.shape[2:]), pictures)
    source, (wide, tall) = data_of(sheet, max(height, width)), sheet.size
    at, told = (escape(json.dumps(values)) for values in ([round(ms, 4) for ms in track.ms], track.told))
    hard = ' class="hard"' * (max(height, width) <= 64)
    return (
        f'<figure><figcaption><b>{escape(track.name)}</b> <span class="now"></span></figcaption>'
        f'<div class="screen" data-at="{at}" data-told="{told}" style="aspect-ratio:{wide}/{tall // count}">'
        f'<img{hard} src="{source}" width="{wide}" height="{tall}" '
        f'alt="{pictures} pictures by {escape(track.name)} at the time of the clock"></div></figure>'
    )


def _strip(one: Reel) -> str:
    rows = []
    for track in one.tracks:
        count = len(track.frames)
        shown = sorted({round(k * (count - 1) / (MOMENTS - 1)) for k in range(MOMENTS)})
        cells = "".join(_moment(track, k) for k in shown)
        cells += "<td></td>" * (MOMENTS - len(shown))
        rows.append(f'<tr><th scope="row" colspan="{MOMENTS}">{escape(track.name)}</th></tr><tr>{cells}</tr>')
    caption = '<caption class="unseen">Moments from noise to picture, left to right</caption>'
    table = f'<table class="film">{caption}<tbody>{"".join(rows)}</tbody></table>'
    return scrolling(table, "Filmstrips")


def _moment(track: Track, k: int) -> str:
    frames = track.frames[k]
    side = max(frames.shape[2:])
    alt = f"{len(frames)} pictures, {track.name}: {track.told[k]}"
    image = image_tag(tiles(frames, columns=2 if len(frames) > 1 else 1), alt, side=side)
    time = f"{amount(track.ms[k])} ms" if k else ""
    return f"<td>{image}<span>{escape(track.told[k])}</span><span>{time}</span></td>"


SCRIPT = """
for (const box of document.querySelectorAll('.moving')) {
  const [input, out, button] = ['input', 'output', 'button'].map(name => box.querySelector(name));
  const films = [...box.querySelectorAll('.screen')].map(one => ({
    image: one.querySelector('img'), now: one.parentNode.querySelector('.now'),
    at: JSON.parse(one.dataset.at), told: JSON.parse(one.dataset.told)}));
  const times = [...new Set(films.flatMap(film => film.at))].sort((a, b) => a - b);
  const show = () => {
    const time = times[input.value];
    for (const {image, now, at, told} of films) {
      const frame = at.filter(one => one <= time).length - 1;
      image.style.transform = `translateY(${-100 * frame / at.length}%)`;
      now.textContent = told[frame];
    }
    out.textContent = `${Number(time.toPrecision(3))} ms`;
    input.setAttribute('aria-valuetext', out.textContent);
  };
  let begun = null;
  const stop = () => { begun = null; button.textContent = 'Play'; };
  const play = now => {
    if (begun === null) return;
    const time = (now - begun) / 6000 * times[times.length - 1];
    input.value = times.filter(one => one <= time).length - 1;
    show();
    if (time < times[times.length - 1]) requestAnimationFrame(play); else stop();
  };
  button.onclick = () => {
    if (begun !== null) return stop();
    begun = performance.now();
    button.textContent = 'Stop';
    requestAnimationFrame(play);
  };
  input.oninput = () => { stop(); show(); };
  input.max = times.length - 1;
  box.hidden = false;
  show();
}
"""
