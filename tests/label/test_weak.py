import gzip
import json
import ssl
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import weak as reference

from llmlabel.data import with_columns
from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.weak import LabelingFunction, label_weak, measure_functions
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat, render
from llmlabel.recipe import RecipeError, check, load_recipe, run, to_python
from llmlabel.refine.aggregate import aggregate
from llmlabel.refine.annotators import measure_annotators
from llmlabel.softlabels import VOTES, SoftLabels

WRENCH = Path(__file__).parents[3] / "shared" / "data" / "wrench_small"
LABELS = load_labels(["cat", {"id": "money", "name": "Money matters"}, "mat"])
TEXTS = ["The cat sat.", "Money, money!", "a Cat on a mat", "nothing", "cats pay"]


def table(texts: Sequence[str] = TEXTS) -> Dataset:
    return Dataset.from_dict({"id": [f"r{i}" for i in range(len(texts))], "text": list(texts)})


def said(dataset: Dataset) -> list[dict[str, tuple[int, float]]]:
    return [
        {vote["source"]: (vote["label_id"], round(vote["prob"], 4)) for vote in votes}
        for votes in dataset["votes"][:]
    ]


class Embeds:
    """Counts of c, m and n as the vector of a text."""

    def __init__(self) -> None:
        self.asked = list[list[str]]()

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.asked.append(list(texts))
        raw = np.array([[t.lower().count(c) for c in "cmn"] for t in texts], dtype=float) + 1e-9
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)


class Says(FakeEngine):
    """Answers each text with the given probabilities of yes and no; else with neither."""

    def __init__(self, answers: dict[str, tuple[float, float]]) -> None:
        super().__init__()
        self.answers, self.asked = answers, list[Chat]()

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        assert list(labels) == ["yes", "no"]
        self.asked += chats
        texts = [chat[-1]["content"].split("\n")[0].removeprefix("Text: ") for chat in chats]
        with np.errstate(divide="ignore"):
            log_probs = np.log(np.array([self.answers.get(t, (0.0, 0.0)) for t in texts]))
        return Scores(log_probs, ["text cut" if "mat" in text else None for text in texts])


class HasWord:
    """A labeling function with a state."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, text: str) -> bool:
        return self.word in text.lower()


ASKED: list[str] = []


class Counts(HasWord):
    def __call__(self, text: str) -> bool:
        ASKED.append(text)
        return super().__call__(text)


def by_label(text: str) -> str | None:
    """Votes for the label that the text names first."""
    return next((name for name in ("cat", "money") if name in text.lower()), None)


# --------------------------------------------------------------------------------- what they say


def test_question_prompt(golden: Callable[[str], Any]) -> None:
    chat = render("label/question", text="It crashed.", labels=(), question="Is it about a bug?")
    assert chat == golden("prompts/label/question.json")


def test_each_kind_of_function() -> None:
    engine = Says({"The cat sat.": (0.3, 0.1), "a Cat on a mat": (0.1, 0.3), "nothing": (0.2, 0.2)})
    functions: list[LabelingFunction] = [
        {"name": "end", "label": "cat", "regex": r"sat\.$"},
        {"name": "words", "label": "Money matters", "keywords": ["pay", "MONEY", "a  cat"]},
        {"name": "near", "label": "mat", "similar_to": ["m", "nnn"], "threshold": 0.6},
        {"name": "asked", "label": "cat", "question": "Is a cat there?"},
        {"name": "names", "function": by_label},
        {"name": "object", "label": "mat", "function": HasWord("mat")},
        {
            "name": "soft",
            "function": lambda text: {"cat": 0.25, "mat": 0.5} if "on" in text else {},
        },
    ]
    got = label_weak(table(), functions, LABELS, engine=engine, encoder=Embeds())
    assert said(got)[0] == {"end": (0, 1.0), "asked": (0, 0.75), "names": (0, 1.0)}
    assert said(got)[1] == {
        "words": (1, 1.0),
        "near": (2, 1.0),
        "names": (1, 1.0),
        "soft": (2, 0.5),
    }
    assert said(got)[2] == {
        **{"words": (1, 1.0), "names": (0, 1.0)},
        **{"object": (2, 1.0), "soft": (2, 0.5)},
    }
    assert said(got)[3] == {"near": (2, 1.0), "asked": (0, 0.5)}
    assert said(got)[4] == {"words": (1, 1.0), "names": (0, 1.0)}
    assert [v for v in got[2]["votes"] if v["source"] == "soft"] == [
        {"source": "soft", "label_id": 0, "prob": 0.25},
        {"source": "soft", "label_id": 2, "prob": 0.5},
    ]
    neither = "asked: the model answered neither yes nor no"
    assert got["error"][:] == [None, neither, "asked: text cut", None, neither]
    assert got.features["votes"] == VOTES
    assert "Is a cat there?" in engine.asked[0][0]["content"]


def test_keywords_are_whole_words() -> None:
    texts = ["a.b!", "xa.b", "A.B", "c++ is", "c+", "los\n angeles", "x straße", "STRASSE"]
    functions: list[LabelingFunction] = [
        {"name": "k", "label": "cat", "keywords": ["a.b", "c++", "Los Angeles", "Straße"]}
    ]
    got = label_weak(table(texts), functions, LABELS)
    assert [bool(votes) for votes in said(got)] == [1, 0, 1, 1, 0, 1, 1, 0]


def test_a_function_that_raises_keeps_the_others_going() -> None:
    def breaks(text: str) -> str | None:
        if "cat" in text.lower():
            raise KeyError("meow")
        return "mat" if "n" in text else None

    functions: list[LabelingFunction] = [
        {"name": "breaks", "function": breaks},
        {"name": "other", "function": lambda text: "dog" if text == "nothing" else "cat"},
        {"name": "odd", "function": lambda text: 3 if text == "nothing" else "mat"},
        {
            "name": "sums",
            "function": lambda text: {"cat": 0.9, "mat": 0.2} if "!" in text else True,
        },
    ]
    got = label_weak(table(), functions[:3], LABELS)
    assert got["error"][0] == "breaks: KeyError: 'meow'"
    assert got["error"][1] is None
    assert got["error"][3].startswith("odd: TypeError: it returned the int 3, not None")
    assert "other: ValueError: unknown label 'dog'" in got["error"][3]
    assert [sorted(votes) for votes in said(got)] == [
        ["odd", "other"],
        ["breaks", "odd", "other"],
        ["odd", "other"],
        ["breaks"],
        ["odd", "other"],
    ]
    functions += [{"name": "nan", "function": lambda text: {"cat": float("nan")}}]
    with pytest.warns(UserWarning, match="'nan', 'sums' of 2 functions never vote on these 5 rows"):
        got = label_weak(table(), functions[3:], LABELS)
    assert got["error"][4].startswith("nan: ValueError: it returned {'cat': nan}")
    assert "it says yes, but has no label" in got["error"][0]
    assert "which are no probabilities" in got["error"][1]
    assert said(got) == [{}] * 5


def test_a_regex_without_end_is_stopped() -> None:
    texts = ["a" * 20_000 + "!", "aaa", "b"]
    functions: list[LabelingFunction] = [
        {"name": "bomb", "label": "cat", "regex": "(a+)+$"},
        {"name": "b", "label": "mat", "regex": "b"},
    ]
    got = label_weak(table(texts), functions, LABELS, regex_seconds=0.2)
    assert got["error"][:] == ["bomb: the regular expression took longer than 0.2 s", None, None]
    assert said(got) == [{}, {"bomb": (0, 1.0)}, {"b": (2, 1.0)}]


def test_a_function_that_never_votes_is_told() -> None:
    functions: list[LabelingFunction] = [
        {"name": "cats", "label": "cat", "keywords": ["cat"]},
        *({"name": f"no{i}", "label": "cat", "regex": f"dog{i}"} for i in range(4)),
    ]
    with pytest.warns(UserWarning, match=r"'no0', 'no1', 'no2' and 1 more of 5 functions never"):
        got = label_weak(table(), functions, LABELS)
    measured = measure_functions(got, LABELS, functions=functions)
    assert measured["functions"]["no3"]["coverage"] == 0.0
    assert measured["functions"]["no3"]["accuracy"] is None
    assert "no3" not in measure_functions(got, LABELS)["functions"]


def test_blank_texts_have_no_votes() -> None:
    functions: list[LabelingFunction] = [
        {"name": "any", "label": "cat", "regex": ""},
    ]
    with pytest.raises(ValueError, match="'any': regex is a text; got ''"):
        label_weak(table(), functions, LABELS)
    functions = [{"name": "any", "label": "cat", "regex": "^"}]
    got = label_weak(table([" \n", "x"]), functions, LABELS)
    assert said(got) == [{}, {"any": (0, 1.0)}]
    assert got["error"][:] == ["empty text", None]
    with pytest.warns(UserWarning, match="'any' of 1 functions never vote"):
        assert said(label_weak(table([" "]), functions, LABELS)) == [{}]


# ------------------------------------------------------------------------------- blocks and resume


def test_blocks_rows_and_functions_in_another_order_give_the_same() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["cat", "money", "mat", "n", "m"], 4)) for _ in range(60)]
    functions: list[LabelingFunction] = [
        {"name": "r", "label": "cat", "regex": r"cat \w+ mat"},
        {"name": "k", "label": "money", "keywords": ["money"]},
        {"name": "s", "label": "mat", "similar_to": ["mat m", "n n"], "threshold": 0.8},
        {"name": "q", "label": "cat", "question": "Is a cat there?"},
        {"name": "f", "function": by_label},
    ]
    whole, engine = table(texts), FakeEngine()
    expected = label_weak(whole, functions, LABELS, engine=engine, encoder=Embeds())
    small = label_weak(
        whole, functions[::-1], LABELS, engine=engine, encoder=Embeds(), block_rows=7
    )
    assert small.to_dict() == expected.to_dict()
    order = rng.permutation(60)
    moved = label_weak(whole.select(order), functions, LABELS, engine=engine, encoder=Embeds())
    assert moved.to_dict() == expected.select(order).to_dict()
    assert len({len(votes) for votes in said(expected)}) > 2


def test_finished_blocks_are_found_again(tmp_path: Path) -> None:
    ASKED.clear()

    def functions(word: str) -> list[LabelingFunction]:
        return [{"name": "f", "label": "cat", "function": Counts(word)}]

    first = label_weak(table(), functions("a"), LABELS, block_rows=2, output=tmp_path)
    assert len(ASKED) == 5
    again = label_weak(table(), functions("a"), LABELS, block_rows=2, output=tmp_path)
    assert len(ASKED) == 5
    assert again.to_dict() == first.to_dict()
    with pytest.raises(ValueError, match=r"begun by another call: functions\.f\.function"):
        label_weak(table(), functions("at"), LABELS, block_rows=2, output=tmp_path)


def test_an_encoder_reads_each_text_once() -> None:
    encoder = Embeds()
    functions: list[LabelingFunction] = [
        {"name": f"s{i}", "label": "cat", "similar_to": ["c", "m"], "threshold": 0.1 * i}
        for i in range(4)
    ]
    label_weak(table(), functions, LABELS, encoder=encoder)
    assert sum(texts == TEXTS for texts in encoder.asked) == 1


# ---------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("seed", range(20))
def test_measures_equal_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    votes = [
        {f"f{f}": int(rng.integers(3)) for f in range(5) if rng.random() < 0.1 + 0.15 * f}
        for _ in range(40)
    ]
    gold = [None if rng.random() < 0.3 else int(rng.integers(3)) for _ in votes]
    lists = [
        [{"source": s, "label_id": label, "prob": None} for s, label in row.items()]
        for row in votes
    ]
    rows = with_columns(
        table([str(i) for i in range(40)]),
        {
            "votes": (lists, VOTES),
            "gold": ([None if g is None else [g] for g in gold], List(Value("int32"))),
        },
    )
    got = measure_functions(rows, LABELS)
    expected = reference.measure(votes, gold)
    assert set(got["functions"]) == set(expected)
    for name, values in expected.items():
        for key, value in values.items():
            assert got["functions"][name][key] == pytest.approx(value, abs=1e-12), (name, key)
        labels = {row[name] for row in votes if name in row}
        assert got["functions"][name]["labels"] == [LABELS.ids[label] for label in sorted(labels)]
    assert got["coverage"] == sum(map(bool, votes)) / 40
    assert got["overlap"] == sum(len(row) > 1 for row in votes) / 40
    assert got["conflict"] == sum(len(set(row.values())) > 1 for row in votes) / 40
    assert got["gold_rows"] == sum(g is not None for g in gold)


def test_measures_of_a_multi_label_space() -> None:
    labels = load_labels(["cat", "money", "mat"], multilabel=True)
    lists = [
        [("a", 0, 1.0), ("a", 2, 0.4), ("b", 1, 0.9)],
        [("a", 0, 1.0), ("a", 1, 0.6)],
        [("b", 1, 0.3)],
    ]
    votes = [[{"source": s, "label_id": x, "prob": p} for s, x, p in row] for row in lists]
    rows = with_columns(
        table(TEXTS[:3]),
        {"votes": (votes, VOTES), "gold": ([[0, 1], [0], [1]], List(Value("int32")))},
    )
    got = measure_functions(rows, labels)
    assert got["conflict"] is None
    assert got["functions"]["a"] == {
        **{"labels": ["cat", "money"], "coverage": pytest.approx(2 / 3), "conflict": None},
        **{"overlap": pytest.approx(1 / 3), "gold_votes": 3, "accuracy": pytest.approx(2 / 3)},
    }
    assert got["functions"]["b"]["coverage"] == pytest.approx(1 / 3)


def test_votes_fit_the_label_models() -> None:
    functions: list[LabelingFunction] = [
        {"name": "cats", "label": "cat", "keywords": ["cat", "cats"]},
        {"name": "mats", "label": "mat", "keywords": ["mat"]},
        {"name": "pays", "label": "money", "keywords": ["money", "pay"]},
    ]
    voted = label_weak(table(), functions, LABELS)
    merged = aggregate(voted, LABELS, method="majority")
    probs = SoftLabels.from_dataset(merged, LABELS).dense()
    np.testing.assert_allclose(
        probs, [[1, 0, 0], [0, 1, 0], [0.5, 0, 0.5], [0, 0, 0], [0.5, 0.5, 0]]
    )
    assert merged["error"][3] == "no source has a label"
    report = measure_annotators(merged, LABELS)
    assert [(one.source, one.votes) for one in report.annotators] == [
        *(("cats", 3), ("mats", 1), ("pays", 2)),
    ]
    with pytest.raises(ValueError, match="each of the 3 sources votes for one label only"):
        aggregate(voted, LABELS, method="dawid_skene")
    aggregate(voted, LABELS, method="dawid_skene", abstention="response")


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"label": "cat", "regex": "x"}, "a labeling function has no name"),
        ({"name": "f", "regex": "x"}, "'f' needs a label"),
        ({"name": "f", "label": "cat"}, "'f' needs one of regex, keywords"),
        (
            {"name": "f", "label": "cat", "regex": "x", "keywords": ["y"]},
            "it has .'regex', 'keywords'.",
        ),
        ({"name": "f", "label": "dog", "regex": "x"}, "'f': unknown label 'dog'"),
        ({"name": "f", "label": "cat", "regex": "(x"}, r"'f': missing \)"),
        ({"name": "f", "label": "cat", "keywords": "x"}, "keywords is a list of at least one text"),
        ({"name": "f", "label": "cat", "keywords": []}, "keywords is a list of at least one text"),
        (
            {"name": "f", "label": "cat", "regexp": "x"},
            "a part 'regexp', not one of name, label, regex",
        ),
        ({"name": "f", "label": "cat", "regex": "x", "threshold": 0.1}, "has no meaning for regex"),
        ({"name": "f", "label": "cat", "question": "x?"}, "'f' is a question; it needs engine="),
        ({"name": "f", "label": "cat", "similar_to": ["x"]}, "it needs encoder="),
        ({"name": "f", "label": "cat", "function": 3}, "something to call with a text; got 3"),
        ({"name": "f", "label": "cat", "function": HasWord}, "something to call with a text"),
        (
            {"name": "f", "label": "cat", "function": "os.system"},
            r"got 'os.system'; give the function, or in a recipe .call: \.\.\.",
        ),
        (
            {"name": "f", "function": "llmlabel.data.load"},
            "got 'llmlabel.data.load'; give the func",
        ),
        (
            {"name": "f", "function": "llmlabel.label.windows.windows"},
            "with --allow for its package",
        ),
        *(
            (
                {"name": "f", "label": "cat", "similar_to": ["x"], "threshold": threshold},
                f"'f': threshold must be a number from -1 to 1; got {threshold!r}",
            )
            for threshold in (1.01, -1.01, float("nan"), float("inf"), "high", None)
        ),
        (
            {"name": "f", "label": "cat", "question": "x?", "threshold": 50},
            "threshold must be a number from -1 to 1; got 50",
        ),
    ],
)
def test_what_is_given_wrongly_is_named(given: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        label_weak(table(), [given], LABELS)


def test_wrong_rows_are_refused() -> None:
    rule: LabelingFunction = {"name": "f", "label": "cat", "regex": "x"}
    with pytest.raises(ValueError, match="two labeling functions have the name 'f'"):
        label_weak(table(), [rule, rule], LABELS)
    with pytest.raises(ValueError, match=r"regex_seconds must be above 0; got 0.0"):
        label_weak(table(), [rule], LABELS, regex_seconds=0.0)
    rows = label_weak(table(["x"]), [rule], LABELS)
    with pytest.raises(ValueError, match="have the column votes already"):
        label_weak(rows, [rule], LABELS)
    with pytest.raises(ValueError, match="there are no rows to measure"):
        measure_functions(rows.select([]), LABELS)


class Secure:
    """Holds what cannot be pickled."""

    def __init__(self, word: str) -> None:
        self.word, self.context = word, ssl.create_default_context()

    def __call__(self, text: str) -> bool:
        return self.word in text.lower()


class Rebuilt(Secure):
    def __reduce__(self) -> tuple[type["Rebuilt"], tuple[str]]:
        return Rebuilt, (self.word,)


def test_a_function_is_told_from_others_only_where_blocks_are_kept(tmp_path: Path) -> None:
    lines = (line for line in ("a generator", "is no state to hash"))
    functions: list[LabelingFunction] = [
        {"name": "secure", "label": "cat", "function": Secure("cat")},
        {"name": "lines", "label": "mat", "function": lambda text: next(lines, None) == text},
        {"name": "all", "label": "mat", "function": lambda text: True},
    ]
    with pytest.warns(UserWarning, match="'lines' of 3 functions never vote"):
        got = label_weak(table(), functions, LABELS)
    assert [sorted(votes) for votes in said(got)] == [
        ["all", "secure"] if "cat" in text.lower() else ["all"] for text in TEXTS
    ]
    for function in functions[:2]:
        with pytest.raises(ValueError, match=r"leave output out, or give the object a __reduce__"):
            label_weak(table(), [function], LABELS, output=tmp_path)
    kept: list[LabelingFunction] = [{"name": "r", "label": "cat", "function": Rebuilt("cat")}]
    first = label_weak(table(), kept, LABELS, output=tmp_path)
    again = label_weak(table(), kept, LABELS, output=tmp_path)
    assert again.to_dict() == first.to_dict()


def test_a_label_named_twice_is_the_error_of_its_row() -> None:
    functions: list[LabelingFunction] = [
        {
            "name": "twice",
            "function": lambda text: (
                {"money": 0.5, "Money matters": 0.25} if "!" in text else {"cat": 1.0}
            ),
        }
    ]
    got = label_weak(table(), functions, LABELS)
    assert got["error"][1].startswith("twice: ValueError: it returned {'money': 0.5, 'Money")
    assert got["error"][1].endswith("which names one label twice")
    assert said(got)[1] == {}
    merged = aggregate(got, LABELS, method="majority")
    assert merged["label_ids"][:] == [[0], [], [0], [0], [0]]


# ------------------------------------------------------------------------------------------ recipe

RECIPE = """
labels: {call: llmlabel.labelspace.load_labels, source: [cat, mat]}
texts: {call: llmlabel.data.load, path: texts.jsonl}
functions:
  - {name: cats, label: cat, keywords: [cat]}
  - {name: mats, label: mat, function: {call: myrules.HasWord, word: mat}}
voted:
  call: llmlabel.label.weak.label_weak
  dataset: ${texts}
  functions: ${functions}
  labels: ${labels}
table: {call: llmlabel.label.weak.measure_functions, dataset: "${voted}", labels: "${labels}"}
"""


def test_a_recipe_needs_leave_for_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("myrules.py").write_text(
        "class HasWord:\n    def __init__(self, *, word: str):\n        self.word = word\n"
        "    def __call__(self, text: str) -> bool:\n        return self.word in text\n"
    )
    Path("texts.jsonl").write_text('{"text": "a cat"}\n{"text": "a mat"}\n')
    Path("weak.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"outside llmlabel.*--allow myrules"):
        check(load_recipe("weak.yaml"))
    recipe = load_recipe("weak.yaml")
    assert "HasWord(word='mat')" in to_python(recipe, allow=["myrules"]).replace('"', "'")
    results = run(recipe, output=Path("runs"), allow=["myrules"])
    assert said(results["voted"]) == [{"cats": (0, 1.0)}, {"mats": (1, 1.0)}]
    assert results["table"]["functions"]["mats"]["coverage"] == 0.5


def test_a_recipe_cannot_name_a_function_by_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "a cat"}\n')
    function = "functions=[{name: f, label: cat, function: llmlabel.data.load}]"
    Path("weak.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"functions.*callable"):
        check(load_recipe("weak.yaml", [function]))
    check(load_recipe("weak.yaml", ["functions=[{name: cats, label: cat, keywords: [cat]}]"]))


def test_a_recipe_with_a_misspelt_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "a cat"}\n')
    Path("weak.yaml").write_text(RECIPE.replace("keywords", "keyword"))
    recipe = load_recipe("weak.yaml", ["functions=[{name: cats, label: cat, keyword: [cat]}]"])
    with pytest.raises(RecipeError, match="keyword"):
        check(recipe)


def test_the_shipped_recipe_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path
) -> None:
    check(load_recipe("weak"))
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        name = ("cat", "money", "mat")[i % 3]
        file = Path("corpus") / name / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name} number {i}")
    functions = [
        "{name: cats, label: cat, keywords: [cat]}",
        "{name: coins, label: money, regex: '(?i)MON[a-z]+'}",
        "{name: asked, label: mat, question: 'Is it no mat?', threshold: 0.4}",
    ]
    recipe = load_recipe(
        "weak",
        [
            "engine={call: llmlabel.engine.fake.FakeEngine}",
            "labels.source=[cat, money, mat]",
            "articles.path=corpus",
            "parts.shares={some: 1.0}",
            f"minilm={tiny_encoder}",
            f"functions=[{', '.join(functions)}]",
        ],
    )
    results = run(recipe, output=Path("runs"))
    table = results["table"]["functions"]
    assert table["cats"]["coverage"] == table["coins"]["coverage"] == pytest.approx(1 / 3)
    assert table["cats"]["accuracy"] == table["coins"]["accuracy"] == 1.0
    kept = json.loads(Path("runs/weak/table/value.json").read_text())
    assert kept["functions"] == table
    lines = [json.loads(line) for line in Path("weak.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == results["consensus"]["id"][:]


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.skipif(not WRENCH.is_dir(), reason="no shared data")
def test_the_sms_rules_vote_as_recorded() -> None:
    rules = json.loads((WRENCH / "sms_rules.json").read_text("utf-8"))
    raw = gzip.decompress((WRENCH / "sms.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in raw.split("\n")[:-1]][::5]
    labels = load_labels(rules["classes"])
    functions: list[LabelingFunction] = [
        {"name": f"{number:02}", "label": rule["label"], "regex": rule["regex"]}
        for number, rule in enumerate(rules["rules"])
    ]
    texts = Dataset.from_dict(
        {"id": [row["id"] for row in rows], "text": [row["text"].strip().lower() for row in rows]}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rules that never vote
        voted = label_weak(texts, functions, labels)
    for row, votes in zip(rows, said(voted), strict=True):
        recorded = {f"{n:02}": (v, 1.0) for n, v in enumerate(row["weak_labels"]) if v >= 0}
        assert votes == recorded
    assert set(voted["error"]) == {None}
