"""Pictures in a light and a dark variant, and the colours of relevance. Does not depend on models or freegrad_fx."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import style
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

__all__ = ["draw_variants", "relevance_bar", "relevance_colours"]

# Okabe and Ito's blue and orange, which colour-blind readers can distinguish; zero has the colour of the background
_COLOURS = {
    "light": ("#0072B2", "#FFFFFF", "#D55E00"),
    "dark": ("#56B4E9", "#17181A", "#E69F00"),
}
_STYLES = {"light": "default", "dark": "dark_background"}


def relevance_colours(variant: str) -> Colormap:
    """Blue for negative relevance, orange for positive one."""
    return LinearSegmentedColormap.from_list("relevance", _COLOURS[variant])


def relevance_bar(figure: Figure, drawn: ScalarMappable, panels: Any, **options: Any) -> Colorbar:
    """Add the bar of the colours from -1 to 1.

    Args:
        figure: The figure.
        drawn: A picture in these colours.
        panels: The axes that the bar is for.
        **options: As for `Figure.colorbar`.
    """
    bar = figure.colorbar(drawn, ax=panels, ticks=[-1, 0, 1], pad=0.01, **options)
    bar.ax.set_yticklabels(["against", "0", "for"])
    return bar


def draw_variants(draw: Callable[[str], Figure], path: Path) -> list[Path]:
    """Save a figure for a light and for a dark background, and return the paths: NAME-light.png, NAME-dark.png.

    Args:
        draw: Takes the name of the variant, and returns the figure.
        path: The path without the variant.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for variant, name in _STYLES.items():
        with (
            style.context(name),
            mpl.rc_context({"savefig.facecolor": "none", "axes.facecolor": "none"}),
        ):
            found.append(path.with_name(f"{path.name}-{variant}.png"))
            # Without the version of matplotlib, the same picture is the same file
            draw(variant).savefig(found[-1], dpi=110, metadata={"Software": None})
    return found
