from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter

from llmlabel.data import with_columns
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.label.prune_labels import Pruning, label_pruned, measure_pruning, prune_labels
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import chat_tokens, render
from llmlabel.softlabels import SoftLabels

NAMES = ("bug", "praise", "question", "invoice")
SPACE = LabelSpace(NAMES, NAMES, ("",) * 4, ((),) * 4)
TEXTS = ("a bug", "praise or question", "an invoice question", "what", "no set")
SETS = [[0], [1, 2], [3, 2, 0], [], None]
PROBS = [[0.9, 0.1, 0, 0], [0, 0.6, 0.4, 0], [0.2, 0, 0.3, 0.5], [0.2, 0.3, 0.3, 0.2], [0] * 4]


@pytest.fixture
def rows() -> Dataset:
    import numpy as np

    table = Dataset.from_dict(
        {
            "id": [f"r{i}" for i in range(5)],
            "text": list(TEXTS),
            "gold": [[0], [1], [1], None, []],
            "engine": ["student"] * 5,
        }
    )
    table = SoftLabels.from_dense(np.array(PROBS), SPACE).add_to(table)
    return with_columns(table, {"set_ids": (SETS, List(Value("int32")))})


def test_sets_become_candidates(rows: Dataset) -> None:
    every = prune_labels(rows, SPACE)
    assert every["candidates"][:] == [[0], [1, 2], [3, 2, 0], None, None]
    assert every.features["candidates"] == List(Value("int32"))
    top = prune_labels(rows, SPACE, empty="top")
    assert top["candidates"][:] == [[0], [1, 2], [3, 2, 0], [1], None]
    assert every["set_ids"][:] == SETS
    outside = with_columns(rows, {"set_ids": ([[4]] * 5, List(Value("int32")))})
    with pytest.raises(
        ValueError, match=r"has the candidates \[4\], but the labels have .* 0 to 3"
    ):
        prune_labels(outside, SPACE)
    with pytest.raises(ValueError, match="the column 'set_ids' is missing"):
        prune_labels(rows.remove_columns("set_ids"), SPACE)


def test_only_rows_with_a_choice_are_asked(rows: Dataset, tmp_path: Path) -> None:
    pruned = prune_labels(rows, SPACE)

    class Engine(FakeEngine):
        asked = 0

        def score(self, chats: Any, labels: Any, *, candidates: Any = None) -> Any:
            self.asked += len(chats)
            return super().score(chats, labels, candidates=candidates)

    engine = Engine()
    got = label_pruned(pruned, engine, SPACE, output=tmp_path)
    assert engine.asked == 4
    assert (got[0]["label_ids"], got[0]["engine"], got[0]["label_mass"]) == (
        [0, 1],
        "student",
        None,
    )
    assert got[0]["label_probs"] == pytest.approx([0.9, 0.1])
    direct = label_direct(pruned.select(range(1, 5)), FakeEngine(), SPACE)
    for name in ("label_ids", "label_probs", "label_mass", "prompt_sha", "error", "label_space"):
        assert got[name][1:] == direct[name][:], name
    assert {*got["engine"][1:]} == {engine.name}
    assert [set(ids) for ids in got["label_ids"][1:3]] == [{1, 2}, {0, 2, 3}]
    assert (got["gold"][:], got["id"][:]) == (rows["gold"][:], rows["id"][:])
    again = Engine()
    assert label_pruned(pruned, again, SPACE, output=tmp_path).to_list() == got.to_list()
    assert again.asked == 0


def test_the_answer_is_the_one_candidate_even_where_another_label_is_more_probable(
    rows: Dataset,
) -> None:
    one = with_columns(rows, {"candidates": ([[1]] * 5, List(Value("int32")))})
    got = label_pruned(one, FakeEngine(), SPACE)
    assert got["label_ids"][:] == [[1], [1, 2], [1], [1, 2, 0, 3], [1]]
    assert got["label_probs"][0] == [1.0]
    assert got["label_probs"][1] == pytest.approx([0.6, 0.4])


def test_a_candidate_without_a_soft_label_gets_all(rows: Dataset) -> None:
    bare = rows.remove_columns(["label_ids", "label_probs", "label_space", "engine"])
    one = with_columns(bare, {"candidates": ([[2]] * 5, List(Value("int32")))})
    got = label_pruned(one, FakeEngine(), SPACE)
    assert got["label_ids"][:] == [[2]] * 5
    assert got["label_probs"][:] == [[1.0]] * 5
    assert (got["engine"][:], got["error"][:]) == ([None] * 5, [None] * 5)
    assert SoftLabels.from_dataset(got, SPACE).probs.nnz == 5
    with pytest.raises(ValueError, match="a single candidate may still be wrong; use label_direct"):
        label_pruned(one, FakeEngine(), LabelSpace(NAMES, NAMES, ("",) * 4, ((),) * 4, True))


def test_tokens_are_those_of_the_prompts(
    rows: Dataset, tiny_tokenizer: Any, tiny_decoder: Path
) -> None:
    pruned = prune_labels(rows, SPACE)
    shown = [{"text": "it crashed", "label": "bug"}, {"text": "how", "label": "question"}]

    def tokens(row: int, some: list[int]) -> int:
        names = [NAMES[label] for label in some]
        chat = render(
            "label/direct",
            text=TEXTS[row],
            labels=names,
            demonstrations=[one for one in shown if one["label"] in names],
        )
        return len(chat_tokens(tiny_tokenizer, chat, max_tokens=10**6)[0])

    every = [0, 1, 2, 3]
    found = measure_pruning(pruned, SPACE, tiny_tokenizer, alpha=0.1, demonstrations=shown)
    assert found.tokens == sum(tokens(row, every) for row in range(5))
    few = [tokens(1, [1, 2]), tokens(2, [0, 2, 3]), tokens(3, every), tokens(4, every)]
    assert found.tokens_pruned == sum(few)
    assert found.saved == 1 - sum(few) / found.tokens
    assert (found.rows, found.asked, found.mean_labels, found.is_exact) == (5, 4, 13 / 4, True)
    # Of three rows with a true label, that of the third is pruned.
    assert (found.alpha, found.missed) == (0.1, 1 / 3)
    assert found.missed_interval == pytest.approx((0.0084, 0.9057), abs=1e-4)
    assert measure_pruning(pruned, SPACE, tiny_decoder, alpha=0.1, demonstrations=shown) == found
    adapter = TypeAdapter(Pruning)
    assert adapter.validate_json(adapter.dump_json(found)) == found
    unknown = measure_pruning(pruned.remove_columns("gold"), SPACE, tiny_tokenizer, alpha=0.1)
    assert (unknown.missed, unknown.missed_interval) == (None, None)
    with pytest.raises(ValueError, match=r"alpha must lie strictly between 0 and 1; got 1.5"):
        measure_pruning(pruned, SPACE, tiny_tokenizer, alpha=1.5)


GOLD = {
    "business": ["Profits of the bank rose by a tenth", "The company sold its shares"],
    "sport": ["The striker scored twice in the final", "She won the race in record time"],
    "politics": ["The minister lost the vote in parliament", "Voters go to the polls on Sunday"],
    "technology": ["The new phone has a faster chip", "A bug in the browser leaked passwords"],
    "food": ["Bake the bread for an hour", "The soup needs more salt"],
}
NEW = [
    "The goalkeeper saved a penalty",
    "Software updates for laptops",
    "Stocks fell",
    "Fry the fish",
]


@pytest.mark.model
def test_a_real_model_is_sent_the_tokens_that_were_counted() -> None:
    from llmlabel.calibrate.conformal import fit_conformal, predict_sets
    from llmlabel.engine.hf import HFEngine
    from llmlabel.label.embedding import label_embedding
    from llmlabel.models import MINILM, SMOLLM2

    names = tuple(GOLD)
    space = LabelSpace(names, names, ("",) * 5, ((),) * 5)
    texts = [(text, [k]) for k, name in enumerate(names) for text in GOLD[name]]
    gold = Dataset.from_dict(
        {
            "id": [f"g{i}" for i in range(10)],
            "text": [text for text, _ in texts],
            "gold": [some for _, some in texts],
        }
    )
    new = Dataset.from_dict({"id": list("abcd"), "text": NEW, "gold": [[1], [3], [0], [4]]})
    fitted = fit_conformal(label_embedding(gold, MINILM, space), space, alpha=0.2)
    sets = predict_sets(label_embedding(new, MINILM, space), space, fitted)
    pruned = prune_labels(sets, space)
    engine = HFEngine(SMOLLM2)
    saved = measure_pruning(pruned, space, SMOLLM2, alpha=fitted.alpha)
    got = label_pruned(pruned, engine, space)
    assert engine.usage.prompt_tokens == saved.tokens_pruned < saved.tokens
    for ids, some in zip(got["label_ids"], pruned["candidates"], strict=True):
        assert len(some or ()) == 1 or set(ids) == set(some or range(5))
