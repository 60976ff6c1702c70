"""Simple figures as SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from inward_trainer.paper.table import Chart

WIDTH, HEIGHT = 600, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 170, 34, 40
COLOURS = ("#1b6ca8", "#c8553d", "#5b8e3e", "#8a5fbf", "#7a7a7a")
Point = tuple[float, float]


def draw(chart: Chart) -> str:
    """Lines or points with axes and names; nothing where there is no point."""
    points = [tuple(point) for series in chart.series.values() for point in series]
    if not points:
        return ""
    xs, ys = [float(p[0]) for p in points], [float(p[1]) for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + 1

    def at(point: Sequence[float]) -> Point:
        return (
            LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    marks = []
    for number, (name, series) in enumerate(chart.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(point) for point in series]
        if chart.kind == "line":
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        radius = 2 if chart.kind == "line" else 2.5
        marks += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.7"/>' for x, y in places
        ]
        y = TOP + 14 * number + 8
        marks.append(f'<rect x="{WIDTH - RIGHT + 10}" y="{y - 8}" width="9" height="9" fill="{colour}"/>')
        marks.append(_text(WIDTH - RIGHT + 24, y, name))
    axes = (
        f'<path d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="#888"/>'
        + _text(LEFT - 6, HEIGHT - BOTTOM, f"{y0:.3g}", "end")
        + _text(LEFT - 6, TOP + 8, f"{y1:.3g}", "end")
        + _text(LEFT, HEIGHT - BOTTOM + 14, f"{x0:g}")
        + _text(WIDTH - RIGHT, HEIGHT - BOTTOM + 14, f"{x1:g}", "end")
        + _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x, "middle")
        + _text(LEFT, TOP - 20, chart.title, size=12)
        + _text(LEFT, TOP - 6, chart.y)
    )
    title = escape(chart.title, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{title}" font-family="sans-serif">{axes}{"".join(marks)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 10) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="#444">{escape(words)}</text>'
