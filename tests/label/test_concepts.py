import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import weak as reference
from scipy.stats import rankdata, spearmanr

from llmlabel.data import with_columns
from llmlabel.engine import Reply
from llmlabel.engine.fake import FakeEngine
from llmlabel.label import fusion
from llmlabel.label.concepts import (
    CONCEPTS,
    PATENT_FIELDS,
    ViewWeights,
    calibrate_concepts,
    extract_concepts,
    label_concepts,
)
from llmlabel.label.fusion import (
    fit_weights,
    fuse,
    label_similarities,
    positive_only_loss,
    reciprocal_ranks,
    weights_loss,
)
from llmlabel.labelspace import load_labels
from llmlabel.models import MINILM
from llmlabel.prompt import Chat, render
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["water", "energy", "health"], multilabel=True)
WORDS = ("water", "pump", "solar", "power", "doctor", "drug")


class Counts:
    """Counts of a few words as the vector of a text."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        raw = np.array([[t.split().count(word) for word in WORDS] for t in texts], dtype=float)
        raw += 1e-3
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)


class Replies(FakeEngine):
    """Gives prepared replies by the text."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        super().__init__()
        self.replies, self.schemas = replies, list[Any]()

    def generate(self, chats: Sequence[Chat], **options: Any) -> list[Reply]:
        self.schemas.append(options["schema"])
        return [self.replies[chat[-1]["content"].removeprefix("Text: ")] for chat in chats]


def rows(*given: tuple[str, dict[str, str], list[int] | None]) -> Dataset:
    lists = [[{"field": f, "text": t} for f, t in parts.items()] for _, parts, _ in given]
    names = [id for id, _, _ in given]
    return with_columns(
        Dataset.from_dict({"id": names, "text": [f"text of {name}" for name in names]}),
        {
            "concepts": (lists, CONCEPTS),
            "gold": ([gold for _, _, gold in given], List(Value("int32"))),
        },
    )


REFERENCES = rows(
    ("p1", {"a": "water pump", "b": "pump"}, [0]),
    ("p2", {"a": "solar power", "b": "power"}, [1]),
    ("p3", {"a": "doctor", "b": "drug drug"}, [2]),
    ("p4", {"a": "solar pump"}, [0, 1]),
    ("unlabelled", {"a": "drug"}, None),
    ("silent", {}, [2]),
)


# ------------------------------------------------------------------------------- texts to concepts


def test_concepts_prompt(golden: Callable[[str], Any]) -> None:
    fields = {"function": "what it does", "solution": "how", "application": "where it is used"}
    chat = render("label/concepts", text="It crashed.", labels=(), fields=fields)
    assert chat == golden("prompts/label/concepts.json")


def test_concepts_are_read_from_replies() -> None:
    def said(**fields: Any) -> Reply:
        return Reply(json.dumps(fields), "stop")

    engine = Replies(
        {
            "good": said(a=" moves water ", b="pump"),
            "part": said(a="", b="x"),
            "none": said(a="", b=" "),
            "words": Reply("It is a pump", "stop"),
            "more": said(a="x", b="y", c="z"),
            "less": said(a="x"),
            "number": said(a="x", b=3),
            "list": Reply("[1]", "stop"),
            "long": Reply('{"a": "x', "length"),
            "cut": Reply('{"a": "x", "b": "y"}', "stop", "text cut"),
        }
    )
    texts = [*engine.replies, " "]
    table = Dataset.from_dict({"id": texts, "text": texts})
    fields = {"a": "what it does", "b": "how"}
    got = extract_concepts(table, engine, fields=fields, characters=12, block_rows=4)
    assert got["concepts"][:2] == [
        [{"field": "a", "text": "moves water"}, {"field": "b", "text": "pump"}],
        [{"field": "b", "text": "x"}],
    ]
    assert got["concepts"][2:9] == [[]] * 7
    assert [part["text"] for part in got["concepts"][9]] == ["x", "y"]
    errors = got["error"][:]
    assert errors[:3] == [None, None, "the model found nothing in any field"]
    assert errors[3].startswith("the reply is no JSON: Expecting value")
    wrong = "the reply is no JSON object with the fields a, b"
    assert errors[4:8] == [wrong, wrong, "the field 'b' of the reply is no text", wrong]
    assert errors[8:] == [
        "the reply is no JSON: a larger max_tokens lets it end",
        "text cut",
        "empty text",
    ]
    assert got["reply"][3] == "It is a pump"
    assert got["reply"][10] is None
    assert engine.schemas[0] == {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 12} for name in "ab"},
        "required": ["a", "b"],
        "additionalProperties": False,
    }


def test_concepts_do_not_depend_on_blocks_and_are_found_again(tmp_path: Path) -> None:
    texts = [f"a pump for {word}" for word in WORDS]
    table = Dataset.from_dict({"id": texts, "text": texts})
    whole = extract_concepts(table, FakeEngine())
    assert [part["field"] for part in whole["concepts"][0]] == list(PATENT_FIELDS)
    kept = extract_concepts(table, FakeEngine(), block_rows=2, output=tmp_path)
    assert kept.to_dict() == whole.to_dict()
    again = extract_concepts(table, Replies({}), block_rows=2, output=tmp_path)
    assert again.to_dict() == whole.to_dict()
    with pytest.raises(ValueError, match="fields is empty"):
        extract_concepts(table, FakeEngine(), fields={})


# ------------------------------------------------------------------------------------- the numbers


def test_reciprocal_rank_fusion_of_a_table_by_hand() -> None:
    similarities = np.array([[[0.9, 0.5, 0.1]], [[0.2, 0.2, 0.7]]])
    ranks = reciprocal_ranks(similarities, k=60.0)
    np.testing.assert_allclose(
        ranks, [[[1 / 61, 1 / 62, 1 / 63]], [[1 / 62.5, 1 / 62.5, 1 / 61]]], rtol=1e-15
    )
    raw = [0.75 / 61 + 0.25 / 62.5, 0.75 / 62 + 0.25 / 62.5, 0.75 / 63 + 0.25 / 61]
    expected = [(value - min(raw)) / (max(raw) - min(raw)) for value in raw]
    np.testing.assert_allclose(fuse(ranks, np.array([0.75, 0.25])), [expected], rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_fusion_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items, references, labels, views = 6, 12, 5, 3
    gold = rng.random((references, labels)) < 0.3
    cosines = rng.integers(0, 5, (views, items, references)) / 4  # sums are exact
    cosines[rng.random(cosines.shape) < 0.1] = -np.inf
    weights = rng.dirichlet(np.ones(views))
    known = rng.random((items, labels)) < 0.4
    known[0, 0] = True
    top = int(rng.integers(1, 4))
    found = np.array([label_similarities(one, gold, top=top) for one in cosines])
    of = [np.flatnonzero(row).tolist() for row in gold]
    expected, scores = [], []
    for item in range(items):
        given = [[None if np.isinf(c) else float(c) for c in view[item]] for view in cosines]
        similar = [
            [reference.label_similarity(view, of, label, top) for label in range(labels)]
            for view in given
        ]
        expected.append(similar)
        ranks = [reference.ranks(view) for view in similar]
        scores.append(reference.fused(ranks, weights.tolist(), 7.0))
    for view, item, label in np.ndindex(found.shape):
        value = expected[item][view][label]
        assert found[view, item, label] == pytest.approx(-np.inf if value is None else value)
    ranks = reciprocal_ranks(found, k=7.0)
    np.testing.assert_allclose(fuse(ranks, weights), scores, atol=1e-9)
    loss, _ = positive_only_loss(np.array(scores), known)
    of_known = [np.flatnonzero(row).tolist() for row in known]
    assert loss == pytest.approx(reference.loss(scores, of_known, fusion.FLOOR), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_only_known_links_have_a_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, known = rng.random((7, 5)), rng.random((7, 5)) < 0.3
    known[0, 0] = True
    loss, gradient = positive_only_loss(scores, known)
    assert (gradient[~known] == 0).all()
    assert (gradient[known] < 0).all()
    other = np.where(known, scores, rng.random((7, 5)))
    assert positive_only_loss(other, known)[0] == loss
    step = 1e-6
    for at in zip(*np.nonzero(known), strict=True):
        moved = scores.copy()
        moved[at] += step
        numeric = (positive_only_loss(moved, known)[0] - loss) / step
        assert gradient[at] == pytest.approx(numeric, rel=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_gradient_of_the_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = reciprocal_ranks(rng.random((4, 30, 6)), k=60.0)
    ranks[:, 0] = 1.0  # an item whose labels all tie
    known = rng.random((30, 6)) < 0.3
    weights = rng.dirichlet(np.ones(4))
    loss, gradient = weights_loss(ranks, known, weights)
    assert loss == positive_only_loss(fuse(ranks, weights), known)[0]
    for view in range(4):
        step = np.zeros(4)
        step[view] = 1e-7
        up, down = (weights_loss(ranks, known, weights + sign * step)[0] for sign in (1, -1))
        assert gradient[view] == pytest.approx((up - down) / 2e-7, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_weights_give_all_labels_the_highest_score(seed: int) -> None:
    """What would please known links best, if it were possible."""
    rng = np.random.default_rng(seed)
    ranks = reciprocal_ranks(rng.random((4, 30, 6)), k=60.0)
    for weights in (*np.eye(4), rng.dirichlet(np.ones(4)), 1000 * rng.random(4)):
        scores = fuse(ranks, weights)
        np.testing.assert_array_equal(scores.min(axis=1), 0.0)
        np.testing.assert_array_equal(scores.max(axis=1), 1.0)


def mean_average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    order = np.argsort(-scores, axis=1, kind="stable")
    right = np.take_along_axis(true, order, axis=1)
    precision = np.cumsum(right, axis=1) / np.arange(1, true.shape[1] + 1)
    return float(((precision * right).sum(axis=1) / right.sum(axis=1)).mean())


@pytest.mark.parametrize("seed", range(3))
def test_calibration_finds_the_views_that_know_something(seed: int) -> None:
    rng = np.random.default_rng(seed)
    quality = np.array([1.5, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    true = rng.random((2000, 17)) < 1.5 / 17
    true[np.arange(2000), rng.integers(0, 17, 2000)] = True
    similar = rng.standard_normal((9, 2000, 17)) + quality[:, None, None] * true
    observed = true & (rng.random(true.shape) < 0.3)
    ranks = reciprocal_ranks(similar, k=60.0)
    weights = fit_weights(ranks, observed)
    assert weights.sum() == pytest.approx(1.0)
    equal = mean_average_precision(fuse(ranks, np.full(9, 1 / 9)), true)
    calibrated = mean_average_precision(fuse(ranks, weights), true)
    best_single = max(mean_average_precision(-rankdata(-one, axis=1), true) for one in similar)
    assert calibrated >= equal + 0.05
    assert calibrated >= best_single + 0.05
    assert (weights[-2:] < 0.05).all()
    assert spearmanr(weights, quality).statistic > 0.95
    smoothed = fit_weights(ranks, observed, l2=10.0)
    assert smoothed.max() < weights.max() / 2


# ------------------------------------------------------------------------------ concepts to labels


def test_items_get_the_labels_of_like_references() -> None:
    items = rows(
        ("water", {"a": "water", "b": "pump"}, None),
        ("energy", {"a": "power", "b": "power"}, None),
        ("only b", {"b": "drug doctor"}, None),
        ("nothing", {}, None),
    )
    got = label_concepts(items, REFERENCES, Counts(), LABELS)
    scores = SoftLabels.from_dataset(got, LABELS).dense()
    assert scores.argmax(axis=1).tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(scores[:3].max(axis=1), 1.0)
    assert scores[3].tolist() == [0, 0, 0]
    assert got["error"][:] == [None, None, None, "no concepts"]
    assert got["label_mass"][:] == [None] * 4
    only_a = ViewWeights(weights={"a / a": 1.0}, top=1)
    of_a = label_concepts(items, REFERENCES, Counts(), LABELS, views=only_a)
    one = SoftLabels.from_dataset(of_a, LABELS).dense()
    assert of_a["error"][2:] == ["no view tells the labels apart", "no concepts"]
    assert one[0, 0] == 1.0
    assert one[2].tolist() == [0, 0, 0]  # no text in this view: all labels tie
    by_block = label_concepts(items, REFERENCES, Counts(), LABELS, block_rows=1)
    assert by_block.to_dict() == got.to_dict()


def test_a_document_is_not_its_own_reference() -> None:
    own = rows(("p1", {"a": "water pump"}, [0]), ("new", {"a": "water pump"}, [0]))
    with_self = SoftLabels.from_dataset(
        label_concepts(own, REFERENCES, Counts(), LABELS, views=ViewWeights({"a / a": 1.0}, top=1)),
        LABELS,
    ).dense()
    # without p1, its nearest reference for label 0 is p4, which also has label 1: they tie
    assert with_self[1].argmax() == 0
    assert with_self[1, 1] < 1.0
    assert with_self[0, 0] == with_self[0, 1] == 1.0
    same_text = own.map(lambda row: {"text": " text of p1\n"}).filter(
        lambda row: row["id"] == "new"
    )
    same = label_concepts(
        same_text, REFERENCES, Counts(), LABELS, views=ViewWeights({"a / a": 1.0}, top=1)
    )
    np.testing.assert_array_equal(SoftLabels.from_dataset(same, LABELS).dense()[0], with_self[0])


def test_blank_texts_are_not_one_document() -> None:
    views, blank = ViewWeights({"a / a": 1.0}, top=1), ["", " ", "\n", "", ""]
    item = rows(("new", {"a": "water pump"}, None))
    kept = REFERENCES.select(range(5))

    def scores(text: str, texts: list[str]) -> np.ndarray:
        given = with_columns(item, {"text": ([text], Value("string"))})
        references = with_columns(kept, {"text": (texts, Value("string"))})
        got = label_concepts(given, references, Counts(), LABELS, views=views)
        assert got["error"][:] == [None]
        return SoftLabels.from_dataset(got, LABELS).dense()[0]

    expected = scores("of its own", [f"text {i}" for i in range(5)])
    assert expected.argmax() == 0
    assert expected[1] < 1.0
    np.testing.assert_array_equal(scores(" ", blank), expected)
    # what differs in case and punctuation is the same document, other punctuation alone is not
    same = scores("TEXT, 0!", [f"text {i}" for i in range(5)])
    assert same[0] == same[1] == 1.0
    np.testing.assert_array_equal(scores("!", ["?", "?!", "...", "-", "+"]), expected)


def test_calibration_on_a_table() -> None:
    rng = np.random.default_rng(0)
    of = (("water", "pump"), ("solar", "power"), ("doctor", "drug"))
    given = [
        (
            f"i{i}",
            {"a": " ".join(rng.choice(WORDS, 3)), "b": " ".join(rng.choice(of[i % 3], 2))},
            [i % 3] if i % 4 else [],
        )
        for i in range(40)
    ]
    items = rows(*given)
    found = calibrate_concepts(items, REFERENCES, Counts(), LABELS, top=1)
    assert set(found.weights) == {"a / a", "a / b", "b / a", "b / b"}
    assert found.weights["b / a"] + found.weights["b / b"] > 0.7  # a is noise
    assert sum(found.weights.values()) == pytest.approx(1.0)
    assert found.positives == 30
    assert found.loss is not None
    assert found.equal_loss is not None
    assert found.loss < found.equal_loss
    right = []
    for views in (ViewWeights(top=1), found):
        labelled = label_concepts(items, REFERENCES, Counts(), LABELS, views=views)
        best = SoftLabels.from_dataset(labelled, LABELS).dense().argmax(axis=1)
        right.append((best == np.arange(40) % 3).mean())
    assert right[1] > right[0]
    assert right[1] >= 0.9
    order = rng.permutation(40)
    moved = calibrate_concepts(items.select(order), REFERENCES, Counts(), LABELS, top=1)
    assert moved.weights == pytest.approx(found.weights, abs=1e-4)


def test_finished_blocks_know_their_references(tmp_path: Path) -> None:
    items = rows(("i", {"a": "water"}, None))
    label_concepts(items, REFERENCES, Counts(), LABELS, output=tmp_path)
    fewer = REFERENCES.select([0, 1, 2])
    with pytest.raises(ValueError, match="begun by another call: references was"):
        label_concepts(items, fewer, Counts(), LABELS, output=tmp_path)


@pytest.mark.model
def test_a_real_encoder_by_its_path() -> None:
    references = rows(
        ("p1", {"function": "clean drinking water", "application": "villages with wells"}, [0]),
        ("p2", {"function": "electricity from sunlight", "application": "homes"}, [1]),
        ("p3", {"function": "treating malaria", "application": "hospitals"}, [2]),
    )
    items = rows(
        ("filter", {"function": "removes germs from tap water"}, None),
        ("panel", {"function": "photovoltaic cell", "application": "rooftops"}, None),
        ("vaccine", {"application": "immunisation of children"}, None),
    )
    got = label_concepts(items, references, MINILM, LABELS, views=ViewWeights(top=1))
    assert SoftLabels.from_dataset(got, LABELS).dense().argmax(axis=1).tolist() == [0, 1, 2]
    assert got["engine"][0].startswith("concepts + encoder:")


def test_what_does_not_fit_is_named() -> None:
    items = rows(("i", {"a": "water"}, []), ("j", {}, [0]))
    with pytest.raises(ValueError, match="no row has both concepts and a known label"):
        calibrate_concepts(items, REFERENCES, Counts(), LABELS)
    with pytest.raises(ValueError, match="no reference has both concepts and gold"):
        label_concepts(items, REFERENCES.select([4, 5]), Counts(), LABELS)
    with pytest.raises(ValueError, match="multilabel=true"):
        label_concepts(items, REFERENCES, Counts(), load_labels(["water", "energy", "health"]))
    with pytest.raises(ValueError, match="the view 'a / c' is none of a / a, a / b"):
        label_concepts(items, REFERENCES, Counts(), LABELS, views=ViewWeights({"a / c": 1.0}))
    with pytest.raises(ValueError, match="the column 'concepts' is missing"):
        label_concepts(items.remove_columns(["concepts"]), REFERENCES, Counts(), LABELS)
    with pytest.raises(ValueError, match=r"k must be above 0; got 0\.0"):
        ViewWeights(k=0.0)
    with pytest.raises(ValueError, match="top must be at least 1"):
        ViewWeights(top=0)
