"""Training of dual encoders: gradients, negatives, what is remembered, resume, folders, bad input."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from llmlabel.label.index import check_encoder, load_index
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.refine.adapt import gold_labels
from llmlabel.train import loop
from llmlabel.train.dual_encoder import load_dual_encoder, train_dual_encoder
from llmlabel.train.dual_settings import settle_dual
from llmlabel.train.towers import encode, load_tower, tokens_of

NONE = np.zeros(0, dtype=np.int64)
WORDS = ["cat", "dog", "fish", "bank", "money", "ball", "goal", "tree", "leaf", "stone", "river"]


@pytest.fixture(scope="module")
def tower(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random sentence-transformers model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(tiny_encoder))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    folder = tmp_path_factory.mktemp("tower")
    SentenceTransformer(modules=[transformer, pooling]).save(str(folder), create_model_card=False)
    return folder


def with_dropout(tower: Path, folder: Path) -> Path:
    """The same model with dropout."""
    import shutil

    shutil.copytree(tower, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def labels() -> LabelSpace:
    return load_labels(WORDS, multilabel=True)


@pytest.fixture(scope="module")
def rows(labels: LabelSpace) -> Dataset:
    rng = np.random.default_rng(0)
    gold = [sorted(rng.choice(len(WORDS), 1 + i % 3, replace=False).tolist()) for i in range(36)]
    texts = [" and the ".join(WORDS[j] for j in own) + " !" * (i % 4) for i, own in enumerate(gold)]
    table = {"text": texts, "gold": gold}
    return gold_labels(Dataset.from_dict(table), labels)


def train(rows: Dataset, labels: LabelSpace, model: Path, output: Path, **training: Any) -> Any:
    given = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 9,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "max_length": 32,
    }
    train_dual_encoder(rows, labels, model=model, output=output, **(given | training))
    weights = load_dual_encoder(output).texts.state_dict()
    return {name: value.numpy() for name, value in weights.items()}


def assert_equal(one: dict[str, Any], two: dict[str, Any], *, atol: float = 0.0) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.endswith("key.bias"):
            continue  # softmax does not feel it: its gradient is rounding, which Adam makes steps of
        np.testing.assert_allclose(two[name], value, rtol=0, atol=atol, err_msg=name)


def moved(weights: dict[str, Any], model: Path) -> float:
    """How far training has taken the weights."""
    before = load_tower(model, max_length=32).state_dict()
    return max(float(np.abs(before[n].numpy() - value).max()) for n, value in weights.items())


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("pass_tokens", [30, 10_000])
def test_the_gradient_cache_gives_the_gradient_of_plain_autograd_with_dropout(
    tower: Path, tmp_path: Path, pass_tokens: int
) -> None:
    model = load_tower(with_dropout(tower, tmp_path / "model"), max_length=32).train()
    tokens = tokens_of(model, ["a cat", "the dog sat on the mat", "money", "x", "the bank and"])
    found = encode(model, tokens, pass_tokens=pass_tokens, seed=3)
    aim = torch.linspace(-1, 1, found.vectors.numel()).view_as(found.vectors)
    torch.autograd.backward((found.vectors * aim).sum())
    found.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = []
    for seed, chosen in found._chunks:
        torch.manual_seed(seed)
        vectors = found._again(chosen)
        torch.testing.assert_close(vectors, found.vectors.detach()[chosen], rtol=0, atol=1e-6)
        plain.append((vectors * aim[chosen]).sum())
    torch.autograd.backward(sum(plain))
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found._chunks) == (1 if pass_tokens > 100 else 3)
    assert mine.keys() == theirs.keys()
    assert max(float(value.abs().max()) for value in mine.values()) > 0.1
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5, msg=name)
    # what dropout drew does matter, so that the test could fail
    torch.manual_seed(99)
    assert not torch.allclose(found._again(found._chunks[0][1]), vectors, atol=1e-3)


def test_texts_of_the_same_tokens_are_computed_once(tower: Path) -> None:
    model = load_tower(tower, max_length=32)
    tokens = tokens_of(model, ["a cat", "money", "a cat", "a cat"])
    found, apart = (encode(model, some, pass_tokens=99, seed=0) for some in (tokens, tokens[:2]))
    assert found.tokens == apart.tokens == len(tokens[0]) + len(tokens[1])
    none = encode(model, [], pass_tokens=99, seed=0)  # of a process that has no row left
    assert none.vectors.shape == (0, found.vectors.shape[1])
    none.backward()
    aim = torch.linspace(-1, 1, found.vectors.numel()).view_as(found.vectors)
    torch.autograd.backward((found.vectors * aim).sum())
    found.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    summed = torch.stack([aim[0] + aim[2] + aim[3], aim[1]])
    torch.autograd.backward((apart.vectors * summed).sum())
    apart.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_labels_that_are_read_alike_are_no_negatives_of_each_other(
    tower: Path, rows: Dataset, labels: LabelSpace
) -> None:
    from llmlabel.train.dual_encoder import _step
    from llmlabel.train.dual_settings import settle_dual
    from llmlabel.train.student import training_rows
    from llmlabel.train.towers import Towers

    names = (*WORDS[:-1], "cat")  # the last one, now another cat
    parents = (*labels.parents[:-1], ("tree",))
    two = LabelSpace(labels.ids, names, labels.descriptions, parents, multilabel=True)
    table = Dataset.from_dict({"text": ["a", "b", "c"], "gold": [[0], [10, 3], [4]]})
    given = gold_labels(table, two)
    towers = Towers(load_tower(tower, max_length=32))
    step = _step(towers, training_rows(given, two), two, given, settle_dual({}, 11))
    assert [step.left_out[[row]].indices.tolist() for row in range(3)] == [[10], [0], []]


def test_one_step_is_that_of_a_plain_loss_over_all_labels(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    """AdamW on the formula of the paper, written out."""
    one = {"max_steps": 1, "per_device_train_batch_size": 36, "warmup_ratio": 0.0}
    mine = train(rows, labels, tower, tmp_path / "m", negatives="all", pass_tokens=64, **one)
    model = load_tower(tower, max_length=32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def vectors(texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(
            model(model.preprocess(texts))["sentence_embedding"], dim=1
        )

    scores = vectors(rows["text"][:]) @ vectors(labels.texts()).T / 0.05
    total = torch.zeros(())
    for row, gold in enumerate(rows["gold"][:]):
        others = torch.tensor([j for j in range(len(labels)) if j not in gold])
        negatives = scores[row, others].exp().sum()
        for j in gold:
            share = scores[row, j].exp() / (scores[row, j].exp() + negatives)
            total = total - share.log() / len(gold) / len(rows)
    torch.autograd.backward(total)
    optimizer.step()
    assert_equal(mine, {n: v.numpy() for n, v in model.state_dict().items()}, atol=1e-5)
    assert moved(mine, tower) > 5e-4


def test_passes_change_nothing(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    one = train(rows, labels, tower, tmp_path / "1", negatives="all", pass_tokens=9999)
    two = train(rows, labels, tower, tmp_path / "2", negatives="all", pass_tokens=20)
    assert moved(one, tower) > 5e-3
    assert_equal(one, two, atol=1e-5)


# ------------------------------------------------------------------------------------ negatives


def test_cached_labels_that_are_all_refreshed_are_all_labels(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    small = {"per_device_train_batch_size": 3, "num_train_epochs": 1}
    every = train(rows, labels, tower, tmp_path / "all", negatives="all", **small)
    cached = train(rows, labels, tower, tmp_path / "c", negatives="cached", refresh=1.0, **small)
    assert_equal(every, cached, atol=1e-6)
    card = json.loads((tmp_path / "c" / "model_card.json").read_text())
    assert card["settings"]["refresh"] == 1.0
    some = {"negatives": "cached", "refresh": 0.0, "hard_labels": 1}
    few = train(rows, labels, tower, tmp_path / "f", **some, **small)
    cards = [json.loads((tmp_path / n / "model_card.json").read_text()) for n in ("all", "f")]
    assert cards[1]["label_tokens"] < 0.9 * cards[0]["label_tokens"]
    assert 1e-4 < max(float(np.abs(few[n] - v).max()) for n, v in every.items()) < 0.02


@pytest.mark.parametrize("negatives", ["all", "cached", "ann", "inbatch"])
@pytest.mark.parametrize("positives", ["all", "sampled"])
def test_every_kind_of_negatives_learns(
    tower: Path,
    tmp_path: Path,
    rows: Dataset,
    labels: LabelSpace,
    negatives: str,
    positives: str,
) -> None:
    train(
        rows,
        labels,
        tower,
        tmp_path / "m",
        negatives=negatives,
        positives=positives,
        hard_labels=3,
        refresh=0.1,
        num_train_epochs=6,
        validation=rows.select(range(9)).map(lambda row: {"text": "so " + row["text"]}),
    )
    card = json.loads((tmp_path / "m" / "model_card.json").read_text())
    assert card["loss"][-1] < card["loss"][0]
    assert card["validation"]["epochs"][card["validation"]["best_epoch"]]["P@1"] > 0.5


def test_the_gradient_of_labels_is_right_on_average(
    tower: Path, rows: Dataset, labels: LabelSpace
) -> None:
    """Over all turns the few labels of `cached` have the gradient of `all`, weights alike."""
    from llmlabel.train.dual_encoder import _step
    from llmlabel.train.dual_settings import settle_dual
    from llmlabel.train.loop import Update
    from llmlabel.train.student import training_rows
    from llmlabel.train.towers import Towers

    class Alone:
        process_index, num_processes, device = 0, 1, torch.device("cpu")

        def reduce(self, value: torch.Tensor, _: str) -> torch.Tensor:
            return value

    def gradient(turn: int, **given: Any) -> torch.Tensor:
        towers = Towers(load_tower(tower, max_length=32))
        settings = settle_dual(
            {"dtype": "float32", "max_length": 32, "hard_labels": 0, **given}, 11
        )
        step = _step(towers, training_rows(rows, labels), labels, rows, settings)
        step.pool._turn = turn
        step.pool.vectors = step.vectors(None)  # not rounded
        step.gradient(Update(Alone(), 0, [0, 1], 2.0))
        grads = [p.grad.flatten() for p in towers.parameters() if p.grad is not None]
        return torch.cat(grads)

    every = gradient(0, negatives="all")
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    given = {label for own in rows["gold"][:2] for label in own}
    turns = [
        gradient(turn, negatives="cached", refresh=1 / len(labels))
        for turn, label in enumerate(order)
        if label not in given
    ]
    assert len(turns) == len(labels) - len(given) > 5
    error = float((torch.stack(turns).mean(dim=0) - every).norm() / every.norm())
    assert error < 1e-4
    assert min(float((one - every).norm() / every.norm()) for one in turns) > 0.05


def test_labels_left_out_are_no_negatives(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    """Where every other label is left out there is nothing to learn."""
    everything = [list(range(len(WORDS)))] * len(rows)
    weights = train(
        rows.add_column("excluded_ids", everything), labels, tower, tmp_path / "m", weight_decay=0.0
    )
    assert moved(weights, tower) < 1e-6


# ------------------------------------------------------------------------- resume and the folder


@pytest.mark.parametrize("negatives", ["cached", "inbatch"])
def test_a_killed_training_ends_as_an_undisturbed_one(
    tower: Path,
    tmp_path: Path,
    rows: Dataset,
    labels: LabelSpace,
    negatives: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_dropout(tower, tmp_path / "model")
    given: dict[str, Any] = {"negatives": negatives, "save_steps": 1, "positives": "sampled"}
    given |= {"hard_labels": 2, "refresh": 0.2}
    whole = train(rows, labels, model, tmp_path / "whole", **given)
    update = loop._Run.update

    def killed(run: Any, chosen: list[int]) -> None:
        if run.fitted.updates == 5:
            raise KeyboardInterrupt
        update(run, chosen)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train(rows, labels, model, tmp_path / "killed", **given)
    with pytest.raises(FileNotFoundError, match="training has finished"):
        load_dual_encoder(tmp_path / "killed")
    assert_equal(whole, train(rows, labels, model, tmp_path / "killed", **given))
    cards = [
        json.loads((tmp_path / n / "model_card.json").read_text()) for n in ("whole", "killed")
    ]
    assert cards[0]["label_tokens"] == cards[1]["label_tokens"] > 0


def test_two_towers_are_saved_apart(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    train(rows, labels, tower, tmp_path / "m", label_model=tower)
    found = load_dual_encoder(tmp_path / "m")
    one, two = (part.encode(["a cat"])[0] for part in (found.texts, found.labels))
    assert np.abs(one - two).max() > 1e-3
    assert found.card["label_model"] == str(tower)
    kept = load_index(tmp_path / "m" / "index", labels=labels)
    check_encoder(kept, found.labels)
    with pytest.raises(ValueError, match="it does not belong to the model"):
        check_encoder(kept, found.texts)
    train(rows, labels, tower, tmp_path / "m", num_train_epochs=1)
    assert not (tmp_path / "m" / "label_encoder").exists()


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"negatives": "some"}, r"negatives is one of all, cached, ann, inbatch; got 'some'"),
        ({"loss": "hinge"}, r"loss is one of decoupled_softmax, .*; got 'hinge'"),
        ({"temperature": 0.0}, r"temperature must be between 0.001 and 100.0; got 0.0"),
        ({"refresh": 1.5}, r"refresh must be between 0.0 and 1.0; got 1.5"),
        ({"head_learning_rate": 0.1}, r"head_learning_rate: a dual encoder has no head"),
        ({"early_stopping_patience": 1}, r"early_stopping_patience=1 needs `validation`"),
        ({"epochs": 1}, r"there is no setting 'epochs'"),
        ({"gradient_checkpointing": True}, r"gradient_checkpointing: .*lower pass_tokens"),
        ({"loss": "soft_topk", "top_k": 11}, r"top_k=11 must be below .*, which is 11"),
        ({"loss": "soft_topk", "negatives": "inbatch"}, r"needs more labels than top_k in every"),
    ],
)
def test_bad_settings(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace, given: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(rows, labels, tower, tmp_path / "m", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "0.05"}, "temperature must be a number; got '0.05'"),
        ({"temperature": float("nan")}, r"temperature must be between 0\.001 and 100\.0; got nan"),
        ({"top_k": 2.5}, "top_k must be a whole number; got 2.5"),
        ({"hard_labels": None}, "hard_labels must be a whole number; got None"),
        ({"gradient_filter": True}, "gradient_filter must be a number; got True"),
        ({"refresh": "all"}, "refresh must be a number; got 'all'"),
    ],
)
def test_settings_are_numbers(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(settle_dual)(given, 11)
    assert inspect.unwrap(settle_dual)({"top_k": np.int64(3), "temperature": 1}, 11)["top_k"] == 3


def test_towers_of_other_widths_are_refused(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    wide = SentenceTransformer(str(tower))
    wide.append(Dense(32, 7))
    wide.save(str(tmp_path / "wide"), create_model_card=False)
    with pytest.raises(
        ValueError,
        match=r"has vectors of 32 numbers, label_model .*wide of 7; give two of one width",
    ):
        train(rows, labels, tower, tmp_path / "m", label_model=tmp_path / "wide")


def test_rows_without_a_label_are_left_out_and_counted(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    table = {name: rows[name][:] for name in rows.column_names}
    table["label_ids"][0], table["label_probs"][0] = [], []
    table["text"][1] = " "
    some = Dataset.from_dict(table, features=rows.features)
    train(some, labels, tower, tmp_path / "m", max_steps=1)
    assert load_dual_encoder(tmp_path / "m").card["rows"] == {"given": 36, "trained": 34}
    none = some.select([0])
    with pytest.raises(ValueError, match="none of the 1 rows has a"):
        train(none, labels, tower, tmp_path / "n")


def test_a_folder_with_other_files_is_refused(
    tower: Path, tmp_path: Path, rows: Dataset, labels: LabelSpace
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"it holds notes\.txt, which is no file of a dual encoder"
    ):
        train(rows, labels, tower, tmp_path)
