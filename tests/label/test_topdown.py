"""What a walk down a hierarchy finds: mass, beams, candidates, many children."""

import random
import time
from typing import Any

import numpy as np
import pytest
from label.trees import (
    BALANCED,
    CHAIN,
    DAG,
    RAGGED,
    SAME,
    STRATEGIES,
    Scripted,
    assert_consistent,
    candidates,
    graph_of,
    noise,
    shares_of,
    space,
    stops,
    table,
)
from reference import hierarchy as reference

from llmlabel.engine.fake import FakeEngine
from llmlabel.label.hierarchy import label_hierarchy
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import answers, node_probs
from llmlabel.softlabels import SoftLabels

# ------------------------------------------------------------------------------------ the numbers


def random_space(seed: int) -> LabelSpace:
    """Up to three roots, uneven depths, chains, and in every other case several parents."""
    rng = random.Random(seed)
    size = rng.randint(4, 25)
    nodes = [f"n{i}" for i in range(rng.randint(1, 3))]
    while len(nodes) < size:
        i = len(nodes)
        above = rng.sample(range(i), min(i, rng.choice([1, 1, 2]) if seed % 2 else 1))
        nodes.append(f"n{i}<" + ",".join(f"n{p}" for p in sorted(above)))
    return space(*nodes)


@pytest.mark.parametrize("seed", range(20))
def test_an_endless_beam_is_the_product_over_all_paths(seed: int) -> None:
    labels = random_space(seed)
    for unread in (None, 0.05):
        engine = Scripted(noise, unread=unread)
        got = label_hierarchy(table(["x", "y"]), engine, labels, strategy="tmh", keep=99)
        for row, text in enumerate(("x", "y")):
            shares = shares_of(labels, text, noise, unread or 0.0)
            want = reference.every_path(graph_of(labels), shares)
            missing = want.pop(-1)
            want = {node: prob for node, prob in want.items() if prob > 1e-12}
            assert stops(got, row) == pytest.approx(want, rel=1e-5)
            assert sum(stops(got, row).values()) == pytest.approx(1 - missing, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_beam_equals_its_twin_and_is_consistent(seed: int) -> None:
    labels = random_space(seed)
    texts = [f"text {i}" for i in range(3)]
    for keep, min_mass in ((1, 0.0), (2, 0.0), (3, 0.2)):
        got = label_hierarchy(
            table(texts), Scripted(noise), labels, strategy="tmh", keep=keep, min_mass=min_mass
        )
        for row, text in enumerate(texts):
            shares = shares_of(labels, text, noise)
            want, reads = reference.beam(graph_of(labels), shares, keep=keep, min_mass=min_mass)
            want = {node: prob for node, prob in want.items() if prob > 1e-12}
            assert stops(got, row) == pytest.approx(want, rel=1e-5)
            assert got["calls"][row] == reads
        assert_consistent(got, labels)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("labels", [BALANCED, RAGGED, CHAIN, DAG, SAME])
def test_every_strategy_gives_a_distribution(strategy: Any, labels: LabelSpace) -> None:
    got = label_hierarchy(
        table(["a cat", "cash", "soup of fish"]), FakeEngine(), labels, strategy=strategy
    )
    assert_consistent(got, labels)
    np.testing.assert_allclose([sum(some) for some in got["label_probs"]], 1.0, rtol=1e-6)
    np.testing.assert_allclose(got["label_mass"][:], 0.9, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["dl", "dh"])
def test_what_the_engine_left_unread_is_missing(strategy: Any) -> None:
    engine = Scripted(lambda text, path, reply: 0.1, unread=0.1)
    got = label_hierarchy(table(["x"]), engine, BALANCED, strategy=strategy)
    assert stops(got) == pytest.approx(dict.fromkeys((2, 3, 4, 5), 0.2), rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_neither_order_nor_blocks_matter(strategy: Any) -> None:
    texts = [f"text {i}" for i in range(40)]
    whole = label_hierarchy(table(texts), Scripted(noise), SAME, strategy=strategy)
    for block_rows, order in ((1, range(40)), (7, range(39, -1, -1)), (64, range(0, 40, 3))):
        rows = table(texts).select(order)
        got = label_hierarchy(rows, Scripted(noise), SAME, strategy=strategy, block_rows=block_rows)
        for name in ("label_ids", "label_probs", "label_mass", "calls", "prompt_tokens"):
            assert got[name][:] == [whole[name][i] for i in order], name


def test_rows_that_ask_about_one_node_share_a_call() -> None:
    engine = Scripted(lambda text, path, reply: 0.4 if reply in (text, "animal") else 0.1)
    rows = table(["cat"] * 50 + ["dog"] * 50)
    label_hierarchy(rows, engine, BALANCED, strategy="tmh", keep=1)
    assert (engine.score_calls, len(engine.asked)) == (2, 200)
    engine = Scripted(noise)
    label_hierarchy(table(["a", "b", "c"]), engine, BALANCED, strategy="tmh")
    assert engine.score_calls == 2  # few rows about two nodes go together too


def test_end_to_end_is_the_product_of_the_conditional_accuracies() -> None:
    labels = random_space(4)
    rng = random.Random(0)
    gold = [rng.choice(labels.leaves) for _ in range(200)]
    lines = [set(labels.ancestors[leaf]) for leaf in gold]

    def weight(text: str, path: str, reply: str) -> float:
        right = labels.names.index(reply) in lines[int(text)]
        return noise(text, path, reply) * (2.0 if right else 1.0)

    rows = table([str(i) for i in range(200)])
    got = label_hierarchy(rows, Scripted(weight), labels, strategy="tmh", keep=1)
    probs = SoftLabels.from_dataset(got, labels).dense()
    mass = node_probs(probs, labels)
    down, arrived, product = dict.fromkeys(range(200), labels.roots), 0, 1.0
    while down:  # a level further for the rows that are right so far
        best = {row: max(some, key=mass[row].__getitem__) for row, some in down.items()}
        right = [row for row in down if best[row] in lines[row]]
        product *= (len(right) + arrived) / (len(down) + arrived)
        down = {row: labels.children[best[row]] for row in right if labels.children[best[row]]}
        arrived += len(right) - len(down)
    found = np.mean(answers(probs, labels) == np.array(gold))
    assert 0.1 < found < 0.9
    assert found == pytest.approx(product, rel=1e-12)


# --------------------------------------------------------------------- candidates, many children


def test_candidates_restrict_the_tree_of_a_row() -> None:
    rows = table(["x", "y", "z"], candidates=candidates([[4, 3], [2, 3], [5]]))
    engine = Scripted(noise)
    got = label_hierarchy(rows, engine, RAGGED, strategy="tmh")
    assert engine.asked == [  # lion and dog are animals; z can only be a lynx
        ("x", "animal", ["cat", "dog"]),
        ("y", "animal", ["cat", "dog"]),
    ]
    assert got["calls"][:] == [1, 1, 0]
    assert set(stops(got, 0)) == {4, 3}
    assert set(stops(got, 1)) == {2, 3}  # below the candidate cat nothing exists for the row
    assert stops(got, 2) == {5: 1.0}
    assert (got["label_mass"][2], got["prompt_tokens"][2], got["error"][2]) == (None, 0, None)
    engine = Scripted(noise)
    label_hierarchy(rows, engine, RAGGED, strategy="dl")
    assert [some for _, _, some in engine.asked] == [["dog", "lion"], ["cat", "dog"], ["lynx"]]
    assert "lynx" not in engine.chats[0][0]["content"]
    engine = Scripted(noise)
    label_hierarchy(rows, engine, RAGGED, strategy="dh")
    assert [some for _, _, some in engine.asked] == [
        ["animal > dog", "animal > cat > lion"],
        ["animal > cat", "animal > dog"],
        ["animal > cat > lynx"],
    ]
    assert "- animal\n  - cat\n    - lion\n  - dog\n" in engine.chats[0][0]["content"]
    assert "money" not in engine.chats[0][0]["content"]


@pytest.mark.parametrize(("strategy", "chats"), [("dl", 3), ("dh", 3), ("tmh", 2)])
def test_all_may_be_listed_where_few_may_be_answered(strategy: Any, chats: int) -> None:
    rows = table(["x", "y", "z"], candidates=candidates([[4, 3], [2, 3], [5]]))
    engine, plain = Scripted(noise), Scripted(noise)
    got = label_hierarchy(rows, engine, RAGGED, strategy=strategy, list_all=True)
    want = label_hierarchy(rows, plain, RAGGED, strategy=strategy)
    assert engine.asked == plain.asked
    assert got["label_probs"][:] == want["label_probs"][:]
    systems = {chat[0]["content"] for chat in engine.chats}
    assert (len(engine.chats), len(systems)) == (chats, 1)
    assert ("lynx" in systems.pop()) == (strategy != "tmh")
    flat = space("a", "b", "c", "d")
    rows = table(["x", "y"], candidates=candidates([[0, 1], [1, 2]]))
    engine = Scripted(noise)
    label_hierarchy(rows, engine, flat, strategy=strategy, list_all=True)
    assert [some for _, _, some in engine.asked] == [["a", "b"], ["b", "c"]]
    assert all("- a\n- b\n- c\n- d\n" in chat[0]["content"] for chat in engine.chats)


class Letters:
    """Counts letters, and notes what it embeds."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.seen += texts
        counts = np.array([[text.count(chr(97 + i)) + 1e-3 for i in range(26)] for text in texts])
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def wide(children: int) -> LabelSpace:
    """One of two roots has very many children, whose names are the numbers in letters."""
    names = ["".join(chr(97 + int(d)) for d in f"{i:05}") for i in range(children)]
    return space("many", "few", "one<few", "two<few", *(f"{name}<many" for name in names))


def test_of_many_children_the_nearest_are_asked_about() -> None:
    labels = wide(300)
    engine, encoder = Scripted(lambda *_: 0.01), Letters()
    got = label_hierarchy(
        table(["aaabb", "aaccc"]), engine, labels, strategy="tmh", encoder=encoder, nearest=3
    )
    assert engine.asked[0] == ("aaabb", "", ["many", "few"])
    assert engine.asked[2][0] == "aaabb"
    assert engine.asked[2][2] == ["aaabb", "aabab", "aabba"]  # the same letters: the first
    assert "- aaabb" in engine.chats[2][0]["content"]
    assert got["calls"][:] == [3, 3]
    assert sum(stops(got).values()) == pytest.approx(1)
    assert not {"one", "two", "many"} & set(encoder.seen)  # only what is needed is embedded
    assert encoder.seen.count("aaabb") == 2  # once as a text, once as a child


def test_twenty_thousand_children_of_one_parent() -> None:
    labels = wide(20_000)
    started = time.perf_counter()
    engine, encoder = Scripted(lambda *_: 0.01), Letters()
    near = label_hierarchy(
        table(["bjjjj"]), engine, labels, strategy="tmh", encoder=encoder, nearest=4
    )
    assert labels.ids.index("bjjjj") in stops(near)
    engine = Scripted(lambda text, path, reply: 1e-3 if reply == text else 1e-8)
    every = label_hierarchy(table(["bjjjj"]), engine, labels, strategy="tmh")
    assert "Labels:" in engine.chats[0][0]["content"]
    assert "Labels:" not in engine.chats[1][0]["content"]  # answered all the same
    assert len(engine.asked[1][2]) == 20_000
    best = labels.ids.index("bjjjj")
    share = 1e-3 / (1e-3 + 19_999e-8)
    assert stops(every)[best] == pytest.approx(share * 0.5, rel=1e-5)
    assert time.perf_counter() - started < 5


def test_a_long_list_is_not_shown() -> None:
    for strategy in STRATEGIES:
        engine = Scripted(noise)
        label_hierarchy(
            table(["x"]), engine, BALANCED, strategy=strategy, keep=1, listed_characters=10
        )
        assert "cat" not in engine.chats[0][0]["content"]
