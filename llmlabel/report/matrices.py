"""The heat maps of a report: which labels are mistaken for which, and which voters agree."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmlabel.report.plots import ACCENT, INK, MUTED, drawables, svg


def confusion(
    counts: Int[np.ndarray, "true said"],
    *,
    true_names: Sequence[str],
    said_names: Sequence[str],
    axes_names: tuple[str, str] = ("true", "predicted"),
) -> str:
    """Each row of the true label shaded by its share; the numbers are counts of rows."""
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.where(total > 0, total, 1)
    cell = 0.62 if max(counts.shape) <= 8 else 0.34

    def draw(axes: Any) -> None:
        for at in np.ndindex(counts.shape):
            _cell(axes, at, float(shares[at]), f"{counts[at]}" if counts[at] else "", size=cell)
        _frame(axes, drawables(true_names), drawables(said_names))
        axes.set(xlabel=axes_names[1], ylabel=axes_names[0])

    return svg(draw, width=1.9 + cell * counts.shape[1], height=1.2 + cell * counts.shape[0])


def agreement(shares: Float[np.ndarray, "voters voters"], *, names: Sequence[str]) -> str:
    """How often two voters agree, in per cent; those who agree most stand next to each other.

    The least share has the lightest shade. NaN, where that is not known, is a dot.
    """
    order = _alike(shares)
    shares, shown = shares[np.ix_(order, order)], drawables(names, "voter")
    shown = [shown[at] for at in order]
    voters = len(shown)
    below = shares[np.tril_indices(voters, -1)]
    low = float(np.nanmin(below))
    room = max(float(np.nanmax(below)) - low, 1e-9)
    cell = 0.5 if voters <= 10 else 0.34

    def draw(axes: Any) -> None:
        for column, row in itertools.combinations(range(voters), 2):
            share = float(shares[row, column])
            if np.isnan(share):
                axes.plot(column, row - 1, ".", color=MUTED, markersize=1.5)
                continue
            shade = (share - low) / room
            _cell(axes, (row - 1, column), shade, f"{100 * share:.0f}", size=cell)
        _frame(axes, shown[1:], shown[:-1])

    return svg(draw, width=1.9 + cell * (voters - 1), height=1.5 + cell * (voters - 1))


def _alike(shares: Float[np.ndarray, "voters voters"]) -> list[int]:
    """The leaves of average linkage; two of whom nothing is known count as never agreeing."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = np.where(np.isnan(shares), 1.0, 1.0 - shares)
    np.fill_diagonal(distance, 0.0)
    return leaves_list(linkage(squareform(distance, checks=False), "average")).tolist()


def _cell(axes: Any, at: tuple[int, int], shade: float, text: str, *, size: float) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    row, column = at
    color = to_rgba(ACCENT, 0.04 + 0.96 * shade)
    axes.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, facecolor=color, linewidth=0))
    if text:
        look = {"color": "white" if shade > 0.5 else INK, "fontsize": 9 if size > 0.4 else 7}
        axes.text(column, row, text, ha="center", va="center", **look)


def _frame(axes: Any, rows: list[str], columns: list[str]) -> None:
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), aspect="equal")
    turned = max(len(name) for name in columns) > 8 or len(columns) > 8
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelcolor=INK, pad=5)
    axes.spines[["left", "bottom"]].set_visible(False)
