"""Curves of a run: thinned, smoothed, laid out for the report's page, and drawn as a picture.

The page's template draws what `chart` returns; `draw_png` needs matplotlib and imports
it only then. The same points give the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..host.scratch import TEMPORARY, scratch_folder
from ..run.history import stretches

MOST_POINTS = 1500
MOST_TIPS = 60
BLUE, ORANGE, GREY, PALE = "#2563eb", "#d9730d", "#98a1b0", "#e6e8ec"
Vertex = tuple[float, float]


def chart(
    title: str,
    raw: list[Vertex],
    smooth: list[Vertex],
    dots: list[Vertex],
    resumed_steps: list[int],
) -> dict[str, Any]:
    """Return a chart's geometry: lines in thousandths, all else in shares of the plot.

    `resumed_steps` are steps at which the run was resumed. There is a point in `raw` or `dots`.
    """
    raw, smooth = thinned(raw), thinned(smooth)
    axes = _Axes([*raw, *dots])
    main = smooth or raw or dots
    tips = main[:: math.ceil(len(main) / MOST_TIPS)]
    centres = [axes.scaled(point) for point in tips]
    edges = [0.0, *((a[0] + b[0]) / 2 for a, b in pairwise(centres)), 1.0]
    return axes.ticks() | {
        "title": title,
        "raw": axes.line(raw),
        "smooth": axes.line(smooth),
        "dots_line": axes.line(dots),
        "dots": [(*axes.scaled(dot), f"step {dot[0]:,.0f}: {short(dot[1])}") for dot in dots],
        "marks": [
            axes.x(step) for step in sorted(set(resumed_steps)) if axes.left <= step <= axes.right
        ],
        "tips": [
            (round(start, 4), round(end - start, 4), *centre, f"{x:,.0f}", short(y))
            for (x, y), centre, start, end in zip(tips, centres, edges, edges[1:], strict=False)
        ],
        "summary": f"{title}: {len(main)} points from {short(axes.low)} to {short(axes.high)}",
    }


def overlay(title: str, curves: Mapping[str, list[Vertex]]) -> dict[str, Any]:
    """Return the geometry of one figure of several runs, on common axes; one has a point."""
    thin = {name: thinned(points) for name, points in curves.items()}
    axes = _Axes([point for points in thin.values() for point in points])
    return axes.ticks() | {
        "title": title,
        "curves": [
            (name, axes.line(points), [axes.scaled(point) for point in points[-1:]])
            for name, points in thin.items()
        ],
        "summary": f"{title}: "
        + "; ".join(
            f"{name} from {short(points[0][1])} to {short(points[-1][1])}"
            for name, points in thin.items()
            if points
        ),
    }


class _Axes:
    """Round axes around some points, and where on them a point is, in shares of the plot."""

    def __init__(self, points: Sequence[Vertex]) -> None:
        xs, ys = zip(*points, strict=True)
        self.left, self.right, self.low, self.high = min(xs), max(xs), min(ys), max(ys)
        self._x_ticks = _ticks(self.left, self.right, is_whole=True)
        self._y_ticks = _ticks(_floor(ys), self.high)
        self._width = max(self.right - self.left, 1)
        self._bottom = self._y_ticks[0]
        self._height = self._y_ticks[-1] - self._y_ticks[0]

    def x(self, step: float) -> float:
        """Return the share from the left."""
        return round((step - self.left) / self._width, 4)

    def y(self, value: float) -> float:
        """Return the share from the top."""
        return round(1 - (value - self._bottom) / self._height, 4)

    def scaled(self, point: Vertex) -> Vertex:
        """Return the shares from the left and from the top."""
        return self.x(point[0]), self.y(point[1])

    def line(self, points: Sequence[Vertex]) -> str:
        """Return the points of an SVG line in a box of 1000 x 1000."""
        return " ".join(f"{1000 * x:.1f},{1000 * y:.1f}" for x, y in map(self.scaled, points))

    def ticks(self) -> dict[str, Any]:
        """Return where the labels of both axes are, and their texts."""
        return {
            "x_ticks": [(self.x(x), f"{x:,.0f}") for x in self._x_ticks],
            "y_ticks": [(self.y(y), _label(y, self._y_ticks)) for y in self._y_ticks],
        }


def thinned(points: Sequence[Vertex], most: int = MOST_POINTS) -> list[Vertex]:
    """Return at most `most` points; the lowest and the highest of each stretch stay."""
    if len(points) <= most:
        return list(points)
    kept: list[Vertex] = []
    for stretch in stretches(points, most // 2):
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def smoothed(points: Sequence[Vertex]) -> list[Vertex]:
    """Return the mean over about a thirtieth of the points around each, which adds no lag."""
    sums = [0.0, *accumulate(y for _, y in points)]
    reach, last = len(points) // 60, len(points) - 1
    smooth = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, last - index)
        total = sums[index + near + 1] - sums[index - near]
        smooth.append((x, total / (2 * near + 1)))
    return smooth


def _floor(values: Sequence[float]) -> float:
    """Return where an axis starts: at zero, unless that would flatten the curve."""
    low, high = min(values), max(values)
    return 0.0 if 0 <= low < 0.6 * high or low == high > 0 else low


def _ticks(low: float, high: float, *, is_whole: bool = False) -> list[float]:
    """Return three to seven round numbers that cover a range (for steps: lie within)."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / 4))
    size *= next(factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 6)
    if is_whole:
        size = max(1.0, size)
        first, last = math.ceil(low / size), math.floor(high / size)
    else:
        first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
        last = max(last, first + 1)
    return [round(number * size, 12) for number in range(first, last + 1)]


def _label(tick: float, ticks: Sequence[float]) -> str:
    """Return a tick in the notation that suits all of its axis."""
    is_small = max(map(abs, ticks)) < 0.01
    if not is_small or not tick:
        return short(tick)
    mantissa, exponent = f"{tick:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def short(value: float, digits: int = 3) -> str:
    """Return a number in about three digits: 1,234 or 0.125 or 2e-4."""
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if size >= 1000:
        return f"{value:,.0f}"
    if not size or size >= 0.001:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def draw_png(
    title: str,
    *,
    loss: list[Vertex],
    held_out: list[Vertex],
    rate: list[Vertex],
    resumed_steps: list[int],
) -> bytes:
    """Return the picture of loss, above, and learning rate, below."""
    with _matplotlib_folder():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), dpi=144, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        _draw_line(upper, thinned(loss), color=BLUE, alpha=0.3, lw=1, label="training")
        _draw_line(upper, thinned(smoothed(loss)), color=BLUE, lw=2, label="training, smoothed")
        if held_out:
            style = {"marker": "o", "ms": 5, "lw": 1.2, "label": "evaluation"}
            _draw_line(upper, held_out, color=ORANGE, **style)
        _draw_line(lower, thinned(rate), color=BLUE, lw=1.5)
        for axes, label in ((upper, "loss"), (lower, "learning rate")):
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.grid(color=PALE, lw=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(GREY)
            for step in resumed_steps:
                axes.axvline(step, color=GREY, lw=1.2, ls=":")
        lower.set_xlabel("step" + (" (dotted: resumed)" if resumed_steps else ""))
        lower.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        upper.legend(frameon=False)
        upper.set_title(title, loc="left", fontweight="bold", parse_math=False)
        image = BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
        return image.getvalue()


def _draw_line(axes: Any, points: Sequence[Vertex], **style: Any) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


@contextlib.contextmanager
def _matplotlib_folder() -> Iterator[None]:
    """Give matplotlib a folder for its font list where the home folder takes none."""
    is_writable = False
    with contextlib.suppress(RuntimeError):  # a user without a home
        is_writable = os.access(Path.home(), os.W_OK)
    if is_writable or "MPLCONFIGDIR" in os.environ:
        yield
        return
    parent = Path(tempfile.gettempdir())
    with scratch_folder(parent, f"{TEMPORARY}matplotlib-") as folder:
        os.environ["MPLCONFIGDIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]
