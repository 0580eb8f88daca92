import numpy as np
import pytest
from datasets import Dataset, Value
from reference import annotators as reference

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine.views import (
    SPANS,
    Span,
    add_softness,
    aggregate_spans,
    fuse_spans,
)
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])


def view(probs: np.ndarray) -> Dataset:
    ids = [f"r{n}" for n in range(len(probs))]
    return SoftLabels.from_dense(probs, LABELS).add_to(Dataset.from_dict({"id": ids}))


@pytest.mark.parametrize("seed", range(20))
def test_softness_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([1.0] * 3, size=(rng.integers(1, 5), 8))
    probs[rng.random(probs.shape) < 0.2] = 0.0  # labels not stored
    probs[0] += 1e-3 * (probs[0].sum(axis=1, keepdims=True) == 0)
    got = add_softness({f"v{n}": view(one) for n, one in enumerate(probs)}, LABELS)
    for row in range(8):
        views = [one for one in probs[:, row].tolist() if sum(one) > 0]
        expected = reference.softness(views)
        for name, value in zip(
            ("view_variance", "view_entropy", "softness"), expected, strict=True
        ):
            assert got[name][row] == pytest.approx(value, abs=1e-6)


def test_golden_softness() -> None:
    labels = load_labels(["a", "b"])
    rows = Dataset.from_dict({"id": ["x"]})
    views = {
        str(n): SoftLabels.from_dense(np.array([p]), labels).add_to(rows)
        for n, p in enumerate([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    }
    got = add_softness(views, labels)
    assert got["view_variance"][0] == pytest.approx(0.164444, abs=1e-6)
    assert got["view_entropy"][0] == pytest.approx(0.688799, abs=1e-6)
    assert got["softness"][0] == pytest.approx(0.113269, abs=1e-6)
    constant = add_softness({"1": views["0"], "2": views["0"]}, labels)
    assert constant["softness"][0] == pytest.approx(0.0, abs=1e-12)


def test_a_row_without_views_has_no_softness() -> None:
    got = add_softness({"x": view(np.array([[0.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))}, LABELS)
    assert got["softness"][0] is None
    assert got["view_entropy"][0] is None
    assert got["softness"][1] == pytest.approx(0.0, abs=1e-7)


# ------------------------------------------------------------------------------------------- spans


def test_golden_spans() -> None:
    [got] = fuse_spans([Span(0.0, 10.0, 0, 0.8, "x"), Span(1.0, 11.0, 0, 0.6, "y")])
    assert got.start == pytest.approx(0.4285714, abs=1e-7)
    assert got.end - got.start == pytest.approx(10, abs=1e-12)
    assert got.spread == pytest.approx(0.0951499, abs=1e-7)
    assert got.confidence == pytest.approx(0.7627082, abs=1e-7)
    assert got.agreement == 2


@pytest.mark.parametrize("seed", range(20))
def test_fusing_equals_marked_characters(seed: int) -> None:
    """Clusters by sets of characters instead of intervals."""
    rng = np.random.default_rng(seed)
    spans = []
    for source in "wxyz":
        for _ in range(rng.integers(0, 6)):
            start, length = int(rng.integers(0, 12)), int(rng.integers(2, 6))
            label, prob = int(rng.integers(0, 2)), float(rng.uniform(0, 1))
            spans.append(Span(float(start), float(start + length), label, prob, source))
    clusters: list[list[Span]] = []
    for one in sorted(spans, key=lambda s: -s.prob):
        mine = set(range(int(one.start), int(one.end)))
        for cluster in clusters:
            other = set(range(int(cluster[0].start), int(cluster[0].end)))
            if cluster[0].label_id == one.label_id and len(mine & other) / len(mine | other) >= 0.4:
                cluster.append(one)
                break
        else:
            if one.prob >= 0.05:
                clusters.append([one])
    expected = []
    for cluster in clusters:
        cluster = [one for one in cluster if one.prob >= 0.05]
        total = sum(one.prob for one in cluster)
        if len({one.source for one in cluster}) >= 2:
            start = sum(one.prob * one.start for one in cluster) / total
            end = sum(one.prob * one.end for one in cluster) / total
            expected.append((start, end, cluster[0].label_id, len({s.source for s in cluster})))
    got = fuse_spans(rng.permutation(np.array(spans, dtype=object)).tolist(), overlap=0.4)
    assert len(got) == len(expected)
    for one, wanted in zip(got, sorted(expected), strict=True):
        assert (one.start, one.end) == pytest.approx(wanted[:2], abs=1e-9)
        assert (one.label_id, one.agreement) == wanted[2:]


def test_labels_and_second_spans_of_one_source() -> None:
    same = [Span(0.0, 10.0, 0, 0.8, "x"), Span(0.0, 10.0, 1, 0.9, "y")]
    assert fuse_spans(same) == []
    twice = [Span(0.0, 10.0, 0, 0.8, "x"), Span(0.0, 10.0, 0, 0.4, "x")]
    assert fuse_spans(twice) == []
    [got] = fuse_spans(twice, min_agreement=1)
    assert (got.start, got.end, got.agreement) == (0.0, pytest.approx(10.0), 1)
    # base 0.7 x 0.8 + 0.3 x 0.6, and one source alone: 1 + 0.05 x (1 - 2)
    assert got.confidence == pytest.approx(0.74 * 0.95, rel=1e-12)
    assert fuse_spans([Span(0.0, 10.0, 0, 0.04, "x"), Span(0.0, 10.0, 0, 0.9, "y")]) == []


def spans_of(*rows: list[tuple[int, int, int, float | None]] | None) -> Dataset:
    keys = ("start", "end", "label_id", "prob")
    lists = [
        None if row is None else [dict(zip(keys, one, strict=True), agreement=None) for one in row]
        for row in rows
    ]
    ids = [f"r{n}" for n in range(len(rows))]
    texts = ["0123456789abcde"] * len(rows)
    return with_columns(Dataset.from_dict({"id": ids, "text": texts}), {"spans": (lists, SPANS)})


def test_spans_of_several_tables() -> None:
    got = aggregate_spans(
        {
            "x": spans_of([(0, 10, 0, 0.8), (12, 14, 1, 0.9)], None, None, []),
            "y": spans_of([(1, 11, 0, 0.6)], [(0, 3, 2, None)], None, []),
            "z": spans_of([(1, 10, 0, 0.9)], [(0, 3, 2, 0.2)], None, None),
        },
        LABELS,
    )
    [one] = got["spans"][0]
    assert (one["start"], one["end"], one["label_id"], one["agreement"]) == (1, 10, 0, 3)
    [two] = got["spans"][1]
    assert (two["start"], two["end"], two["label_id"], two["agreement"]) == (0, 3, 2, 2)
    assert two["prob"] == pytest.approx(0.7 + 0.3 * 0.6, abs=1e-6)
    assert got["spans"][2] is None
    assert got["spans"][3] == []
    assert got["error"][:] == [None, None, "no source has spans", None]
    weak = {"x": spans_of([(0, 3, 0, 0.3)]), "y": spans_of([(0, 3, 0, 0.3)])}
    assert aggregate_spans(weak, LABELS)["spans"][0] == []
    assert len(aggregate_spans(weak, LABELS, min_confidence=0.2)["spans"][0]) == 1


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((3, 3, 0, 0.5), "source 'x', row with id 'r0': the span from 3 to 3 is outside the text"),
        ((3, 16, 0, 0.5), "from 3 to 16 is outside the text of 15 characters"),
        ((0, 2, 3, 0.5), "a span has the label id 3, but the label space has ids 0 to 2"),
        ((0, 2, 0, float("nan")), "a span has the probability nan"),
        ((0, 2, 0, 1.5), "a span has the probability 1.5"),
    ],
)
def test_broken_spans(span: tuple[int, int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate_spans({"x": spans_of([span])}, LABELS)


def test_spans_of_several_sources_do_not_come_from_the_first_alone() -> None:
    said = {"engine": (["m1"], Value("string")), "prompt_sha": (["abc"], Value("string"))}
    first = with_columns(spans_of([(0, 3, 0, 0.9)]), said)
    got = aggregate_spans({"x": first, "y": spans_of([(0, 3, 0, 0.9)])}, LABELS)
    assert got["engine"][:] == ["x + y"]
    assert got["prompt_sha"][:] == [None]


def test_spans_need_the_same_rows() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        aggregate_spans({}, LABELS)
    with pytest.raises(ValueError, match="source 'y' has other rows than 'x'"):
        aggregate_spans({"x": spans_of([]), "y": spans_of([], [])}, LABELS)
