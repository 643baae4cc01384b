"""The colours of figures: an entry has one everywhere, darker the more it costs; how shares and prices are written."""

from __future__ import annotations

from collections.abc import Mapping

INK, SOFT, PALE, LINES = "#1f2430", "#5b6472", "#f1f3f6", "#e3e7ee"
ROLES = {"reference": "#440154", "plan": "#e4572e", "best free": "#b0730a"}  # what every figure is about
ACCENTS = ("#2e86ab", "#d99a1c", "#8f5ea2", "#4a9d5b", "#b0624a", "#5f6b7a")

DARK = "#14161c"
"""The ground of a page in the dark."""
_AT_NIGHT = {
    INK: "#e8eaf0",
    SOFT: "#a2aab8",
    PALE: "#1d2029",
    LINES: "#2d323d",
    "#c5cbd5": "#4a5161",
    "#ffffff": DARK,
}


def in_dark(colour: str) -> str:
    """What a colour is on a dark ground: of those of lines, text and grounds the opposite, any other with as much white
    in it as sets it off from the ground as well as text (4.5 to 1)."""
    if colour in _AT_NIGHT:
        return _AT_NIGHT[colour]
    steps = (paler(colour, white / 20) for white in range(20))
    return next((one for one in steps if contrast(one, DARK) >= 4.5), "#ffffff")


def contrast(one: str, other: str) -> float:
    """How far two colours are set off, 1 to 21: WCAG 2.1's ratio of relative luminances."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    from matplotlib.colors import to_rgb

    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def entry_colours(shares: Mapping[str, float]) -> dict[str, str]:
    """One colour per entry by rank of cost, darker is more expensive; a reused pass (`full~2`) has its entry's own,
    paler."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    fresh = sorted((name for name in shares if source_of(name) not in shares), key=lambda name: (-shares[name], name))
    found = {name: to_hex(colormaps["viridis"](0.92 * k / max(1, len(fresh) - 1))) for k, name in enumerate(fresh)}
    return found | {name: paler(found[source_of(name)]) for name in shares if source_of(name) in found}


def source_of(entry: str) -> str:
    """The entry that a reused pass is one of: `full` of `full~2`; "" for a whole call."""
    return entry.rpartition("~")[0]


def paler(colour: str, white: float = 0.45) -> str:
    """A colour mixed with so much white."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (part + (1 - part) * white for part in to_rgb(colour))
    return to_hex((red, green, blue))


def is_dark(colour: str) -> bool:
    """Whether text on it is to be white: by the luma of ITU-R BT.601."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def amount(value: float) -> str:
    """A number to three digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
