"""Plots as inline SVG, drawn by matplotlib.

Matplotlib and not a plotting library of the browser: its SVG needs no script and no network, prints as it is, and a
panel takes a few kilobytes where a script bundle takes one to four megabytes. Its colours are exchanged for the page's
own (`currentColor` and custom properties), so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from onnxsnp.report.extra import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {"qk": "Q–K", "v": "V", "head": "heads", "ffn": "FFN", "residual": "residual", "channel": "channels"}

# stand-ins that the drawing is made with: no colour map, no default has them
_INK, _GRID, _KEPT, _CUT = "#010203", "#010204", "#010205", "#010206"
_OF_KIND = {kind: f"#0103{index:02x}" for index, kind in enumerate(KINDS, 16)}
_VARIABLES = {
    _INK: "currentColor",
    _GRID: "var(--line)",
    _KEPT: "var(--kept)",
    _CUT: "var(--cut)",
    **{colour: f"var(--{kind})" for kind, colour in _OF_KIND.items()},
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and follows the page's colour
    "text.parse_math": False,  # names are data
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.4,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


_PANEL = 2.6, 1.9  # inches: a plot of one group
_NARROW, _WIDE = (0.66, 0.46, 0.1, 0.24), (0.78, 0.5, 0.15, 0.4)  # margins left, below, right and above, inches
_NAMED = 8  # of more runs only those on the front are named in a plot
_LEAST = 1e-4  # errors below this share of the largest are drawn as this


class Plotter:
    """Draws the plots of one page; every one gets ids of its own.

    Raises:
        ReportError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        self._matplotlib = needed("matplotlib")
        needed("matplotlib.figure")
        needed("matplotlib.ticker")
        self._number = count(1)

    def plot(self, width: float, height: float, draw: Callable[[Axes], None]) -> str:
        """One plot as an `<svg>` element.

        Args:
            width, height: inches, of 72 pixels on the screen.
            draw: puts the content on the axes.
        """
        with self._style():
            figure = self._matplotlib.figure.Figure(figsize=(width, height))
            figure.patch.set_visible(False)
            # margins in inches: an automatic layout takes longer than the drawing
            left, below, right, above = _WIDE if width > _PANEL[0] else _NARROW
            sides = left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height
            axes = figure.add_axes(sides)
            axes.patch.set_visible(False)
            axes.set_axisbelow(True)
            draw(axes)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _for_page(buffer.getvalue(), f"p{next(self._number)}-")

    @contextmanager
    def _style(self) -> Iterator[None]:
        with self._matplotlib.rc_context(_STYLE):
            yield

    def curve(self, group: Mapping[str, Any], curve: Mapping[str, Sequence[float]]) -> str:
        """Error by width of one group, and the width that was chosen."""
        top = max([*curve["error"], 0.0]) or 1.0
        widths, errors = curve["width"], [max(error / top, _LEAST) for error in curve["error"]]

        def draw(axes: Axes) -> None:
            colour = _OF_KIND.get(group["kind"], _INK)
            axes.plot(widths, errors, color=colour, linewidth=1.5)
            axes.fill_between(widths, errors, _LEAST, color=colour, alpha=0.12, linewidth=0)
            _logarithmic(axes)
            axes.axvline(group["after"], color=_CUT, linewidth=1.2, linestyle=(0, (3, 2)))
            at = min(range(len(widths)), key=lambda index: abs(widths[index] - group["after"]))
            axes.plot([widths[at]], [errors[at]], "o", color=_CUT, markersize=4)
            axes.set_xlim(0, group["before"])
            axes.set_ylim(_LEAST, 1.6)
            axes.set_title(f"{group['id']}: {group['before']} → {group['after']}", loc="left")
            axes.set_xlabel("width")
            axes.locator_params(axis="x", nbins=4)

        return self.plot(*_PANEL, draw)

    def scores(self, group: Mapping[str, Any], bins: Mapping[str, Any]) -> str:
        """How many neurons of one group have which score, and which of them went."""
        low, high = bins["low"], bins["high"]
        step = (high - low) / len(bins["kept"]) or 1.0
        edges = [low + index * step for index in range(len(bins["kept"]) + 1)]
        both = [kept + cut for kept, cut in zip(bins["kept"], bins["cut"], strict=True)]

        def draw(axes: Axes) -> None:
            axes.stairs(bins["cut"], edges, fill=True, color=_CUT)
            axes.stairs(both, edges, baseline=bins["cut"], fill=True, color=_KEPT)
            axes.set_ylim(0, 1.08 * max(*both, 1))
            axes.yaxis.set_major_locator(self._matplotlib.ticker.MaxNLocator(4, integer=True))
            axes.set_title(f"{group['id']}: {group['before']} → {group['after']}", loc="left")
            axes.set_xlabel("log₁₀ score" if bins["log"] else "score")
            axes.locator_params(axis="x", nbins=4)

        return self.plot(*_PANEL, draw)

    def sensitivity(self, values: Mapping[str, tuple[str, float]]) -> str:
        """What the model loses where one group alone is cut: {group id: (kind, loss)}."""
        names = list(values)
        floor = min((loss for _, loss in values.values() if loss > 0), default=1e-9)

        def draw(axes: Axes) -> None:
            for kind, label in KINDS.items():
                mine = [index for index, name in enumerate(names) if values[name][0] == kind]
                if mine:
                    losses = [max(values[names[index]][1], floor) for index in mine]
                    places = [int(names[index].rpartition(".")[2]) if "." in names[index] else 0 for index in mine]
                    axes.plot(places, losses, "o-", color=_OF_KIND[kind], label=label, markersize=4, linewidth=1)
            _logarithmic(axes)
            axes.set_xlabel("block")
            axes.set_ylabel("loss when cut alone")
            axes.xaxis.set_major_locator(self._matplotlib.ticker.MaxNLocator(integer=True))
            axes.legend(ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0)

        return self.plot(5.2, 3.0, draw)

    def lines(self, curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, mark: float) -> str:
        """A few curves over a common axis, on which one place is marked."""
        colours = [_KEPT, _CUT, *_OF_KIND.values()]

        def draw(axes: Axes) -> None:
            for number, (name, points) in enumerate(curves.items()):
                colour = colours[number % len(colours)]
                axes.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.4)
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=(0, (3, 2)), label="kept")
            axes.set_xlabel(across)
            axes.set_ylabel(up)
            axes.legend()

        return self.plot(5.2, 2.8, draw)

    def tradeoff(self, points: Sequence[Mapping[str, Any]], across: str, up: str) -> str:
        """Runs by cost and quality with the Pareto front.

        Args:
            points: name, x, y, and interval [low, high] of y or None; the original is not marked otherwise.
        """
        best = front([(point["x"], point["y"]) for point in points])
        middle = (min(point["x"] for point in points) + max(point["x"] for point in points)) / 2

        def draw(axes: Axes) -> None:
            ordered = sorted((points[index]["x"], points[index]["y"]) for index in best)
            axes.plot(
                *zip(*ordered, strict=True), color=_KEPT, linewidth=1.2, drawstyle="steps-post", label="Pareto front"
            )
            for index, point in enumerate(points):
                colour = _KEPT if index in best else _CUT
                if point.get("interval"):
                    low, high = point["interval"]
                    below, above = max(point["y"] - low, 0), max(high - point["y"], 0)
                    axes.errorbar(point["x"], point["y"], [[below], [above]], color=colour, linewidth=0.8, capsize=2)
                axes.plot([point["x"]], [point["y"]], "o", color=colour, markersize=5)
                if index not in best and len(points) > _NAMED:
                    continue
                right = point["x"] > middle  # there a name goes to the left, so that it stays on the plot
                axes.annotate(
                    point["name"],
                    (point["x"], point["y"]),
                    (-6 if right else 6, 4),
                    textcoords="offset points",
                    ha="right" if right else "left",
                    fontsize=9,
                )
            axes.set_xlabel(across)
            axes.set_ylabel(up)
            axes.margins(0.18, 0.12)
            axes.legend(loc="lower right")

        return self.plot(5.2, 3.4, draw)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis whose ticks are plain text, since names on the page must not be read as formulas."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, place: "")


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the (cost, quality) points that no other beats: as cheap and better, or as good and cheaper."""
    return {
        index
        for index, (x, y) in enumerate(points)
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    }


def _for_page(svg: str, prefix: str) -> str:
    """Matplotlib's document as an element of a page: no prolog, ids of its own, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(\sid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg)
    svg = svg.replace("xlink:href", "href")
    for stand_in, colour in _VARIABLES.items():
        svg = svg.replace(stand_in, colour)
    # quotes of a style attribute are double, so fonts come with single ones
    svg = re.sub(r"(font:[^;\"]*?)'DejaVu Sans'[^;\"]*", lambda found: found[1] + _FONTS, svg)
    width = re.findall(r'\swidth="([\d.]+)pt"', svg)[0]
    svg = re.sub(r'\swidth="[\d.]+pt"|\sheight="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" style="max-width:{float(width) * 1.5:.0f}px"', 1).strip()
