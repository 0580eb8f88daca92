"""Labels by name and training rows together, in vectors and in words."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from label.letters import Letters, space, unit
from reference import label_index
from reference import profiles as reference

from llmlabel.data import with_columns
from llmlabel.label import profiles
from llmlabel.label.index import index_of_vectors
from llmlabel.label.index import label_index as build
from llmlabel.label.profiles import label_lexical, label_profiles
from llmlabel.label.retrieval import label_nearest
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

MANY = load_labels([f"l{i}" for i in range(7)], multilabel=True)


def table(vectors: Any, gold: Any = None, prefix: str = "r", texts: Any = None) -> Dataset:
    ids = [f"{prefix}{i:03}" for i in range(len(vectors))]
    rows = Dataset.from_dict({"id": ids, "text": texts or [f"text {id}" for id in ids]})
    columns: dict[str, Any] = {
        "vector": (
            [None if v is None else [float(x) for x in v] for v in vectors],
            List(Value("float32")),
        )
    }
    if gold is not None:
        columns["gold"] = (gold, List(Value("int32")))
    return with_columns(rows, columns)


def case(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    gold = [rng.choice(7, rng.integers(0, 3), replace=False).tolist() for _ in range(20)]
    return (
        unit(rng.normal(size=(9, 5))),
        unit(rng.normal(size=(20, 5))),
        gold,
        unit(rng.normal(size=(7, 5))),
    )


@pytest.mark.parametrize("seed", range(20))
def test_profiles_equal_the_loop_without_the_row_itself(seed: int) -> None:
    rows, pool, gold, names = case(seed)
    index = index_of_vectors(MANY, names, encoder="e")
    k, prior = 1 + seed % 7, 0.5 + seed % 3
    both = np.concatenate([rows, pool])
    texts = [f"row {i}" for i in range(9)] + [f"text p{i:03}" for i in range(20)]
    asked = table(both, texts=texts)  # the last 20 are the pool's by their words
    known = table(pool, gold, "p")
    got = label_profiles(
        asked, known, index, prior=prior, k=k, scale=3.0, midpoint=0.2, block_rows=6
    )
    for i, row in enumerate(both.tolist()):
        own = {i - 9} if i >= 9 else set()
        cosines = reference.cosines(row, pool.tolist(), gold, names.tolist(), own, prior)
        best = sorted(range(7), key=lambda label: (-round(cosines[label], 6), label))[:k]
        assert got["label_ids"][i] == best
        expected = label_index.probs([cosines[label] for label in best], 3.0, 0.2, True)
        np.testing.assert_allclose(got["label_probs"][i], expected, rtol=1e-4)
    assert got["engine"][0].startswith("profiles@")


def test_labels_without_rows_keep_their_name() -> None:
    rows, pool, _, names = case(0)
    index = index_of_vectors(MANY, names, encoder="e")
    none = table(pool, [[0]] * 20, "p")
    got = label_profiles(table(rows), none, index, k=7)
    plain = label_nearest(table(rows), index, k=7)
    for mine, theirs in zip(
        SoftLabels.from_dataset(got, MANY).dense(),
        SoftLabels.from_dataset(plain, MANY).dense(),
        strict=True,
    ):
        np.testing.assert_allclose(mine[1:], theirs[1:], rtol=1e-5)
        assert mine[0] != pytest.approx(theirs[0], rel=0.01)


def test_a_row_without_a_vector_has_no_label() -> None:
    _, pool, gold, names = case(1)
    index = index_of_vectors(MANY, names, encoder="e")
    got = label_profiles(
        table([None, pool[0]], texts=["a", "b"]), table(pool, gold, "p"), index, k=2
    )
    assert got["error"] == ["no vector", None]
    assert [len(ids) for ids in got["label_ids"]] == [0, 2]


TEXTS = ["pike and perch", "perch fishing", "sail boat", "rowing boats", "ice"]
GOLD = [[0], [0, 2], [1], [1], []]
NAMES = space(["fish", "boats", "fishing", "glaciers"])


def words(texts: list[str], gold: Any = None, prefix: str = "r") -> Dataset:
    rows = Dataset.from_dict({"id": [f"{prefix}{i}" for i in range(len(texts))], "text": texts})
    return rows if gold is None else with_columns(rows, {"gold": (gold, List(Value("int32")))})


def features(texts: list[str]) -> np.ndarray:
    """TF-IDF by hand, of the texts and names that the module sees, for `texts`."""
    import math
    import re

    def tokens(text: str) -> list[str]:
        found = ["w:" + word for word in re.findall(r"\b\w\w+\b", text.lower())]
        for word in text.lower().split():
            padded = f" {word} "
            found += [
                "c:" + padded[i : i + n]
                for n in (3, 4, 5)
                for i in range(max(len(padded) - n + 1, 1))
                if i == 0 or len(padded) >= n
            ]
        return found

    corpus = [tokens(text) for text in [*TEXTS, *NAMES.texts()]]
    vocabulary = sorted({token for some in corpus for token in some})
    idf = {
        t: math.log((1 + len(corpus)) / (1 + sum(t in some for some in corpus))) + 1
        for t in vocabulary
    }
    rows = []
    for text in texts:
        some = tokens(text)
        parts = []
        for kind in ("w:", "c:"):
            row = np.array(
                [
                    (1 + math.log(some.count(t))) * idf[t]
                    if t in some and t.startswith(kind)
                    else 0.0
                    for t in vocabulary
                ]
            )
            parts.append(row / (np.linalg.norm(row) or 1.0))
        both = np.sum(parts, axis=0)
        rows.append(both / (np.linalg.norm(both) or 1.0))
    return np.array(rows)


def test_words_equal_tf_idf_by_hand() -> None:
    asked = words(["perch fish", "boat on ice", "perch fishing", "zzz", "Perch, fishing!"])
    got = label_lexical(
        asked, words(TEXTS, GOLD, "p"), NAMES, prior=2.0, k=3, scale=4.0, midpoint=0.3
    )
    vectors, pool, names = features(asked["text"][:]), features(TEXTS), features(NAMES.texts())
    for i in range(5):
        own = {1} if i in (2, 4) else set()  # the pool's second row says the same
        cosines = reference.cosines(
            vectors[i].tolist(), pool.tolist(), GOLD, names.tolist(), own, 2.0
        )
        best = sorted(range(4), key=lambda label: (-round(cosines[label], 6), label))[:3]
        best = [label for label in best if cosines[label] > 0]
        assert got["label_ids"][i] == best
        expected = label_index.probs([cosines[label] for label in best], 4.0, 0.3, True)
        np.testing.assert_allclose(got["label_probs"][i], expected, rtol=1e-4)
    assert got["label_ids"][3] == []
    assert got["engine"][0].startswith("lexical@")


@pytest.mark.parametrize("prior", [0.01, 2.5, 100.0])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_row_is_no_evidence_for_its_own_label_even_by_rounding(prior: float, copies: int) -> None:
    """Of a label whose name and other rows share nothing with a row, float32 leaves some 1e-8."""
    texts = ["quick brown foxes jumping", "lazy dogs", "huge ships sail north", "bitter tea"]
    pool = words(texts * copies, [[0], [1], [2], [3]] * copies, "p")
    names = space(["zzzz", "yyyy", "xxxx", "vvvv"])
    got = label_lexical(pool, pool, names, prior=prior)
    own = [i in ids for i, ids in zip([0, 1, 2, 3] * copies, got["label_ids"], strict=True)]
    assert own == [False] * 4 * copies


def test_words_do_not_depend_on_blocks_or_on_the_order_of_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = words(["perch fish", "", "boat on ice", "perch fishing"])
    pool = words(TEXTS, GOLD, "p")
    expected = label_lexical(asked, pool, NAMES)
    monkeypatch.setattr(profiles, "_CELLS", 1)
    got = label_lexical(asked, pool.select([4, 2, 0, 1, 3]), NAMES, block_rows=3)
    assert got["label_ids"] == expected["label_ids"]
    np.testing.assert_allclose(
        np.concatenate(got["label_probs"][:]), np.concatenate(expected["label_probs"][:]), rtol=1e-5
    )
    assert got["error"] == [None, "empty text", None, None]


def test_what_has_no_meaning_is_refused() -> None:
    _, pool, gold, names = case(1)
    index = index_of_vectors(MANY, names, encoder="e")
    with pytest.raises(ValueError, match="prior must be above 0"):
        label_profiles(table(pool), table(pool, gold), index, prior=0.0)
    with pytest.raises(ValueError, match="k must be at least 1"):
        label_lexical(words(TEXTS), words(TEXTS, GOLD, "p"), NAMES, k=0)
    for refused in (
        lambda: label_profiles(table(pool), table(pool, gold), index, scale=100.0),
        lambda: label_lexical(words(TEXTS), words(TEXTS, GOLD, "p"), NAMES, scale=100.0),
    ):
        with pytest.raises(ValueError, match="must be at most 12 in a multi-label space"):
            refused()
    with pytest.raises(ValueError, match="no pool row has text and gold"):
        label_lexical(words(TEXTS), words(TEXTS, [None] * 5, "p"), NAMES)


def test_names_and_rows_together_beat_either() -> None:
    """Names see the meaning dimly, rows too, and not in the same way."""
    rng = np.random.default_rng(0)
    true = unit(rng.normal(size=(300, 16)))
    labels = load_labels([f"l{i}" for i in range(300)], multilabel=True)
    names = unit(true + 0.3 * rng.normal(size=true.shape))
    gold = np.repeat(np.arange(300), 2)
    pool = table(unit(true[gold] + 0.4 * rng.normal(size=(600, 16))), gold[:, None].tolist(), "p")
    asked = rng.integers(0, 300, 400)
    rows = table(unit(true[asked] + 0.3 * rng.normal(size=(400, 16))))
    index = index_of_vectors(labels, names, encoder="e")

    def right(prior: float) -> float:
        got = label_profiles(rows, pool, index, prior=prior, k=1)
        return float(
            np.mean([ids[0] == label for ids, label in zip(got["label_ids"], asked, strict=True)])
        )

    both, name, example = right(1.0), right(1e6), right(1e-6)
    assert both > max(name, example) + 0.05


def test_the_letters_of_an_index_are_read() -> None:
    index = build(NAMES, Letters(5))
    pool = table(Letters(5).encode(TEXTS), GOLD, "p", texts=TEXTS)
    got = label_profiles(table(Letters(5).encode(["fish"])), pool, index, k=1, prior=100.0)
    assert got["label_ids"] == [[0]]
