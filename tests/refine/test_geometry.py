from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reference import geometry as twins
from scipy.sparse import csr_array

from llmlabel.labelspace import LabelSpace, graph, load_labels
from llmlabel.refine import geometry
from llmlabel.refine.geometry import frechet_mean, frechet_predict
from llmlabel.refine.locus import next_label, reachable_labels
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
PATH = load_labels(["0", *({"id": str(n), "parent": str(n - 1)} for n in range(1, 5))])


def random_space(rng: np.random.Generator, *, size: int, most_parents: int = 1) -> LabelSpace:
    """Labels in random order; about every fifth is a root, unless it is drawn otherwise."""
    ids = [f"l{n}" for n in rng.permutation(size)]
    roots = rng.choice([0.0, 0.2])
    entries: list[dict[str, Any]] = []
    for n in range(size):
        some = 0 if n == 0 or rng.random() < roots else int(rng.integers(1, most_parents + 1))
        parents = rng.choice(n, min(some, n), replace=False) if n else []
        entries.append({"id": ids[n], "parents": [ids[p] for p in parents]})
    return load_labels([entries[i] for i in rng.permutation(size)])


def random_probs(rng: np.random.Generator, labels: LabelSpace, rows: int = 5) -> np.ndarray:
    """Few labels a row, in eighths so that ties happen; a row of zeros now and then."""
    probs = rng.integers(0, 5, (rows, len(labels))) / 8
    return probs * (rng.random(probs.shape) < rng.choice([0.2, 0.5, 1.0]))


def soft_rows(probs: list[list[float]], labels: LabelSpace) -> Dataset:
    rows = Dataset.from_dict({"id": [str(n) for n in range(len(probs))]})
    return SoftLabels.from_dense(np.array(probs), labels).add_to(rows)


@pytest.mark.parametrize(
    ("probs", "mean"),
    [
        ([0.5, 0, 0, 0, 0.5], 2),
        ([0.75, 0, 0, 0, 0.25], 1),
        ([1.0, 0, 0, 0, 0], 0),
        ([0.625, 0, 0, 0, 0.375], 1),  # 1 and 2 alike: the lower position
        ([0, 0, 0, 0, 0.125], 4),  # a row that does not sum to 1
        ([0.0, 0, 0, 0, 0], -1),
    ],
)
def test_mean_on_a_path(probs: list[float], mean: int) -> None:
    assert frechet_mean(np.array([probs]), PATH).tolist() == [mean]


def test_without_a_hierarchy_the_mean_is_the_most_probable_label() -> None:
    rng = np.random.default_rng(0)
    labels = load_labels([f"l{n}" for n in range(7)])
    probs = rng.dirichlet(np.full(7, 0.5), 200)
    assert frechet_mean(probs, labels).tolist() == probs.argmax(axis=1).tolist()
    apart = np.eye(7)  # the same metric as vectors
    assert frechet_mean(probs, labels, embeddings=apart).tolist() == probs.argmax(axis=1).tolist()


@pytest.mark.parametrize("group", range(20))
def test_mean_equals_brute_force_on_random_trees(group: int) -> None:
    """50 random trees and forests a group, 1,000 in all."""
    rng = np.random.default_rng(group)
    for _ in range(50):
        labels = random_space(rng, size=int(rng.integers(2, 16)))
        probs = random_probs(rng, labels)
        far = twins.distances(labels.parent_positions)
        expected = [twins.frechet_mean(row, far) for row in probs.tolist()]
        assert frechet_mean(csr_array(probs), labels).tolist() == expected


@SEEDS
def test_mean_equals_brute_force_with_several_parents(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = random_space(rng, size=int(rng.integers(3, 16)), most_parents=3)
    probs = random_probs(rng, labels, rows=10)
    far = twins.distances(labels.parent_positions)
    expected = [twins.frechet_mean(row, far) for row in probs.tolist()]
    assert frechet_mean(probs, labels).tolist() == expected


@SEEDS
@pytest.mark.parametrize("length", [1.0, 1000.0])
def test_mean_equals_brute_force_with_vectors(seed: int, length: float) -> None:
    """Also where half of the vectors are so near to the others that float32 hardly tells them apart."""
    rng = np.random.default_rng(seed)
    labels = load_labels([f"l{n}" for n in range(int(rng.integers(2, 30)))])
    vectors = length * rng.standard_normal((len(labels), 5))
    vectors[1::2] = vectors[: len(labels) // 2] * (1 + 1e-7)
    probs = random_probs(rng, labels, rows=10)
    far = twins.vector_distances((vectors / length).tolist())
    found = frechet_mean(probs, labels, embeddings=vectors)
    for row, answer in zip(probs.tolist(), found.tolist(), strict=True):
        if any(row):
            values = twins.expected(row, far)
            assert values[answer] == pytest.approx(min(values), abs=3e-9)
        else:
            assert answer == -1


def test_equal_vectors_go_to_the_lower_position() -> None:
    labels = load_labels(["a", "b", "c"])
    vectors = np.array([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert frechet_mean(np.array([[0.1, 0, 0.9]]), labels, embeddings=vectors).tolist() == [1]


@SEEDS
def test_rows_in_blocks_give_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    tree, graph = random_space(rng, size=12), random_space(rng, size=12, most_parents=3)
    vectors = rng.standard_normal((12, 4))
    probs = csr_array(random_probs(rng, tree, rows=30))

    def means() -> list[np.ndarray]:
        some = [(tree, None), (graph, None), (tree, vectors)]
        return [geometry._means(probs, *each, keep=4, scale=1.0).toarray() for each in some]

    whole = means()
    monkeypatch.setattr(geometry, "_MOST_CELLS", 40)
    monkeypatch.setattr(geometry, "_CHUNK", 5)
    for one, other in zip(whole, means(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@SEEDS
def test_soft_labels_are_the_softmax_of_expected_distance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree, graph = random_space(rng, size=9), random_space(rng, size=9, most_parents=3)
    for labels in (tree, graph):
        probs = random_probs(rng, labels, rows=6)
        far = twins.distances(labels.parent_positions)
        means = geometry._means(csr_array(probs), labels, None, keep=4, scale=0.7).toarray()
        for row, got in zip(probs.tolist(), means, strict=True):
            if not any(row):
                assert not got.any()
                continue
            values = np.round(twins.expected(row, far), 9)
            own = [k for k, p in enumerate(row) if p]
            among = twins.between(own, far) if labels is tree else range(9)
            lowest = sorted(among, key=lambda y: (values[y], y))[:4]
            weights = np.exp(-0.7 * values[lowest])
            np.testing.assert_allclose(got[lowest], weights / weights.sum(), atol=1e-6)
            assert np.flatnonzero(got).tolist() == sorted(lowest)


def test_prediction_keeps_what_is_missing_and_what_was_not_read() -> None:
    rows = soft_rows([[0.3, 0, 0, 0, 0.3], [0, 0, 0, 0, 0], [0, 0.8, 0, 0, 0]], PATH)
    got = SoftLabels.from_dataset(frechet_predict(rows, PATH), PATH)
    dense = got.dense()
    values = np.array([8.0, 5.0, 4.0, 5.0, 8.0])  # of (.5, .5)
    np.testing.assert_allclose(dense[0], 0.6 * np.exp(-values) / np.exp(-values).sum(), rtol=1e-5)
    assert dense[1].tolist() == [0] * 5
    np.testing.assert_allclose(dense[2], [0, 0.8, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_the_one_label_kept_is_the_answer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = (random_space(rng, size=12, most_parents=1 + seed % 2) for _ in range(100))
    labels = next(space for space in drawn if not space.is_flat)
    probs = random_probs(rng, labels, rows=20)
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1.0)
    dataset = soft_rows(probs.tolist(), labels)
    predicted = frechet_predict(dataset, labels, keep=1)
    answers = graph.answers(SoftLabels.from_dataset(predicted, labels).probs, labels)
    means = frechet_mean(SoftLabels.from_dataset(dataset, labels).probs, labels)
    assert answers.tolist() == means.tolist()


def test_with_more_labels_kept_the_answer_may_be_another() -> None:
    ids = ["r", *({"id": id, "parent": "r"} for id in "ab")]
    labels = load_labels([*ids, *({"id": f"a{n}", "parent": "a"} for n in range(3))])
    dataset = soft_rows([[0, 0.6, 0.0, 0.2, 0.2, 0]], labels)
    predicted = SoftLabels.from_dataset(frechet_predict(dataset, labels), labels)
    first = SoftLabels.from_dataset(frechet_predict(dataset, labels, keep=1), labels)
    assert labels.ids[int(first.dense()[0].argmax())] == "a"
    assert labels.ids[int(predicted.dense()[0].argmax())] == "a"


def test_sharpening_comes_before_the_mean() -> None:
    rows = soft_rows([[0.6, 0, 0, 0, 0.4], [0.4, 0, 0.3, 0, 0.3]], PATH)

    def answers(**options: Any) -> list[int]:
        return [ids[0] for ids in frechet_predict(rows, PATH, **options)["label_ids"][:]]

    assert answers() == [2, 2]
    assert answers(top=1) == [0, 0]
    assert answers(top=2) == [2, 1]
    assert answers(temperature=0.5) == [1, 2]  # .36 : .16 and .16 : .09 : .09
    assert answers(temperature=0.01) == [0, 0]
    assert frechet_predict(rows, PATH, keep=2)["label_ids"][0] == [2, 1]


def test_labels_never_seen_are_answered() -> None:
    seen = load_labels(["cat", "dog", "oak"])
    parents = {"dog": "animal", "cat": "animal", "cow": "animal", "oak": "plant"}
    below = [{"id": id, "parent": parent} for id, parent in parents.items()]
    labels = load_labels(["plant", "animal", *below])
    rows = soft_rows([[0.5, 0.5, 0], [0, 0, 1.0]], seen)
    got = frechet_predict(rows, labels, observed=seen)
    assert [labels.ids[ids[0]] for ids in got["label_ids"][:]] == ["animal", "oak"]
    assert got["label_space"][:] == [labels.fingerprint] * 2
    wrong = load_labels(["cat", "elm"])
    other = soft_rows([[1.0, 0]], wrong)
    with pytest.raises(ValueError, match=r"observed has 1 labels that labels has not, .* is 'elm'"):
        frechet_predict(other, labels, observed=wrong)
    voted = rows.add_column("set_ids", [[0], [1]])
    with pytest.raises(ValueError, match="'set_ids' holds positions in the smaller label space"):
        frechet_predict(voted, labels, observed=seen)


def test_a_label_keeps_its_place_when_the_order_differs() -> None:
    seen = load_labels(["4", "3", "0"])
    rows = soft_rows([[0.1, 0.2, 0.7]], seen)
    got = frechet_predict(rows, PATH, observed=seen, temperature=0.5)
    weights = np.array([0.01, 0.04, 0.49])
    value = [weights @ (np.array([4, 3, 0]) - y) ** 2 / weights.sum() for y in range(5)]
    expected = np.exp(-np.array(value)) / np.exp(-np.array(value)).sum()
    np.testing.assert_allclose(SoftLabels.from_dataset(got, PATH).dense()[0], expected, rtol=1e-5)


VECTORS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "ab": (0.6, 0.8), "c": (-1.0, 0.0)}


class Encoder:
    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        assert options["normalize_embeddings"]
        return np.array([VECTORS[text] for text in texts])


def test_an_encoder_gives_the_distance() -> None:
    labels = load_labels(["a", "b", "ab", "c"])
    rows = soft_rows([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]], labels)
    got = frechet_predict(rows, labels, encoder=Encoder(), keep=4)
    assert [ids[0] for ids in got["label_ids"][:]] == [2, 3]
    # one label: softmax of 20 cosine
    logits = 20 * np.array([-1.0, 0.0, -0.6, 1.0])
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(SoftLabels.from_dataset(got, labels).dense()[1], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 and finite; got 0.0"),
        ({"scale": float("inf")}, "scale must be above 0 and finite; got inf"),
        ({"keep": 0}, "keep must be at least 1, the number of labels to keep; got 0"),
        ({"top": 0}, "k must be at least 1"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_predict(soft_rows([[1.0, 0, 0, 0, 0]], PATH), PATH, **options)


def test_spaces_that_have_no_geometry() -> None:
    flat, many = load_labels(["a", "b"]), load_labels(["a", "b"], multilabel=True)
    with pytest.raises(ValueError, match=r"no label has a parent, so .* give encoder="):
        frechet_predict(soft_rows([[1.0, 0]], flat), flat)
    with pytest.raises(ValueError, match="single-label"):
        frechet_predict(soft_rows([[1.0, 0]], many), many)


# ----------------------------------------------------------------------------------- the locus


@SEEDS
def test_locus_equals_what_a_grid_of_distributions_reaches(seed: int) -> None:
    """Two observed labels, and three: every distribution in steps of 1/20."""
    rng = np.random.default_rng(seed)
    labels = random_space(rng, size=int(rng.integers(4, 11)))
    observed = sorted(rng.choice(len(labels), int(rng.integers(2, 4)), replace=False).tolist())
    steps = range(21)
    grid = [(i, j, 20 - i - j) for i in steps for j in steps if i + j <= 20]
    probs = np.zeros((len(grid), len(labels)))
    probs[:, observed] = np.array(grid)[:, : len(observed)] / 20
    probs = probs[probs.any(axis=1)]
    reached = set(frechet_mean(probs, labels).tolist())
    assert reachable_labels(labels, observed) == sorted(reached)


@SEEDS
def test_locus_and_next_label_equal_the_twins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = random_space(rng, size=int(rng.integers(2, 25)))
    far = twins.distances(labels.parent_positions)
    observed = rng.choice(len(labels), int(rng.integers(1, 4))).tolist()
    assert reachable_labels(labels, observed) == twins.between(observed, far)
    assert next_label(labels, observed) == twins.next_label(observed, far)


def test_active_selection_reaches_everything_in_the_end() -> None:
    assert reachable_labels(PATH, [3, 1]) == [1, 2, 3]
    assert next_label(PATH, [1, 2]) == 4  # two edges away, 0 one
    assert next_label(PATH, [2]) == 0  # both ends alike
    assert next_label(PATH, [0, 4]) is None


def test_locus_of_what_is_no_tree() -> None:
    labels = load_labels(["a", "b", {"id": "c", "parents": ["a", "b"]}])
    with pytest.raises(ValueError, match=r"'c' has several parents, .* known for trees only"):
        reachable_labels(labels, [0, 2])
    with pytest.raises(ValueError, match="observed has the position 5, but the 5 labels have"):
        next_label(PATH, [5])
    with pytest.raises(ValueError, match="observed names no label"):
        reachable_labels(PATH, [])
