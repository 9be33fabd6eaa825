"""The one look of all figures: a 3.33 in column, embedded fonts, colours and markers that survive grey printing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first: figures are made without a display)

from decdec.files import atomic  # noqa: E402

COLUMN = 3.33  # inches
# Okabe and Ito's colours, dark to light, each with its own marker and dash so that grey print keeps them apart.
LINES = [{"color": "#0072B2", "marker": "o", "linestyle": "-"}, {"color": "#D55E00", "marker": "s", "linestyle": "--"},
         {"color": "#009E73", "marker": "^", "linestyle": "-."}, {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
         {"color": "#56B4E9", "marker": "v", "linestyle": "-"}, {"color": "#E69F00", "marker": "P", "linestyle": "--"}]
SETTINGS = {"font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
            "ytick.labelsize": 7, "lines.linewidth": 1.2, "lines.markersize": 3.5, "pdf.fonttype": 42, "axes.grid": True,
            "grid.alpha": 0.3, "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
            "legend.frameon": False, "legend.handlelength": 3.2, "figure.constrained_layout.use": True}


@contextmanager
def figure(path: str | Path, height: float = 2.2, **subplots) -> Iterator[tuple]:
    """Yield ``(figure, axes)`` of one column's width; on leaving, write ``path`` as PDF and PNG (its suffix is ignored)."""
    with plt.rc_context(SETTINGS):
        drawn, axes = plt.subplots(figsize=(COLUMN, height), **subplots)
        try:
            yield drawn, axes
            for suffix in (".pdf", ".png"):
                with atomic(Path(path).with_suffix(suffix)) as temporary:
                    drawn.savefig(temporary, dpi=300)
        finally:
            plt.close(drawn)
