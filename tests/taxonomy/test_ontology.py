import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import ontology as reference

from llmlabel.data import with_columns
from llmlabel.engine import Reply
from llmlabel.engine.fake import FakeEngine
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.models import MINILM, SMOLLM2
from llmlabel.prompt import Chat, render
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.ontology import (
    EXTRACT_COLUMNS,
    add_terms,
    extract,
    extract_schema,
    term_table,
    type_labels,
)
from llmlabel.taxonomy.term_typing import (
    abstain,
    ensemble_typing,
    ensemble_weights,
    type_candidates,
    type_terms,
    vote_types,
)


class Scripted:
    """Gives the replies in turn, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, *replies: str, finish: str = "stop") -> None:
        self.replies, self.finish = list(replies), finish
        self.chats: list[Chat] = []
        self.schema: dict[str, Any] | None = None

    def generate(self, chats: Sequence[Chat], **options: Any) -> list[Reply]:
        self.chats += chats
        self.schema = options["schema"]
        return [Reply(self.replies.pop(0), self.finish) for _ in chats]

    def score(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("not asked")


class Letters:
    """Counts of letters; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.asked += texts
        found = np.array([[text.lower().count(c) + 0.01 for c in "abcdefgh"] for text in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def reply(terms: list[str], types: list[str]) -> str:
    return json.dumps({"terms": terms, "types": types})


def table(*texts: str, ids: Sequence[str] | None = None, **more: Any) -> Dataset:
    names = ids or [f"r{i}" for i in range(len(texts))]
    return Dataset.from_dict({"id": list(names), "text": list(texts), **more})


# --------------------------------------------------------------------------------------- extract


def test_terms_and_types_of_documents() -> None:
    engine = Scripted(
        reply(["Poodle", "poodle", " wild  cat", "wolf"], ["Animal", "animal", "breed"]),
        reply([], []),
    )
    got = extract(table("A poodle met a wild-cat.", " ", "Nothing."), engine)
    assert got["terms"][:] == [["Poodle", "wild cat"], None, []]
    assert got["types"][:] == [["Animal", "breed"], None, []]
    assert got["absent_terms"][:] == [["wolf"], None, []]  # never in the document, so kept apart
    assert got["error"][:] == [None, "empty text", None]
    assert got["reply"][0].startswith('{"terms": ["Poodle"')
    assert engine.schema == extract_schema(20)
    assert len(engine.chats) == 2
    assert set(EXTRACT_COLUMNS) == set(got.column_names) - {"id", "text"}


def test_json_in_a_fence_is_read() -> None:
    said = 'Here:\n```json\n{"terms": ["poodle"], "types": ["animal"]}\n```'
    got = extract(table("a poodle"), Scripted(said)).to_list()[0]
    assert [got["terms"], got["types"], got["error"]] == [["poodle"], ["animal"], None]


@pytest.mark.parametrize(
    ("said", "finish", "why"),
    [
        ("terms: poodle", "stop", "not what was asked for"),
        ('{"terms": ["poodle"]}', "stop", "not what was asked for"),
        ('{"terms": "poodle", "types": []}', "stop", "not what was asked for"),
        ('{"terms": [1], "types": []}', "stop", "not what was asked for"),
        ('["poodle"]', "stop", "not what was asked for"),
        ('{"terms": ["poodle", "po', "length", "cut by max_tokens"),
    ],
)
def test_a_reply_that_cannot_be_read_gives_null_and_an_error(
    said: str, finish: str, why: str
) -> None:
    got = extract(table("a poodle"), Scripted(said, finish=finish)).to_list()[0]
    assert [got["terms"], got["types"], got["absent_terms"]] == [None, None, None]
    assert got["error"] == (f"the reply is no JSON object with lists `terms` and `types` ({why})")
    assert got["reply"] == said


@pytest.mark.parametrize(
    ("term", "document", "stands"),
    [
        ("cat", "the category", False),
        ("cat", "The CAT.", True),
        ("C++", "in C++ and Rust", True),
        ("机器学习", "我喜欢机器学习方法", True),
        ("狗", "我喜欢猫", False),
        ("naïve Bayes", "a Naïve-Bayes model", True),
    ],
)
def test_which_terms_stand_in_a_document(term: str, document: str, stands: bool) -> None:
    got = extract(table(document), Scripted(reply([term], [])))
    assert got["terms"][0] == ([term] if stands else [])
    assert got["absent_terms"][0] == ([] if stands else [term])


POOL = [
    {"text": "aaa aab", "terms": ["aaa"], "types": ["A"]},
    {"text": "aaa abb", "terms": ["abb"], "types": ["A", "B"]},
    {"text": "bbb", "terms": ["bbb"], "types": ["B"]},
    {"text": "hhh", "terms": [], "types": []},
]


def shown(chat: Chat) -> list[str]:
    return [turn["content"] for turn in chat if turn["role"] == "user"]


def test_similar_documents_are_shown_the_nearest_last() -> None:
    engine = Scripted(reply(["aaab"], []))
    got = extract(table("aaab"), engine, pool=POOL, encoder=Letters(), n=2)
    turns = shown(engine.chats[0])
    assert ["aaa abb" in turns[0], "aaa aab" in turns[1], "aaab" in turns[2]] == [True] * 3
    answers = [turn["content"] for turn in engine.chats[0] if turn["role"] == "assistant"]
    assert answers == [reply(["abb"], ["A", "B"]), reply(["aaa"], ["A"])]
    assert [one["text"] for one in got["demonstrations"][0]] == ["aaa abb", "aaa aab"]


def test_a_row_is_never_its_own_demonstration() -> None:
    pool = table(*(one["text"] for one in POOL), ids=["r0", "p1", "p2", "p3"])
    strings = List(Value("string"))
    for name in ("terms", "types"):
        pool = with_columns(pool, {name: ([one[name] for one in POOL], strings)})
    rows = table("aaa aab!", "AAA  abb", "bbb", ids=["r0", "x", "p2"])  # by id, by words, by both
    engine = Scripted(*[reply([], [])] * 3)
    got = extract(rows, engine, pool=pool, encoder=Letters(), n=3)
    for own, row in zip(("aaa aab", "aaa abb", "bbb"), got, strict=True):
        texts = [one["text"] for one in row["demonstrations"]]
        assert own not in texts
        assert len(texts) == 3
    # nor is its answer: what is said of the row in the pool stands in none of its turns
    assert '"terms": ["bbb"]' not in json.dumps(engine.chats[2]).replace("\\", "")


def test_a_pool_of_one_answer_can_be_shown() -> None:
    engine = Scripted(reply([], []))
    extract(table("abc"), engine, pool=POOL[:1], encoder=Letters(), n=1)
    assert reply(["aaa"], ["A"]) in [turn["content"] for turn in engine.chats[0]]
    with pytest.raises(ValueError, match="documents are chosen by similarity; give an encoder="):
        extract(table("abc"), engine, pool=POOL)
    with pytest.raises(ValueError, match="n must be from 1 to 1"):
        extract(table("abc"), engine, pool=POOL[:1], encoder=Letters(), n=2)


def test_finished_documents_are_not_asked_again(tmp_path: Path) -> None:
    rows, said = table("aaa", "bbb"), [reply(["aaa"], []), reply(["bbb"], [])]
    settings: dict[str, Any] = {"pool": POOL, "n": 2, "block_rows": 1, "output": tmp_path}
    first = extract(rows, Scripted(*said), encoder=Letters(), **settings)
    again = extract(rows, Scripted(), encoder=Letters(), **settings)
    assert again.to_dict() == first.to_dict()
    with pytest.raises(ValueError, match="most was 20 and is 5"):
        extract(rows, Scripted(*said), encoder=Letters(), most=5, **settings)


def test_extract_prompt(golden: Any) -> None:
    demonstrations = [{"text": "Poodles bark.", "label": reply(["Poodles"], ["animal"])}]
    chat = render("taxonomy/extract", text="Cats purr.", labels=(), demonstrations=demonstrations)
    assert chat == golden("prompts/taxonomy/extract.json")


@pytest.mark.model
def test_smollm2_replies_can_be_read() -> None:
    from llmlabel.engine.hf import HFEngine

    texts = ["The kestrel is a small falcon.", "Basalt is an igneous rock.", "Python has lists."]
    got = extract(table(*texts), HFEngine(SMOLLM2), most=5, max_tokens=300)
    assert got["error"][:] == [None] * 3
    for row in got:
        words = row["text"].lower()
        assert all(term.lower() in words for term in row["terms"])


# -------------------------------------------------------------------------------------- assembly


def documents(*rows: tuple[list[str] | None, list[str] | None]) -> Dataset:
    strings = List(Value("string"))
    base = table(*["text"] * len(rows))
    columns = {"terms": [row[0] for row in rows], "types": [row[1] for row in rows]}
    return with_columns(base, {name: (values, strings) for name, values in columns.items()})


def test_terms_of_all_documents_are_one_table() -> None:
    rows = documents((["Wolf", "fox"], []), (["wolf"], []), (None, None), (["Fox", "wolf"], []))
    got = term_table(rows).to_list()
    assert got[0] == {"id": "wolf", "text": "wolf", "count": 3, "documents": ["r0", "r1", "r3"]}
    assert got[1]["text"] == "Fox"  # as often as fox, and first in the alphabet
    assert term_table(rows.select([3, 2, 1, 0])).to_list() == got
    with pytest.raises(ValueError, match="no row has anything in 'types'; read `error`"):
        term_table(rows, column="types")


def test_types_become_labels() -> None:
    rows = documents(([], ["Animal", "plant"]), ([], ["animal", "rock"]), ([], ["animal"]))
    got = type_labels(rows)
    assert (got.ids, got.names) == (("animal", "plant", "rock"), ("animal", "plant", "rock"))
    assert type_labels(rows, most=2).ids == ("animal", "plant")
    with pytest.raises(ValueError, match="1 of 3 types are named in min_count=2 documents"):
        type_labels(rows, min_count=2)


def test_terms_are_put_below_their_types() -> None:
    labels = load_labels(["thing", {"id": "dog", "parent": "thing"}, {"id": "cat"}])
    rows = table("Poodle", "Dog", "nothing", "wolf", ids=["poodle", "x", "nothing", "wolf"])
    probs = np.array([[0.1, 0.7, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.6, 0.4, 0.0]])
    got = add_terms(labels, SoftLabels.from_dense(probs, labels).add_to(rows))
    assert got.ids == ("thing", "dog", "cat", "poodle", "wolf")
    assert got.names[3:] == ("Poodle", "wolf")
    assert got.parents == ((), ("thing",), (), ("dog",), ("thing",))
    np.testing.assert_allclose(np.concatenate(got.parent_probs), [1.0, 0.7, 0.6], atol=1e-6)


# ---------------------------------------------------------------------------------- typing: votes


@pytest.fixture
def types() -> LabelSpace:
    return load_labels(["colour", "size", "shape"])


def labelled(
    types: LabelSpace, texts: Sequence[str], gold: list[list[int]], ids: Sequence[str] | None = None
) -> Dataset:
    ids = ids or [f"p{i}" for i in range(len(texts))]
    return with_columns(table(*texts, ids=ids), {"gold": (gold, List(Value("int32")))})


class Fixed:
    """A vector per text."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors = vectors

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        return np.stack([self.vectors[text] for text in texts])


@pytest.mark.parametrize("seed", range(20))
def test_votes_equal_the_loop(seed: int, types: LabelSpace) -> None:
    rng = np.random.default_rng(seed)
    names = [f"term {i}" for i in range(9)]
    vectors = rng.normal(size=(9 + 3, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    encoder = Fixed(dict(zip([*names, *types.names], vectors, strict=True)))
    gold = [sorted(rng.permutation(3)[: rng.integers(1, 3)].tolist()) for _ in range(6)]
    pool = labelled(types, names[:6], gold)
    got = vote_types(table(*names[6:]), pool, types, [encoder], neighbours=4, scale=7.0)
    probs = SoftLabels.from_dataset(got, types).dense()
    cosines = vectors[6:9] @ vectors[:6].T
    for row in range(3):
        expected = reference.votes(cosines[row].tolist(), gold, 3, 4, 7.0)
        np.testing.assert_allclose(probs[row], expected, atol=1e-6)
    order = pool.select([3, 1, 5, 0, 2, 4])
    again = vote_types(table(*names[6:]), order, types, [encoder], neighbours=4, scale=7.0)
    assert again["label_probs"][:] == got["label_probs"][:]


def test_votes_of_several_encoders_are_averaged(types: LabelSpace) -> None:
    pool = labelled(types, ["aaa", "bbb"], [[0], [1]])
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    base = {"aaa": x, "bbb": y, "colour": x, "size": x, "shape": x}
    encoders = [Fixed({**base, "q": x}), Fixed({**base, "q": y})]
    got = vote_types(table("q"), pool, types, encoders, neighbours=1)
    assert SoftLabels.from_dataset(got, types).dense()[0] == pytest.approx([0.5, 0.5, 0])
    with pytest.raises(ValueError, match="encoders is empty"):
        vote_types(table("q"), pool, types, [])


def test_nothing_that_is_encoded_holds_an_answer(types: LabelSpace) -> None:
    encoder = Letters()
    pool = labelled(types, ["abc", "bcd", "cde"], [[0], [1], [2]])
    vote_types(pool, pool, types, [encoder], neighbours=2)
    assert set(encoder.asked) == {"abc", "bcd", "cde", *types.names}
    assert not any(name in text for name in types.names for text in ("abc", "bcd", "cde"))


def test_a_term_does_not_vote_for_itself(types: LabelSpace) -> None:
    pool = labelled(types, ["abc", "Abc!", "bcd", "fgh"], [[0], [0], [1], [2]])
    rows = table("abc", "hhh", ids=["new", "p3"])  # the first by its words, the second by its id
    got = vote_types(rows, pool, types, [Letters()], neighbours=4)
    probs = SoftLabels.from_dataset(got, types).dense()
    assert probs[0, 0] == 0
    assert probs[1, 2] == 0
    alone = vote_types(table("abc", " "), pool.select([0, 1]), types, [Letters()], neighbours=4)
    assert alone["label_ids"][:] == [[], []]
    assert alone["error"][:] == ["no other term of the pool to compare with", "empty text"]
    with pytest.raises(ValueError, match="no term of the pool has a type in `gold`"):
        vote_types(rows, labelled(types, ["a"], [[]]), types, [Letters()])


# ------------------------------------------------------------------------------------ typing: LLM


def test_candidates_are_the_types_of_neighbours_and_the_nearest_names() -> None:
    types = load_labels(["aa", "bb", "cc", "dd"])
    pool = labelled(types, ["bcc", "bccc", "dda"], [[1], [2], [3]])
    got = type_candidates(table("ccc", " "), pool, types, Letters(), neighbours=2, nearest_types=1)
    assert got["candidates"][:] == [[2, 1], None]
    named = type_candidates(table("aaac"), pool, types, Letters(), neighbours=1, nearest_types=2)
    assert named["candidates"][0] == [3, 0, 2]


def test_types_by_a_language_model_are_among_the_candidates() -> None:
    types = load_labels(["aa", "bb", "cc", "dd"])
    pool = labelled(types, ["bcc", "ccb", "dda", "bbc"], [[1], [2], [3], [1]])
    rows = table("ccc cc", "bcc", ids=["x", "p0"])
    settings: dict[str, Any] = {"encoder": Letters(), "neighbours": 2, "nearest_types": 1}
    got = type_terms(rows, FakeEngine(), pool, types, shown=2, **settings)
    for row in got:
        assert set(row["label_ids"]) == set(row["candidates"])
        assert sum(row["label_probs"]) == pytest.approx(1, abs=1e-6)
        assert row["text"] not in [one["text"] for one in row["demonstrations"]]
    assert got["label_ids"][0][0] == 2  # the fake prefers words of the text
    unsure = type_terms(rows, FakeEngine(), pool, types, shown=2, min_confidence=0.999, **settings)
    assert unsure["label_ids"][:] == [[], []]
    assert all("is below min_confidence=0.999" in error for error in unsure["error"])


def test_abstaining_keeps_what_is_sure(types: LabelSpace) -> None:
    probs = np.array([[0.6, 0.4, 0.0], [0.4, 0.35, 0.25], [0.0, 0.0, 0.0]])
    rows = SoftLabels.from_dense(probs, types).add_to(table("a", "b", " "))
    rows = with_columns(rows, {"error": ([None, "text cut", "empty text"], Value("string"))})
    got = abstain(rows, types, min_confidence=0.5)
    assert got["label_ids"][:] == [[0, 1], [], []]
    why = "text cut; abstained: 0.4 is below min_confidence=0.5"
    assert got["error"][:] == [None, why, "empty text"]
    with pytest.raises(ValueError, match="min_confidence is a probability; got 2"):
        abstain(rows, types, min_confidence=2.0)


def test_type_term_prompt(golden: Any) -> None:
    chat = render(
        "taxonomy/type_term",
        text="crimson",
        labels=("colour", "size"),
        demonstrations=[{"text": "tiny", "label": "size"}],
    )
    assert chat == golden("prompts/taxonomy/type_term.json")


# ------------------------------------------------------------------------------- typing: ensemble


def random_cosines(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(0.3, 0.15, size=(3, 7, 5)) * [[[0.3]], [[1.0]], [[2.0]]], -1, 1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_ensemble_weights_equal_the_formulas_of_the_paper(seed: int, temperature: float) -> None:
    cosines = random_cosines(seed)
    got = ensemble_weights(cosines, temperature=temperature)
    expected = reference.ensemble_weights(cosines.tolist(), temperature)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.sum() == pytest.approx(1)


def test_weights_weigh_at_the_default_temperature_and_not_at_that_of_the_paper() -> None:
    """Two encoders whose cosines spread alike: one points at a type, the other only wavers."""
    rng = np.random.default_rng(0)
    pointing = np.zeros((200, 20))
    pointing[np.arange(200), rng.integers(0, 20, 200)] = 0.3
    wavering = rng.normal(0.0, pointing.std(), size=(200, 20))
    cosines = np.stack([pointing, wavering]) + 0.3
    assert ensemble_weights(cosines, temperature=0.02)[0] > 0.75
    assert ensemble_weights(cosines, temperature=1.0)[0] == pytest.approx(0.5, abs=0.08)
    p = np.exp(cosines) / np.exp(cosines).sum(axis=2, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=2) / np.log(20)
    assert (p.max(axis=2) * (1 - entropy)).max() < 1e-3  # the confidences that are compared at 1


@pytest.mark.parametrize("seed", range(20))
def test_ensemble_typing_equals_the_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    types = load_labels(["t0", "t1", "t2", "t3"])
    terms = [f"term {i}" for i in range(5)]
    encoders, similarities = [], []
    for _ in range(3):
        vectors = rng.normal(size=(9, 6))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        encoders.append(Fixed(dict(zip([*terms, *types.names], vectors, strict=True))))
        similarities.append((vectors[:5] @ vectors[5:].T).tolist())
    for weights in ("confidence", "uniform", [3.0, 1.0, 0.0]):
        got = ensemble_typing(table(*terms), encoders, types, temperature=0.1, weights=weights)
        shares = {
            "confidence": reference.ensemble_weights(similarities, 0.1),
            "uniform": [1 / 3] * 3,
        }.get(str(weights), [0.75, 0.25, 0.0])
        scores = np.array(reference.ensemble_scores(similarities, shares)) / 0.1
        expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(SoftLabels.from_dataset(got, types).dense(), expected, atol=1e-6)
        assert got["engine"][0].startswith(f"ensemble:{shares[0]:.3f}*encoder:Fixed@")


def test_the_ensemble_abstains_and_leaves_empty_terms(types: LabelSpace) -> None:
    got = ensemble_typing(
        table("abc", " "), [Letters()], types, temperature=1.0, min_confidence=0.9
    )
    assert got["label_ids"][:] == [[], []]
    assert "abstained" in got["error"][0]
    assert got["error"][1] == "empty text"
    for options, message in (
        ({"weights": [1.0, 2.0]}, "weights must be 1 numbers from 0, one for each encoder"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"encoders": []}, "encoders is empty; give at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            ensemble_typing(table("abc"), options.pop("encoders", [Letters()]), types, **options)


@pytest.mark.model
def test_minilm_types_terms_that_share_no_letters() -> None:
    types = load_labels(["colour", "animal"])
    pool = labelled(types, ["red", "green", "dog", "horse"], [[0], [0], [1], [1]])
    rows = table("violet", "kitten")
    got = vote_types(rows, pool, types, [MINILM], neighbours=2)
    assert [ids[0] for ids in got["label_ids"]] == [0, 1]
    zero_shot = ensemble_typing(rows, [MINILM], types)
    assert [ids[0] for ids in zero_shot["label_ids"]] == [0, 1]
