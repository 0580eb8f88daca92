"""Which nodes of a label trie to read, most probable first, until the rest cannot matter.

A node's own probability is an upper bound of all labels below it. So a row is done as soon as the
nodes not yet read have together less than a stated share of the label set's probability; that rest is
returned as a bound, never hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from llmlabel.engine.labeltrie import LabelTrie


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
        # In eight rounds or more, so that what is read depends on what was found before.
        self._left = [len(trie) if max_reads is None else max_reads] * rows
        self._limit = self._left[0] if rows else 0
        self._most = len(trie) if max_reads is None else max(16, max_reads // 8)
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
            nodes, most = self._open[row], min(self._most, self._left[row])
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


def read_in_rounds(
    reading: BestFirst,
    rows: Sequence[list[int]],
    ask: Callable[[list[list[int]], list[list[int]]], list[dict[int, float]]],
    *,
    most_ids: int,
) -> None:
    """Reads all rows to their end, the reads of all rows in flight together in each round.

    Args:
        reading: what is told the results.
        rows: token ids of the rows, up to the start of the reply.
        ask: prompts and, for each, the token ids to read -> their next-token log-probabilities.
        most_ids: token ids in one read; larger fan-outs are split.
    """
    trie = reading.trie
    while wanted := [(row, int(node)) for row, nodes in reading.round() for node in nodes]:
        # Nodes in order of rows: the reads of a row stand together and share its cached prefix.
        prompts, ids = [], []
        for row, node in wanted:
            children = trie.children[node]
            for start in range(0, len(children), most_ids):
                prompts.append(rows[row] + trie.path(node))
                ids.append(children[start : start + most_ids])
        answers = iter(ask(prompts, ids))
        for row, node in wanted:
            children = trie.children[node]
            found: dict[int, float] = {}
            while len(found) < len(children):
                found.update(next(answers))
            reading.tell(row, node, np.array([found[token] for token in children]))
