import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from safetensors.torch import load_file

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels
from llmlabel.train import checkpoint
from llmlabel.train.prompt_generator import predict_by_prompts, train_prompt_generator
from llmlabel.train.prompt_networks import (
    Adversaries,
    LabelReader,
    PromptGenerator,
    load_generator,
    new_reader,
    text_vectors,
)

NAMES = ["animal", "money"]
LABELS = load_labels(NAMES)
SETTINGS = {"max_length": 64, "pass_tokens": 8192}


def table(rows: int = 24, *, turned: bool = False) -> Dataset:
    """Two domains, whose texts are written differently."""
    kinds = ["the cat sat", "business and money", "the mat! the cat!", "sports! business!"]
    texts = [f"{i} {kinds[i % 4]}" for i in range(rows)]
    probs = np.array([[0.9, 0.1], [0.0, 1.0]])[(np.arange(rows) + turned) % 2]
    dataset = Dataset.from_dict({"id": [f"r{i}" for i in range(rows)], "text": texts})
    domains = ["loud" if i % 4 > 1 else "calm" for i in range(rows)]
    return with_columns(
        SoftLabels.from_dense(probs, LABELS).add_to(dataset), {"domain": (domains, Value("string"))}
    )


def train(dataset: Dataset, model: Path, output: Path, **given: Any) -> Path:
    arguments: dict[str, Any] = {
        "domain": "domain",
        "template": "the cat",
        "domain_epochs": 15,
        "domain_learning_rate": 0.05,
        "learning_rate": 3e-4,
        "head_learning_rate": 3e-4,
        "num_train_epochs": 100,
        "per_device_train_batch_size": 24,
        "dtype": "float32",
        "max_length": 64,
    }
    return train_prompt_generator(
        dataset, LABELS, model=model, output=output, **{**arguments, **given}
    )


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model_card.json").read_text())
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def dense(folder: Path, **given: Any) -> np.ndarray:
    return SoftLabels.from_dataset(
        predict_by_prompts(table(), model=folder, **given), LABELS
    ).dense()


@pytest.fixture(scope="module")
def student(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_encoder, tmp_path_factory.mktemp("spg") / "model")


def adversaries(seed: int) -> Adversaries:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PromptGenerator(0.3 * torch.randn(3, 2, 6))
        torch.nn.init.normal_(made.layers[-2].weight)
        return Adversaries(made)


@pytest.mark.parametrize("seed", range(20))
def test_the_losses_are_least_squares(seed: int) -> None:
    network = adversaries(seed).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts, prompts = torch.randn(5, 6), torch.randn(5, 2, 6)
        torch.manual_seed(7)
        found = network(texts, prompts).tolist()
        torch.manual_seed(7)
        order = torch.randperm(5).tolist()
        noise = torch.randn(5, 6)
    for row, loss in enumerate(found):
        other = texts[order[row]]
        drawn = network.generator(noise[row : row + 1], other[None])[0]

        def says(prompt: torch.Tensor, text: torch.Tensor) -> float:
            place = (prompt - network.generator.centre) / network.generator.bound
            given = torch.cat([place[0], place[1], text])
            return float(network.judge(given).detach())

        true, false = says(prompts[row], texts[row]), says(drawn, other)
        assert loss == pytest.approx(((true - 1) ** 2 + false**2) / 2 + (false - 1) ** 2, rel=1e-4)


def test_neither_loss_reaches_the_other_network() -> None:
    network = adversaries(0).eval()
    texts, prompts = torch.randn(4, 6), torch.randn(4, 2, 6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network(texts, prompts).sum().backward()
        found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        assert len(found) == len(list(network.parameters()))
        # by turns: the judge's part with a generator that is fixed, and the other way round
        network.zero_grad()
        torch.manual_seed(0)
        others = texts[torch.randperm(4)]
        drawn = network.generator(torch.randn_like(others), others)

        def judged(prompt: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            place = (prompt - network.generator.centre) / network.generator.bound
            return network.judge(torch.cat([place.flatten(1), text], dim=1))

        own = ((judged(prompts, texts) - 1) ** 2 + judged(drawn.detach(), others) ** 2).sum() / 2
        judge = torch.autograd.grad(own, list(network.judge.parameters()))
        fooled = ((judged(drawn, others) - 1) ** 2).sum()
        generator = torch.autograd.grad(fooled, list(network.generator.parameters()))
    expected = [*generator, *judge]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_shapes_and_bounds() -> None:
    """No coordinate goes further away from the mean of the domains' prompts than theirs."""
    prompts = torch.tensor([[[0.0, 1.0]], [[0.2, 1.0]], [[0.4, 4.0]]])
    generator = PromptGenerator(prompts)
    torch.testing.assert_close(generator.centre, torch.tensor([[0.2, 2.0]]))
    torch.testing.assert_close(generator.bound, torch.tensor([[0.2, 2.0]]))
    torch.nn.init.normal_(generator.layers[-2].weight)
    made = generator(torch.randn(50, 2), torch.randn(50, 2)).detach()
    assert made.shape == (50, 1, 2)
    assert ((made - generator.centre).abs() <= generator.bound + 1e-6).all()
    assert float(generator.places(made).max()) > 0.9
    sizes = [p.shape[0] for p in adversaries(0).generator.parameters() if p.ndim == 2]
    assert sizes == [128, 256, 512, 1024, 12]
    sizes = [p.shape[0] for p in adversaries(0).judge.parameters() if p.ndim == 2]
    assert sizes == [512, 512, 512, 1]


def test_labels_are_read_after_a_prompt(tiny_encoder: Path) -> None:
    """A template's vectors are those of its words, written before each name."""
    labels = load_labels(["cat", "business and sports"])
    reader, tokenizer = new_reader(str(tiny_encoder), labels, "on the mat")
    reader.eval()
    found = reader.vectors(torch.stack([reader.prompt, 2 * reader.prompt]))
    words = tokenizer("on the mat", add_special_tokens=False).input_ids
    for number, name in enumerate(labels.names):
        own = tokenizer(name).input_ids
        ids = torch.tensor([[own[0], *words, *own[1:]]])
        hidden = reader.backbone(input_ids=ids).last_hidden_state
        expected = torch.nn.functional.normalize(hidden.mean(dim=1), dim=1)[0]
        torch.testing.assert_close(found[0, number], expected, atol=1e-5, rtol=1e-5)
    assert float((found[0] - found[1]).detach().abs().max()) > 1e-3
    texts = ["the cat", "sports and the cat on the mat"]
    alone = [text_vectors(reader.backbone, tokenizer, [text], SETTINGS)[0] for text in texts]
    torch.testing.assert_close(
        text_vectors(reader.backbone, tokenizer, texts, SETTINGS), torch.stack(alone)
    )


def test_stage_one_learns_the_labels_of_each_domain(student: Path) -> None:
    for losses in card(student)["domains"].values():
        assert losses[-1] < losses[0]
    prompts = load_file(student / "generator.safetensors")["prompts"]
    assert prompts.shape[0] == 2
    assert float((prompts[0] - prompts[1]).abs().max()) > 0.01


def test_both_networks_are_trained(student: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    begun = train(table(), tiny_encoder, tmp_path, max_steps=1, domain_epochs=15)
    first, last = card(begun)["loss"][0], card(student)["loss"][-1]
    assert first == pytest.approx(1.5, abs=0.3)  # (1 + 0) / 2 + 1, of a judge that says 0
    assert last < first
    reader, generator, kept, tokenizer, _, _ = load_generator(student)
    texts = text_vectors(reader.backbone, tokenizer, table()["text"][:], SETTINGS)
    drawn = generator(torch.zeros_like(texts), texts).detach()
    assert float(generator.places(drawn).abs().mean()) > 0.1  # it has left the mean
    torch.testing.assert_close(generator.centre.cpu(), kept["prompts"].mean(dim=0))


def test_labels_touch_the_first_stage_only(tiny_encoder: Path, tmp_path: Path) -> None:
    given = {"domain_learning_rate": 1e-12, "num_train_epochs": 2}
    one = card(train(table(), tiny_encoder, tmp_path / "one", **given))
    other = card(train(table(turned=True), tiny_encoder, tmp_path / "other", **given))
    assert one["domains"] != other["domains"]
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)


def test_predictions_repeat_and_do_not_depend_on_neighbours(student: Path) -> None:
    whole = dense(student)
    np.testing.assert_array_equal(dense(student), whole)
    np.testing.assert_allclose(dense(student, block_rows=5), whole, atol=1e-6)
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-6)
    assert np.abs(dense(student, draws=1, seed=1) - dense(student, draws=1, seed=2)).max() > 1e-6
    got = predict_by_prompts(table(), model=student)
    assert [name for name in got.column_names if name in LABEL_COLUMNS] == list(LABEL_COLUMNS)
    empty = predict_by_prompts(Dataset.from_dict({"id": ["a"], "text": [" "]}), model=student)
    assert empty["error"][:] == ["empty text"]
    assert empty["label_ids"][:] == [[]]


def test_same_seed_same_bytes(tiny_encoder: Path, tmp_path: Path) -> None:
    given = {"num_train_epochs": 1, "domain_epochs": 1}
    one = train(table(), tiny_encoder, tmp_path / "one", **given)
    assert files(one) == files(train(table(), tiny_encoder, tmp_path / "again", **given))
    other = train(table(), tiny_encoder, tmp_path / "other", seed=1, **given)
    assert files(one)["generator.safetensors"] != files(other)["generator.safetensors"]


def killed_in(kind: type, output: Path, model: Path, *, forward: int, **given: Any) -> None:
    """Trains until such a network has been asked so often."""
    calls = iter(range(10_000))

    def dies(module: Any, inputs: Any) -> None:
        if isinstance(module, kind) and next(calls) == forward:
            raise KeyboardInterrupt

    hook = torch.nn.modules.module.register_module_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        train(table(), model, output, **given)
    hook.remove()
    assert (output / checkpoint.NAME).is_file()


@pytest.mark.parametrize(
    "changed", [{}, {"domain_epochs": 3}, {"domain_learning_rate": 0.1}, {"template": "the mat"}]
)
def test_a_killed_second_stage_is_continued_only_with_the_same_first(
    tiny_encoder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    given = {"num_train_epochs": 4, "domain_epochs": 2}
    killed_in(Adversaries, tmp_path / "k", tiny_encoder, forward=3, save_steps=3, **given)
    again = train(table(), tiny_encoder, tmp_path / "k", **given | changed)
    fresh = train(table(), tiny_encoder, tmp_path / "fresh", **given | changed)
    assert files(again) == files(fresh)


def test_what_is_finished_of_the_first_stage_is_not_done_again(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it, or its checkpoint, write over that of the second stage."""
    given = {"num_train_epochs": 4, "domain_epochs": 2, "save_steps": 1}
    killed_in(Adversaries, tmp_path / "k", tiny_encoder, forward=3, **given)
    killed_in(LabelReader, tmp_path / "i", tiny_encoder, forward=3, **given)
    fresh = train(table(), tiny_encoder, tmp_path / "fresh", **given)
    for name, readings, drawings in (("k", 0, 1), ("i", 1, 4)):
        updates: dict[type, int] = {LabelReader: 0, Adversaries: 0}
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _, updates=updates: updates.update(
                {kind: count + isinstance(module, kind) for kind, count in updates.items()}
            )
        )
        again = train(table(), tiny_encoder, tmp_path / name, **given)
        hook.remove()
        assert list(updates.values()) == [readings, drawings]
        assert files(again) == files(fresh)


def test_killed_between_the_stages_it_begins_the_second_alike(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    """The checkpoint of a finished first stage continues with no update, and so draws nothing."""
    given = {"num_train_epochs": 1, "domain_epochs": 1}
    killed_in(Adversaries, tmp_path / "k", tiny_encoder, forward=0, save_steps=1, **given)
    again = train(table(), tiny_encoder, tmp_path / "k", **given)
    assert files(again) == files(train(table(), tiny_encoder, tmp_path / "fresh", **given))


def test_bad_input(student: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'domain' names 1 domain"):
        train(table().select([0, 1]), tiny_encoder, tmp_path / "m")
    with pytest.raises(ValueError, match=r"draws must be at least 1; got 0"):
        predict_by_prompts(table(), model=student, draws=0)
    for name, value, message in [
        ("domain_epochs", 0, r"domain_epochs must be above 0; got 0"),
        ("domain_learning_rate", -1.0, r"domain_learning_rate must be above 0; got -1.0"),
        ("early_stopping_patience", 2, "both stages have fixed epochs; leave it out"),
        ("gradient_checkpointing", True, "the backbone is not trained; leave it out"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(table(), tiny_encoder, tmp_path / "m", **{name: value})
    with pytest.raises(ValueError, match=r"template='' has no words"):
        train(table(), tiny_encoder, tmp_path / "m", template="")
    other = shutil.copytree(student, tmp_path / "other")
    (other / "head.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds head.safetensors, which is no file of a generator"
    ):
        train(table(), tiny_encoder, other)
    (other / "generator.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"generator.safetensors is missing"):
        predict_by_prompts(table(), model=other)
