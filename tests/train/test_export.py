"""Exported students answer as the students do, wherever they are loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train.classifier import predict, train_classifier
from llmlabel.train.export import export_adapter, export_classifier
from llmlabel.train.network import LoRA, load_backbone
from llmlabel.train.prompt_tuning import train_prompt

LABELS = load_labels(["animal", "money", "sport"])
TEXTS = ["the cat sat on the mat", "money", "business and sports " * 3, "a catfish", "x"]


def table() -> Dataset:
    texts = [["the cat sat", "business and money", "sports"][i % 3] + f" {i}" for i in range(12)]
    probs = np.eye(3)[np.arange(12) % 3] * 0.7 + 0.1
    return SoftLabels.from_dense(probs, LABELS).add_to(Dataset.from_dict({"text": texts}))


def train(model: Path, output: Path, **given: Any) -> Path:
    settings = {
        "learning_rate": 0.01,
        "num_train_epochs": 4,
        "dtype": "float32",
        "lora": LoRA(r=4, dropout=0.0),
        "max_length": 64,
    }
    return train_classifier(
        table(), LABELS, model=str(model), output=output, **{**settings, **given}
    )


def predicted(student: Path, labels: LabelSpace = LABELS, texts: list[str] = TEXTS) -> np.ndarray:
    ids = [str(i) for i in range(len(texts))]
    rows = predict(Dataset.from_dict({"id": ids, "text": texts}), model=student)
    return SoftLabels.from_dataset(rows, labels).dense()


@torch.inference_mode()
def served(folder: Path, texts: list[str] = TEXTS, network: Any = None, **given: Any) -> np.ndarray:
    """As a user of transformers does it: padded, cut, one batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    if network is None:
        network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert len({int(n) for n in batch.attention_mask.sum(dim=1)}) > 1  # there is padding
    logits = network.eval()(batch.input_ids, attention_mask=batch.attention_mask).logits
    multi = network.config.problem_type == "multi_label_classification"
    return (logits.sigmoid() if multi else logits.softmax(dim=1)).numpy()


@pytest.fixture(scope="module")
def student(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_decoder, tmp_path_factory.mktemp("student") / "model")


@pytest.fixture(scope="module")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_classifier(student, output=tmp_path_factory.mktemp("exported") / "model")


def test_transformers_gives_the_same_probabilities(student: Path, exported: Path) -> None:
    expected = predicted(student)
    assert np.ptp(expected, axis=0).max() > 0.2  # the texts matter
    np.testing.assert_allclose(served(exported), expected, atol=1e-5)
    np.testing.assert_allclose(served(exported, padding_side="left"), expected, atol=1e-5)
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "animal", "1": "money", "2": "sport"}
    assert config["label2id"] == {"animal": 0, "money": 1, "sport": 2}
    assert config["problem_type"] == "single_label_classification"
    assert config["pad_token_id"] == 0
    assert load_labels(exported / "labels.json") == LABELS


def test_long_texts_are_cut_where_the_student_cuts_them(student: Path, exported: Path) -> None:
    texts = ["the cat sat on the mat " * 40 + "money", "money"]
    np.testing.assert_allclose(served(exported, texts), predicted(student, texts=texts), atol=1e-5)


def test_several_labels_and_one_name_twice(tiny_decoder: Path, tmp_path: Path) -> None:
    labels = LabelSpace(
        ids=("animal", "money", "home/animal", "out"),
        names=("animal", "money", "animal", "out"),
        descriptions=("",) * 4,
        parents=((), (), ("out",), ()),
        multilabel=True,
    )
    texts = ["the cat sat", "business and money", "a catfish"]
    probs = np.array([[0.9, 0.1, 0.8, 0.2], [0.1, 0.9, 0.1, 0.1], [0.5, 0.2, 0.9, 0.9]])
    rows = SoftLabels.from_dense(probs, labels).add_to(Dataset.from_dict({"text": texts}))
    student = train_classifier(
        rows,
        labels,
        model=str(tiny_decoder),
        output=tmp_path / "student",
        learning_rate=0.02,
        num_train_epochs=10,
        dtype="float32",
        lora=LoRA(r=4, dropout=0.0),
    )
    folder = export_classifier(student, output=tmp_path / "exported")
    np.testing.assert_allclose(served(folder), predicted(student, labels), atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == ["animal", "money", "home/animal", "out"]
    assert config["problem_type"] == "multi_label_classification"


def with_tokenizer(decoder: Path, folder: Path, *, ends: bool, own_pad: bool) -> Path:
    """The decoder with a tokenizer whose pad token is missing or the end, which it may add."""
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(decoder, folder)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    if ends:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        )
    tokenizer.pad_token = "<|im_end|>" if own_pad else None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own_pad", [False, True])
@pytest.mark.parametrize(("ends", "pad"), [(False, "<|im_end|>"), (True, "<|im_start|>")])
def test_the_pad_token_is_one_with_which_no_text_ends(
    tiny_decoder: Path, tmp_path: Path, ends: bool, pad: str, own_pad: bool
) -> None:
    decoder = with_tokenizer(tiny_decoder, tmp_path / "decoder", ends=ends, own_pad=own_pad)
    student = train(decoder, tmp_path / "student")
    folder = export_classifier(student, output=tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == pad
    assert (
        json.loads((folder / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    )
    assert (tokenizer("x").input_ids[-1] == tokenizer.eos_token_id) == ends
    np.testing.assert_allclose(served(folder), predicted(student), atol=1e-5)


def test_a_text_that_ends_with_the_pad_token_is_read_before_it(
    student: Path, exported: Path
) -> None:
    """What the docstring says of transformers; `predict` reads the token itself."""
    texts = ["the cat<|endoftext|>", "the cat", "money money money"]
    found = served(exported, texts)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    expected = predicted(student, texts=texts)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_no_causal_mask_is_exported_too(tiny_decoder: Path, tmp_path: Path) -> None:
    student = train(tiny_decoder, tmp_path / "student", bidirectional=True)
    folder = export_classifier(student, output=tmp_path / "exported")
    np.testing.assert_allclose(served(folder), predicted(student), atol=1e-5)
    causal = AutoModelForSequenceClassification.from_pretrained(folder, is_causal=True)
    assert np.abs(served(folder, network=causal) - predicted(student)).max() > 1e-3


def test_peft_reads_adapters_and_head(student: Path, tiny_decoder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = export_adapter(student, output=tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_decoder, num_labels=3, problem_type="single_label_classification"
    )
    network = PeftModel.from_pretrained(base, folder)
    found = served(tiny_decoder, network=network)
    np.testing.assert_allclose(found, predicted(student), atol=1e-5)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
    ]


@pytest.mark.parametrize("export", [export_classifier, export_adapter])
def test_what_no_class_can_hold_is_refused(
    tiny_encoder: Path, tiny_decoder: Path, tmp_path: Path, export: Any
) -> None:
    def says(student: Path, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            export(student, output=tmp_path / "out")
        assert not list(tmp_path.glob("out/*.*"))

    few = {"num_train_epochs": 1}
    says(
        train(tiny_encoder, tmp_path / "mean", pooling="mean", **few),
        "pooling=mean is in no classifier of transformers; use the predict function of its trainer",
    )
    says(
        train(tiny_encoder, tmp_path / "first", pooling="last", **few),
        "no classifier that reads the last token of a bert; let llmlabel.train.classifier.predict",
    )
    says(
        train(tiny_decoder, tmp_path / "from", bidirectional=True, bidirectional_from=1, **few),
        "bidirectional_from=1 is in no classifier",
    )
    prompted = train_prompt(
        table(), LABELS, model=str(tiny_decoder), output=tmp_path / "prompt", prompt_tokens=3, **few
    )
    says(prompted, "prompt_tokens=3 is in no classifier")


def test_a_head_of_other_outputs_is_refused(student: Path, tmp_path: Path) -> None:
    other = shutil.copytree(student, tmp_path / "other")
    save_file({"weight": torch.zeros(7, 32)}, other / "head.safetensors")
    with pytest.raises(ValueError, match="a head with 7 outputs for 3 labels is in no classifier"):
        export_classifier(other, output=tmp_path / "out")
    (other / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"other: head.safetensors is missing; give"):
        export_adapter(other, output=tmp_path / "out")


def test_an_adapter_cannot_take_the_mask_away(tiny_decoder: Path, tmp_path: Path) -> None:
    student = train(tiny_decoder, tmp_path / "student", bidirectional=True, num_train_epochs=1)
    with pytest.raises(
        ValueError, match=r"bidirectional=True changes the backbone, .*\.export_class"
    ):
        export_adapter(student, output=tmp_path / "out")


def test_a_folder_with_something_else_is_left_alone(
    student: Path, exported: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    for other in (student, tiny_decoder):
        before = {p.name: p.read_bytes() for p in other.iterdir()}
        with pytest.raises(ValueError, match=r"it holds .*; give a new or empty folder"):
            export_classifier(student, output=other)
        assert {p.name: p.read_bytes() for p in other.iterdir()} == before
    first = {p.name: p.read_bytes() for p in exported.iterdir()}
    export_classifier(student, output=exported)  # once more, over an export
    assert {p.name: p.read_bytes() for p in exported.iterdir()} == first
    with pytest.raises(
        FileNotFoundError, match=r"model_card.json is missing; give a folder of a st"
    ):
        export_classifier(tmp_path, output=tmp_path / "out")


def test_what_answers_otherwise_is_not_exported(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForSequenceClassification

    def first_token(self: Any, input_ids: torch.Tensor, **given: Any) -> Any:
        return forward(self, input_ids[:, :1], attention_mask=None)

    forward = LlamaForSequenceClassification.forward
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", first_token)
    with pytest.raises(
        ValueError, match=r"LlamaForSequenceClassification .* does not answer as this"
    ):
        export_classifier(student, output=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_student_of_four_bits_is_not_read_without_a_gpu(student: Path, tmp_path: Path) -> None:
    other = shutil.copytree(student, tmp_path / "other")
    card = json.loads((other / "model_card.json").read_text())
    card["settings"]["load_in_4bit"] = True
    (other / "model_card.json").write_text(json.dumps(card))
    with pytest.raises(
        ValueError, match=r"^model folder \S*other: it was trained with load_"
    ) as why:
        predicted(other)
    assert str(why.value).endswith(
        "with load_in_4bit=True, so that it can be used only where there are a GPU and the package "
        "bitsandbytes; go there, or train it without"
    )
    with pytest.raises(ValueError, match=r"cannot be merged into 4 bits; use .*\.export_adapter"):
        export_classifier(other, output=tmp_path / "merged")
    adapter = export_adapter(other, output=tmp_path / "adapter")  # which needs no weight of it
    assert (adapter / "adapter_model.safetensors").is_file()


def test_four_bits_need_a_gpu_and_a_package(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="load_in_4bit needs a GPU and the package bitsandbytes"):
        train(tiny_decoder, tmp_path / "out", load_in_4bit=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ImportError, match="requires bitsandbytes: `pip install"
    ):  # transformers' own
        load_backbone(str(tiny_decoder), settings={"load_in_4bit": True})
