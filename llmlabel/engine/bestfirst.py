"""Which nodes of a label trie to read, most probable first, until the rest cannot matter.

A node's own probability is an upper bound of all labels below it. So a row is done as soon as the
nodes not yet read have together less than a stated share of the label set's probability; that rest is
returned as a bound, never hidden.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llmlabel.engine.labeltrie import LabelTrie

MOST_IDS = 128  # vLLM refuses more `logprob_token_ids` in one request
_WALK_IDS = 64  # more are much to answer at every position that is written


class BestFirst:
    """The state of reading one trie for many rows; asks for rounds of reads and is told their results.

    Args:
        trie: the tokens of all labels.
        rows: number of rows.
        max_missing: a row is done when its unread nodes have at most this share of the probability
            of the label set, read and unread; 0 reads every node.
        max_reads: nodes read of a row at most, whatever is missing then; None = no limit.
        candidates: per row the positions of the labels that may be answered; None = all.

    Attributes:
        log_probs: Joint log-probability of each label; -inf where it was not read.
    """

    def __init__(
        self,
        trie: LabelTrie,
        rows: int,
        *,
        max_missing: float,
        max_reads: int | None = None,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if max_reads is not None and max_reads < 1:
            raise ValueError(f"max_reads must be at least 1; got {max_reads}")
        if not 0 <= max_missing < 1:
            raise ValueError(f"max_missing must be at least 0 and below 1; got {max_missing}")
        self.trie, self.max_missing = trie, max_missing
        self.log_probs: Float[np.ndarray, "rows labels"] = np.full(
            (rows, len(trie.last_node)), -np.inf
        )
        self._open: list[dict[int, float]] = [{0: 0.0} for _ in range(rows)]
        self._found = np.full(rows, -np.inf)
        # In four rounds or more, so that what is read depends on what was found before.
        self._left = [len(trie) if max_reads is None else max_reads] * rows
        self._limit = self._left[0] if rows else 0
        self._most = len(trie) if max_reads is None else max(16, max_reads // 4)
        self._allowed = (
            None if candidates is None else [_allowed(trie, some) for some in candidates]
        )

    def round(
        self, rows: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Int[np.ndarray, " nodes"]]]:
        """Those of `rows` (all) that are not done, each with the nodes to read now.

        These are all open nodes but the least probable ones that may stay unread together.
        """
        for row in range(len(self._open)) if rows is None else rows:
            nodes, most = self._open[row], max(0, min(self._most, self._left[row]))
            if not nodes or not most:
                continue
            ids = np.fromiter(nodes, dtype=np.int64, count=len(nodes))
            path = np.fromiter(nodes.values(), dtype=np.float64, count=len(nodes))
            peak = max(path.max(), self._found[row])
            if not np.isfinite(peak):
                continue
            mass = np.exp(path - peak)
            order = np.lexsort((ids, mass))  # ties by node, never by the order of arrival
            rest = np.cumsum(mass[order])
            total = rest[-1] + np.exp(self._found[row] - peak)
            wanted = ids[order[rest > self.max_missing * total]]
            if len(wanted):
                yield row, np.sort(wanted[-most:])

    def tell(self, row: int, node: int, log_probs: Float[np.ndarray, " children"]) -> None:
        """The next-token log-probabilities of `trie.children[node]` at a node of a row."""
        nodes = self._open[row]
        path = nodes.pop(node)
        self._left[row] -= 1
        edges = self.trie.edges(node)
        for child, at in zip(edges.nodes, edges.node_at, strict=True):
            if self._allowed is None or child in self._allowed[row][0]:
                nodes[child] = path + float(log_probs[at])
        for label, at in zip(edges.labels, edges.label_at, strict=True):
            if self._allowed is None or label in self._allowed[row][1]:
                joint = path + float(log_probs[at])
                self.log_probs[row, label] = joint
                self._found[row] = np.logaddexp(self._found[row], joint)

    def walk(
        self, row: int, node: int, parts: Sequence[Sequence["Step"]], branches: "Branches"
    ) -> None:
        """What a model answered to `branches.wishes(node)`: the node, then on along what it wrote."""
        found = {token: value for steps in parts for token, value in steps[0].log_probs.items()}
        self._tell(row, node, found)
        for before, step in pairwise(parts[0]):
            child = branches.children(node).get(before.token)
            if child is None:
                break
            node = child
            self._tell(row, node, step.log_probs)

    def _tell(self, row: int, node: int, found: dict[int, float]) -> None:
        values = [found.get(token, -np.inf) for token in self.trie.children[node]]
        self.tell(row, node, np.array(values))

    @property
    def reads(self) -> Int[np.ndarray, " rows"]:
        """Nodes read of each row."""
        return self._limit - np.array(self._left, dtype=np.int64)

    @property
    def unread(self) -> Float[np.ndarray, " rows"]:
        """Probability that all labels not read have at most."""
        return np.array(
            [sum(map(np.exp, nodes.values())) for nodes in self._open], dtype=np.float64
        )


def _allowed(trie: LabelTrie, labels: Sequence[int]) -> tuple[set[int], set[int]]:
    """Nodes on the way to some labels, and the labels."""
    nodes: set[int] = set()
    for label in labels:
        node = int(trie.last_node[label])
        while node and node not in nodes:
            nodes.add(node)
            node = int(trie.parents[node])
    return nodes, set(map(int, labels))


class Wish(NamedTuple):
    """What is wanted after a prompt."""

    ids: tuple[int, ...]
    """Tokens whose log-probabilities are read, at most 128."""
    written: tuple[int, ...] = ()
    """Tokens that the model may write on with."""
    steps: int = 1
    """Tokens to write."""


class Step(NamedTuple):
    """One position of an answer: what the wished tokens had there, and which was written."""

    log_probs: dict[int, float]
    token: int


class Branches:
    """What to wish for at each node of a trie.

    Args:
        trie: the tokens of all labels.
        labels: positions of the labels that may be answered; None = all.
    """

    def __init__(self, trie: LabelTrie, labels: Sequence[int] | None) -> None:
        self.trie = trie
        self._needed = None if labels is None else _tokens_of(trie, labels)
        self._wishes: dict[int, list[Wish]] = {}
        self._children: dict[int, dict[int, int]] = {}

    def wishes(self, node: int) -> list[Wish]:
        """One wish that may read on, or the parts of a large fan-out."""
        if node not in self._wishes:
            self._wishes[node] = [wish] if (wish := self._walk(node)) else self._parts(node)
        return self._wishes[node]

    def children(self, node: int) -> dict[int, int]:
        """Token -> inner node that it leads to."""
        if node not in self._children:
            tokens, edges = self.trie.children[node], self.trie.edges(node)
            self._children[node] = {
                tokens[at]: child
                for child, at in zip(edges.nodes, edges.node_at, strict=True)
                if self._needed is None or child in self._needed
            }
        return self._children[node]

    def _tokens(self, node: int) -> list[int]:
        if self._needed is None:
            return self.trie.children[node]
        return sorted(self._needed.get(node, ()))

    def _parts(self, node: int) -> list[Wish]:
        ids = tuple(self._tokens(node))
        return [Wish(ids[at : at + MOST_IDS]) for at in range(0, len(ids), MOST_IDS)]

    def _walk(self, node: int) -> Wish | None:
        """A wish for all nodes from this one on, where their tokens are few."""
        ids, inner, is_chain = set[int](), set[int](), True
        levels = [[node]]
        while levels[-1]:
            levels.append([])
            for one in levels[-2]:
                children, tokens = self.children(one), self._tokens(one)
                ids.update(tokens)
                inner |= children.keys()
                is_chain = is_chain and len(tokens) == 1
                levels[-1] += children.values()
            if len(ids) > _WALK_IDS:
                return None
        steps = len(levels) - 1
        if steps == 1:
            return None
        # In a chain the end is only read: a model that would rather end must go on.
        return Wish(tuple(sorted(ids)), tuple(sorted(inner if is_chain else ids)), steps)


def _tokens_of(trie: LabelTrie, labels: Sequence[int]) -> dict[int, set[int]]:
    """The tokens to read at each node on the way to some labels."""
    needed: dict[int, set[int]] = {}
    for label in labels:
        node, token = int(trie.last_node[label]), int(trie.last_token[label])
        needed.setdefault(node, set()).add(token)
        while node:
            parent = int(trie.parents[node])
            needed.setdefault(parent, set()).add(int(trie.tokens[node]))
            node = parent
    return needed
