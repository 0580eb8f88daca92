"""Prediction sets over a hierarchy, and the trees that PAC sets are cut from.

In a label space with parents a set can be said in few words: one label and all below it, or at most m
of these. `fit_subtrees` calibrates such sets, `add_nodes` shortens any other set. `path_trees`,
`json_tree` and `python_tree` make trees of decisions for `llmlabel.calibrate.pac`.
"""

import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Bool
from scipy.sparse import csr_array

from llmlabel.calibrate.cuts import Tree
from llmlabel.calibrate.pac import not_stored
from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.quantile import conformal_quantile, fewest_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.data import gold_index, require_columns, with_columns, with_gold
from llmlabel.labelspace import LabelSpace, graph
from llmlabel.softlabels import SoftLabels

_IDS = List(Value("int32"))

Tokens = Sequence[tuple[int, int, float]]
"""First character, end, and natural-log probability of each token of a text."""


@dataclass(frozen=True)
class Subtrees:
    """A fitted threshold: sets grow until their probability is above this.

    Attributes:
        alpha: Share of new rows whose set may miss the true label.
        subtrees: Nodes that a set is the union of at most.
        threshold: A probability.
        rows: Number of gold rows, those whose gold is none of the labels included.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    subtrees: int
    threshold: float
    rows: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def fit_subtrees(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    subtrees: int = 1,
    training: Dataset | None = None,
) -> Subtrees:
    """Fits sets of at most `subtrees` nodes that hold the true label of 1 - `alpha` of new rows.

    Sets of bounded representation, Mortier et al. (arXiv 2501.19038). Each row has one family of
    sets, from the answer of `llmlabel.labelspace.graph.answers` to the whole space, each within the
    next; the score of a row is the probability of the last set that does not hold its true label,
    and a set is the first whose probability is above the threshold. The guarantee is that of
    `llmlabel.calibrate.conformal.fit_conformal`. A row without a soft label has the whole space.

    Differs from the paper: the family grows step by step (an additional label, or a node gives way
    to its parent, whichever adds the most probability per label), so it is nested without a search
    over all unions; it need not be the smallest set of its probability.

    Args:
        dataset: The gold rows, each with one gold label or none of these; null rows are left out.
        labels: A single-label space; a label may have several parents.
        alpha: Share of misses allowed.
        subtrees: Nodes in a set; the whole space counts as one.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If a setting is out of range, rows or labels stored too few, or rows trained on.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if subtrees < 1:
        raise ValueError(f"subtrees must be at least 1, the nodes in a set; got {subtrees}")
    _check_single(labels)
    require_columns(dataset, "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    refuse_trained(dataset, training)
    gold = gold_index(dataset, labels)
    scores = np.full(len(gold), np.inf)  # of a row whose gold is none of the labels
    for row, family in enumerate(_families(dataset, labels, subtrees)):
        if gold[row] >= 0:
            scores[row] = 0.0
            for _, inside, probability in family:
                if gold[row] in inside:
                    break
                scores[row] = probability
    threshold = conformal_quantile(scores, alpha)
    if len(gold) < (needed := fewest_scores(alpha)):
        raise ValueError(
            f"cannot certify: alpha={alpha} needs n >= {needed} gold rows; there are {len(gold)} "
            "(label more rows, or allow a larger alpha)"
        )
    probs = csr_array(SoftLabels.from_dataset(dataset, labels).probs)
    stored = np.array([label in _row(probs, row) for row, label in enumerate(gold.tolist())])
    whole = probs.sum(axis=1).max() - 1e-6  # from there on every set is the whole space
    lost = conformal_quantile(np.where(stored, 0.0, math.inf), alpha) == math.inf
    if lost and threshold >= max(whole, 1e-6):
        raise ValueError(not_stored(f"alpha={alpha}", stored, gold))
    whose = fitted_on(dataset, labels, probs)
    return Subtrees(alpha, subtrees, threshold, len(gold), labels.fingerprint, *whose)


def predict_subtrees(
    dataset: Dataset, labels: LabelSpace, fitted: Subtrees, *, other_engine: OtherEngine = "refuse"
) -> Dataset:
    """Adds `set_nodes`, and `set_ids`: these nodes and every label below them, most probable first.

    The whole space is written as all its roots. other_engine="allow" takes another model's labels.

    Raises:
        ValueError: If the threshold was fitted in another label space or on another model's labels.
    """
    _check_single(labels)
    check_engines(dataset, fitted.engines, other_engine)
    check_space(labels, fitted.label_space)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    set_nodes, set_ids = [], []
    for row, family in enumerate(_families(dataset, labels, fitted.subtrees)):
        nodes, inside, _ = next(s for s in family if s[2] > fitted.threshold or math.isinf(s[2]))
        own = _row(probs, row)
        set_nodes.append(sorted(nodes))
        set_ids.append(sorted(inside, key=lambda label: (-own.get(label, -1.0), label)))
    return with_columns(dataset, {"set_ids": (set_ids, _IDS), "set_nodes": (set_nodes, _IDS)})


def add_nodes(dataset: Dataset, labels: LabelSpace) -> Dataset:
    """Adds `set_nodes`: the labels of `set_ids` as the fewest nodes that stand for no other leaf.

    A node stands for itself and all below it. It takes the place of its children where each of them
    is in the set, so no true label is lost; an inner label of the set brings in what is below it. A
    row without a set has no nodes.

    Raises:
        ValueError: If a set holds what is no position of a label.
    """
    require_columns(dataset, "set_ids")
    sets = [some or [] for some in dataset["set_ids"][:]]
    if outside := [id for some in sets for id in some if not 0 <= id < len(labels)]:
        raise ValueError(
            f"set_ids holds {outside[0]}, but the labels are 0 to {len(labels) - 1}; predict sets in "
            "this label space"
        )
    place = {label: rank for rank, label in enumerate(labels.topological)}
    found = []
    for ids in sets:
        full = set(ids)
        above = {node for label in ids for node in labels.ancestors[label]}
        for node in sorted(above - full, key=place.__getitem__, reverse=True):
            if all(child in full for child in labels.children[node]):
                full.add(node)
        found.append(sorted(n for n in full if not full & (set(labels.ancestors[n]) - {n})))
    return with_columns(dataset, {"set_nodes": (found, _IDS)})


Step = tuple[list[int], set[int], float]
"""Nodes of a set, all labels in it, and its probability; infinite for the whole space."""


def _families(dataset: Dataset, labels: LabelSpace, subtrees: int) -> Iterator[Iterator[Step]]:
    """The family of sets of each row, from small to large."""
    probs = csr_array(SoftLabels.from_dataset(dataset, labels).probs, dtype=np.float64)

    @cache
    def below(label: int) -> frozenset[int]:
        return frozenset(graph.descendants(labels, label, itself=True))

    for row, answer in enumerate(graph.answers(probs, labels).tolist()):
        yield _family(_row(probs, row), answer, labels, subtrees, below)


def _family(
    own: dict[int, float], answer: int, labels: LabelSpace, subtrees: int, below: Any
) -> Iterator[Step]:
    nodes = [answer] if answer >= 0 else []
    inside: set[int] = set(below(answer)) if nodes else set()
    likely = sorted(own, key=lambda label: (-own[label], label))
    while nodes and len(inside) < len(labels):
        # In the order of the labels, so that equal sets have equal probabilities.
        yield nodes, inside, math.fsum(own[label] for label in own if label in inside)
        wider = {parent for node in nodes for parent in labels.parent_positions[node]}
        if len(nodes) < subtrees:
            wider.update(next(([label] for label in likely if label not in inside), []))
        if not wider:
            break
        new = {node: below(node) - inside for node in wider}
        gain = {node: sum(own.get(label, 0.0) for label in sorted(new[node])) for node in wider}
        # A parent whose labels are all inside costs nothing: the set is the same, with fewer nodes.
        rate = {node: gain[node] / len(new[node]) if new[node] else math.inf for node in wider}
        node = max(sorted(wider), key=rate.__getitem__)
        nodes = [*(other for other in nodes if other not in below(node)), node]
        inside = inside | new[node]
    yield list(labels.roots), set(range(len(labels))), math.inf


# --------------------------------------------------------------------------- trees of decisions


def path_trees(dataset: Dataset, labels: LabelSpace) -> list[Tree]:
    """The path from a root to each row's answer: a hole stops at an ancestor.

    A node costs -ln of its probability given its parent's; its content is the id of the label. A row
    without a soft label has no nodes.
    """
    _check_single(labels)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    masses = csr_array(graph.node_probs(probs, labels))
    trees = []
    for row, answer in enumerate(graph.answers(probs, labels).tolist()):
        mass = _row(masses, row)
        path = [answer] if answer >= 0 else []
        while path and (parents := labels.parent_positions[path[0]]):
            path.insert(0, max(parents, key=mass.__getitem__))
        chances = np.array([mass[label] for label in path])
        costs = -np.log(np.minimum(chances / np.array([1.0, *chances])[: len(path)], 1.0))
        trees.append(Tree(np.arange(len(path)) - 1, costs, tuple(labels.ids[i] for i in path)))
    return trees


def path_contents(labels: LabelSpace, gold: int) -> tuple[str, ...]:
    """Contents that are right where this is the true label: it and everything above it."""
    return tuple(labels.ids[label] for label in labels.ancestors[gold])


def json_tree(text: str, tokens: Tokens = ()) -> Tree:
    """The values of a JSON text: a hole is a field or an item left open.

    An object is decided by its keys, an array by its length, anything else by its value.

    Raises:
        ValueError: If the text is no JSON, or has a key twice in one object.
    """
    try:
        json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"the text is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("the text is nested too deeply to be read as JSON") from None
    nodes: list[tuple[int, str, tuple[int, int]]] = []
    start = _skip(text, 0)
    _json_value(text, start, -1, "", nodes)
    return _tree(text, nodes, tokens)


def python_tree(text: str, tokens: Tokens = ()) -> Tree:
    r"""The syntax tree of a Python program with `\n` line ends: a hole is an expression or statement.

    Khakhar et al. (arXiv 2302.08703), section 4. A node is decided by its type, its names and
    constants, and how many children it has; what has no place in the text (an operator, a list of
    arguments) belongs to the node above.

    Raises:
        ValueError: If the text is no Python program, or has a carriage return as a line end.
    """
    if "\r" in text.replace("\r\n", ""):
        raise ValueError("a carriage return ends a line; write line ends as \\n")
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno} is no Python: {error.msg}") from None
    lines = [line.encode() for line in text.split("\n")]
    starts = np.cumsum([0, *(len(line.decode()) + 1 for line in lines)]).tolist()
    nodes: list[tuple[int, str, tuple[int, int]]] = []

    def at(line: int | None, column: int | None) -> int:
        if line is None or column is None:
            raise ValueError("a node of the program has no place in the text")
        return starts[line - 1] + len(lines[line - 1][:column].decode())

    def visit(node: ast.AST, parent: int, path: str) -> None:
        place = len(nodes)
        own, below = _python_content(node, path)
        span = (0, len(text))
        if isinstance(node, ast.stmt | ast.expr | ast.ExceptHandler | ast.arg | ast.keyword):
            span = (at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset))
        nodes.append((parent, f"{path} {own}", span))
        for child, way in below:
            visit(child, place, way)

    visit(module, -1, "")
    return _tree(text, nodes, tokens)


def with_holes(text: str, tree: Tree, kept: Bool[np.ndarray, " nodes"], *, hole: str = "??") -> str:
    """The text with every subtree that is not kept replaced by `hole`."""
    cuts = {
        tree.spans[node]
        for node in np.flatnonzero(~kept).tolist()
        if tree.parents[node] < 0 or kept[tree.parents[node]]
    }
    for start, end in sorted(cuts, reverse=True):
        text = text[:start] + hole + text[end:]
    return text


def _tree(text: str, nodes: list[tuple[int, str, tuple[int, int]]], tokens: Tokens) -> Tree:
    """Charges each token to the nodes whose own text it touches: their span without the children's."""
    owner = np.full(len(text), -1)
    for node, (_, _, (start, end)) in enumerate(nodes):
        owner[start:end] = node
    costs = np.zeros(len(nodes))
    for start, end, log_prob in tokens:
        touched = np.unique(owner[start:end])
        costs[touched[touched >= 0]] -= log_prob
    parents, contents, spans = zip(*nodes, strict=True)
    return Tree(np.array(parents), costs, contents, spans)


def _json_value(
    text: str, start: int, parent: int, path: str, nodes: list[tuple[int, str, tuple[int, int]]]
) -> int:
    """Appends the value that begins at `start` and all inside it; returns where it ends."""
    value, end = json.JSONDecoder().raw_decode(text, start)
    own = sorted(value) if isinstance(value, dict) else value
    if isinstance(value, list):
        own = f"{len(value)} items"
    place = len(nodes)
    nodes.append((parent, f"{path} {json.dumps(own)}", (start, end)))
    at = start + 1
    for number in range(len(value) if isinstance(value, dict | list) else 0):
        at, step = _skip(text, at), str(number)
        if isinstance(value, dict):
            key, at = json.JSONDecoder().raw_decode(text, at)
            at, step = _skip(text, at), json.dumps(key)
        at = _skip(text, _json_value(text, at, place, f"{path}/{step}", nodes))
    return end


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys are the places of its fields."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} more than once")
    return found


def _skip(text: str, at: int) -> int:
    """The next character that is neither white space nor a separator."""
    found = re.compile(r"[ \t\n\r,:]*").match(text, at)
    return found.end() if found else at


def _python_content(node: ast.AST, path: str) -> tuple[str, list[tuple[ast.AST, str]]]:
    """What a node decides by itself, and the nodes below it that have a text of their own."""
    own, below = [type(node).__name__], []
    for name, value in ast.iter_fields(node):
        many = value if isinstance(value, list) else [value]
        own.append(f"{name}:{len(value)}" if isinstance(value, list) else name)
        for number, child in enumerate(many):
            way = f"{path}/{name}{number}"
            if not isinstance(child, ast.AST):
                own.append(repr(child))
            elif hasattr(child, "lineno"):
                below.append((child, way))
            else:
                more, deeper = _python_content(child, way)
                own.append(f"({more})")
                below += deeper
    return " ".join(own), below


def _row(matrix: csr_array, row: int) -> dict[int, float]:
    part = slice(*matrix.indptr[row : row + 2].tolist())
    return dict(zip(matrix.indices[part].tolist(), matrix.data[part].tolist(), strict=True))


def _check_single(labels: LabelSpace) -> None:
    if labels.multilabel:
        raise ValueError(
            "sets over a hierarchy need a label space of one label a row; this one is multi-label "
            "(load it with multilabel=false and give each row one gold label)"
        )
