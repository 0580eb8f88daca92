"""Labels by their nearest among a million vectors: how fast, how near to exact search, how much memory.

    python benchmarks/large_pool.py [--rows 1000000] --index usearch    (or faiss)
    python benchmarks/large_pool.py [--rows 1000000]    (what needs no index)

Vectors of 384 numbers around the centres of 1,000 labels, which vary in 16 dimensions. A twentieth of
the rows asked are rows of the pool itself. Prints what is in
benchmarks/results/large_pool.md.
"""

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value, concatenate_datasets
from scipy.sparse import csr_array

from llmlabel.data import gold_index, with_columns
from llmlabel.label.memory import normalised, vote
from llmlabel.label.nearest import finder
from llmlabel.label.neighbours import label_cache, label_neighbours, label_prototypes
from llmlabel.label.singular import intrinsic_dimension, label_singular
from llmlabel.labelspace import load_labels
from llmlabel.metrics import accuracy
from llmlabel.softlabels import SoftLabels

LABELS = load_labels([f"label {i}" for i in range(1000)])
WIDTH, SCALE = 384, 30.0
T = TypeVar("T")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def mixture(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around the labels' centres, and their labels."""
    centres, basis, offset = shared()
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, len(LABELS), rows).astype(np.int32)
    vectors = np.empty((rows, WIDTH), np.float32)
    for i in range(0, rows, 50_000):
        mine = classes[i : i + 50_000]
        spread = centres[mine] + 0.6 * rng.standard_normal((len(mine), 16), np.float32)
        noise = 0.05 * rng.standard_normal((len(mine), WIDTH), np.float32)
        vectors[i : i + 50_000] = unit(spread @ basis + offset + noise)
    return vectors, classes


def shared() -> tuple[np.ndarray, ...]:
    """The labels' centres, where they lie among all numbers, and what all texts have in common."""
    rng = np.random.default_rng(0)
    shapes = (((len(LABELS), 16), 1.0), ((16, WIDTH), WIDTH**-0.5), (WIDTH, 0.15))
    return tuple((scale * rng.normal(size=shape)).astype(np.float32) for shape, scale in shapes)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def table(vectors: np.ndarray, classes: np.ndarray, first: int = 0) -> Dataset:
    ids = [f"{i:08}" for i in range(first, first + len(vectors))]

    def lists(values: np.ndarray, width: int) -> Any:
        offsets = np.arange(len(vectors) + 1, dtype=np.int32) * width
        kind = List(Value(str(values.dtype)))
        return pa.ListArray.from_arrays(offsets, values.ravel()), kind

    rows = Dataset.from_dict({"id": ids, "text": [f"text {i}" for i in ids]})
    return with_columns(rows, {"vector": lists(vectors, WIDTH), "gold": lists(classes, 1)})


def built(library: str, vectors: np.ndarray) -> Any:
    if library == "usearch":
        from usearch.index import Index

        graph = Index(ndim=WIDTH, metric="cos", dtype="i8", expansion_add=40)
        graph.add(np.arange(len(vectors)), vectors)
        return graph
    import faiss

    quantiser = faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFFlat(quantiser, WIDTH, 2048, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.nprobe = 6, 32
    index.train(vectors[:: max(len(vectors) // 100_000, 1)])
    index.add(vectors)
    return index


@dataclass
class Bed:
    """The pool and the rows asked, the first of which are rows of the pool; `lines` of a table."""

    vectors: np.ndarray
    classes: np.ndarray
    pool: Dataset
    asked: Dataset
    itself: list[list[int]]
    step: int
    lines: list[str] = field(default_factory=list)

    def timed(self, what: str, call: Callable[[], T], count: int | None = None) -> T:
        """What the call gives; adds a line to the table."""
        start = time.perf_counter()
        got = call()
        seconds = time.perf_counter() - start
        rate = "" if count is None else f"{count / seconds:,.0f}"
        self.lines.append(f"| {what} | {seconds:.1f} | {rate} | {peak():.1f} |")
        print(self.lines[-1], flush=True)
        return got


def bed_of(rows: int, queries: int) -> Bed:
    vectors, classes = mixture(rows, 1)
    pool, copies = table(vectors, classes), queries // 20
    own = np.sort(np.random.default_rng(3).permutation(rows)[:copies])
    others = table(*mixture(queries - copies, 2), first=rows)
    asked = concatenate_datasets([pool.select(own), others])
    itself = [[i] if i < rows else [] for i in map(int, asked["id"])]
    print(f"vectors and tables: peak {peak():.1f} GiB", flush=True)
    return Bed(vectors, classes, pool, asked, itself, max(queries // 500, 1))


def by_exact_search(bed: Bed, index: Any) -> tuple[np.ndarray, list[str]]:
    """What `label_neighbours` would say of some rows by exact search, and how the index compares."""
    given = np.array(bed.asked["vector"][:], dtype=np.float32)
    blocks = [slice(i, i + 1024) for i in range(0, len(given), 1024)]

    def search() -> np.ndarray:
        find = finder(bed.vectors, k=10, search=index)
        return np.concatenate([find(given[some], bed.itself[some])[0] for some in blocks])

    near = bed.timed("search alone, k = 10", search, len(given))
    some = given[:: bed.step], bed.itself[:: bed.step]
    find = finder(bed.vectors, k=10)
    exact, cosines = bed.timed("exact search alone", lambda: find(*some), len(some[0]))
    pairs = zip(near[:: bed.step].tolist(), exact.tolist(), strict=True)
    recall = np.mean([len({*a} & {*b}) / len(b) for a, b in pairs])
    own = [near[row].tolist().count(i) for row, mine in enumerate(bed.itself) for i in mine]
    places = np.arange(len(bed.classes)), bed.classes
    targets = csr_array((np.ones(len(bed.classes)), places), (len(bed.classes), len(LABELS)))
    return vote(exact, normalised(SCALE * cosines), targets).toarray(), [
        f"On {len(exact)} rows the index names {recall:.4f} of the 10 nearest.",
        f"Rows of the pool that got themselves as a neighbour: {sum(own)} of {len(own)}.",
    ]


def measure(library: str | None, rows: int, queries: int) -> list[str]:
    bed, said, index, true = bed_of(rows, queries), list[str](), None, None
    pool, asked = bed.pool, bed.asked
    calls: dict[str, Callable[[], Dataset]] = {
        "label_prototypes": lambda: label_prototypes(asked, pool, LABELS, scale=SCALE),
        "label_cache": lambda: label_cache(
            asked, pool, anchors(), LABELS, alpha=0.0, beta=5.5, scale=5.0
        ),
    }
    if library is not None:
        index = bed.timed(f"building the index ({library})", lambda: built(library, bed.vectors))
        true, said = by_exact_search(bed, index)
        few = pool.select(range(0, rows, max(rows // 20_000, 1)))
        dimension = bed.timed(
            f"intrinsic_dimension of {len(few):,} rows", lambda: intrinsic_dimension(few)
        )
        print(*said, flush=True)
        calls = {
            "label_neighbours": lambda: label_neighbours(
                asked, pool, LABELS, search=index, scale=SCALE
            ),
            "label_singular": lambda: label_singular(
                asked, pool, LABELS, search=index, dimension=dimension
            ),
            **calls,
        }
    gold = gold_index(asked, LABELS)
    for name, call in calls.items():
        probs = SoftLabels.from_dataset(bed.timed(name, call, queries), LABELS).dense()
        said.append(f"Accuracy of {name} {accuracy(probs, gold):.4f}.")
        print(said[-1], flush=True)
        if name == "label_neighbours":
            some, right = probs[:: bed.step], gold[:: bed.step]
            said.append(
                f"On the {len(some)} rows {accuracy(some, right):.4f}, by exact search "
                f"{accuracy(true, right):.4f}; the most probable label is the same on "
                f"{(some.argmax(axis=1) == true.argmax(axis=1)).mean():.3f} of them."
            )
    return [
        f"## {rows:,} rows in the pool, {queries:,} asked, {library or 'no index'}",
        "",
        "| | s | rows/s | peak memory until then, GiB |",
        "|---|---|---|---|",
        *bed.lines,
        "",
        " ".join(said),
        "",
    ]


def anchors() -> Dataset:
    """The centres, as if the labels' descriptions lay there."""
    centres, basis, offset = shared()
    rows = Dataset.from_dict({"id": list(LABELS.ids), "text": LABELS.texts()})
    vectors = list(unit(centres @ basis + offset))
    return with_columns(rows, {"vector": (vectors, List(Value("float32")))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--index", choices=("usearch", "faiss"), help="none: what needs no index")
    arguments = parser.parse_args()
    print("\n".join(measure(arguments.index, arguments.rows, arguments.queries)))


if __name__ == "__main__":
    main()
