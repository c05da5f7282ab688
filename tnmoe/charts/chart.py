"""A figure together with the table of what it shows."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from tnmoe.errors import TnmoeError
from tnmoe.render.table import Table, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

try:
    import matplotlib as mpl
    from matplotlib import figure as mpl_figure
    from matplotlib.backends import backend_agg
    from matplotlib.ticker import FuncFormatter

    INSTALLED = True
except ImportError:  # it is an extra
    INSTALLED = False

# Okabe and Ito's colours, told apart by the colour-blind; markers and dashes tell them apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++", "oo")

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tnmoe",  # the same figure, the same file
}

Given = ParamSpec("Given")

ENDINGS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure that shows itself in a notebook.

    Attributes:
        figure: matplotlib's figure, to be changed at will.
        data: the numbers shown, one row for each point or bar.
    """

    figure: Figure
    data: Table

    @property
    def axes(self) -> Axes:
        """The first axes of the figure."""
        return self.figure.axes[0]

    def save(self, path: str | Path) -> Path:
        """Write the figure as .svg, .png or .pdf.

        Raises:
            TnmoeError: another ending.
        """
        path = Path(path)
        if path.suffix not in ENDINGS:
            raise TnmoeError(f"cannot write a figure as {path.name!r}; the name must end in {', '.join(ENDINGS)}")
        path.write_bytes(self._bytes(path.suffix[1:]))
        return path

    def _bytes(self, form: str) -> bytes:
        buffer = io.BytesIO()
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same figure, the same file
        with mpl.rc_context(STYLE):
            self.figure.savefig(buffer, format=form, dpi=200, metadata=dated.get(form))
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def styled(draw: Callable[Given, Chart]) -> Callable[Given, Chart]:
    """A figure function in the house style, with a clear error where matplotlib is missing."""

    @functools.wraps(draw)
    def inner(*args: Given.args, **kwargs: Given.kwargs) -> Chart:
        if not INSTALLED:
            raise TnmoeError("figures need matplotlib: pip install 'tnmoe[plots]'")
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def new_axes(width: float = 5.2, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure of so many inches and its axes, outside pyplot's global state."""
    figure = mpl_figure.Figure(figsize=(width, height), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def si_ticks() -> Any:
    """A tick formatter with SI prefixes."""
    return FuncFormatter(lambda value, _: si(value))
