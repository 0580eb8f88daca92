"""What training on 131 K to 3 M labels costs, by formula: the tables of docs/scale.md.

    python benchmarks/scale.py            # prints them
    python benchmarks/scale.py --write    # puts them between the markers of docs/scale.md
    python benchmarks/scale.py --check    # fails where docs/scale.md says something else

The measured curve is read from docs/scale.md itself: who has new numbers of `benchmarks/xmc.py --part
negatives` writes the first five columns of that table, and --write computes the others.
"""

import argparse
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"

HALF, SINGLE = 1.2e14, 6e13
"""FLOP/s of a GPU that are reached: encoders in half precision, scores in float32 (TF32)."""
GPU_GB = 80
EPOCHS = 100
TOKENS = 32
"""Of a label and of a title; `Task.text_tokens` says where texts are longer."""
REFRESH, HARD = 0.01, 256
"""Defaults of train_dual_encoder."""
BLOCK = 8192
"""Labels that rows are compared with at a time."""
REMEMBERED = 2
"""Bytes of a number in the vectors that are remembered."""
PASS_TOKENS = 65_536
"""Of a pass of ours on a GPU; DEXML's is 3,000 padded labels."""

MEASURED_ROWS = 64
"""Rows of an update in the measured curve."""


@dataclass(frozen=True)
class Encoder:
    """What a model's size says of its cost."""

    name: str
    layers: int
    width: int
    heads: int
    weights: float
    """All of them, with those of the token embeddings."""

    @property
    def computed(self) -> float:
        """Weights that every token is multiplied with: P."""
        return self.layers * (4 * self.width**2 + 2 * self.width * 4 * self.width)

    def activation_bytes(self, tokens: float, length: int) -> float:
        """Korthikanti et al. (arXiv 2205.05198), equation 1, of all layers."""
        per_token = self.width * (34 + 5 * self.heads * length / self.width)
        return tokens * self.layers * per_token


@dataclass(frozen=True)
class Task:
    """Data, and the batch that DEXML takes for it."""

    name: str
    labels: int
    rows: int
    positives: float
    """Labels of a row."""
    batch: int
    """Rows of an update and GPU."""
    text_tokens: int = TOKENS


@dataclass(frozen=True)
class Cost:
    """Of an update."""

    memory: float
    """Bytes of a GPU."""
    encoded: float
    """Labels encoded in an update, on all GPUs; twice each."""
    half_flop: float
    """Of an update, on all GPUs, by encoders."""
    single_flop: float
    """By scores."""
    updates: float
    """In an epoch."""
    gpus: int

    @property
    def seconds(self) -> float:
        """Of an update."""
        return (self.half_flop / HALF + self.single_flop / SINGLE) / self.gpus

    @property
    def hours(self) -> float:
        """Of all epochs."""
        return self.seconds * self.updates * EPOCHS / 3600


ENCODERS = (
    Encoder("DistilBERT", 6, 768, 12, 66.4e6),
    Encoder("MiniLM-L6", 6, 384, 12, 22.7e6),
)
TASKS = (
    Task("LF-AmazonTitles-131K", 131_073, 294_805, 2.29, 3000),
    Task("LF-Wikipedia-500K", 501_070, 1_813_391, 4.77, 768, 128),
    Task("LF-AmazonTitles-1.3M", 1_305_265, 2_248_619, 22.2, 3000),
    Task("3 M", 3_000_000, 1_717_899, 36.0, 3000),
)


def dexml(task: Task, encoder: Encoder, gpus: int) -> Cost:
    """All labels encoded twice, their scores with all rows in one table."""
    rows, labels, width = task.batch * gpus, task.labels, encoder.width
    memory = (
        16 * encoder.weights
        + 2 * 4 * labels * width / gpus
        + 3 * 4 * rows * labels / gpus
        + encoder.activation_bytes(3000 * TOKENS, TOKENS)
    )
    texts = 6 * encoder.computed * task.text_tokens * rows
    return Cost(
        memory,
        labels,
        8 * encoder.computed * TOKENS * labels + texts,
        6 * rows * labels * width,
        task.rows / rows,
        gpus,
    )


def ours(task: Task, encoder: Encoder, gpus: int, *, positives: float = 1) -> Cost:
    """`negatives="cached"`; `positives` of a row."""
    rows, labels, width = task.batch * gpus, task.labels, encoder.width
    encoded = min(labels, positives * rows + REFRESH * labels + HARD)
    memory = (
        20 * encoder.weights
        + REMEMBERED * labels * width
        + 3 * 4 * encoded * width / gpus
        + 3 * 4 * rows * BLOCK
        + encoder.activation_bytes(PASS_TOKENS, task.text_tokens)
    )
    texts = 8 * encoder.computed * task.text_tokens * rows
    return Cost(
        memory,
        encoded,
        8 * encoder.computed * TOKENS * encoded + texts,
        (10 * labels + 2 * encoded) * rows * width,
        task.rows / rows,
        gpus,
    )


# ------------------------------------------------------------------------------------- the page


def table(header: str, *rows: str) -> str:
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *rows])


def number(value: float) -> str:
    """Three digits, no more: none of it is known better."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def flop(value: float) -> str:
    return f"{value:.1e}".replace("e+", "e")


def costs(encoder: Encoder) -> str:
    lines = []
    for task in TASKS:
        for gpus in (1, 8):
            theirs, own = dexml(task, encoder, gpus), ours(task, encoder, gpus)
            for name, cost in (("DEXML", theirs), ("ours", own)):
                fits = cost.memory / 1e9 <= GPU_GB
                cells = [
                    f"{task.name} ({task.labels:,} x {task.rows:,})",
                    str(gpus),
                    name,
                    number(cost.memory / 1e9) + ("" if fits else " (does not fit)"),
                    f"{cost.encoded:,.0f}",
                    flop(cost.half_flop),
                    flop(cost.single_flop),
                    number(cost.seconds),
                    number(cost.updates),
                    number(cost.hours),
                    "" if cost is theirs else f"{theirs.hours / own.hours:.1f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return table(
        "| data (labels x rows) | GPUs | design | GB a GPU | labels encoded | encoder FLOP | score FLOP "
        f"| s an update | updates an epoch | hours, {EPOCHS} epochs | times faster |",
        *lines,
    )


def choices() -> str:
    """What other settings of ours cost, DistilBERT."""
    encoder, lines = ENCODERS[0], []
    for task in TASKS:
        for gpus in (1, 8):
            usual = ours(task, encoder, gpus)
            cells = [
                f"{task.name}",
                str(gpus),
                number(usual.hours),
                number(ours(task, encoder, gpus, positives=task.positives).hours),
                number(
                    (usual.half_flop / HALF + 4 * usual.single_flop / SINGLE)
                    / gpus
                    * usual.updates
                    * EPOCHS
                    / 3600
                ),
                f"{dexml(task, encoder, gpus).encoded / usual.encoded:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return table(
        "| data | GPUs | hours as above | all positives of a row "
        "| scores without TF32 | times fewer label tokens than DEXML |",
        *lines,
    )


def measured(page: str) -> str:
    """The curve that was measured, beside what the formulas say of it."""
    header = (
        "| labels | s an update, all | s an update, cached | label tokens, all | label tokens, cached "
        "| all by formula | cached by formula | cached, measured / formula |"
    )
    found = [
        [float(cell.replace(",", "")) for cell in line.split("|")[1:6]]
        for line in section(page, "measured").splitlines()
        if re.match(r"(\|\s*\d[\d,.e+-]*\s*){5}\|", line)
    ]
    if not found:
        return table(header, "| (to be measured) | | | | | | | |")
    small = ENCODERS[1]
    labels, all_s, cached_s, all_tokens, cached_tokens = np.array(found).T
    scores = MEASURED_ROWS * labels * small.width
    # `all` counts a token twice and takes 8 P for it; the few of `cached` keep their graph, 6 P
    flop_all = 4 * small.computed * all_tokens + 8 * scores
    flop_cached = 6 * small.computed * cached_tokens + 10 * scores
    design = np.stack([np.ones(len(found)), flop_all], axis=1)
    constant, per_flop = np.linalg.lstsq(design, all_s, rcond=None)[0]
    predicted = constant + per_flop * flop_cached
    lines = [
        f"| {n:,.0f} | {a:g} | {c:g} | {at:,.0f} | {ct:,.0f} | {number(fit)} | {number(p)} | {c / p:.2f} |"
        for n, a, c, at, ct, fit, p in zip(
            *(labels, all_s, cached_s, all_tokens, cached_tokens),
            *(design @ (constant, per_flop), predicted),
            strict=True,
        )
    ]
    return "\n".join(
        [
            table(header, *lines),
            "",
            f"Fitted to the column `all`: {constant:.3g} s an update whatever the labels, and "
            f"{1 / per_flop:.3g} FLOP/s.",
        ]
    )


def section(page: str, name: str) -> str:
    return page.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]


def filled(page: str) -> str:
    """The page with every table computed."""
    tables = {encoder.name: costs(encoder) for encoder in ENCODERS}
    tables |= {"choices": choices(), "measured": measured(page)}
    for name, text in tables.items():
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition(f"<!-- end of {name} -->")
        page = f"{before}<!-- {name} -->\n{text}\n<!-- end of {name} -->{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text("utf-8")
    new = filled(page)
    if args.write:
        PAGE.write_text(new, "utf-8")
    elif args.check:
        differs = list(difflib.unified_diff(page.splitlines(), new.splitlines(), lineterm="", n=0))
        if differs:
            raise SystemExit("docs/scale.md is not what the formulas say:\n" + "\n".join(differs))
    else:
        print(new)


if __name__ == "__main__":
    main()
