"""The 10 nearest of a million labels: how fast, how near to exact search, how much memory.

    python benchmarks/label_index.py [--labels 1000000] [--kind texts] [--work FOLDER]

Queries are vectors of MiniLM of the test titles of ../shared/data/finna_yso. Labels of kind `texts` are
subject headings of two parts as catalogues have them, `name -- other name`, of its 4,000 label names in
pairs drawn at random, each encoded by MiniLM in bfloat16. Labels of kind `noise` need no encoder and
are harder: the vector of a name, plus between none and all of the vector of another name or of a
training title, plus noise of length 0.3, of length 1. `--work` keeps vectors and the graph for runs
that only search. Prints what is in benchmarks/results/label_index.md.
"""

import argparse
import gzip
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmlabel import models
from llmlabel.label import index as module
from llmlabel.label.embedding import unit_vectors
from llmlabel.label.index import (
    LabelIndex,
    index_of_vectors,
    load_index,
    save_index,
    updated,
)
from llmlabel.labelspace import LabelSpace

DATA = Path(__file__).parents[2] / "shared" / "data" / "finna_yso"
QUERIES, EXACT = 4000, 512
T = TypeVar("T")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def unit(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found.astype(np.float32)


def read(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def minilm(kept: Path | None) -> dict[str, np.ndarray]:
    """What MiniLM says of label names, training titles and test titles."""
    if kept is not None and kept.is_file():
        with np.load(kept) as arrays:
            return dict(arrays)
    rows, encoder = read("finna_yso.jsonl.gz"), models.load_encoder(models.MINILM)
    texts = {
        split: [row["text"] for row in rows if row["split"] == split] for split in ("train", "test")
    }
    texts["names"] = [row["name"] for row in read("labels.jsonl.gz")]
    found = {name: unit_vectors(encoder, some).astype(np.float32) for name, some in texts.items()}
    if kept is not None:
        np.savez(kept, **found)
    return found


def headings(count: int, work: Path | None) -> np.ndarray:
    """Vectors of `name -- other name`."""
    kept = None if work is None else work / f"headings-{count}.npy"
    if kept is not None and kept.is_file():
        return np.load(kept)
    names = [row["name"] for row in read("labels.jsonl.gz")]
    pairs = np.random.default_rng(1).choice(len(names) ** 2, size=count, replace=False)
    encoder = models.load_encoder(models.MINILM).bfloat16()
    found = np.empty((count, encoder.get_embedding_dimension()), np.float32)
    for start in range(0, count, 50_000):
        some = [divmod(int(pair), len(names)) for pair in pairs[start : start + 50_000]]
        texts = [f"{names[first]} -- {names[second]}" for first, second in some]
        found[start : start + len(texts)] = unit_vectors(encoder, texts)
        print(f"encoded {start + len(texts):,} of {count:,}", file=sys.stderr, flush=True)
    if kept is not None:
        np.save(kept, found)
    return found


def noise(count: int, base: dict[str, np.ndarray], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    others = np.concatenate([base["names"], base["train"]])
    vectors = np.empty((count, others.shape[1]), np.float32)
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        first = base["names"][rng.integers(0, len(base["names"]), size)]
        second = others[rng.integers(0, len(others), size)]
        noise = rng.standard_normal(first.shape, np.float32) * (0.3 * first.shape[1] ** -0.5)
        vectors[start : start + size] = unit(
            first + rng.random((size, 1), np.float32) * second + noise
        )
    return vectors


def space(count: int) -> LabelSpace:
    names = tuple(f"label {i}" for i in range(count))
    return LabelSpace(names, names, ("",) * count, ((),) * count, multilabel=True)


class Made:
    """An encoder that knows the vectors of `label 0`, `label 1` and so on."""

    def __init__(self, vectors: np.ndarray, more: np.ndarray) -> None:
        self.parts, self.seconds = (vectors, more), 0.0

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        """The vectors of these labels; counts the seconds."""
        start = time.perf_counter()
        rows = [int(text.removeprefix("label ")) for text in texts]
        first, more = self.parts
        found = np.array([first[i] if i < len(first) else more[i - len(first)] for i in rows])
        self.seconds += time.perf_counter() - start
        return found


def timed(what: str, call: Callable[[], T], count: int | None = None) -> tuple[T, float]:
    start = time.perf_counter()
    got = call()
    seconds = time.perf_counter() - start
    rate = "" if count is None else f"{count / seconds:,.0f}"
    print(f"| {what} | {seconds:.2f} | {rate} | {peak():.1f} |", flush=True)
    return got, seconds


def by_faiss(vectors: np.ndarray, queries: np.ndarray) -> None:
    try:
        import faiss
    except ImportError:
        print("| faiss, exact: faiss-cpu is not installed | | | |")
        return
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    inner = faiss.METRIC_INNER_PRODUCT
    timed(
        "faiss, exact (`knn`)", lambda: faiss.knn(queries, vectors, 10, metric=inner), len(queries)
    )


def brute_force(vectors: np.ndarray, query: np.ndarray) -> list[int]:
    """All cosines in double precision, sorted."""
    cosines = np.concatenate(
        [part.astype(np.float64) @ query.astype(np.float64) for part in np.array_split(vectors, 50)]
    )
    order: list[int] = np.lexsort((np.arange(len(cosines)), -cosines.round(6)))[:10].tolist()
    return order


def recall(ids: np.ndarray, best: np.ndarray) -> float:
    """Of the first rows, those that exact search was asked for."""
    pairs = zip(ids[: len(best)].tolist(), best.tolist(), strict=True)
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in pairs]))


def graph_of(labels: LabelSpace, vectors: np.ndarray, folder: Path | None) -> LabelIndex:
    if folder is not None and (folder / "index.json").is_file():
        return timed("reading the index", lambda: load_index(folder))[0]
    made_of = f"M {module.LINKS}, efConstruction {module.BUILD}, one thread"
    found, _ = timed(
        f"building the graph ({made_of})",
        lambda: index_of_vectors(labels, vectors, encoder="made", search="hnsw"),
    )
    if folder is not None:
        timed("writing the index", lambda: save_index(found, folder))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("texts", "noise"), default="texts")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not there")
        return
    work, count = arguments.work, arguments.labels
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    base = minilm(work and work / "minilm.npz")
    if arguments.kind == "texts":
        vectors, more = np.split(headings(count + 1000, work), [count])
    else:
        vectors, more = noise(count, base, 1), noise(1000, base, 2)
    labels, queries = space(count), base["test"][:QUERIES]
    print(f"## {count:,} labels ({arguments.kind}), {len(queries):,} queries, k = 10\n")
    print("| | s | queries/s | peak memory until then, GiB |\n|---|---|---|---|")
    exact = index_of_vectors(labels, vectors, encoder="made", search="exact")
    (best, near), seconds = timed("exact", lambda: exact.search(queries[:EXACT], k=10), EXACT)
    (hundred, _), _ = timed("exact, k = 100", lambda: exact.search(queries[:EXACT], k=100), EXACT)
    by_faiss(vectors, queries[:EXACT])
    graph = graph_of(labels, vectors, work and work / f"graph-{arguments.kind}-{count}")
    said = []
    for width in (32, 64, 128, 256):
        module.SEARCH = width
        (ids, _), spent = timed(
            f"graph, efSearch {width}", lambda: graph.search(queries, k=10), len(queries)
        )
        times = (len(queries) / spent) / (EXACT / seconds)
        said.append(f"| {width} | {recall(ids, best):.4f} | {times:.1f} |")
    encoder, wider = Made(vectors, more), space(count + 1000)
    (ids, _), _ = timed("graph, k = 100", lambda: graph.search(queries, k=100), len(queries))
    for name, some in (("exact", exact), ("graph", graph)):
        encoder.seconds = 0.0
        _, spent = timed(
            f"adding 1,000 labels ({name})", lambda some=some: updated(some, wider, encoder)
        )
        print(f"| of that encoding | {encoder.seconds:.2f} | | |")
    print("\n| efSearch | recall@10 | times exact's queries/s |\n|---|---|---|")
    print("\n".join(said))
    same = sum(best[row].tolist() == brute_force(vectors, queries[row]) for row in range(50))
    print(
        f"\nExact search equals brute force in double precision for {same} of 50 queries. Mean cosine "
        f"of the nearest label {near[:, 0].mean():.3f}, of the tenth {near[:, 9].mean():.3f}. "
        f"Recall@100 of the graph {recall(ids, hundred):.4f}."
    )


if __name__ == "__main__":
    main()
