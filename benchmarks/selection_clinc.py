"""CLINC intents for benchmarks/selection.py: what to ask a teacher, and LLKD step by step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, List, Value
from selection_bed import one_hot, softmax, spread, student

from llmlabel.data import load, with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.loss.soft import soft_cross_entropy
from llmlabel.select.diverse import select_badge, select_k_center
from llmlabel.select.learnable import LLKD
from llmlabel.select.prune import keep_random
from llmlabel.select.robust import select_rad
from llmlabel.select.uncertain import select_uncertain
from llmlabel.softlabels import SoftLabels


def clinc(
    data: Path, domains: int, width: int
) -> tuple[LabelSpace, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Intents of the first domains; vectors by TF-IDF and SVD, gold, and the words for teachers."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    order = ["banking", "credit_cards", "kitchen_and_dining", "home", "auto_and_commute"]
    table = load(data / "clinc150_oos" / "clinc150_oos.jsonl")
    rows = [r for r in table if r["domain"] in order[:domains]]
    labels = load_labels(sorted({r["label"] for r in rows}))
    train = [r for r in rows if r["split"] == "train"]
    test = [r for r in rows if r["split"] == "test"]
    reader = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    words = reader.fit_transform([r["text"] for r in train])
    svd = TruncatedSVD(width, random_state=0).fit(words)

    def both(some: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        found = svd.transform(reader.transform([r["text"] for r in some]))
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found, np.array([labels.index(r["label"]) for r in some])

    parts = {"train": both(train), "test": both(test)}
    parts["words"] = (words, parts["train"][1])
    return labels, parts


def queries(data: Path, seeds: range, *, soft: bool) -> str:
    """RAD and others ask a teacher that is sometimes wrong: 4 rounds of 150 questions."""
    from sklearn.linear_model import LogisticRegression

    labels, parts = clinc(data, 4, 150)
    (x, gold), (test, truth) = parts["train"], parts["test"]
    words = parts["words"][0]
    strategies: dict[str, Callable[[Dataset, int, float, int], Dataset]] = {
        "random": lambda rows, n, error, s: keep_random(rows, share=n / len(rows), seed=s),
        "margin": lambda rows, n, error, s: select_uncertain(rows, labels, budget=n),
        "entropy": lambda rows, n, error, s: select_uncertain(
            rows, labels, budget=n, measure="entropy"
        ),
        "RAD": lambda rows, n, error, s: select_rad(
            rows, labels, budget=n, teacher_error=error, seed=s
        ),
        "k-center": lambda rows, n, error, s: select_k_center(rows, budget=n, seed=s),
        "BADGE": lambda rows, n, error, s: select_badge(rows, labels, budget=n, seed=s),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in strategies}
    alone = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        by_label = [rng.permutation(np.flatnonzero(gold == c)) for c in range(len(labels))]
        taught_rows = np.concatenate([rows[:12] for rows in by_label])
        start = np.concatenate([rows[12:14] for rows in by_label])
        check = np.concatenate([rows[14:19] for rows in by_label])
        pool = np.setdiff1d(np.arange(len(gold)), np.concatenate([start, taught_rows, check]))
        teacher = LogisticRegression(C=20, max_iter=200).fit(words[taught_rows], gold[taught_rows])
        answers = teacher.predict_proba(words)
        if not soft:
            answers = one_hot(answers.argmax(axis=1), len(labels))
        error = float((answers[check].argmax(axis=1) != gold[check]).mean())
        first = linear(x[start], one_hot(gold[start], len(labels)), seed)
        alone.append(100 * float((first(test).argmax(axis=1) == truth).mean()))
        for name, ask in strategies.items():
            asked: list[int] = []
            for turn in range(4):
                known = np.concatenate([start, np.array(asked, dtype=int)])
                targets = np.concatenate([one_hot(gold[start], len(labels)), answers[asked]])
                model = linear(x[known], targets, seed)
                left = np.setdiff1d(pool, asked)
                rows = Dataset.from_dict({"id": [f"{i:05}" for i in left]})
                rows = SoftLabels.from_dense(softmax(model(x[left])), labels).add_to(rows)
                rows = with_columns(rows, {"vector": (list(x[left]), List(Value("float32")))})
                taken = np.array(ask(rows, 150, error, 10 * seed + turn)["selected"][:])
                asked += left[taken].tolist()
            known = np.concatenate([start, np.array(asked)])
            targets = np.concatenate([one_hot(gold[start], len(labels)), answers[asked]])
            logits = linear(x[known], targets, seed)(test)
            right = (answers[asked].argmax(axis=1) == gold[asked]).mean()
            accuracy = (logits.argmax(axis=1) == truth).mean()
            found[name].append((100 * float(accuracy), 100 * float(right)))
    lines = [
        f"## What to ask a teacher, {'soft' if soft else 'hard'} answers (`select_rad` and others)",
        "",
        f"CLINC, 60 intents. A teacher of 12 texts each is asked 4 times about 150 rows; a linear "
        f"student of 2 texts each learns its answers. {len(seeds)} seeds. Student alone "
        f"{spread(alone)}.",
        "",
        "| strategy | student | teacher right where asked |",
        "|---|---|---|",
    ]
    for name, values in found.items():
        accuracy, right = zip(*values, strict=True)
        lines.append(f"| {name} | {spread(list(accuracy))} | {spread(list(right))} |")
    return "\n".join(lines) + "\n"


def linear(
    inputs: np.ndarray, targets: np.ndarray, seed: int
) -> Callable[[np.ndarray], np.ndarray]:
    return student(inputs, targets, seed=seed, hidden=0, steps=150)


def learning_with_less(data: Path, seeds: range) -> str:
    """LLKD and its halves, step by step; the share of the presentations that is used."""
    from sklearn.linear_model import LogisticRegression

    labels, parts = clinc(data, 4, 150)
    (x, gold), (test, truth) = parts["train"], parts["test"]
    words, count = parts["words"][0], len(labels)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        by_label = [rng.permutation(np.flatnonzero(gold == c)) for c in range(count)]
        few = np.concatenate([rows[:6] for rows in by_label])
        pool = np.concatenate([rows[6:] for rows in by_label])
        teacher = LogisticRegression(C=20, max_iter=200).fit(words[few], gold[few])
        probs = teacher.predict_proba(words[pool]) ** 2
        probs /= probs.sum(axis=1, keepdims=True)
        clean = one_hot(gold[pool], count)
        for mode, given, name in (
            *((mode, probs, mode) for mode in ("all", "random", "teacher", "student", "LLKD")),
            ("all", clean, "gold: all"),
            ("LLKD", clean, "gold: LLKD"),
        ):
            logits, used = llkd_run(x[pool], given, test, mode=mode, seed=seed)
            accuracy = 100 * float((logits.argmax(axis=1) == truth).mean())
            found.setdefault(name, []).append((accuracy, 100 * used))
    lines = [
        "## Step by step (`LLKD`)",
        "",
        "CLINC, 60 intents, a teacher of 6 texts each labels the rest; softmax regression on 150 "
        f"dimensions, 12 epochs of batches of 64. {len(seeds)} seeds.",
        "",
        "| rows (of gold: a teacher without mistakes) | student | presentations used, % |",
        "|---|---|---|",
    ]
    for mode, values in found.items():
        accuracy, used = zip(*values, strict=True)
        lines.append(f"| {mode} | {spread(list(accuracy))} | {np.mean(used):.0f} |")
    return "\n".join(lines) + "\n"


def llkd_run(
    x: np.ndarray, probs: np.ndarray, test: np.ndarray, *, mode: str, seed: int
) -> tuple[np.ndarray, float]:
    """Test logits after 12 epochs of hard pseudo-labels, and the share of rows that were used."""
    count, rng, used = probs.shape[1], np.random.default_rng(seed), 0.0
    weight = torch.zeros(x.shape[1], count, requires_grad=True)
    bias = torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    inputs, targets = torch.from_numpy(x).float(), torch.from_numpy(one_hot(probs.argmax(1), count))
    selector = LLKD(count)
    for _ in range(12):
        order = rng.permutation(len(x))
        for start in range(0, len(x), 64):
            rows = order[start : start + 64]
            logits = 10 * (inputs[rows] @ weight) + bias
            doubt = softmax(logits.detach().double().numpy())
            certain = np.full(doubt.shape, 1 / count)
            weights = np.ones(len(rows))
            if mode == "LLKD":
                weights = selector.step(probs[rows], doubt)[1]
            elif mode == "teacher":  # every student equally unsure
                weights = selector.step(probs[rows], certain)[1]
            elif mode == "student":
                label = probs[rows].argmax(axis=1)
                weights = selector.step(one_hot(label, count), doubt)[1]
            elif mode == "random":
                weights = (rng.uniform(size=len(rows)) < 0.3).astype(np.float64)
            used += float((weights > 0).mean()) * len(rows) / len(x) / 12
            if not weights.any():
                continue
            losses = soft_cross_entropy(logits, targets[rows].float())
            optimizer.zero_grad()
            (losses * torch.from_numpy(weights).float()).sum().div(float(weights.sum())).backward()
            optimizer.step()
    with torch.no_grad():
        return (10 * (torch.from_numpy(test).float() @ weight) + bias).numpy(), used
