"""Small matplotlib figures as inline SVG: text stays text, colours follow the page, ids are unique.

Figures are drawn with :class:`matplotlib.figure.Figure` alone, so that no window system, no ``pyplot``
and no style of the caller's takes part. A page colours them: each colour here is a sentinel that becomes
a CSS variable (``var(--ink)``), which a page sets for light and for dark.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graphwright.optimizer.quantities import clean

WIDTH = 4.4  # inches: nine-point text is legible where a phone shows the whole width
SERIES = 7  # colours that a plot may tell apart; what is beyond takes OTHER

INK, SOFT, LINE, PAPER, OTHER = "#010101", "#020202", "#030303", "#040404", "#050505"
COLORS = tuple(f"#1000{index:02x}" for index in range(1, SERIES + 1))
_VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", PAPER: "--paper", OTHER: "--c0"} | {
    color: f"--c{index}" for index, color in enumerate(COLORS, start=1)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "graphwright",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.usetex": False,
    "axes.formatter.useoffset": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
# matplotlib keeps its style in one dictionary for all threads: one report is drawn at a time.
_LOCK = threading.Lock()
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_REFERENCE = re.compile(r"#([\w-]+)")
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
# Releases of matplotlib write a font as one property or as several.
_FONT = re.compile(r"font: (?P<look>(?:[\w-]+ )*)(?P<size>[\d.]+px) [^;]*|font-family: [^;]*(;|$)")


@dataclass(frozen=True)
class Plot:
    """One picture of a page.

    Attributes:
        title: what it shows.
        svg: the ``<svg>`` element.
        legend: ``(CSS class of the color, glyph, name)``. It is no part of the picture: a page writes it
            beside, where it wraps with the page's width.
        caption: how to read it, in a sentence or two.
    """

    title: str
    svg: str
    legend: tuple[tuple[str, str, str], ...]
    caption: str


def css_class(color: str) -> str:
    """The class of a page that has this color: ``c1`` to ``c7``, ``c0`` for what is beyond, or ``ink``."""
    return _VARIABLES[color].removeprefix("--")


@contextmanager
def style() -> Iterator[None]:
    """Draw and save figures inside of this: our style only, and the caller's again afterwards."""
    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        with warnings.catch_warnings():
            # A browser has the letters that matplotlib's own font lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield


def new_figure(height: float = 2.7) -> tuple[Figure, Axes]:
    """An empty figure of ``height`` inches with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one ``<svg>`` element for a page.

    Args:
        figure: drawn under :func:`style`.
        name: a short identifier that starts the ids of this figure.
        description: what a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    root = ElementTree.fromstring(text)
    prefix = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    _simplify(root, prefix)
    size = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": size, "role": "img", "aria-label": clean(description)})
    root.set("style", "stroke-linejoin:round;stroke-linecap:butt")
    title = ElementTree.Element("title")
    title.text = clean(description)
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(root: ElementTree.Element, prefix: str) -> None:
    """Namespaces, metadata, a global style sheet and unused ids go; colours and fonts come from the page."""
    used = {found for node in root.iter() for found in _references(node)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.removeprefix(_SVG)
        node.attrib = {key.removeprefix(_XLINK): value for key, value in node.attrib.items()}
        identifier = node.attrib.pop("id", None)
        if identifier in used:
            node.set("id", prefix + str(identifier))
        for key in ("href", "clip-path"):
            if key in node.attrib:
                node.set(key, node.attrib[key].replace("#", f"#{prefix}"))
        for key in ("style", "fill", "stroke"):
            if key in node.attrib:
                colored = _COLOR.sub(_variable, node.attrib[key])
                node.set(key, _FONT.sub(_font, colored))


def _references(node: ElementTree.Element) -> Iterator[str]:
    for key in (f"{_XLINK}href", "href", "clip-path"):
        if found := _REFERENCE.search(node.get(key, "")):
            yield found[1]


def _variable(match: re.Match[str]) -> str:
    name = _VARIABLES.get(match[0])
    return f"var({name})" if name else match[0]


def _font(match: re.Match[str]) -> str:
    """Size and weight without the family, which is the page's."""
    if match["size"] is None:
        return ""
    return f"font-size: {match['size']}" + ("; font-weight: bold" if "bold" in match["look"] else "")
