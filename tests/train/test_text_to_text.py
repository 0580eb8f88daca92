import json
import math
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from safetensors.torch import load_file
from scipy.sparse import csr_array

from llmlabel.data import with_columns
from llmlabel.engine.labelsets import label_sets
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels
from llmlabel.train import text_to_text
from llmlabel.train.network import padded
from llmlabel.train.prompt_writer import PromptWriter, written
from llmlabel.train.soft_prompt import keep_matrices
from llmlabel.train.student import Rows
from llmlabel.train.text_to_text import train_text_to_text, write_labels

NAMES = ["animal", "money", "mat"]
LABELS = load_labels(NAMES, multilabel=True)
TRUE = np.array([[0.9, 0.0, 0.1], [0.0, 0.9, 0.0], [0.8, 0.05, 1.0]])  # three kinds of text


def table(rows: int = 24, *, first: int = 0, probs: np.ndarray = TRUE) -> Dataset:
    kinds = ["the cat sat", "business and money", "the cat on the mat"]
    texts = [f"{first + i} {kinds[i % 3]}" for i in range(rows)]
    dataset = Dataset.from_dict({"id": [f"r{first + i}" for i in range(rows)], "text": texts})
    return SoftLabels.from_dense(probs[np.arange(rows) % 3], LABELS).add_to(dataset)


def train(dataset: Dataset, model: Path, output: Path, **given: Any) -> Path:
    arguments: dict[str, Any] = {
        "prompt_tokens": 10,
        "learning_rate": 0.3,
        "num_train_epochs": 40,
        "per_device_train_batch_size": 8,
        "dtype": "float32",
        "max_length": 64,
    }
    return train_text_to_text(dataset, LABELS, model=model, output=output, **{**arguments, **given})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model_card.json").read_text())
    return found


def writer(tiny_decoder: Path, *, prompt: int = 5, seed: int = 0) -> PromptWriter:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_decoder)
        return PromptWriter(model, torch.randn(prompt, 32)).eval()


def one_by_one(
    made: PromptWriter, contexts: list[list[int]], said: list[list[int]]
) -> torch.Tensor:
    """The twin: each text alone, its prompt before it as vectors, nothing padded or kept."""
    found = []
    for context, reply in zip(contexts, said, strict=True):
        words = made.model.get_input_embeddings()(torch.tensor(context + reply))
        logits = made.model(inputs_embeds=torch.cat([made.prompt, words])[None]).logits[0]
        log_probs = logits.log_softmax(dim=1)[len(made.prompt) + len(context) - 1 :]
        found.append(-sum(log_probs[i, token] for i, token in enumerate(reply)) / len(reply))
    return torch.stack(found)


def random_case(seed: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(3, 250, rng.integers(2, 9)).tolist() for _ in range(4)]
    return contexts, [rng.integers(3, 250, rng.integers(1, 6)).tolist() for _ in range(4)]


def inputs(contexts: list[list[int]], said: list[list[int]]) -> tuple[torch.Tensor, ...]:
    replies = [c[-1:] + r for c, r in zip(contexts, said, strict=True)]
    return *padded([c[:-1] for c in contexts]), *padded(replies)


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_of_a_reply_is_that_of_each_text_alone(tiny_decoder: Path, seed: int) -> None:
    made = writer(tiny_decoder, seed=seed).train()
    contexts, said = random_case(seed)
    weights = torch.arange(1.0, 5.0)
    found = made(*inputs(contexts, said))
    (found * weights).sum().backward()
    gradient, made.prompt.grad = made.prompt.grad, None
    expected = one_by_one(made, contexts, said)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    torch.testing.assert_close(gradient, made.prompt.grad, atol=1e-4, rtol=1e-3)
    moved = [name for name, p in made.named_parameters() if p.grad is not None]
    assert moved == ["prompt"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt2", {"n_positions": 64}),
        ("bloom", {}),
        ("qwen3", {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_other_decoders_write_too(kind: str, more: dict[str, Any]) -> None:
    """Positions that are learned, and positions that are distances."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=260, initializer_range=0.2, **small, **more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = PromptWriter(AutoModelForCausalLM.from_config(config), torch.randn(4, 32)).eval()
    contexts, said = random_case(1)
    torch.testing.assert_close(
        made(*inputs(contexts, said)), one_by_one(made, contexts, said), atol=1e-5, rtol=1e-5
    )


def test_replies_are_those_of_generate(tiny_decoder: Path, tiny_tokenizer: Any) -> None:
    names = ["cat", "catfish", "on the mat", "no", "not"]
    sets = label_sets(tiny_tokenizer, names, before="\n", most=3)
    sizes = set()
    for seed in range(5):
        made = writer(tiny_decoder, seed=seed)
        contexts, _ = random_case(seed)
        found = written(made, contexts, sets, 20)
        for context, reply in zip(contexts, found, strict=True):
            words = made.model.get_input_embeddings()(torch.tensor(context))
            expected = made.model.generate(
                inputs_embeds=torch.cat([made.prompt, words])[None],
                attention_mask=torch.ones(1, 5 + len(context), dtype=torch.long),
                prefix_allowed_tokens_fn=sets.prefix_allowed_tokens_fn(0),
                max_new_tokens=sets.longest,
                eos_token_id=sets.end,
                pad_token_id=0,
                do_sample=False,
            )[0].tolist()
            assert reply == expected
            sizes.add(len(sets.read(reply)))
    assert len(sizes) > 1


@pytest.fixture(scope="module")
def student(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_decoder, tmp_path_factory.mktemp("writer") / "model")


def test_it_learns_to_write_sets_of_labels(student: Path) -> None:
    got = write_labels(table(), model=student)
    assert [name for name in got.column_names if name in LABEL_COLUMNS] == list(LABEL_COLUMNS)
    assert got["error"][:] == [None] * 24
    probs = SoftLabels.from_dataset(got, LABELS).dense()
    right = (probs == (TRUE[np.arange(24) % 3] >= 0.5)).all(axis=1)
    assert right.mean() > 0.7  # of a random decoder; the most frequent set alone is a third


def test_what_a_row_is_does_not_depend_on_its_neighbours(student: Path) -> None:
    whole = write_labels(table(), model=student)["label_ids"][:]
    for given in ({"pass_tokens": 1}, {"block_rows": 5}):
        assert write_labels(table(), model=student, **given)["label_ids"][:] == whole
    turned = write_labels(table().select(range(23, -1, -1)), model=student)
    assert turned["label_ids"][:] == whole[::-1]


def test_empty_and_long_texts_are_said(student: Path) -> None:
    texts = Dataset.from_dict({"id": ["a", "b"], "text": [" ", "cat " * 70]})
    got = write_labels(texts, model=student)
    assert got["error"][0] == "empty text"
    assert got["label_ids"][0] == []
    assert got["error"][1].startswith("text cut: ")
    assert got["label_ids"][1]


def test_the_folder_holds_a_prompt_alone(student: Path) -> None:
    held = files(student)
    assert set(held) == {"labels.json", "model_card.json", "prompt.safetensors"}
    assert sum(map(len, held.values())) < 2_000_000
    assert load_file(student / "prompt.safetensors")["prompt"].shape == (10, 32)
    assert card(student)["loss"][-1] < card(student)["loss"][0] / 2


def test_matrices_that_are_kept_compute_what_autocast_computes(tiny_decoder: Path) -> None:
    made, kept = writer(tiny_decoder), writer(tiny_decoder)
    keep_matrices(kept.model, torch.bfloat16)
    case = inputs(*random_case(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = made(*case)
    found = kept(*case)
    assert found.tolist() == expected.tolist()
    assert found.tolist() != made(*case).tolist()
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(kept.prompt.grad, made.prompt.grad)
    assert kept.model.get_input_embeddings().weight.dtype == torch.float32


def test_bfloat16_computes_the_same_within_its_digits(tiny_decoder: Path, tmp_path: Path) -> None:
    given = {"max_steps": 2, "validation": table(3, first=90), "learning_rate": 1e-3}
    half = train(table(), tiny_decoder, tmp_path / "half", dtype="bfloat16", **given)
    full = train(table(), tiny_decoder, tmp_path / "full", **given)
    assert card(half)["loss"] == [pytest.approx(card(full)["loss"][0], rel=0.02)]
    losses = [card(one)["validation"]["epochs"][0]["loss"] for one in (half, full)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert load_file(half / "prompt.safetensors")["prompt"].dtype == torch.float32


def test_same_seed_same_bytes(tiny_decoder: Path, tmp_path: Path) -> None:
    one, again, other = (
        train(table(), tiny_decoder, tmp_path / name, max_steps=4, seed=seed)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert files(one) == files(again)
    assert files(one)["prompt.safetensors"] != files(other)["prompt.safetensors"]


def test_the_loss_depends_on_the_order_of_labels(tiny_decoder: Path, tiny_tokenizer: Any) -> None:
    """Unlike that of a head with a logit for each label."""
    made = writer(tiny_decoder)
    sets = label_sets(tiny_tokenizer, NAMES, before="\n")
    context = tiny_tokenizer("the cat\n").input_ids
    one, other = made(*inputs([context] * 2, [sets.encode([0, 2]), sets.encode([2, 0])])).tolist()
    assert abs(one - other) > 0.01


def test_the_first_loss_by_hand(tiny_decoder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """animal 4 rows, mat 2, money 2: "animal", "money", "animal; mat", weighing 1, 2 and 1 + 2."""
    folder = train(
        table(6),
        tiny_decoder,
        tmp_path,
        validation=table(3, first=90),
        learning_rate=1e-9,
        max_steps=1,
    )
    made = writer(tiny_decoder)
    made.prompt.data = load_file(folder / "prompt.safetensors")["prompt"]
    sets = label_sets(tiny_tokenizer, NAMES, before="\n")
    said = [sets.encode(own) for own in ([0], [1], [0, 2])]

    def mean(dataset: Dataset) -> float:
        contexts = [
            tiny_tokenizer(text).input_ids + tiny_tokenizer("\n").input_ids
            for text in dataset["text"]
        ]
        surprise = one_by_one(made, contexts, (said * 2)[: len(dataset)]).tolist()
        weights = [1, 2, 3] * 2
        return math.fsum(w * s for w, s in zip(weights, surprise, strict=False)) / len(dataset)

    assert card(folder)["loss"] == [pytest.approx(mean(table(6)), rel=1e-4)]
    seen = card(folder)["validation"]["epochs"][0]["loss"]
    assert seen == pytest.approx(mean(table(3, first=90)), rel=1e-4)


def test_targets_are_never_made_a_table(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Rows, "targets")
    train(table(6), tiny_decoder, tmp_path, max_steps=1)


def test_replies_are_made_of_what_is_stored(tiny_tokenizer: Any) -> None:
    """2,000 rows of 3 labels among 2,000 are 32 MB as a table."""
    labels = load_labels([f"l{i}" for i in range(2000)], multilabel=True)
    ids = (np.arange(2000)[:, None] * 3 + np.arange(3)) % 2000
    ids.sort(axis=1)
    values = np.tile([0.9, 0.3, 0.5], 2000)
    soft = csr_array((values, ids.ravel(), np.arange(2001) * 3), shape=(2000, 2000))
    names = [str(row) for row in range(2000)]
    rows = Rows(names, ["the cat"] * 2000, soft, np.ones(2000), 2000, list(range(2000)))
    settings = {"max_labels": 2, "max_length": 8, "pos_weight": "balanced"}
    script = text_to_text._Script.of(tiny_tokenizer, labels, rows, settings)
    tracemalloc.start()
    some = text_to_text._with_labels(rows)
    replies = script.replies(some.texts, some.soft)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert script.counts.sum() == 4000
    first = sorted([ids[0, 0], ids[0, 2]], key=lambda label: (-script.counts[label], label))
    assert script.sets.read(replies.said[0]) == first


def test_rows_without_labels_are_left_out_and_counted(tiny_decoder: Path, tmp_path: Path) -> None:
    probs = np.array([[0.9, 0.0, 0.0], [0.3, 0.3, 0.0], [0.0, 0.0, 0.6]])
    folder = train(table(6, probs=probs), tiny_decoder, tmp_path, max_steps=1)
    assert card(folder)["rows"] == {"given": 6, "trained": 4}
    assert card(folder)["settings"]["max_labels"] == 1


def test_bad_input(student: Path, tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 6 rows has a label with a probability"):
        train(table(6, probs=TRUE * 0.4), tiny_decoder, tmp_path / "m")
    none = with_columns(table(3, first=90), {"gold": ([[], [], []], List(Value("int32")))})
    with pytest.raises(ValueError, match=r"none of the 3 validation rows has a label with a prob"):
        train(table(6), tiny_decoder, tmp_path / "m", validation=none, max_steps=1)
    with pytest.raises(ValueError, match=r"prompt_tokens must be at least 1; got 0"):
        train(table(), tiny_decoder, tmp_path / "m", prompt_tokens=0)
    with pytest.raises(ValueError, match=r"max_length=64 with 4\d\d tokens .* the 512 tokens"):
        train(table(), tiny_decoder, tmp_path / "m", prompt_tokens=440)
    settings = {"prompt_tokens": 1, "init": "labels", "pos_weight": "Balanced"}
    with pytest.raises(ValueError, match="pos_weight is 'balanced' or null; got 'Balanced'"):
        text_to_text._check(settings, LABELS, tmp_path)  # whose types the tests check before
    with pytest.raises(ValueError, match="init is 'labels' or 'random'; got 'names'"):
        text_to_text._check(settings | {"init": "names"}, LABELS, tmp_path)
    one = load_labels(NAMES)
    with pytest.raises(ValueError, match=r"learns sets of labels"):
        train_text_to_text(table(), one, model=tiny_decoder, output=tmp_path / "m")
    other = shutil.copytree(student, tmp_path / "other")
    (other / "head.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds head.safetensors, which is no file of a writer"):
        train(table(), tiny_decoder, other)
    (other / "prompt.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompt.safetensors is missing"):
        write_labels(table(), model=other)
