"""How a classifier is trained, and what its losses are."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from safetensors import safe_open
from train.students import (
    LABELS,
    files,
    killed_in_update,
    losses_of,
    table,
    train,
)

from llmlabel.data import read_parquet, with_columns
from llmlabel.labelspace import load_labels
from llmlabel.loss.longtail import LongTailLoss
from llmlabel.softlabels import SoftLabels
from llmlabel.train import checkpoint, classifier
from llmlabel.train.classifier import predict
from llmlabel.train.network import LabelSupervised, LoRA
from llmlabel.train.settings import EARLY, EarlyLearning, LongTail


@pytest.fixture(scope="module")
def student(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_encoder, tmp_path_factory.mktemp("student") / "model")


def test_it_learns_soft_labels(student: Path) -> None:
    got = predict(table(), model=student)
    probs = SoftLabels.from_dataset(got, LABELS).dense()
    np.testing.assert_allclose(probs[0::2].mean(axis=0), [0.9, 0.1], atol=0.08)
    np.testing.assert_allclose(probs[1::2].mean(axis=0), [0.2, 0.8], atol=0.08)
    assert got["engine"][0].startswith("student:tiny-encoder")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_decoders_learn_by_the_same_trainer(
    tiny_decoder: Path, tmp_path: Path, bidirectional: bool
) -> None:
    folder = train(table(), tiny_decoder, tmp_path, pooling="last", bidirectional=bidirectional)
    probs = SoftLabels.from_dataset(predict(table(), model=folder), LABELS).dense()
    assert probs[0::2, 0].min() > 0.5 > probs[1::2, 0].max()
    assert (
        json.loads((folder / "model_card.json").read_text())["settings"]["bidirectional"]
        is bidirectional
    )


def test_same_seed_same_bytes_and_other_seed_other_bytes(
    student: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    again = train(table(), tiny_encoder, tmp_path / "again")
    assert files(again) == files(student)
    other = train(table(), tiny_encoder, tmp_path / "other", seed=1)
    assert files(other)["head.safetensors"] != files(student)["head.safetensors"]


def test_gold_is_never_read(student: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    wrong = with_columns(
        table(), {"gold": ([[int(i % 2 == 0)] for i in range(24)], List(Value("int32")))}
    )
    assert files(train(wrong, tiny_encoder, tmp_path / "m")) == files(student)


def test_rows_of_weight_zero_change_nothing(
    student: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    rows = table(30)
    probs = np.vstack(
        [SoftLabels.from_dataset(table(), LABELS).dense(), [[0.0, 1.0]] * 5, [[0.0, 0.0]]]
    )
    rows = SoftLabels.from_dense(probs, LABELS).add_to(rows)
    weights = [1.0] * 24 + [0.0] * 5 + [1.0]
    rows = with_columns(rows, {"weight": (weights, Value("float32"))})
    trained = files(train(rows, tiny_encoder, tmp_path / "m"))
    assert trained["head.safetensors"] == files(student)["head.safetensors"]
    assert json.loads(trained["model_card.json"])["rows"] == {"given": 30, "trained": 24}


def test_weights_count_like_copies(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = table(4)
    doubled = Dataset.from_dict({**rows.to_dict(), "id": [f"d{i}" for i in range(4)]})
    copies = Dataset.from_dict(
        {k: [*rows[k], *[doubled[k][1]]] for k in rows.column_names}, features=rows.features
    )
    weighted = with_columns(rows, {"weight": ([1.0, 2.0, 1.0, 1.0], Value("float32"))})
    given = {"num_train_epochs": 3, "per_device_train_batch_size": 8}
    one = train(copies, tiny_encoder, tmp_path / "one", **given)
    two = train(weighted, tiny_encoder, tmp_path / "two", **given)
    first, second = (
        SoftLabels.from_dataset(predict(rows, model=m), LABELS).dense() for m in (one, two)
    )
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_multilabel_trains_each_label_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    labels = load_labels(["animal", "mat"], multilabel=True)
    rows = table(labels=labels)
    probs = np.array([[0.9, 0.9], [0.1, 0.9]])[np.arange(24) % 2]
    rows = SoftLabels.from_dense(probs, labels).add_to(rows)
    folder = train(rows, tiny_encoder, tmp_path, labels)
    got = SoftLabels.from_dataset(predict(rows, model=folder), labels).dense()
    assert got[:, 1].min() > 0.6
    assert got[0::2, 0].min() > 0.5 > got[1::2, 0].max()


def test_accumulated_batches_equal_one_large_batch(tiny_encoder: Path, tmp_path: Path) -> None:
    large = train(table(), tiny_encoder, tmp_path / "l", num_train_epochs=2)
    small = train(
        table(),
        tiny_encoder,
        tmp_path / "s",
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    one, two = (
        SoftLabels.from_dataset(predict(table(), model=m), LABELS).dense() for m in (large, small)
    )
    np.testing.assert_allclose(one, two, atol=1e-4)


def test_training_leaves_the_global_generator_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(table(), tiny_encoder, tmp_path, num_train_epochs=1, lora=LoRA(r=4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_input(student: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    empty = SoftLabels.from_dense(np.zeros((24, 2)), LABELS).add_to(table())
    with pytest.raises(ValueError, match="none of the 24 rows has a text, a soft label"):
        train(empty, tiny_encoder, tmp_path)
    bad = with_columns(table(), {"weight": ([1.0] * 23 + [-1.0], Value("float32"))})
    with pytest.raises(ValueError, match=r"row with id 'r23' has the weight -1.0"):
        train(bad, tiny_encoder, tmp_path)
    with pytest.raises(ValueError, match="label space"):
        train(table(), tiny_encoder, tmp_path, load_labels(["animal", "other"]))
    with pytest.raises(FileNotFoundError, match=r"model_card.json is missing"):
        predict(table(), model=tiny_encoder)
    with pytest.raises(ValueError, match=r"max_length=300 is more than the 128 tokens"):
        train(table(), tiny_encoder, tmp_path / "long", max_length=300)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    with pytest.raises(ValueError, match=r"holds README.md, which is no file of a student"):
        train(table(), tiny_encoder, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my notes"
    for name, value in {
        "num_train_epochs": 0,
        "learning_rate": float("nan"),
        "per_device_train_batch_size": 0,
        "gradient_accumulation_steps": 0,
        "max_length": 0,
    }.items():
        with pytest.raises(ValueError, match=rf"{name} must be above 0; got {value}"):
            train(table(), tiny_encoder, tmp_path / "new", **{name: value})
    with pytest.raises(ValueError, match=r"warmup_ratio must be between 0 and 1; got 2"):
        train(table(), tiny_encoder, tmp_path / "new", warmup_ratio=2.0)
    half = shutil.copytree(student, tmp_path / "half")
    (half / "model_card.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_card.json is missing.*finished"):
        predict(table(), model=half)


# --------------------------------------------------------------------------- losses and checkpoints


def test_smoothing_and_class_weights_are_their_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(9)
    logits = np.random.default_rng(0).normal(size=(9, 2))
    found = losses_of(
        monkeypatch, rows, LABELS, label_smoothing_factor=0.2, class_weights="balanced"
    )
    values = found["losses"](torch.from_numpy(logits), list(range(9)))
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.array(found["rows"].targets)
    counts = targets.sum(axis=0)
    weights = counts.sum() / (2 * counts)
    expected = -(weights * (0.8 * targets + 0.1) * log_probs).sum(axis=1)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)
    assert weights[1] > 1 > weights[0]

    many = load_labels(["animal", "money"], multilabel=True)
    rows = SoftLabels.from_dense(targets, many).add_to(rows)
    found = losses_of(monkeypatch, rows, many, class_weights="balanced")
    values = found["losses"](torch.from_numpy(logits), list(range(9)))
    ones = 1 / (1 + np.exp(-logits))
    positive = targets * (counts.max() / counts) * np.log(ones)
    expected = -(positive + (1 - targets) * np.log(1 - ones)).sum(axis=1)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)


def test_labels_count_alike_by_weight_whatever_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of weight 3 and 1; remains of 0.001 a row are no class to be balanced."""
    probs = np.array([[0.999, 0.0, 0.001]] * 8 + [[0.0, 0.999, 0.001]] * 8)
    counts = np.array([8 * 1.5 * 0.999, 8 * 0.5 * 0.999, 1.0])
    for multilabel, expected in ((False, counts.sum() / (3 * counts)), (True, counts[0] / counts)):
        labels = load_labels(["a", "b", "c"], multilabel=multilabel)
        for scale in (1.0, 0.01):
            weights = [3.0 * scale] * 8 + [scale] * 8
            rows = with_columns(table(16), {"weight": (weights, Value("float64"))})
            rows = SoftLabels.from_dense(probs, labels).add_to(rows)
            found = losses_of(monkeypatch, rows, labels, class_weights="balanced")
            values = found["losses"](torch.zeros(16, 3), list(range(16)))
            given = (probs @ expected) * np.log(3)
            if multilabel:
                given = (probs @ expected + (1 - probs).sum(axis=1)) * np.log(2)
                np.testing.assert_allclose(found["more"]["pos_weight"], expected, rtol=1e-5)
            np.testing.assert_allclose(values.numpy(), given, rtol=1e-5)


def test_early_learning_adds_its_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 2))
    plain = losses_of(monkeypatch, table(4), LABELS)["losses"]
    given = {"early_learning": EarlyLearning(penalty_weight=2.0, beta=0.5)}
    found = losses_of(monkeypatch, table(4), LABELS, **given)
    chosen, target = [2, 0, 3, 1], np.zeros((4, 2))
    for _ in range(3):
        logits = logits * 1.5
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        target = 0.5 * target + 0.5 * probs
        penalty = np.log(1 - (target * probs).sum(axis=1))
        expected = plain(torch.from_numpy(logits), chosen).numpy() + 2 * penalty
        for _ in range(2):  # what is asked again before the update is over is the same
            got = found["losses"](torch.from_numpy(logits), chosen).numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-5)
        found["more"]["after_update"]()


def test_a_killed_training_continues_to_the_same_bytes(
    student: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def dies(module: Any, inputs: Any) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: dies(module, inputs) if isinstance(module, LabelSupervised) else None
    )
    with pytest.raises(KeyboardInterrupt):
        train(table(), tiny_encoder, tmp_path / "m", save_steps=1)
    hook.remove()
    assert (tmp_path / "m" / checkpoint.NAME).is_file()
    again = train(table(), tiny_encoder, tmp_path / "m", save_steps=1)
    expected = files(student)
    card = json.loads(expected["model_card.json"])
    card["settings"]["save_steps"] = 1
    assert json.loads(files(again)["model_card.json"]) == card
    for name in ("head.safetensors", "adapter_model.safetensors"):
        assert files(again)[name] == expected[name]
    assert not (again / checkpoint.NAME).exists()


def test_what_was_remembered_is_written_as_it_was_kept(tiny_encoder: Path, tmp_path: Path) -> None:
    """Two of three labels a row; a row is never more than what it has."""
    labels = load_labels(["animal", "money", "mat"])
    rows = SoftLabels.from_dense(np.eye(3)[np.arange(24) % 3], labels).add_to(table())
    given = {"early_learning": EarlyLearning(top_k=2, penalty_weight=0.0), "num_train_epochs": 1}
    folder = train(rows, tiny_encoder, tmp_path, labels, **given)
    kept = read_parquet(folder / EARLY)
    assert kept["id"][:] == rows["id"][:]
    probs = SoftLabels.from_dataset(kept, labels).dense()
    assert (np.count_nonzero(probs, axis=1) == 2).all()
    assert (probs.sum(axis=1) < 0.3).all()  # one epoch: 0.3 of a prediction


# --------------------------------------------------------------------------------------- long tails


MANY = load_labels(["animal", "money", "mat"], multilabel=True)


def partial_labels(rows: int = 24) -> Dataset:
    """What `table` is about, and half of the labels `mat` are not given."""
    texts = table(rows)
    probs = np.array([[i % 2 == 0, i % 2 == 1, i % 3 > 0 and i % 4 > 1] for i in range(rows)])
    return SoftLabels.from_dense(probs.astype(float), MANY).add_to(texts)


def test_a_long_tail_is_trained_by_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"longtail": LongTail(gamma_pos=0.5, tau=0.6, start_epoch=0)}
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 4, 24).astype(np.float32)
    rows = with_columns(partial_labels(), {"weight": (weights.tolist(), Value("float32"))})
    found = losses_of(monkeypatch, rows, MANY, **given)
    soft = SoftLabels.from_dataset(partial_labels(), MANY).dense()
    shares = torch.from_numpy(weights / weights.mean(dtype=np.float64))
    twin = LongTailLoss(
        shares @ torch.from_numpy(soft).double(), 24, tau=0.6, start_epoch=0, gamma_pos=0.5
    )
    for _ in range(4):
        chosen = rng.permutation(24)[:8]
        logits = torch.from_numpy(rng.normal(1, 2, (8, 3)))
        expected = twin(logits, torch.from_numpy(soft[chosen]), weights=shares[chosen])
        torch.testing.assert_close(found["losses"](logits, chosen.tolist()), expected)
        found["more"]["after_update"]()
        twin.keep()
    compared = found["more"]["compare"](logits, torch.from_numpy(soft[chosen]))
    torch.testing.assert_close(compared, twin.modified(logits, torch.from_numpy(soft[chosen])))


def test_a_killed_training_of_a_long_tail_continues_to_the_same_bytes(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = with_columns(
        Dataset.from_dict({"id": ["a", "b"], "text": ["a cat", "money on a mat"]}),
        {"gold": ([[0], [1, 2]], List(Value("int32")))},
    )
    given = {
        "longtail": LongTail(tau=0.5, gamma_neg=1.0),
        "num_train_epochs": 4,
        "validation": seen,
    }
    call = partial(train, partial_labels(), tiny_encoder)
    killed_in_update(7, monkeypatch, partial(call, tmp_path / "m"), labels=MANY, **given)
    again = call(tmp_path / "m", labels=MANY, save_steps=1, **given)
    fresh = call(tmp_path / "f", labels=MANY, save_steps=1, **given)
    assert files(again) == files(fresh)
    passes = call(tmp_path / "p", labels=MANY, save_steps=1, pass_tokens=1, **given)
    card = json.loads((fresh / "model_card.json").read_text())
    assert card["labels_added_per_row"] > 0.01
    assert json.loads((passes / "model_card.json").read_text())[
        "labels_added_per_row"
    ] == pytest.approx(card["labels_added_per_row"], abs=1e-3)
    assert card["settings"]["longtail"]["tau"] == 0.5
    probs = [SoftLabels.from_dataset(predict(seen, model=m), MANY).dense() for m in (fresh, passes)]
    np.testing.assert_allclose(*probs, atol=1e-4)


def test_settings_that_do_not_fit_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    tail = LongTail()
    for labels, given, message in [
        (LABELS, {"label_smoothing_factor": 1.0}, "label_smoothing_factor must be .*; got 1.0"),
        (LABELS, {"longtail": tail}, "in this label space a row has one; load it with multilabel"),
        (MANY, {"longtail": tail, "class_weights": "balanced"}, "leave class_weights out, or long"),
        (MANY, {"longtail": tail, "label_smoothing_factor": 0.1}, "leave label_smoothing_factor"),
        (MANY, {"longtail": tail, "early_learning": EarlyLearning()}, "leave early_learning out"),
        (MANY, {"longtail": LongTail(tau=1.0)}, r"tau must lie strictly .* got 1\.0"),
    ]:
        rows = table() if labels is LABELS else partial_labels()
        with pytest.raises(ValueError, match=message):
            train(rows, tiny_encoder, tmp_path / "m", labels, **given)
    assert not (tmp_path / "m").exists()
    misspelt = {"label_smoothing_factor": 0.0, "class_weights": "Balanced", "longtail": None}
    with pytest.raises(ValueError, match="class_weights is 'balanced' or null; got 'Balanced'"):
        classifier._check(misspelt, LABELS)  # whose type the tests check before


def test_a_training_that_stopped_at_a_prediction_that_is_no_number_continues_undisturbed(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the update that failed nothing is remembered, not even of its other rows."""
    alive, calls = LabelSupervised.forward, iter(range(1000))

    def forward(self: Any, *inputs: Any) -> torch.Tensor:
        logits = alive(self, *inputs)
        return logits.index_fill(0, torch.tensor([1]), torch.nan) if next(calls) == 4 else logits

    for number, (rows, labels, given) in enumerate(
        [
            (table(), LABELS, {"early_learning": EarlyLearning()}),
            (partial_labels(), MANY, {"longtail": LongTail(tau=0.5, gamma_neg=1.0)}),
        ]
    ):
        calls = iter(range(1000))
        place = tmp_path / str(number)
        with monkeypatch.context() as now:
            now.setattr(LabelSupervised, "forward", forward)
            with pytest.raises(ValueError, match="the loss is nan in update 5"):
                train(rows, tiny_encoder, place, labels, **given)
        with safe_open(place / checkpoint.NAME, "pt") as kept:
            values = [kept.get_tensor(name) for name in list(kept.keys())]
        assert all(torch.isfinite(value.float()).all() for value in values)
        continued = files(train(rows, tiny_encoder, place, labels, **given))
        fresh = files(train(rows, tiny_encoder, tmp_path / f"fresh {number}", labels, **given))
        assert continued == fresh
        assert ("early.parquet" in fresh) == (number == 0)
