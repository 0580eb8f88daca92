"""Training-free labelers on MiniLM vectors of CLINC150: few gold rows, and labels without any.

    python benchmarks/embedding.py --cache /tmp/vectors

Settings are chosen on validation rows by NLL, for labels without rows on seen labels that play unseen
ones. Results go to benchmarks/results/embedding.md.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from selection_bed import vectors_of

from llmlabel.data import gold_index, load, part, with_columns
from llmlabel.label.embedding import label_vectors
from llmlabel.label.neighbours import (
    label_cache,
    label_neighbours,
    label_prototypes,
    label_test_time,
)
from llmlabel.label.singular import intrinsic_dimension, label_singular
from llmlabel.label.zeroshot import bias_curve, harmonic, label_zero_shot
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import accuracy, brier, ece, nll
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data" / "clinc150_oos"
SEEDS, SPLITS = range(2), range(5)
SCALES = (14.3, 20.0, 30.0, 45.0)

Labeler = Callable[[Dataset], Dataset]


def spaces(data: Path) -> tuple[LabelSpace, LabelSpace]:
    """The 150 intents, flat, and below their 10 domains."""
    tree = json.loads((data / "taxonomy.json").read_text("utf-8"))
    domains = [{"id": f"domain:{d}", "name": d.replace("_", " ")} for d in tree]
    intents = [
        {"id": i, "name": i.replace("_", " "), "parents": [f"domain:{d}"]}
        for d in tree
        for i in tree[d]
    ]
    flat = [{"id": one["id"], "name": one["name"]} for one in intents]
    return load_labels(flat), load_labels(domains + intents)


def with_vectors(rows: Dataset, vectors: np.ndarray) -> Dataset:
    return with_columns(rows, {"vector": (list(vectors), List(Value("float32")))})


def rows_of(data: Path, cache: Path | None) -> dict[str, Dataset]:
    """In-scope rows with vectors, by split; `label` is the intent."""
    rows = load(data / "clinc150_oos.jsonl")
    rows = with_vectors(rows, vectors_of(rows["text"][:], cache, "clinc"))
    rows = rows.select([i for i, label in enumerate(rows["label"]) if label != "oos"])
    return {name: part(rows, split=name) for name in ("train", "validation", "test")}


def golden(rows: Dataset, labels: LabelSpace) -> Dataset:
    gold = [[labels.index(label)] for label in rows["label"]]
    return with_columns(rows, {"gold": (gold, List(Value("int32")))})


def anchors_of(labels: LabelSpace, cache: Path | None, name: str) -> Dataset:
    rows = Dataset.from_dict({"id": list(labels.ids), "text": labels.texts()})
    return with_vectors(rows, vectors_of(labels.texts(), cache, name))


def some_of_each(rows: Dataset, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Positions of `count` rows of each intent, and of the others."""
    found: dict[str, list[int]] = {}
    labels = rows["label"][:]
    for i in np.random.default_rng(seed).permutation(len(rows)).tolist():
        found.setdefault(labels[i], []).append(i)
    few = [i for mine in found.values() for i in mine[:count]]
    return few, sorted(set(range(len(rows))) - set(few))


def measures(rows: Dataset, labels: LabelSpace) -> tuple[float, ...]:
    """Accuracy, NLL, ECE and Brier score; missing mass is spread over labels not stored for NLL."""
    soft, gold = SoftLabels.from_dataset(rows, labels), gold_index(rows, labels)
    spread = np.exp(soft.log_dense())
    probs = soft.dense()
    return accuracy(probs, gold), nll(spread, gold), ece(probs, gold), brier(probs, gold)


def best_of(
    choices: list[dict[str, Any]],
    call: Callable[..., Dataset],
    validation: Dataset,
    labels: LabelSpace,
) -> dict[str, Any]:
    scores = [measures(call(validation, **choice), labels)[1] for choice in choices]
    return choices[int(np.argmin(scores))]


def grid(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


def names_alone(rows: Dataset, anchors: Dataset, labels: LabelSpace, *, scale: float) -> Dataset:
    """`label_embedding`, from vectors that are there."""
    logits = scale * np.array(rows["vector"][:]) @ label_vectors(anchors, labels).T
    return SoftLabels.from_scores(logits - logits.max(axis=1, keepdims=True), labels).add_to(rows)


def logistic(rows: Dataset, few: Dataset, labels: LabelSpace, *, c: float) -> Dataset:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=200)
    model.fit(np.array(few["vector"][:]), gold_index(few, labels))
    probs = model.predict_proba(np.array(rows["vector"][:]))  # every label has rows
    return SoftLabels.from_dense(probs, labels).add_to(rows)


def few_rows(parts: dict[str, Dataset], labels: LabelSpace, anchors: Dataset, shots: int) -> str:
    """One line a method: mean over draws of what is measured on the test rows."""
    parts = {name: golden(rows, labels) for name, rows in parts.items()}
    found: dict[str, list[tuple[float, ...]]] = {}
    said: dict[str, list[str]] = {}
    for seed in SEEDS:
        chosen, rest = some_of_each(parts["train"], shots, seed)
        few, others = parts["train"].select(chosen), parts["train"].select(rest)
        unlabelled = others.select(np.random.default_rng(seed).permutation(len(others))[:3000])
        validation = parts["validation"].select(some_of_each(parts["validation"], 6, seed)[0])
        dimension = round(intrinsic_dimension(unlabelled), 1)
        k_and_unknown = grid(k=(5, 10, 30), unknown=(0.02, 0.1))

        def singular(rows: Dataset, few: Dataset = few, **options: Any) -> Dataset:
            return label_singular(rows, few, labels, **options)

        def one_nn(rows: Dataset, few: Dataset = few, **options: Any) -> Dataset:
            return label_neighbours(rows, few, labels, k=1, **options)

        def cache(rows: Dataset, pool: Dataset = unlabelled, **options: Any) -> Dataset:
            return label_cache(rows, pool, anchors, labels, **options)

        methods: dict[str, tuple[Callable[..., Dataset], list[dict[str, Any]]]] = {
            "label names (label_embedding)": (
                lambda rows, **o: names_alone(rows, anchors, labels, **o),
                grid(scale=SCALES),
            ),
            "ComCa, alpha .6, not centred": (
                cache,
                grid(scale=(1.0, 5.0), centring=("none",)),
            ),
            "ComCa, alpha .6, centred": (
                cache,
                grid(scale=(5.0, 15.0), beta=(1.0, 5.5)),
            ),
            "ComCa, alpha 0 (hard values)": (
                cache,
                grid(scale=(5.0, 15.0), beta=(1.0, 5.5), alpha=(0.0,)),
            ),
            "1-NN": (one_nn, grid(unknown=(0.1, 0.2, 0.3, 0.4, 0.5))),
            "k-NN": (
                lambda rows, few=few, **o: label_neighbours(rows, few, labels, **o),
                grid(k=(5, 10, 30, 100), scale=SCALES, unknown=(0.02,)),
            ),
            "prototypes": (
                lambda rows, few=few, **o: label_prototypes(rows, few, labels, **o),
                grid(scale=(15.0, 20.0, 25.0, 30.0)),
            ),
            "PS-TTL": (
                lambda rows, few=few, **o: label_test_time(rows, few, labels, **o),
                grid(scale=(15.0, 20.0, 25.0), cuts=((0.2, 0.5), (0.5, 0.8), (0.8, 0.95))),
            ),
            "singular kernel, two-NN of the pool": (singular, k_and_unknown),
            f"singular kernel, two-NN of {len(unlabelled):,} unlabelled rows": (
                lambda rows, d=dimension, f=singular, **o: f(rows, dimension=d, **o),
                k_and_unknown,
            ),
            "singular kernel, leave-one-out": (
                lambda rows, f=singular, **o: f(rows, dimension="leave_one_out", **o),
                k_and_unknown,
            ),
            "logistic regression": (
                lambda rows, few=few, **o: logistic(rows, few, labels, **o),
                grid(c=(100.0, 300.0)),
            ),
        }
        if shots == 1:  # no row can be left out
            del methods["singular kernel, leave-one-out"]
        for name, (call, choices) in methods.items():
            choice = best_of(choices, call, validation, labels)
            got = call(parts["test"], **choice)
            found.setdefault(name, []).append(measures(got, labels))
            said.setdefault(name, []).append(", ".join(f"{k} {v}" for k, v in choice.items()))
            print(shots, seed, name, np.round(found[name][-1], 4), said[name][-1], flush=True)
        print("two-NN of the unlabelled rows", dimension)
    lines = [
        "| method | accuracy, % | NLL | ECE | Brier | chosen in the first draw |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        a, n, e, b = np.mean(values, axis=0)
        spread = 100 * np.std([value[0] for value in values])
        lines.append(
            f"| {name} | {100 * a:.1f} ± {spread:.1f} | {n:.3f} | {e:.3f} | {b:.3f} | {said[name][0]} |"
        )
    for one, other in (
        ("PS-TTL", "prototypes"),
        ("singular kernel, two-NN of the pool", "1-NN"),
        ("singular kernel, two-NN of the pool", "k-NN"),
        ("ComCa, alpha 0 (hard values)", "label names (label_embedding)"),
        ("ComCa, alpha .6, centred", "label names (label_embedding)"),
    ):
        pairs = zip(found[one], found[other], strict=True)
        gaps = [100 * (mine[0] - theirs[0]) for mine, theirs in pairs]
        each = ", ".join(f"{gap:+.1f}" for gap in gaps)
        lines.append(f"\n{one} - {other}: {np.mean(gaps):+.1f} points of accuracy ({each}).")
    return "\n".join(lines)


def generalized(parts: dict[str, Dataset], tree: LabelSpace, anchors: Dataset) -> str:
    """One line a method: mean over splits of S, U and H."""
    parts = {name: golden(rows, tree) for name, rows in parts.items()}
    leaves = np.array(tree.leaves)
    edges = [(tree.ids[c], p) for c in leaves.tolist() for p in tree.parents[c]]
    found: dict[str, list[tuple[float, ...]]] = {}
    for split in SPLITS:
        rng = np.random.default_rng(split)
        unseen = rng.permutation(leaves)[:30]
        seen = np.isin(np.arange(len(tree)), np.setdiff1d(leaves, unseen))
        turned = rng.permutation(len(edges))
        shuffled = [(edges[i][0], edges[j][1]) for i, j in enumerate(turned.tolist())]
        gold = {name: gold_index(rows, tree) for name, rows in parts.items()}
        pool = parts["train"].select(np.flatnonzero(seen[gold["train"]]))
        pool = pool.select(some_of_each(pool, 50, split)[0])
        validation = parts["validation"].select(np.flatnonzero(seen[gold["validation"]]))
        test, truth = parts["test"], gold["test"]

        def result(probs: np.ndarray, seen: np.ndarray = seen, truth: np.ndarray = truth) -> Any:
            best = probs.argmax(axis=1)
            right, known = best == truth, seen[truth]
            return right[known].mean(), right[~known].mean(), harmonic(best, truth, seen)

        names = np.array(test["vector"][:]) @ label_vectors(anchors, tree).T
        names[:, ~np.isin(np.arange(len(tree)), leaves)] = -np.inf
        alone = result(names)
        found.setdefault("label names alone", []).append((np.nan, np.nan, *alone, alone[2]))
        variants: dict[str, dict[str, Any]] = {
            "prototypes, names for unseen": {"hops": 0, "ridge": (1e9,)},
            "mapping (ESZSL)": {"method": "mapping", "ridge": (1.0, 10.0, 100.0)},
            "propagation, no graph (hops 0)": {"hops": 0, "ridge": (0.1, 1.0, 10.0)},
            "propagation, domains": {"ridge": (0.1, 1.0, 10.0)},
            "propagation, shuffled domains": {"edges": shuffled, "ridge": (0.1, 1.0, 10.0)},
        }
        for name, options in variants.items():
            rest = {key: value for key, value in options.items() if key != "ridge"}
            curves = {
                ridge: bias_curve(pool, validation, anchors, tree, ridge=ridge, **rest)
                for ridge in options["ridge"]
            }
            ridge = max(curves, key=lambda one: max(curves[one].values()))
            bias = max(curves[ridge], key=lambda one: curves[ridge][one])
            both = []
            for stacked in (0.0, bias):
                got = label_zero_shot(
                    test, pool, anchors, tree, ridge=ridge, seen_bias=stacked, **rest
                )
                both.append(result(SoftLabels.from_dataset(got, tree).dense()))
            found.setdefault(name, []).append((ridge, bias, *both[1], both[0][2]))
            print(split, name, np.round(found[name][-1], 4), flush=True)
    lines = [
        "| method | ridge | seen bias | seen, % | unseen, % | H, % | H without bias |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        ridge, bias, s, u, h, plain = np.array(values).T
        chosen = "" if np.isnan(ridge).all() else "/".join(f"{one:g}" for one in sorted(set(ridge)))
        biases = "" if np.isnan(bias).all() else f"{bias.mean():.2f}"
        lines.append(
            f"| {name} | {chosen} | {biases} | {100 * s.mean():.1f} | {100 * u.mean():.1f} | "
            f"{100 * h.mean():.1f} ± {100 * h.std():.1f} | {100 * plain.mean():.1f} |"
        )
    h = {name: np.array(values)[:, 4] for name, values in found.items()}
    for one, other in (
        ("propagation, domains", "label names alone"),
        ("propagation, domains", "propagation, shuffled domains"),
        ("propagation, domains", "propagation, no graph (hops 0)"),
        ("mapping (ESZSL)", "label names alone"),
    ):
        gaps = 100 * (h[one] - h[other])
        lines.append(f"\n{one} - {other}: {gaps.mean():+.1f} ± {gaps.std():.1f} points of H.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, help="folder that keeps the vectors")
    parser.add_argument("--shots", type=int, nargs="*", default=[5])
    parser.add_argument("--only-few", action="store_true", help="not the intents without a row")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "embedding.md")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(f"skipped: {arguments.data} is not there")
        return
    flat, tree = spaces(arguments.data)
    parts = rows_of(arguments.data, arguments.cache)
    text = ["# Labels from vectors", "", "`python benchmarks/embedding.py`, MiniLM, CLINC150."]
    anchors = anchors_of(tree, arguments.cache, "clinc_labels")
    if not arguments.only_few:
        text += [
            "",
            "## 30 of 150 intents without a row",
            "",
            "Means of 5 splits; 50 rows of each seen intent; ridge and seen bias chosen on validation rows "
            "of seen intents; test accuracy over all 150.",
            "",
            generalized(parts, tree, anchors),
        ]
    anchors = anchors.select([tree.index(id) for id in flat.ids])
    for shots in arguments.shots:
        text += [
            "",
            f"## {shots} gold rows an intent",
            "",
            f"Means of {len(SEEDS)} draws; settings by NLL on 900 validation rows; 4,500 test rows. Label names and "
            "ComCa (3,000 unlabelled rows) use no gold but the validation rows' for the settings.",
            "",
            few_rows(parts, flat, anchors, shots),
        ]
    arguments.output.write_text("\n".join(text) + "\n", "utf-8")


if __name__ == "__main__":
    main()
