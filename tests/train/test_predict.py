"""What a student says, and folders that hold none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from train.students import (
    LABELS,
    table,
    train,
)

from llmlabel.calibrate.saved import load_calibrator
from llmlabel.calibrate.temperature import apply_temperature, fit_temperature
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels, save_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train.classifier import predict
from llmlabel.train.distill import distill


@pytest.fixture(scope="module")
def student(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_encoder, tmp_path_factory.mktemp("student") / "model")


def test_predictions_do_not_depend_on_batch_padding_or_order(student: Path) -> None:
    rows = table()
    whole = SoftLabels.from_dataset(predict(rows, model=student), LABELS).dense()
    for given in ({"pass_tokens": 1}, {"block_rows": 5}, {"pass_tokens": 100_000}):
        other = SoftLabels.from_dataset(predict(rows, model=student, **given), LABELS).dense()
        np.testing.assert_allclose(other, whole, atol=1e-5)
    back = predict(rows.select(range(23, -1, -1)), model=student)
    np.testing.assert_allclose(
        SoftLabels.from_dataset(back, LABELS).dense()[::-1], whole, atol=1e-5
    )


def test_empty_and_long_texts(student: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"id": ["a", "b", "c"], "text": ["", "cat " * 20_000, "cat"]})
    short = train(table(), tiny_encoder, tmp_path / "m", max_length=32, num_train_epochs=1)
    got = predict(rows, model=short)
    assert got["label_ids"][0] == []
    assert got["error"][0] == "empty text"
    assert got["error"][1].endswith("the limit is 32")
    assert len(got["label_ids"][1]) == 2
    assert got["error"][2] is None


def test_reloaded_students_are_the_trained_ones(student: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(student, tmp_path / "moved")
    one, two = (predict(table(), model=m)["label_probs"][:] for m in (student, moved))
    assert one == two
    config = json.loads((student / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_nothing_of_a_teacher_is_left_in_a_students_rows(student: Path) -> None:
    rows = label_direct(table(), FakeEngine(), LABELS)
    got = predict(rows, model=student)
    assert set(got["label_mass"]) == set(got["prompt_sha"]) == {None}
    assert got.column_names == rows.column_names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head.safetensors", r"model '.*damaged' cannot be loaded \(SafetensorError"),
        ("adapter_model.safetensors", r"model '.*damaged' cannot be loaded \(SafetensorError"),
        ("adapter_config.json", r"model '.*damaged' cannot be loaded \(JSONDecodeError"),
        ("model_card.json", r"model '.*damaged' cannot be loaded \(JSONDecodeError"),
        ("labels.json", r"damaged/labels.json: line \d+ is not JSON"),
    ],
)
def test_a_damaged_student_is_named(student: Path, tmp_path: Path, name: str, message: str) -> None:
    damaged = shutil.copytree(student, tmp_path / "damaged")
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=message) as caught:
        predict(table(), model=damaged)
    assert "\n" not in str(caught.value)


def test_a_student_with_the_labels_of_another(student: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(student, tmp_path / "mixed")
    save_labels(load_labels(["animal", "other"]), mixed / "labels.json")
    with pytest.raises(ValueError, match=r"mixed: labels.json is of label space .* was trained on"):
        predict(table(), model=mixed)


def test_validation_with_gold_calibrates(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = table()
    texts = [f"{text} again" for text in rows["text"]] * 6
    held = Dataset.from_dict({"text": texts, "id": [f"v{i}" for i in range(len(texts))]})
    held = held.add_column("gold", [[i % 2] for i in range(len(texts))])
    folder = train(rows, tiny_encoder, tmp_path / "m", validation=held)
    said = predict(held, model=folder)
    expected = fit_temperature(said, LABELS)
    assert load_calibrator(folder / "calibration.json") == expected
    got = predict(held, model=folder, calibrated=True)
    scaled = apply_temperature(said, LABELS, expected)
    assert expected.value < 1  # soft labels of 0.9 and 0.8, and gold is always right
    assert got["label_probs"][:] == scaled["label_probs"][:] != said["label_probs"][:]
    train(rows, tiny_encoder, folder, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"it has no calibration\.json; train with `validation`"):
        predict(held, model=folder, calibrated=True)


def test_a_student_of_gold_and_teacher_is_calibrated_too(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = table().add_column("gold", [[i % 2] for i in range(len(table()))])
    held = rows.select(range(9)).map(
        lambda row: {"id": f"v{row['id']}", "text": f"{row['text']} again"}
    )
    given = {"model": tiny_encoder, "num_train_epochs": 1, "max_length": 32}
    few = distill(rows, LABELS, output=tmp_path / "few", validation=held, **given)
    assert not (few / "calibration.json").exists()  # 9 rows tell no temperature
    held = rows.map(lambda row: {"id": f"v{row['id']}", "text": f"{row['text']} again"})
    folder = distill(rows, LABELS, output=tmp_path / "m", validation=held, **given)
    assert load_calibrator(folder / "calibration.json").rows == len(held)
