"""Draws docs/tile_walk.svg: which tiles of a ragged product each SM takes, in which order. `python docs/tile_walk.py`.

tests/test_tile_walk.py compares `walk` with find_tile in csrc/gemm/tiles.cuh.
"""

from pathlib import Path

BAND = 16
PICTURE = Path(__file__).with_suffix(".svg")
EXAMPLE = dict(rows=[330, 0, 2230, 100, 210], N=1024, block_m=128, block_n=256)
SMS = 6
COLOURS = ["#8ecae6", "#ffd166", "#a3d9a5", "#f4a6a6", "#cdb4db", "#e0cba8"]
LEFT, TOP, WIDTH, SCALE = 230, 64, 96, 0.22  # SCALE: units of height for a row


def walk(rows: list[int], N: int, block_m: int, block_n: int) -> list[tuple[int, int, int, int]]:
    """All tiles in their order: group, its tile of rows, its tile of columns, how many of block_m rows are the group's.

    SM i takes each tile whose number is i modulo the number of SMs.
    """
    tiles_n, tiles = -(-N // block_n), []
    for group, own_rows in enumerate(rows):
        tiles_m = -(-own_rows // block_m)
        for own in range(tiles_m * tiles_n):
            band, rest = divmod(own, BAND * tiles_n)
            height = min(tiles_m - band * BAND, BAND)
            m = band * BAND + rest % height
            tiles.append((group, m, rest // height, min(own_rows - m * block_m, block_m)))
    return tiles


def picture() -> str:
    rows, block_m, block_n = EXAMPLE["rows"], EXAMPLE["block_m"], EXAMPLE["block_n"]
    tiles = walk(**EXAMPLE)
    first = [sum(rows[:g]) for g in range(len(rows) + 1)]
    right, bottom = LEFT + WIDTH * EXAMPLE["N"] // block_n, TOP + first[-1] * SCALE
    shapes, centres = [], []

    def text(x, y, words, anchor="middle", more=""):
        shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{words}</text>')

    def line(x0, y0, x1, y1, more):
        shapes.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {more}/>')

    for i, (group, m, n, own) in enumerate(tiles):
        x, y = LEFT + n * WIDTH, TOP + (first[group] + m * block_m) * SCALE
        box = f'x="{x}" y="{y:.1f}" width="{WIDTH}"'
        shapes.append(f'<rect {box} height="{own * SCALE:.1f}" fill="{COLOURS[i % SMS]}" stroke="#fff"/>')
        centres.append((x + WIDTH / 2, y + own * SCALE / 2))
        if own < block_m and n == 0:  # what is loaded and not stored
            over = f'x="{LEFT - 3}" y="{y:.1f}" width="{right - LEFT + 6}" height="{block_m * SCALE:.1f}"'
            loads = f'<rect {over} fill="none" stroke="#333" stroke-dasharray="4 3"/>'
            centres[-1] += (loads, f"loads {block_m} rows, stores {own}", y + own * SCALE / 2 + 4)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in centres)
    shapes.append(f'<polyline points="{path}" fill="none" stroke="#000" stroke-opacity="0.18"/>')
    for i, (x, y, *over) in enumerate(centres):
        text(x, y + 4, i)
        if over:
            shapes.append(over[0])
            text(right + 12, over[2], over[1], "start")

    for g, own in enumerate(rows):
        y0, y1 = TOP + first[g] * SCALE, TOP + first[g + 1] * SCALE
        line(LEFT - 60, y0, right, y0, 'stroke="#000" stroke-width="1.5"')
        if own:
            text(LEFT - 68, (y0 + y1) / 2 + 4, f"expert {g}: {own} rows", "end")
        else:
            text(LEFT - 68, y0 - 4, f"expert {g}: none", "end")
        text(LEFT - 10, y1 - 4, first[g + 1], "end", ' fill="#666"')
        for band in range(BAND * block_m, own, BAND * block_m):
            y = y0 + band * SCALE
            line(LEFT, y, right, y, 'stroke="#000" stroke-dasharray="1 3" stroke-width="2"')
            text(right + 12, y + 4, f"a band of {BAND} tiles ends", "start")
    line(LEFT - 60, bottom, right, bottom, 'stroke="#000" stroke-width="1.5"')
    text(LEFT - 10, TOP - 6, "offsets", "end", ' fill="#666"')
    for n in range(EXAMPLE["N"] // block_n):
        text(LEFT + (n + 0.5) * WIDTH, TOP - 6, f"columns {n * block_n}..", more=' fill="#666"')
    for sm in range(SMS):
        x = LEFT + sm * 64
        shapes.append(f'<rect x="{x}" y="12" width="14" height="14" fill="{COLOURS[sm]}"/>')
        text(x + 19, 24, f"SM {sm}", "start")
    size = f'width="{right + 200}" height="{bottom + 16:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *shapes, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
