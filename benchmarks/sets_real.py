"""Prediction sets on texts, in hierarchies and in a long tail, for benchmarks/sets.py.

clinc150 is read by MiniLM, whose vectors stay frozen, and by logistic regression on the training rows in
scope; the headings of the Harmonized System (hs_codes) by TF-IDF and naive Bayes. Thresholds and
choices are made on validation rows; test rows measure only.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.p_values import p_values
from llmlabel.calibrate.pac import allowed_errors, fit_pac_tree, predict_tree
from llmlabel.calibrate.quantile import conformal_quantile
from llmlabel.calibrate.scores import Nonconformity, block_scores
from llmlabel.calibrate.trees import (
    add_nodes,
    fit_subtrees,
    path_contents,
    path_trees,
    predict_subtrees,
)
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics.sets import promised_coverage
from llmlabel.softlabels import SoftLabels

Found = dict[str, Any]
ALPHA = 0.1
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 1000.0)
LEAST = 1e-4
"""Smaller probabilities are not stored in a hierarchy."""


# --------------------------------------------------------------------------------- clinc150


def clinc(data: Path, work: Path) -> tuple[list[dict[str, str]], list[str], np.ndarray]:
    """Rows, intents, and the probabilities of the rows that are not for training."""
    folder = data / "clinc150_oos"
    lines = (folder / "clinc150_oos.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    held = [row for row in rows if row["split"] != "train"]
    taxonomy = json.loads((folder / "taxonomy.json").read_text("utf-8"))
    intents = [intent for domain in taxonomy.values() for intent in domain]
    kept = work / "clinc_probs.npy"
    if not kept.is_file():
        from sklearn.linear_model import LogisticRegression

        seen = {" ".join(row["text"].lower().split()) for row in held}
        train = [
            at
            for at, row in enumerate(rows)
            if row["split"] == "train"
            and row["label"] != "oos"
            and " ".join(row["text"].lower().split()) not in seen
        ]
        vectors = clinc_vectors(rows, work)
        gold = [intents.index(rows[at]["label"]) for at in train]
        model = LogisticRegression(C=20, max_iter=60, tol=1e-3).fit(vectors[train], gold)
        others = [at for at, row in enumerate(rows) if row["split"] != "train"]
        np.save(kept, model.predict_proba(vectors[others]).astype(np.float32))
    return held, intents, np.load(kept)


def clinc_vectors(rows: list[dict[str, str]], work: Path) -> np.ndarray:
    kept = work / "clinc.npz"
    if not kept.is_file():
        from llmlabel import models
        from llmlabel.label.embedding import unit_vectors

        encoder = models.load_encoder(models.MINILM)
        np.savez(kept, vectors=unit_vectors(encoder, [row["text"] for row in rows]))
    return np.load(kept)["vectors"]


def flat(names: Sequence[str]) -> LabelSpace:
    count = len(names)
    return LabelSpace(tuple(names), tuple(names), ("",) * count, ((),) * count)


def table(ids: list[str], gold: list[list[int]], probs: np.ndarray, space: LabelSpace) -> Dataset:
    rows = SoftLabels.from_dense(probs, space).add_to(Dataset.from_dict({"id": ids}))
    return with_columns(rows, {"gold": (gold, List(Value("int32")))})


def tempered(temperature: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """LAC of the softmax of log p / temperature: the hotter, the nearer to log p itself."""

    def score(probs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        logs = np.log(np.maximum(probs, 1e-30)) / temperature
        powers = np.exp(logs - logs.max(axis=1, keepdims=True))
        return 1 - powers / powers.sum(axis=1, keepdims=True)

    return score


def scope(data: Path, work: Path) -> Found:
    """Coverage in scope, and how well the largest p-value of a row tells what is out of scope."""
    from sklearn.metrics import roc_auc_score

    held, intents, probs = clinc(data, work)
    space = flat(intents)
    outside = np.array([row["label"] == "oos" for row in held])
    test = np.array([row["split"] == "test" for row in held])
    half = np.zeros(len(held), dtype=bool)
    valid = np.flatnonzero(~test & ~outside)
    half[np.random.default_rng(0).permutation(valid)[: len(valid) // 2]] = True

    def part(wanted: np.ndarray) -> Dataset:
        at = np.flatnonzero(wanted).tolist()
        gold = [[] if outside[i] else [intents.index(held[i]["label"])] for i in at]
        return table([held[i]["id"] for i in at], gold, probs[at], space)

    gold_rows, choice, new = part(half), part(~test & ~half), part(test)
    choosing, measuring = outside[~test & ~half], outside[test]
    promised = promised_coverage(calibration_rows=len(gold_rows), rows=4500, alpha=ALPHA)
    found: Found = {
        "rows": {"calibration": len(gold_rows), "test": int((~measuring).sum())},
        "accuracy": float(
            np.mean([held[i]["label"] == intents[probs[i].argmax()] for i in np.flatnonzero(test)])
            / (~measuring).mean()
        ),
        "baseline": {
            "choice": roc_auc_score(choosing, -probs[~test & ~half].max(axis=1)),
            "test": roc_auc_score(measuring, -probs[test].max(axis=1)),
        },
        "promised": promised,
        "scores": {},
    }
    scores: dict[str, Any] = {"lac": "lac", "aps": "aps", "margin": "margin"}
    scores |= {f"tempered {t:g}": tempered(t) for t in TEMPERATURES[1:]}
    inside = np.flatnonzero(~measuring)
    truth = [ids[0] for ids in new.select(inside)["gold"][:]]
    for name, score in scores.items():
        fitted = fit_conformal(gold_rows, space, alpha=ALPHA, score=score)
        given = {"score": score} if callable(score) else {}
        sets = predict_sets(new, space, fitted, **given)["set_ids"][:]
        levels = np.array(p_values(new, space, fitted, **given)["p_value"][:])
        other = np.array(p_values(choice, space, fitted, **given)["p_value"][:])
        found["scores"][name] = {
            "coverage": np.mean(
                [true in sets[i] for i, true in zip(inside.tolist(), truth, strict=True)]
            ),
            "size": np.mean([len(sets[i]) for i in inside.tolist()]),
            "choice": roc_auc_score(choosing, -other),
            "auroc": roc_auc_score(measuring, -levels),
            "flagged": [(levels[measuring] <= 0.1).mean(), (levels[~measuring] <= 0.1).mean()],
        }
    return found


# -------------------------------------------------------------------------------- hierarchies


def hierarchy(data: Path, work: Path) -> Found:
    return {"clinc150": clinc_tree(data, work), "hs_codes": headings(data)}


def clinc_tree(data: Path, work: Path) -> Found:
    held, intents, probs = clinc(data, work)
    taxonomy = json.loads((data / "clinc150_oos" / "taxonomy.json").read_text("utf-8"))
    names = (*(f"domain {name}" for name in taxonomy), *intents)
    parents = ((),) * len(taxonomy) + tuple(
        (f"domain {name}",) for name, below in taxonomy.items() for _ in below
    )
    space = LabelSpace(names, names, ("",) * len(names), parents)
    wide = np.zeros((len(held), len(names)), dtype=np.float32)
    wide[:, len(taxonomy) :] = probs

    def part(split: str) -> Dataset:
        at = [i for i, row in enumerate(held) if row["split"] == split and row["label"] != "oos"]
        gold = [[len(taxonomy) + intents.index(held[i]["label"])] for i in at]
        return stored([held[i]["id"] for i in at], gold, wide[at], space)

    return in_words(part("validation"), part("test"), space, len(taxonomy))


def stored(ids: list[str], gold: list[list[int]], probs: np.ndarray, space: LabelSpace) -> Dataset:
    return table(ids, gold, np.where(probs < LEAST, 0, probs), space)


def headings(data: Path) -> Found:
    """Subheadings are the texts, their headings the labels, below chapters and sections."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import MultinomialNB

    with gzip.open(data / "hs_codes" / "hs_codes.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sections = sorted({row["section"] for row in rows})
    chapters, heads, texts = ([row for row in rows if row["level"] == n] for n in (2, 4, 6))
    names = (*(f"S{name}" for name in sections), *(row["id"] for row in chapters + heads))
    parents = ((),) * len(sections) + tuple((f"S{row['section']}",) for row in chapters)
    parents += tuple((row["parent"],) for row in heads)
    space = LabelSpace(names, names, ("",) * len(names), parents)
    place = {name: at for at, name in enumerate(names)}

    def draw(row: dict[str, str]) -> int:
        return int(hashlib.sha1(row["id"].encode()).hexdigest()[:8], 16)  # no secret

    train = [row for row in texts if draw(row) % 5]
    reader = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    words = reader.fit_transform([row["text"] for row in train])
    model = MultinomialNB(alpha=0.01, fit_prior=False).fit(words, [row["parent"] for row in train])
    columns = [place[name] for name in model.classes_]

    def part(odd: int) -> Dataset:
        some = [row for row in texts if draw(row) % 5 == 0 and (draw(row) // 5) % 2 == odd]
        wide = np.zeros((len(some), len(names)))
        wide[:, columns] = model.predict_proba(reader.transform([row["text"] for row in some]))
        gold = [[place[row["parent"]]] for row in some]
        return stored([row["id"] for row in some], gold, wide, space)

    return in_words(part(0), part(1), space, len(sections) + len(chapters))


def in_words(cal: Dataset, new: Dataset, space: LabelSpace, inner: int) -> Found:
    """Sets said as few nodes, and answers cut off where they may be wrong."""
    truth = [ids[0] for ids in new["gold"][:]]
    answers = SoftLabels.from_dataset(new, space).dense().argmax(axis=1)
    found: Found = {
        "rows": [len(cal), len(new)],
        "accuracy": float((answers == np.array(truth)).mean()),
        "sets": {},
        "pac": {},
    }

    def measured(rows: Dataset) -> list[float]:
        sets, nodes = rows["set_ids"][:], rows["set_nodes"][:]
        held = np.mean([true in some for true, some in zip(truth, sets, strict=True)])
        leaves = np.mean([sum(label >= inner for label in some) for some in sets])
        return [float(held), float(leaves), float(np.mean([len(some) for some in nodes]))]

    for alpha in (0.05, 0.1, 0.2):
        for subtrees in (1, 2, 4):
            fitted = fit_subtrees(cal, space, alpha=alpha, subtrees=subtrees)
            found["sets"][f"{alpha} {subtrees}"] = measured(predict_subtrees(new, space, fitted))
        try:
            plain = fit_conformal(cal, space, alpha=alpha)
        except ValueError as error:  # too many true labels are not stored
            found["sets"][f"{alpha} lac"] = str(error)
        else:
            sets = add_nodes(predict_sets(new, space, plain), space)
            found["sets"][f"{alpha} lac"] = measured(sets)
    paths, new_paths = path_trees(cal, space), path_trees(new, space)
    right = [path_contents(space, ids[0]) for ids in cal["gold"][:]]
    new_right = [path_contents(space, true) for true in truth]
    budgets = np.geomspace(0.005, 8, 40).tolist()
    for epsilon in (0.02, 0.05, 0.1, 0.15):
        fitted = fit_pac_tree(paths, right, epsilon=epsilon, delta=0.05, budgets=budgets)
        wrong, depth = [], []
        for tree, true in zip(new_paths, new_right, strict=True):
            kept = predict_tree(tree, fitted)
            said = [name for name, keep in zip(tree.contents, kept, strict=True) if keep]
            wrong.append(not set(said) <= set(true))
            depth.append(len(said))
        # The same promise for the whole path or nothing, by the probability of the answer.
        errors = allowed_errors(len(paths), epsilon=epsilon, delta=0.05)
        costs = [t.costs.sum() for t, r in zip(paths, right, strict=True) if failed(t, r)]
        limit = sorted(costs)[errors] if len(costs) > errors else np.inf
        sure = np.array([tree.costs.sum() < limit for tree in new_paths])
        bad = np.array([failed(t, r) for t, r in zip(new_paths, new_right, strict=True)])
        whole = np.array([len(tree.costs) for tree in new_paths]) * sure
        found["pac"][str(epsilon)] = [
            *(float(np.mean(wrong)), float(np.mean(depth))),
            *(float((sure & bad).mean()), float(whole.mean())),
        ]
    return found


def failed(tree: Any, true: tuple[str, ...]) -> bool:
    return bool(tree.contents) and tree.contents[-1] not in true


# ---------------------------------------------------------------------------------- long tails

LABELS = 60
PRIOR = 1 / np.arange(1, LABELS + 1) ** 1.1
PRIOR /= PRIOR.sum()
CALIBRATION, EACH = 2000, 100


def long_tail(rng: np.random.Generator, gold: np.ndarray, knows: float) -> np.ndarray:
    """Probabilities of a model that knows (1), or half knows, how frequent the labels are."""
    logits = rng.normal(0, 1.2, (len(gold), LABELS)) + knows * np.log(PRIOR)
    logits[np.arange(len(gold)), gold] += rng.normal(2.5, 1.5, len(gold))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def tail(data: Path, work: Path) -> Found:
    """Prevalence-adjusted sets beside LAC, at equal mean size and at equal coverage; ten draws."""
    return {str(knows): [one_tail(seed, knows) for seed in range(10)] for knows in (0.5, 1.0)}


def one_tail(seed: int, knows: float) -> dict[str, list[float]]:
    """Coverage, mean size, macro-coverage and under-coverage gap."""
    rng = np.random.default_rng(seed)
    other, gold = rng.choice(LABELS, 5000, p=PRIOR), rng.choice(LABELS, CALIBRATION, p=PRIOR)
    rows = long_tail(rng, gold, knows)
    new = np.repeat(np.arange(LABELS), EACH)
    probs = long_tail(rng, new, knows)
    mean = long_tail(rng, other, knows).mean(axis=0)  # what the model says of other rows
    plain, adjusted = Nonconformity(), Nonconformity(prior=tuple((mean / mean.sum()).tolist()))
    none = np.zeros(CALIBRATION)
    limit = conformal_quantile(block_scores(rows, plain, none)[np.arange(len(gold)), gold], ALPHA)
    found = {"lac": tail_quality(probs, new, plain, limit)}
    place = round(found["lac"][1] * CALIBRATION) - 1
    scores = block_scores(rows, adjusted, none).ravel()
    equal = float(np.partition(scores, place)[place])
    own = block_scores(rows, adjusted, none)[np.arange(len(gold)), gold]
    promised = conformal_quantile(own, ALPHA)
    return {
        **found,
        "adjusted": tail_quality(probs, new, adjusted, equal),
        "promised": tail_quality(probs, new, adjusted, promised),
    }


def tail_quality(
    probs: np.ndarray, new: np.ndarray, how: Nonconformity, limit: float
) -> list[float]:
    inside = block_scores(probs, how, np.zeros(len(new))) <= limit
    own = inside[np.arange(len(new)), new].reshape(LABELS, EACH).mean(axis=1)
    sizes = inside.sum(axis=1).reshape(LABELS, EACH).mean(axis=1)
    gap = np.maximum(1 - ALPHA - own, 0).mean()
    return [float(own @ PRIOR), float(sizes @ PRIOR), float(own.mean()), float(gap)]
