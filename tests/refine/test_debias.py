import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import debias as reference

from llmlabel.data import with_columns
from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat, prompt_sha
from llmlabel.refine.debias import (
    batch_calibration,
    content_free_calibration,
    domain_context_calibration,
    em_prior,
    em_step,
    estimate_prior,
    match_prior,
    matching_weights,
    random_domain_texts,
    shift_prior,
)
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])
SHA = prompt_sha("label/direct")
UNEQUAL = {"a": 0.6, "b": 0.3, "c": 0.1}


def table(probs: np.ndarray) -> Dataset:
    ids = [f"r{i}" for i in range(len(probs))]
    rows = Dataset.from_dict({"id": ids, "text": ids, "prompt_sha": [SHA] * len(ids)})
    return SoftLabels.from_dense(probs, LABELS).add_to(rows)


def dense(dataset: Dataset) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, LABELS).dense()


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of some rows, and two label mixes."""
    rng = np.random.default_rng(seed)
    labels = int(rng.integers(2, 6))
    concentration = rng.uniform(0.2, 3.0, size=labels)
    probs = rng.dirichlet(concentration, size=int(rng.integers(10, 25)))
    probs = np.maximum(probs, 1e-6)
    probs /= probs.sum(axis=1, keepdims=True)
    return probs, rng.dirichlet(np.full(labels, 3.0)), rng.dirichlet(np.full(labels, 3.0))


class Given(FakeEngine):
    """Answers what it was given, whatever is asked; remembers the texts."""

    def __init__(self, probs: list[list[float]]) -> None:
        super().__init__()
        self.probs, self.texts = np.array(probs), list[str]()

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        self.texts = [chat[-1]["content"] for chat in chats]
        with np.errstate(divide="ignore"):
            return Scores(np.log(np.resize(self.probs, (len(chats), len(labels)))))


# ------------------------------------------------------------------------- batch calibration


def test_two_rows_by_hand() -> None:
    probs = np.array([[0.8, 0.1, 0.1], [0.2, 0.4, 0.4]])
    got = dense(batch_calibration(table(np.tile(probs, (5, 1))), LABELS))
    # geometric means over the rows: 0.4, 0.2, 0.2
    np.testing.assert_allclose(got[0], np.array([2.0, 0.5, 0.5]) / 3.0, rtol=1e-5)
    np.testing.assert_allclose(got[1], np.array([0.5, 2.0, 2.0]) / 4.5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_a_constant_preference_is_removed_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([2.0] * 3, size=30)
    biased = probs * rng.uniform(0.1, 10, size=3)
    biased /= biased.sum(axis=1, keepdims=True)
    one = dense(batch_calibration(table(probs), LABELS))
    two = dense(batch_calibration(table(biased), LABELS))
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(
        np.log(two).mean(axis=0) - np.log(two).mean(), 0, atol=1e-4
    )  # no label is preferred any more
    for prior in (None, UNEQUAL):
        one = dense(match_prior(table(probs), LABELS, prior=prior))
        two = dense(match_prior(table(biased), LABELS, prior=prior))
        np.testing.assert_allclose(one, two, atol=1e-5)


# ------------------------------------------------------------------------- what all have in common

CORRECTIONS: dict[str, Callable[[Dataset], Dataset]] = {
    "batch": lambda rows: batch_calibration(rows, LABELS),
    "content-free": lambda rows: content_free_calibration(rows, Given([[0.5, 0.3, 0.1]]), LABELS),
    "domain": lambda rows: domain_context_calibration(rows, Given([[0.5, 0.3, 0.1]]), LABELS),
    "match": lambda rows: match_prior(rows, LABELS, prior=UNEQUAL),
    "shift": lambda rows: shift_prior(rows, LABELS, prior=UNEQUAL),
    "em": lambda rows: shift_prior(rows, LABELS),
}
FROM_THE_ROWS = ["batch", "match", "em"]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rows_without_a_label_stay_without_and_count_for_nothing(name: str) -> None:
    correct = CORRECTIONS[name]
    probs = np.tile([[0.8, 0.1, 0.1], [0.0, 0.0, 0.0], [0.2, 0.4, 0.4]], (5, 1))
    has = probs.sum(axis=1) > 0
    got = dense(correct(table(probs)))
    np.testing.assert_array_equal(got[~has], 0)
    alone = dense(correct(table(probs[has])))
    np.testing.assert_allclose(got[has], alone, rtol=1e-6)
    none = correct(table(np.zeros((2, 3))))
    assert none["label_ids"][:] == [[], []]


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_order_of_the_rows_does_not_matter(name: str) -> None:
    rows = table(np.random.default_rng(0).dirichlet([1.0] * 3, size=30))
    shuffled = np.random.default_rng(1).permutation(30)
    got = dense(CORRECTIONS[name](rows.select(shuffled)))
    np.testing.assert_allclose(got, dense(CORRECTIONS[name](rows))[shuffled], rtol=1e-6)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_what_is_missing_stays_missing_and_is_weighed_like_the_rest(name: str) -> None:
    """As if each label not stored had an equal part of the missing mass, which is not written."""
    rng = np.random.default_rng(0)
    whole = rng.dirichlet([1.0] * 3, size=20)
    whole[:10, 1:] = whole[:10, 1:].mean(
        axis=1, keepdims=True
    )  # what is spread evenly is the truth
    cut = whole.copy()
    cut[:10, 1:] = 0
    expected = dense(CORRECTIONS[name](table(whole)))
    got = dense(CORRECTIONS[name](table(cut)))
    np.testing.assert_allclose(got[10:], expected[10:], atol=1e-6)
    np.testing.assert_allclose(got[:10, 0], expected[:10, 0], atol=1e-6)
    np.testing.assert_array_equal(got[:10, 1:], 0)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_multilabel_is_refused(name: str) -> None:
    labels = load_labels(["a", "b", "c"], multilabel=True)
    rows = Dataset.from_dict({"id": ["x"], "text": ["x"], "prompt_sha": [SHA]})
    rows = SoftLabels.from_dense(np.array([[0.5, 0.5, 0.5]]), labels).add_to(rows)
    engine = Given([[0.5, 0.3, 0.1]])
    correct: dict[str, Callable[[], object]] = {
        "batch": lambda: batch_calibration(rows, labels),
        "content-free": lambda: content_free_calibration(rows, engine, labels),
        "domain": lambda: domain_context_calibration(rows, engine, labels),
        "match": lambda: match_prior(rows, labels),
        "shift": lambda: shift_prior(rows, labels, prior=UNEQUAL),
        "em": lambda: estimate_prior(rows, labels),
    }
    with pytest.raises(ValueError, match="multi-label"):
        correct[name]()


@pytest.mark.parametrize("name", FROM_THE_ROWS)
def test_a_mean_of_a_few_rows_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"only 9 rows have a soft label.*more rows"):
        CORRECTIONS[name](table(np.array([[0.05, 0.9, 0.05]] * 9)))
    with pytest.raises(ValueError, match="only 9 rows"):
        estimate_prior(table(np.array([[0.05, 0.9, 0.05]] * 9)), LABELS)


def test_gold_changes_nothing() -> None:
    rows = table(np.random.default_rng(0).dirichlet([1.0] * 3, size=30))
    for correct in CORRECTIONS.values():
        free = correct(rows)
        for gold in ([[0]] * 30, [[2]] * 30):
            got = correct(rows.add_column("gold", gold))
            assert got["label_probs"][:] == free["label_probs"][:]


# ------------------------------------------------------------------------- content-free inputs


def test_content_free_inputs_divide() -> None:
    engine = Given([[0.30, 0.10, 0.10], [0.06, 0.02, 0.12]])
    rows = table(np.array([[0.45, 0.2, 0.35]]))
    got = content_free_calibration(rows, engine, LABELS, texts=("N/A", ""))
    assert engine.texts == ["Text: N/A\nLabel:", "Text: \nLabel:"]
    # mean of (.6, .2, .2) and (.3, .1, .6): (.45, .15, .4)
    expected = np.array([1.0, 0.2 / 0.15, 0.35 / 0.4])
    np.testing.assert_allclose(dense(got)[0], expected / expected.sum(), rtol=1e-5)


def test_a_label_that_content_free_inputs_do_not_read_gets_its_part_of_the_bound() -> None:
    class Partial(Given):
        def score(self, chats: Sequence[Chat], *args: object, **kwargs: object) -> Scores:
            logs = np.log([[0.5, 0.3, 1.0]] * len(chats))
            logs[:, 2] = -np.inf
            return Scores(logs, unread=np.full(len(chats), 0.2))

    got = content_free_calibration(table(np.array([[0.5, 0.3, 0.2]])), Partial([[1.0]]), LABELS)
    np.testing.assert_allclose(dense(got)[0], [1 / 3] * 3, rtol=1e-5)


def test_a_model_that_reads_no_content_free_input_is_an_error() -> None:
    engine = Given([[0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"fake.*gives no label a probability.*N/A"):
        content_free_calibration(table(np.array([[0.45, 0.2, 0.35]])), engine, LABELS)


def test_demonstrations_may_name_labels_by_id() -> None:
    labels = load_labels([{"id": "a", "name": "first"}, "b", "c"])
    seen: list[Chat] = []

    class Seeing(Given):
        def score(self, chats: Sequence[Chat], *args: object, **kwargs: object) -> Scores:
            seen.extend(chats)
            return Scores(np.log([[0.5, 0.3, 0.2]] * len(chats)))

    rows = Dataset.from_dict({"id": ["x"], "text": ["x"], "prompt_sha": [SHA]})
    rows = SoftLabels.from_dense(np.array([[0.5, 0.3, 0.2]]), labels).add_to(rows)
    shown = [{"text": "t", "label": "a"}]
    content_free_calibration(rows, Seeing([[1.0]]), labels, demonstrations=shown, texts=["N/A"])
    assert [turn["content"] for turn in seen[0][1:]] == [
        *("Text: t\nLabel:", "first", "Text: N/A\nLabel:")
    ]


def test_another_prompt_is_refused() -> None:
    rows = table(np.array([[0.05, 0.9, 0.05]]))
    with pytest.raises(ValueError, match=r"label/applies.*labelled with"):
        content_free_calibration(rows, FakeEngine(), LABELS, prompt="label/applies")
    with pytest.raises(ValueError, match=r"in 2 label orders.*labelled with"):
        content_free_calibration(rows, FakeEngine(), LABELS, orders=2)


def test_domain_context_asks_with_words_of_the_rows() -> None:
    rows = Dataset.from_dict({"id": ["x", "y"], "text": ["one two", "two three four five"]})
    rows = rows.add_column("prompt_sha", [SHA] * 2)
    rows = SoftLabels.from_dense(np.array([[0.2, 0.5, 0.3]] * 2), LABELS).add_to(rows)
    engine = Given([[0.2, 0.5, 0.3]])
    got = domain_context_calibration(rows, engine, LABELS, texts=7, seed=3)
    asked = [text.removeprefix("Text: ").removesuffix("\nLabel:") for text in engine.texts]
    assert asked == random_domain_texts(rows, texts=7, seed=3)
    np.testing.assert_allclose(dense(got), 1 / 3, rtol=1e-5)


def test_random_texts_have_the_words_and_the_mean_length_of_the_rows() -> None:
    rows = Dataset.from_dict({"text": ["often often often Rare", "", "often often"]})
    texts = random_domain_texts(rows, texts=400, seed=0)
    words = [word for text in texts for word in text.split()]
    assert {len(text.split()) for text in texts} == {3}  # 6 words in 2 texts with words
    assert set(words) == {"often", "Rare"}
    assert words.count("Rare") / len(words) == pytest.approx(1 / 6, abs=0.04)
    assert random_domain_texts(rows.select([2, 0, 1]), texts=400, seed=0) == texts
    assert random_domain_texts(rows, texts=400, seed=1) != texts
    with pytest.raises(ValueError, match="0 different words"):
        random_domain_texts(Dataset.from_dict({"text": [" "]}), texts=3, seed=0)


# ------------------------------------------------------------------------- prior matching


@pytest.mark.parametrize("seed", range(20))
def test_matching_equals_the_loops(seed: int) -> None:
    probs, prior, _ = random_case(seed)
    weights = np.exp(matching_weights(probs, prior))
    slow = np.array(reference.matching_weights(probs.tolist(), prior.tolist()))
    np.testing.assert_allclose(weights / weights.sum(), slow / slow.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        reference.mean_prediction(probs.tolist(), weights.tolist()), prior, atol=1e-8
    )


@pytest.mark.parametrize("prior", [None, UNEQUAL, {"a": 0.5, "b": 0.5, "c": 0.0}])
def test_the_mean_prediction_becomes_the_prior(prior: dict[str, float] | None) -> None:
    probs = np.random.default_rng(0).dirichlet([2.0, 0.5, 0.2], size=200)
    got = dense(match_prior(table(probs), LABELS, prior=prior))
    np.testing.assert_allclose(
        got.mean(axis=0), list((prior or dict.fromkeys("abc", 1 / 3)).values()), atol=1e-6
    )
    again = dense(match_prior(table(got), LABELS, prior=prior))
    np.testing.assert_allclose(again, got, atol=1e-6)  # a fixed point


@pytest.mark.parametrize(
    "sure",
    [
        [[1.0, 0.0, 0.0]] * 18 + [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[0.6, 0.4, 0.0]] * 20,
        [[0.9, 0.1, 0.0]] * 10 + [[0.0, 0.4, 0.6]] * 10,  # c could have all of 1 / 2, a the rest
    ],
)
def test_what_no_weights_can_match_is_an_error(sure: list[list[float]]) -> None:
    prior = {"a": 0.3, "b": 0.1, "c": 0.6}
    with pytest.raises(ValueError, match="no weights bring the mean prediction to the prior"):
        match_prior(table(np.array(sure)), LABELS, prior=prior)


def test_rows_that_are_sure_of_what_cannot_be_are_not_lost() -> None:
    never = {"a": 0.5, "b": 0.5, "c": 0.0}
    rows = table(np.array([[0.3, 0.3, 0.4]] * 10 + [[0.0, 0.0, 1.0]] * 2))
    with pytest.raises(ValueError, match="2 rows are sure of labels of share 0"):
        shift_prior(rows, LABELS, prior=never)
    with pytest.raises(ValueError, match="no weights bring"):
        match_prior(rows, LABELS, prior=never)
    got = dense(match_prior(rows.select(range(10)), LABELS, prior=never))
    np.testing.assert_allclose(got, [[0.5, 0.5, 0.0]] * 10, atol=1e-6)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"a": 0.5, "b": 0.5}, "prior has no share for the label 'c'"),
        ({"a": 0.5, "b": 0.5, "d": 0.0}, "unknown label 'd'"),
        ({"a": 0.5, "b": 0.6, "c": -0.1}, "none below 0"),
        ({"a": 0.5, "b": 0.3, "c": 0.1}, "sum to 0.9"),
    ],
)
def test_a_prior_that_is_none(prior: dict[str, float], message: str) -> None:
    rows = table(np.full((10, 3), 1 / 3))
    with pytest.raises(ValueError, match=message):
        match_prior(rows, LABELS, prior=prior)
    with pytest.raises(ValueError, match=message):
        shift_prior(rows, LABELS, prior=prior)


# ------------------------------------------------------------------------- a shift of the prior


def test_known_priors_by_hand() -> None:
    """0.2 * 0.6 / 0.5, 0.5 * 0.3 / 0.25, 0.3 * 0.1 / 0.25, normalised."""
    rows = table(np.array([[0.2, 0.5, 0.3]]))
    source = {"a": 0.5, "b": 0.25, "c": 0.25}
    got = dense(shift_prior(rows, LABELS, prior=UNEQUAL, source_prior=source))
    np.testing.assert_allclose(got[0], np.array([0.24, 0.6, 0.12]) / 0.96, rtol=1e-6)
    never = {"a": 0.5, "b": 0.5, "c": 0.0}
    got = dense(shift_prior(rows, LABELS, prior=never, source_prior=source))
    np.testing.assert_allclose(got[0], np.array([0.2, 1.0, 0.0]) / 1.2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"source_prior must be shares .* above 0"):
        shift_prior(rows, LABELS, source_prior=never)


@pytest.mark.parametrize("seed", range(20))
def test_em_equals_the_loops_and_its_likelihood_never_decreases(seed: int) -> None:
    probs, source, _ = random_case(seed)
    likelihood, mix, slow = probs / source, source, source.tolist()
    values = [reference.log_likelihood(probs.tolist(), source.tolist(), slow)]
    for _ in range(30):
        mix = em_step(likelihood, mix)
        slow = reference.em_step(probs.tolist(), source.tolist(), slow)
        values.append(reference.log_likelihood(probs.tolist(), source.tolist(), slow))
        np.testing.assert_allclose(mix, slow, rtol=1e-9)
    assert (np.diff(values) >= -1e-12).all()
    assert values[-1] > values[0]


@pytest.mark.parametrize("seed", range(20))
def test_em_ends_at_the_best_mix(seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker; the likelihood is concave in the mix."""
    probs, source, other = random_case(seed)
    mix = em_prior(probs, source)
    gradient = (probs / source / (probs / source @ mix)[:, None]).mean(axis=0)
    assert (gradient <= 1 + 1e-3).all()
    np.testing.assert_allclose(gradient[mix > 1e-3], 1, atol=1e-4)
    best, worse = (
        reference.log_likelihood(probs.tolist(), source.tolist(), m.tolist()) for m in (mix, other)
    )
    assert best > worse


def test_em_finds_the_mix_of_a_calibrated_source() -> None:
    """Gaussian classes seen by the exact posterior under equal shares; then the classes shift."""
    rng = np.random.default_rng(0)
    gold = rng.choice(3, size=4000, p=list(UNEQUAL.values()))
    points = np.array([-1.5, 0.0, 1.5])[gold] + rng.normal(size=4000)
    joint = np.exp(-((points[:, None] - np.array([-1.5, 0.0, 1.5])) ** 2) / 2)
    rows = table(joint / joint.sum(axis=1, keepdims=True))
    found = estimate_prior(rows, LABELS)
    assert list(found) == ["a", "b", "c"]
    assert found == pytest.approx(UNEQUAL, abs=0.03)
    shifted = shift_prior(rows, LABELS)
    np.testing.assert_allclose(
        dense(shifted), dense(shift_prior(rows, LABELS, prior=found)), atol=1e-6
    )
    exact = joint * np.array(list(UNEQUAL.values()))
    exact /= exact.sum(axis=1, keepdims=True)
    assert np.abs(dense(shifted) - exact).max() < 0.05
    right = [(dense(one).argmax(axis=1) == gold).mean() for one in (rows, shifted)]
    assert right[1] > right[0] + 0.02


def test_the_mean_of_a_label_is_over_the_rows_that_may_have_it() -> None:
    """Else a label that is seldom a candidate would get a weight that beats every text."""
    rng = np.random.default_rng(0)
    candidates = [[0, 1]] * 10 + [[0, 1, 2]] * 3 + [None]  # null: all may
    probs = np.zeros((14, 3))
    for row, some in enumerate(candidates):
        probs[row, some or [0, 1, 2]] = rng.dirichlet(np.ones(len(some or "abc")))
    rows = table(probs)
    rows = with_columns(rows, {"candidates": (candidates, List(Value("int32")))})
    got = dense(batch_calibration(rows, LABELS))
    for row in range(14):
        weighed = [
            math.exp(
                math.log(probs[row, label])
                - np.mean([math.log(p) for p in probs[:, label].tolist() if p > 0])
            )
            if probs[row, label] > 0
            else 0.0
            for label in range(3)
        ]
        np.testing.assert_allclose(got[row], np.array(weighed) / sum(weighed), atol=1e-6)
