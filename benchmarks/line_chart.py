"""Line charts as SVG, for pages: panels side by side, a line and its range for each name. No dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 420, 300, 60, 30, 50, 20


@dataclass(frozen=True)
class Line:
    """Points of one name: x, and the mean, lowest and highest y there."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    x_label: str
    lines: Mapping[str, Line]


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side, with one legend below; a name has one colour in all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    parts = [_panel(panel, colours, i * WIDTH) for i, panel in enumerate(panels)]
    for i, name in enumerate(names):
        x, y = LEFT + i * 130, HEIGHT + 14
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" stroke="{colours[name]}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(name)}</text>')
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT + 30}"'
    style = 'font-family="sans-serif" font-size="12" style="background:white"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _panel(panel: Panel, colours: Mapping[str, str], offset: float) -> str:
    xs = [x for line in panel.lines.values() for x in line.x]
    ys = [y for line in panel.lines.values() for y in (*line.low, *line.high)]
    bottom, right = HEIGHT - BOTTOM, WIDTH - GAP
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def at(x: float, y: float) -> str:
        return f"{across(x):.1f},{up(y):.1f}"

    def across(x: float) -> float:
        return offset + LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - LEFT)

    def up(y: float) -> float:
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - TOP)

    parts = [f'<text x="{offset + LEFT}" y="{TOP - 12}" font-weight="bold">{escape(panel.title)}</text>']
    for y in y_ticks:
        parts.append(f'<path d="M{at(x_ticks[0], y)} L{at(x_ticks[-1], y)}" stroke="#ddd"/>')
        parts.append(f'<text x="{offset + LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    middle = offset + (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{escape(panel.x_label)}</text>')
    for name, line in panel.lines.items():
        edge = [at(x, y) for x, y in zip(line.x, line.high, strict=True)]
        edge += [at(x, y) for x, y in reversed(list(zip(line.x, line.low, strict=True)))]
        parts.append(f'<polygon points="{" ".join(edge)}" fill="{colours[name]}" opacity="0.15"/>')
        points = " ".join(at(x, y) for x, y in zip(line.x, line.mean, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
    return "\n".join(parts)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** len(str(int(span))) if span >= 1 else 10.0 ** -len(str(int(1 / span)))
    step = next(s for s in (power / d for d in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1)) if span / s <= about + 1)
    first, last = int(low // step), -int(-high // step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
