import json
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from safetensors import safe_open
from scipy.sparse import csr_array

from llmlabel.data import read_parquet, with_columns
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import LabelSpace, load_labels, save_labels
from llmlabel.loss.longtail import LongTailLoss
from llmlabel.refine.adapt import gold_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train import checkpoint, classifier, loop
from llmlabel.train.classifier import predict, train_classifier
from llmlabel.train.network import LabelSupervised, LoRA
from llmlabel.train.settings import EARLY, EarlyLearning, LongTail
from llmlabel.train.student import training_rows, validation_rows

LABELS = load_labels(["animal", "money"])
NO_DROPOUT = LoRA(r=4, alpha=16, dropout=0.0)


def table(rows: int = 24, labels: LabelSpace = LABELS) -> Dataset:
    """Texts about two things, with soft labels that lean the right way."""
    kinds = ["the cat sat", "business and money"]
    texts = [kinds[i % 2] + " on the mat" * (i % 3) + f" {i}" for i in range(rows)]
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])[np.arange(rows) % 2]
    ids = [f"r{i}" for i in range(rows)]
    return SoftLabels.from_dense(probs, labels).add_to(
        Dataset.from_dict({"id": ids, "text": texts})
    )


def train(
    dataset: Dataset, model: Path, output: Path, labels: LabelSpace = LABELS, **given: object
) -> Path:
    arguments = {
        "pooling": "mean",
        "learning_rate": 0.02,
        "num_train_epochs": 6,
        "dtype": "float32",
        "per_device_train_batch_size": 8,
        "lora": NO_DROPOUT,
        "max_length": 128,
    }
    return train_classifier(
        dataset, labels, model=str(model), output=output, **{**arguments, **given}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


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


def test_reloaded_students_are_the_trained_ones(student: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(student, tmp_path / "moved")
    one, two = (predict(table(), model=m)["label_probs"][:] for m in (student, moved))
    assert one == two
    config = json.loads((student / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_training_leaves_the_global_generator_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(table(), tiny_encoder, tmp_path, num_train_epochs=1, lora=LoRA(r=4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_of_a_teacher_is_left_in_a_students_rows(student: Path) -> None:
    rows = label_direct(table(), FakeEngine(), LABELS)
    got = predict(rows, model=student)
    assert set(got["label_mass"]) == set(got["prompt_sha"]) == {None}
    assert got.column_names == rows.column_names


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


# ------------------------------------------------------------- targets, validation, checkpoints


def losses_of(
    monkeypatch: pytest.MonkeyPatch, rows: Dataset, labels: LabelSpace, **given: Any
) -> Any:
    """The function that `train_classifier` trains with, and its rows."""
    found: dict[str, Any] = {}

    def train_student(rows: Any, labels: Any, losses: Any, settings: Any, **more: Any) -> Path:
        found.update(losses=losses, rows=rows, more=more)
        return Path("model")

    monkeypatch.setattr(classifier, "train_student", train_student)
    train_classifier(rows, labels, model="m", output=Path("o"), **given)
    return found


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
    found = losses_of(monkeypatch, table(4), LABELS, **given)["losses"]
    chosen, target = [2, 0, 3, 1], np.zeros((4, 2))
    for _ in range(3):
        logits = logits * 1.5
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        target = 0.5 * target + 0.5 * probs
        penalty = np.log(1 - (target * probs).sum(axis=1))
        expected = plain(torch.from_numpy(logits), chosen).numpy() + 2 * penalty
        got = found(torch.from_numpy(logits), chosen).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5)


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


def validation_of(texts: list[str], gold: list[int], **columns: object) -> Dataset:
    rows = Dataset.from_dict({"text": texts, **columns})
    return with_columns(rows, {"gold": ([[one] for one in gold], List(Value("int32")))})


def killed_in_update(
    number: int, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Path], **given: Any
) -> None:
    alive, calls = loop._Run.update, iter(range(1000))

    def update(run: Any, chosen: list[int]) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt
        alive(run, chosen)

    with monkeypatch.context() as now:
        now.setattr(loop._Run, "update", update)
        with pytest.raises(KeyboardInterrupt):
            call(save_steps=1, **given)


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


MANY = load_labels(["animal", "money", "mat"], multilabel=True)


def partial_labels(rows: int = 24) -> Dataset:
    """What `table` is about, and half of the labels `mat` are not given."""
    texts = table(rows)
    probs = np.array([[i % 2 == 0, i % 2 == 1, i % 3 > 0 and i % 4 > 1] for i in range(rows)])
    return SoftLabels.from_dense(probs.astype(float), MANY).add_to(texts)


def test_a_long_tail_is_trained_by_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"longtail": LongTail(gamma_pos=0.5, tau=0.6, start_epoch=0)}
    found = losses_of(monkeypatch, partial_labels(), MANY, **given)
    soft = SoftLabels.from_dataset(partial_labels(), MANY).dense()
    twin = LongTailLoss(
        torch.from_numpy(soft.sum(axis=0)), 24, tau=0.6, start_epoch=0, gamma_pos=0.5
    )
    rng = np.random.default_rng(0)
    for _ in range(4):
        chosen = rng.permutation(24)[:8]
        logits = torch.from_numpy(rng.normal(1, 2, (8, 3)))
        expected = twin(logits, torch.from_numpy(soft[chosen]))
        torch.testing.assert_close(found["losses"](logits, chosen.tolist()), expected)
        found["more"]["after_update"]()
        twin.synchronize()
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


def test_predictions_that_are_not_finite_leave_what_was_remembered_finite(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training stops; its checkpoint can be continued."""
    alive, calls = LabelSupervised.forward, iter(range(1000))

    def forward(self: Any, *inputs: Any) -> torch.Tensor:
        logits = alive(self, *inputs)
        return logits * float("nan") if next(calls) == 4 else logits

    for number, (rows, labels, given) in enumerate(
        [
            (table(), LABELS, {"early_learning": EarlyLearning()}),
            (partial_labels(), MANY, {"longtail": LongTail()}),
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
        train(rows, tiny_encoder, place, labels, **given)  # the key is that of the same call
