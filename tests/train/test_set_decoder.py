"""Sets as a decoder learns and says them, the decoder, and its folder."""

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from train.set_students import LABELS, WEIGHTS, table, train

from llmlabel.loss.sets import set_cross_entropy, transport_loss
from llmlabel.train.seq2set import (
    label_sets,
    predict_label_sets,
    said_probs,
    set_losses,
)
from llmlabel.train.set_decoder import SetDecoder, load_set_decoder


@pytest.fixture(scope="module")
def student(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(table(), tiny_encoder, tmp_path_factory.mktemp("student") / "model")


# --------------------------------------------------------------------------------------------- sets


def test_a_set_keeps_the_most_probable_labels() -> None:
    probs = np.array([[0.6, 0.4, 0.9, 0.6], [0.1, 0.5, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])
    assert label_sets(csr_array(probs), places=2).tolist() == [[2, 0], [1, -1], [-1, -1]]
    assert label_sets(csr_array(probs), places=6).shape == (3, 4)
    alike = csr_array(np.full((1, 200), 0.7))
    assert label_sets(alike, places=5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("seed", range(20))
def test_sets_equal_those_of_sorted_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, labels, places = (int(n) for n in rng.integers(1, 9, 3))
    probs = rng.integers(0, 11, (rows, labels)) / 10
    expected = []
    for own in probs.tolist():
        best = sorted((-p, label) for label, p in enumerate(own) if p >= 0.5)[:places]
        expected.append([label for _, label in best])
    width = min(places, labels)
    filled = [own + [-1] * (width - len(own)) for own in expected]
    assert label_sets(csr_array(probs), places=places).tolist() == filled


def test_sets_are_made_of_what_is_stored() -> None:
    """20,000 rows of 3 labels among 1,000 took 160 MB as a table, and more to be sorted."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.permutation(999).reshape(3, 333), axis=0)[:, rng.integers(0, 333, 20_000)].T
    probs = np.tile([0.6, 0.9, 0.2], (20_000, 1))
    stored = csr_array((probs.ravel(), ids.ravel(), np.arange(20_001) * 3), shape=(20_000, 1000))
    tracemalloc.start()
    sets = label_sets(stored, places=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    np.testing.assert_array_equal(sets[:, :2].numpy(), ids[:, [1, 0]])
    assert sets[:, 2].unique().tolist() == [-1]


def test_set_losses_are_their_formula_in_any_order() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 6, generator=rng, dtype=torch.float64)
    vectors = torch.cat([torch.randn(5, 3, generator=rng), torch.zeros(1, 3)])
    sets = torch.tensor([[0, 3, -1], [4, -1, -1], [-1, -1, -1], [1, 2, 3], [2, 0, -1], [3, -1, -1]])
    for weight, scheme in ((0.0, "all"), (8.0, "all"), (2.0, "first_n")):
        settings = {"scheme": scheme, "empty_weight": 0.3, "transport_weight": weight}
        chosen = [5, 0, 3, 2]
        got = set_losses(sets, vectors, settings)(logits[chosen], chosen)
        expected = set_cross_entropy(
            logits[chosen], sets[chosen], empty=5, scheme=scheme, empty_weight=0.3
        ) + weight * transport_loss(logits[chosen], sets[chosen], vectors, scheme=scheme)
        torch.testing.assert_close(got, expected)
        back = set_losses(sets.flip(1), vectors, settings)(logits[chosen], chosen)
        torch.testing.assert_close(got, back)


def test_a_label_is_said_once_with_its_probability_against_none_at_its_first_step() -> None:
    logits = torch.log(
        torch.tensor(
            [
                [[0.1, 0.6, 0.3], [0.2, 0.7, 0.1], [0.45, 0.25, 0.3], [0.8, 0.1, 0.1]],
                [[0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]],
                [[0.1, 0.2, 0.7]] * 4,
            ]
        )
    )
    expected = [[0.45 / 0.75, 0.6 / 0.9], [0, 0.4 / 0.7], [0, 0]]
    np.testing.assert_allclose(said_probs(logits), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------- equations


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def one_text(decoder: SetDecoder, states: np.ndarray) -> np.ndarray:
    """The logits of one text's steps, from the equations of attention and GRU."""
    w = {name: value.detach().double().numpy() for name, value in decoder.state_dict().items()}
    width = len(w["query.bias"])
    hidden = np.tanh(w["first.weight"] @ states.mean(axis=0) + w["first.bias"])
    last, found = w["before"], []
    for _ in range(decoder.steps):
        query = w["query.weight"] @ hidden + w["query.bias"]
        energy = [w["energy.weight"][0] @ np.tanh(w["keys.weight"] @ s + query) for s in states]
        share = np.exp(energy) / np.exp(energy).sum()
        context = share @ states
        new = w["cell.weight_ih"] @ np.concatenate([last, context]) + w["cell.bias_ih"]
        old = w["cell.weight_hh"] @ hidden + w["cell.bias_hh"]
        reset, update = (sigmoid(new[at : at + width] + old[at : at + width]) for at in (0, width))
        candidate = np.tanh(new[2 * width :] + reset * old[2 * width :])
        hidden = (1 - update) * candidate + update * hidden
        logits = w["score.weight"] @ np.concatenate([hidden, context]) + w["score.bias"]
        found.append(logits)
        last = w["vectors"][logits.argmax()]
    return np.array(found)


@pytest.mark.parametrize("seed", range(20))
def test_the_decoder_equals_its_equations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, text, width, steps = rng.integers(2, 7, size=4).tolist()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vectors = torch.randn(labels, 3)
        decoder = SetDecoder(vectors, text_width=text, width=width, steps=steps, dropout=0.3)
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter)
    decoder = decoder.double().eval()
    texts = [rng.normal(size=(count, text)) for count in rng.integers(1, 6, size=4)]
    states = torch.full((4, max(map(len, texts)), text), 1e3, dtype=torch.float64)
    mask = torch.zeros(states.shape[:2], dtype=torch.long)
    for row, own in enumerate(texts):
        states[row, : len(own)], mask[row, : len(own)] = torch.from_numpy(own), 1
    with torch.no_grad():
        got = decoder(states, mask).numpy()
    for row, own in enumerate(texts):
        np.testing.assert_allclose(got[row], one_text(decoder, own), rtol=1e-9, atol=1e-9)


def test_the_decoder_is_fed_its_own_answers_or_what_it_is_told() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = SetDecoder(torch.eye(4), text_width=6, width=8, steps=3, dropout=0.5).eval()
        torch.nn.init.normal_(decoder.score.weight, std=2.0)
        states, mask = torch.randn(5, 7, 6), torch.ones(5, 7, dtype=torch.long)
    logits = decoder(states, mask)
    said = logits.argmax(dim=2)
    torch.testing.assert_close(decoder(states, mask, said), logits)
    other = (said + 1) % 5
    told = decoder(states, mask, other)
    torch.testing.assert_close(told[:, 0], logits[:, 0])
    assert (told[:, 1] - logits[:, 1]).abs().max() > 1e-3
    mask[:, 4:] = 0
    torch.testing.assert_close(decoder(states, mask), decoder(states[:, :4], mask[:, :4]))


# ------------------------------------------------------------------------------------------ folders


def test_the_frozen_backbone_stays_and_the_folder_holds_only_the_decoder(student: Path) -> None:
    network, *_ = load_set_decoder(student)
    from safetensors.torch import load_file

    kept = load_file(student / WEIGHTS)
    assert {name.partition(".")[0] for name in kept} == {"decoder"}
    for name, value in network.state_dict().items():
        if name in kept:
            assert torch.equal(value, kept[name])
    vectors = kept["decoder.vectors"]
    np.testing.assert_allclose(vectors.norm(dim=1), [1, 1, 1, 0], atol=1e-6)
    assert network.train().backbone.training is False


def test_label_vectors_of_an_encoder(tiny_encoder: Path, tmp_path: Path) -> None:
    class Fixed:
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            assert texts == list(LABELS.names)
            return np.eye(5)[:3]

    folder = train(table(), tiny_encoder, tmp_path, label_encoder=Fixed(), num_train_epochs=1)
    vectors = load_set_decoder(folder)[0].decoder.vectors
    np.testing.assert_array_equal(vectors, np.vstack([np.eye(5)[:3], np.zeros(5)]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (WEIGHTS, r"model '.*damaged' cannot be loaded \(SafetensorError"),
        ("model_card.json", r"model '.*damaged' cannot be loaded \(JSONDecodeError"),
        ("labels.json", r"damaged/labels.json: line \d+ is not JSON"),
    ],
)
def test_a_damaged_folder_is_named(student: Path, tmp_path: Path, name: str, message: str) -> None:
    damaged = shutil.copytree(student, tmp_path / "damaged")
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=message) as caught:
        predict_label_sets(table(), model=damaged)
    assert "\n" not in str(caught.value)
    (damaged / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing") as missing:
        predict_label_sets(table(), model=damaged)
    assert "\n" not in str(missing.value)


def test_a_weight_that_is_not_there_is_named(student: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(student, tmp_path / "damaged")
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != "decoder.query.bias"}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"damaged' cannot be loaded \(KeyError: 'decoder.query"):
        predict_label_sets(table(), model=folder)
