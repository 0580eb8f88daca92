"""The tokens of all labels as one trie: what they share is read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from llmlabel.prompt import reply_surroundings


@dataclass(frozen=True, eq=False)
class LabelTrie:
    """Inner nodes of the trie; node 0 is the root, a parent stands before its children.

    A label's reply is the path to its last inner node and then `last_token`, the end-of-turn token
    in practice. An inner node is read when the model's next-token probabilities there are wanted.
    """

    tokens: Int[np.ndarray, " nodes"]
    """Token that leads to a node; -1 for the root."""
    parents: Int[np.ndarray, " nodes"]
    depths: Int[np.ndarray, " nodes"]
    last_node: Int[np.ndarray, " labels"]
    last_token: Int[np.ndarray, " labels"]

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> "LabelTrie":
        """The trie of token sequences, each with the end token.

        Raises:
            ValueError: two labels have the same tokens, or a label has none.
        """
        children: dict[tuple[int, int], int] = {}
        tokens, parents, depths = [-1], [0], [0]
        ends: dict[tuple[int, int], int] = {}
        for label, sequence in enumerate(sequences):
            if len(sequence) < 2:
                raise ValueError(f"label number {label} has no tokens before the end token")
            node = 0
            for token in sequence[:-1]:
                key = (node, token)
                if key not in children:
                    children[key] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depths[node] + 1)
                node = children[key]
            other = ends.setdefault((node, sequence[-1]), label)
            if other != label:
                raise ValueError(
                    f"labels number {other} and {label} have the same tokens; rename one"
                )
        last = np.array(list(ends), dtype=np.int64).reshape(-1, 2)
        return LabelTrie(
            tokens=np.array(tokens, dtype=np.int64),
            parents=np.array(parents, dtype=np.int64),
            depths=np.array(depths, dtype=np.int64),
            last_node=last[:, 0],
            last_token=last[:, 1],
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self) -> list[list[int]]:
        """Per node the token ids whose probability is needed there, ascending."""
        wanted: list[set[int]] = [set() for _ in self.tokens]
        for node in range(1, len(self)):
            wanted[self.parents[node]].add(int(self.tokens[node]))
        for node, token in zip(self.last_node, self.last_token, strict=True):
            wanted[node].add(int(token))
        return [sorted(tokens) for tokens in wanted]

    def path(self, node: int) -> list[int]:
        """Tokens from the root to a node."""
        tokens: list[int] = []
        while node:
            tokens.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tokens[::-1]

    def ancestors(self) -> Bool[np.ndarray, "nodes nodes"]:
        """Which nodes stand on the path to a node, itself included: a tree-attention mask."""
        above = np.eye(len(self), dtype=bool)
        for node in range(1, len(self)):  # parents come first, so their rows are complete
            above[node] |= above[self.parents[node]]
        return above

    def parts(self, max_nodes: int) -> list[tuple[Int[np.ndarray, " some_labels"], "LabelTrie"]]:
        """The labels in groups whose own tries have at most `max_nodes` nodes where possible.

        Neighbours in token order share a group, so little of what they share is read twice.
        """
        if len(self) <= max_nodes:
            return [(np.arange(len(self.last_node)), self)]
        paths = [
            [*self.path(int(n)), int(t)]
            for n, t in zip(self.last_node, self.last_token, strict=True)
        ]
        order = sorted(range(len(paths)), key=paths.__getitem__)
        groups: list[list[int]] = [[]]
        nodes, previous = 1, list[int]()
        for label in order:
            inner = paths[label][:-1]
            shared = next(
                (i for i, (a, b) in enumerate(zip(inner, previous, strict=False)) if a != b),
                min(len(inner), len(previous)),
            )
            if groups[-1] and nodes + len(inner) - shared > max_nodes:
                groups.append([])
                nodes, shared = 1, 0
            nodes += len(inner) - shared
            groups[-1].append(label)
            previous = inner
        return [(np.array(g), LabelTrie.of([paths[label] for label in g])) for g in groups]

    def joint(
        self, log_probs: Float[np.ndarray, "rows nodes"], ends: Float[np.ndarray, "rows labels"]
    ) -> Float[np.ndarray, "rows labels"]:
        """Joint log-probability of every label.

        Args:
            log_probs: of each node's own token, given the path to its parent; the root's is 0.
            ends: of each label's last token, given the path to its last node.
        """
        path = log_probs.copy()
        for node in range(1, len(self)):
            path[:, node] += path[:, self.parents[node]]
        return path[:, self.last_node] + ends


@lru_cache(maxsize=16)
def label_trie(tokenizer: Any, labels: tuple[str, ...]) -> LabelTrie:
    """The trie of `labels` as replies, tokenized where a reply stands in the chat template.

    A reply ends with the first control token that the template writes after it (the end of a turn,
    which is not always the end-of-text token), or with end-of-text where it writes none. Where a
    tokenizer joins a label with what stands before it, all labels are tokenized by themselves.
    """
    start, lead, after = reply_surroundings(tokenizer)
    before = list(tokenizer(start, add_special_tokens=False).input_ids)
    replies = [lead + label + after for label in labels]
    joined = tokenizer([start + reply for reply in replies], add_special_tokens=False).input_ids
    if all(list(ids[: len(before)]) == before for ids in joined):
        tokens = [list(ids[len(before) :]) for ids in joined]
    else:
        tokens = [list(ids) for ids in tokenizer(replies, add_special_tokens=False).input_ids]
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    sequences = []
    for label, ids in zip(labels, tokens, strict=True):
        ends = [i for i, token in enumerate(ids) if token in control]
        if ends and ends[0] == 0:
            raise ValueError(f"label {label!r} has no tokens for this model; rename it")
        # Without a control token after the reply, what the template writes there is no part of it.
        own = tokenizer(lead + label, add_special_tokens=False).input_ids
        sequences.append(ids[: ends[0] + 1] if ends else [*own, tokenizer.eos_token_id])
    try:
        return LabelTrie.of(sequences)
    except ValueError as error:
        raise ValueError(f"{error} (labels: {list(labels)[:5]} ...)") from None
