import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from safetensors.torch import load_file, save_file

from llmlabel.data import with_columns
from llmlabel.engine.labelsets import label_sets
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.models import SMOLLM2
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels
from llmlabel.train.classifier import predict, train_classifier
from llmlabel.train.network import (
    PromptTuned,
    load_backbone,
    new_network,
    padded,
    student_sha,
)
from llmlabel.train.prompt_tuning import train_prompt
from llmlabel.train.soft_prompt import check_prompted, first_prompt
from llmlabel.train.student import probabilities

NAMES = ["animal", "money", "mat"]
LABELS = load_labels(NAMES, multilabel=True)
TRUE = np.array([[0.95, 0.0, 0.1], [0.0, 0.9, 0.0], [0.9, 0.05, 1.0]])  # three kinds of text


def table(rows: int = 24, labels: LabelSpace = LABELS, *, first: int = 0) -> Dataset:
    kinds = ["the cat sat", "business and money", "the cat on the mat"]
    texts = [f"{first + i} {kinds[i % 3]}" for i in range(rows)]
    probs = TRUE[np.arange(rows) % 3][:, [NAMES.index(name) for name in labels.names]]
    dataset = Dataset.from_dict({"id": [f"r{first + i}" for i in range(rows)], "text": texts})
    if not labels.multilabel:
        probs = probs / probs.sum(axis=1, keepdims=True)
    return SoftLabels.from_dense(probs, labels).add_to(dataset)


def train(
    dataset: Dataset, model: Path, output: Path, labels: LabelSpace = LABELS, **given: Any
) -> Path:
    arguments: dict[str, Any] = {
        "prompt_tokens": 5,
        "learning_rate": 0.03,
        "head_learning_rate": 0.03,
        "num_train_epochs": 8,
        "per_device_train_batch_size": 8,
        "dtype": "float32",
        "max_length": 64,
    }
    return train_prompt(dataset, labels, model=model, output=output, **{**arguments, **given})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def dense(folder: Path, dataset: Dataset, labels: LabelSpace = LABELS) -> np.ndarray:
    return SoftLabels.from_dataset(predict(dataset, model=folder), labels).dense()


@pytest.fixture(scope="module")
def student(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_decoder, tmp_path_factory.mktemp("prompt") / "model")


def network(tiny_decoder: Path, *, prompt: int = 5) -> PromptTuned:
    made = PromptTuned(
        load_backbone(str(tiny_decoder), settings={}), torch.randn(prompt, 32), labels=3
    )
    torch.nn.init.normal_(made.score.weight)
    return made


def one_by_one(made: PromptTuned, tokens: list[list[int]]) -> torch.Tensor:
    """The twin: each text alone, its prompt before it as vectors, nothing padded or kept."""
    rows = []
    for own in tokens:
        embedded = made.backbone.get_input_embeddings()(torch.tensor(own))
        hidden = made.backbone(inputs_embeds=torch.cat([made.prompt, embedded])[None])
        rows.append(hidden.last_hidden_state[0, -1] @ made.score.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(20))
def test_a_shared_prompt_equals_one_before_each_text(tiny_decoder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = network(tiny_decoder).train()
    tokens = [rng.integers(3, 250, rng.integers(1, 9)).tolist() for _ in range(4)]
    found = made(*padded(tokens))
    weights = torch.from_numpy(rng.normal(size=(4, 3))).float()
    (found * weights).sum().backward()
    gradient, made.prompt.grad = made.prompt.grad, None
    expected = one_by_one(made, tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    torch.testing.assert_close(gradient, made.prompt.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.model
def test_smollm2_shares_a_prompt() -> None:
    settings = {"gradient_checkpointing": False, "max_length": 64, "seed": 0}
    labels = load_labels(NAMES, multilabel=True)
    made, tokenizer = new_network(
        SMOLLM2, labels, settings | {"prompt_tokens": 20, "init": "labels"}
    )
    assert isinstance(made, PromptTuned)
    torch.nn.init.ones_(made.score.weight)
    made.eval()
    tokens = [tokenizer(text).input_ids for text in ("The cat sat.", "Money", "On the mat, it sat")]
    with torch.inference_mode():
        expected = one_by_one(made, tokens)
        found = made(*padded(tokens))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (
            "gemma2",
            {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
        ),
        ("qwen3", {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}),
        ("gpt2", {"n_positions": 64}),
        ("bloom", {}),
    ],
)
def test_other_decoders_share_a_prompt_too(kind: str, more: dict[str, Any]) -> None:
    """A window shorter than the prompt, positions that are learned, positions that are distances."""
    from transformers import AutoConfig, AutoModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL, **more)).eval()
        made = PromptTuned(backbone, torch.randn(6, 32), labels=3)
        torch.nn.init.normal_(made.score.weight)
    check_prompted(backbone, kind, {"gradient_checkpointing": False})
    tokens = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    torch.testing.assert_close(
        made(*padded(tokens)), one_by_one(made, tokens), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["roberta", "mamba"])
def test_what_is_no_decoder_with_keys_and_values_is_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    backbone = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL)).eval()
    with pytest.raises(ValueError, match=r"model=mine: .* give a decoder"):
        check_prompted(backbone, "mine", {"gradient_checkpointing": False})


def test_only_prompt_and_head_get_gradients(tiny_decoder: Path) -> None:
    made = network(tiny_decoder).train()
    made(*padded([[5, 6, 7], [8]])).sum().backward()
    moved = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"prompt", "score.weight"}
    assert not made.backbone.training  # nothing is dropped out


def test_it_learns_soft_sets_of_labels(student: Path) -> None:
    got = predict(table(), model=student)
    assert [name for name in got.column_names if name in LABEL_COLUMNS] == list(LABEL_COLUMNS)
    assert got["engine"][0].startswith("student:tiny-decoder")
    assert got["error"][:] == [None] * 24
    probs = SoftLabels.from_dataset(got, LABELS).dense()
    assert ((probs >= 0.5) == (TRUE[np.arange(24) % 3] >= 0.5)).all()


def test_a_folder_holds_prompt_and_head_alone(student: Path) -> None:
    held = files(student)
    assert set(held) == {"head.safetensors", "labels.json", "model_card.json", "prompt.safetensors"}
    assert sum(map(len, held.values())) < 2_000_000
    assert load_file(student / "prompt.safetensors")["prompt"].shape == (5, 32)
    assert load_file(student / "head.safetensors")["weight"].shape == (3, 32)
    card = json.loads(held["model_card.json"])
    assert card["settings"]["prompt_tokens"] == 5
    assert card["loss"][-1] < card["loss"][0] / 2


def test_without_balance_probabilities_are_the_targets(tiny_decoder: Path, tmp_path: Path) -> None:
    given = {"num_train_epochs": 30, "pos_weight": None}
    probs = dense(train(table(), tiny_decoder, tmp_path, **given), table())
    np.testing.assert_allclose(probs.reshape(8, 3, 3).mean(axis=0), TRUE, atol=0.12)


def test_single_label_spaces_get_one_distribution(tiny_decoder: Path, tmp_path: Path) -> None:
    labels = load_labels(NAMES)
    probs = dense(train(table(labels=labels), tiny_decoder, tmp_path, labels), table(), labels)
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    assert probs.argmax(axis=1).tolist()[:2] == [0, 1]


def test_the_order_of_labels_changes_nothing(
    student: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    turned = load_labels(["mat", "animal", "money"], multilabel=True)
    other = train(table(labels=turned), tiny_decoder, tmp_path, turned)
    losses = [json.loads((m / "model_card.json").read_text())["loss"] for m in (student, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(
        dense(other, table(), turned)[:, [1, 2, 0]], dense(student, table()), atol=1e-3
    )


def test_the_first_loss_is_balanced_by_hand(tiny_decoder: Path, tmp_path: Path) -> None:
    """The head starts at 0, so that every label says 0.5 and the loss is log 2 times its weights."""
    rows = with_columns(table(6), {"weight": ([1.0, 1.0, 2.0, 1.0, 1.0, 2.0], Value("float32"))})
    folder = train(
        rows,
        tiny_decoder,
        tmp_path,
        validation=table(3, first=90),
        learning_rate=1e-9,
        max_steps=1,
        head_learning_rate=1e-9,
    )
    weights = [1, 1, 2]
    counts = [sum(2 * w * t[k] for w, t in zip(weights, TRUE, strict=True)) for k in range(3)]
    positive = [max(counts) / count for count in counts]
    each = [sum(p * t + 1 - t for p, t in zip(positive, row, strict=True)) for row in TRUE.tolist()]
    loss = sum(w * e for w, e in zip(weights, each, strict=True)) / 4 / 3 * math.log(2)
    card = json.loads((folder / "model_card.json").read_text())
    assert card["loss"] == [pytest.approx(loss, rel=1e-5)]
    seen = card["validation"]["epochs"][0]
    assert seen["loss"] == pytest.approx(sum(each) / 3 * math.log(2), rel=1e-4)


def test_remains_of_probability_are_not_balanced(tiny_decoder: Path, tmp_path: Path) -> None:
    """Of a label that no teacher is sure of, 0.001 of a row would otherwise count as much as 1,000."""
    probs = np.array([[1.0, 1.0, 0.0001]] * 4)
    rows = SoftLabels.from_dense(probs, LABELS).add_to(table(4))
    folder = train(rows, tiny_decoder, tmp_path, max_steps=1)
    loss = json.loads((folder / "model_card.json").read_text())["loss"][0]
    assert loss == pytest.approx((1 + 1 + 4 * 0.0001 + 0.9999) / 3 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("init", ["labels", "random"])
def test_first_prompts(tiny_tokenizer: Any, init: str) -> None:
    def first(size: int, seed: int = 0, names: list[str] = NAMES) -> list[int]:
        settings = {"prompt_tokens": size, "init": init, "seed": seed}
        return first_prompt(tiny_tokenizer, load_labels(names), settings)

    assert first(7) == first(7) == first(7, names=NAMES[::-1])
    assert first(7) != first(7, seed=1)
    assert len(first(40)) == 40
    if init == "labels":
        words = tiny_tokenizer("animal mat money").input_ids
        assert sorted(first(len(words))) == sorted(words)
        assert sorted(first(2 * len(words))) == sorted(words * 2)
    else:
        assert not set(first(200)) & set(tiny_tokenizer.all_special_ids)


def test_a_prompt_begins_as_embeddings(
    tiny_decoder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = train(table(), tiny_decoder, tmp_path, max_steps=1, learning_rate=1e-9)
    ids = first_prompt(tiny_tokenizer, LABELS, {"prompt_tokens": 5, "init": "labels", "seed": 0})
    table_of = load_backbone(str(tiny_decoder), settings={}).get_input_embeddings()
    torch.testing.assert_close(
        load_file(folder / "prompt.safetensors")["prompt"], table_of(torch.tensor(ids)).detach()
    )


def test_same_seed_same_bytes_and_gold_is_never_read(
    student: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    gold = ([[int(i % 3)] for i in range(24)], List(Value("int32")))
    again = train(with_columns(table(), {"gold": gold}), tiny_decoder, tmp_path / "again")
    assert files(again) == files(student)
    other = train(table(), tiny_decoder, tmp_path / "other", seed=1)
    assert files(other)["prompt.safetensors"] != files(student)["prompt.safetensors"]


def test_predictions_do_not_depend_on_passes_or_order(student: Path) -> None:
    whole = dense(student, table())
    for given in ({"pass_tokens": 1}, {"block_rows": 5}):
        other = SoftLabels.from_dataset(predict(table(), model=student, **given), LABELS).dense()
        np.testing.assert_allclose(other, whole, atol=1e-5)
    turned = dense(student, table().select(range(23, -1, -1)))
    np.testing.assert_allclose(turned[::-1], whole, atol=1e-5)


def test_what_is_kept_belongs_to_a_prompt(student: Path, tmp_path: Path) -> None:
    other = shutil.copytree(student, tmp_path / "other")
    prompt = load_file(other / "prompt.safetensors")["prompt"]
    save_file({"prompt": -prompt}, other / "prompt.safetensors")
    assert student_sha(other) != student_sha(student)
    first = predict(table(), model=student, output=tmp_path / "kept")
    second = predict(table(), model=other, output=tmp_path / "kept")
    assert first["label_probs"][:] != second["label_probs"][:]


def test_bfloat16_computes_the_same_within_its_digits(
    student: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    half = train(table(), tiny_decoder, tmp_path, dtype="bfloat16", max_steps=2)
    full = train(table(), tiny_decoder, tmp_path / "full", max_steps=2)
    np.testing.assert_allclose(dense(half, table()), dense(full, table()), atol=0.1)
    assert load_file(half / "prompt.safetensors")["prompt"].dtype == torch.float32


def test_it_computes_at_most_half_of_the_tokens_of_generated_sets(
    tiny_decoder: Path, tiny_tokenizer: Any
) -> None:
    """Counted in the layers, with a prompt longer than its texts and `generate` with its KV cache.

    Were `generate` too given the prompt's keys and values, the replies would be all the difference.
    """
    from transformers import AutoModelForCausalLM

    texts = table(6)["text"][:]
    tokens = [tiny_tokenizer(text).input_ids for text in texts]
    sets = label_sets(tiny_tokenizer, NAMES)
    made = network(tiny_decoder, prompt=20).eval()
    writer = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    computed = {"read": 0, "written": 0}

    def count(kind: str, layer: torch.nn.Module) -> None:
        def see(module: Any, given: Any, named: Any) -> None:
            hidden = given[0] if given else named["hidden_states"]
            computed[kind] += hidden.shape[0] * hidden.shape[1]

        layer.register_forward_pre_hook(see, with_kwargs=True)

    count("read", made.backbone.layers[0])
    count("written", writer.model.layers[0])
    probabilities(made, tokens, LABELS, 10_000)
    replies = 0
    for own in tokens:
        words = writer.get_input_embeddings()(torch.tensor([own]))
        reply = writer.generate(
            inputs_embeds=torch.cat([made.prompt[None], words], dim=1),
            attention_mask=torch.ones(1, len(made.prompt) + len(own), dtype=torch.long),
            prefix_allowed_tokens_fn=sets.prefix_allowed_tokens_fn(0),
            max_new_tokens=sets.longest,
            eos_token_id=sets.end,
            pad_token_id=0,
            do_sample=False,
        )[0].tolist()
        assert sets.read(reply)
        replies += len(reply)
    assert (
        computed["written"] == sum(20 + len(own) for own in tokens) + replies - 6
    )  # less the ends
    assert computed["read"] == 20 + 6 * max(map(len, tokens))
    assert computed["read"] <= computed["written"] / 2


def test_bad_input(student: Path, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BertModel does not read .*train_classifier"):
        train(table(), tiny_encoder, tmp_path / "m")
    with pytest.raises(ValueError, match=r"prompt_tokens must be at least 1; got 0"):
        train(table(), tiny_decoder, tmp_path / "m", prompt_tokens=0)
    for name, value, message in [
        ("init", "label", "init is 'labels' or 'random'; got 'label'"),
        ("pos_weight", "no", "pos_weight is 'balanced' or null; got 'no'"),
    ]:
        plain = inspect.unwrap(train_prompt)  # whose types the tests check before
        with pytest.raises(ValueError, match=message):
            plain(table(), LABELS, model=tiny_decoder, output=tmp_path / "m", **{name: value})
    with pytest.raises(
        ValueError, match=r"max_length=64 with prompt_tokens=449 is more than the 512"
    ):
        train(table(), tiny_decoder, tmp_path / "m", prompt_tokens=449)
    for tokens in (512, 600):
        with pytest.raises(
            ValueError, match=rf"^prompt_tokens={tokens} leaves no room for a text .* 512 positions"
        ):
            train(table(), tiny_decoder, tmp_path / "m", prompt_tokens=tokens)
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True.*leave it out"):
        train(table(), tiny_decoder, tmp_path / "m", gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"there is no setting 'pooling'"):
        train(table(), tiny_decoder, tmp_path / "m", pooling="mean")
    with pytest.raises(
        ValueError, match=r"holds prompt.safetensors, which is no file of a student"
    ):
        train_classifier(table(), LABELS, model=tiny_decoder, output=student)
    half = shutil.copytree(student, tmp_path / "half")
    (half / "prompt.safetensors").write_bytes(files(student)["prompt.safetensors"][:30])
    with pytest.raises(ValueError, match=r"half' cannot be loaded \(SafetensorError"):
        predict(table(), model=half)
    (half / "prompt.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompt.safetensors is missing"):
        predict(table(), model=half)
