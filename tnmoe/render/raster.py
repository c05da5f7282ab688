"""Scenes as PNG and PDF by matplotlib, an extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnmoe.errors import TnmoeError

if TYPE_CHECKING:
    from tnmoe.render.scene import Scene

try:
    from matplotlib import patches, patheffects
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    INSTALLED = True
except ImportError:  # it is an extra
    INSTALLED = False

PIXELS_PER_INCH = 96
PNG_DPI = 2 * PIXELS_PER_INCH


def savefig(scene: Scene, path: Path) -> None:
    """Draw the scene at its size, one scene pixel to 1/96 inch, PNG at twice the resolution.

    Raises:
        TnmoeError: matplotlib is not installed.
    """
    if not INSTALLED:
        raise TnmoeError(f"{path.suffix} files need matplotlib: pip install 'tnmoe[plots]', or save as .svg")
    figure = Figure(figsize=(scene.width / PIXELS_PER_INCH, scene.height / PIXELS_PER_INCH), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.axis("off")
    for order, item in enumerate(scene.items):
        _draw(axes, item, order)
    figure.savefig(path, dpi=PNG_DPI)


def _draw(axes: Any, item: Any, order: int) -> None:
    points = 72 / PIXELS_PER_INCH
    if hasattr(item, "x1"):
        axes.plot(
            [item.x1, item.x2],
            [item.y1, item.y2],
            color=item.color,
            linewidth=item.width * points,
            solid_capstyle="round",
            zorder=order,
        )
    elif hasattr(item, "kind"):
        x, y, r = item.x, item.y, item.radius
        paint = {"facecolor": item.fill, "edgecolor": item.stroke, "linewidth": 1.5 * points, "zorder": order}
        if item.kind == "circle":
            axes.add_patch(patches.Circle((x, y), r, **paint))
        elif item.kind == "square":
            style = "round,pad=0,rounding_size=4"
            axes.add_patch(patches.FancyBboxPatch((x - r, y - r), 2 * r, 2 * r, boxstyle=style, **paint))
        else:
            axes.add_patch(patches.Polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], **paint))
    else:
        axes.text(
            item.x,
            item.y,
            item.text,
            fontsize=item.size * points,
            color=item.color,
            weight="bold" if item.bold else "normal",
            ha={"start": "left", "middle": "center", "end": "right"}[item.anchor],
            va="center",
            zorder=order,
            path_effects=[patheffects.withStroke(linewidth=4 * points, foreground="white")] if item.halo else None,
            parse_math=False,
        )
