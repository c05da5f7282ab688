"""Draw the rooms of the package from its imports, and count them.

    python docs/rooms.py            draws docs/images/rooms.svg, corrects docs/architecture.md, prints the counts
    python docs/rooms.py FOLDER     prints the counts of another tree

A room is a module or a folder that lies directly in `tnmoe/`; the façade, `tnmoe/__init__.py`, is one as well. An
arrow leads from a room to another one that any of its files imports, wherever in the file that stands. A room's floor
is one above the highest room that it imports.
"""

from __future__ import annotations

import ast
import html
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
PAGE = ROOT / "docs" / "architecture.md"
FACADE = "tnmoe"


@dataclass(frozen=True)
class House:
    """The rooms of a tree.

    Attributes:
        purposes: what each room says that it is for, by its name.
        arrows: the rooms that each room imports.
    """

    purposes: Mapping[str, str]
    arrows: Mapping[str, frozenset[str]]

    @cached_property
    def floors(self) -> dict[str, int]:
        """The floor of each room, 1 the lowest.

        Raises:
            ValueError: if rooms import each other in a circle.
        """
        floors: dict[str, int] = {}
        while len(floors) < len(self.arrows):
            ready = [r for r, below in self.arrows.items() if r not in floors and below <= floors.keys()]
            if not ready:
                raise ValueError(f"rooms in a circle: {', '.join(sorted(self.arrows.keys() - floors.keys()))}")
            floors |= {r: 1 + max((floors[b] for b in self.arrows[r]), default=0) for r in ready}
        return floors

    @cached_property
    def order(self) -> list[str]:
        """Every room, from the top floor down."""
        return sorted(self.arrows, key=lambda r: (-self.floors[r], r))

    def counts(self) -> str:
        """The counts as text."""
        arrows = sum(map(len, self.arrows.values()))
        return f"{len(self.arrows)} rooms on {max(self.floors.values())} floors, {arrows} arrows"


def read(root: Path) -> House:
    """The rooms of the tree in the folder `root`."""
    files = {name: path for folder in ("tnmoe", "planners", "backends") for name, path in _modules(root, folder)}
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        arrows.setdefault(_room(name), set()).update(_room(other) for other in _imports(path, files))
    rooms = {room: frozenset(below - {room}) for room, below in arrows.items()}
    purposes = {room: _purpose(files, room) for room in rooms}
    return House(purposes, rooms)


def _modules(root: Path, folder: str) -> list[tuple[str, Path]]:
    """Names and files of the modules in a folder; two of `tnmoe/` are links to folders beside it, to be read there."""
    prefix = () if folder == "tnmoe" else ("tnmoe",)
    linked = {"planners", "backends"} if folder == "tnmoe" else set()
    modules = []
    for path in sorted((root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not linked & set(parts):
            modules.append((".".join((*prefix, *parts)).removesuffix(".__init__"), path))
    return modules


def _room(module: str) -> str:
    """The room of a module."""
    return module.split(".")[1] if "." in module else FACADE


def _imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules of the tree that a file imports."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= (inner & known.keys()) or {node.module}
    return modules & known.keys()


def _purpose(files: Mapping[str, Path], room: str) -> str:
    """The first line of a room's docstring; the façade's says what the whole package is for."""
    if room == FACADE:
        return "The public names, each imported when it is first asked for."
    said = ast.get_docstring(ast.parse(files[f"tnmoe.{room}"].read_text(encoding="utf-8")))
    return said.splitlines()[0] if said else ""


# ---- the drawing ---------------------------------------------------------------------------------------------

WIDTH, TOP, ROW, CELL = 800, 104, 31, 11.6
NAME, SAID, MATRIX, WRAP = 38, 140, 476, 58
INK, PALE, BAND, DOT = "#222", "#555", "#EEF2F6", "#2E6FA7"


def draw(house: House) -> str:
    """The rooms as rows, from the top floor down, and who imports whom as a table of dots."""
    rows = {room: k for k, room in enumerate(house.order)}
    height = TOP + ROW * len(rows) + 12
    title = f"The rooms of tnmoe: {house.counts()}. A dot: the room of the row imports the room of the column."
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="Helvetica, Arial, sans-serif">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="white"/>',
        *_bands(house, rows),
    ]
    for room, k in rows.items():
        y, x = TOP + ROW * (k + 0.5), MATRIX + CELL * (k + 0.5)
        said = _wrapped(house.purposes[room])
        start = y + 4 - 6.5 * (len(said) - 1)
        lines += [
            f'<path d="M{NAME} {y + ROW / 2:g}H{WIDTH - 6}" stroke="#DDE3E9" stroke-width="0.7"/>',
            f'<text x="{NAME}" y="{y + 4:g}" font-size="13" font-weight="bold" fill="{INK}">{room}</text>',
            *(
                f'<text x="{SAID}" y="{start + 13 * n:g}" font-size="11.5" fill="{INK}">{html.escape(line)}</text>'
                for n, line in enumerate(said)
            ),
            f'<text transform="translate({x + 4:g} {TOP - 6}) rotate(-90)" font-size="11.5" fill="{INK}">{room}</text>',
            f'<rect x="{x - CELL / 2:g}" y="{y - ROW / 2:g}" width="{CELL}" height="{ROW}" fill="#C9D3DD"/>',
            *(
                f'<circle cx="{MATRIX + CELL * (rows[below] + 0.5):g}" cy="{y:g}" r="3.6" fill="{DOT}"/>'
                for below in sorted(house.arrows[room], key=rows.__getitem__)
            ),
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _wrapped(text: str) -> list[str]:
    """A sentence in as few lines as hold it, about equally long."""
    plain = text.replace("`", "")
    return textwrap.wrap(plain, min(WRAP, len(plain) // -(-len(plain) // WRAP) + 7))


def _bands(house: House, rows: Mapping[str, int]) -> list[str]:
    """Every other floor shaded, in both directions, and the number of each."""
    bands, numbers = [], [f'<text x="10" y="{TOP - 8}" font-size="11.5" fill="{PALE}">floor</text>']
    for floor in range(1, max(house.floors.values()) + 1):
        within = [k for room, k in rows.items() if house.floors[room] == floor]
        first, count = min(within), len(within)
        y, x = TOP + ROW * first, MATRIX + CELL * first
        if floor % 2:
            bands += [
                f'<rect x="6" y="{y}" width="{WIDTH - 12}" height="{ROW * count}" fill="{BAND}"/>',
                f'<rect x="{x:g}" y="{TOP}" width="{CELL * count:g}" height="{y - TOP}" fill="{BAND}"/>',
            ]
        middle = y + ROW * count / 2 + 4
        numbers.append(f'<text x="20" y="{middle:g}" font-size="12" text-anchor="middle" fill="{PALE}">{floor}</text>')
    return bands + numbers


def counted(page: str, house: House) -> str:
    """The text of the page with the counts that it states put right."""
    return re.sub(r"\d+ rooms on \d+ floors, \d+ arrows", house.counts(), page)


def main() -> None:
    """Print the counts of a tree; of this one, draw it and correct its page as well."""
    if len(sys.argv) > 1:
        print(read(Path(sys.argv[1])).counts())
        return
    house = read(ROOT)
    PICTURE.write_text(draw(house), encoding="utf-8")
    PAGE.write_text(counted(PAGE.read_text(encoding="utf-8"), house), encoding="utf-8")
    print(house.counts())


if __name__ == "__main__":
    main()
