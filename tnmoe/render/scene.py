"""A picture as a list of lines, shapes and texts; its SVG form, and what a library makes of that: PNG and PDF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

from tnmoe.errors import TnmoeError

FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK = "#222222"
SCALES = {".svg": 1.0, ".png": 2.0, ".pdf": 72 / 96}
"""Of each kind of file, the units for one pixel of a picture (1/96 inch): pixels, half pixels, points (1/72 inch)."""

ShapeKind = Literal["circle", "square", "diamond"]


@dataclass(frozen=True, slots=True)
class Line:
    """A straight stroke between two points."""

    x1: float
    y1: float
    x2: float
    y2: float
    width: float = 1.6
    color: str = INK


@dataclass(frozen=True, slots=True)
class Shape:
    """A circle, square or diamond of half-width `radius` around a point."""

    kind: ShapeKind
    x: float
    y: float
    radius: float
    fill: str
    stroke: str = INK


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text whose middle height is at y; `anchor` says which end of it is at x. It has a white halo."""

    x: float
    y: float
    text: str
    size: float = 13.0
    anchor: Literal["start", "middle", "end"] = "middle"
    color: str = INK
    bold: bool = False
    halo: bool = True

    @property
    def width(self) -> float:
        """An upper estimate in pixels: sans-serif fonts differ, and labels must clear each other in all."""
        return len(self.text) * self.size * (0.64 if self.bold else 0.60)


Item = Line | Shape | Text


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture of `width` × `height` pixels; later items lie above earlier ones.

    It shows itself in a notebook; `save` writes it as a file.
    """

    width: float
    height: float
    items: tuple[Item, ...]
    title: str = ""

    def svg(self) -> str:
        """The picture as one SVG element, legible on white and on dark pages, scaling with the page."""
        return self._svg(1.0)

    def _svg(self, scale: float) -> str:
        """The SVG element, shown at so many times its size."""
        w, h = f"{self.width:.0f}", f"{self.height:.0f}"
        shown = f'width="{scale * round(self.width):g}" height="{scale * round(self.height):g}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" {shown} role="img" '
            f'style="max-width:100%;height:auto" font-family="{FONT}">'
        )
        body = [f"<title>{escape(self.title)}</title>"] if self.title else []
        body.append(f'<rect width="{w}" height="{h}" fill="white"/>')
        return "\n".join([head, *body, *(_element(item) for item in self.items), "</svg>"])

    def _repr_svg_(self) -> str:
        return self.svg()

    def save(self, path: str | Path) -> Path:
        """Write the picture as `.svg`, or, with vl-convert (the extra `images`), as `.png` or `.pdf`.

        Without any font on the machine, vl-convert takes the one that it brings (Liberation Sans, Greek included).

        Raises:
            TnmoeError: another ending, or vl-convert is missing.
        """
        path = Path(path)
        if path.suffix not in SCALES:
            raise TnmoeError(f"cannot write a picture as {path.name!r}; the name must end in .svg, .png or .pdf")
        path.write_bytes(_file(self._svg(SCALES[path.suffix]), path.suffix))
        return path


def _file(svg: str, ending: str) -> bytes:
    """The bytes of a picture's file."""
    if ending == ".svg":
        return f"{svg}\n".encode()
    try:
        import vl_convert  # an extra, which takes tens of megabytes
    except ImportError:
        raise TnmoeError(
            f"{ending} files need vl-convert: pip install 'tnmoe[images]', or save the picture as .svg"
        ) from None
    return vl_convert.svg_to_png(svg) if ending == ".png" else vl_convert.svg_to_pdf(svg)


def _element(item: Item) -> str:
    if isinstance(item, Line):
        return (
            f'<line x1="{item.x1:.1f}" y1="{item.y1:.1f}" x2="{item.x2:.1f}" y2="{item.y2:.1f}" '
            f'stroke="{item.color}" stroke-width="{item.width:g}" stroke-linecap="round"/>'
        )
    if isinstance(item, Shape):
        paint = f'fill="{item.fill}" stroke="{item.stroke}" stroke-width="1.5"'
        x, y, r = item.x, item.y, item.radius
        if item.kind == "circle":
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" {paint}/>'
        if item.kind == "square":
            return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}" rx="4" {paint}/>'
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in ((x, y - r), (x + r, y), (x, y + r), (x - r, y)))
        return f'<polygon points="{points}" {paint}/>'
    weight = ' font-weight="bold"' if item.bold else ""
    halo = ' stroke="white" stroke-width="4" stroke-linejoin="round" paint-order="stroke"' if item.halo else ""
    return (
        f'<text x="{item.x:.1f}" y="{item.y + 0.35 * item.size:.1f}" font-size="{item.size:g}" '
        f'text-anchor="{item.anchor}" fill="{item.color}"{weight}{halo}>{escape(item.text)}</text>'
    )
