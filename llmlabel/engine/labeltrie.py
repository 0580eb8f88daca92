"""The tokens of all labels as one trie: what they share is read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llmlabel.prompt import Chat, ReplyForm, chat_tokens, reply_form, reply_surroundings


class Edges(NamedTuple):
    """Where the tokens read at a node lead: positions in `children[node]` of its nodes and labels."""

    nodes: list[int]
    node_at: list[int]
    labels: list[int]
    label_at: list[int]


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

    @cached_property
    def children(self) -> list[list[int]]:
        """Per node the token ids whose probability is needed there, ascending."""
        wanted: list[set[int]] = [set() for _ in self.tokens]
        for node, parent in enumerate(self.parents.tolist()):
            if node:
                wanted[parent].add(int(self.tokens[node]))
        for node, token in zip(self.last_node.tolist(), self.last_token.tolist(), strict=True):
            wanted[node].add(token)
        return [sorted(tokens) for tokens in wanted]

    def edges(self, node: int) -> "Edges":
        """What the tokens of `children[node]` lead to."""
        return self._edges[node]

    @cached_property
    def _edges(self) -> list["Edges"]:
        places = [{token: at for at, token in enumerate(tokens)} for tokens in self.children]
        edges = [Edges([], [], [], []) for _ in self.tokens]
        for node, parent in enumerate(self.parents.tolist()):
            if node:
                edges[parent].nodes.append(node)
                edges[parent].node_at.append(places[parent][int(self.tokens[node])])
        for label, node in enumerate(self.last_node.tolist()):
            edges[node].labels.append(label)
            edges[node].label_at.append(places[node][int(self.last_token[label])])
        return edges

    def path(self, node: int) -> list[int]:
        """Tokens from the root to a node."""
        tokens: list[int] = []
        while node:
            tokens.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tokens[::-1]

    def subset(self, labels: Sequence[int]) -> "LabelTrie":
        """The trie of some of the labels, by position."""
        ends = zip(self.last_node[labels].tolist(), self.last_token[labels].tolist(), strict=True)
        return LabelTrie.of([[*self.path(node), token] for node, token in ends])

    def joint(
        self, log_probs: Float[np.ndarray, "rows nodes"], ends: Float[np.ndarray, "rows labels"]
    ) -> Float[np.ndarray, "rows labels"]:
        """Joint log-probability of every label.

        Args:
            log_probs: of each node's own token, given the path to its parent; the root's is 0.
            ends: of each label's last token, given the path to its last node.
        """
        path = log_probs.copy()
        for depth in range(1, int(self.depths.max()) + 1):  # parents are complete before children
            nodes = np.flatnonzero(self.depths == depth)
            path[:, nodes] += path[:, self.parents[nodes]]
        return path[:, self.last_node] + ends


def tokens_and_trie(
    tokenizer: Any, chats: Sequence[Chat], labels: Sequence[str], *, max_tokens: int
) -> tuple[LabelTrie, list[list[int]], list[str | None]]:
    """What an engine reads: the labels' trie, each chat's tokens, and what was done to its text."""
    trie = label_trie(tokenizer, tuple(labels), reply_form(chats))
    room = max_tokens - int(trie.depths.max())
    read = [chat_tokens(tokenizer, chat, max_tokens=room) for chat in chats]
    return trie, [ids for ids, _ in read], [error for _, error in read]


@lru_cache(maxsize=256)  # a hierarchy has a trie for each node's children
def label_trie(tokenizer: Any, labels: tuple[str, ...], form: ReplyForm = ReplyForm()) -> LabelTrie:  # noqa: B008  # immutable
    """The trie of `labels` as replies, tokenized where a reply stands in the chat template.

    A reply ends with what closes its form; without a form with the first control token that the
    template writes after it (the end of a turn, which is not always the end-of-text token), or with
    end-of-text where it writes none. Where a tokenizer joins a label with what stands before it, all
    labels are tokenized by themselves.
    """
    start, lead, after = reply_surroundings(tokenizer, form)
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
        if form.after is not None:
            sequences.append(ids)
            continue
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
