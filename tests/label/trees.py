"""Small hierarchies, and an engine that says what a script tells it of them."""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from reference import hierarchy as reference

from llmlabel.data import with_columns
from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import node_probs
from llmlabel.prompt import Chat
from llmlabel.softlabels import SoftLabels

STRATEGIES = ("dl", "dh", "tmh")


def space(*nodes: str, multilabel: bool = False) -> LabelSpace:
    """`id=name<parent,parent`, of which all but the id may be left out."""
    found = [re.fullmatch(r"([^=<]+)(?:=([^<]+))?(?:<(.+))?", node) for node in nodes]
    parts = [one.groups() for one in found if one is not None]
    assert len(parts) == len(nodes)
    return LabelSpace(
        tuple(id for id, _, _ in parts),
        tuple(name or id for id, name, _ in parts),
        ("",) * len(parts),
        tuple(tuple(above.split(",")) if above else () for _, _, above in parts),
        multilabel,
    )


BALANCED = space("animal", "money", "cat<animal", "dog<animal", "bank<money", "cash<money")
RAGGED = space("animal", "money", "cat<animal", "dog<animal", "lion<cat", "lynx<cat")
CHAIN = space("all", "animal<all", "cat<animal", "lion<cat", "lynx<cat")
DAG = space("pet", "food", "fish<pet,food", "dog<pet", "cod<fish", "carp<fish", "soup<food")
SAME = space("river", "money", "r=bank<river", "ford<river", "m=bank<money", "cash<money")


def table(texts: Sequence[str], **columns: tuple[list[Any], Any]) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(texts))], "text": list(texts)})
    return with_columns(rows, columns)


def candidates(some: list[list[int] | None]) -> tuple[list[Any], Any]:
    return some, List(Value("int32"))


class Scripted(FakeEngine):
    """Answers from a function of text, path of the node and reply; notes what it is asked."""

    def __init__(
        self,
        weight: Callable[[str, str, str], float],
        *,
        unread: float | None = None,
        errors: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.unread, self.problems = weight, unread, errors or {}
        self.asked: list[tuple[str, str, list[str]]] = []
        self.chats: list[Chat] = []
        self.score_calls = 0

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        self.score_calls += 1
        log_probs = np.full((len(chats), len(labels)), -np.inf)
        texts = []
        for number, chat in enumerate(chats):
            text = asked_text(chat)
            within = re.search(r'label within "(.*)"\.', chat[0]["content"])
            path = within[1] if within else ""
            some = range(len(labels)) if candidates is None else candidates[number]
            for at in some:
                weight = self.weight(text, path, labels[at])
                log_probs[number, at] = math.log(weight) if weight > 0 else -np.inf
            self.asked.append((text, path, [labels[at] for at in some]))
            texts.append(text)
        self.chats += chats
        return Scores(
            log_probs,
            [self.problems.get(text) for text in texts],
            None if self.unread is None else np.full(len(chats), self.unread),
            [len(chat_words(chat)) for chat in chats],
        )


def asked_text(chat: Chat) -> str:
    return chat[-2]["content"].removeprefix("Text: ")


def chat_words(chat: Chat) -> list[str]:
    return [word for turn in chat for word in turn["content"].split()]


def noise(text: str, path: str, reply: str) -> float:
    """Between 0.001 and 0.1, so that a few dozen of them are joint probabilities."""
    return 0.001 + 0.099 * random.Random(f"{text}|{path}|{reply}").random()


def stops(dataset: Dataset, row: int = 0) -> dict[int, float]:
    return dict(zip(dataset["label_ids"][row], dataset["label_probs"][row], strict=True))


def graph_of(labels: LabelSpace) -> dict[int, tuple[int, ...]]:
    return {-1: labels.roots, **dict(enumerate(labels.children))}


def shares_of(
    labels: LabelSpace, text: str, weight: Callable[[str, str, str], float], unread: float = 0.0
) -> reference.Shares:
    """What `Scripted` says of a node's children, worked out once more."""
    children = graph_of(labels)

    def path(node: int) -> str:
        if node < 0:
            return ""
        above = [labels.names[labels.ids.index(id)] for id in labels.parents[node][:1]]
        return " > ".join([*above, labels.names[node]])

    def shares(node: int) -> dict[int, float]:
        if len(children[node]) == 1:
            return {children[node][0]: 1.0}
        own = {child: weight(text, path(node), labels.names[child]) for child in children[node]}
        total = sum(own.values()) + unread
        return {child: value / total for child, value in own.items()}

    return shares


def assert_consistent(got: Dataset, labels: LabelSpace) -> None:
    """A parent has at least the mass of each child, and no row more than 1."""
    probs = SoftLabels.from_dataset(got, labels).dense()
    mass = node_probs(probs, labels)
    for child, parents in enumerate(labels.parent_positions):
        for parent in parents:
            assert (mass[:, parent] >= mass[:, child] - 1e-12).all()
    assert (probs.sum(axis=1) <= 1 + 1e-6).all()
