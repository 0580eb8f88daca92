from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List, Value

from llmlabel.data import read_parquet, with_columns
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train import memorisation as module
from llmlabel.train.classifier import predict, train_classifier
from llmlabel.train.memorisation import early_probs, find_memorised, measure_memorised
from llmlabel.train.network import LoRA
from llmlabel.train.settings import EARLY, EarlyLearning

LABELS = load_labels(["animal", "money"])
ROWS, WRONG = 40, (3, 10, 17, 24)


def table() -> Dataset:
    """Rows of two kinds, four of them with the wrong label; the gold of the last ten is unknown."""
    kinds = ["the cat sat", "business and money"]
    rows = Dataset.from_dict(
        {
            "id": [f"r{i}" for i in range(ROWS)],
            "text": [kinds[i % 2] + " mat" * (i % 3) + f" {i}" for i in range(ROWS)],
        }
    )
    gold = [[i % 2] if i < 30 else None for i in range(ROWS)]
    given = np.array([(i + (i in WRONG)) % 2 for i in range(ROWS)])
    rows = SoftLabels.from_dense(np.eye(2)[given] * 0.8 + 0.1, LABELS).add_to(rows)
    return with_columns(rows, {"gold": (gold, List(Value("int32")))})


@pytest.fixture(scope="module")
def student(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(
        table(),
        LABELS,
        model=str(tiny_encoder),
        output=tmp_path_factory.mktemp("student") / "model",
        pooling="mean",
        learning_rate=0.02,
        num_train_epochs=12,
        dtype="float32",
        per_device_train_batch_size=8,
        lora=LoRA(r=4, alpha=16, dropout=0.0),
        max_length=64,
        early_learning=EarlyLearning(penalty_weight=0.0),
    )


def test_watching_changes_no_weight(student: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    given = {"pooling": "mean", "learning_rate": 0.02, "num_train_epochs": 12, "dtype": "float32"}
    plain = train_classifier(
        table(),
        LABELS,
        model=str(tiny_encoder),
        output=tmp_path / "plain",
        per_device_train_batch_size=8,
        lora=LoRA(r=4, alpha=16, dropout=0.0),
        max_length=64,
        **given,
    )
    for name in ("head.safetensors", "adapter_model.safetensors"):
        assert (plain / name).read_bytes() == (student / name).read_bytes()
    assert not (plain / EARLY).exists()


def test_wrong_labels_are_suspect(student: Path) -> None:
    found = find_memorised(table(), LABELS, model=student)
    assert [i for i, one in enumerate(found["suspect"]) if one] == list(WRONG)
    numbers = measure_memorised(found, LABELS)
    assert numbers["rows"] == ROWS
    assert numbers["suspect"] == len(WRONG) / ROWS
    assert (numbers["gold_rows"], numbers["wrong"]) == (30, len(WRONG) / 30)
    assert (numbers["precision"], numbers["recall"]) == (1.0, 1.0)
    memorised = sum(map(bool, found["memorised"]))
    assert numbers["memorised"] == memorised / ROWS
    # rows 3 and 17 are money and labelled animal, rows 10 and 24 the other way round
    assert {
        id: (one["rows"], one["suspect"], one["early"]) for id, one in numbers["labels"].items()
    } == {"animal": (20, 2, "money"), "money": (20, 2, "animal")}
    assert sum(one["memorised"] for one in numbers["labels"].values()) == memorised


def test_numbers_by_label_and_margins_of_three_labels(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = load_labels(["a", "b", "c"])
    early = np.array([[4, 3, 3], [1, 6, 3], [1, 3, 6], [0, 1, 9], [0, 0, 8], [0, 0, 0]]) / 20
    given, said = [0, 0, 0, 1, 1, 0], [0, 0, 2, 1, 1, 0]

    def soft(ids: list[int]) -> Dataset:
        table = Dataset.from_dict({"id": list("uvwxyz"), "text": ["t"] * 6})
        return SoftLabels.from_dense(np.eye(3)[ids], labels).add_to(table)

    monkeypatch.setattr(module, "predict", lambda *_, **__: soft(said))
    monkeypatch.setattr(module, "_early", lambda *_: (early, early.sum(axis=1) > 0))
    found = find_memorised(soft(given), labels, model=student)
    assert found["suspect"][:] == [False, True, True, True, True, None]
    assert found["memorised"][:] == [False, True, False, True, True, None]
    assert found["early_id"][:] == [0, 1, 2, 2, 2, None]
    np.testing.assert_allclose(found["early_margin"][:5], [0.1, -0.5, -0.5, -0.8, -1], atol=1e-6)
    assert measure_memorised(found, labels) == {
        **{"rows": 5, "suspect": 4 / 5, "memorised": 3 / 5},
        "labels": {
            "a": {"rows": 3, "suspect": 2, "memorised": 1, "early": "b"},
            "b": {"rows": 2, "suspect": 2, "memorised": 2, "early": "c"},
        },
    }


def test_the_columns_are_what_they_say(student: Path) -> None:
    rows = table()
    strangers = with_columns(rows.select(range(3)), {"id": (["x", "y", "z"], Value("string"))})
    from datasets import concatenate_datasets

    found = find_memorised(concatenate_datasets([rows, strangers]), LABELS, model=student)
    assert found["suspect"][ROWS:] == found["memorised"][ROWS:] == [None] * 3
    for name in ("early_id", "early_margin"):
        assert found[name][ROWS:] == [None] * 3
    kept = {row["id"]: row for row in read_parquet(student / EARLY)}
    early = {id: row["label_ids"][0] for id, row in kept.items()}
    said = [ids[0] for ids in predict(rows, model=student)["label_ids"]]
    for i, row in enumerate(rows):
        suspect = early[row["id"]] != row["label_ids"][0]
        assert found["early_id"][i] == early[row["id"]]
        first, second = kept[row["id"]]["label_probs"]  # of two labels, the most probable first
        margin = (first - second) / (first + second)
        assert found["early_margin"][i] == pytest.approx(-margin if suspect else margin, abs=1e-6)
        assert found["suspect"][i] == suspect
        assert found["memorised"][i] == (suspect and said[i] == row["label_ids"][0])
    assert measure_memorised(found, LABELS)["rows"] == ROWS


def test_cleanlab_s_input(student: Path) -> None:
    rows = table().select(range(ROWS - 1, -1, -1))
    probs = early_probs(rows, LABELS, model=student)
    assert probs.shape == (ROWS, 2)
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    given = np.array([ids[0] for ids in rows["label_ids"]])
    assert sorted(np.flatnonzero(probs.argmax(axis=1) != given)) == sorted(
        ROWS - 1 - np.array(WRONG)
    )


def test_numbers_without_gold_and_without_suspects(student: Path) -> None:
    found = find_memorised(table(), LABELS, model=student)
    assert set(measure_memorised(found.remove_columns(["gold"]), LABELS)) == {
        "rows",
        "suspect",
        "memorised",
        "labels",
    }
    sure = found.select([i for i in range(30) if i not in WRONG])
    numbers = measure_memorised(sure, LABELS)
    assert (numbers["precision"], numbers["recall"], numbers["wrong"]) == (None, None, 0.0)


def test_bad_input(student: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"early\.parquet is missing; train with early_learning"):
        find_memorised(table(), LABELS, model=tmp_path / "plain")
    many = load_labels(["animal", "money"], multilabel=True)
    with pytest.raises(ValueError, match="where labels exclude each other"):
        early_probs(table(), many, model=student)
    other = with_columns(table().select([0]), {"id": (["x"], Value("string"))})
    with pytest.raises(ValueError, match="the row with id 'x' was not trained on"):
        early_probs(other, LABELS, model=student)
