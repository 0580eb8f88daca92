"""What a language model says of mined labels."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import List, Value
from reference import mining as reference
from train.mined import INTS, rows_of, space

from llmlabel.data import with_columns
from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat
from llmlabel.softlabels import SoftLabels
from llmlabel.train.judge_mining import (
    Probe,
    judge_negatives,
    judged_relevance,
    probe_judge,
)


class Judge(FakeEngine):
    """Says yes to label i of a text with the probability that is given; None is neither."""

    def __init__(self, truth: dict[str, dict[str, float | None]]) -> None:
        super().__init__()
        self.truth, self.asked = truth, list[tuple[str, str]]()

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        log_probs = np.full((len(chats), len(labels)), -np.inf)
        for row, chat in enumerate(chats):
            lines = chat[-1]["content"].split("\n")
            text, label = lines[0].removeprefix("Query: "), lines[1].removeprefix("Candidate: ")
            self.asked.append((text, label))
            if (p := self.truth[text].get(label, 0.1)) is not None:
                with np.errstate(divide="ignore"):
                    log_probs[row, labels.index("yes")] = np.log(p)
                    log_probs[row, labels.index("no")] = np.log(1 - p)
        return Scores(log_probs)


def test_what_a_judge_finds_as_true_as_the_own_label_is_excluded() -> None:
    labels, rows = space(30), rows_of([[0]])
    rows = with_columns(
        rows, {"negative_ids": ([list(range(3, 30))], INTS), "excluded_ids": ([[2]], INTS)}
    )
    said = {"label 0": 0.75, "label 3": 0.745, "label 4": 0.735, "label 5": None, "label 6": 0.9}
    engine = Judge({"text 0": said})
    got = judge_negatives(rows, labels, engine, count=10)
    assert got["excluded_ids"][0] == [2, 3, 6]  # above .75 - .01
    # 4, 7, 8, ..., 29 are left; every fifth, then from the second on
    assert got["negative_ids"][0] == [4, 7, 11, 12, 16, 17, 21, 22, 26, 27]
    assert got["judged_ids"][0] == [0, *range(3, 30)]
    expected = [0.75, 0.745, 0.735, None, 0.9]
    assert got["judged_probs"][0][:5] == pytest.approx(expected, abs=1e-6)
    assert got["judge_auc"][:] == [1.0]
    assert got["gold"][:] == [[0]]
    loose = judge_negatives(rows, labels, engine, beta=-0.2, sample="topk", count=3)
    assert (loose["excluded_ids"][0], loose["negative_ids"][0]) == ([2], [3, 4, 6])
    assert len(engine.asked) == 2 * (2 + 28)  # the probe, then one own label and 27 others


@pytest.mark.parametrize("seed", range(20))
def test_judging_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, count = space(12), 3
    rows, truth, positive = rows_of([[0, 1]] * count), {}, ("max", "mean", "min")[seed % 3]
    for i in range(count):
        said = {
            text: float(rng.integers(1, 16)) / 16 for text in labels.texts()
        }  # exact in float32
        truth[f"text {i}"] = said | {f"label {rng.integers(2, 12)}": None}
    rows = with_columns(rows, {"negative_ids": ([[5, 3, 8, 11, 2, 7]] * count, INTS)})
    got = judge_negatives(
        rows, labels, Judge(truth), beta=1 / 16, positive=positive, sample="topk", least_auc=0.0
    )
    for i in range(count):
        said = truth[f"text {i}"]
        own, others = (
            [(x, said[f"label {x}"]) for x in some] for some in ([0, 1], [5, 3, 8, 11, 2, 7])
        )
        expected = reference.judged(own, others, beta=1 / 16, positive=positive)
        assert (got["excluded_ids"][i], got["negative_ids"][i]) == expected


def test_rows_that_a_judge_cannot_help() -> None:
    labels = space(4)
    rows = rows_of([[0], [0], None, [0]], ["text 0", "text 1", "text 2", "text 3"])
    rows = with_columns(rows, {"negative_ids": ([[1, 2], [1, 2], [1], None], INTS)})
    engine = Judge(
        {"text 0": {"label 0": 0.9}, "text 1": {"label 0": None}, "text 3": {"label 0": 0.9}}
    )
    got = judge_negatives(rows, labels, engine)
    assert got["negative_ids"][:] == [
        [1, 2],
        None,
        None,
        None,
    ]  # nothing says what is true of row 1
    assert got["excluded_ids"][:] == [[], None, None, None]
    assert got["judged_ids"][:] == [[0, 1, 2], [0, 1, 2], None, None]
    assert got["judged_probs"][1][0] is None


def test_a_weak_judge_is_refused_before_it_judges(caplog: pytest.LogCaptureFixture) -> None:
    labels, rows = space(5), rows_of([[0]] * 6)
    rows = with_columns(rows, {"negative_ids": ([[1, 2]] * 6, INTS)})
    blind = Judge({f"text {i}": {} for i in range(6)})  # says .1 of everything
    with (
        caplog.at_level(logging.INFO, logger="llmlabel"),
        pytest.raises(
            ValueError, match=r"the judge is too weak: AUC 0\.500 of .* on 6 true and 6 false"
        ),
    ):
        judge_negatives(rows, labels, blind)
    assert len(blind.asked) == 12  # the probe alone
    assert "AUC 0.500" in caplog.text
    got = judge_negatives(rows, labels, blind, least_auc=0.5)
    assert got["judge_auc"][:] == [0.5] * 6
    assert got["excluded_ids"][0] == [1, 2]  # as true as the own one, for all that it knows


def test_probe() -> None:
    labels, rows = space(6), rows_of([[i % 6] for i in range(40)] + [None])
    engine = Judge({f"text {i}": {f"label {i % 6}": 0.6} for i in range(40)})
    got = probe_judge(rows, labels, engine, rows=15)
    assert got == Probe(1.0, 15, 15, 0, engine.name)
    asked = {text for text, _ in engine.asked}
    assert len(asked) == 15
    other = Judge(engine.truth)
    probe_judge(rows.select(range(40, -1, -1)), labels, other, rows=15)
    assert {text for text, _ in other.asked} == asked
    with pytest.raises(ValueError, match="no row has a true label in `gold`"):
        probe_judge(rows_of([[], None]), labels, engine)


def test_a_probe_of_other_rows() -> None:
    labels = space(4)
    rows = SoftLabels.from_dense(np.array([[0.9, 0.0, 0.0, 0.0]]), labels).add_to(rows_of([None]))
    rows = with_columns(rows, {"negative_ids": ([[1]], INTS)})
    probe = rows_of([[2]], ["asked"])
    engine = Judge({"text 0": {"label 0": 0.8}, "asked": {"label 2": 0.7}})
    got = judge_negatives(rows, labels, engine, answers="soft", probe=probe)
    assert got["negative_ids"][:] == [[1]]
    assert {text for text, _ in engine.asked[:2]} == {"asked"}


def test_judging_goes_on_where_it_stopped(tmp_path: Path) -> None:
    labels = space(3)
    rows = with_columns(rows_of([[0]]), {"negative_ids": ([[1, 2]], INTS)})
    truth: dict[str, dict[str, float | None]] = {"text 0": {"label 0": 0.9}}
    one = judge_negatives(rows, labels, Judge(truth), output=tmp_path)
    again = Judge(truth)
    assert judge_negatives(rows, labels, again, output=tmp_path)[:] == one[:]
    assert again.asked == []


def test_soft_relevance() -> None:
    labels = space(5)
    rows = rows_of([[0, 1], [2]])
    rows = with_columns(
        rows,
        {
            "judged_ids": ([[0, 1, 3, 4], None], INTS),
            "judged_probs": ([[0.75, None, 0.8, 0.25], None], List(Value("float32"))),
            "excluded_ids": ([[2, 3], None], INTS),
        },
    )
    got = judged_relevance(rows, labels)
    dense = SoftLabels.from_dataset(got, labels).dense()
    np.testing.assert_allclose(dense, [[0.75, 1, 0, 0.8, 0], [0, 0, 1, 0, 0]], atol=1e-6)
    assert got["excluded_ids"][:] == [[2], None]
    single = load_labels(["a", "b"])
    with pytest.raises(ValueError, match="load the labels with multilabel=true"):
        judged_relevance(rows, single)
    unknown = with_columns(rows, {"gold": ([[0, 1], None], INTS)})
    with pytest.raises(ValueError, match="gold of the row with id 'r1' is unknown"):
        judged_relevance(unknown, labels)


def test_the_scores_of_the_papers_example() -> None:
    """UniME-V2's first published example: a positive of .7216 keeps all ten of its negatives."""
    said = [0.4408, 0.3208, 0.2018, 0.1, 0.0153]
    truth = {f"label {i + 1}": p for i, p in enumerate(said)} | {"label 0": 0.7216}
    rows = with_columns(rows_of([[0]]), {"negative_ids": ([[1, 2, 3, 4, 5]], INTS)})
    got = judge_negatives(rows, space(6), Judge({"text 0": truth}))
    assert got["negative_ids"][0] == [1, 2, 3, 4, 5]
    assert json.dumps(got["excluded_ids"][0]) == "[]"
