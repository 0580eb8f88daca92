import re
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reference import debias as reference

from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.prompt import Chat
from llmlabel.refine.debias import batch_calibration, content_free_calibration, match_prior
from llmlabel.refine.orders import (
    OrderSensitivity,
    label_orders,
    order_sensitivity,
    order_votes,
    read_orders,
    with_order_votes,
)
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["red", "green", "blue", "pink"])
TEXTS = ["a red one", "green grass", "so blue", "", "pink and red", "green or blue", "x", "y"] * 4


def texts(count: int = 32) -> Dataset:
    return Dataset.from_dict({"id": [f"r{i}" for i in range(count)], "text": TEXTS[:count]})


class Positional(FakeEngine):
    """Its answer to a text, times a factor for each place of the list in which labels stand."""

    factors = (8.0, 2.0, 1.0, 0.5)

    def __init__(self) -> None:
        super().__init__(noise=2.0)
        self.asked: list[Chat] = []

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        self.asked += chats
        plain = super().score([[chat[-1]] for chat in chats], labels).log_probs
        listed = [re.findall(r"^- (\w+)", chat[0]["content"], re.MULTILINE) for chat in chats]
        if "N/A" in chats[0][-1]["content"]:
            plain = np.zeros_like(plain)
        places = [[np.log(self.factors[names.index(n)]) for n in labels] for names in listed]
        logs = plain + np.array(places)
        return Scores(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))


def voted(orders: Sequence[np.ndarray], name: str = "p") -> Dataset:
    """Rows with the votes of some orders."""
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(orders[0]))]})
    rows = rows.add_column("votes", [[]] * len(rows))
    soft = {f"{name}#{i}": SoftLabels.from_dense(one, LABELS) for i, one in enumerate(orders)}
    return with_order_votes(rows, soft)


def same(found: OrderSensitivity | None, expected: OrderSensitivity) -> bool:
    return found is not None and astuple(found) == pytest.approx(astuple(expected), abs=1e-5)


def test_orders_are_all_different_and_begin_with_the_own_one() -> None:
    three = load_labels(["a", "b", "c"])
    found = label_orders(three, 6)
    assert found[0] == [0, 1, 2]
    assert len({tuple(order) for order in found}) == 6
    assert label_orders(three, 3) == found[:3]  # a number keeps its order
    with pytest.raises(ValueError, match="orders must be from 1 to 6 with 3 labels; got 7"):
        label_orders(three, 7)


@pytest.mark.parametrize("seed", range(20))
def test_sensitivity_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    orders = rng.dirichlet([0.7] * 4, size=(int(rng.integers(2, 5)), 9))
    orders[:, :, 3] *= rng.integers(0, 2, size=orders.shape[:2])  # sometimes something is missing
    found = order_sensitivity(voted(list(orders)), LABELS)
    assert found is not None
    assert (found.rows, found.orders) == (9, len(orders))
    assert found.flips == pytest.approx(reference.flips(orders.tolist()), abs=1e-12)
    assert found.distance == pytest.approx(reference.distance(orders.tolist()), abs=1e-6)


def test_sensitivity_by_hand() -> None:
    one = np.array([[0.7, 0.3, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    two = np.array([[0.5, 0.5, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = order_sensitivity(voted([one, two]), LABELS)
    # a tie goes to the lower id, and who has only one vote does not count
    assert same(found, OrderSensitivity(flips=0.5, distance=0.35, rows=2, orders=2))
    assert order_sensitivity(voted([one]), LABELS) is None
    assert order_sensitivity(texts(), LABELS) is None


def test_prompts_are_compared_within_themselves() -> None:
    one = np.array([[0.7, 0.3, 0.0, 0.0]])
    other = np.array([[0.2, 0.8, 0.0, 0.0]])
    rows = voted([one, one], "p")
    soft = SoftLabels.from_dense(other, LABELS)
    rows = with_order_votes(rows, {"q#0": soft, "q#1": soft})
    assert order_sensitivity(rows, LABELS) == OrderSensitivity(0.0, 0.0, rows=1, orders=2)
    rows = with_order_votes(rows, {"q#1": SoftLabels.from_dense(one, LABELS)})
    found = order_sensitivity(rows, LABELS)
    assert same(found, OrderSensitivity(0.5, 0.25, rows=1, orders=2))


def test_votes_of_the_best_label_alone_have_no_distance() -> None:
    rows = Dataset.from_dict({"id": ["x", "y"]})
    votes = [
        [
            {"source": "p#0", "label_id": 1, "prob": 0.6},
            {"source": "p#1", "label_id": 2, "prob": 0.5},
        ],
        [
            {"source": "p#0", "label_id": 1, "prob": 0.6},
            {"source": "p#1", "label_id": 1, "prob": 0.5},
        ],
    ]
    found = order_sensitivity(rows.add_column("votes", votes), LABELS)
    assert found == OrderSensitivity(flips=0.5, distance=None, rows=2, orders=2)


def test_votes_of_people_are_no_label_orders_and_stay() -> None:
    person = {"source": "Ada", "label_id": 2, "prob": None}
    rows = Dataset.from_dict({"id": ["x", "y", "z"]})
    rows = rows.add_column("votes", [[person], None, []])
    assert order_votes(rows, LABELS) == {}
    soft = SoftLabels.from_dense(np.array([[0.4, 0.6, 0.0, 0.0], [0.0] * 4, [0.0] * 4]), LABELS)
    for _ in range(2):  # the second time they are replaced
        rows = with_order_votes(rows, {"p#0": soft})
        assert rows["votes"][:] == [
            [
                person,
                {"source": "p#0", "label_id": 1, "prob": pytest.approx(0.6)},
                {"source": "p#0", "label_id": 0, "prob": pytest.approx(0.4)},
            ],
            None,
            [],
        ]
    np.testing.assert_array_equal(order_votes(rows, LABELS)["p#0"].dense(), soft.dense())


@pytest.mark.parametrize(
    ("vote", "message"),
    [
        ({"label_id": 4, "prob": 0.5}, r"'p#0': label id 4 is outside .* ids 0 to 3"),
        ({"label_id": None, "prob": 0.5}, r"'p#0': label id -1 is outside"),
        ({"label_id": 1, "prob": None}, r"'p#0': row 0: nan is no probability"),
        ({"label_id": 1, "prob": 1.5}, r"'p#0': row 0: the probabilities sum to 1.5"),
    ],
)
def test_votes_that_are_none(vote: dict[str, Any], message: str) -> None:
    rows = Dataset.from_dict({"id": ["x"], "votes": [[{"source": "p#0", **vote}]]})
    with pytest.raises(ValueError, match=message):
        order_votes(rows, LABELS)


def test_reading_orders_keeps_the_labels_and_votes_on_a_sample() -> None:
    engine = Positional()
    rows = label_direct(texts(), engine, LABELS)
    engine.asked.clear()
    got = read_orders(rows, engine, LABELS, orders=3, rows=10, seed=1)
    assert got["label_probs"][:] == rows["label_probs"][:]
    sample = [votes is not None for votes in got["votes"]]
    assert sum(sample) == 10
    assert not any(has for has, text in zip(sample, TEXTS, strict=True) if not text)
    assert len(engine.asked) == 30
    votes = order_votes(got, LABELS)
    assert list(votes) == ["label/direct#0", "label/direct#1", "label/direct#2"]
    own = SoftLabels.from_dataset(rows, LABELS).dense()
    np.testing.assert_allclose(votes["label/direct#0"].dense()[sample], own[sample], rtol=1e-6)
    listed = re.findall(r"^- (\w+)", engine.asked[-1][0]["content"], re.MULTILINE)
    assert listed == [LABELS.names[label] for label in label_orders(LABELS, 3)[2]]
    # the sample depends on ids and seed alone
    back = read_orders(rows.select(range(31, -1, -1)), engine, LABELS, orders=3, rows=10, seed=1)
    assert back["votes"][:] == got["votes"][:][::-1]
    other = read_orders(rows, engine, LABELS, orders=3, rows=10, seed=2)
    assert [votes is not None for votes in other["votes"]] != sample


def test_reading_orders_refuses(tmp_path: Any) -> None:
    engine = Positional()
    rows = label_direct(texts(), engine, LABELS)
    done = read_orders(rows, engine, LABELS, orders=2, rows=5)
    with pytest.raises(ValueError, match=r"column votes already.*remove_columns"):
        read_orders(done, engine, LABELS)
    with pytest.raises(ValueError, match=r"label/applies.*labelled with"):
        read_orders(rows, engine, LABELS, prompt="label/applies")
    with pytest.raises(ValueError, match="single-label"):
        read_orders(rows, engine, load_labels(["a", "b"], multilabel=True))
    nothing = rows.filter(lambda text: not text, input_columns="text")
    assert set(read_orders(nothing, engine, LABELS)["votes"]) == {None}
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% block user %}{% for l in labels %}- {{ l }}\n{% endfor %}{{ text }}{% endblock %}"
    )
    mine = label_direct(texts(), engine, LABELS, prompt=path)
    assert list(order_votes(read_orders(mine, engine, LABELS, prompt=path, orders=2), LABELS)) == [
        *("mine.jinja#0", "mine.jinja#1")
    ]


def test_a_preference_for_places_is_corrected_in_each_order() -> None:
    engine = Positional()
    rows = read_orders(label_direct(texts(), engine, LABELS), engine, LABELS, rows=30)
    before = order_sensitivity(rows, LABELS)
    assert before is not None
    assert before.flips > 0.5
    assert before.distance is not None
    assert before.distance > 0.3
    for corrected in (
        content_free_calibration(rows, engine, LABELS, texts=["N/A"]),
        batch_calibration(rows, LABELS),
        match_prior(rows, LABELS),
    ):
        after = order_sensitivity(corrected, LABELS)
        assert same(after, OrderSensitivity(0.0, 0.0, rows=28, orders=4))


def test_rows_labelled_in_several_orders_are_corrected_by_answers_in_these_orders() -> None:
    engine = Positional()
    rows = label_direct(texts(), engine, LABELS, orders=3)
    before = order_sensitivity(rows, LABELS)
    assert before is not None
    assert before.flips > 0.5
    got = content_free_calibration(rows, engine, LABELS, texts=["N/A"], orders=3)
    after = order_sensitivity(got, LABELS)
    assert same(after, OrderSensitivity(0.0, 0.0, rows=28, orders=3))
    factors = np.array(Positional.factors) / sum(Positional.factors)
    place = np.argsort(label_orders(LABELS, 3), axis=1)
    raw = SoftLabels.from_dataset(rows, LABELS).dense()
    expected = raw / factors[place].mean(axis=0)
    expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1e-9)
    np.testing.assert_allclose(SoftLabels.from_dataset(got, LABELS).dense(), expected, atol=1e-6)
    for orders in (1, 2, 4):
        with pytest.raises(ValueError, match="the orders that made the labels"):
            content_free_calibration(rows, engine, LABELS, orders=orders)


def test_few_votes_are_refused_by_name() -> None:
    engine = Positional()
    rows = read_orders(label_direct(texts(), engine, LABELS), engine, LABELS, rows=9)
    with pytest.raises(ValueError, match=r"only 9 rows have votes of 'label/direct#0'"):
        batch_calibration(rows, LABELS)


def test_votes_in_a_multilabel_space_are_no_orders() -> None:
    labels: LabelSpace = load_labels(["a", "b"], multilabel=True)
    assert order_votes(voted([np.eye(4)[:2]]), labels) == {}
