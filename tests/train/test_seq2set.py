"""How a decoder of sets is trained, and what it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from scipy.sparse import csr_array
from train.set_students import KINDS, LABELS, WEIGHTS, members, table, train

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels, save_labels
from llmlabel.loss.sets import set_cross_entropy, transport_loss
from llmlabel.softlabels import SoftLabels
from llmlabel.train import checkpoint
from llmlabel.train.network import LoRA
from llmlabel.train.seq2set import (
    label_sets,
    predict_label_sets,
    said_probs,
)
from llmlabel.train.set_decoder import TextToSet, load_set_decoder
from llmlabel.train.student import Rows


def dense(rows: Dataset) -> np.ndarray:
    return SoftLabels.from_dataset(rows, LABELS).dense()


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def card_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_card.json").read_text())


@pytest.fixture(scope="module")
def student(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_encoder, tmp_path_factory.mktemp("student") / "model")


@pytest.fixture(scope="module")
def beginner(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of nine updates, for whoever trains again and must get the same."""
    place = tmp_path_factory.mktemp("beginner") / "model"
    return train(table(), tiny_encoder, place, num_train_epochs=3)


# ----------------------------------------------------------------------------------------- training


def test_it_learns_sets_of_any_size(student: Path) -> None:
    got = predict_label_sets(table(), model=student)
    said = [sorted(ids) for ids in got["label_ids"]]
    assert said == [KINDS[row % 5][1] for row in range(30)]
    assert set(got["error"]) == {None}
    assert got["engine"][0].startswith("student:tiny-encoder")
    card = card_of(student)
    assert card["settings"]["max_labels"] == 3
    assert card["sets"] == {"empty": 6, "largest": 3, "cut": 0}
    assert card["loss"][-1] < 0.2 * card["loss"][0]


@pytest.mark.parametrize("scheme", ["all", "first_n"])
def test_hard_labels_and_adapters(tiny_decoder: Path, tmp_path: Path, scheme: str) -> None:
    hard = SoftLabels.from_dense(members().astype(float), LABELS).add_to(table())
    folder = train(
        *(hard, tiny_decoder, tmp_path),
        lora=LoRA(r=4, alpha=16, dropout=0.0),
        scheme=scheme,
        learning_rate=1e-3,
        head_learning_rate=0.05,
        num_train_epochs=10,
    )
    # a row whose labels are all stored as 0 has no soft label, and is not trained on
    assert card_of(folder)["rows"] == {"given": 30, "trained": 24}
    said = dense(predict_label_sets(hard, model=folder)) > 0
    full = members().any(axis=1)
    np.testing.assert_array_equal(said[full], members()[full])
    names = load_set_decoder(folder)[0].state_dict()
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in names.items())


def test_the_order_of_a_set_changes_nothing(
    beginner: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = table()
    orders = [rng.permutation(len(ids)) for ids in rows["label_ids"]]
    assert any(order.tolist() != sorted(order) for order in orders)
    mixed = with_columns(
        rows,
        {
            name: (
                [
                    [values[i] for i in order]
                    for values, order in zip(rows[name], orders, strict=True)
                ],
                List(Value(kind)),
            )
            for name, kind in (("label_ids", "int32"), ("label_probs", "float32"))
        },
    )
    assert mixed["label_ids"][:] != rows["label_ids"][:]
    assert files(train(mixed, tiny_encoder, tmp_path, num_train_epochs=3)) == files(beginner)


def test_targets_are_never_made_a_table(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Rows, "targets")
    train(table(), tiny_encoder, tmp_path, num_train_epochs=1)


def test_another_seed_is_another_decoder(
    beginner: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    other = train(table(), tiny_encoder, tmp_path, seed=1, num_train_epochs=3)
    assert files(other)[WEIGHTS] != files(beginner)[WEIGHTS]


def test_gold_and_rows_of_weight_zero_are_not_read(
    beginner: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    probs = np.vstack([np.where(members(), 0.9, 0.1), np.full((5, 3), 0.9)])
    more = SoftLabels.from_dense(probs, LABELS).add_to(table(35))
    more = with_columns(
        more,
        {
            "weight": ([1.0] * 30 + [0.0] * 5, Value("float32")),
            "gold": ([[i % 3] for i in range(35)], List(Value("int32"))),
        },
    )
    found = train(more, tiny_encoder, tmp_path, num_train_epochs=3)
    assert files(found)[WEIGHTS] == files(beginner)[WEIGHTS]
    assert card_of(found)["rows"] == {"given": 35, "trained": 30}


def test_sets_that_are_too_large_are_counted(tiny_encoder: Path, tmp_path: Path) -> None:
    short = {"num_train_epochs": 8, "head_learning_rate": 0.05}
    folder = train(table(), tiny_encoder, tmp_path, max_labels=2, **short)
    assert card_of(folder)["sets"] == {"empty": 6, "largest": 3, "cut": 6}
    sizes = [len(ids) for ids in predict_label_sets(table(), model=folder)["label_ids"]]
    assert max(sizes) == 2


def test_accumulated_batches_equal_one_large_batch(tiny_encoder: Path, tmp_path: Path) -> None:
    given = {"num_train_epochs": 2, "dropout": 0.0}
    large = train(table(), tiny_encoder, tmp_path / "l", **given)
    small = train(
        table(),
        tiny_encoder,
        tmp_path / "s",
        **given,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=5,
    )
    one, two = (load_set_decoder(folder)[0].state_dict() for folder in (large, small))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


def killed(forward: int, dataset: Dataset, model: Path, output: Path, **given: Any) -> None:
    """Trains until the network has been asked so often."""
    calls = iter(range(10_000))

    def dies(module: Any, inputs: Any) -> None:
        if isinstance(module, TextToSet) and next(calls) == forward:
            raise KeyboardInterrupt

    hook = torch.nn.modules.module.register_module_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, model, output, **given)
    hook.remove()
    assert (output / checkpoint.NAME).is_file()
    assert not (output / WEIGHTS).exists()


def test_a_killed_training_continues_to_the_same_weights(
    beginner: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    short = {"num_train_epochs": 3, "save_steps": 2}
    killed(5, table(), tiny_encoder, tmp_path, **short)  # in the middle of an epoch
    counted = []

    def counts(module: Any, inputs: Any) -> None:
        if isinstance(module, TextToSet):
            counted.append(module)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(counts)
    again = train(table(), tiny_encoder, tmp_path, **short)
    hook.remove()
    assert len(counted) == 3 * 3 - 4  # it went on after 4 updates
    one, two = (load_set_decoder(folder)[0].state_dict() for folder in (beginner, again))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)
    assert not (again / checkpoint.NAME).exists()
    assert card_of(again)["loss"] == pytest.approx(card_of(beginner)["loss"], rel=1e-6)


def test_a_checkpoint_of_others_is_not_continued(tiny_encoder: Path, tmp_path: Path) -> None:
    class Turned:
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            return np.eye(3)[::-1].copy()

    short = {"num_train_epochs": 1, "save_steps": 1}
    killed(2, table(), tiny_encoder, tmp_path / "killed", **short)
    other = SoftLabels.from_dense(np.where(members(), 0.1, 0.9), LABELS).add_to(table())
    for number, (rows, given) in enumerate(
        [(other, {}), (table(), {"label_encoder": Turned()}), (table(), {"transport_weight": 1.0})]
    ):
        place = shutil.copytree(tmp_path / "killed", tmp_path / str(number))
        found = train(rows, tiny_encoder, place, **short, **given)
        fresh = train(rows, tiny_encoder, tmp_path / f"fresh {number}", **short, **given)
        assert files(found) == files(fresh)


def test_a_checkpoint_with_other_validation_rows_is_not_continued(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    short = {"num_train_epochs": 2, "save_steps": 1}
    first, second = (
        with_columns(
            table(10).select(chosen),
            {
                "id": (["v0", "v1"], Value("string")),
                "text": (["new", "words"], Value("string")),
            },
        )
        for chosen in ([0, 1], [2, 3])
    )
    killed(4, table(), tiny_encoder, tmp_path / "k", **short, validation=first)
    again = train(table(), tiny_encoder, tmp_path / "k", **short, validation=second)
    fresh = train(table(), tiny_encoder, tmp_path / "f", **short, validation=second)
    assert files(again) == files(fresh)
    with pytest.raises(ValueError, match="early_stopping_patience=1 needs `validation`"):
        train(table(), tiny_encoder, tmp_path / "p", early_stopping_patience=1)


def test_validation_keeps_the_best_epoch(tiny_encoder: Path, tmp_path: Path) -> None:
    truth = members(10)
    truth[::3, 0] ^= True  # what was learned ever better is wrong here
    gold = [np.flatnonzero(row).tolist() for row in truth]
    seen = with_columns(
        table(10),
        {
            "gold": (gold, List(Value("int32"))),
            "id": ([f"v{i}" for i in range(10)], Value("string")),
            "text": ([f"{text} new" for text in table(10)["text"]], Value("string")),
        },
    )
    folder = train(table(), tiny_encoder, tmp_path, validation=seen, head_learning_rate=0.1)
    told = card_of(folder)["validation"]
    assert (told["rows"], told["repeat_training_rows"], len(told["epochs"])) == (10, 0, 25)
    values = [one["loss"] for one in told["epochs"]]
    assert told["best_epoch"] == int(np.argmin(values)) < 24
    network, tokenizer, *_ = load_set_decoder(folder)
    sets = label_sets(csr_array(truth.astype(float)), places=3)
    total, right, guessed = 0.0, 0, 0
    for row, text in enumerate(seen["text"]):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            logits = network(ids, torch.ones_like(ids))
        total += float(set_cross_entropy(logits, sets[[row]], empty=3))
        total += 8 * float(transport_loss(logits, sets[[row]], network.decoder.vectors))
        said = said_probs(logits)[0] > 0
        right, guessed = right + int((said & truth[row]).sum()), guessed + int(said.sum())
    assert total / 10 == pytest.approx(min(values), rel=1e-4)
    f1 = 2 * right / (guessed + int(truth.sum()))
    assert told["epochs"][told["best_epoch"]]["micro_f1"] == pytest.approx(f1)


# --------------------------------------------------------------------------------------- prediction


def test_predictions_do_not_depend_on_batch_padding_or_order(student: Path) -> None:
    rows = table()
    whole = dense(predict_label_sets(rows, model=student))
    for given in ({"pass_tokens": 1}, {"block_rows": 7}, {"pass_tokens": 100_000}):
        other = dense(predict_label_sets(rows, model=student, **given))
        np.testing.assert_allclose(other, whole, atol=1e-6)
    back = predict_label_sets(rows.select(range(29, -1, -1)), model=student)
    np.testing.assert_allclose(dense(back)[::-1], whole, atol=1e-6)
    again = predict_label_sets(rows, model=student)
    assert again.to_dict() == predict_label_sets(rows, model=student).to_dict()


@pytest.mark.parametrize("seed", range(5))
def test_no_label_twice_whatever_the_decoder_says(student: Path, tmp_path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(student, tmp_path / "m")
    rng = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / WEIGHTS)
    for name in ("decoder.score.weight", "decoder.cell.weight_ih", "decoder.cell.weight_hh"):
        tensors[name] = torch.randn(tensors[name].shape, generator=rng)
    save_file(tensors, folder / WEIGHTS)
    got = predict_label_sets(table(), model=folder)
    network, tokenizer, *_ = load_set_decoder(folder)
    repeats = 0
    for row, text in enumerate(table()["text"]):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            steps = network(ids, torch.ones_like(ids))[0].softmax(dim=1).tolist()
        expected: dict[int, float] = {}
        for probs in steps:
            answer = int(np.argmax(probs))
            repeats += answer in expected
            if answer < 3 and answer not in expected:
                expected[answer] = probs[answer] / (probs[answer] + probs[-1])
        assert len(got["label_ids"][row]) == len(expected)
        found = dict(zip(got["label_ids"][row], got["label_probs"][row], strict=True))
        assert found == pytest.approx(expected, abs=1e-5)
    if seed == 0:
        assert repeats > 0


def test_empty_and_long_texts_and_rows_of_a_teacher(
    student: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    short = train(table(), tiny_encoder, tmp_path, max_length=16, num_train_epochs=1)
    rows = Dataset.from_dict(
        {
            "id": ["a", "b", "c"],
            "text": ["", "cat " * 2_000, "cat"],
            "label_mass": [0.5, 0.5, 0.5],
            "prompt_sha": ["x", "x", "x"],
        }
    )
    got = predict_label_sets(rows, model=short)
    assert got["label_ids"][0] == []
    assert got["error"][0] == "empty text"
    assert got["error"][1].endswith("the limit is 16")
    assert got["error"][2] is None
    assert set(got["label_mass"]) == set(got["prompt_sha"]) == {None}
    assert len(predict_label_sets(rows.select([0]), model=short)) == 1


def test_training_leaves_the_global_generator_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    folder = train(table(), tiny_encoder, tmp_path, num_train_epochs=1, lora=LoRA(r=4))
    predict_label_sets(table(), model=folder)
    assert torch.equal(before, torch.random.get_rng_state())


# ---------------------------------------------------------------------------------------- bad input


def test_bad_input(student: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    single = load_labels(["cat", "mat", "money"])
    with pytest.raises(ValueError, match=r"in this label space a text has one; .*multilabel=true"):
        train(table(), tiny_encoder, tmp_path / "m", single)
    nothing = SoftLabels.from_dense(np.zeros((30, 3)), LABELS).add_to(table())
    with pytest.raises(ValueError, match="none of the 30 rows has a text, a soft label"):
        train(nothing, tiny_encoder, tmp_path / "m")
    for name, value, message in [
        ("max_labels", 0, "max_labels must be at least 1; got 0"),
        ("width", 0, "width must be at least 1; got 0"),
        ("transport_weight", -1.0, r"transport_weight must be at least 0; got -1.0"),
        ("transport_weight", float("nan"), "transport_weight must be at least 0; got nan"),
        ("empty_weight", 2.0, r"empty_weight must be between 0 and 1; got 2.0"),
        ("dropout", 1.0, r"dropout must be at least 0 and below 1; got 1.0"),
        ("max_length", 300, r"max_length=300 is more than the 128 tokens"),
        ("poolin", "mean", "there is no setting 'poolin'"),
        ("learning_rate", 1e-3, "learning_rate is for the backbone, which stays as it is without"),
        ("gradient_checkpointing", True, "gradient_checkpointing is for the backbone, which stays"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(table(), tiny_encoder, tmp_path / "m", **{name: value})
    assert not (tmp_path / "m").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    with pytest.raises(ValueError, match=r"holds README.md, which is no file of a decoder of sets"):
        train(table(), tiny_encoder, tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match=r"model_card.json is missing.*train_seq2set"):
        predict_label_sets(table(), model=tiny_encoder)
    mixed = shutil.copytree(student, tmp_path / "mixed")
    other = load_labels(["cat", "mat", "other"], multilabel=True)
    save_labels(other, mixed / "labels.json")
    with pytest.raises(ValueError, match=r"mixed: labels.json is of label space .* was trained on"):
        predict_label_sets(table(), model=mixed)
