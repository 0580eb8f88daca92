import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Value

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine.views import SPANS
from llmlabel.train import loop
from llmlabel.train import tokens as module
from llmlabel.train.classifier import predict
from llmlabel.train.network import LoRA
from llmlabel.train.spans import tags_of
from llmlabel.train.tokens import measure_spans, predict_spans, train_tagger

LABELS = load_labels(["animal", "place"])


def table(rows: int = 24) -> Dataset:
    """`the cat` is an animal, `mat` a place; every sixth row has nothing, every seventh is unread."""
    texts, spans = [], []
    for i in range(rows):
        if i % 6 == 5:
            texts.append(f"business and money {i}")
            spans.append([])
            continue
        lead = "and " * (i % 3)
        texts.append(f"{lead}the cat sat on mat {i}")
        at = len(lead)
        found = [
            {"start": at, "end": at + 7, "label_id": 0, "prob": 0.9, "agreement": None},
            {"start": at + 15, "end": at + 18, "label_id": 1, "prob": None, "agreement": None},
        ]
        spans.append(None if i % 7 == 6 else found)
    found = Dataset.from_dict({"id": [f"r{i}" for i in range(rows)], "text": texts})
    return with_columns(found, {"spans": (spans, SPANS)})


def train(dataset: Dataset, model: Path, output: Path, **given: Any) -> Path:
    small = {
        "learning_rate": 0.02,
        "num_train_epochs": 10,
        "dtype": "float32",
        "per_device_train_batch_size": 8,
        "lora": LoRA(r=4, alpha=16, dropout=0.0),
        "max_length": 64,
    }
    return train_tagger(dataset, LABELS, model=str(model), output=output, **{**small, **given})


@pytest.fixture(scope="module")
def tagger(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_encoder, tmp_path_factory.mktemp("tagger") / "model")


def keys(spans: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    return [(one["start"], one["end"], one["label_id"]) for one in spans]


def test_it_learns_spans(tagger: Path) -> None:
    rows = table()
    got = predict_spans(rows, model=tagger)
    right = [
        keys(said) == keys(true)
        for said, true in zip(got["spans"], rows["spans"], strict=True)
        if true is not None
    ]
    assert np.mean(right) > 0.9
    probs = [one["prob"] for spans in got["spans"] for one in spans if one["label_id"] == 0]
    assert 0.8 < np.mean(probs) < 0.97  # they were 0.9
    assert got["error"][:] == [None] * 24
    card = json.loads((tagger / "model_card.json").read_text())
    assert card["rows"] == {"given": 24, "trained": 21}
    assert card["labels_without_rows"] == []


@pytest.mark.parametrize("bidirectional", [False, True])
def test_decoders_are_tagged_by_the_same_trainer(
    tiny_decoder: Path, tmp_path: Path, bidirectional: bool
) -> None:
    folder = train(table(), tiny_decoder, tmp_path, bidirectional=bidirectional)
    got = predict_spans(table(), model=folder)
    assert sum(len(spans) for spans in got["spans"]) > 20


def test_the_loss_is_the_mean_over_words(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: dict[str, Any] = {}

    def train_student(rows: Any, labels: Any, losses: Any, settings: Any, **more: Any) -> Path:
        found.update(losses=losses, rows=rows)
        return Path("model")

    monkeypatch.setattr(module, "train_student", train_student)
    rows = table()
    train(rows, tiny_encoder, tmp_path)
    tokenizer = module._tokenizer(str(tiny_encoder))
    chosen = [3, 0, 5]
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 64, 5)))
    values = found["losses"](logits, chosen)
    for number, at in enumerate(chosen):
        row = rows[found["rows"].kept[at]]
        _, words, _ = module._words(tokenizer, row["text"], 64)
        targets = tags_of(row["spans"], words, labels=2)
        log_probs = torch.log_softmax(logits[number], dim=1).numpy()
        own = [-(t * log_probs[w.token]).sum() for t, w in zip(targets, words, strict=True)]
        assert values[number].item() == pytest.approx(np.mean(own))
        assert found["rows"].weights[at] == len(words)


def test_predictions_do_not_depend_on_batch_padding_or_order(tagger: Path) -> None:
    rows = table()
    whole = predict_spans(rows, model=tagger)["spans"][:]
    for given in ({"pass_tokens": 1}, {"block_rows": 5}):
        other = predict_spans(rows, model=tagger, **given)["spans"][:]
        assert [keys(one) for one in other] == [keys(one) for one in whole]
        for a, b in zip(other, whole, strict=True):
            np.testing.assert_allclose([x["prob"] for x in a], [x["prob"] for x in b], atol=1e-5)
    back = predict_spans(rows.select(range(23, -1, -1)), model=tagger)["spans"][:]
    assert [keys(one) for one in back[::-1]] == [keys(one) for one in whole]


def test_empty_and_long_texts(tagger: Path) -> None:
    rows = Dataset.from_dict({"id": ["a", "b"], "text": [" ", "the cat " * 100]})
    got = predict_spans(rows, model=tagger)
    assert got["spans"][0] is None
    assert got["error"][0] == "empty text"
    assert got["error"][1].endswith("the limit is 64")
    assert max(one["end"] for one in got["spans"][1]) < 64 * 8


def test_validation_measures_spans(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="8 of 8 validation rows repeat a training row"):
        folder = train(table(), tiny_encoder, tmp_path, num_train_epochs=2, validation=table(9))
    told = json.loads((folder / "model_card.json").read_text())["validation"]
    assert (told["rows"], told["repeat_training_rows"]) == (8, 8)
    assert {"loss", "span_f1"} == set(told["epochs"][0])


def test_same_seed_same_bytes(tagger: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    again = train(table(), tiny_encoder, tmp_path)
    for name in ("head.safetensors", "adapter_model.safetensors", "model_card.json"):
        assert (again / name).read_bytes() == (tagger / name).read_bytes()


def test_bad_input(tagger: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    def with_span(**change: Any) -> Dataset:
        one = {"start": 0, "end": 3, "label_id": 0, "prob": 1.0, "agreement": None, **change}
        return with_columns(table().select([0]), {"spans": ([[one]], SPANS)})

    for rows, message in [
        (with_span(end=99), "the span from 0 to 99 is not in its text of 20 characters"),
        (with_span(start=3), "the span from 3 to 3 is not in its text"),
        (with_span(label_id=2), "a span has the label 2, but the labels are 0 to 1"),
        (with_span(prob=1.5), "a span has the probability 1.5"),
        (table().select([6]), "none of the 1 training rows has a text, spans and a weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(rows, tiny_encoder, tmp_path / "m")
    named = [{"start": 0, "end": 3, "label": "cat"}]
    rows = Dataset.from_dict({"id": ["r0"], "text": ["the cat"], "spans": [named]})
    with pytest.raises(ValueError, match="a span has no 'label_id'; it has start, end, label"):
        train(rows, tiny_encoder, tmp_path / "m")
    with pytest.raises(ValueError, match="pooling has no meaning"):
        train(table(), tiny_encoder, tmp_path / "m", pooling="mean")
    weightless = with_columns(table(), {"weight": ([0.0] * 24, Value("float32"))})
    with pytest.raises(ValueError, match="none of the 24 training rows"):
        train(weightless, tiny_encoder, tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"it labels spans; use llmlabel\.train\.tokens\.predict_spans"
    ):
        predict(table(), model=tagger)


def test_a_checkpoint_of_other_spans_is_not_continued(tiny_encoder: Path, tmp_path: Path) -> None:
    """The same labels in the same texts, but `cat` where it was `the cat`."""
    moved = [
        spans and [{**one, "start": one["start"] + 4 * (one["label_id"] == 0)} for one in spans]
        for spans in table()["spans"]
    ]
    other = with_columns(table(), {"spans": (moved, SPANS)})
    short = {"num_train_epochs": 2, "save_steps": 1}

    def dies(run: Any, chosen: list[int]) -> None:
        if run.fitted.updates == 3:
            raise KeyboardInterrupt
        alive(run, chosen)

    alive = loop._Run.update
    with pytest.MonkeyPatch.context() as now:
        now.setattr(loop._Run, "update", dies)
        with pytest.raises(KeyboardInterrupt):
            train(table(), tiny_encoder, tmp_path / "killed", **short)
    again = train(other, tiny_encoder, tmp_path / "killed", **short)
    fresh = train(other, tiny_encoder, tmp_path / "fresh", **short)
    for name in ("head.safetensors", "adapter_model.safetensors", "model_card.json"):
        assert (again / name).read_bytes() == (fresh / name).read_bytes()


def test_rows_without_ids_repeat_nothing(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = table(6).remove_columns("id")
    spans = [[{"start": 0, "end": 3, "label_id": 0, "prob": 1.0, "agreement": None}]]
    seen = with_columns(Dataset.from_dict({"text": ["dog there"]}), {"spans": (spans, SPANS)})
    folder = train(rows, tiny_encoder, tmp_path, num_train_epochs=1, validation=seen)
    told = json.loads((folder / "model_card.json").read_text())["validation"]
    assert (told["rows"], told["repeat_training_rows"]) == (1, 0)


def test_whole_spans_with_their_label_count() -> None:
    labels = load_labels(["animal", "place", "time"])

    def rows(**spans: list[tuple[int, int, int]] | None) -> Dataset:
        found = Dataset.from_dict({"id": list(spans), "text": ["the cat sat"] * len(spans)})
        named = [
            some
            if some is None
            else [{"start": a, "end": b, "label_id": k, "prob": 0.5} for a, b, k in some]
            for some in spans.values()
        ]
        return with_columns(found, {"spans": (named, SPANS)})

    true = rows(x=[(0, 3, 0), (4, 7, 1)], y=[(0, 3, 0)], z=None, w=[])
    said = rows(w=[(0, 7, 1)], z=[(0, 3, 0)], y=None, x=[(0, 3, 0), (4, 6, 1)])
    # of 3 true spans 1 was found, of 3 that were said 1 is true; nobody knows those of z
    third = {key: pytest.approx(1 / 3) for key in ("precision", "recall", "f1")}
    assert measure_spans(said, true, labels) == {
        **{"rows": 3, "spans": 3, **third},
        "labels": {
            "animal": {"spans": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)},
            "place": {"spans": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0},
        },
    }
    assert measure_spans(rows(w=[]), rows(w=[]), labels)["f1"] == 0.0
    with pytest.raises(ValueError, match="the row with id 'w' is not in tagged; add it there too"):
        measure_spans(said, rows(x=[]), labels)
    with pytest.raises(ValueError, match="none of the 1 rows of tagged has known spans"):
        measure_spans(rows(z=[]), rows(z=None), labels)


def test_sure_spans_have_the_loss_of_the_reference(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its cross-entropy is the mean over the first tokens of all words; others have the target -100."""
    found: dict[str, Any] = {}

    def train_student(*given: Any, **more: Any) -> Path:
        found.update(given=given)
        return Path("model")

    monkeypatch.setattr(module, "train_student", train_student)
    rows = table()
    sure = [spans and [{**one, "prob": None} for one in spans] for spans in rows["spans"]]
    train(with_columns(rows, {"spans": (sure, SPANS)}), tiny_encoder, tmp_path)
    trained, _, losses, _ = found["given"]
    chosen = [3, 0, 5, 2]
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 64, 5)))
    targets = torch.full((4, 64), -100)
    tokenizer = module._tokenizer(str(tiny_encoder))
    for number, at in enumerate(chosen):
        row = trained.kept[at]
        _, words, _ = module._words(tokenizer, rows["text"][row], 64)
        for word, tag in zip(words, tags_of(sure[row], words, labels=2), strict=True):
            targets[number, word.token] = int(tag.argmax())
    weights = torch.from_numpy(trained.weights[chosen])
    ours = (weights * losses(logits, chosen)).sum() / weights.sum()
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
