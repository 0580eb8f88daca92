"""Rows that a student learns, and rows that it is validated on."""

import json
import tracemalloc
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List, Value
from scipy.sparse import csr_array
from train.students import (
    LABELS,
    files,
    killed_in_update,
    losses_of,
    table,
    train,
    validation_of,
)

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine.adapt import gold_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train.classifier import predict
from llmlabel.train.student import training_rows, validation_rows

# --------------------------------------------------------------------------------------------- rows


def test_rows_of_no_label_are_learned_where_they_were_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = load_labels(["animal", "money"], multilabel=True)
    probs = np.array([[0.9, 0.1], [0.0, 0.0], [0.0, 0.0]])
    rows = SoftLabels.from_dense(probs, many).add_to(table(3))
    assert losses_of(monkeypatch, rows, many)["rows"].ids == ["r0"]  # nobody says that it was read
    told = with_columns(rows, {"error": ([None, None, "unreadable"], Value("string"))})
    assert losses_of(monkeypatch, told, many)["rows"].ids == ["r0", "r1"]
    gold = with_columns(table(3), {"gold": ([[0], [], [1]], List(Value("int32")))})
    assert losses_of(monkeypatch, gold_labels(gold, many), many)["rows"].ids == ["r0", "r1", "r2"]
    single = with_columns(table(3), {"error": ([None] * 3, Value("string"))})
    empty = SoftLabels.from_dense(probs, LABELS).add_to(single)
    assert losses_of(monkeypatch, empty, LABELS)["rows"].ids == ["r0"]


def test_targets_are_those_of_the_rows_and_are_kept_sparse() -> None:
    """20,000 rows of 3 labels among 1,000 took 160 MB as a table; one value stored as 0 is none."""
    labels = load_labels([f"l{i}" for i in range(1000)])
    rng = np.random.default_rng(0)
    ids = np.sort(rng.permutation(1000)[: 3 * 333].reshape(3, 333), axis=0)[
        :, rng.integers(0, 333, 20_000)
    ].T
    probs = rng.dirichlet(np.ones(3), 20_000).astype(np.float32) * np.float32(0.9)
    probs[0, 0] = 0.0
    stored = csr_array((probs.ravel(), ids.ravel(), np.arange(20_001) * 3), shape=(20_000, 1000))
    texts = Dataset.from_dict({"text": ["a text"] * 20_000})
    dataset = SoftLabels(stored, labels.fingerprint).add_to(texts)
    tracemalloc.start()
    rows = training_rows(dataset, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert rows.soft.nnz == 59_999
    expected = probs[:8].astype(np.float64) / probs[:8].astype(np.float64).sum(
        axis=1, keepdims=True
    )
    found = rows.block(list(range(8))).numpy()
    np.testing.assert_allclose(np.take_along_axis(found, ids[:8], axis=1), expected, rtol=1e-14)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)


# --------------------------------------------------------------------------------------- validation


def test_validation_rows_that_nobody_could_read_are_left_out() -> None:
    many = load_labels(["a", "b"], multilabel=True)
    probs = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    soft = SoftLabels.from_dense(probs, many).add_to(table(3))
    ids, _, targets = validation_rows(soft, many)
    assert ids == ["r0", "r2"]
    assert targets.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    gold = with_columns(soft, {"gold": ([[0], [], None], List(Value("int32")))})
    ids, _, targets = validation_rows(gold, many)
    assert ids == ["r0", "r1"]  # of gold, no label says that none is true
    assert targets.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_validation_keeps_the_best_epoch_and_counts_overlap(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    gold = [[i % 2] if i else None for i in range(10)]
    seen = with_columns(table(10), {"gold": (gold, List(Value("int32")))})
    with pytest.warns(UserWarning, match="9 of 9 validation rows repeat a training row"):
        folder = train(table(), tiny_encoder, tmp_path, validation=seen, learning_rate=0.3)
    card = json.loads((folder / "model_card.json").read_text())
    told = card["validation"]
    assert (told["rows"], told["repeat_training_rows"], len(told["epochs"])) == (9, 9, 6)
    values = [one["loss"] for one in told["epochs"]]
    assert told["best_epoch"] == int(np.argmin(values))
    probs = SoftLabels.from_dataset(predict(seen, model=folder), LABELS).dense()[1:]
    own = -np.log(probs[np.arange(9), [(i + 1) % 2 for i in range(9)]]).mean()
    assert own == pytest.approx(min(values), rel=1e-3)

    soft = table(6).select([4, 5])
    strangers = with_columns(
        soft, {"id": (["a", "b"], Value("string")), "text": (["new", "words"], Value("string"))}
    )
    folder = train(table(), tiny_encoder, tmp_path / "soft", validation=strangers)
    card = json.loads((folder / "model_card.json").read_text())
    assert card["validation"]["repeat_training_rows"] == 0
    with pytest.raises(ValueError, match="none of the 1 validation rows has a text and a label"):
        train(table(), tiny_encoder, tmp_path / "none", validation=seen.select([0]))


def test_a_checkpoint_with_other_validation_rows_is_not_continued(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the cat", "money", "a cat", "business"]
    right, wrong = validation_of(texts, [0, 1, 0, 1]), validation_of(texts, [1, 0, 1, 0])
    for number, seen in enumerate([right, None]):
        place = tmp_path / str(number)
        given = {"num_train_epochs": 2}
        killed_in_update(
            4, monkeypatch, partial(train, table(), tiny_encoder, place), validation=wrong, **given
        )
        again = train(table(), tiny_encoder, place, validation=seen, **given)
        fresh = train(table(), tiny_encoder, tmp_path / f"f{number}", validation=seen, **given)
        assert files(again) == files(fresh)


def test_patience_needs_validation_rows(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early_stopping_patience=2 needs `validation`, rows"):
        train(table(), tiny_encoder, tmp_path, early_stopping_patience=2)


def test_a_repeated_row_is_told_by_id_or_words_and_nothing_else(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    rows, texts = table(4), ["new", "words"]
    with_numbers = with_columns(rows, {"id": ([5, 6, 7, 8], Value("int64"))})
    nameless = rows.remove_columns("id")
    marks = with_columns(rows, {"text": (["!!!", "...", "a", "b"], Value("string"))})
    for number, (trained, seen, expected) in enumerate(
        [
            (with_numbers, validation_of(texts, [0, 1], id=[8, 9]), 1),
            (nameless, validation_of(texts, [0, 1], id=["0", "1"]), 0),
            (nameless, validation_of(texts, [0, 1]), 0),
            (marks, validation_of(["???", "!!!"], [0, 1]), 1),
        ]
    ):
        warned = pytest.warns(UserWarning, match="1 of 2") if expected else nullcontext()
        given = {"validation": seen, "num_train_epochs": 1}
        with warned:
            folder = train(trained, tiny_encoder, tmp_path / str(number), **given)
        card = json.loads((folder / "model_card.json").read_text())
        assert card["validation"]["repeat_training_rows"] == expected


def test_balanced_labels_are_balanced_in_the_validation_loss_too(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    """With three of four rows of the first label, a row of the second counts three times as much."""
    probs = np.eye(2)[[0, 0, 0, 1] * 6]
    rows = SoftLabels.from_dense(probs, LABELS).add_to(table(24))
    seen = validation_of(["new", "words", "here"], [0, 1, 1], id=["a", "b", "c"])
    folder = train(
        rows, tiny_encoder, tmp_path, validation=seen, class_weights="balanced", num_train_epochs=1
    )
    card = json.loads((folder / "model_card.json").read_text())
    found = SoftLabels.from_dataset(predict(seen, model=folder), LABELS).dense()
    each = -np.log(found[np.arange(3), [0, 1, 1]])
    expected = (each * [2 / 3, 2, 2]).mean()
    assert card["validation"]["epochs"][0]["loss"] == pytest.approx(expected, rel=1e-5)
