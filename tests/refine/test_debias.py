from collections.abc import Sequence

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat, prompt_sha
from llmlabel.refine.debias import batch_calibration, content_free_calibration
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])
SHA = prompt_sha("label/direct")


def table(probs: np.ndarray) -> Dataset:
    ids = [f"r{i}" for i in range(len(probs))]
    rows = Dataset.from_dict({"id": ids, "text": ids, "prompt_sha": [SHA] * len(ids)})
    return SoftLabels.from_dense(probs, LABELS).add_to(rows)


def dense(dataset: Dataset) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, LABELS).dense()


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


def test_rows_without_a_label_stay_without_and_count_for_nothing() -> None:
    probs = np.tile([[0.8, 0.1, 0.1], [0.0, 0.0, 0.0], [0.2, 0.4, 0.4]], (5, 1))
    has = probs.sum(axis=1) > 0
    got = dense(batch_calibration(table(probs), LABELS))
    np.testing.assert_array_equal(got[~has], 0)
    alone = dense(batch_calibration(table(probs[has]), LABELS))
    np.testing.assert_allclose(got[has], alone, rtol=1e-6)
    none = batch_calibration(table(np.zeros((2, 3))), LABELS)
    assert none["label_ids"][:] == [[], []]


def test_content_free_inputs_divide() -> None:
    class Biased(FakeEngine):
        def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
            assert [chat[-1]["content"] for chat in chats] == [
                "Text: N/A\nLabel:",
                "Text: \nLabel:",
            ]
            return Scores(np.log([[0.30, 0.10, 0.10], [0.06, 0.02, 0.12]]))

    got = content_free_calibration(
        table(np.array([[0.45, 0.2, 0.35]])), Biased(), LABELS, texts=("N/A", "")
    )
    # mean of (.6, .2, .2) and (.3, .1, .6): (.45, .15, .4)
    expected = np.array([1.0, 0.2 / 0.15, 0.35 / 0.4])
    np.testing.assert_allclose(dense(got)[0], expected / expected.sum(), rtol=1e-5)


def test_a_mean_of_a_few_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only 9 rows have a soft label.*more rows"):
        batch_calibration(table(np.array([[0.05, 0.9, 0.05]] * 9)), LABELS)


def test_another_prompt_is_refused() -> None:
    rows = table(np.array([[0.05, 0.9, 0.05]]))
    with pytest.raises(ValueError, match=r"label/applies.*labelled with"):
        content_free_calibration(rows, FakeEngine(), LABELS, prompt="label/applies")


def test_multilabel_is_refused() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    rows = SoftLabels.from_dense(np.array([[0.5, 0.5]]), labels)
    dataset = rows.add_to(Dataset.from_dict({"id": ["x"], "text": ["x"]}))
    with pytest.raises(ValueError, match="multi-label"):
        batch_calibration(dataset, labels)
