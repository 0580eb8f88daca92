from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.select.learnable import LLKD
from llmlabel.softlabels import SoftLabels
from llmlabel.train import distill as module
from llmlabel.train.classifier import predict, train_classifier
from llmlabel.train.distill import _Course, distill
from llmlabel.train.network import LoRA

LABELS = load_labels(["animal", "money", "mat"])
MANY = load_labels(["animal", "money", "mat"], multilabel=True)
SMALL = {
    "pooling": "mean",
    "learning_rate": 0.02,
    "num_train_epochs": 3,
    "dtype": "float32",
    "per_device_train_batch_size": 8,
    "lora": LoRA(r=4, alpha=16, dropout=0.0),
    "max_length": 64,
}


def table(labels: LabelSpace = LABELS, rows: int = 24, seed: int = 0) -> Dataset:
    """Rows whose teacher is unsure; every fourth has no gold, the first one has gold of no label."""
    kinds = ["the cat sat", "business and money", "on the mat"]
    rng = np.random.default_rng(seed)
    texts = [f"{kinds[i % 3]} {i}" for i in range(rows)]
    probs = rng.dirichlet(np.ones(3), size=rows) * 0.9
    gold = [None if i % 4 == 3 else [i % 3] if i else [] for i in range(rows)]
    found = Dataset.from_dict({"id": [f"r{i}" for i in range(rows)], "text": texts})
    found = with_columns(found, {"gold": (gold, List(Value("int32")))})
    return SoftLabels.from_dense(probs, labels).add_to(found)


def captured(monkeypatch: pytest.MonkeyPatch, *given: Any, **more: Any) -> dict[str, Any]:
    """What `distill` gives to the training."""
    found: dict[str, Any] = {}

    def train_student(rows: Any, labels: Any, losses: Any, settings: Any, **others: Any) -> Path:
        found.update(rows=rows, losses=losses, settings=settings, **others)
        return Path("model")

    monkeypatch.setattr(module, "train_student", train_student)
    distill(*given, model="m", output=Path("o"), **more)
    return found


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_is_the_formula(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    alpha, temperature = float(rng.uniform(0, 1)), float(rng.uniform(0.5, 4))
    rows = table(seed=seed)
    found = captured(monkeypatch, rows, LABELS, alpha=alpha, temperature=temperature)
    logits = rng.normal(size=(24, 3)) * 3
    values = found["losses"](torch.from_numpy(logits), list(range(24)))
    for row in range(24):
        teacher = np.array(found["rows"].targets[row])
        gold = rows["gold"][row]
        tempered = softmax(np.log(teacher) / temperature)
        student = softmax(logits[row] / temperature)
        taught = temperature**2 * (tempered * np.log(tempered / student)).sum()
        if not gold:  # unknown, or none of the labels
            expected = taught
        else:
            given = -np.log(softmax(logits[row])[gold[0]])
            expected = (1 - alpha) * given + alpha * taught
        assert values[row].item() == pytest.approx(expected, rel=1e-6)  # stored in float32


def test_multilabel_rows_without_any_label_learn_from_gold(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(MANY)
    found = captured(monkeypatch, rows, MANY, alpha=0.25)
    logits = np.random.default_rng(0).normal(size=(24, 3))
    values = found["losses"](torch.from_numpy(logits), list(range(24)))
    ones = 1 / (1 + np.exp(-logits))
    for row in (0, 1, 3):
        teacher = np.array(found["rows"].targets[row])

        def entropy(true: np.ndarray, row: int = row) -> float:
            return -(true * np.log(ones[row]) + (1 - true) * np.log(1 - ones[row])).sum()

        gold = {0: np.zeros(3), 1: np.array([0.0, 1.0, 0.0])}.get(row)
        expected = entropy(teacher)
        if gold is not None:
            expected = 0.75 * entropy(gold) + 0.25 * entropy(teacher)
        assert values[row].item() == pytest.approx(expected, rel=1e-6)


def test_the_teacher_leaves_after_kd_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = captured(monkeypatch, table(), LABELS, alpha=1.0, kd_steps=2)
    logits, rows = torch.zeros(24, 3), list(range(24))
    with_teacher = found["losses"](logits, rows)
    found["after_update"]()
    assert torch.equal(found["losses"](logits, rows), with_teacher)
    found["after_update"]()
    alone = found["losses"](logits, rows)
    known = sum(bool(gold) for gold in table()["gold"])
    for row, gold in enumerate(table()["gold"]):
        assert alone[row].item() == pytest.approx(np.log(3) * 24 / known if gold else 0.0)


def test_rows_with_gold_alone_count_as_much_as_all_rows_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop divides by the weight of all rows: rows without gold must not make it smaller."""
    weights = [1.0 + row % 3 for row in range(24)]
    rows = with_columns(table(), {"weight": (weights, Value("float64"))})
    found = captured(monkeypatch, rows, LABELS, kd_steps=1)
    found["after_update"]()
    values = found["losses"](torch.zeros(24, 3), list(range(24))).numpy()
    assert np.average(values, weights=weights) == pytest.approx(np.log(3))


def test_gold_of_many_rows_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole table of 5,000 rows is that of its halves, which no block cuts."""
    rows = table(MANY, rows=5000)
    halves = [range(2500), range(2500, 5000)]
    logits = np.random.default_rng(0).normal(size=(5000, 3))
    whole = captured(monkeypatch, rows, MANY, alpha=0.0)["losses"](
        torch.from_numpy(logits), list(range(5000))
    )
    for part in halves:
        found = captured(monkeypatch, rows.select(part), MANY, alpha=0.0)
        values = found["losses"](torch.from_numpy(logits[part]), list(range(2500)))
        assert torch.equal(values, whole[part.start : part.stop])


def test_llkd_weighs_by_the_thresholds_before_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    plain = captured(monkeypatch, table(), LABELS)
    found = captured(monkeypatch, table(), LABELS, select="llkd")
    twin = LLKD(3)
    kept = []
    for _ in range(12):
        chosen = rng.permutation(24)[:8]
        logits = torch.from_numpy(rng.normal(size=(8, 3)) * 3)
        teacher = found["rows"].targets[chosen]
        student = np.array([softmax(one) for one in logits.numpy()])
        entropy = -(student * np.log(student)).sum(axis=1) / np.log(3)
        signals = (teacher.argmax(axis=1), teacher.max(axis=1), entropy)
        taken, weights = twin.keep(*signals)
        kept.append(taken.mean())
        values = plain["losses"](logits, chosen.tolist()).numpy() * weights
        twin.move(twin.sums(*signals))
        # in two passes, of which the thresholds know nothing
        parts = [
            found["losses"](logits[part], chosen[part].tolist()) for part in (slice(3), slice(3, 8))
        ]
        found["after_update"]()
        np.testing.assert_allclose(torch.cat(parts).numpy(), values, rtol=1e-6, atol=1e-12)
    assert 0 < np.mean(kept) < 1


def test_a_course_is_kept_in_checkpoints() -> None:
    one, two = _Course(3), _Course(3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        probs, logits = rng.dirichlet(np.ones(3), size=5), rng.normal(size=(5, 3))
        one.weights(torch.from_numpy(probs), torch.from_numpy(logits))
        one.end_update()
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    assert (two.updates, two.thresholds.tau_student) == (3, one.thresholds.tau_student)
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value)


def test_the_teacher_alone_is_train_classifier(tiny_encoder: Path, tmp_path: Path) -> None:
    given = {**SMALL, "model": str(tiny_encoder)}
    one = distill(table(), LABELS, output=tmp_path / "one", **given)
    two = train_classifier(table(), LABELS, output=tmp_path / "two", **given)
    probs = [SoftLabels.from_dataset(predict(table(), model=m), LABELS).dense() for m in (one, two)]
    np.testing.assert_allclose(*probs, atol=1e-4)


def test_gold_alone_is_train_classifier_on_gold(tiny_encoder: Path, tmp_path: Path) -> None:
    given = {**SMALL, "model": str(tiny_encoder)}
    rows = table().select([i for i in range(24) if i % 4 != 3 and i])
    hard = np.eye(3)[[gold[0] for gold in rows["gold"]]]
    one = distill(rows, LABELS, alpha=0.0, output=tmp_path / "one", **given)
    gold = SoftLabels.from_dense(hard, LABELS).add_to(rows)
    two = train_classifier(gold, LABELS, output=tmp_path / "two", **given)
    probs = [SoftLabels.from_dataset(predict(rows, model=m), LABELS).dense() for m in (one, two)]
    np.testing.assert_allclose(*probs, atol=1e-4)


def test_passes_change_nothing_where_rows_are_selected(tiny_encoder: Path, tmp_path: Path) -> None:
    given = {**SMALL, "model": str(tiny_encoder), "select": "llkd", "alpha": 0.5, "kd_steps": 5}
    one = distill(table(), LABELS, output=tmp_path / "one", **given)
    two = distill(table(), LABELS, output=tmp_path / "two", pass_tokens=1, **given)
    probs = [SoftLabels.from_dataset(predict(table(), model=m), LABELS).dense() for m in (one, two)]
    np.testing.assert_allclose(*probs, atol=1e-4)


def test_bad_input(tmp_path: Path) -> None:
    bare = table().remove_columns(["gold"])
    for rows, labels, given, message in [
        (table(), LABELS, {"alpha": 1.5}, "alpha, the share of the teacher, .* got 1.5"),
        (table(), LABELS, {"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        (table(), LABELS, {"kd_steps": 0}, "kd_steps must be at least 1; got 0"),
        (table(MANY), MANY, {"select": "llkd"}, r"select='llkd' needs labels that exclude each"),
        (bare, LABELS, {"alpha": 0.5}, "need gold, and no row has any; load it, or give alpha=1"),
        (bare, LABELS, {"kd_steps": 3}, "need gold, and no row has any"),
    ]:
        with pytest.raises(ValueError, match=message):
            distill(rows, labels, model="m", output=tmp_path, **given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("select", "LLKD", "select is one of all, llkd; got 'LLKD'"),
        ("divergence", "KL", r"divergence is one of cross_entropy, kl, .*; got 'KL'"),
    ],
)
def test_misspelt_choices_are_named(name: str, value: str, message: str) -> None:
    """Here types are checked before; a caller of Python's own has nothing but this."""
    given = {"alpha": 1.0, "temperature": 1.0, "kd_steps": None, "select": "all"}
    with pytest.raises(ValueError, match=message):
        module._check(given | {"divergence": "kl", name: value}, LABELS)
