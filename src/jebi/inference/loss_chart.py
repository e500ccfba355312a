"""Draw a training-loss curve as inline SVG for the report page; colours and type come from the page's CSS.

The plot has no view box: positions are percentages of the plot area, so that the drawing stretches with the
page while its text, dots and strokes keep their size on a phone. Only the smoothed line, which SVG cannot
place by percentages, sits in a nested view box that may be stretched.
"""

import math

MOST_DOTS = 300  # more raw points than this are thinned for drawing, not for smoothing
WIDEST = 25  # neighbours on each side that a smoothed point is averaged with, at most
_HEIGHT = 240  # of the plot area, in CSS pixels

Point = tuple[float, float]


def loss_chart(curve: list[tuple[int, float]]) -> str:
    """Return the SVG of (step, loss) points, or a sentence when there is none to draw."""
    points = sorted((float(step), loss) for step, loss in curve if math.isfinite(loss))
    if not points:
        return '<p class="note">No training loss was recorded for this adapter.</p>'
    x_ticks = _ticks(points[0][0], points[-1][0], 5)
    y_ticks = _ticks(min(loss for _, loss in points), max(loss for _, loss in points), 4)
    x_low, x_high = x_ticks[0], points[-1][0] if len(points) > 1 else x_ticks[-1]
    raw = [_place(point, (x_low, x_high), (y_ticks[0], y_ticks[-1])) for point in points]
    line = _smoothed(raw, _radius(len(raw)))
    return (
        f'<svg class="plot" width="100%" height="{_HEIGHT}" role="img" aria-label="{_summary(points)}">'
        + "".join(_y_tick(tick, y_ticks) for tick in y_ticks)
        + "".join(_x_tick(tick, x_low, x_high) for tick in x_ticks if tick <= x_high)
        + '<text class="axis" x="100%" y="100%" dy="40" text-anchor="end">training step</text>'
        + "".join(f'<circle cx="{x:.2f}%" cy="{y:.2f}%" r="2.5"/>' for x, y in _thinned(raw))
        + '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%">'
        + f'<path d="M{" L".join(f"{x:.2f} {y:.2f}" for x, y in line)}"/></svg></svg>'
    )


def smoothing(count: int) -> str:
    """Say in words how a curve of so many points is smoothed."""
    radius = _radius(count)
    return f"mean of {2 * radius + 1} points" if radius else "joined"


def _radius(count: int) -> int:
    """Return how many neighbours on each side a point is averaged with; short curves are left alone."""
    return min(count // 16, WIDEST)


def _smoothed(points: list[Point], radius: int) -> list[Point]:
    """Average each point's height with its neighbours, as many of them as there are at both ends."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth = []
    for index, (x, _) in enumerate(points):
        first, last = max(index - radius, 0), min(index + radius + 1, len(points))
        smooth.append((x, (sums[last] - sums[first]) / (last - first)))
    return smooth


def _thinned(points: list[Point]) -> list[Point]:
    """Keep every n-th point, so that a long run does not make a heavy page."""
    return points[:: math.ceil(len(points) / MOST_DOTS)]


def _place(point: Point, x_range: Point, y_range: Point) -> Point:
    """Return the point as percentages of the plot area, measured from its upper left corner."""
    x = 100 * (point[0] - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
    return x, 100 - 100 * (point[1] - y_range[0]) / (y_range[1] - y_range[0])


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return about so many round numbers that enclose the range; a single value lies in the middle."""
    if low == high:
        low, high = min(0.0, 2 * low), max(0.0, 2 * high) or 1.0
    span = high - low
    magnitude = 10 ** math.floor(math.log10(span / wanted))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= span / wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def _y_tick(tick: float, ticks: list[float]) -> str:
    """Return a grid line with its loss beside it."""
    y = 100 - 100 * (tick - ticks[0]) / (ticks[-1] - ticks[0])
    return (
        f'<line x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
        f'<text x="0" y="{y:.2f}%" dx="-10" dy="0.32em" text-anchor="end">{tick:.4g}</text>'
    )


def _x_tick(tick: float, low: float, high: float) -> str:
    """Return a step number under the plot, with a short mark above it."""
    x = 100 * (tick - low) / ((high - low) or 1)
    return (
        f'<text x="{x:.2f}%" y="100%" dy="20" text-anchor="middle">{tick:,.10g}</text>'
        f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="100%" y2="98%"/>'
    )


def _summary(points: list[Point]) -> str:
    """Describe the curve for a reader who does not see it."""
    (first, start), (last, end) = points[0], points[-1]
    return f"Training loss from {start:.3g} at step {first:.0f} to {end:.3g} at step {last:.0f}"
