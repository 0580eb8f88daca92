import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from reference import ontology as reference

from llmlabel.engine.fake import FakeEngine
from llmlabel.label.judge import judge
from llmlabel.labelspace import LabelSpace, load_labels, save_labels
from llmlabel.prompt import render
from llmlabel.taxonomy.acyclic import acyclic_choice, best_branching
from llmlabel.taxonomy.attention import (
    Children,
    TaxonomyAttention,
    log_mass,
    mass_loss,
    padded,
    train_attention,
)
from llmlabel.taxonomy.edges import best_threshold, choose_edges, combine_judge
from llmlabel.taxonomy.isa import fit_isa, isa_edges, isa_pairs, load_isa


class Words:
    """The sum of one random vector per word: texts that share a word are near."""

    def __init__(self, width: int = 64) -> None:
        self.width = width

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        found = np.array([np.sum([self._one(w) for w in text.split()], axis=0) for text in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def _one(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return np.random.default_rng(seed).normal(size=self.width)


KINDS = ("dog", "car", "tree", "boat", "bird", "lamp")
ADJECTIVES = ("red", "old", "wild", "small", "fast")


@pytest.fixture
def known() -> LabelSpace:
    """Things, six kinds of things, five sorts of each; a lamp boat is both."""
    entries: list[Any] = ["thing", *({"id": kind, "parent": "thing"} for kind in KINDS)]
    entries += [{"id": f"{a} {k}", "parent": k} for k in KINDS for a in ADJECTIVES]
    return load_labels([*entries, {"id": "house boat lamp", "parents": ["boat", "lamp"]}])


def random_layer(seed: int, *, heads: int = 2, dim: int = 6) -> TaxonomyAttention:
    layer = TaxonomyAttention(dim, heads=heads, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return layer


def as_lists(layer: TaxonomyAttention) -> dict[str, Any]:
    split = {
        name: parameter.detach().unflatten(0, (layer.heads, -1)).tolist()
        for name, parameter in (
            ("query", layer.query.weight),
            ("key", layer.key.weight),
            ("query_bias", layer.query.bias),
            ("key_bias", layer.key.bias),
        )
    }
    gains = {
        "query_gain": layer.query_norm.weight.tolist(),
        "key_gain": layer.key_norm.weight.tolist(),
    }
    return {**split, **gains, "none": layer.none.tolist(), "eps": 1e-6}


# ------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("seed", range(20))
def test_attention_equals_the_loop(seed: int) -> None:
    layer = random_layer(seed)
    rng = np.random.default_rng(seed)
    parents, itself = rng.normal(size=(5, 6)), np.array([3, -1, 0, 4])
    children = rng.normal(size=(4, 6))
    got = layer(torch.tensor(children), torch.tensor(parents), torch.tensor(itself))
    expected = reference.attention(
        children.tolist(), parents.tolist(), itself.tolist(), as_lists(layer)
    )
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(got.exp().sum(dim=1).detach().numpy(), 1.0, atol=1e-9)
    assert got[0, 3] == -torch.inf  # nobody is its own parent


@pytest.mark.parametrize("seed", range(20))
def test_the_gradients_equal_those_of_plain_einsum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    children, parents = torch.tensor(rng.normal(size=(4, 6))), torch.tensor(rng.normal(size=(5, 6)))
    itself, edges = [3, -1, 0, 4], [(0,), (5,), (1, 2, 4), (0, 3)]
    grads = []
    for plain in (False, True):
        layer = random_layer(seed)
        if plain:
            loss = reference.attention_loss(layer, children, parents, itself, edges)
        else:
            columns, shares = padded(edges)
            loss = mass_loss(
                layer(children, parents, torch.tensor(itself)), columns, shares.double()
            )
        loss.backward()
        grads.append([loss.detach(), *(parameter.grad for parameter in layer.parameters())])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-5)


def test_an_untrained_layer_of_one_head_is_a_softmax_of_cosines() -> None:
    vectors = Words().encode(["red dog", "old dog", "red car", "tree"])
    tensor = torch.tensor(vectors, dtype=torch.float32)
    got = TaxonomyAttention(64, heads=1)(tensor, tensor, torch.arange(4)).detach().numpy()
    logits = np.hstack([20 * vectors @ vectors.T, np.zeros((4, 1))])
    logits[np.arange(4), np.arange(4)] = -np.inf
    expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=1e-3)  # the norm adds 1e-6


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_the_size_of_blocks_changes_no_score(rows: int) -> None:
    rng = np.random.default_rng(0)
    children, parents = rng.normal(size=(9, 6)), rng.normal(size=(11, 6))
    layer, itself = random_layer(1), np.arange(9)
    whole = np.concatenate([*log_mass(layer, children, parents, itself, block_rows=9)])
    parts = np.concatenate([*log_mass(layer, children, parents, itself, block_rows=rows)])
    np.testing.assert_allclose(parts, whole, atol=1e-12)
    # nor do the other children: the reference of the paper fails this
    alone = next(log_mass(layer, children[4:5], parents, itself[4:5]))
    np.testing.assert_allclose(alone[0], whole[4], atol=1e-12)


def test_training_shares_the_mass_of_a_child_between_its_parents() -> None:
    vectors = torch.tensor(Words().encode(["a", "b", "c", "d"]), dtype=torch.float32)
    layer = TaxonomyAttention(64, heads=1)
    children = Children(vectors, torch.arange(4), [(1, 2), (2,), (4,), (0, 1, 2)])
    losses = train_attention(layer, children, vectors, epochs=300, learning_rate=0.003)
    assert losses[-1] < losses[0]
    mass = layer(vectors, vectors, torch.arange(4)).exp().detach().numpy()
    expected = [[0, 1 / 2, 1 / 2, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1 / 3] * 3 + [0, 0]]
    np.testing.assert_allclose(mass, expected, atol=0.05)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must be from 1 to 6, the width of the vectors"):
        TaxonomyAttention(6, heads=7)


# ----------------------------------------------------------------------------- fit and propose


def test_isa_pairs_are_the_edges_and_the_roots(known: LabelSpace) -> None:
    pairs = isa_pairs(known)
    rows = [*zip(pairs["child"][:], pairs["parent"][:], strict=True)]
    assert rows[0] == ("thing", None)
    assert rows[-2:] == [("house boat lamp", "boat"), ("house boat lamp", "lamp")]
    assert len(rows) == 1 + 6 + 30 + 2


def test_new_children_find_their_parents(known: LabelSpace, tmp_path: Path) -> None:
    model = fit_isa(
        isa_pairs(known), Words(), output=tmp_path / "isa", heads=1, num_train_epochs=150
    )
    fresh = ("blue", "broken", "huge", "cheap", "loud", "pale")
    new = [f"{a} {k}" for a, k in zip(fresh, KINDS, strict=True)]
    labels = load_labels([*known.names, *new])
    edges = isa_edges(labels, model, Words(), children=[*new, "thing"], top=3)
    assert len(edges) == 3 * 7
    assert edges.column_names == [
        *("id", "child", "parent", "text", "candidate"),
        *("prob", "mass", "none_mass"),
    ]
    first = edges.filter(lambda row, i: i % 3 == 0 and row["child"] != "thing", with_indices=True)
    right = [
        child.endswith(f" {parent}")
        for child, parent in zip(first["child"], first["parent"], strict=True)
    ]
    assert np.mean(right) >= 5 / 6
    rows = edges.to_list()
    assert rows[0]["id"] == json.dumps([rows[0]["child"], rows[0]["parent"]])
    assert rows[-1]["none_mass"] > 0.5 > rows[0]["none_mass"]  # a thing is known to have no parent
    assert all(a["mass"] >= b["mass"] for a, b in itertools.pairwise(rows[:3]))
    chosen = choose_edges(edges, labels, threshold=model)
    right = [chosen.parents[chosen.index(one)] == (one.split()[1],) for one in new]
    assert np.mean(right) >= 5 / 6
    again = isa_edges(labels, model, Words(), children=[*new, "thing"], top=3, block_rows=2)
    assert again.to_dict() == edges.to_dict()


def test_the_same_pairs_give_the_same_layer_in_any_order(known: LabelSpace, tmp_path: Path) -> None:
    pairs = isa_pairs(known)
    other = pairs.select(np.random.default_rng(0).permutation(len(pairs)))
    folders = [
        fit_isa(rows, Words(), output=tmp_path / name, num_train_epochs=3)
        for name, rows in (("a", pairs), ("b", other))
    ]
    cards = [load_isa(folder).card for folder in folders]
    assert cards[0] == cards[1]
    weights = [(folder / "isa.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    seeded = fit_isa(pairs, Words(), output=tmp_path / "c", num_train_epochs=3, seed=1)
    assert (seeded / "isa.safetensors").read_bytes() != weights[0]


@pytest.mark.parametrize("unseen", ["child", "parent"])
def test_what_is_held_out_has_no_part_in_the_choice(
    known: LabelSpace, tmp_path: Path, unseen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[Children] = []
    candidates = []

    def spy(layer: Any, children: Children, vectors: Any, **settings: Any) -> list[float]:
        taught.append(children)
        candidates.append(vectors.numpy())
        return train_attention(layer, children, vectors, **settings)

    monkeypatch.setattr("llmlabel.taxonomy.isa.train_attention", spy)
    pairs = isa_pairs(known)
    folder = fit_isa(pairs, Words(), output=tmp_path, unseen=unseen, num_train_epochs=2, seed=3)
    held = load_isa(folder).card["held_out"]
    chosen_on, learned = (children.vectors.numpy() for children in taught)
    assert len(learned) == len(known)
    assert len(chosen_on) == len(known) - len(held) > len(held) > 0

    def stands_in(text: str, vectors: np.ndarray) -> bool:
        return bool((np.abs(vectors - Words().encode([text])).max(axis=1) < 1e-6).any())

    assert not any(stands_in(text, chosen_on) for text in held)
    if unseen == "parent":
        assert {"red boat", "old boat", "wild boat", "small boat", "fast boat"} <= set(held)
        assert len(held) < 7


def test_what_cannot_be_fitted_is_refused(known: LabelSpace, tmp_path: Path) -> None:
    few = Dataset.from_dict({"child": ["a"], "parent": ["b"]})
    with pytest.raises(ValueError, match="1 children are too few to hold some out"):
        fit_isa(few, Words(), output=tmp_path)
    own = Dataset.from_dict({"child": ["a", "b"], "parent": ["b", "b"]})
    with pytest.raises(ValueError, match="'b' is an empty child or its own parent"):
        fit_isa(own, Words(), output=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"isa.json is missing; give a folder that fit_isa"):
        isa_edges(known, tmp_path, Words())
    model = fit_isa(isa_pairs(known), Words(), output=tmp_path / "isa", num_train_epochs=1)
    with pytest.raises(ValueError, match="the layer was trained with encoder:Words@"):
        isa_edges(known, model, Words(width=32))
    with pytest.raises(ValueError, match="top must be at least 1"):
        isa_edges(known, model, Words(), top=0)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, 12) / 5, rng.random(12) < 0.4
    truth[0] = True
    threshold, f1 = best_threshold(scores, truth)
    assert f1 == pytest.approx(reference.best_f1(scores.tolist(), truth.tolist()))
    chosen = scores > threshold
    assert threshold not in scores
    assert f1 == pytest.approx(2 * (chosen & truth).sum() / (chosen.sum() + truth.sum()))


# ------------------------------------------------------------------------------------- the judge


def judged(prob: list[float], match: list[float | None], **more: Any) -> Dataset:
    return Dataset.from_dict({"prob": prob, "match": match, **more})


def test_without_known_edges_the_log_odds_are_averaged() -> None:
    got = combine_judge(judged([0.8, 0.5, 0.3], [0.8, 0.9, None]))
    root = np.sqrt(0.5 * 0.9), np.sqrt(0.5 * 0.1)
    assert got["prob"][:] == pytest.approx([0.8, root[0] / sum(root), 0.3])
    assert got["isa_prob"][:] == pytest.approx([0.8, 0.5, 0.3])


def test_known_edges_tell_how_much_the_judge_is_worth() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.3
    good = np.clip(np.where(truth, 0.7, 0.3) + rng.normal(0, 0.2, 400), 0.05, 0.95)
    noise = rng.random(400)
    known = judged(good.tolist(), noise.tolist(), is_edge=truth.tolist())
    got = combine_judge(judged([0.7, 0.7, 0.3], [0.05, 0.95, 0.5]), known=known)["prob"][:]
    assert abs(got[0] - got[1]) < 0.2  # a judge of noise is not believed
    assert got[2] < 0.2 < 0.5 < got[0]
    with pytest.raises(ValueError, match="0 of 2 known pairs are edges; both kinds are needed"):
        combine_judge(known, known=judged([0.5, 0.4], [0.5, 0.5], is_edge=[False, False]))


def test_the_judge_reads_edges(known: LabelSpace, tmp_path: Path) -> None:
    model = fit_isa(isa_pairs(known), Words(), output=tmp_path / "isa", num_train_epochs=2)
    edges = isa_edges(known, model, Words(), top=2)
    got = judge(edges, FakeEngine(), prompt="taxonomy/isa")
    assert None not in got["match"][:]
    assert len(combine_judge(got)) == len(edges) == 2 * len(known)


def test_isa_prompt(golden: Any) -> None:
    chat = render("taxonomy/isa", text="poodle", labels=(), candidate="dog")
    assert chat == golden("prompts/taxonomy/isa.json")


# ---------------------------------------------------------------------------- graphs without cycles


def random_graph(seed: int) -> tuple[list[tuple[int, int]], np.ndarray, int]:
    rng = np.random.default_rng(seed)
    labels = int(rng.integers(2, 6))
    pairs = [(a, b) for a in range(labels) for b in range(labels) if a != b]
    count = int(rng.integers(1, min(len(pairs), 9) + 1))
    edges = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    return edges, rng.normal(0.7, 1.0, count).round(2), labels


@pytest.mark.parametrize("seed", range(200))
def test_the_best_graphs_equal_brute_force(seed: int) -> None:
    edges, gains, labels = random_graph(seed)
    child, parent = np.array(edges).T
    choice = acyclic_choice(child, parent, gains, labels=labels)
    assert gains[choice.kept].sum() == pytest.approx(reference.best_acyclic(edges, gains.tolist()))
    assert choice.gap == 0
    wanted = gains[gains > 0].sum()
    assert choice.lost == pytest.approx(wanted - gains[choice.kept].sum())
    one = best_branching(child, parent, gains, labels=labels)
    best = reference.best_branching(edges, gains.tolist(), labels)
    assert gains[one].sum() == pytest.approx(best)
    assert len(set(child[one].tolist())) == one.sum()
    for kept in (choice.kept, one):
        assert not reference.has_cycle([edges[i] for i in np.flatnonzero(kept)])


def test_a_large_knot_is_broken_greedily_and_the_gap_is_stated() -> None:
    rng = np.random.default_rng(0)
    child, parent = np.repeat(np.arange(80), 8), rng.integers(0, 80, 640)
    apart = child != parent
    child, parent = child[apart], parent[apart]
    pairs = np.unique(np.stack([child, parent], axis=1), axis=0)
    gains = rng.random(len(pairs)) + 0.1
    choice = acyclic_choice(pairs[:, 0], pairs[:, 1], gains, labels=80)
    kept = [tuple(pair) for pair in pairs[choice.kept].tolist()]
    assert not reference.has_cycle(kept)
    assert 0 < choice.gap < choice.lost < gains.sum()
    back = np.flatnonzero(~choice.kept).tolist()
    assert all(reference.has_cycle([*kept, tuple(pairs[i].tolist())]) for i in back[:20])


# ------------------------------------------------------------------------------- the label space


def table(*rows: tuple[str, str, float | None]) -> Dataset:
    columns = [*zip(*rows, strict=True)]
    names = ("child", "parent", "prob")
    return Dataset.from_dict({name: list(c) for name, c in zip(names, columns, strict=True)})


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels(["a", "b", "c", "d"])


def test_wanted_edges_that_form_no_cycle_are_all_taken(labels: LabelSpace) -> None:
    edges = table(("a", "b", 0.6), ("a", "c", 0.9), ("b", "c", 0.51), ("d", "a", 0.49))
    got = choose_edges(edges, labels)
    assert got.parents == (("c", "b"), ("c",), (), ())
    assert got.parent_probs == ((0.9, 0.6), (0.51,), (), ())
    lower = choose_edges(edges, labels, threshold=0.4)
    assert lower.parents[3] == ("a",)
    assert choose_edges(edges.select([3, 1, 0, 2]), labels) == got
    assert choose_edges(edges, labels, threshold=0.95).is_flat
    assert choose_edges(edges.select([]), labels).is_flat


def test_a_cycle_loses_what_is_least_probable(labels: LabelSpace) -> None:
    """One edge of 0.7 goes, and not two of 0.6, each of which closes a cycle of its own."""
    edges = table(
        ("a", "b", 0.9), ("b", "c", 0.6), ("c", "a", 0.8), ("b", "d", 0.6), ("d", "a", 0.8)
    )
    log_odds = np.log(np.array([0.9, 0.6, 0.8]) / np.array([0.1, 0.4, 0.2]))
    assert 2 * log_odds[1] < log_odds[0]
    got = choose_edges(edges, labels)
    assert got.parents == (("b",), (), ("a",), ("a",))
    nearer = table(
        ("a", "b", 0.65), ("b", "c", 0.6), ("c", "a", 0.8), ("b", "d", 0.6), ("d", "a", 0.8)
    )
    assert choose_edges(nearer, labels).parents == ((), ("c", "d"), ("a",), ("a",))


def test_one_parent_at_most_is_a_branching(labels: LabelSpace) -> None:
    edges = table(("a", "b", 0.9), ("b", "a", 0.95), ("a", "c", 0.7), ("b", "c", 0.6))
    got = choose_edges(edges, labels, parents="one")
    assert got.parents == (("c",), ("a",), (), ())  # 0.7 and 0.95 beat 0.9 and 0.6
    assert got.parent_probs == ((0.7,), (0.95,), (), ())


@pytest.mark.parametrize("parents", ["several", "one"])
def test_known_parents_stay(parents: Any) -> None:
    known = load_labels([{"id": "a", "parent": "b"}, "b", "c"])
    edges = table(("b", "a", 0.999), ("a", "b", 0.2), ("c", "a", 0.8))
    got = choose_edges(edges, known, parents=parents)
    assert got.parents == (("b",), (), ("a",))
    assert got.parent_probs == ((1.0,), (), (0.8,))


def test_the_edges_of_a_label_space_survive_a_file(labels: LabelSpace, tmp_path: Path) -> None:
    got = choose_edges(table(("a", "b", 0.75), ("c", "b", 0.625)), labels)
    save_labels(got, tmp_path / "labels.json")
    assert load_labels(tmp_path / "labels.json") == got


def test_the_gap_of_a_greedy_choice_is_told() -> None:
    rng = np.random.default_rng(1)
    names = [f"t{i}" for i in range(40)]
    rows = [(a, b, 0.6 + 0.3 * rng.random()) for a, b in itertools.permutations(names, 2)]
    some = [rows[i] for i in rng.permutation(len(rows))[:500]]
    with pytest.warns(UserWarning, match="cycles were broken at a loss of .* a higher threshold"):
        choose_edges(table(*some), load_labels(names))


def test_edges_that_make_no_sense_are_refused(labels: LabelSpace, tmp_path: Path) -> None:
    for edges, message in (
        (table(("a", "a", 0.7)), "the edge from 'a' to 'a' leads to itself"),
        (table(("a", "b", 0.7), ("a", "b", 0.6)), "the edge from 'a' to 'b' is there twice"),
        (table(("a", "b", 0.7), ("a", "c", None)), "from 'a' to 'c' has the prob None"),
        (table(("a", "e", 0.7)), "unknown label 'e'"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_edges(edges, labels)
    with pytest.raises(ValueError, match="threshold must lie strictly between 0 and 1; got 1"):
        choose_edges(table(("a", "b", 0.7)), labels, threshold=1.0)
    both = load_labels([{"id": "a", "parents": ["b", "c"]}, "b", "c"])
    with pytest.raises(ValueError, match="labels have several parents already"):
        choose_edges(table(("b", "c", 0.7)), both, parents="one")
