"""The figures of a report: each function draws one and returns it as the data URI of an SVG.

The background is transparent and text is drawn as paths, so that a figure looks the same on every
machine; equal numbers give equal bytes. Names are drawn as they stand, never as mathematics.
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llmlabel.labelspace.show import printable

INK, MUTED, RULE, ACCENT = "#1d2125", "#6b737c", "#d9dde1", "#0b6b75"
NAME_CHARACTERS = 24

_STYLE = {
    "svg.hashsalt": "llmlabel",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}


class Measured(NamedTuple):
    """A measured share and the interval around it; `low` and `high` equal it where none is known."""

    value: float
    low: float
    high: float


class Row(NamedTuple):
    """One line of `accuracies`; `before` is the same source before bias correction."""

    name: str
    after: Measured
    before: Measured | None
    accent: bool


def accuracies(rows: Sequence[Row], *, quantity: str) -> str:
    """A line for each source: a filled dot with its interval, and a hollow dot for the one before."""

    def draw(axes: Any) -> None:
        seen = [m for row in rows for m in (row.after, row.before) if m is not None]
        left = max(0.0, np.floor(min(m.low for m in seen) * 10 - 0.2) / 10)
        axes.set_xlim(left, 1.0)
        axes.set_ylim(len(rows) - 0.35, -0.75)
        for y, row in enumerate(rows):
            color = ACCENT if row.accent else INK
            axes.axhline(y, color=RULE, linewidth=0.6)
            if row.before is not None:
                _interval(axes, float(y), row.before, MUTED, hollow=True)
            _interval(axes, float(y), row.after, color, hollow=False)
            text = f"{100 * row.after.value:.1f} %"
            if row.before is not None:
                text = f"{100 * row.before.value:.1f} → {text}"
            weight = "bold" if row.accent else "normal"
            edge = axes.get_yaxis_transform()
            name = drawable(row.name, f"source {y + 1}", characters=38)
            axes.text(0, y - 0.3, name, transform=edge, color=color, weight=weight)
            axes.text(1, y - 0.3, text, transform=edge, color=color, weight=weight, ha="right")
        axes.set_yticks([])
        axes.spines[["left"]].set_visible(False)
        percent_axis(axes.xaxis)
        axes.set_xlabel(quantity)

    return svg(draw, width=4.6, height=0.55 + 0.52 * len(rows))


def reliability(
    confidence: Float[np.ndarray, " bins"],
    correct: Float[np.ndarray, " bins"],
    rows: Int[np.ndarray, " bins"],
) -> str:
    """Share correct against mean confidence of each bin; the area of a dot is its number of rows."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        full = rows > 0
        x, y, n = confidence[full], correct[full], rows[full]
        axes.vlines(x, x, y, color=ACCENT, linewidth=0.8, alpha=0.6)
        axes.scatter(
            x, y, s=12 + 170 * n / max(n.max(initial=1), 1), color=ACCENT, alpha=0.85, lw=0
        )
        for at_x, at_y, count in zip(x, y, n, strict=True):
            below = at_y < at_x
            offset = (0, -8 - 5 * np.sqrt(count / n.max())) if below else (0, 8)
            axes.annotate(
                f"{count}",
                (at_x, at_y),
                xytext=offset,
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=7.5,
                color=MUTED,
            )
        axes.set(xlim=(0, 1.04), ylim=(0, 1.04), xlabel="mean confidence", ylabel="share correct")
        axes.grid(visible=True)
        percent_axis(axes.xaxis, step=0.25)
        percent_axis(axes.yaxis, step=0.25)

    return svg(draw, width=3.7, height=3.4)


def risk_coverage(kept: Float[np.ndarray, " points"], risk: Float[np.ndarray, " points"]) -> str:
    """Share of errors among the most confident rows against the share of rows kept."""

    def draw(axes: Any) -> None:
        axes.fill_between(kept, risk, color=ACCENT, alpha=0.12, linewidth=0)
        axes.plot(kept, risk, color=ACCENT, linewidth=1.6, solid_joinstyle="round")
        axes.plot(kept[-1:], risk[-1:], "o", color=ACCENT, markersize=4, clip_on=False)
        axes.annotate(
            f"all rows: {100 * risk[-1]:.1f} %",
            (kept[-1], risk[-1]),
            xytext=(-2, 8),
            textcoords="offset points",
            ha="right",
        )
        top = max(0.05, 1.3 * float(risk.max()))
        axes.set(xlim=(0, 1), ylim=(0, min(top, 1.0)))
        axes.set(xlabel="rows kept, most confident first", ylabel="share wrong among them")
        axes.grid(visible=True)
        percent_axis(axes.xaxis, step=0.25)
        percent_axis(axes.yaxis)

    return svg(draw, width=3.7, height=3.4)


def coverage(
    measured: Measured, *, target: float | None, promised: tuple[float, float] | None
) -> str:
    """Empirical coverage with its interval, the target as a line in the band of the promise."""

    def draw(axes: Any) -> None:
        low = min(measured.low, *(promised or ()), target if target is not None else 1.0)
        if promised is not None:
            axes.axvspan(*promised, color=RULE, alpha=0.6, linewidth=0)
        axes.set_xlim(max(0.0, np.floor(low * 20 - 0.6) / 20), 1.0)
        axes.set_ylim(-1, 1)
        axes.axhline(0, color=RULE, linewidth=0.6)
        if target is not None:
            axes.axvline(target, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                f"target {100 * target:g} %",
                (target, 1),
                xytext=(-4, -2),
                textcoords="offset points",
                ha="right",
                va="top",
                color=MUTED,
            )
        _interval(axes, 0.0, measured, ACCENT, hollow=False)
        axes.annotate(
            f"{100 * measured.value:.1f} %",
            (measured.value, 0),
            xytext=(0, -9),
            textcoords="offset points",
            ha="center",
            va="top",
            color=ACCENT,
            weight="bold",
        )
        axes.set_yticks([])
        axes.spines[["left"]].set_visible(False)
        percent_axis(axes.xaxis)
        axes.set_xlabel("rows whose set holds the true label")

    return svg(draw, width=3.7, height=1.55)


def set_sizes(rows: Int[np.ndarray, " sizes"]) -> str:
    """Number of rows with a set of 0, 1, 2, ... labels; sets of more than 10 are drawn as one bar."""
    shown = rows if len(rows) <= 12 else np.append(rows[:11], rows[11:].sum())
    names = [f"{size}" for size in range(len(shown))]
    if len(rows) > 12:
        names[-1] = "11+"

    def draw(axes: Any) -> None:
        colors = [ACCENT if size == 1 else MUTED for size in range(len(shown))]
        bars = axes.bar(range(len(shown)), shown, width=0.72, color=colors)
        axes.bar_label(bars, labels=[f"{count}" for count in shown], padding=2, color=INK)
        axes.set_xticks(range(len(shown)), names)
        axes.set_yticks([])
        axes.tick_params(axis="x", length=0)
        axes.spines[["left"]].set_visible(False)
        axes.set(ymargin=0.12, xlabel="labels in the set")

    return svg(draw, width=3.7, height=2.3)


def shares(
    predicted: Float[np.ndarray, " labels"],
    gold: Float[np.ndarray, " labels"] | None,
    *,
    names: Sequence[str],
    limit: float,
) -> str:
    """A bar for the mean share a source gives to each label, a tick for the share in the gold rows."""
    places = max(0, int(np.ceil(-np.log10(limit))) - 1)  # rare labels have small shares

    def draw(axes: Any) -> None:
        at = np.arange(len(names))
        axes.barh(at, predicted, height=0.5, color=ACCENT, alpha=0.8)
        if gold is not None:
            axes.vlines(gold, at - 0.4, at + 0.4, color=INK, linewidth=1.6)
        for y, share in enumerate(predicted):
            right = max(share, gold[y] if gold is not None else 0.0)
            axes.annotate(
                f"{100 * share:.{places}f} %",
                (right, y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=MUTED,
            )
        axes.set(xlim=(0, limit * 1.18), ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(at, drawables(names))
        axes.set_xticks([])
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[["bottom"]].set_visible(False)

    return svg(draw, width=3.5, height=0.25 + 0.27 * len(names))


_PLACES = ((8, 4, "left"), (8, -13, "left"), (-8, -13, "right"), (-8, 4, "right"))


def costs(points: Sequence[tuple[str, float, float, bool]], *, quantity: str) -> str:
    """A dot for each source: prompt tokens a row, and the share `quantity`; the bool is its accent."""

    def draw(axes: Any) -> None:
        tokens = [x for _, x, _, _ in points]
        shares = [y for _, _, y, _ in points]
        axes.set_xlim(0, 1.25 * max(tokens))
        low, high = min(shares), max(shares)
        room = max(0.05, 0.25 * (high - low))
        axes.set_ylim(max(-0.02, low - room), min(1.02, high + room))
        taken: list[Any] = []
        for number, (name, x, y, accent) in enumerate(points, start=1):
            look = {"color": ACCENT if accent else INK}
            axes.plot(x, y, "o", markersize=7, clip_on=False, **look)
            look["weight"] = "bold" if accent else "normal"
            text = axes.annotate(
                drawable(name, f"source {number}"),
                (x, y),
                (0, 0),
                textcoords="offset points",
                **look,
            )
            places = _PLACES[::-1] if x > 0.7 * max(tokens) else _PLACES
            for *offset, side in places:  # the first where no other name is
                text.set(position=offset, ha=side)
                box = text.get_window_extent()
                if not any(box.overlaps(other) for other in taken):
                    break
            taken.append(box)
        axes.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
        axes.set(xlabel="prompt tokens a row", ylabel=quantity)
        axes.grid(visible=True)
        percent_axis(axes.yaxis)

    return svg(draw, width=4.6, height=3.0)


def scores(series: Sequence[Sequence[float]]) -> str:
    """A line for each run: the model's rating, 0 to 100, of the labels before each round."""

    def draw(axes: Any) -> None:
        for line in series:
            axes.plot(range(1, len(line) + 1), line, "o-", color=ACCENT, alpha=0.75, lw=1.4, ms=3.5)
        axes.set(ylim=(-2, 102), xlabel="rating", ylabel="score")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=True)

    return svg(draw, width=4.6, height=2.4)


def windows(
    values: Sequence[float], alarms: Sequence[bool], *, quantity: str, expected: float | None
) -> str:
    """A line over the windows of a stream; a hollow diamond where one raised an alarm."""

    def draw(axes: Any) -> None:
        at = np.arange(1, len(values) + 1)
        if expected is not None:
            axes.axhline(expected, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot(at, values, color=ACCENT, lw=1.4, marker="o" if len(at) <= 60 else "", ms=3.5)
        over = np.array(alarms, dtype=bool)
        look = {"markerfacecolor": "white", "markersize": 7, "clip_on": False, "zorder": 3}
        axes.plot(at[over], np.array(values)[over], "D", color=ACCENT, **look)
        axes.set(xlabel="window", ylabel=quantity, xlim=(0.5, len(at) + 0.5))
        axes.set_ylim(0, 1.15 * max(*values, expected or 0.0, 0.01))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=True)
        if expected is not None:
            percent_axis(axes.yaxis)

    return svg(draw, width=3.7, height=2.3)


def wealth(bets: dict[str, float], *, alarm: float) -> str:
    """A bar for each bet, the logarithm to base 10 of the most it made; a line where the alarm is."""

    def told(power: float) -> str:
        whole = int(power)
        return f"{10**power:,.0f}" if power < 5 else f"{10 ** (power - whole):.2g}e{whole}"

    def draw(axes: Any) -> None:
        at = np.arange(len(bets))
        axes.barh(at, list(bets.values()), height=0.5, color=ACCENT, alpha=0.8)
        axes.axvline(alarm, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        top = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(f"alarm at {told(alarm)}", (alarm, 1), (0, 3), ha="center", **top)
        for y, value in enumerate(bets.values()):
            over = {"color": INK, "weight": "bold" if value >= alarm else "normal"}
            words = f"{told(value)}{' alarm' if value >= alarm else ''}"
            side = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate(words, (1, y), (8, 0), va="center", **side, **over)
        axes.set(xlim=(0, 1.05 * max(alarm, *bets.values())), ylim=(len(bets) - 0.5, -0.6))
        axes.set_yticks(at, drawables(list(bets), "bet"))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.xaxis.set_major_formatter(lambda power, _: told(power))
        axes.set_xlabel("the most that a bet made of 1")

    return svg(draw, width=4.4, height=0.95 + 0.32 * len(bets))


def drawable(name: str, otherwise: str, *, characters: int = NAME_CHARACTERS) -> str:
    """The name on one line, shortened, or `otherwise` where the font lacks one of its characters."""
    from matplotlib.font_manager import findfont, get_font

    name = " ".join(printable(name).split())
    font = get_font(findfont("DejaVu Sans"))
    if not name or not all(font.get_char_index(ord(character)) for character in name):
        return otherwise
    return name if len(name) <= characters else f"{name[: characters - 1].rstrip()}…"


def drawables(names: Sequence[str], what: str = "label") -> list[str]:
    """Each name, or its number where the font lacks one of its characters."""
    return [drawable(name, f"{what} {number}") for number, name in enumerate(names, start=1)]


def _interval(axes: Any, y: float, measured: Measured, color: str, *, hollow: bool) -> None:
    axes.hlines(y, measured.low, measured.high, color=color, linewidth=1.8, alpha=0.45)
    axes.plot(
        measured.value,
        y,
        "o",
        markersize=7,
        markerfacecolor="white" if hollow else color,
        markeredgecolor=color,
        markeredgewidth=1.2,
        clip_on=False,
    )


def percent_axis(axis: Any, *, step: float | None = None) -> None:
    """Its values are shares."""
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    axis.set_major_locator(MultipleLocator(step) if step else MaxNLocator(6))
    axis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")


def svg(draw: Callable[[Any], None], *, width: float, height: float) -> str:
    """What `draw` draws on axes, as a data URI; in inches."""
    import matplotlib.style
    from matplotlib.figure import Figure

    # after_reset: the person's own matplotlibrc must not change the report
    with matplotlib.style.context(_STYLE, after_reset=True), io.BytesIO() as buffer:
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        drawn = buffer.getvalue()
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode("ascii")
