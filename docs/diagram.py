"""Draws architecture.svg from the layers that pyproject.toml prescribes: `python docs/diagram.py`.

A test compares the two, so whoever adds a module is told to draw again.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

# Some layers make a band: one of the modules with which it begins, its name, and what it is for.
BANDS = {
    "__main__": ("Commands", "the pgkv program, and testing"),
    "integrations": ("Integrations", "adapters of frameworks"),
    "patterns": ("Patterns", "locks, limits, caches, sessions"),
    "aio": ("Stores", "what users call, sync and async"),
    "_background": ("Background", "renewals, notifications"),
    "_engine": ("Engine", "who performs an operation"),
    "embedded": ("Embedded", "a server of one's own"),
    "_sql": ("Statements", "the store's SQL"),
    "_ops": ("Values", "operations, settings, errors"),
}
# These layers are drawn by what is in them: their own contract says in which order.
OPENED = ("_engine", "patterns")
# In these packages the modules themselves are drawn.
SHOWN = {
    "_async": ("channel", "transaction", "pool", "connection", "coalesce"),
    "_sync": ("channel", "transaction", "pool", "connection"),
}
# The path of store.get().
HOPS = {
    "store": "the method",
    "_sql": "its statement",
    "_sync/channel": "attempts",
    "_sync/connection": "libpq",
}
NUMBERS = {name: number for number, name in enumerate(HOPS, 1)}

WIDTH, LEFT, MARGIN = 900, 240, 22
ROW, BOX, GAP, ARROW = 36, 26, 8, 22
CHARACTER = 7.3  # the width of one in a box
BLUE = "#2f6ca8"


def layers(container: str = "pgkv") -> list[list[str]]:
    """The modules of each layer of a package, from the top down."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    contracts = [each for each in tools["importlinter"]["contracts"] if each["type"] == "layers"]
    (lines,) = [each["layers"] for each in contracts if each["containers"] == [container]]
    return [[name.strip(" ()") for name in line.split(":")] for line in lines]


def opened(name: str) -> list[list[str]]:
    """The layers inside a package, with the modules of some of its own packages."""
    return [
        [
            f"{name}/{module}" if module else name
            for name in names
            for module in SHOWN.get(name, ("",))
        ]
        for names in layers(f"pgkv.{name}")
    ]


def drawing() -> str:
    """The picture."""
    bands: list[tuple[tuple[str, str], list[list[str]]]] = []
    for names in layers():
        bands += [(BANDS[name], []) for name in names if name in BANDS]
        inside = opened(names[0]) if names[0] in OPENED else [names]
        bands[-1][1].extend(inside)
    parts: list[str] = []
    y = 46
    for caption, inside in bands:
        shapes, bottom = boxes(inside, y + 9)
        parts += [band(*caption, y, bottom), *shapes]
        y = bottom + 6
    return "\n".join([*frame(y), *parts, "</svg>\n"])


def frame(y: int) -> list[str]:
    """Paper of its own, so that it can be read on a dark page, the title, and what is below."""
    height = y + 62
    legend = [
        badge(LEFT + 8 + 120 * n, y + 42, n + 1) + text(LEFT + 22 + 120 * n, y + 46, "note", what)
        for n, what in enumerate(HOPS.values())
    ]
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"',
        f' width="{WIDTH}" height="{height}" aria-label="The modules of pgkv in their layers">',
        "<style>text { font: 13px system-ui, 'Segoe UI', sans-serif; fill: #1f2933 }",
        ".name { font-weight: 600; font-size: 14px } .note { font-size: 12px; fill: #52606d }",
        ".module { font: 12px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace }",
        ".number { font-size: 11px; font-weight: 600; fill: #fff }</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#fff"/>',
        text(MARGIN, 30, "name", "pgkv: a module imports what lies below it, or behind an arrow"),
        text(MARGIN, y + 20, "name", "psycopg"),
        text(LEFT, y + 20, "note", "libpq, and a pool of connections; then PostgreSQL"),
        text(MARGIN, y + 46, "note", "the path of store.get(&quot;k&quot;)"),
        *legend,
    ]


def band(name: str, note: str, top: int, bottom: int) -> str:
    """The ground of some layers, with what they are."""
    box = f'x="10" y="{top}" width="{WIDTH - 20}" height="{bottom - top}" rx="7" fill="#f1f4f8"'
    captions = text(MARGIN, top + 19, "name", name) + text(MARGIN, top + 36, "note", note)
    return f"<rect {box}/>{captions}"


def boxes(inside: list[list[str]], y: int) -> tuple[list[str], int]:
    """The layers of one band, from left to right, and where the band ends."""
    parts: list[str] = []
    x = float(LEFT)
    for number, names in enumerate(inside):
        if number:
            parts.append(text(x + 1, y + 17, "note", "→"))
            x += ARROW
        for name in names:
            width = len(name) * CHARACTER + 20
            if x + width > WIDTH - MARGIN:
                x, y = float(LEFT), y + ROW
            parts.append(box(name, x, y, width))
            x += width + GAP
    return parts, y + ROW


def box(name: str, x: float, y: int, width: float) -> str:
    """One module, with its number if it is on the way."""
    fill, line = ("#dcebfa", BLUE) if name in HOPS else ("#fff", "#c3ccd6")
    size = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}" rx="5"'
    label = text(x + width / 2, y + 17, "module", name, anchor="middle")
    mark = badge(x + width, y, NUMBERS[name]) if name in HOPS else ""
    return f'<rect {size} fill="{fill}" stroke="{line}"/>{label}{mark}'


def badge(x: float, y: int, number: int) -> str:
    """A number in a circle."""
    label = text(x, y + 4, "number", str(number), anchor="middle")
    return f'<circle cx="{x:.1f}" cy="{y}" r="8" fill="{BLUE}"/>{label}'


def text(x: float, y: int, style: str, words: str, anchor: str = "start") -> str:
    """Words."""
    return f'<text x="{x:.1f}" y="{y}" class="{style}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
