"""What compressed soft labels cost: bytes a row, and the accuracy of students that learn them.

    python benchmarks/compress.py --packages D/lists/..._bookworm_main_binary-amd64_Packages

A teacher of 2,400 Debian rows with gold labels 1,200 others (see benchmarks/selection.py); each codec
writes its store, which is read back for five students. And --rows rows of 1,000 labels are streamed to
a store and back, a tenth of them for two other settings. Writes benchmarks/results/compress.md.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy.sparse import csr_array
from selection_bed import SEEDS, Bed, debian, gold_of, one_hot, softmax, spread, student, trained

from llmlabel.calibrate.temperature import fit_temperature
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.loss.soft import soft_cross_entropy
from llmlabel.refine.codecs import Dense, TopK, TwoDistances, partners
from llmlabel.refine.compress import (
    Codec,
    compress,
    compress_blocks,
    restore,
    restore_blocks,
    store_size,
)
from llmlabel.refine.projector import LowRank
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent


def stores(bed: Bed, folder: Path) -> str:
    """One line a codec: bytes, how far the labels are from the teacher's, the students."""
    rows, known = bed.pool.select(range(1200)), bed.pool.select(range(1200, 3600))
    teacher = student(
        row_vectors(known), one_hot(gold_of(known), len(bed.labels)), seed=100, steps=500
    )
    heat = calibrated(bed, teacher(row_vectors(bed.validation)))
    probs = softmax(teacher(row_vectors(rows)), heat)
    labelled = SoftLabels.from_dense(probs, bed.labels).add_to(rows)
    right = bed.accuracy(teacher(row_vectors(bed.test)))
    hard = one_hot(probs.argmax(axis=1), len(bed.labels))
    full = trained(bed, rows, probs)
    lines = [
        "## 16 labels: what students lose",
        "",
        f"1,200 rows labelled by a teacher of {right:.1f} %, at temperature {heat:.2f} (fitted on the "
        f"validation rows), whose full soft labels give students of {spread(full)} %. Agreement: share of "
        "rows with the teacher's most probable label; KL: to the teacher's distribution, mean. The keys "
        "in the file are names of packages.",
        "",
        "| store | bytes of a row | in the file | agreement | KL, nats | student, % | lost |",
        "|---|---|---|---|---|---|---|",
        f"| teacher's labels, hard | 1 | | 1.000 | | {_students(bed, rows, hard, full)}",
        f"| full, not stored | 64 | | 1.000 | 0.000 | {spread(full)} | |",
    ]
    codecs: list[tuple[str, Codec, str]] = [
        ("top 1, smoothed", TopK(1), "smooth"),
        ("top 3, smoothed", TopK(3), "smooth"),
        ("top 5, smoothed", TopK(5), "smooth"),
        ("top 5, renormalised", TopK(5), "renormalise"),
        ("top 3, 8 bits, smoothed", TopK(3, bits=8), "smooth"),
        ("all, 8 bits", Dense(8), "smooth"),
        ("all, 32 bits", Dense(32), "smooth"),
        ("two distances", TwoDistances(), "smooth"),
        *((f"projector, rank {r}", LowRank(r, bed.anchors), "smooth") for r in (0, 2, 4, 8, 16)),
    ]
    for name, codec, rest in codecs:
        store = compress(labelled, bed.labels, codec=codec, output=folder / name)
        more = {"texts": labelled, "anchors": bed.anchors} if isinstance(codec, LowRank) else {}
        back = SoftLabels.from_dataset(restore(store, bed.labels, rest=rest, **more), bed.labels)
        found, size = back.dense(), store_size(store)
        agreement = (found.argmax(axis=1) == probs.argmax(axis=1)).mean()
        kl = (probs * (np.log(probs) - np.log(np.maximum(found, 1e-12)))).sum(axis=1).mean()
        payload = f"{size.payload_bytes}"
        if isinstance(codec, LowRank):
            number = codec.rank * (len(bed.labels) + row_vectors(bed.anchors).shape[1]) * 4
            payload = f"{number / len(rows):.1f} ({number / 1000:.1f} kB in all)"
        lines.append(
            f"| {name} | {payload} | {size.bytes_per_row:.1f} | {agreement:.3f} | {kl:.3f} | "
            f"{_students(bed, rows, found, full)}"
        )
    own = by_distance_loss(bed, rows, probs)
    lines.append(
        f"| two distances, DBR's own loss | 6 | | | | {spread(own)} | {np.mean(own) - np.mean(full):+.1f} |"
    )
    raw = softmax(teacher(row_vectors(rows)))
    sharp = SoftLabels.from_dense(raw, bed.labels).add_to(rows)
    base = trained(bed, rows, raw)
    lines.append(f"| temperature 1: full, not stored | 64 | | | | {spread(base)} | |")
    for name, codec, _ in (codecs[0], codecs[4], codecs[7]):
        store = compress(sharp, bed.labels, codec=codec, output=folder / f"sharp {name}")
        found = SoftLabels.from_dataset(restore(store, bed.labels), bed.labels).dense()
        lines.append(
            f"| temperature 1: {name} | {store_size(store).payload_bytes} | | | | "
            f"{_students(bed, rows, found, base)}"
        )
    return "\n".join(lines) + "\n"


def _students(bed: Bed, rows: Dataset, targets: np.ndarray, full: list[float]) -> str:
    values = trained(bed, rows, targets)
    return f"{spread(values)} | {np.mean(values) - np.mean(full):+.1f} |"


def calibrated(bed: Bed, logits: np.ndarray) -> float:
    """The temperature of a teacher that is over-confident, from validation rows."""
    probs = SoftLabels.from_dense(softmax(logits), bed.labels)
    return fit_temperature(probs.add_to(bed.validation), bed.labels).value


def by_distance_loss(bed: Bed, rows: Dataset, probs: np.ndarray) -> list[float]:
    """Cross-entropy with the teacher's hard label, plus |difference| of the two log-probabilities."""
    first = probs.argmax(axis=1)
    pair = np.stack([first, first[partners(rows["id"][:], seed=0)]], axis=1)
    ids = torch.from_numpy(pair)
    given = torch.from_numpy(np.log(np.maximum(np.take_along_axis(probs, pair, 1), np.exp(-16))))
    targets = one_hot(first, len(bed.labels))
    hard = torch.from_numpy(targets).float()

    def loss(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        own = torch.log_softmax(logits, dim=1).clamp(min=-16).gather(1, ids[batch])
        gap = (own - given[batch].float()).abs().sum(dim=1)
        return soft_cross_entropy(logits, hard[batch]) + gap

    return trained(bed, rows, targets, loss=loss)


def many_rows(rows: int, folder: Path) -> str:
    """A store of 1,000 labels, written and read block by block."""
    labels = load_labels([f"label {i}" for i in range(1000)])
    lines = [
        "## 1,000 labels, the 8 most probable, block by block",
        "",
        "Made-up rows in blocks of 20,000; the ids are row numbers, or 32 random hex digits. "
        "Peak memory is that of the whole process.",
        "",
        "| codec | ids | rows | bytes of a row | in the file | file | written, rows/s | read, rows/s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    few = rows // 10
    for codec, random_ids, number in (
        (TopK(8), False, few),
        (TopK(8), False, rows),
        (TopK(8, bits=8), False, few),
        (TopK(8, bits=8), True, few),
    ):
        start = time.perf_counter()
        store = compress_blocks(
            blocks(number, labels, random_ids=random_ids),
            labels,
            codec=codec,
            output=folder / f"{codec.bits}-{random_ids}-{number}",
        )
        written = time.perf_counter() - start
        start = time.perf_counter()
        count = sum(len(block) for block in restore_blocks(store, labels, rest="missing"))
        read = time.perf_counter() - start
        assert count == number
        size = store_size(store)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lines.append(
            f"| top 8, {codec.bits} bits | {'random' if random_ids else 'numbers'} | "
            f"{number:,} | {size.payload_bytes} | {size.bytes_per_row:.1f} | "
            f"{size.file_bytes / 1e6:.0f} MB | {number / written:,.0f} | {number / read:,.0f} | "
            f"{peak:.0f} |"
        )
    return "\n".join(lines) + "\n"


def blocks(rows: int, labels: LabelSpace, *, random_ids: bool) -> Iterator[Dataset]:
    """Blocks of 20,000 rows with 8 labels of falling probability each."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, 20_000):
        count = min(20_000, rows - start)
        cuts = np.sort(rng.uniform(size=(count, 8)), axis=1)
        probs = np.diff(cuts, axis=1, prepend=0)[:, ::-1]
        first = rng.integers(len(labels), size=(count, 1))
        ids = (first + np.arange(8) * rng.integers(1, 100, size=(count, 1))) % len(labels)
        indptr = np.arange(0, 8 * count + 1, 8)
        shape = (count, len(labels))
        soft = SoftLabels(
            csr_array((probs.ravel(), ids.ravel(), indptr), shape), labels.fingerprint
        )
        keys = [rng.bytes(16).hex() if random_ids else str(start + i) for i in range(count)]
        yield soft.add_to(Dataset.from_dict({"id": keys}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="Packages file of Debian bookworm main")
    parser.add_argument("--cache", type=Path, help="folder of MiniLM's vectors")
    parser.add_argument("--rows", type=int, default=10_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        "# Soft labels in few bytes\n\n`python benchmarks/compress.py --packages PACKAGES --rows "
        f"{arguments.rows}`. {len(SEEDS)} seeds of the students; differences below a point are noise.\n"
    ]
    with tempfile.TemporaryDirectory() as folder:
        parts.append(many_rows(arguments.rows, Path(folder)))
        print(parts[-1], flush=True)
        if arguments.packages and arguments.packages.is_file():
            bed = debian(arguments.packages, arguments.cache)
            parts.insert(1, stores(bed, Path(folder)))
            print(parts[1], flush=True)
        else:
            print("no --packages: the students on Debian sections are skipped")
    (HERE / "results" / "compress.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
