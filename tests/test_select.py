import numpy as np
import pytest

from llmlabel.labelspace import load_labels
from llmlabel.select import margins, vote_entropy
from llmlabel.softlabels import SoftLabels


def test_margin_is_first_minus_second_and_0_without_a_label() -> None:
    labels = load_labels(["a", "b", "c"])
    probs = np.array([[0.2, 0.7, 0.1], [0.0, 0.0, 1.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    found = margins(SoftLabels.from_dense(probs, labels))
    assert found == pytest.approx([0.5, 1.0, 0.0, 0.0], abs=1e-6)


def test_margin_of_many_labels_is_that_of_the_one_nearest_to_a_half() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    probs = np.array([[0.9, 0.6], [0.9, 0.0], [0.0, 0.0], [0.5, 1.0]])
    found = margins(SoftLabels.from_dense(probs, labels))
    assert found == pytest.approx([0.2, 0.8, 1.0, 0.0], abs=1e-6)


def test_vote_entropy() -> None:
    answers = np.array([[3, 3, 3], [0, 1, 2], [0, 0, 1], [0, 1, -1], [-1, -1, -1], [5, -1, -1]])
    two_to_one = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)) / np.log(3)
    expected = [0, 1, two_to_one, np.log(2) / np.log(3), 0, 0]
    assert vote_entropy(answers) == pytest.approx(expected, abs=1e-12)


def test_one_source_never_disagrees() -> None:
    assert vote_entropy(np.array([[0], [4], [-1]])).tolist() == [0, 0, 0]
