"""Small SVG drawings for report.html: line charts and a heatmap, coloured by the page's CSS classes.

Nothing here needs a script to be read; page.js adds the values under the pointer, from `data-chart`.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 250  # of a chart, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 34  # margins
SETTLING, SHORT = 0.05, 200  # of the steps; a run of fewer steps is shown whole
MARGIN = 4  # around the drawing area, so that dots on its edge are whole
POINTS = 360  # drawn of a series at most: more cannot be told apart
LEVELS = 9  # colours of a heatmap; the middle one is 1


class Series(NamedTuple):
    """A line of a chart. style: a CSS class, s1 to s5, and `faint` or `dots` after it."""

    name: str
    style: str
    steps: Sequence[float]
    values: Sequence[float | None]  # None: nothing to draw


def line_chart(title: str, unit: str, series: list[Series], from_zero: bool = False, settled: bool = False) -> str:
    """A figure with the lines over the steps. Faint ones are cut off where they leave the range of the others, so that
    one spike does not flatten the rest; settled: so are the first SETTLING of the steps, where a loss is high. Of less
    than SHORT steps nothing is cut off."""
    series = [s._replace(steps=xs, values=ys) for s in series for xs, ys in [clean(s.steps, s.values)] if xs]
    if not series:
        return ""
    ruling = [s for s in series if "faint" not in s.style] or series
    x0, x1 = min(s.steps[0] for s in series), max(s.steps[-1] for s in series)
    short_run = x1 - x0 < SHORT
    begin = x0 + SETTLING * (x1 - x0) if settled and not short_run else x0
    x1 = x1 if x1 > x0 else x0 + 1
    within = series if short_run else ruling
    ranged = [y for s in within for x, y in zip(s.steps, s.values, strict=True) if x >= begin] or [*ruling[0].values]
    ticks = nice_ticks(0.0 if from_zero else min(ranged), max(ranged))
    y0, y1 = ticks[0], ticks[-1]

    def at(x: float, y: float) -> str:
        right, down = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), (y1 - y) / (y1 - y0)
        return f"{right:.1f},{TOP + min(max(down, -2), 3) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>']
    for tick in ticks:
        y = at(x0, tick).split(",")[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{float(y) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in nice_ticks(x0, x1):
        if x0 <= tick <= x1 and tick == int(tick):
            x = at(tick, y0).split(",")[0]
            parts.append(f'<text x="{x}" y="{HEIGHT - 18}" text-anchor="middle">{short(tick)}</text>')
    box = (f"{LEFT - MARGIN} {TOP - MARGIN} {WIDTH - LEFT - RIGHT + 2 * MARGIN}"
           f" {HEIGHT - TOP - BOTTOM + 2 * MARGIN}")  # fmt: skip
    x, y, width, height = box.split()
    lines, shown = [], []
    for s in series:
        steps, values = thin(s.steps, s.values, extremes="faint" in s.style)
        points = [at(x, y) for x, y in zip(steps, values, strict=True)]
        lines.append(f'<polyline class="line {s.style}" points="{" ".join(points)}"/>')
        if "dots" in s.style or len(points) == 1:
            lines += [f'<circle class="dot {s.style}" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3"/>'
                      for p in points]  # fmt: skip
        if "faint" not in s.style:
            shown.append(dict(name=s.name, style=s.style, x=steps, y=[float(f"{v:.5g}") for v in values]))
    inner = f'<svg class="inside" x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{box}">'
    parts.append(f"{inner}{''.join(lines)}</svg>")
    chart = dict(x0=x0, x1=x1, left=LEFT, right=WIDTH - RIGHT, series=shown)
    keys = "".join(f'<span class="key {s.style.split()[0]}">{escape(s.name)}</span>' for s in ruling)
    label = f"{title}, {unit}" if unit else title
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span>"
        f'<span class="keys">{keys if len(ruling) > 1 else ""}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"'
        f' data-chart="{escape(json.dumps(chart))}">{"".join(parts)}</svg></figure>'
    )


def heatmap(rows: list[str], values: Sequence[Sequence[float]], notes: list[str]) -> str:
    """Rows of cells, each a value over its row's mean, from 0 over 1 to 2 and more; notes stand behind the rows."""
    width, height, left, right = 900, 18, 84, 190
    columns = len(values[0])
    cell = (width - left - right) / columns
    cells: list[list[str]] = [[] for _ in range(LEVELS)]
    parts = []
    for i, (name, row, note) in enumerate(zip(rows, values, notes, strict=True)):
        y = i * height
        for j, value in enumerate(row):
            level = min(round(value / 2 * (LEVELS - 1)), LEVELS - 1)
            cells[level].append(f"M{left + j * cell:.2f} {y}h{cell * 0.94:.2f}v{height - 2}h-{cell * 0.94:.2f}z")
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<text x="{width - right + 8}" y="{y + 12}">{escape(note)}</text>')
    parts += [f'<path class="h{level}" d="{"".join(paths)}"/>' for level, paths in enumerate(cells) if paths]
    total = len(rows) * height
    return f'<svg viewBox="0 0 {width} {total}" role="img" aria-label="tokens of each expert">{"".join(parts)}</svg>'


def clean(steps: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    pairs = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None and math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def thin(steps: Sequence[float], values: Sequence[float], extremes: bool) -> tuple[list[float], list[float]]:
    """At most POINTS points, evenly spaced; extremes: the lowest and the highest between two of them, in order."""
    n = len(steps)
    if n <= POINTS:
        return [*steps], [*values]
    if not extremes:
        chosen = [i * (n - 1) // (POINTS - 1) for i in range(POINTS)]
    else:
        edges = [i * n // (POINTS // 2) for i in range(POINTS // 2 + 1)]
        pairs = [(min(r, key=values.__getitem__), max(r, key=values.__getitem__))
                 for r in (range(a, b) for a, b in zip(edges, edges[1:], strict=False))]  # fmt: skip
        chosen = sorted({i for pair in pairs for i in pair})
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def nice_ticks(low: float, high: float, number: int = 5) -> list[float]:
    """About `number` round values from at most `low` to at least `high`, in steps of 1, 2 or 5 times a power of 10."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        low, high = (low - margin if low else 0.0), low + margin
    rough = (high - low) / (number - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    factors = [1, 2, 5, 10]
    step = power * factors[min(bisect_left(factors, rough / power * (1 - 1e-9)), 3)]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 12 - math.floor(math.log10(step))
    return [round(i * step, digits) if step < 1 else i * step for i in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number in few characters: 0.0003 -> 3e-4, 1250 -> 1,250, 3000000 -> 3M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.5g}" if abs(value) < 1000 else f"{value:,.0f}"
