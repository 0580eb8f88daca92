import itertools
import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter

from llmlabel.calibrate.cuts import Tree, kept_nodes
from llmlabel.calibrate.pac import fit_pac_tree, predict_tree
from llmlabel.calibrate.trees import (
    Subtrees,
    add_nodes,
    fit_subtrees,
    json_tree,
    path_contents,
    path_trees,
    predict_subtrees,
    python_tree,
    with_holes,
)
from llmlabel.labelspace import LabelSpace, graph
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))


def space(parents: dict[str, tuple[str, ...]], *, multilabel: bool = False) -> LabelSpace:
    names = tuple(parents)
    return LabelSpace(names, names, ("",) * len(names), tuple(parents.values()), multilabel)


TOPICS = space(
    {
        "science": (),
        "physics": ("science",),
        "biology": ("science",),
        "art": (),
        "music": ("art",),
        "film": ("art",),
    }
)
SCIENCE, PHYSICS, BIOLOGY, ART, MUSIC, FILM = range(6)
ROW = [0.0, 0.5, 0.25, 0.0, 0.15625, 0.09375]


def rows(labels: LabelSpace, probs: list[list[float]], gold: list[list[int]]) -> Dataset:
    table = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    return SoftLabels.from_dense(np.array(probs), labels).add_to(table)


def random_space(rng: np.random.Generator, labels: int) -> LabelSpace:
    """A graph in which some labels have two parents."""
    parents = {}
    for k in range(labels):
        count = min(k, int(rng.choice([0, 1, 1, 1, 2])))
        some = rng.choice(k, count, replace=False) if count else []
        parents[f"l{k}"] = tuple(f"l{p}" for p in sorted(some))
    return space(parents)


def random_rows(rng: np.random.Generator, labels: LabelSpace, count: int) -> Dataset:
    probs = rng.dirichlet(np.full(len(labels), 0.2), count)
    gold = [[int(rng.choice(len(labels), p=p))] if rng.random() > 0.05 else [] for p in probs]
    probs[rng.random(count) < 0.05] = 0  # no soft label
    return rows(labels, probs.tolist(), gold)


def family(labels: LabelSpace, row: list[float], answer: int, most: int) -> list[list[int]]:
    """A slow twin: the nodes of each set of a row, without the whole space."""
    below = [set(graph.descendants(labels, k, itself=True)) for k in range(len(labels))]
    nodes, found = [answer], []
    while answer >= 0:
        inside = set().union(*(below[node] for node in nodes))
        if len(inside) == len(labels):
            break
        found.append(nodes)
        moves = {p for node in nodes for p in labels.parent_positions[node]}
        outside = [k for k in range(len(labels)) if k not in inside and row[k] > 0]
        if len(nodes) < most and outside:
            moves.add(max(outside, key=lambda k: row[k]))

        def worth(move, inside=inside):
            new = below[move] - inside
            return sum(row[k] for k in sorted(new)) / len(new) if new else math.inf

        if not moves:
            break
        move = max(sorted(moves), key=worth)
        nodes = [node for node in nodes if node not in below[move]] + [move]
    return found


def sets_at(dataset: Dataset, labels: LabelSpace, threshold: float, most: int) -> list[list[int]]:
    fitted = Subtrees(0.1, most, threshold, 9, labels.fingerprint)
    return predict_subtrees(dataset, labels, fitted)["set_nodes"][:]


def test_sets_of_a_known_row_grow_with_the_threshold() -> None:
    row = rows(TOPICS, [ROW], [[]])
    one = [sets_at(row, TOPICS, t, 1)[0] for t in (0.0, 0.5, 0.75, 2.0)]
    assert one == [[PHYSICS], [SCIENCE], [SCIENCE, ART], [SCIENCE, ART]]
    two = [sets_at(row, TOPICS, t, 2)[0] for t in (0.0, 0.5, 0.75, 0.90625, 1.0)]
    whole = [SCIENCE, ART]
    assert two == [[PHYSICS], [PHYSICS, BIOLOGY], [SCIENCE, MUSIC], whole, whole]


def test_a_set_holds_its_nodes_and_all_below_the_most_probable_first() -> None:
    fitted = Subtrees(0.1, 1, 0.5, 9, TOPICS.fingerprint)
    found = predict_subtrees(rows(TOPICS, [ROW], [[]]), TOPICS, fitted)
    assert found["set_ids"][0] == [PHYSICS, BIOLOGY, SCIENCE]
    assert found.features["set_nodes"] == found.features["set_ids"] == List(Value("int32"))


def test_the_threshold_is_the_order_statistic_of_the_gold_rows() -> None:
    # Scores: 0 where physics is true, 0.5 where biology is, 0.75 where a kind of art is.
    gold = [[PHYSICS]] * 10 + [[BIOLOGY]] * 6 + [[FILM]] * 2 + [[]]
    data = rows(TOPICS, [ROW] * 19, gold)
    for alpha, threshold in ((0.5, 0.0), (0.3, 0.5), (0.1, 0.75)):
        fitted = fit_subtrees(data, TOPICS, alpha=alpha)
        assert (fitted.threshold, fitted.rows, fitted.alpha) == (threshold, 19, alpha)
        adapter = TypeAdapter(Subtrees)
        assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


def test_a_target_that_only_the_whole_space_reaches_is_refused() -> None:
    gold = [[PHYSICS]] * 18 + [[]]
    line = "alpha=0.05 is unreachable: only 18 of 19 gold rows .* recall 1.00, 1 rows with none"
    with pytest.raises(ValueError, match=line):
        fit_subtrees(rows(TOPICS, [ROW] * 19, gold), TOPICS, alpha=0.05)
    sure = [float(label == PHYSICS) for label in range(len(TOPICS))]
    data = rows(TOPICS, [sure] * 20, [[PHYSICS]] * 17 + [[FILM]] * 3)
    with pytest.raises(
        ValueError, match=r"only 17 of 20 gold rows .* recall 0.85, 0 rows with none"
    ):
        fit_subtrees(data, TOPICS, alpha=0.1)
    assert fit_subtrees(data, TOPICS, alpha=0.2).threshold == 0.0  # ceil(21 * 0.8) = 17


def test_an_inner_label_may_be_true() -> None:
    data = rows(TOPICS, [ROW], [[SCIENCE]] * 1)
    data = data.select([0] * 9)
    assert fit_subtrees(data, TOPICS).threshold == 0.5


def test_a_row_without_a_soft_label_has_the_whole_space() -> None:
    data = rows(TOPICS, [[0.0] * 6], [[PHYSICS]]).select([0] * 9)
    fitted = fit_subtrees(data, TOPICS)
    assert fitted.threshold == 0.0
    found = predict_subtrees(data, TOPICS, fitted)[0]
    assert (found["set_nodes"], found["set_ids"]) == ([SCIENCE, ART], [0, 1, 2, 3, 4, 5])


@SEEDS
def test_families_equal_the_twin_and_are_nested(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = random_space(rng, 12)
    data = random_rows(rng, labels, 6)
    probs = SoftLabels.from_dataset(data, labels).dense()
    answers = graph.answers(probs, labels)
    for most in (1, 1 + seed % 3):
        expected = []
        for row, answer in zip(probs.tolist(), answers.tolist(), strict=True):
            sets = [sorted(nodes) for nodes in family(labels, row, answer, most)]
            assert all(len(nodes) <= most for nodes in sets)
            own = [
                {k for node in nodes for k in graph.descendants(labels, node, itself=True)}
                for nodes in sets
            ]
            assert all(a <= b for a, b in itertools.pairwise(own))
            expected.append([(n, sum(row[k] for k in a)) for n, a in zip(sets, own, strict=True)])
        for t in (0.0, 0.5, 0.9):
            found = sets_at(data, labels, t, most)
            roots = list(labels.roots)
            assert found == [next((n for n, m in sets if m > t), roots) for sets in expected]


@SEEDS
def test_gold_is_inside_as_often_as_the_scores_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = random_space(rng, 15)
    data = random_rows(rng, labels, 60)
    fitted = fit_subtrees(data, labels, alpha=0.2, subtrees=2)
    found = predict_subtrees(data, labels, fitted)
    inside = [
        set(g) <= set(ids) and len(g) == 1
        for g, ids in zip(data["gold"], found["set_ids"], strict=True)
    ]
    assert sum(inside) >= math.ceil(61 * 0.8)
    assert len({*found["set_nodes"][0]} - {*found["set_ids"][0]}) == 0
    order = rng.permutation(60)
    assert fit_subtrees(data.select(order), labels, alpha=0.2, subtrees=2) == fitted
    again = predict_subtrees(data.select(order), labels, fitted)
    assert again["set_ids"][:] == [found["set_ids"][i] for i in order]


def test_two_subtrees_are_enough_where_two_labels_are_likely() -> None:
    rng = np.random.default_rng(0)
    labels = space({f"{k}": () if k < 8 else (f"{k % 8}",) for k in range(72)})
    probs = np.full((300, 72), 0.001)
    gold = []
    for row in probs:
        some = rng.choice(np.arange(8, 72), 2, replace=False)
        row[some] += 0.46
        gold.append([int(rng.choice(some))])
    data = rows(labels, probs.tolist(), gold)
    sizes = []
    for most in (1, 2):
        fitted = fit_subtrees(data.select(range(150)), labels, subtrees=most)
        found = predict_subtrees(data.select(range(150, 300)), labels, fitted)
        sizes.append(np.mean([len(ids) for ids in found["set_ids"]]))
    assert sizes[0] > 40
    assert sizes[1] < 3


def test_add_nodes_writes_full_nodes_for_their_children() -> None:
    data = Dataset.from_dict(
        {
            "id": ["a", "b", "c", "d", "e"],
            "set_ids": [
                [PHYSICS, BIOLOGY],
                [MUSIC],
                [],
                [ART, MUSIC],
                [PHYSICS, BIOLOGY, MUSIC, FILM],
            ],
        }
    )
    assert add_nodes(data, TOPICS)["set_nodes"][:] == [
        [SCIENCE],
        [MUSIC],
        [],
        [ART],
        [SCIENCE, ART],
    ]


def test_add_nodes_with_several_parents() -> None:
    labels = space({"a": (), "b": (), "c": ("a", "b"), "d": ("b",)})
    data = Dataset.from_dict({"id": ["x", "y"], "set_ids": [[2], [2, 3]]})
    assert add_nodes(data, labels)["set_nodes"][:] == [[0], [0, 1]]


def test_refusals() -> None:
    data = rows(TOPICS, [ROW] * 8, [[PHYSICS]] * 8)
    with pytest.raises(
        ValueError, match=r"cannot certify: alpha=0.1 needs n >= 9 gold rows; there are 8"
    ):
        fit_subtrees(data, TOPICS)
    with pytest.raises(ValueError, match=r"strictly between 0 and 1; got 0"):
        fit_subtrees(data, TOPICS, alpha=0.0)
    with pytest.raises(ValueError, match=r"subtrees must be at least 1"):
        fit_subtrees(data, TOPICS, subtrees=0)
    with pytest.raises(ValueError, match=r"multi-label"):
        fit_subtrees(data, space({"a": (), "b": ("a",)}, multilabel=True))
    fitted = Subtrees(0.1, 1, 0.5, 9, "another")
    with pytest.raises(ValueError, match=r"was fitted in label space another"):
        predict_subtrees(data, TOPICS, fitted)


# --------------------------------------------------------------------------- trees of decisions


def test_paths_cost_what_each_step_is_unsure_of() -> None:
    tree = path_trees(rows(TOPICS, [ROW, [0.0] * 6], [[], []]), TOPICS)[0]
    assert tree.contents == ("science", "physics")
    assert tree.costs.tolist() == pytest.approx([-math.log(0.75), -math.log(0.5 / 0.75)])
    assert path_contents(TOPICS, BIOLOGY) == ("science", "biology")
    empty = path_trees(rows(TOPICS, [[0.0] * 6], [[]]), TOPICS)[0]
    assert (len(empty.parents), empty.contents) == (0, ())


def test_paths_where_a_label_has_several_parents() -> None:
    labels = space({"a": (), "b": (), "c": ("a", "b"), "d": ("b",)})
    tree = path_trees(rows(labels, [[0.0, 0.0, 0.5, 0.25]], [[]]), labels)[0]
    assert tree.contents == ("b", "c")
    assert tree.costs.tolist() == pytest.approx([-math.log(0.75), -math.log(0.5 / 0.75)])


def test_a_pac_path_stops_at_an_ancestor() -> None:
    data = rows(TOPICS, [ROW] * 60, [[PHYSICS]] * 30 + [[BIOLOGY]] * 30)
    trees = path_trees(data, TOPICS)
    gold = [path_contents(TOPICS, g[0]) for g in data["gold"]]
    fitted = fit_pac_tree(trees, gold, epsilon=0.1, delta=0.05)
    assert predict_tree(trees[0], fitted).tolist() == [True, False]
    assert fitted.errors == 0


def test_json_fields() -> None:
    text = '{"who": "Ada", "when": {"year": 1843, "day": [5, true]}}'
    words = [
        "{",
        '"who": ',
        '"Ada"',
        ', "when": {"year": ',
        "1843",
        ', "day": [',
        "5",
        ", ",
        "true",
        "]}}",
    ]
    ends = np.cumsum([len(word) for word in words]).tolist()
    assert "".join(words) == text
    tokens = [(e - len(w), e, -float(i)) for i, (w, e) in enumerate(zip(words, ends, strict=True))]
    tree = json_tree(text, tokens)
    assert tree.parents.tolist() == [-1, 0, 0, 2, 2, 4, 4]
    assert [text[a:b] for a, b in tree.spans[1:]] == [
        '"Ada"',
        '{"year": 1843, "day": [5, true]}',
        "1843",
        "[5, true]",
        "5",
        "true",
    ]
    # Tokens 3 and 9 touch several nodes and are charged to each.
    assert tree.costs.tolist() == [1 + 3 + 9, 2, 3 + 5 + 9, 4, 5 + 7 + 9, 6, 8]
    assert tree.contents[0] == ' ["when", "who"]'
    assert tree.contents[4:] == (
        '/"when"/"day" "2 items"',
        '/"when"/"day"/0 5',
        '/"when"/"day"/1 true',
    )
    gold = json_tree('{"when": {"year": 1844, "day": [5, true]}, "who": "Ada"}')
    assert set(tree.contents) - set(gold.contents) == {'/"when"/"year" 1843'}
    kept = np.array([True, True, True, False, True, True, True])
    assert with_holes(text, tree, kept) == text.replace("1843", "??")
    assert with_holes(text, tree, np.zeros(7, bool)) == "??"
    assert json_tree(" [ ] ").contents == (' "0 items"',)
    with pytest.raises(ValueError, match=r"Expecting"):
        json_tree("{")


def test_python_programs() -> None:
    text = 'naïve = "é" + f(x,\n    y)\nreturn_ = x\n'
    start = text.index("y)")
    tree = python_tree(
        text, [(0, 5, -1.0), (start, start + 2, -2.0), (len(text) - 1, len(text), -4.0)]
    )
    cuts = [text[a:b] for a, b in tree.spans]
    assert cuts[:4] == [text, 'naïve = "é" + f(x,\n    y)', "naïve", '"é" + f(x,\n    y)']
    assert cuts[4:] == ['"é"', "f(x,\n    y)", "f", "x", "y", "return_ = x", "return_", "x"]
    assert tree.parents.tolist() == [-1, 0, 1, 1, 3, 3, 5, 5, 5, 0, 9, 9]
    costs = dict(zip(cuts, tree.costs.tolist(), strict=True))
    # The token "y)" is of the name and of the call.
    assert (costs["naïve"], costs["y"], costs["f(x,\n    y)"], costs[text]) == (1, 2, 2, 4)

    other = python_tree('naïve = "é" - f(x,\n z)\nreturn_ = x\n')
    wrong = [cut for cut, c in zip(cuts, tree.contents, strict=True) if c not in other.contents]
    assert wrong == ['"é" + f(x,\n    y)', "y"]  # the operator, and the name
    kept = kept_nodes(Tree(tree.parents, tree.costs, tree.contents, tree.spans), budgets=[7.0])[0]
    assert with_holes(text, tree, kept) == text.replace("y)", "??)")
    with pytest.raises(ValueError, match=r"line 1 is no Python: "):
        python_tree("a = = b")


def test_what_a_python_node_decides() -> None:
    plain, other = python_tree("def f(a, b=1): pass"), python_tree("def f(a, c=1): pass")
    assert [i for i, c in enumerate(plain.contents) if c not in other.contents] == [3]
    more = python_tree("def f(a): pass")
    assert plain.contents[1] not in more.contents  # another number of arguments
    assert python_tree("x = [i for i in y if i]").parents.tolist() == [-1, 0, 1, 1, 3, 3, 3, 3]


def test_sets_that_are_null_or_outside_the_labels() -> None:
    table = Dataset.from_dict({"id": ["a", "b"], "set_ids": [None, [PHYSICS, BIOLOGY]]})
    table = table.cast_column("set_ids", List(Value("int32")))
    assert add_nodes(table, TOPICS)["set_nodes"][:] == [[], [SCIENCE]]
    table = Dataset.from_dict({"id": ["a"], "set_ids": [[6]]})
    table = table.cast_column("set_ids", List(Value("int32")))
    with pytest.raises(ValueError, match="set_ids holds 6, but the labels are 0 to 5"):
        add_nodes(table, TOPICS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: json_tree(""), "the text is no JSON: Expecting value"),
        (lambda: json_tree("[" * 100_000), "nested too deeply"),
        (lambda: json_tree('{"a": 1, "a": [1, 2]}'), "an object has the key 'a' more than once"),
        (lambda: python_tree("x = 1\ry = 2"), "a carriage return ends a line"),
        (
            lambda: kept_nodes(Tree(np.array([-1, 0]), np.array([0, np.nan]))),
            "node 1 has the cost NaN",
        ),
        (
            lambda: fit_pac_tree([Tree(np.array([-1, 0]), np.zeros(2))] * 60, [("a",)] * 60),
            "a tree of 2 nodes has 0 contents",
        ),
    ],
)
def test_trees_that_cannot_be_read_are_said_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
